"""The rows under decision in one batch, the version clock, and who gets which answer.

Owns: what a batch has seen and changed so far; the version clock, the sequence, the floor; the count of keys and
bytes.
Promises: pure but for `Committed`, the look-up of committed rows that it is given. Nothing is written before all
operations of the batch are decided; each sees what the earlier ones changed. What one has changed can be taken back
alone (`savepoint`, `back_to`). No number becomes larger than the file can hold: the operation fails before. Every
operation that changes something takes a step of the version clock, or brings a higher version along.
Leaves to others: what an operation does (`batch`, `writes`, `leases`, `participant`), the commit (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import Protocol

import msgspec

from kvstore.errors import DataCorrupt, DiskFull
from kvstore.protocol import Reply
from kvstore.storage.rows import REPLY, VALUE, Clock, Row
from kvstore.store.memtable import ROW_BYTES, row_bytes
from kvstore.transactions.intents import ABSENT, State
from kvstore.transactions.openings import Openings
from kvstore.transactions.undo import Undo, put_back


class Sink(Protocol):
    """The receiver of an answer. When `closed`, an operation that has not begun is dropped."""

    @property
    def closed(self) -> bool:
        """Whether nothing is listening any more."""

    def send(self, reply: Reply, /) -> None:
        """Give the answer; called once for each operation."""


class Committed(Protocol):
    """The committed rows. `before` is asked for leases and decisions, of which it says only whether there is one."""

    def before(self, kind: str, key: str) -> State | None:
        """The row, perhaps without its body; None if there is none. Raises DataCorrupt, TooManyRequests."""

    def state(self, kind: str, key: str) -> State | None:
        """The row with its body; None if there is none. Raises DataCorrupt, TooManyRequests."""


class Context(msgspec.Struct, frozen=True):
    """What holds for the whole batch.

    `now_ms`: Unix time; `now_s`: monotonic. `generations[p]` is 0 where the store does not serve partition p (see
    `served`): because it does not own it, or because it is `frozen`.
    """

    now_ms: int
    now_s: float
    generations: Sequence[int]
    epoch: int
    frees_only: bool
    reply_kept_ms: int
    read_bytes_max: int
    frozen: Set[int] = frozenset()
    boot: str = ""  # of the machine, since which `now_s` counts
    openings: Openings = Openings()


Savepoint = tuple[tuple[int, ...], int, int, int, int]
"""A moment between two operations, or within one: clock, `expired`, answers, bytes, notes of undo."""
NUMBER_MAX = 2**63 - 1  # in the file
_SEEN_MAX = 2**62  # of versions that others gave: above it there are steps enough of its own
_WHOLE = frozenset({VALUE, REPLY})  # kinds of rows of which `before` brings the body, too
_new_row = partial(tuple.__new__, Row)  # from all of its fields; without the call in Python of a named tuple


class WriteSet:
    """The rows under decision in one batch.

    `rows` are those to write, `bytes` their size; `states`: what is known of rows that were looked at or changed;
    `answers`, in order, who gets which; `expired` counts the values that did.
    """

    def __init__(self, clock: Clock, context: Context, committed: Committed, undo: Undo) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.answers: list[tuple[Sink, Reply]] = []
        self.context = context
        self.undo = undo
        self.expired = 0
        self.bytes = 0
        self._committed = committed
        self.states: dict[tuple[str, str], State] = {}
        self._set_clock(clock)

    def _set_clock(self, clock: tuple[int, ...]) -> None:
        self._version, self._sequence, self._tombstones_floor, self._keys, self._bytes, self.floor = clock

    @property
    def clock(self) -> Clock:
        """The clock as it is now."""
        return Clock(self._version, self._sequence, self._tombstones_floor, self._keys, self._bytes, self.floor)

    def answer(self, sink: Sink, reply: Reply) -> None:
        """Give the operation its answer once the batch is durable."""
        self.answers.append((sink, reply))

    def savepoint(self) -> Savepoint:
        """The present moment."""
        clock = (self._version, self._sequence, self._tombstones_floor, self._keys, self._bytes, self.floor)
        return clock, self.expired, len(self.answers), self.bytes, self.undo.mark

    def back_to(self, savepoint: Savepoint) -> None:
        """Take back what was changed since, also in what else notes its changes in the same `Undo`."""
        clock, self.expired, answers, self.bytes, mark = savepoint
        self.undo.back_to(mark)
        self._set_clock(clock)
        del self.answers[answers:]

    def need_room(self) -> None:
        """Refuse what needs room on a full disk. Raises DiskFull."""
        if self.context.frees_only:
            raise DiskFull()

    # --- looking ------------------------------------------------------------------------------------------------------

    def before(self, kind: str, key: str) -> State:
        """The row as it is now; of a committed decision only whether there is one. Raises DataCorrupt."""
        state = self.states.get((kind, key))
        if state is None:
            if kind not in _WHOLE:
                return self._committed.before(kind, key) or ABSENT
            state = self.states[kind, key] = self._committed.state(kind, key) or ABSENT
        return state

    def state(self, kind: str, key: str) -> State:
        """The row as it is now, with its body. Raises DataCorrupt."""
        state = self.states.get((kind, key))
        if state is None:
            state = self.states[kind, key] = self._committed.state(kind, key) or ABSENT
        return state

    # --- changing -----------------------------------------------------------------------------------------------------

    def step(self) -> int:
        """The version clock's next step. Raises OverflowError where there is none."""
        self._rise_to(self._version + 1)
        return self._version

    def see(self, version: int) -> None:
        """The clock of another store has come that far. Raises OverflowError if ours could not go on from there."""
        if version > _SEEN_MAX:
            raise OverflowError(f"the version {version} is beyond what a store can go on from")
        if version > self._version:
            self._version = version

    def _rise_to(self, version: int) -> None:
        if version > NUMBER_MAX:
            raise OverflowError(f"the version {version} is larger than a store can hold")
        self._version = max(self._version, version)

    def count(self, keys: int, size: int) -> None:
        """So many keys and bytes are owned here from now on; negative: no more."""
        self._keys += keys
        self._bytes += size

    def take(self, rows: Iterable[Row]) -> None:
        """Rows of another store, which get sequences of this one. They are counted when their partition arrives."""
        for row in rows:
            kind, key, partition, _, version, expires_at_ms, body, intent = row
            self._set_row(kind, key, partition, State(version, expires_at_ms, body, intent is not None), intent)

    def raise_floor(self, stamp: int, tombstones: int = 0) -> None:
        """Of attempts up to that stamp nothing may be known any more; tombstones up to that sequence are trimmed.

        Raises OverflowError.
        """
        if stamp > NUMBER_MAX:
            raise OverflowError(f"the stamp {stamp} is larger than a store can hold")
        self.floor = max(self.floor, stamp)
        self._tombstones_floor = max(self._tombstones_floor, tombstones)

    def write(
        self, kind: str, key: str, partition: int, body: bytes | None, expires_at_ms: int = 0, version: int = 0
    ) -> int:
        """Give the row a new state, without an intent, and return its version; `body` None deletes. `version` 0: the
        clock's next step.

        A row that is damaged, and nothing but that row, is replaced, too. Raises DataCorrupt for other damage;
        OverflowError for a number that the file cannot hold.
        """
        before = self.states.get((kind, key))
        if before is None:
            try:
                before = self.before(kind, key)
            except DataCorrupt as error:
                before = _before_damage(error)
        if version:
            self.see(version)
        else:
            version = max(self._version, before.version) + 1
            self._rise_to(version)
        if expires_at_ms and abs(expires_at_ms) > NUMBER_MAX:
            raise OverflowError(f"the deadline {expires_at_ms} is beyond what a store can hold")
        self._set_row(kind, key, partition, State(version, expires_at_ms, body))
        if kind == VALUE:
            self._bytes += len(body or b"") - len(before.body or b"")
            if (body is None) != (before.body is None):
                sign = 1 if before.body is None else -1
                self.count(sign, sign * len(key.encode()))
        return version

    def _set_row(self, kind: str, key: str, partition: int, state: State, intent: bytes | None = None) -> None:
        name, rows, states, body = (kind, key), self.rows, self.states, state.body
        before = rows.get(name)
        self.undo.note((_put_row_back, self, name, (before, states.get(name))))
        self._sequence = sequence = self._sequence + 1
        rows[name] = _new_row((kind, key, partition, sequence, state.version, state.expires_at_ms, body, intent))
        states[name] = state
        self.bytes += len(key) + len(body or b"") + len(intent or b"") + ROW_BYTES
        if before is not None:
            self.bytes -= row_bytes(before)

    def write_new(self, kind: str, key: str, partition: int, body: bytes) -> None:
        """A row that is known not to be there; it takes no step of the version clock."""
        self._set_row(kind, key, partition, State(self._version, 0, body))

    def mark(self, key: str, partition: int, state: State, intent: bytes | None) -> None:
        """The key's value stays as it is, which is `state`, but carries the intent, or none any more."""
        marked = State(state.version, state.expires_at_ms, state.body, intent is not None)
        self._set_row(VALUE, key, partition, marked, intent)

    def expire_if_due(self, kind: str, key: str, partition: int) -> bool:
        """Make it a fact that the row's deadline has passed, if it has; returns whether. Raises DataCorrupt."""
        before = self.before(kind, key)
        due = before.live and 0 < before.expires_at_ms <= self.context.now_ms
        if due:
            self.expired += kind == VALUE
            self.write(kind, key, partition, None)
        return due


def _put_row_back(changes: WriteSet, name: tuple[str, str], before: tuple[Row | None, State | None]) -> None:
    put_back(changes.rows, name, before[0])
    put_back(changes.states, name, before[1])


def _before_damage(error: DataCorrupt) -> State:
    """What a damaged row says of its version is not believed: the clock's is none lower.
    Raises it if there is none."""
    row: Row | None = error.damaged_row
    if row is None:
        raise error
    return State(0, 0, row.body if row.body is None or isinstance(row.body, bytes) else b"")
