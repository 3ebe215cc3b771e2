"""The operations on locks as data: a part of the list `operations`.

Owns: what the routes of locks take, and how they can answer.
Promises: as `operations`.
Leaves to others: the types and what several operations have in common (`operation`), the shape of JSON documents
(`schemas`).
"""

from __future__ import annotations

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadCursor,
    BadTtl,
    BodyTooLarge,
    DataCorrupt,
    DiskFull,
    Locked,
    NotFound,
    TooManyRequests,
)
from kvstore.router.json_schema import ref, text
from kvstore.router.operation import (
    BODY,
    EXAMPLE_CURSOR,
    IDEMPOTENCY_KEY,
    KEY_IN_PATH,
    LOCK_NAME,
    WRITE,
    Content,
    Operation,
    Success,
    example,
    json_answer,
    lock_token,
    page_parameters,
    query,
)
from kvstore.transport.http.responses import JSON

_ROUTE = "/v1/locks/{name}"
_EXAMPLE_GRANTED = {"name": "users/1", "token": 12, "owner": "me", "ttl": 30.0}
_EXAMPLE_LEASE = {"name": "users/1", "owner": "me", "token": 12, "ttl_left": 29.5, "waiting": 0}
_EXAMPLE_PAGE = {
    "items": [{"name": "users/1", "token": 12, "owner": "me", "ttl_left": 29.5}],
    "next": EXAMPLE_CURSOR,
}
_HOLDER = (
    LOCK_NAME,
    lock_token("What the lock was granted with; 412 `lock-lost` if it is no longer the holder's.", required=True),
    IDEMPOTENCY_KEY,
)
_ACQUIRE = text("Idempotency-Key of an acquire; instead of Lock-Token.", minLength=1, maxLength=255)
_HOLDER_ERRORS = (*KEY_IN_PATH, BadBody, BodyTooLarge, *BODY, *WRITE)


def lock_operations(limits: Limits) -> list[Operation]:
    """All of them but HEAD, which is that of GET without bodies."""
    return [_acquire(), _renew(), _release(), _inspect(), _list(limits)]


def _acquire() -> Operation:
    body = Content(JSON, ref("Acquire"), example("all fields", {"ttl": 30, "wait": 10, "owner": "me"}))
    return Operation(
        _ROUTE,
        "POST",
        id="acquireLock",
        tag="locks",
        summary="Acquire the lock",
        description="While it is held, writes to the key of that name need its Lock-Token; reads go on. (Name a lock "
        "otherwise than any key if you want it only advisory.) Those who wait are served first come, first served; "
        "whoever closes the connection waits no longer. A lease never ends early. With an Idempotency-Key: a repeated "
        "request whose grant still stands renews it; 412 `lock-lost` when it is over.",
        parameters=(LOCK_NAME, IDEMPOTENCY_KEY),
        body={"required": False, "content": body.render()},
        answers=(
            json_answer("The lock is yours until its ttl is over.", "Granted", _EXAMPLE_GRANTED, 201, ("Lock-Token",)),
        ),
        errors=(*KEY_IN_PATH, BadBody, BadTtl, BodyTooLarge, *BODY, Locked, *WRITE, DiskFull),
    )


def _renew() -> Operation:
    return Operation(
        _ROUTE,
        "PUT",
        id="renewLock",
        tag="locks",
        summary="Renew the lease, for the ttl that it was granted with",
        description="Takes no body.",
        parameters=_HOLDER,
        answers=(json_answer("The ttl begins anew.", "Granted", _EXAMPLE_GRANTED, 200, ("Lock-Token",)),),
        errors=_HOLDER_ERRORS,
    )


def _release() -> Operation:
    return Operation(
        _ROUTE,
        "DELETE",
        id="releaseLock",
        tag="locks",
        summary="Release the lock",
        description="Takes no body. The next who waits for the lock has it. With `acquire` instead of a Lock-Token: "
        "withdraw an acquire, whose token is not known. If it waits it leaves the queue, if it was granted that ends, "
        "and if it comes later it is answered 412 `lock-lost`. For clients that stop to wait behind a proxy which "
        "keeps its own connection open; one that is connected to the router only has to close its connection.",
        parameters=(
            LOCK_NAME,
            query(
                "acquire",
                text("Idempotency-Key of an acquire; instead of Lock-Token.", minLength=1, maxLength=255),
                "3f1c9a52",
            ),
            lock_token(
                "What the lock was granted with; 412 `lock-lost` if it is no longer the holder's. Required without "
                "`acquire`.",
                required=False,
            ),
            IDEMPOTENCY_KEY,
        ),
        answers=(Success(204, "It is no longer yours, or was withdrawn."),),
        errors=_HOLDER_ERRORS,
    )


def _inspect() -> Operation:
    return Operation(
        _ROUTE,
        "GET",
        id="getLock",
        tag="locks",
        summary="Who holds the lock",
        description="404 when it is free.",
        parameters=(LOCK_NAME,),
        answers=(json_answer("The lease, and how many wait for it.", "Lease", _EXAMPLE_LEASE),),
        errors=(*KEY_IN_PATH, NotFound, TooManyRequests),
    )


def _list(limits: Limits) -> Operation:
    return Operation(
        "/v1/locks",
        "GET",
        id="listLocks",
        tag="locks",
        summary="List the locks that are held",
        description="By name in byte order, over all shards. When a shard cannot answer, nor can this.",
        parameters=page_parameters(limits, "names"),
        answers=(json_answer("A page of leases.", "LeasePage", _EXAMPLE_PAGE),),
        errors=(BadCursor, TooManyRequests, DataCorrupt),
    )
