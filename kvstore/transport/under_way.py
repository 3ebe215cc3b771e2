"""Operations under way to one node: what they count for, and what becomes of each one that gets no answer.

Owns: those that wait, by their ids, and their bytes.
Promises: pure but for the futures. Every operation gets exactly one outcome. Without an answer a write that left is of
unknown outcome, unless the node has said that it has answered all that it executed; of anything else nothing was done.
Leaves to others: bounds, ids and deadlines (`link`), messages on their way (`outbox`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import msgspec

from kvstore.config import Limits
from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.protocol import Answer, Reply

SETTLED = 4000  # the code by which a node closes a connection: what it has not answered was not executed
GET_BYTES = 64
_MEAN_SHIFT = 3  # each value counts for an eighth of the mean


class Addressee(Protocol):
    """A channel, as its link sees it. `store_id` empty: whichever store the node serves under that shard's id."""

    shard_id: str
    store_id: str
    answered: bool


class Pending(msgspec.Struct, frozen=True):
    """An operation that waits. `size`: what it counts for; `deadline_s`: by the clock of the event loop.

    `is_bounded`: it is a get that brings no value above its `bytes_max`.
    """

    future: asyncio.Future[Any]
    is_write: bool
    size: int
    deadline_s: float
    channel: Addressee
    is_bounded: bool = False


class UnderWay:
    """The operations under way to one node.

    The means are of the values that gets brought lately: `mean_bounded_bytes` of gets with a `bytes_max`,
    `mean_value_bytes` of the others. In one mean, each get of a small value would count for the large ones of before.
    The link adds to `ops` and `bytes` by itself: a call for each message would cost more than that.
    """

    def __init__(self) -> None:
        self.ops: dict[int, Pending] = {}
        self.bytes = 0
        self.mean_value_bytes = 0
        self.mean_bounded_bytes = 0
        self.sent_up_to = 0  # the last id that has left

    def count(self, channel: Addressee) -> int:
        """How many of that channel wait for their answers."""
        return sum(waiting.channel is channel for waiting in self.ops.values())

    def of(self, channel: Addressee) -> list[int]:
        """The ids of that channel's."""
        return [op_id for op_id, waiting in self.ops.items() if waiting.channel is channel]

    def late(self, now_s: float) -> list[int]:
        """The ids of those that should have been answered by now."""
        return [op_id for op_id, waiting in self.ops.items() if waiting.deadline_s <= now_s]

    def note_sent(self, messages: Sequence[Any]) -> None:
        """These leave now, in the order of their ids."""
        self.sent_up_to = messages[-1].id

    def take(self, replies: Sequence[Reply]) -> None:
        """The answers of one frame."""
        ops, freed = self.ops, 0
        for reply in replies:
            waiting = ops.pop(reply.id, None)
            if waiting is not None:
                freed += waiting.size
                waiting.channel.answered = True
                if type(reply) is Answer and reply.value is not None:
                    if waiting.is_bounded:
                        self.mean_bounded_bytes += (len(reply.value) - self.mean_bounded_bytes) >> _MEAN_SHIFT
                    else:
                        self.mean_value_bytes += (len(reply.value) - self.mean_value_bytes) >> _MEAN_SHIFT
                if not waiting.future.done():
                    waiting.future.set_result(reply)
        self.bytes -= freed

    def fail(self, op_ids: Collection[int], what: str, *, is_settled: bool = False) -> None:
        """End these operations: `what` became of their shard instead of an answer.

        `is_settled`: nothing that it has not answered was executed, or will be.
        """
        for op_id in op_ids:
            waiting = self.ops.pop(op_id)
            self.bytes -= waiting.size
            if not waiting.future.done():
                is_unknown = waiting.is_write and op_id <= self.sent_up_to and not is_settled
                waiting.future.set_exception((_unknown if is_unknown else unavailable)(waiting.channel, what))
                waiting.future.exception()  # looked at once here, else asyncio complains of those never awaited

    def fail_all(self, what: str, *, is_settled: bool = False) -> None:
        """As `fail`, of all that wait."""
        self.fail(list(self.ops), what, is_settled=is_settled)


def page_bytes(scan: Any, limits: Limits) -> int:
    """What the page that a `Scan` asks for may bring."""
    if not scan.values:
        return 0
    item_bytes_max = (scan.value_bytes_max or limits.value_bytes_max) + limits.key_bytes_max
    return int(min(scan.limit * item_bytes_max, scan.bytes_max or limits.page_bytes_max))


def _unknown(channel: Addressee, what: str) -> OutcomeUnknown:
    return OutcomeUnknown(f"shard {channel.shard_id} {what} before it answered.")


def unavailable(channel: Addressee, what: str) -> Unavailable:
    """The Unavailable of an operation that was not done, because `what` became of its shard."""
    return Unavailable(f"shard {channel.shard_id} {what}.", shard=channel.shard_id, retry_after_ms=1000)
