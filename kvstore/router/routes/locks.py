"""The calls on locks: acquire, renew, release, inspect, list.

Owns: statuses and documents of `/v1/locks`.
Promises: a waiter whose client goes away leaves the queue, and what was granted to it in that moment is given back,
unless the same request waited on another connection, too. A waiter whose lock's partition changes hands goes on waiting
at the new owner, for what is left of its time. Behind a proxy that keeps its own connection open no process can see
that a client has left: it says so itself, by withdrawing what it asked for with its Idempotency-Key.
Leaves to others: who holds what and who is next (the shard's lock table).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, NamedTuple

from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadCursor,
    BadParameter,
    BadTtl,
    BodyTooLarge,
    DataCorrupt,
    DiskFull,
    KvError,
    Locked,
    NotFound,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    WrongOwner,
    from_problem,
)
from kvstore.model import IdempotencyKey
from kvstore.protocol import Acquire, Answer, CancelWait, GetLock, Release, Renew
from kvstore.router.decode import decode_once, decode_token, encode_cursor, seconds_to_ms
from kvstore.router.page_json import missing_members
from kvstore.router.routes.words import (
    BODY,
    EXAMPLE_CURSOR,
    IDEMPOTENCY_KEY,
    KEY_IN_PATH,
    LOCK_NAME,
    READS_KEY,
    READS_PREFIX,
    WRITE,
    WRITES_KEY,
    Key,
    LeaseLeft,
    Missing,
    Next,
    Owner,
    Token,
    lock_token,
    page_parameters,
)
from kvstore.router.service import RouterService
from kvstore.router.unserved import unserved
from kvstore.transport.channel import Channel
from kvstore.transport.http.requests import client_has_left
from kvstore.transport.http.responses import JSON, Response, json_response
from kvstore.transport.http.routes import NO_BODY, Body, Call, Content, Route, Success, example, text
from kvstore.transport.http.schema import about

_LOOK_S = 0.1
TTL_DEFAULT_S = 30.0
TTL_MIN_S = 0.1


class AcquireBody(Struct, forbid_unknown_fields=True):
    """How the lock is wanted; no body at all is the same as no members."""

    ttl: Annotated[
        float,
        about(
            "Seconds until the lease ends by itself, unless it is renewed.",
            minimum=TTL_MIN_S,
            maximum="{lock_ttl_s_max}",
        ),
    ] = TTL_DEFAULT_S
    wait: Annotated[float, about("Seconds to wait while it is held.", minimum=0, maximum="{lock_wait_s_max}")] = 0.0
    owner: Owner = ""


class _Bounced(NamedTuple):
    """The line has ended; `wait` until another one may be there. `error`: what the client is told if none comes."""

    wait: Callable[[], Awaitable[None]]
    error: KvError


class LockRoutes:
    """The calls on locks. `waiting`: requests that wait for one."""

    def __init__(self, service: RouterService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self.waiting = 0  # requests that wait for a lock now

    async def acquire(self, call: Call) -> Response:
        name, body = call.argument, call.body
        check_acquire(body, self._limits)
        wait_ms, once = math.ceil(body.wait * 1000), decode_once(call.head, call.raw)
        ask = Acquire(0, name, seconds_to_ms(body.ttl), wait_ms, body.owner, once)
        answer = _checked(await self._wait(ask, call.request))
        return _granted(201, name, answer, body.owner, ask.ttl_ms)

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
                "the connection was closed, at least on one side, while it waited: the lock was given back.",
                retry_after_ms=100,
            )
        return answer

    async def _wait_in_line(self, ask: Acquire, request: web.BaseRequest) -> Answer:
        """The line is that of the name's owner.
        Where the partition goes, who waits goes to the end of the new one."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + ask.wait_ms / 1000
        patience_s = self._limits.reroute_timeout_s
        unknown: KvError | None = None
        while True:
            sent_s = loop.time()
            refusal = await self._stand_in_line(ask, request)
            if isinstance(refusal, Answer):
                return refusal
            if client_has_left(request):
                raise Locked(f"the waiter for {ask.key!r} has left the queue.", retry_after_ms=100)
            bounced_s = loop.time()
            if bounced_s - sent_s > _LOOK_S:  # it stood in a line
                patience_s = self._limits.reroute_timeout_s
            unknown = refusal.error if isinstance(refusal.error, OutcomeUnknown) else unknown
            await refusal.wait()
            patience_s -= loop.time() - bounced_s
            if patience_s <= 0:
                raise unknown or refusal.error
            ask.wait_ms = max(0, math.ceil((until_s - loop.time()) * 1000))

    async def _stand_in_line(self, ask: Acquire, request: web.BaseRequest) -> Answer | _Bounced:
        """The answer, or why to stand in another line. Raises the errors of `Channel.request`."""
        channel = self._service.table.owner_of(ask.key)
        error = unserved([channel.shard_id])
        try:
            future, channel, partition = self._service.begin(ask)
            answer = await self._watch(future, channel, ask, request)
        except (Unavailable, OutcomeUnknown) as lost:
            if not self._service.may_ask_again(ask, lost, channel):
                raise
            return _Bounced(self._service.table.await_primary, lost)
        if answer.status == WrongOwner.status:
            return _Bounced(partial(self._service.table.await_other_owner, channel, partition, answer), error)
        if self._service.may_ask_again(ask, answer, channel):
            return _Bounced(self._service.table.await_primary, error)
        return answer

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

    async def renew(self, call: Call) -> Response:
        token = _token(call)
        answer = _checked((await self._service.ask(Renew(0, call.argument, token, _once(call)))).answer)
        return _granted(200, call.argument, answer, (answer.value or b"").decode(), answer.ttl_left_ms)

    async def release(self, call: Call) -> Response:
        if "acquire" in call.parameters:
            return await self._withdraw(call.argument, call)
        token = _token(call)
        _checked((await self._service.ask(Release(0, call.argument, token, _once(call)))).answer)
        return Response(204)

    async def _withdraw(self, name: str, call: Call) -> Response:
        """What the acquire with that Idempotency-Key was granted, or may yet be, is not wanted."""
        key = call.parameters["acquire"]
        for field in ("lock-token", "idempotency-key"):
            if field in call.head.fields:
                raise BadParameter(f"the header {field} does not go with `acquire`.")
        if not 1 <= len(key) <= 255 or not key.isprintable():
            raise BadParameter("acquire is the Idempotency-Key of an acquire.", parameter="acquire")
        _checked((await self._service.ask(Release(0, name, 0, withdraw=key))).answer)
        return Response(204)

    async def inspect(self, call: Call) -> Response:
        answer = _checked((await self._service.ask(GetLock(0, call.argument))).answer)
        if answer.status == 404:
            raise NotFound(f"the lock {call.argument!r} is free.")
        return Response(200, (answer.value or b"") + b"\n", JSON)

    async def list_locks(self, call: Call) -> Response:
        prefix, after, limit, partial = (call.get(name) for name in ("prefix", "after", "limit", "partial"))
        listing = await self._service.all_shards.leases(prefix, after, limit, partial=partial)
        items = [
            HeldLock(name, (owner or b"").decode(), token, left_ms / 1000)
            for name, token, owner, left_ms in listing.items
        ]
        missing = missing_members(listing.missing, partial)
        return json_response(200, {"items": items, "next": encode_cursor(listing.last), **missing})


def check_acquire(body: AcquireBody, limits: Limits) -> None:
    """Raises BadTtl, BadParameter, BadBody."""
    if not TTL_MIN_S <= body.ttl <= limits.lock_ttl_s_max:
        bounds = {"lock_ttl_s_min": TTL_MIN_S, "lock_ttl_s_max": limits.lock_ttl_s_max}
        raise BadTtl(f"a lock's ttl is {TTL_MIN_S:g} to {limits.lock_ttl_s_max} s, not {body.ttl:g}.", **bounds)
    if not 0 <= body.wait <= limits.lock_wait_s_max:
        raise BadParameter(f"wait is 0 to {limits.lock_wait_s_max} s, not {body.wait:g}.", parameter="wait")
    try:
        owner_bytes = len(body.owner.encode())
    except UnicodeEncodeError:
        raise BadBody("owner holds a lone surrogate, which is not Unicode text.") from None
    if owner_bytes > limits.owner_bytes_max:
        detail = f"owner has {owner_bytes} bytes; the limit is {limits.owner_bytes_max}."
        raise BadParameter(detail, parameter="owner", owner_bytes_max=limits.owner_bytes_max)


def _token(call: Call) -> int:
    """Raises BadParameter."""
    token = decode_token(call.head.fields)
    if token is None:
        raise BadParameter("Lock-Token is missing: send the token that the lock was granted with.")
    return token


def _once(call: Call) -> IdempotencyKey | None:
    return decode_once(call.head, call.raw)


def _granted(status: int, name: str, answer: Answer, owner: str, ttl_ms: int) -> Response:
    document = Granted(name, owner, answer.version, ttl_ms / 1000)
    return json_response(status, document, f"Lock-Token: {answer.version}\r\n")


def _checked(answer: Answer) -> Answer:
    """Raises the error that the answer is, if it is one."""
    if answer.problem is not None:
        raise from_problem(answer.problem)
    return answer


# --- documents --------------------------------------------------------------------------------------------------------


class HeldLock(Struct):
    """A lock that is held."""

    name: Key
    owner: Owner
    token: Token
    ttl_left: LeaseLeft


class Lease(HeldLock):
    """Who holds a lock."""

    waiting: Annotated[int, about("How many wait for it.", minimum=0)]


class Granted(Struct):
    """A lease that was granted or renewed."""

    name: Key
    owner: Owner
    token: Token
    ttl: Annotated[
        float, about("Seconds until the lease ends by itself, unless it is renewed.", maximum="{lock_ttl_s_max}")
    ]


class LeasePage(Struct):
    """A page of the locks that are held, by name in byte order, over all shards."""

    items: Annotated[list[HeldLock], about(maxItems="{list_keys_max}")]
    next: Next
    missing: Missing | UnsetType = UNSET


# --- the entries ------------------------------------------------------------------------------------------------------

_PATH = "/v1/locks/{name}"
_GRANTED = Content(Granted, example({"name": "users/1", "token": 12, "owner": "me", "ttl": 30.0}))
_HELD = {"name": "users/1", "owner": "me", "token": 12, "ttl_left": 29.5}
_SHOWN_TOKEN = "What the lock was granted with; 412 `lock-lost` if it is no longer the holder's."
_HOLDER_ERRORS = (*KEY_IN_PATH, BadBody, BodyTooLarge, *BODY, *WRITE)
_WITHDRAWN = text(
    "acquire",
    Annotated[str, about(minLength=1, maxLength=255)],
    "3f1c9a52",
    "Idempotency-Key of an acquire; instead of Lock-Token.",
)

LOCK_ROUTES = (
    Route(
        "POST",
        _PATH,
        LockRoutes.acquire,
        WRITES_KEY,
        id="acquireLock",
        tag="locks",
        summary="Acquire the lock",
        description="While it is held, writes to the key of that name need its Lock-Token; reads go on. (Name a lock "
        "otherwise than any key if you want it only advisory.) Those who wait are served first come, first served; "
        "closing the connection ends the wait. A lease never ends early. With an Idempotency-Key: a repeated "
        "request whose grant still stands renews it; 412 `lock-lost` when it is over.",
        parameters=(LOCK_NAME, IDEMPOTENCY_KEY),
        body=Body(Content(AcquireBody, example({"ttl": 30, "wait": 10, "owner": "me"}, "all fields")), required=False),
        answers=(Success(201, "The lock is yours until its ttl is over.", _GRANTED, ("Lock-Token",)),),
        errors=(*KEY_IN_PATH, BadBody, BadTtl, BodyTooLarge, *BODY, Locked, *WRITE, DiskFull),
        is_work=True,
    ),
    Route(
        "PUT",
        _PATH,
        LockRoutes.renew,
        WRITES_KEY,
        id="renewLock",
        tag="locks",
        summary="Renew the lease, for the ttl that it was granted with",
        description="Takes no body.",
        parameters=(LOCK_NAME, lock_token(_SHOWN_TOKEN, required=True), IDEMPOTENCY_KEY),
        body=NO_BODY,
        answers=(Success(200, "The ttl begins again.", _GRANTED, ("Lock-Token",)),),
        errors=_HOLDER_ERRORS,
        is_work=True,
    ),
    Route(
        "DELETE",
        _PATH,
        LockRoutes.release,
        WRITES_KEY,
        id="releaseLock",
        tag="locks",
        summary="Release the lock",
        description="Takes no body. The next who waits for the lock has it. With `acquire` instead of a Lock-Token: "
        "withdraw an acquire, whose token is not known. If it waits it leaves the queue, if it was granted that ends, "
        "and if it comes later it is answered 412 `lock-lost`. For clients that stop to wait behind a proxy which "
        "keeps its own connection open; one that is connected to the router only has to close its connection.",
        parameters=(
            LOCK_NAME,
            _WITHDRAWN,
            lock_token(f"{_SHOWN_TOKEN} Required without `acquire`.", required=False),
            IDEMPOTENCY_KEY,
        ),
        body=NO_BODY,
        answers=(Success(204, "It is no longer yours, or was withdrawn."),),
        errors=_HOLDER_ERRORS,
        is_work=True,
    ),
    Route(
        "GET",
        _PATH,
        LockRoutes.inspect,
        READS_KEY,
        id="getLock",
        tag="locks",
        summary="Who holds the lock",
        description="404 when it is free.",
        parameters=(LOCK_NAME,),
        answers=(
            Success(200, "The lease, and how many wait for it.", Content(Lease, example({**_HELD, "waiting": 0}))),
        ),
        errors=(*KEY_IN_PATH, NotFound, TooManyRequests),
        is_work=True,
    ),
    Route(
        "GET",
        "/v1/locks",
        LockRoutes.list_locks,
        READS_PREFIX,
        id="listLocks",
        tag="locks",
        summary="List the locks that are held",
        description="By name in byte order, over all shards. When a shard cannot answer, nor can this.",
        parameters=page_parameters("names"),
        answers=(
            Success(200, "A page of leases.", Content(LeasePage, example({"items": [_HELD], "next": EXAMPLE_CURSOR}))),
        ),
        errors=(BadCursor, TooManyRequests, DataCorrupt),
        is_work=True,
    ),
)
