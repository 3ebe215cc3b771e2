"""The Python client: the HTTP API of a router as typed asyncio calls.

Owns: percent-encoding of keys, what a broken connection means, waiting before a repeat.
Promises: a write is sent once. What may have been done and what has not are never confused:

    nothing was sent (refused, no route, no such host)      Unavailable
    a read whose connection broke                           repeated, then Unavailable
    a write whose connection broke, or took too long        OutcomeUnknown, never repeated
    the answer "nothing was done" (409, 423, 429, 503)      repeated after the wait that it names
    every other problem document                            the class of `kvstore.errors` with that code

Leaves to others: what the calls mean (the router), operations and transactions in JSON (`operations`, `txn`),
splitting large batches (the caller).

aiohttp by itself repeats PUT and DELETE once when a kept connection turns out to be dead, which may be after
the request was carried out; that is switched off here (`ClientSession._retry_connection`; a test watches).
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import TracebackType
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from kvstore.errors import (
    KvError,
    Locked,
    NotFound,
    OutcomeUnknown,
    PreconditionFailed,
    Unavailable,
    from_problem,
)
from kvstore.held_lock import HeldLock, acquire_in_rounds
from kvstore.operations import (
    Delete,
    Get,
    Operation,
    Put,
    checked_key,
    checked_value,
    finite,
    operation_members,
    value_of,
)
from kvstore.txn import Condition, TxnResult, TxnStatus, result_of, transaction_members

__all__ = [
    "DEFAULT_URL",
    "Client",
    "Delete",
    "Get",
    "Holder",
    "Item",
    "ListedItem",
    "Operation",
    "Page",
    "Put",
    "Result",
    "TxnResult",
    "base_url",
]

DEFAULT_URL = "http://127.0.0.1:8080"
CONNECT_TIMEOUT_S = 5.0
RETRY_WAIT_S_MAX = 5.0
RETRY_WAIT_MS_UNNAMED = 100
# A body beyond this is announced first (Expect: 100-continue), so that a refusal arrives before it is sent,
# and handed over as a stream, as aiohttp asks for.
LARGE_BODY_BYTES = 1024 * 1024

# Between the tries of an update, to spread those who change the same key ("full jitter").
_UPDATE_WAIT_S = 0.005
_UPDATE_WAIT_S_MAX = 1.0

_PROBLEM = "application/problem+json"
_NO_ROUTER_NEXT_STEP = f"Give the address of a router: `kvstore up` prints it ({DEFAULT_URL} by default)."
_UNREACHABLE_NEXT_STEP = "Start the cluster (kvstore up), or give the address of its router."


@dataclass(frozen=True, slots=True)
class Item:
    """A value with its version; `ttl` is the time left in seconds, None if it does not expire."""

    value: bytes
    version: int
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class ListedItem:
    """A key of a listing. `value` and `ttl` (seconds left) are None unless values were asked for."""

    key: str
    version: int
    value: bytes | None = None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A lock that is held: by whom, with which token, for how many seconds at most, and how many wait for it."""

    name: str
    owner: str
    token: int
    ttl_left: float
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Items in key order; `next` is the cursor of the page after, None on the last one.

    `missing`: the partitions that were left out because their shard is down.
    """

    items: Sequence[ListedItem]
    next: str | None
    missing: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Counted:
    """How many keys there are, without those of the partitions that are `missing` because their shard is down."""

    count: int
    missing: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one operation of a batch. `error` is None if it was done, else the reason (not raised).

    A get or delete of a key that is not there has a `NotFound` as its error. `value` is that of a get.
    """

    key: str
    status: int
    version: int | None = None
    value: bytes | None = None
    ttl: float | None = None
    error: KvError | None = None


_Results = list[Result]  # inside Client, `list` is the method


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """One cluster, by the address of a router. Safe to share between the tasks of one event loop.

        async with Client("http://127.0.0.1:8080") as kv:
            version = await kv.put("greeting", b"hello")

    `retries`: how often a call is repeated of which surely nothing was done (see above); 0 turns that off.
    Where the answer names a wait of more than 5 s, its error is raised at once. `timeout_s` bounds each try.
    `retry_locked` False: Locked is raised at once. `on_wait` is told of the error and the seconds before each repeat.
    Raises ValueError for a `url` that is no http(s) address. Calls raise the errors of `kvstore.errors`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 3,
        timeout_s: float = 30.0,
        connections_max: int = 100,
        retry_locked: bool = True,
        on_wait: Callable[[KvError, float], None] | None = None,
    ) -> None:
        self.url = base_url(url)
        self._retries = retries
        self._retry_locked = retry_locked
        self._on_wait = on_wait
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._connections_max = connections_max
        self._http: aiohttp.ClientSession | None = None
        # Whoever waits for a lock keeps a connection busy: out of `connections_max`, its holder could find none left.
        self._waiting: aiohttp.ClientSession | None = None
        # Every request has a connection of its own: the pooled ones may all be dead without a sign of it.
        self._fresh: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._http = self._session(self._connections_max)
        self._waiting = self._session(0)
        self._fresh = self._session(0, force_close=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _session(self, connections_max: int, *, force_close: bool = False) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections_max, force_close=force_close),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )
        session._retry_connection = False
        return session

    async def close(self) -> None:
        """Close all connections. The client cannot be used afterwards."""
        sessions = (self._http, self._waiting, self._fresh)
        self._http = self._waiting = self._fresh = None
        for session in sessions:
            if session is not None:
                await session.close()

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
        query = "" if ttl is None else f"?ttl={_ttl_text(ttl)}"
        headers = _guards(if_version, if_absent, token, idempotency_key)
        path = f"/v1/kv/{_quoted(key)}{query}"
        return _version(await self._ask("PUT", path, body=checked_value(value), writes=True, headers=headers))

    async def get(self, key: str) -> Item | None:
        """The value of `key`, or None if there is no such key."""
        try:
            answer = await self._ask("GET", f"/v1/kv/{_quoted(key)}")
        except NotFound:
            return None
        ttl = answer.headers.get("Kv-Ttl")
        return Item(answer.body, _version(answer), float(ttl) if ttl else None)

    async def update(
        self, key: str, change: Callable[[bytes | None], bytes], *, ttl: float | None = None, tries_max: int = 100
    ) -> int:
        """Replace the value by `change(value)`, atomically: read, compute, write unless it changed, else again.

        `change` gets None where there is no key, and may be called several times, after pauses that grow with the
        number of tries and are drawn at random. Returns the version written. Raises PreconditionFailed after
        `tries_max` tries, OutcomeUnknown as `put`, and whatever `change` raises.
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
        """Whether there was such a key; it is gone now. The conditions are those of `put`.

        Raises OutcomeUnknown when it cannot be told.
        """
        headers = _guards(if_version, False, token, idempotency_key)
        try:
            await self._ask("DELETE", f"/v1/kv/{_quoted(key)}", writes=True, headers=headers)
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
        query = f"/v1/kv?prefix={_quoted(prefix, in_path=False)}&limit={page_size}"
        query += "&values=true" if values else ""
        query += "&partial=true" if skip_down else ""
        more = True
        while more:
            cursor = "" if after is None else f"&after={quote(after, safe='')}"
            document = _document(await self._ask("GET", query + cursor))
            after = document.get("next")
            more = after is not None
            yield Page([_listed(item) for item in document["items"]], after, document.get("missing", ()))

    async def count(self, prefix: str = "") -> int:
        """The number of keys that start with `prefix`."""
        answer = await self._ask("GET", f"/v1/kv?prefix={_quoted(prefix, in_path=False)}&count=true")
        return int(_document(answer)["count"])

    async def count_what_is_up(self, prefix: str = "") -> Counted:
        """As `count`, without the keys of shards that are down."""
        answer = await self._ask("GET", f"/v1/kv?prefix={_quoted(prefix, in_path=False)}&count=true&partial=true")
        document = _document(answer)
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
        document = _document(await self._ask("POST", "/v1/batch", body=body, writes=writes))
        return [_result(entry) for entry in document["results"]]

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
        Raises Locked where somebody else holds the lock of a key, Conflict when others stood in the way for too long
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
        headers = _guards(None, False, None, idempotency_key)
        return _document(await self._ask("POST", "/v1/txn", body=body, writes=writes, headers=headers))

    async def txn_status(self, txn_id: str) -> TxnStatus | None:
        """What became of a transaction, known while it is in doubt, and longer of one with an idempotency key.

        None says nothing: it may have been committed.
        """
        try:
            status: TxnStatus = _document(await self._ask("GET", f"/v1/txn/{_quoted(txn_id)}"))["status"]
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
        headers = _guards(None, False, None, idempotency_key)
        path = f"/v1/locks/{_quoted(name)}"
        answer = await self._ask("POST", path, body=body, writes=True, headers=headers, retries=0, wait_s=wait)
        return int(_document(answer)["token"])

    async def renew(self, name: str, token: int, *, new_connection: bool = False) -> None:
        """Extend the lease by its full time from now. Raises LockLost.

        `new_connection`: not on one that was used before, which a proxy may have dropped without a sign of it.
        """
        await self._with_token("PUT", name, token, new_connection)

    async def release(self, name: str, token: int, *, new_connection: bool = False) -> None:
        """Give the lock back. Raises LockLost. `new_connection` as in `renew`."""
        await self._with_token("DELETE", name, token, new_connection)

    async def _with_token(self, method: str, name: str, token: int, new_connection: bool) -> None:
        headers = _guards(None, False, token, None)
        session = self._fresh if new_connection else None
        await self._ask(method, f"/v1/locks/{_quoted(name)}", writes=True, headers=headers, session=session)

    async def withdraw(self, name: str, idempotency_key: str) -> None:
        """Let go what the acquire with that key was granted, or waits for; should it arrive later, it is refused."""
        path = f"/v1/locks/{_quoted(name)}?acquire={quote(idempotency_key, safe='')}"
        await self._ask("DELETE", path, writes=True, session=self._fresh)  # the acquire's may be dead without a sign

    async def holder(self, name: str) -> Holder | None:
        """Who holds the lock, or None."""
        try:
            document = _document(await self._ask("GET", f"/v1/locks/{_quoted(name)}"))
        except NotFound:
            return None
        return Holder(document["name"], document["owner"], document["token"], document["ttl_left"], document["waiting"])

    async def holders(self, prefix: str = "", *, page_size: int = 1000) -> AsyncIterator[Holder]:
        """The locks that are held and whose name starts with `prefix`, by name; `waiting` is not counted (0)."""
        query = f"/v1/locks?prefix={_quoted(prefix, in_path=False)}&limit={page_size}"
        cursor: str | None = ""
        while cursor is not None:
            document = _document(await self._ask("GET", query + (f"&after={quote(cursor, safe='')}" if cursor else "")))
            cursor = document.get("next")
            for item in document["items"]:
                yield Holder(item["name"], item["owner"], item["token"], item["ttl_left"])

    # --- the cluster ----------------------------------------------------------------------------------------

    async def cluster(self) -> dict[str, Any]:
        """GET /v1/cluster: shards, epoch, moves."""
        return _document(await self._ask("GET", "/v1/cluster"))

    async def add_shard(
        self, shard_id: str, url: str | None = None, *, weight: int = 1, plan: bool = False
    ) -> dict[str, Any]:
        """Add the shard that serves at `url`, or one that the running `kvstore up` starts.

        {"id","state","epoch","change"}. It returns before anything has moved; `change` is the id with which `change`
        tells how far that is, here and in the calls below. With `plan`, here and in the calls below,
        nothing is changed: {"partitions","keys","bytes","moves"} tells what would move. Raises ChangeRefused,
        ForeignData.
        """
        body = {"id": shard_id, "weight": weight} | ({} if url is None else {"url": url})
        return await self._change("POST", "/v1/shards", body, plan)

    async def weigh_shard(self, shard_id: str, weight: int, *, plan: bool = False) -> dict[str, Any]:
        """Change the shard's weight. Raises NotFound, ChangeRefused while it is leaving."""
        return await self._change("PATCH", f"/v1/shards/{quote(shard_id, safe='')}", {"weight": weight}, plan)

    async def remove_shard(self, shard_id: str, *, plan: bool = False) -> dict[str, Any]:
        """Drain and remove the shard. Raises NotFound, ChangeRefused for the last one."""
        return await self._change("DELETE", f"/v1/shards/{quote(shard_id, safe='')}", None, plan)

    async def give_up_shard(self, shard_id: str, *, confirm: str) -> dict[str, Any]:
        """Give up a shard whose disk is lost: its partitions are opened anew, empty. `confirm`: its id again.

        {"id","state","epoch","partitions"}: how many partitions that are. Raises NotFound, ChangeRefused.
        """
        path = f"/v1/shards/{quote(shard_id, safe='')}?lost=true&confirm={quote(confirm, safe='')}"
        return _taken(await self._ask("DELETE", path, writes=True))

    async def accept_old(self, shard_id: str, confirm: str) -> dict[str, Any]:
        """Let the shard start with an older copy of its file: {"id","told","version"}, as it had told before.

        All that the copy lacks is lost. `confirm` is the shard's id. Raises NotFound, BadBody.
        """
        path = f"/v1/shards/{quote(shard_id, safe='')}/accept-old"
        return await self._change("POST", path, {"confirm": confirm}, False)

    async def rebalance(self, *, plan: bool = False) -> dict[str, Any]:
        """Plan what the present members and weights ask for, as after `cancel_moves`."""
        return await self._change("POST", "/v1/moves", None, plan)

    async def cancel_moves(self) -> dict[str, Any]:
        """Give up all that has not moved yet; a shard that was leaving stays, one that has nothing yet goes."""
        return await self._change("DELETE", "/v1/moves", None, False)

    async def change(self, change_id: str) -> dict[str, Any]:
        """GET /v1/changes/{id}: how far a change of the cluster is, or how it ended. Raises NotFound."""
        return _document(await self._ask("GET", f"/v1/changes/{quote(change_id, safe='')}"))

    async def changes(self) -> list[dict[str, Any]]:
        """GET /v1/changes: those that run and the last that ended, the newest first."""
        items: list[dict[str, Any]] = _document(await self._ask("GET", "/v1/changes"))["items"]
        return items

    async def _change(self, method: str, path: str, body: dict[str, Any] | None, plan: bool) -> dict[str, Any]:
        query = "?plan=true" if plan else ""
        encoded = None if body is None else msgspec.json.encode(body)
        return _taken(await self._ask(method, path + query, body=encoded, writes=not plan))

    async def explain(self, key: str) -> dict[str, Any]:
        """GET /v1/explain/{key}: hash, partition, ring walk, owner, version."""
        return _document(await self._ask("GET", f"/v1/explain/{_quoted(key)}"))

    async def ready(self) -> bool:
        """Whether the router can serve; False also when nobody answers at the address."""
        try:
            await self._ask("GET", "/readyz", retries=0)
        except Unavailable:
            return False
        return True

    # --- one request ----------------------------------------------------------------------------------------

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        writes: bool = False,
        retries: int | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        session: aiohttp.ClientSession | None = None,
    ) -> _Answer:
        """One call, repeated while the error names a wait; that it does only if nothing was done."""
        left = self._retries if retries is None else retries
        while True:
            try:
                answer = await self._send_once(method, path, body, writes, headers, wait_s, session)
                if answer.status < 300:
                    return answer
                raise self._error(answer, writes)
            except KvError as error:
                wait_ms = error.members.get("retry_after_ms")
                if not (error.retryable and left and isinstance(wait_ms, int | float)):
                    raise
                if wait_ms > RETRY_WAIT_S_MAX * 1000 or (isinstance(error, Locked) and not self._retry_locked):
                    raise
                failed = error
            left -= 1
            # Spread out: those who were turned away together should not come back together.
            wait_s = wait_ms / 1000 * random.uniform(1.0, 1.5)
            if self._on_wait is not None:
                self._on_wait(failed, wait_s)
            await asyncio.sleep(wait_s)

    async def _send_once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        writes: bool,
        headers: Mapping[str, str] | None,
        wait_s: float,
        session: aiohttp.ClientSession | None,
    ) -> _Answer:
        session = session or (self._waiting if wait_s else self._http)
        if session is None:
            raise RuntimeError("the client is not open: use `async with Client(url) as kv:`")
        total_s = None if self._timeout.total is None else self._timeout.total + wait_s
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_TIMEOUT_S) if wait_s else self._timeout
        large = body is not None and len(body) > LARGE_BODY_BYTES
        try:
            async with session.request(
                method,
                URL(self.url + path, encoded=True),  # otherwise yarl would resolve `..` and re-quote the key
                data=io.BytesIO(body) if large and body else body,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                expect100=large,
            ) as response:
                return _Answer(response.status, response.headers, await response.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unavailable(
                f"{self.url} cannot be reached: {_reason(error)}", next_step=_UNREACHABLE_NEXT_STEP
            ) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            broken = f"the answer of {self.url} did not arrive: {_reason(error)}"
            if writes:
                raise OutcomeUnknown(broken) from error
            raise Unavailable(broken, retry_after_ms=RETRY_WAIT_MS_UNNAMED) from error

    def _error(self, answer: _Answer, writes: bool) -> KvError:
        """The error of an answer that is no success. One that no router wrote (a proxy?) proves nothing."""
        if answer.headers.get("Content-Type", "").partition(";")[0].strip() == _PROBLEM:
            error = from_problem(_document(answer))
            if error.retryable and "retry_after_ms" not in error.members:
                seconds = answer.headers.get("Retry-After", "")
                error.members["retry_after_ms"] = int(seconds) * 1000 if seconds.isdecimal() else RETRY_WAIT_MS_UNNAMED
            return error
        what = f"{self.url} answered {answer.status} without a problem document: that is no router of kvstore."
        if answer.status < 500:
            return KvError(what, next_step=_NO_ROUTER_NEXT_STEP)
        return OutcomeUnknown(what) if writes else Unavailable(what, next_step=_NO_ROUTER_NEXT_STEP)


def base_url(url: str) -> str:
    """`url` without trailing slash. Raises ValueError unless it is http(s), without query or fragment."""
    parsed = URL(url)
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError(f"{url!r} is no address: give one like {DEFAULT_URL}")
    if parsed.raw_query_string or parsed.raw_fragment:
        raise ValueError(f"{url!r} has a query or fragment: give only scheme, host and port")
    return str(parsed).rstrip("/")


# --- forms on the wire --------------------------------------------------------------------------------------


def _quoted(key: str, in_path: bool = True) -> str:
    """Percent-encode all but unreserved characters, so that no proxy takes a part of the key for syntax."""
    text = quote(checked_key(key).encode(), safe="")
    # `.` and `..` alone would be segments with a meaning; as `/` is encoded, no other key has segments.
    return text.replace(".", "%2E") if in_path and text in {".", ".."} else text


def _guards(if_version: int | None, if_absent: bool, token: int | None, once: str | None) -> dict[str, str]:
    headers = {}
    if if_version is not None:
        headers["If-Match"] = f'"{if_version}"'
    if if_absent:
        headers["If-None-Match"] = "*"
    if token is not None:
        headers["Lock-Token"] = str(token)
    if once is not None:
        headers["Idempotency-Key"] = once
    return headers


def _ttl_text(ttl: float) -> str:
    return format(Decimal(repr(finite(ttl))), "f")  # decimal seconds, never an exponent


def _result(entry: dict[str, Any]) -> Result:
    status = int(entry["status"])
    error = None if status < 400 else from_problem({name: entry[name] for name in entry if name != "key"})
    return Result(
        key=entry["key"],
        status=status,
        version=entry.get("version"),
        value=value_of(entry),
        ttl=entry.get("ttl"),
        error=error,
    )


def _listed(item: dict[str, Any]) -> ListedItem:
    return ListedItem(item["key"], item["version"], value_of(item), item.get("ttl"))


def _taken(answer: _Answer) -> dict[str, Any]:
    """The document, and the id of the change that it is about, if the answer names one."""
    path, _, change_id = answer.headers.get("Location", "").rpartition("/")
    return _document(answer) | ({"change": change_id} if path == "/v1/changes" else {})


def _document(answer: _Answer) -> dict[str, Any]:
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise KvError(
            f"the answer ({answer.status}) is not a JSON object: {error}: that is no router of kvstore.",
            next_step=_NO_ROUTER_NEXT_STEP,
        ) from error


def _version(answer: _Answer) -> int:
    tag = answer.headers.get("ETag", "").strip('"')
    if not tag.isdecimal():
        raise KvError(
            f"the answer ({answer.status}) has no version in its ETag: that is no router of kvstore.",
            next_step=_NO_ROUTER_NEXT_STEP,
        )
    return int(tag)


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted ({error.certificate_error})"
    if isinstance(error, aiohttp.ClientSSLError):  # its errno is none of the system's
        return "what listens there does not speak TLS; a router is reached by http://"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error.strerror or error.os_error)
    if isinstance(error, TimeoutError):
        return "it took too long"
    return str(error) or type(error).__name__
