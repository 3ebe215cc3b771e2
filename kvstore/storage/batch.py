"""The rules of one batch: what each operation does to the rows, decided in order, without touching a file.

Owns: put, delete, expire and trim as decisions on rows; the version clock and the sequence; the count of keys and
bytes.
Promises: pure but for `read`, the look-up of a committed row that it is given. Operations see what earlier ones of
the same batch did. An operation that is refused has changed nothing: it rolls back alone, because nothing is written
before all are decided. Every operation that changes something takes one step of the version clock.
Leaves to others: the order of the operations (`store`), writing the rows and the commit (`sqlite`).

A key past its deadline is expired here, first, by whichever operation meets it: with a step of its own and a
tombstone, so that "expired" is a change like any other and no reader ever decides it by looking at a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from kvstore.errors import DiskFull, WrongOwner
from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Delete, Put
from kvstore.storage.rows import VALUE, Clock, Row


class Expire(msgspec.Struct):
    """The owner's own operation: make the expiry of `key` a fact, if its deadline has passed."""

    key: str
    id: int = 0


WriteOp = Put | Delete | Expire


class Before(NamedTuple):
    """What a batch must know of a key's committed row; `size` is that of its body, a tombstone is not `live`."""

    version: int
    expires_at_ms: int
    size: int
    live: bool


class Context(NamedTuple):
    """What holds for the whole batch. `arrivals[p]` is 0 where the store does not own partition p (see `store`)."""

    now_ms: int
    arrivals: Sequence[int]
    epoch: int
    frees_only: bool


_NOTHING = Before(0, 0, 0, False)


class Batch:
    """One batch under decision. `changed` are the rows to write, `answers` one per operation, in order."""

    def __init__(self, clock: Clock, context: Context, read: Callable[[str], Before | None]) -> None:
        self.changed: dict[str, Row] = {}
        self.answers: list[Answer] = []
        self.expired = 0
        self.frees_only = context.frees_only
        self._context = context
        self._read = read
        self._seen: dict[str, Before] = {}
        self._version, self._sequence, self._floor, self._keys, self._bytes = clock

    @property
    def clock(self) -> Clock:
        return Clock(self._version, self._sequence, self._floor, self._keys, self._bytes)

    def decide(self, op: WriteOp) -> None:
        """Append the answer to `op`, and its changes, if it has any."""
        partition = partition_of(op.key.encode(), len(self._context.arrivals))
        if not self._context.arrivals[partition]:
            error = WrongOwner(f"this shard does not own partition {partition}", epoch=self._context.epoch)
            self.answers.append(refusal(op.id, error.problem()))
            return
        before = self._before(op.key)
        due = before.live and 0 < before.expires_at_ms <= self._context.now_ms
        if due:
            self.expired += 1
            before = self._write(op.key, partition, None, 0)
        if isinstance(op, Put):
            self._put(op, partition, before)
        elif isinstance(op, Expire):
            self.answers.append(Answer(op.id, 410 if due else 200))
        elif before.live and isinstance(op, Delete):
            after = self._write(op.key, partition, None, 0)
            self.answers.append(Answer(op.id, 204, after.version))
        else:
            self.answers.append(Answer(op.id, 404))

    def _put(self, op: Put, partition: int, before: Before) -> None:
        if self.frees_only:
            self.answers.append(refusal(op.id, DiskFull().problem()))
            return
        expires_at_ms = self._context.now_ms + op.ttl_ms if op.ttl_ms else 0
        after = self._write(op.key, partition, op.value, expires_at_ms)
        self.answers.append(Answer(op.id, 204 if before.live else 201, after.version))

    def _before(self, key: str) -> Before:
        known = self._seen.get(key)
        return known if known is not None else self._read(key) or _NOTHING

    def _write(self, key: str, partition: int, body: bytes | None, expires_at_ms: int) -> Before:
        before = self._before(key)
        self._version = max(self._version, before.version) + 1
        self._sequence += 1
        self.changed[key] = Row(VALUE, key, partition, self._sequence, self._version, expires_at_ms, body)
        key_size = len(key.encode())
        if before.live:
            self._keys -= 1
            self._bytes -= key_size + before.size
        if body is not None:
            self._keys += 1
            self._bytes += key_size + len(body)
        after = Before(self._version, expires_at_ms, len(body or b""), body is not None)
        self._seen[key] = after
        return after


def refusal(op_id: int, problem: dict[str, Any]) -> Answer:
    """The answer of an operation that was not done, and why (the members of an RFC 9457 problem)."""
    return Answer(op_id, int(problem["status"]), problem=problem)
