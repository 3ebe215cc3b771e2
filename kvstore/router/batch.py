"""Many independent operations in one request, answered in their order.

Owns: the shape of the body, which errors refuse it whole and which fail one operation, the window of operations under
way.
Promises: a body that is not well formed is refused whole, before anything is done. However many operations there are,
only a window of them is under way, bounded in count and in bytes. What gets may bring is on the account of answers
before they are asked, and what they brought until it is written; a large value is asked for when its result is due
(`large_values`). What is asked of one key is done in its order: a write waits for the gets before it, a get for the
writes before it, and while the partition may change hands, a write for the write before.
Leaves to others: the form of an operation (`json_ops`), each operation (`service`), HTTP (`routes.batch`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct

from kvstore.config import Limits
from kvstore.errors import BadBody, KvError, NotFound, Unavailable, WrongOwner, from_problem
from kvstore.protocol import Answer, Delete, Get, Put
from kvstore.router.decode import ttl_to_ms
from kvstore.router.json_ops import DeleteOp, GetOp, Op, PutOp, check_value_size, decode_value, encode_value
from kvstore.router.large_values import LargeValues
from kvstore.router.service import KeyRequest, RouterService
from kvstore.transport.answers import LARGE_BYTES, Room
from kvstore.transport.channel import Channel
from kvstore.transport.http.requests import check_key
from kvstore.transport.http.schema import about


class BatchBody(Struct, forbid_unknown_fields=True):
    """Independent operations; not atomic."""

    ops: Annotated[list[Op], about(minItems=1)]


class _Step(NamedTuple):
    """One operation: its key as given, and its request, or why there is none."""

    key: str
    request: KeyRequest | None
    error: KvError | None
    bytes: int
    is_get: bool = False


class _UnderWay(NamedTuple):
    step: _Step
    sent: tuple[asyncio.Future[Any], Channel, int] | KvError
    share: _Share


class _Share:
    """What one get has in the room of its batch.
    Until it is answered what that may bring, then what it brought."""

    __slots__ = ("bytes", "room")

    def __init__(self, room: Room, size: int) -> None:
        self.room = room
        self.bytes = size

    def note(self, future: asyncio.Future[Any]) -> None:
        """The get was answered."""
        if not future.cancelled() and future.exception() is None and self.bytes:
            self.become(len(getattr(future.result(), "value", None) or b""))

    def become(self, size: int) -> None:
        self.room.change(size - self.bytes)
        self.bytes = size


def parse_batch(body: BatchBody, limits: Limits) -> list[_Step]:
    """The operations of a body. Raises BadBody, which refuses it whole."""
    if not body.ops:
        raise BadBody("the body has no operations.")
    return [_parse_op(op, number, limits) for number, op in enumerate(body.ops)]


def _parse_op(op: Op, number: int, limits: Limits) -> _Step:
    value = b""
    if isinstance(op, PutOp):
        value = decode_value(op.value, op.value_base64, f"operation {number}")
    try:
        key = check_key(op.key, limits.key_bytes_max)
        if isinstance(op, GetOp):
            return _Step(key, Get(0, key, LARGE_BYTES), None, min(limits.value_bytes_max, LARGE_BYTES), is_get=True)
        if isinstance(op, DeleteOp):
            return _Step(key, Delete(0, key), None, 64)
        ttl_ms = 0 if op.ttl is UNSET else ttl_to_ms(op.ttl, limits)
        check_value_size(len(value), limits)
        return _Step(key, Put(0, key, value, ttl_ms), None, len(value) + 64)
    except KvError as error:
        return _Step(op.key, None, error, 0)


async def run_batch(
    service: RouterService, steps: list[_Step], limits: Limits, room: Room, large: LargeValues
) -> AsyncIterator[bytes]:
    """Do them, a window at a time; yields the JSON of each result, in order.
    Its bytes are left in `room`."""
    under_way: deque[_UnderWay] = deque()
    last: dict[str, _UnderWay] = {}  # of each key, as far as it is under way
    window_bytes = 0
    for step in steps:
        while under_way and (
            len(under_way) >= limits.batch_window_ops
            or window_bytes + step.bytes > limits.batch_window_bytes
            or _may_overtake(service, step, last.get(step.key))
            or (step.is_get and not room.has_room(step.bytes))
        ):
            first = under_way.popleft()
            yield await _result(service, first, large)
            window_bytes -= first.step.bytes
            if last[first.step.key] is first:
                del last[first.step.key]
        begun = last[step.key] = await _begin(service, step, room)
        under_way.append(begun)
        window_bytes += step.bytes
    while under_way:
        yield await _result(service, under_way.popleft(), large)


def _may_overtake(service: RouterService, step: _Step, before: _UnderWay | None) -> bool:
    """What is sent now might be done before that one on the same key.
    A write before a get, which may ask again; a get before a write, which no reader sees until it is durable; or
    what was sent to another shard, or bounced."""
    if before is None:
        return False
    if before.step.is_get != step.is_get:
        return True
    if isinstance(before.sent, KvError):
        return isinstance(before.sent, Unavailable)
    future, channel, partition = before.sent
    return service.table.is_moving(partition) or not service.table.is_owner(channel, partition) or _has_bounced(future)


def _has_bounced(future: asyncio.Future[Any]) -> bool:
    """It was not executed, or may not have been, and may be sent again."""
    if not future.done():
        return False
    return future.exception() is not None or future.result().status in (WrongOwner.status, Unavailable.status)


async def _begin(service: RouterService, step: _Step, room: Room) -> _UnderWay:
    share = _Share(room, 0)
    if step.request is None:
        return _UnderWay(step, step.error or KvError(), share)
    try:
        if step.is_get:
            await room.add(step.bytes)
            share.bytes = step.bytes
        sent = service.begin(step.request)
    except KvError as error:
        share.become(0)
        return _UnderWay(step, error, share)
    if step.is_get:
        sent[0].add_done_callback(share.note)
    return _UnderWay(step, sent, share)


async def _result(service: RouterService, under_way: _UnderWay, large: LargeValues) -> bytes:
    result = await _encoded_result(service, under_way, large)
    under_way.share.become(len(result))
    under_way.share.bytes = 0  # no longer its own: the room keeps it until it is written
    return result


async def _encoded_result(service: RouterService, under_way: _UnderWay, large: LargeValues) -> bytes:
    step, share = under_way.step, under_way.share
    try:
        answer = await _answer(service, under_way, large)
        if answer.problem is not None:
            raise from_problem(answer.problem)
        if answer.status == 404:
            raise NotFound(f"there is no key {step.key!r}.")
    except KvError as error:
        document = {"status": error.status, "key": step.key, "code": error.code, "detail": error.detail}
        return msgspec.json.encode(document | error.members)
    if answer.value is None or len(answer.value) < LARGE_BYTES:
        return _encoded_answer(step.key, answer)
    async with share.room.account.turns:
        return _encoded_answer(step.key, answer)


async def _answer(service: RouterService, under_way: _UnderWay, large: LargeValues) -> Answer:
    """Of its shard. Raises what became of it instead."""
    step, sent, share = under_way
    if isinstance(sent, Unavailable) and step.request is not None:
        routed = await service.ask(step.request)  # nothing was sent
    elif isinstance(sent, KvError) or step.request is None:
        raise sent if isinstance(sent, KvError) else KvError()
    else:
        routed = await service.settle(step.request, *sent)
    if (size := routed.answer.left_out_bytes) and step.is_get:
        share.become(0)
        size = _base64_bytes(size)  # as what it becomes: what exceeds its room takes that of others
        routed = await large.get(step.key, size, routed.shard_id, share.room)
        share.bytes = size
    return routed.answer


def _base64_bytes(size: int) -> int:
    return 4 * -(-size // 3)


def _encoded_answer(key: str, answer: Answer) -> bytes:
    result: dict[str, Any] = {"status": answer.status, "key": key, "version": answer.version}
    if answer.value is not None:
        result |= encode_value(answer.value)
        if answer.ttl_left_ms:
            result["ttl"] = answer.ttl_left_ms / 1000
    return msgspec.json.encode(result)
