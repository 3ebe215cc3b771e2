"""The HTTP of transactions: POST /v1/txn, GET /v1/txn/{id}.

Owns: the form of the body and what in it refuses the request; the form of the answer.
Promises: whatever is wrong with any part of a body refuses all of it before anything is done, and the error names the
part. The answer of a transaction that wrote is sent, however much is under way: to say 429 then would be a lie.
Leaves to others: what a transaction does (`coordinator`), the form of an operation (`json_ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import BadBody, BadParameter, BadRequest, BodyTooLarge, KvError, Locked, NotFound
from kvstore.protocol import VERSION_MAX, Condition, Read, TxnOp
from kvstore.router.coordinator import Coordinator
from kvstore.router.decode import decode_once, refuse_headers, ttl_to_ms
from kvstore.router.json_ops import DeleteOp, GetOp, Op, check_value_size, decode_value, encode_value
from kvstore.router.participants import Result, Transaction
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import Head, check_key, decode_key, decode_query
from kvstore.transport.http.responses import JSON, Response, json_response

_NONE: frozenset[str] = frozenset()
_ID_BYTES_MAX = 200
_HOW_TO_OPEN = (
    'Wait for retry_after_ms and send it again; the holder of the lock adds {"lock":NAME,"token":N} to `if` instead.'
)

T = TypeVar("T")


class ConditionEntry(Struct, forbid_unknown_fields=True):
    """An entry of `if`, in one of its forms: key and version, key and exists, lock and token."""

    key: str | UnsetType = UNSET
    version: Annotated[int, Meta(ge=1, le=VERSION_MAX)] | UnsetType = UNSET
    exists: bool | UnsetType = UNSET
    lock: str | UnsetType = UNSET
    token: Annotated[int, Meta(ge=0, le=VERSION_MAX)] | UnsetType = UNSET


class TxnBody(Struct, forbid_unknown_fields=True, rename={"conditions": "if", "otherwise": "else"}):
    then: list[Op]
    conditions: list[ConditionEntry] = []
    otherwise: list[Op] = []


_decoder = msgspec.json.Decoder(TxnBody)


class TxnRoutes:
    def __init__(self, coordinator: Coordinator, limits: Limits, bodies: BodyReader) -> None:
        self._coordinator = coordinator
        self._limits = limits
        self._bodies = bodies

    async def run(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        refuse_headers(head, "if-match", "if-none-match", "lock-token")
        raw = await self._bodies.read(request, head, self._limits.body_bytes_max, BodyTooLarge)
        transaction = parse_transaction(raw, self._limits)
        try:
            result = await self._coordinator.run(transaction, decode_once(head, raw))
        except Locked as error:
            error.members["next_step"] = _HOW_TO_OPEN
            raise
        response = Response(200, encode_result(transaction, result), JSON)
        response.has_to_go = result.version is not None
        return response

    async def look(self, raw_id: str, request: web.BaseRequest, head: Head) -> Response:
        """`raw_id`: as it stands in the path."""
        decode_query(head.query, _NONE)
        try:
            txn_id = decode_key(raw_id, _ID_BYTES_MAX)
        except BadRequest:
            raise BadParameter(f"{raw_id[:_ID_BYTES_MAX]!a} is not the id of a transaction") from None
        state = await self._coordinator.look(txn_id)
        if state is None:
            raise NotFound(
                f"nothing is known of the transaction {txn_id}: it may have been committed all the same",
                next_step="Read the keys to see. With an Idempotency-Key, what became of it is known for longer, and "
                "the same request gives the first answer again.",
            )
        return json_response(200, {"status": state})


# --- decoding ---------------------------------------------------------------------------------------------------------


def parse_transaction(body: bytes, limits: Limits) -> Transaction:
    """Raises BadBody, KeyEmpty, KeyTooLong, KeyNotUtf8, BadTtl, ValueTooLarge: each refuses the request whole."""
    try:
        parsed = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadBody(f'the body is not {{"if":[…],"then":[…],"else":[…]}} as documented: {error}') from None
    if not parsed.then:
        raise BadBody("`then` has no operations; to test conditions only, let it get one of the keys")
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
            f'condition {number} of `if` is none of {{"key","version"}}, {{"key","exists"}} and {{"lock","token"}}'
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
                raise BadBody(f"operation {number} of `{branch}` writes the key {step.key!r} a second time")
            written.add(step.key)
        steps.append(step)
    return steps


def _step(op: Op, limits: Limits) -> TxnOp:
    check_key(op.key, limits.key_bytes_max)
    if isinstance(op, GetOp):
        return TxnOp("get", op.key)
    if isinstance(op, DeleteOp):
        return TxnOp("delete", op.key)
    value = decode_value(op.value, op.value_base64, "it")
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
