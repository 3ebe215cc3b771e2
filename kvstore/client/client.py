"""The Python client: the HTTP API of a router as typed asyncio calls.

Owns: the calls on keys, locks and transactions.
Promises: those of `connection`: a write is sent once, and what may have been done is never taken for what has not.
Leaves to others: what the calls mean (the router), operations and transactions in JSON (`operations`, `txn`),
splitting large batches (the caller).
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from kvstore.client.cluster_calls import ClusterCalls
from kvstore.client.held_lock import HeldLock, acquire_in_rounds
from kvstore.client.results import (
    Counted,
    Holder,
    Item,
    ListedItem,
    Page,
    Result,
    condition_headers,
    document_of,
    listed_from,
    quoted,
    result_from,
    ttl_text,
    version_of,
)
from kvstore.errors import NotFound, PreconditionFailed
from kvstore.operations import Get, Operation, checked_value, finite, operation_members
from kvstore.txn import Condition, TxnResult, TxnStatus, result_of, transaction_members

# Between the tries of an update, to spread those who change the same key ("full jitter").
_UPDATE_WAIT_S = 0.005
_UPDATE_WAIT_S_MAX = 1.0

_Results = list[Result]  # inside Client, `list` is the method


class Client(ClusterCalls):
    """One cluster, by the address of a router. Safe to share between the tasks of one event loop.

        async with Client("http://127.0.0.1:8080") as kv:
            version = await kv.put("greeting", b"hello")

    `retries`: how often a call is repeated of which surely nothing was done (see `connection`); 0 turns that off. Where
    the answer names a wait of more than 5 s, its error is raised at once. `timeout_s` bounds each try, without the wait
    for a lock. `retry_locked` False: Locked is raised at once. `on_wait` is told of the error and the seconds before
    each repeat.

    Raises ValueError for a `url` that is no http(s) address. Calls raise the errors of `kvstore.errors`; any of them
    may raise Unavailable.
    """

    # --- keys and values ------------------------------------------------------------------------------------

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        ttl: float | None = None,
        if_version: int | None = None,
        if_absent: bool = False,
        token: int | None = None,
        idempotency_key: str | None = None,
    ) -> int:
        """Store `value` and return its version. `ttl`: seconds until it expires; None clears an earlier one.

        `if_version`, `if_absent`: only if the key has that version, or does not exist (else PreconditionFailed).
        `token`: that of the lock on this key (else Locked, or LockLost when it is not the holder's). `idempotency_key`:
        the same key with the same request gives the first answer again and writes nothing twice.
        Raises ValueTooLarge, BadTtl, KeyTooLong, …; OutcomeUnknown when it may or may not have been written.
        """
        query = "" if ttl is None else f"?ttl={ttl_text(ttl)}"
        headers = condition_headers(if_version, if_absent, token, idempotency_key)
        path = f"/v1/kv/{quoted(key)}{query}"
        return version_of(await self.ask("PUT", path, body=checked_value(value), writes=True, headers=headers))

    async def get(self, key: str) -> Item | None:
        """The value of `key`, or None if there is no such key."""
        try:
            answer = await self.ask("GET", f"/v1/kv/{quoted(key)}")
        except NotFound:
            return None
        ttl = answer.headers.get("Kv-Ttl")
        return Item(answer.body, version_of(answer), float(ttl) if ttl else None)

    async def update(
        self, key: str, change: Callable[[bytes | None], bytes], *, ttl: float | None = None, tries_max: int = 100
    ) -> int:
        """Replace the value by `change(value)`, atomically: read, compute, write unless it changed, else again.

        `change` gets None where there is no key, and may be called several times, after pauses that grow with the
        number of tries and are drawn at random. Returns the version written. Raises PreconditionFailed after
        `tries_max` tries, OutcomeUnknown as `put`, ValueError if `tries_max` is below 1, and whatever `change` raises.
        """
        for number in range(1, tries_max + 1):
            item = await self.get(key)
            value = change(None if item is None else item.value)
            version = None if item is None else item.version
            try:
                return await self.put(key, value, ttl=ttl, if_version=version, if_absent=item is None)
            except PreconditionFailed:
                if number == tries_max:
                    raise
            await asyncio.sleep(random.uniform(0.0, min(_UPDATE_WAIT_S * 2**number, _UPDATE_WAIT_S_MAX)))
        raise ValueError("tries_max is at least 1")

    async def delete(
        self,
        key: str,
        *,
        if_version: int | None = None,
        token: int | None = None,
        idempotency_key: str | None = None,
    ) -> bool:
        """Delete the key; returns whether there was one. The conditions are those of `put`.

        Raises PreconditionFailed, Locked, LockLost; OutcomeUnknown when it cannot be told.
        """
        headers = condition_headers(if_version, False, token, idempotency_key)
        try:
            await self.ask("DELETE", f"/v1/kv/{quoted(key)}", writes=True, headers=headers)
        except NotFound:
            return False
        return True

    async def list(self, prefix: str = "", *, values: bool = False, page_size: int = 1000) -> AsyncIterator[ListedItem]:
        """The keys that start with `prefix`, in byte order, fetched page by page: not one instant."""
        async for page in self.pages(prefix, values=values, page_size=page_size):
            for item in page.items:
                yield item

    async def pages(
        self,
        prefix: str = "",
        *,
        values: bool = False,
        page_size: int = 1000,
        after: str | None = None,
        skip_down: bool = False,
    ) -> AsyncIterator[Page]:
        """The listing by pages of at most `page_size` items; `after` is the `next` of an earlier page.

        `skip_down`: what is down is left out, and named by each page that lacks it, instead of Unavailable.
        Raises BadCursor if `after` is not such a cursor.
        """
        query = f"/v1/kv?prefix={quoted(prefix, in_path=False)}&limit={page_size}"
        query += "&values=true" if values else ""
        query += "&partial=true" if skip_down else ""
        more = True
        while more:
            cursor = "" if after is None else f"&after={quote(after, safe='')}"
            document = document_of(await self.ask("GET", query + cursor))
            after = document.get("next")
            more = after is not None
            yield Page([listed_from(item) for item in document["items"]], after, document.get("missing", ()))

    async def count(self, prefix: str = "") -> int:
        """The number of keys that start with `prefix`."""
        answer = await self.ask("GET", f"/v1/kv?prefix={quoted(prefix, in_path=False)}&count=true")
        return int(document_of(answer)["count"])

    async def count_what_is_up(self, prefix: str = "") -> Counted:
        """As `count`, without the keys of shards that are down."""
        answer = await self.ask("GET", f"/v1/kv?prefix={quoted(prefix, in_path=False)}&count=true&partial=true")
        document = document_of(answer)
        return Counted(int(document["count"]), document["missing"])

    async def batch(self, operations: Sequence[Operation]) -> _Results:
        """Carry out independent operations in one request, not atomically; results in their order.

        One that cannot be done fails alone: its `Result.error` says why (429 and 503, too: repeating single
        operations is left to the caller). Raises BodyTooLarge (beyond 16 MiB of JSON) or BadBody when all of
        it was refused, OutcomeUnknown when the connection broke and the batch has writes.
        """
        if not operations:
            return []
        writes = any(not isinstance(operation, Get) for operation in operations)
        body = msgspec.json.encode({"ops": [operation_members(operation) for operation in operations]})
        document = document_of(await self.ask("POST", "/v1/batch", body=body, writes=writes))
        return [result_from(entry) for entry in document["results"]]

    async def txn(
        self,
        then: Sequence[Operation],
        *,
        conditions: Sequence[Condition] = (),
        otherwise: Sequence[Operation] = (),
        idempotency_key: str | None = None,
    ) -> TxnResult:
        """Do all of `then` if all conditions hold, else all of `otherwise`: atomically, over any keys (`kvstore.txn`).

        `idempotency_key`: the same key with the same transaction gives the first answer again and writes nothing twice.
        Raises Locked where another client holds the lock of a key, Conflict when others stood in the way for too long
        (nothing was written in both cases), BadBody for a key written twice; OutcomeUnknown when it may or may not have
        been committed: its member `txn_id`, if there is one, is for `txn_status`.
        """
        body = msgspec.json.encode(transaction_members(then, conditions, otherwise))
        writes = any(not isinstance(operation, Get) for operation in (*then, *otherwise))
        return result_of(await self._transact(body, writes, idempotency_key))

    async def txn_json(self, body: bytes, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """As `txn`, with the JSON of POST /v1/txn, which is sent as it is, and its answer."""
        return await self._transact(body, True, idempotency_key)

    async def _transact(self, body: bytes, writes: bool, idempotency_key: str | None) -> dict[str, Any]:
        headers = condition_headers(None, False, None, idempotency_key)
        return document_of(await self.ask("POST", "/v1/txn", body=body, writes=writes, headers=headers))

    async def txn_status(self, txn_id: str) -> TxnStatus | None:
        """What became of a transaction, known while it is in doubt, and longer of one with an idempotency key.

        None says nothing: it may have been committed.
        """
        try:
            status: TxnStatus = document_of(await self.ask("GET", f"/v1/txn/{quoted(txn_id)}"))["status"]
        except NotFound:
            return None
        return status

    # --- locks ----------------------------------------------------------------------------------------------

    def lock(self, name: str, *, ttl: float = 30.0, wait: float = 0.0, owner: str = "") -> HeldLock:
        """`async with kv.lock("name") as lock:` holds the lock for the block; see `HeldLock`. Times in seconds."""
        return HeldLock(self, name, ttl=ttl, wait=wait, owner=owner, idempotency_key=str(uuid.uuid4()))

    async def acquire(
        self, name: str, *, ttl: float = 30.0, wait: float = 0.0, owner: str = "", idempotency_key: str | None = None
    ) -> int:
        """Acquire the lock and return its fencing token. Raises Locked when it is not free within `wait` seconds.

        A wait of more than 60 s begins again every 60 s, at the end of the queue. If this call is cancelled, or its
        outcome is not known, what it asked for is withdrawn. With an `idempotency_key` of the caller's own it is a
        single request, of 60 s at most, and `withdraw` is the caller's.
        """
        if idempotency_key is None:
            key = str(uuid.uuid4())
            token, _ = await acquire_in_rounds(
                self, name, ttl=ttl, wait=wait, owner=owner, idempotency_key=key, tries=1
            )
            return token
        body = msgspec.json.encode({"ttl": finite(ttl), "wait": finite(wait), "owner": owner})
        headers = condition_headers(None, False, None, idempotency_key)
        path = f"/v1/locks/{quoted(name)}"
        answer = await self.ask("POST", path, body=body, writes=True, headers=headers, retries=0, wait_s=wait)
        return int(document_of(answer)["token"])

    async def renew(self, name: str, token: int, *, new_connection: bool = False) -> None:
        """Extend the lease by its full time from now. Raises LockLost.

        `new_connection`: not on one that was used before, which a proxy may have dropped without a sign of it.
        """
        await self._with_token("PUT", name, token, new_connection)

    async def release(self, name: str, token: int, *, new_connection: bool = False) -> None:
        """Give the lock back. Raises LockLost. `new_connection` as in `renew`."""
        await self._with_token("DELETE", name, token, new_connection)

    async def _with_token(self, method: str, name: str, token: int, new_connection: bool) -> None:
        headers = condition_headers(None, False, token, None)
        session = self._fresh if new_connection else None
        await self.ask(method, f"/v1/locks/{quoted(name)}", writes=True, headers=headers, session=session)

    async def withdraw(self, name: str, idempotency_key: str) -> None:
        """Let go what the acquire with that key was granted, or waits for; should it arrive later, it is refused."""
        path = f"/v1/locks/{quoted(name)}?acquire={quote(idempotency_key, safe='')}"
        await self.ask("DELETE", path, writes=True, session=self._fresh)  # the acquire's may be dead without a sign

    async def holder(self, name: str) -> Holder | None:
        """The client that holds the lock, or None."""
        try:
            document = document_of(await self.ask("GET", f"/v1/locks/{quoted(name)}"))
        except NotFound:
            return None
        return Holder(document["name"], document["owner"], document["token"], document["ttl_left"], document["waiting"])

    async def holders(self, prefix: str = "", *, page_size: int = 1000) -> AsyncIterator[Holder]:
        """The locks that are held and whose name starts with `prefix`, by name; `waiting` is not counted (0)."""
        query = f"/v1/locks?prefix={quoted(prefix, in_path=False)}&limit={page_size}"
        cursor: str | None = ""
        while cursor is not None:
            document = document_of(
                await self.ask("GET", query + (f"&after={quote(cursor, safe='')}" if cursor else ""))
            )
            cursor = document.get("next")
            for item in document["items"]:
                yield Holder(item["name"], item["owner"], item["token"], item["ttl_left"])
