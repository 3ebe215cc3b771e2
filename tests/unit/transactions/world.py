"""Stores without files, for the exhaustive tests of the rules of transactions.

A store here is what `storage.store` and `storage.sqlite` make of a batch, without time and disk: rows in memory, and
the real Batch, LockTable and Holds. Each `run` is one batch, durable and visible at once. It can die and be opened
again from its rows, and a partition can move to another one, as kvstore/DESIGN.md, section 6, says.

A store is a plain object that can be pickled, so that an explorer may go back to an earlier one. `canonical` says
which two are the same: what they can never show, such as sequences and the numbers of identities, does not count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Set
from typing import Any, NamedTuple

import msgspec

from kvstore.model import Attempt
from kvstore.placement.ring import partition_of
from kvstore.protocol import Reply
from kvstore.storage.rows import DECISION, LEASE, REPLY, VALUE, Clock, Row
from kvstore.store.batch import Batch
from kvstore.store.ops import EndReads, Expire, ExpireLease, Locks, WriteOp
from kvstore.store.write_set import Context
from kvstore.transactions.decisions import Decision, decode_decision
from kvstore.transactions.intents import PreparedTxns, State
from kvstore.transactions.locks import Identity, LockTable

PARTITIONS = 64
KEPT_MS = 600_000
READ_BYTES_MAX = 1_000_000
LATER_S = 1000.0  # past every lease and every reply
NOW_MS = 1_700_000_000_000

Address = tuple[Any, ...] | None


class Violation(AssertionError):
    """A promise is broken. The explorer adds how it came to that."""


class Sink:
    """Knows who waits for the answer; none if `address` is None."""

    __slots__ = ("address", "closed")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.closed = False

    def send(self, reply: Reply, /) -> None:
        """The explorer sees to it."""


class Noted(NamedTuple):
    """A decision that is kept."""

    partition: int
    acknowledged: bool


class Holding(NamedTuple):
    """An attempt that holds keys, as the explorer sees it."""

    attempt: Attempt
    anchor: str
    keys: tuple[str, ...]


def at(key: str) -> int:
    return partition_of(key.encode(), PARTITIONS)


class Store:
    """`late`: how many times LATER_S has passed."""

    def __init__(self, name: str, owned: Iterable[str], version: int = 0) -> None:
        self.name = name
        self.late = 0
        self.arrivals = bytearray(PARTITIONS)
        self.arrived = 1
        for key in owned:
            self.arrivals[at(key)] = 1
        self.rows: dict[tuple[str, str], Row] = {}
        self.clock = Clock(version=version)
        self.openings = 0
        self.open()

    # --- the committed rows -------------------------------------------------------------------------------------------

    def state(self, kind: str, key: str) -> State | None:
        row = self.rows.get((kind, key))
        return row and State(row.version, row.expires_at_ms, row.body)

    before = state

    def seed(self, kind: str, key: str, body: bytes, version: int) -> None:
        """A row from before the story begins."""
        self.rows[kind, key] = Row(kind, key, at(key), version, version, 0, body)
        self.clock = self.clock._replace(version=max(version, self.clock.version))

    def decision(self, attempt: Attempt) -> Decision | None:
        row = self.rows.get((DECISION, attempt.name))
        return decode_decision(row.body) if row is not None and row.body is not None else None

    def held(self) -> list[Holding]:
        """Of the keys that it owns."""
        held = [
            Holding(hold.attempt, hold.anchor, tuple(sorted(key for key in hold.intents if self.arrivals[at(key)])))
            for hold in self.holds.all()
        ]
        return sorted((each for each in held if each.keys), key=lambda each: each.attempt.name)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batch(self) -> Batch:
        now_ms, now_s = NOW_MS + round(self.late * LATER_S * 1000), self.late * LATER_S
        context = Context(now_ms, now_s, self.arrivals, 1, False, KEPT_MS, READ_BYTES_MAX)
        return Batch(self.clock, context, self.locks, self.holds, self)

    def run(self, *work: tuple[WriteOp, Sink]) -> list[tuple[Address, Reply]]:
        """One batch; who gets which answer. Raises Violation if a version or token does not rise."""
        batch = self._batch()
        for op, sink in work:
            batch.decide(op, sink)
        return self._commit(batch)

    def _commit(self, batch: Batch) -> list[tuple[Address, Reply]]:
        for (kind, key), row in batch.changes.rows.items():
            before = self.rows.get((kind, key))
            changed = before is None or (before.body, before.expires_at_ms) != (row.body, row.expires_at_ms)
            if before is not None and kind in (VALUE, LEASE) and row.version < before.version + changed:
                raise Violation(f"{kind} {key!r}: version {row.version} after {before.version}")
        self.rows.update(batch.changes.rows)
        self.clock = batch.changes.clock
        for lease in batch.leases.started:
            self.locks.start(lease, self.late * LATER_S)
        for attempt, partition, committed in batch.outcomes.decided:
            self.noted[attempt] = Noted(partition, not committed)
        for attempt in batch.outcomes.dropped:
            self.noted.pop(attempt, None)
        return [(sink.address, reply) for sink, reply in batch.changes.answers if isinstance(sink, Sink)]

    def acknowledge(self, attempts: Iterable[Attempt]) -> None:
        for attempt in attempts:
            if attempt in self.noted:
                self.noted[attempt] = self.noted[attempt]._replace(acknowledged=True)

    def end_reads(self) -> list[tuple[Address, Reply]]:
        """Read-only transactions have had their time."""
        return self.run((EndReads(list(self.holds.readers)), Sink(None)))

    def pass_time(self) -> list[tuple[Address, Reply]]:
        """So much that all is due; and the sweep has passed."""
        self.late += 1
        work: list[tuple[WriteOp, Sink]] = [(ExpireLease(lease.name), Sink(None)) for lease in self.locks.leases()]
        now_ms = NOW_MS + round(self.late * LATER_S * 1000)
        for row in self.rows.values():
            if row.kind == REPLY and row.body is not None and row.expires_at_ms <= now_ms:
                work.append((Expire(row.key, REPLY, row.partition), Sink(None)))
        return self.run(*work)

    # --- death and restart --------------------------------------------------------------------------------------------

    def crash(self) -> list[Address]:
        """Die, and be opened again; those whose answers are lost."""
        lost = [queued.sink.address for _, queued in self.locks.all_waiting()]
        lost += [sink.address for name in self._lease_queues() for _, sink in self.locks.waiting_for_lease(name)]
        self.open()
        return lost

    def _lease_queues(self) -> list[str]:
        return sorted({row.key for row in self.rows.values() if row.kind == LEASE})

    def open(self) -> None:
        """Nothing is in memory; then all that is owned arrives, as when a file is opened."""
        self.openings += 1
        self.locks: Locks = LockTable(f"{self.name}/{self.openings}", 100)
        self.holds = PreparedTxns()
        self.noted: dict[Attempt, Noted] = {}
        owned = {partition for partition, arrival in enumerate(self.arrivals) if arrival}
        batch = self._batch()
        batch.arrive(owned, self._in_memory(owned))
        self._commit(batch)

    def _in_memory(self, partitions: Set[int]) -> list[Row]:
        """What `Handover` looks up when these arrive."""
        return [
            row
            for row in self.rows.values()
            if row.partition in partitions
            and (row.intent is not None or (row.body is not None and row.kind in (LEASE, DECISION)))
        ]

    # --- moves --------------------------------------------------------------------------------------------------------

    def give_away(self, key: str) -> tuple[list[Row], list[tuple[Address, Reply]]]:
        """The key's partition leaves, trimmed at once: its rows; and who was bounced, or goes on."""
        partition = at(key)
        self.arrivals[partition] = 0
        batch = self._batch()
        batch.depart({partition}, 1, frozenset())
        answers = self._commit(batch)
        rows = [row for row in self.rows.values() if row.partition == partition]
        for row in rows:
            del self.rows[row.kind, row.key]
        return rows, answers

    def take_in(self, key: str, rows: list[Row], clock: Clock) -> None:
        """The key's partition arrives; `clock` is the source's."""
        partition = at(key)
        self.rows.update({(row.kind, row.key): row for row in rows})
        self.clock = later_clock(self.clock, clock)
        batch = self._batch()
        batch.arrive({partition}, self._in_memory({partition}))
        self.arrived += 1
        self.arrivals[partition] = self.arrived
        self._commit(batch)


def later_clock(own: Clock, source: Clock) -> Clock:
    """What the destination of a move goes on with."""
    return own._replace(
        version=max(own.version, source.version), attempts_floor=max(own.attempts_floor, source.attempts_floor)
    )


# --- which two stores are the same ------------------------------------------------------------------------------------


def canonical(store: Store, exact: bool) -> Any:
    """A hashable form of all that it means. Only if `exact` do identities count as they are, and not just where they
    stand: who reads under locks shows them."""
    return _form(store, None if exact else {})


_SILENT = {
    "Hold": {"_sink"},
    "Lease": {"granted_to"},
    "LockTable": {"undo"},
    "PreparedTxns": {"undo"},
    "ReadHold": {"sink"},
    "Store": {"arrived"},
}
_SILENT_UNLESS_EXACT = {"LockTable": {"_count", "_opening"}, "Store": {"arrived", "openings"}}


def _form(value: Any, names: dict[Identity, int] | None) -> Any:
    if value is None or isinstance(value, str | int | bytes | float):
        return value
    kind = type(value)
    if kind is Identity and names is not None:
        return names.setdefault(value, len(names))
    if kind is Row:
        return tuple(value[:3] + value[4:])
    if kind is Clock:
        return value.version, value.attempts_floor
    if kind is bytearray:
        return bytes(map(bool, value))
    if isinstance(value, tuple | list | deque):
        return tuple([_form(each, names) for each in value])
    if isinstance(value, dict):
        return _form_of_dict(value, names)
    if isinstance(value, msgspec.Struct):
        return kind.__name__, msgspec.msgpack.encode(value)
    fields = getattr(kind, "__slots__", None) or vars(value)
    silent = _SILENT_UNLESS_EXACT.get(kind.__name__, set()) if names is not None else set()
    silent = silent | _SILENT.get(kind.__name__, set())
    return kind.__name__, tuple([_form(getattr(value, name), names) for name in fields if name not in silent])


def _form_of_dict(value: dict[Any, Any], names: dict[Identity, int] | None) -> Any:
    if not value:
        return ()
    keys = list(value)
    if isinstance(keys[0], Attempt):
        keys.sort(key=lambda attempt: attempt.name)
    elif isinstance(keys[0], Identity):
        keys.sort(key=lambda identity: repr(value[identity]))
    else:
        keys.sort()
    return tuple([(_form(key, names), _form(value[key], names)) for key in keys])
