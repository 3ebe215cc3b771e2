"""The calls on transactions: POST /v1/txn, GET /v1/txn/{id}.

Owns: the form of the body and what in it refuses the request; the form of the answer.
Promises: whatever is wrong with any part of a body refuses all of it before anything is done, and the error names the
part. The answer of a transaction that wrote is sent, however much is under way: to say 429 then would be a lie.
Leaves to others: what a transaction does (`coordinator`), the form of an operation (`json_ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadParameter,
    BadRequest,
    BadTtl,
    BodyTooLarge,
    Conflict,
    DataCorrupt,
    DiskFull,
    IdempotencyKeyReused,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    Locked,
    NotFound,
    OutcomeUnknown,
    ReadTooLarge,
    TooManyRequests,
    ValueTooLarge,
)
from kvstore.model import VERSION_MAX, Condition, Read, TxnOp
from kvstore.router.coordinator import Coordinator
from kvstore.router.decode import decode_once, ttl_to_ms
from kvstore.router.json_ops import GetOp, Op, PutOp, check_value_size, decode_value, encode_value
from kvstore.router.participants import Result, Transaction
from kvstore.router.routes.words import (
    BODY,
    IDEMPOTENCY_KEY,
    OF_THE_CLUSTER,
    Key,
    ValueBase64,
    ValueText,
    Version,
)
from kvstore.transport.http.requests import check_key, decode_key
from kvstore.transport.http.responses import JSON, Response, json_response
from kvstore.transport.http.routes import (
    Body,
    Call,
    Content,
    Errors,
    Keys,
    Parameter,
    Right,
    Route,
    Success,
    Touches,
    example,
)
from kvstore.transport.http.schema import about, having, one_of, refined

_ID_BYTES_MAX = 200
_HOW_TO_OPEN = (
    'Wait for retry_after_ms and send it again; the holder of the lock adds {"lock":NAME,"token":N} to `if` instead.'
)

T = TypeVar("T")


@refined(
    oneOf=[having("key", "version"), having("key", "exists"), having("lock", "token")], minProperties=2, maxProperties=2
)
class ConditionEntry(Struct, forbid_unknown_fields=True):
    """An entry of `if`, in one of its forms: key and version, key and exists, lock and token."""

    key: Key | UnsetType = UNSET
    version: Annotated[int, Meta(ge=1, le=VERSION_MAX)] | UnsetType = UNSET
    exists: bool | UnsetType = UNSET
    lock: Key | UnsetType = UNSET
    token: Annotated[int, Meta(ge=0, le=VERSION_MAX, description="That of the lock's holder.")] | UnsetType = UNSET


class TxnBody(Struct, forbid_unknown_fields=True, rename={"conditions": "if", "otherwise": "else"}):
    """`then` is done if all of `if` holds, else `else`: all of the branch, or nothing.
    A branch writes a key at most once. Keys have 1 to {key_bytes_max:,} bytes, a ttl is above 0 and at most
    {ttl_s_max:,} s, a value has at most {value_bytes_max:,} bytes; what is not so refuses all of it. A condition
    that shows a lock's token also opens the key of that name to the transaction."""

    then: Annotated[list[Op], about(minItems=1)]
    conditions: list[ConditionEntry] = []
    otherwise: Annotated[list[Op], about("Nothing, if left out.")] = []


class TxnRoutes:
    """The calls on transactions."""

    def __init__(self, coordinator: Coordinator, limits: Limits) -> None:
        self._coordinator = coordinator
        self._limits = limits

    async def run(self, call: Call) -> Response:
        transaction = parse_transaction(call.body, self._limits)
        try:
            result = await self._coordinator.run(transaction, decode_once(call.head, call.raw))
        except Locked as error:
            error.members["next_step"] = _HOW_TO_OPEN
            raise
        response = Response(200, encode_result(transaction, result), JSON)
        response.has_to_go = result.version is not None
        return response

    async def look(self, call: Call) -> Response:
        found = await self._coordinator.look(call.argument)
        if found is None:
            raise NotFound(
                f"nothing is known of the transaction {call.argument}: it may have been committed all the same.",
                next_step="Read the keys to see. With an Idempotency-Key, what became of it is known for longer, and "
                "the same request gives the first answer again.",
            )
        ran = {"succeeded": found.succeeded} if found.state == "committed" else {}
        return json_response(200, {"status": found.state, **ran})


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_txn_id(raw: str, limits: Limits) -> str:
    """Raises BadParameter."""
    try:
        return decode_key(raw, _ID_BYTES_MAX)
    except BadRequest:
        raise BadParameter(f"{raw[:_ID_BYTES_MAX]!a} is not the id of a transaction.") from None


def parse_transaction(parsed: TxnBody, limits: Limits) -> Transaction:
    """Raises BadBody, KeyEmpty, KeyTooLong, KeyNotUtf8, BadTtl, ValueTooLarge: each refuses the request whole."""
    if not parsed.then:
        raise BadBody("`then` has no operations; to test conditions only, let it get one of the keys.")
    return Transaction(
        [_condition(entry, number, limits) for number, entry in enumerate(parsed.conditions)],
        _branch("then", parsed.then, limits),
        _branch("else", parsed.otherwise, limits),
    )


_FORMS = ({"key", "version"}, {"key", "exists"}, {"lock", "token"})


def _condition(entry: ConditionEntry, number: int, limits: Limits) -> Condition:
    given = {name for name in entry.__struct_fields__ if getattr(entry, name) is not UNSET}
    if given not in _FORMS:
        raise BadBody(
            f'condition {number} of `if` is none of {{"key","version"}}, {{"key","exists"}} and {{"lock","token"}}.'
        )
    try:
        key = check_key(_or_none(entry.key) or _or_none(entry.lock) or "", limits.key_bytes_max)
    except KvError as error:
        raise _placed(error, f"condition {number} of `if`") from None
    return Condition(key, _or_none(entry.version), _or_none(entry.exists), _or_none(entry.token))


def _or_none(field: T | UnsetType) -> T | None:
    return None if field is UNSET else field


def _branch(branch: str, ops: Iterable[Op], limits: Limits) -> list[TxnOp]:
    steps: list[TxnOp] = []
    written: set[str] = set()
    for number, op in enumerate(ops):
        try:
            step = _step(op, limits)
        except KvError as error:
            raise _placed(error, f"operation {number} of `{branch}`") from None
        if step.op != "get":
            if step.key in written:
                raise BadBody(f"operation {number} of `{branch}` writes the key {step.key!r} a second time.")
            written.add(step.key)
        steps.append(step)
    return steps


def _step(op: Op, limits: Limits) -> TxnOp:
    check_key(op.key, limits.key_bytes_max)
    if type(op) is not PutOp:
        return TxnOp("get" if type(op) is GetOp else "delete", op.key)
    value = decode_value(op.value, op.value_base64, "it")
    if len(value) > limits.value_bytes_max:
        check_value_size(len(value), limits)
    return TxnOp("put", op.key, value, 0 if op.ttl is UNSET else ttl_to_ms(op.ttl, limits))


def _placed(error: KvError, where: str) -> KvError:
    """The same error, saying where in the body it was found."""
    return type(error)(f"{where}: {error.detail}", **error.members)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_result(transaction: Transaction, result: Result) -> bytes:
    """The document that answers the transaction."""
    branch = transaction.then if result.succeeded else transaction.otherwise
    entries = list(_entries(branch, iter(result.reads), result.version))
    document = {"id": result.id, "succeeded": result.succeeded, "version": result.version, "results": entries}
    return msgspec.json.encode(document) + b"\n"


def _entries(branch: list[TxnOp], reads: Iterator[Read], version: int | None) -> Iterator[dict[str, Any]]:
    for step in branch:
        if step.op != "get":
            yield {"key": step.key, "version": version}
            continue
        read = next(reads)
        if read.value is None:
            yield {"key": step.key, "exists": False}
        else:
            yield {"key": step.key, **encode_value(read.value), "version": read.version}


# --- documents --------------------------------------------------------------------------------------------------------


@refined(**{"not": {"anyOf": [having("value"), having("value_base64")]}})
class TransactionWrote(Struct):
    """Of a put or delete, whether or not there was such a key."""

    key: Key
    version: Version


@refined(oneOf=[having("value"), having("value_base64")])
class TransactionFound(Struct):
    """Of a get."""

    key: Key
    version: Version
    value: ValueText | UnsetType = UNSET
    value_base64: ValueBase64 | UnsetType = UNSET


class TransactionFoundNone(Struct):
    """Of a get: there is no such key."""

    key: Key
    exists: Annotated[bool, about(const=False)]


class TransactionResult(Struct):
    """What the transaction did."""

    id: Annotated[str, about("For GET /v1/txn/{id}.")]
    succeeded: Annotated[bool, about("Which branch ran: `then` if true.")]
    version: Annotated[Version | None, about("Of every key that it wrote; null if it wrote none.")]
    results: Annotated[
        list[Annotated[Any, one_of(TransactionWrote, TransactionFound, TransactionFoundNone)]],
        about("One per operation of the branch that ran, in its order. Gets see the state before its writes."),
    ]


class TransactionState(Struct):
    """`pending`: it can still go either way."""

    status: Annotated[str, about(enum=["committed", "aborted", "pending"])]
    succeeded: Annotated[bool, about("If it is committed: which branch ran, `then` if true.")] | UnsetType = UNSET


# --- the entries ------------------------------------------------------------------------------------------------------

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
_ID = Parameter(
    "id",
    "path",
    Annotated[str, about(pattern="^[0-9a-f]{1,8}-[0-9a-f]{1,16}-[0-9a-f]{8}$")],
    example(_EXAMPLE_ID),
    "From its answer, or from a 504.",
    decode_txn_id,
)

TXN_ROUTES = (
    Route(
        "POST",
        "/v1/txn",
        TxnRoutes.run,
        Touches(Right.WRITE, Keys.BODY),
        id="runTransaction",
        tag="transactions",
        summary="Do all of it or nothing",
        description="Over any keys; strictly serializable, with other transactions and with every call on a single "
        "key. Gets see the state before the writes. What is wrong with any part of the body refuses it whole. A key "
        "whose lock another client holds: 423, nothing is written; a condition that shows the lock's token opens the "
        "key of its name. A token that is not the holder's is a condition that does not hold. Conflicts with others "
        "are tried again for up to {txn_timeout_s:g} s, then 409. At most {body_bytes_max:,} bytes, any "
        "number of operations. Headers that speak of one key (If-Match, If-None-Match, Lock-Token) are refused (400). "
        "The Idempotency-Key belongs to the first key that the body names (if, then, else). A 504 carries the id.",
        parameters=(IDEMPOTENCY_KEY,),
        body=Body(Content(TxnBody, example(_EXAMPLE, "each kind")), "body_bytes_max"),
        answers=(
            Success(
                200,
                "One branch was done, durably.",
                Content(TransactionResult, {"of `then`": _EXAMPLE_THEN, "of `else`": _EXAMPLE_ELSE}),
            ),
        ),
        errors=(*_REFUSED, *BODY, *_NOT_DONE),
        is_work=True,
    ),
    Route(
        "GET",
        "/v1/txn/{id}",
        TxnRoutes.look,
        OF_THE_CLUSTER,
        id="getTransaction",
        tag="transactions",
        summary="What became of a transaction",
        description="Known while it is in doubt; of one that carried an Idempotency-Key, for "
        "{idempotency_kept_s:,g} s. A 404 says nothing: it may have been committed.",
        parameters=(_ID,),
        answers=(
            Success(
                200, "What is known.", Content(TransactionState, example({"status": "committed", "succeeded": True}))
            ),
        ),
        errors=(NotFound, TooManyRequests, DataCorrupt),
        is_work=True,
    ),
)
