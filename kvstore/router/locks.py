"""The HTTP of locks: acquire, renew, release, inspect, list.

Owns: parameters, statuses and documents of `/v1/locks`.
Promises: a waiter whose client goes away leaves the queue, and what was granted to it in that moment is given back.
Leaves to others: who holds what and who is next (the shard's lock table).
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import BadBody, BadParameter, BadTtl, BodyTooLarge, KvError, Locked, NotFound, from_problem
from kvstore.protocol import Acquire, Answer, Inspect, Leave, Release, Renew
from kvstore.router.decode import decode_once, decode_token, refuse_headers, seconds_to_ms
from kvstore.router.service import RouterService
from kvstore.transport.http import JSON, BodyReader, Head, Response, client_has_left, decode_query, json_response

_NONE: frozenset[str] = frozenset()
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
            return (await self._service.ask(ask)).answer
        task = asyncio.ensure_future(self._service.ask(ask))
        left = False
        self.waiting += 1
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
                left = left or (client_has_left(request) and await self._leave(ask))
        finally:
            self.waiting -= 1
        answer = (await task).answer
        if answer.status == 201 and ask.once is None and client_has_left(request):
            await self._service.ask(Release(0, ask.key, answer.version))
            raise Locked(
                "the connection was closed, at least on one side, while it waited: the lock was given back",
                retry_after_ms=100,
            )
        return answer

    async def _leave(self, ask: Acquire) -> bool:
        """Whether the shard was told; if not, the next look tries again."""
        try:
            return (await self._service.ask(Leave(0, ask.key, ask.id))).answer.status == 200
        except KvError:
            return False

    async def renew(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        token, raw = await self._token(request, head)
        answer = _checked((await self._service.ask(Renew(0, name, token, decode_once(head, raw)))).answer)
        owner = (answer.value or b"").decode()
        document = {"name": name, "token": answer.version, "owner": owner, "ttl": answer.ttl_left_ms / 1000}
        return json_response(200, document, f"Lock-Token: {answer.version}\r\n")

    async def release(self, name: str, request: web.BaseRequest, head: Head) -> Response:
        token, raw = await self._token(request, head)
        _checked((await self._service.ask(Release(0, name, token, decode_once(head, raw)))).answer)
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
        answer = _checked((await self._service.ask(Inspect(0, name))).answer)
        if answer.status == 404:
            raise NotFound(f"nobody holds the lock {name!r}")
        return Response(200, (answer.value or b"") + b"\n", JSON)


def _checked(answer: Answer) -> Answer:
    """Raises the error that the answer is, if it is one."""
    if answer.problem is not None:
        raise from_problem(answer.problem)
    return answer
