"""POST /v1/batch: many independent operations in one request, answered in their order.

Owns: the shape of the body, which errors refuse it whole and which fail one operation, the window of operations under
way.
Promises: a body that is not well formed is refused whole, before anything is done. However many operations there are,
only a window of them is under way, bounded in count and in bytes, gets counting as a value of the largest size. Writes
to one key are done in their order: while its partition may change hands, each waits for the one before.
Leaves to others: the form of an operation (`json_ops`), each operation (`service`), HTTP (`app`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct

from kvstore.config import Limits
from kvstore.errors import BadBody, KvError, NotFound, WrongOwner, from_problem
from kvstore.protocol import Delete, Get, Put
from kvstore.router.decode import ttl_to_ms
from kvstore.router.json_ops import DeleteOp, GetOp, Op, PutOp, check_value_size, decode_value, encode_value
from kvstore.router.service import KeyRequest, RouterService
from kvstore.transport.channel import Channel
from kvstore.transport.http import check_key


class BatchBody(Struct, forbid_unknown_fields=True):
    ops: list[Op]


_decoder = msgspec.json.Decoder(BatchBody)


class _Step(NamedTuple):
    """One operation: its key as given, and its request, or why there is none."""

    key: str
    request: KeyRequest | None
    error: KvError | None
    bytes: int


class _UnderWay(NamedTuple):
    step: _Step
    sent: tuple[asyncio.Future[Any], Channel, int] | KvError


def parse_batch(body: bytes, limits: Limits) -> list[_Step]:
    """The operations of a body. Raises BadBody, which refuses it whole."""
    try:
        ops = _decoder.decode(body).ops
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadBody(f'the body is not {{"ops":[…]}} as documented: {error}') from None
    if not ops:
        raise BadBody("the body has no operations")
    return [_parse_op(op, number, limits) for number, op in enumerate(ops)]


def _parse_op(op: Op, number: int, limits: Limits) -> _Step:
    value = b""
    if isinstance(op, PutOp):
        value = decode_value(op.value, op.value_base64, f"operation {number}")
    try:
        key = check_key(op.key, limits.key_bytes_max)
        if isinstance(op, GetOp):
            return _Step(key, Get(0, key), None, limits.value_bytes_max)
        if isinstance(op, DeleteOp):
            return _Step(key, Delete(0, key), None, 64)
        ttl_ms = 0 if op.ttl is UNSET else ttl_to_ms(op.ttl, limits)
        check_value_size(len(value), limits)
        return _Step(key, Put(0, key, value, ttl_ms), None, len(value) + 64)
    except KvError as error:
        return _Step(op.key, None, error, 0)


async def run_batch(service: RouterService, steps: list[_Step], limits: Limits) -> AsyncIterator[bytes]:
    """Do them, a window at a time; yields the JSON of each result, in order."""
    under_way: deque[_UnderWay] = deque()
    last: dict[str, _UnderWay] = {}  # of each key, as far as it is under way
    window_bytes = 0
    for step in steps:
        while under_way and (
            len(under_way) >= limits.batch_window_ops
            or window_bytes + step.bytes > limits.batch_window_bytes
            or _may_overtake(service, last.get(step.key))
        ):
            first = under_way.popleft()
            yield await _result(service, first)
            window_bytes -= first.step.bytes
            if last[first.step.key] is first:
                del last[first.step.key]
        begun = last[step.key] = _begin(service, step)
        under_way.append(begun)
        window_bytes += step.bytes
    while under_way:
        yield await _result(service, under_way.popleft())


def _may_overtake(service: RouterService, before: _UnderWay | None) -> bool:
    """What is sent now might be done before that one on the same key, which was sent to another shard, or bounced."""
    if before is None or isinstance(before.sent, KvError):
        return False
    future, channel, partition = before.sent
    return service.is_moving(partition) or not service.is_owner(channel, partition) or _has_bounced(future)


def _has_bounced(future: asyncio.Future[Any]) -> bool:
    return future.done() and future.exception() is None and future.result().status == WrongOwner.status


def _begin(service: RouterService, step: _Step) -> _UnderWay:
    if step.request is None:
        return _UnderWay(step, step.error or KvError())
    try:
        return _UnderWay(step, service.begin(step.request))
    except KvError as error:
        return _UnderWay(step, error)


async def _result(service: RouterService, under_way: _UnderWay) -> bytes:
    step, sent = under_way
    try:
        if isinstance(sent, KvError) or step.request is None:
            raise sent if isinstance(sent, KvError) else KvError()
        answer = (await service.settle(step.request, *sent)).answer
        if answer.problem is not None:
            raise from_problem(answer.problem)
        if answer.status == 404:
            raise NotFound(f"there is no key {step.key!r}")
    except KvError as error:
        document = {"status": error.status, "key": step.key, "code": error.code, "detail": error.detail}
        return msgspec.json.encode(document | error.members)
    result: dict[str, Any] = {"status": answer.status, "key": step.key, "version": answer.version}
    if answer.value is not None:
        result |= encode_value(answer.value)
        if answer.ttl_left_ms:
            result["ttl"] = answer.ttl_left_ms / 1000
    return msgspec.json.encode(result)
