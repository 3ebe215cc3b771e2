"""The HTTP of locks: acquire, renew, release, inspect, list.

Owns: parameters, statuses and documents of `/v1/locks`.
Promises: a waiter whose client goes away leaves the queue, and what was granted to it in that moment is given back,
unless the same request waited on another connection, too. A waiter whose lock's partition changes hands goes on waiting
at the new owner, for what is left of its time. Behind a proxy that keeps its own connection open nobody can see that a
client has left: it says so itself, by withdrawing what it asked for with its Idempotency-Key.
Leaves to others: who holds what and who is next (the shard's lock table).
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadParameter,
    BadTtl,
    BodyTooLarge,
    KvError,
    Locked,
    NotFound,
    Unavailable,
    WrongOwner,
    from_problem,
)
from kvstore.protocol import Acquire, Answer, CancelWait, GetLock, Release, Renew
from kvstore.router.decode import decode_once, decode_token, refuse_headers, seconds_to_ms
from kvstore.router.service import RouterService
from kvstore.transport.bodies import BodyReader
from kvstore.transport.channel import Channel
from kvstore.transport.http.requests import Head, client_has_left, decode_query
from kvstore.transport.http.responses import JSON, Response, json_response

_NONE: frozenset[str] = frozenset()
_ACQUIRE = frozenset({"acquire"})
_LOOK_S = 0.1
_BODY_BYTES_MAX = 4096
TTL_DEFAULT_S = 30.0
TTL_MIN_S = 0.1


class AcquireBody(Struct, forbid_unknown_fields=True):
    """All optional: seconds, seconds, a name for people."""

    ttl: float | UnsetType = UNSET
    wait: float | UnsetType = UNSET
    owner: str | UnsetType = UNSET


class LockRoutes:
    def __init__(self, service: RouterService, limits: Limits, bodies: BodyReader) -> None:
        self._service = service
        self._limits = limits
        self._bodies = bodies
        self.waiting = 0  # requests that wait for a lock now

    async def acquire(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        refuse_headers(head, "if-match", "if-none-match", "lock-token")
        raw = await self._bodies.read(request, head, _BODY_BYTES_MAX, BodyTooLarge)
        ttl_ms, wait_ms, owner = self._decode_acquire(raw)
        ask = Acquire(0, name, ttl_ms, wait_ms, owner, decode_once(head, raw))
        answer = _checked(await self._wait(ask, request))
        document = {"name": name, "token": answer.version, "owner": owner, "ttl": ttl_ms / 1000}
        return json_response(201, document, f"Lock-Token: {answer.version}\r\n")

    def _decode_acquire(self, raw: bytes) -> tuple[int, int, str]:
        try:
            body = msgspec.json.decode(raw, type=AcquireBody) if raw.strip() else AcquireBody()
            owner = "" if body.owner is UNSET else body.owner
            owner_bytes = len(owner.encode())
        except (msgspec.DecodeError, UnicodeError) as error:
            raise BadBody(f'the body is not {{"ttl":…,"wait":…,"owner":…}} as documented: {error}') from None
        limits = self._limits
        ttl_s = TTL_DEFAULT_S if body.ttl is UNSET else body.ttl
        wait_s = 0.0 if body.wait is UNSET else body.wait
        if not TTL_MIN_S <= ttl_s <= limits.lock_ttl_s_max:
            bounds = {"lock_ttl_s_min": TTL_MIN_S, "lock_ttl_s_max": limits.lock_ttl_s_max}
            raise BadTtl(f"a lock's ttl is {TTL_MIN_S:g} to {limits.lock_ttl_s_max} s, not {ttl_s:g}", **bounds)
        if not 0 <= wait_s <= limits.lock_wait_s_max:
            raise BadParameter(f"wait is 0 to {limits.lock_wait_s_max} s, not {wait_s:g}", parameter="wait")
        if owner_bytes > limits.owner_bytes_max:
            detail = f"owner has {owner_bytes} bytes; the limit is {limits.owner_bytes_max}"
            raise BadParameter(detail, parameter="owner", owner_bytes_max=limits.owner_bytes_max)
        return seconds_to_ms(ttl_s), math.ceil(wait_s * 1000), owner

    async def _wait(self, ask: Acquire, request: web.BaseRequest) -> Answer:
        """The answer; while it takes its time, look whether the client is still there. Raises Locked if it is not."""
        if not ask.wait_ms:
            answer = (await self._service.ask(ask)).answer
        else:
            self.waiting += 1
            try:
                answer = await self._wait_in_line(ask, request)
            finally:
                self.waiting -= 1
        if answer.status == 201 and client_has_left(request):
            # With a key the client may have come back on another connection, and have been told the same token.
            acquire = ask.id if ask.once is not None else 0
            await self._service.ask(Release(0, ask.key, answer.version, acquire=acquire))
            raise Locked(
                "the connection was closed, at least on one side, while it waited: the lock was given back",
                retry_after_ms=100,
            )
        return answer

    async def _wait_in_line(self, ask: Acquire, request: web.BaseRequest) -> Answer:
        """The line is that of the name's owner: where the partition goes, who waits goes to the end of the new one."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + ask.wait_ms / 1000
        patience_s = self._limits.reroute_timeout_s
        while True:
            sent_s = loop.time()
            future, channel, partition = self._service.begin(ask)
            answer = await self._watch(future, channel, ask, request)
            if answer.status != WrongOwner.status:
                return answer
            if client_has_left(request):
                raise Locked(f"the waiter for {ask.key!r} has left the queue", retry_after_ms=100)
            bounced_s = loop.time()
            if bounced_s - sent_s > _LOOK_S:  # it stood in a line
                patience_s = self._limits.reroute_timeout_s
            await self._service.await_other_owner(channel, partition, answer)
            patience_s -= loop.time() - bounced_s
            if patience_s <= 0:
                raise Unavailable("no shard owns the lock at present", retry_after_ms=500)
            ask.wait_ms = max(0, math.ceil((until_s - loop.time()) * 1000))

    async def _watch(
        self, future: asyncio.Future[Answer], channel: Channel, ask: Acquire, request: web.BaseRequest
    ) -> Answer:
        left = False
        while not (await asyncio.wait({future}, timeout=_LOOK_S))[0]:
            left = left or (client_has_left(request) and await self._leave(ask, channel))
        return future.result()

    async def _leave(self, ask: Acquire, channel: Channel) -> bool:
        """Whether the shard where it waits was told; if not, the next look tries again."""
        try:
            answer: Answer = await channel.request(CancelWait(0, ask.key, ask.id))
        except KvError:
            return False
        return answer.status == 200

    async def renew(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        token, raw = await self._token(request, head)
        answer = _checked((await self._service.ask(Renew(0, name, token, decode_once(head, raw)))).answer)
        owner = (answer.value or b"").decode()
        document = {"name": name, "token": answer.version, "owner": owner, "ttl": answer.ttl_left_ms / 1000}
        return json_response(200, document, f"Lock-Token: {answer.version}\r\n")

    async def release(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        if head.query:
            return await self._withdraw(name, request, head)
        token, raw = await self._token(request, head)
        _checked((await self._service.ask(Release(0, name, token, decode_once(head, raw)))).answer)
        return Response(204)

    async def _withdraw(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        """What the acquire with that Idempotency-Key was granted, or may yet be, is not wanted."""
        key = decode_query(head.query, _ACQUIRE).get("acquire", "")
        refuse_headers(head, "if-match", "if-none-match", "lock-token", "idempotency-key")
        if (await self._bodies.read(request, head, _BODY_BYTES_MAX, BodyTooLarge)).strip():
            raise BadBody("withdrawing takes no body")
        if not 1 <= len(key) <= 255 or not key.isprintable():
            raise BadParameter("acquire is the Idempotency-Key of an acquire", parameter="acquire")
        _checked((await self._service.ask(Release(0, name, 0, withdraw=key))).answer)
        return Response(204)

    async def _token(self, request: web.BaseRequest, head: Head) -> tuple[int, bytes]:
        decode_query(head.query, _NONE)
        refuse_headers(head, "if-match", "if-none-match")
        token = decode_token(head.fields)
        if token is None:
            raise BadParameter("Lock-Token is missing: send the token that the lock was granted with")
        raw = await self._bodies.read(request, head, _BODY_BYTES_MAX, BodyTooLarge)
        if raw.strip():
            raise BadBody("renewing and releasing take no body; a lease is renewed for the ttl it was granted with")
        return token, raw

    async def inspect(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        answer = _checked((await self._service.ask(GetLock(0, name))).answer)
        if answer.status == 404:
            raise NotFound(f"nobody holds the lock {name!r}")
        return Response(200, (answer.value or b"") + b"\n", JSON)


def _checked(answer: Answer) -> Answer:
    """Raises the error that the answer is, if it is one."""
    if answer.problem is not None:
        raise from_problem(answer.problem)
    return answer
