"""The operations on transactions as data: a part of the list `operations`.

Owns: what the routes of transactions take, and how they can answer.
Promises: as `operations`.
Leaves to others: the types and what several operations have in common (`operation`), the shape of JSON documents
(`schemas`).
"""

from __future__ import annotations

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadTtl,
    BodyTooLarge,
    Conflict,
    DataCorrupt,
    DiskFull,
    IdempotencyKeyReused,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    Locked,
    NotFound,
    OutcomeUnknown,
    ReadTooLarge,
    TooManyRequests,
    ValueTooLarge,
)
from kvstore.router.json_schema import ref, text
from kvstore.router.operation import BODY, IDEMPOTENCY_KEY, Content, Errors, Operation, Success, example, json_answer
from kvstore.transport.http.responses import JSON

_REFUSED: Errors = (BadBody, KeyEmpty, KeyTooLong, KeyNotUtf8, BadTtl, ValueTooLarge, BodyTooLarge)
_NOT_DONE: Errors = (
    Conflict, IdempotencyKeyReused, Locked, ReadTooLarge, TooManyRequests, DataCorrupt, OutcomeUnknown, DiskFull,
)  # fmt: skip
_EXAMPLE_ID = "8c9-63f0a1b2c3d4e-5b1f0c9a"
_EXAMPLE = {
    "if": [{"key": "a", "version": 7}, {"key": "b", "exists": False}, {"lock": "leader", "token": 12}],
    "then": [
        {"op": "put", "key": "a", "value": "1"},
        {"op": "put", "key": "t", "value": "x", "ttl": 60},
        {"op": "delete", "key": "b"},
        {"op": "get", "key": "c"},
        {"op": "get", "key": "absent"},
    ],
    "else": [{"op": "get", "key": "a"}],
}
_EXAMPLE_THEN = {
    "id": _EXAMPLE_ID,
    "succeeded": True,
    "version": 41,
    "results": [
        {"key": "a", "version": 41},
        {"key": "t", "version": 41},
        {"key": "b", "version": 41},
        {"key": "c", "value": "3", "version": 9},
        {"key": "absent", "exists": False},
    ],
}
_EXAMPLE_ELSE = {
    "id": _EXAMPLE_ID,
    "succeeded": False,
    "version": None,
    "results": [{"key": "a", "value_base64": "/wA=", "version": 8}],
}


def txn_operations(limits: Limits) -> list[Operation]:
    """All of them but HEAD, which is that of GET without bodies."""
    return [_run(limits), _look(limits)]


def _run(limits: Limits) -> Operation:
    body = Content(JSON, ref("Transaction"), example("each kind", _EXAMPLE))
    results = Content(
        JSON, ref("TransactionResult"), example("of `then`", _EXAMPLE_THEN) | example("of `else`", _EXAMPLE_ELSE)
    )
    return Operation(
        "/v1/txn",
        "POST",
        id="runTransaction",
        tag="transactions",
        summary="Do all of it or nothing",
        description="Over any keys; strictly serializable, with other transactions and with every call on a single "
        "key. Gets see the state before the writes. What is wrong with any part of the body refuses it whole. A key "
        "whose lock somebody else holds: 423, nothing is written; a condition that shows the lock's token opens the "
        "key of its name. A token that is not the holder's is a condition that does not hold. Conflicts with others "
        f"are tried again for up to {limits.txn_timeout_s:g} s, then 409. At most {limits.body_bytes_max:,} bytes, any "
        "number of operations. Headers that speak of one key (If-Match, If-None-Match, Lock-Token) are refused (400). "
        "The Idempotency-Key belongs to the first key that the body names (if, then, else). A 504 carries the id.",
        parameters=(IDEMPOTENCY_KEY,),
        body={"required": True, "content": body.render()},
        answers=(Success(200, "One branch was done, durably.", results),),
        errors=(*_REFUSED, *BODY, *_NOT_DONE),
    )


def _look(limits: Limits) -> Operation:
    state = json_answer("What is known.", "TransactionState", {"status": "committed"})
    return Operation(
        "/v1/txn/{id}",
        "GET",
        id="getTransaction",
        tag="transactions",
        summary="What became of a transaction",
        description="Known while it is in doubt; of one that carried an Idempotency-Key, for "
        f"{limits.idempotency_kept_s:,g} s. A 404 says nothing: it may have been committed.",
        parameters=(
            {
                "name": "id",
                "in": "path",
                "required": True,
                "description": "From its answer, or from a 504.",
                "schema": text(pattern="^[0-9a-f]{1,8}-[0-9a-f]{1,16}-[0-9a-f]{8}$"),
                "example": _EXAMPLE_ID,
            },
        ),
        answers=(state,),
        errors=(NotFound, TooManyRequests, DataCorrupt),
    )
