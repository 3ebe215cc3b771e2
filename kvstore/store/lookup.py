"""The rows that a batch finds: what was executed, what is visible, what is in the file.

Owns: which rows an operation will look at, and whether they are at hand, that is, in memory.
Promises: a batch sees every change that was decided before it. Operations whose rows are not at hand are not decided
until they are: nothing on the event loop's thread waits for the file, but for an operation that was queued behind a
lock for so long that its rows were forgotten (counted in `inline_reads`).
A damaged row is at hand, too: to look at it raises DataCorrupt.
Leaves to others: fetching (`fetcher`), what the rows mean (`batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvstore.errors import DataCorrupt, KvError, TooManyRequests
from kvstore.model import IdempotencyKey
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Abort,
    Acquire,
    ApplyIntents,
    DecideCommit,
    Delete,
    GetTxn,
    Prepare,
    Put,
    ReadLock,
    Release,
    Renew,
    ResolveTxn,
    Transact,
)
from kvstore.storage.engine import RowKey
from kvstore.storage.rows import DECISION, LEASE, REPLY, VALUE, Row
from kvstore.store.cache import state_of
from kvstore.store.idempotency import attempt_row_key, row_key
from kvstore.store.ops import Expire, keys_of
from kvstore.store.tables import Tables
from kvstore.transactions.intents import State

LookBefore = Callable[[str, str], State | None]


def rows_needed(op: Any) -> Iterator[RowKey]:
    """The rows that the operation may look at, apart from those that are always in memory."""
    kind = type(op)
    if kind is Put or kind is Delete:
        yield VALUE, op.key
    elif kind is Expire:
        yield op.kind, op.key
    elif kind is Transact or kind is Prepare or kind is DecideCommit:
        for key in keys_of(op):
            yield VALUE, key
        if op.once is not None and kind is not Prepare:
            yield REPLY, row_key("Txn", op.key, op.once)
    elif kind is ApplyIntents or kind is Abort or kind is ReadLock:
        for key in op.keys:
            yield VALUE, key
    if kind in _REPEATABLE and op.once is not None:
        yield REPLY, row_key(kind.__name__, op.key, op.once)
    elif kind is Release and op.withdraw is not None:
        yield REPLY, row_key("Acquire", op.key, IdempotencyKey(op.withdraw, ""))
    elif kind is DecideCommit or kind is ResolveTxn:
        yield DECISION, op.attempt.name
    elif kind is GetTxn and op.partition >= 0:
        yield DECISION, op.name
        yield REPLY, attempt_row_key(op.name)


_REPEATABLE = frozenset({Put, Delete, Acquire, Renew, Release})


def home_of(op: Any, key: RowKey, partitions: int) -> int:
    """The partition of a row that the operation may look at."""
    if key[0] != VALUE and getattr(op, "partition", -1) >= 0:
        return int(op.partition)
    return partition_of((key[1] if key[0] == VALUE else op.key).encode(), partitions)


def if_whole(before: LookBefore, kind: str, key: str) -> State | None:
    """What `before` finds; None also for what cannot be told, because the operation that looks at it is refused."""
    try:
        return before(kind, key)
    except KvError:
        return None


_OF_VALUES = frozenset({Prepare, ApplyIntents, Abort})
_NONE: list[RowKey] = []
_DECIDED = State(0, 0, b"")


class Lookup:
    """The committed rows, as a batch asks for them (see `write_set.Committed`)."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def missing(self, op: Any) -> list[RowKey]:
        """The rows that must be fetched before the operation is decided; not to be changed."""
        kind = type(op)
        if kind is Put or kind is Delete:
            if op.once is None:
                key = (VALUE, op.key)
                return _NONE if self.is_at_hand(key) else [key]
        elif kind in _OF_VALUES or (kind is DecideCommit and op.once is None and not self._is_decided(op)):
            far = self._tables.cache.unknown(keys_of(op) if kind is Prepare or kind is DecideCommit else op.keys)
            return [key for name in far if not self.is_at_hand(key := (VALUE, name))] if far else _NONE
        return [key for key in rows_needed(op) if not self.is_at_hand(key)]

    def _is_decided(self, op: DecideCommit) -> bool:
        return op.attempt.name in self._tables.holds.decided

    def is_at_hand(self, key: RowKey) -> bool:
        """Whether the row can be looked at without the file.

        A decision that is not in the table of decisions is not there.
        """
        tables = self._tables
        if key[0] == VALUE:
            if tables.cache.peek(key[1]) is not None:
                return True
        elif key[0] == DECISION and key[1] not in tables.holds.decided:
            return True
        return tables.memtable.executed(key) is not None or tables.memtable.fetched(key)[0]

    def before(self, kind: str, key: str) -> State | None:
        """What `write_set.Committed.before` says.

        Raises DataCorrupt, TooManyRequests (a miss that is being verified).
        """
        if kind == DECISION:
            return _DECIDED if key in self._tables.holds.decided else None
        if kind == LEASE:
            return None  # what is there is in the lock table, and no version was ever above the clock's
        return self.state(kind, key)

    def state(self, kind: str, key: str) -> State | None:
        """The newest executed row; None if there is none. Raises DataCorrupt, TooManyRequests (a miss that is being
        verified).

        Reads the file in the calling thread where the row is not at hand.
        """
        name, memtable = (kind, key), self._tables.memtable
        row = memtable.undurable.get(name)
        if row is None and kind == VALUE and (state := self._tables.cache.peek(key)) is not None:
            return state  # as new as what is visible
        if row is None:
            row = memtable.visible(name) or self._from_file(name)
        return state_of(row) if row is not None else None

    def _from_file(self, key: RowKey) -> Row | None:
        is_known, row = self._tables.memtable.fetched(key)
        if isinstance(row, DataCorrupt):
            raise row
        if is_known:
            return row
        if key[0] == DECISION and key[1] not in self._tables.holds.decided:
            return None
        self._tables.stats.inline_reads += 1
        row = self._tables.engine.read_now(key)
        if row is None and key[0] == VALUE:
            self._check_miss(partition_of(key[1].encode(), len(self._tables.served.generations)))
        return row

    def _check_miss(self, partition: int) -> None:
        """Raises DataCorrupt, TooManyRequests: the row may be there."""
        verification = self._tables.verification
        if (damage := verification.miss_in(partition)) is not None:
            raise damage
        if not verification.is_verified(partition):
            raise TooManyRequests("The rows of this key are being verified; try again.", retry_after_ms=100)
