"""The rules of a batch beside a naive model: a dictionary that knows nothing of rows, tombstones or sequences."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Delete, Put, Reply
from kvstore.storage.rows import Clock, Row
from kvstore.store.batch import Batch
from kvstore.store.ops import Expire, Locks, WriteOp
from kvstore.store.write_set import Context
from kvstore.transactions.intents import PreparedTxns, State
from kvstore.transactions.locks import LockTable

PARTITIONS = 64
KEYS = ["a", "b", "c", "schlüssel", "🔑", "nul\0inside"]
ALL_OWNED = [1] * PARTITIONS


class NoListener:
    """A sink without a listener."""

    closed = False

    def send(self, reply: Reply, /) -> None:
        """Batches hand answers out; the store sends them."""


class Decided(NamedTuple):
    changed: dict[str, Row]
    answers: list[Answer]
    expired: int
    clock: Clock


class File:
    """Committed rows and clock, as a file would keep them."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.clock = Clock()

    def state(self, kind: str, key: str) -> State | None:
        row = self.rows.get(key)
        return row and State(row.version, row.expires_at_ms, row.body)

    before = state

    def run(
        self,
        ops: list[WriteOp],
        *,
        now_ms: int = 1000,
        arrivals: list[int] = ALL_OWNED,
        frees_only: bool = False,
    ) -> Decided:
        locks: Locks = LockTable("an opening", 10)
        batch = Batch(
            self.clock, Context(now_ms, 0.0, arrivals, 7, frees_only, 0, 1 << 24), locks, PreparedTxns(), self
        )
        for op in ops:
            batch.decide(op, NoListener())
        changed = {key: row for (_, key), row in batch.changes.rows.items()}
        self.rows |= changed
        self.clock = batch.changes.clock
        answers = [answer for _, answer in batch.changes.answers if isinstance(answer, Answer)]
        return Decided(changed, answers, batch.changes.expired, batch.changes.clock)

    def trim(self) -> None:
        self.rows = {key: row for key, row in self.rows.items() if row.body is not None}


class Live(NamedTuple):
    value: bytes
    expires_at_ms: int


class Model:
    """What a user would expect of the same operations."""

    def __init__(self) -> None:
        self.live: dict[str, Live] = {}

    def status_of(self, op: WriteOp, now_ms: int, owned: bool, frees_only: bool) -> int:
        if not owned:
            return 421
        before = self.live.get(op.key)
        due = before is not None and 0 < before.expires_at_ms <= now_ms
        if due:
            del self.live[op.key]
        if isinstance(op, Expire):
            return 410 if due else 200
        if isinstance(op, Delete):
            return 204 if self.live.pop(op.key, None) else 404
        if frees_only:
            return 507
        replaced = op.key in self.live
        self.live[op.key] = Live(op.value, now_ms + op.ttl_ms if op.ttl_ms else 0)
        return 204 if replaced else 201


keys = st.sampled_from(KEYS)
operations = st.one_of(
    st.builds(Put, st.just(1), keys, st.binary(max_size=8), st.sampled_from([0, 0, 5, 50])),
    st.builds(Delete, st.just(1), keys),
    st.builds(Expire, keys),
)


class Round(NamedTuple):
    ops: list[WriteOp]
    pause_ms: int
    unowned: set[str]
    frees_only: bool
    trims: bool


rounds = st.builds(
    Round,
    st.lists(operations, max_size=12),
    st.integers(0, 60),
    st.sets(keys, max_size=2),
    st.sampled_from([False, False, True]),
    st.booleans(),
)


@given(st.lists(rounds, max_size=6))
def test_batches_answer_and_change_what_a_dictionary_would(history: list[Round]) -> None:
    file, model, now_ms = File(), Model(), 1000
    highest: dict[str, int] = {}
    for ops, pause_ms, unowned, frees_only, trims in history:
        now_ms += pause_ms
        arrivals = list(ALL_OWNED)
        for key in unowned:
            arrivals[partition_of(key.encode(), PARTITIONS)] = 0
        clock = file.clock
        batch = file.run(ops, now_ms=now_ms, arrivals=arrivals, frees_only=frees_only)
        for op, answer in zip(ops, batch.answers, strict=True):
            owned = bool(arrivals[partition_of(op.key.encode(), PARTITIONS)])
            assert answer.status == model.status_of(op, now_ms, owned, frees_only)
            if answer.status in (201, 204):
                assert answer.version > highest.get(op.key, 0), "versions rise, also after a delete and a trim"
                highest[op.key] = answer.version
        for key, row in batch.changed.items():
            assert row.version >= highest.get(key, 0)
            highest[key] = row.version
        assert {key: Live(row.body, row.expires_at_ms) for key, row in file.rows.items() if row.body is not None} == (
            model.live
        )
        assert file.clock.keys == len(model.live)
        assert file.clock.bytes == sum(len(key.encode()) + len(live.value) for key, live in model.live.items())
        _check_sequences(batch, clock)
        if trims:
            file.trim()


def _check_sequences(batch: Decided, before: Clock) -> None:
    sequences = [row.sequence for row in batch.changed.values()]
    assert len(set(sequences)) == len(sequences)
    assert all(before.sequence < sequence <= batch.clock.sequence for sequence in sequences)
    assert max(sequences, default=before.sequence) == batch.clock.sequence
    assert max((row.version for row in batch.changed.values()), default=before.version) == batch.clock.version


@given(st.lists(operations, max_size=12))
def test_versions_are_given_once_and_rise_in_the_order_of_the_operations(ops: list[WriteOp]) -> None:
    versions = [answer.version for answer in File().run(ops).answers if answer.status in (201, 204)]
    assert versions == sorted(set(versions))


def test_a_put_of_an_absent_key_creates_and_one_of_a_present_key_replaces() -> None:
    answers = File().run([Put(1, "a", b"1"), Put(2, "a", b"2")]).answers
    assert [(a.id, a.status, a.version) for a in answers] == [(1, 201, 1), (2, 204, 2)]


def test_several_operations_on_one_key_in_one_batch_leave_one_row_and_see_each_other() -> None:
    file = File()
    batch = file.run([Put(1, "a", b"1"), Delete(2, "a"), Delete(3, "a"), Put(4, "a", b"22")])
    assert [a.status for a in batch.answers] == [201, 204, 404, 201]
    assert [(row.body, row.version) for row in batch.changed.values()] == [(b"22", 3)]
    assert file.clock == Clock(version=3, sequence=3, tombstones_floor=0, keys=1, bytes=3)


def test_a_key_put_over_an_expired_one_is_new_and_the_expiry_took_a_step_of_its_own() -> None:
    file = File()
    file.run([Put(1, "a", b"old", 10)], now_ms=1000)
    batch = file.run([Put(2, "a", b"new")], now_ms=1010)
    assert [(a.status, a.version) for a in batch.answers] == [(201, 3)]
    assert batch.expired == 1
    assert file.clock.sequence == 3


def test_a_put_one_millisecond_before_the_deadline_replaces() -> None:
    file = File()
    file.run([Put(1, "a", b"old", 10)], now_ms=1000)
    assert file.run([Put(2, "a", b"new")], now_ms=1009).answers[0].status == 204


def test_a_delete_of_an_expired_key_is_404_and_leaves_the_expiry_as_a_tombstone() -> None:
    file = File()
    file.run([Put(1, "a", b"old", 10)], now_ms=1000)
    batch = file.run([Delete(2, "a")], now_ms=2000)
    assert [a.status for a in batch.answers] == [404]
    assert [(row.body, row.version, row.expires_at_ms) for row in batch.changed.values()] == [(None, 2, 0)]


def test_a_put_that_the_disk_refuses_still_makes_the_expiry_that_it_met() -> None:
    file = File()
    file.run([Put(1, "a", b"old", 10)], now_ms=1000)
    batch = file.run([Put(2, "a", b"new")], now_ms=2000, frees_only=True)
    assert [a.status for a in batch.answers] == [507]
    assert file.rows["a"].body is None


def test_an_expiry_that_comes_too_early_or_too_late_changes_nothing() -> None:
    file = File()
    file.run([Put(1, "a", b"1", 10)], now_ms=1000)
    assert file.run([Expire("a")], now_ms=1009).changed == {}
    file.run([Put(2, "a", b"2")], now_ms=1009)
    batch = file.run([Expire("a"), Expire("never")], now_ms=9999)
    assert (batch.changed, [a.status for a in batch.answers]) == ({}, [200, 200])


def test_a_put_without_ttl_clears_an_earlier_one() -> None:
    file = File()
    file.run([Put(1, "a", b"1", 10), Put(2, "a", b"2")], now_ms=1000)
    assert file.rows["a"].expires_at_ms == 0


@pytest.mark.parametrize("op", [Put(1, "a", b"new"), Delete(1, "a"), Expire("a")])
def test_an_operation_on_a_partition_of_another_shard_is_refused_and_does_not_even_expire(op: WriteOp) -> None:
    file = File()
    file.run([Put(1, "a", b"old", 10)], now_ms=1000)
    before = dict(file.rows)
    batch = file.run([op], now_ms=9999, arrivals=[0] * PARTITIONS)
    assert batch.answers[0].status == 421
    assert batch.answers[0].problem is not None
    assert batch.answers[0].problem["epoch"] == 7
    assert (file.rows, batch.expired) == (before, 0)


def test_a_full_disk_refuses_puts_and_takes_deletes_and_expiries() -> None:
    file = File()
    file.run([Put(1, "a", b"1"), Put(2, "b", b"2", 10)], now_ms=1000)
    batch = file.run([Put(1, "c", b"3"), Delete(2, "a"), Expire("b")], now_ms=2000, frees_only=True)
    assert [a.status for a in batch.answers] == [507, 204, 410]
    assert batch.answers[0].problem is not None
    assert batch.answers[0].problem["code"] == "disk-full"
    assert (file.clock.keys, file.clock.bytes) == (0, 0)


def test_a_version_seen_on_a_row_moves_the_clock_up() -> None:
    file = File()
    file.rows["a"] = Row("value", "a", 0, 1, 100, 0, b"moved here")
    assert file.run([Put(1, "a", b"1")]).answers[0].version == 101
    assert file.run([Put(1, "b", b"1")]).answers[0].version == 102


def test_each_committed_row_is_looked_up_once_however_often_a_batch_changes_it() -> None:
    looked_up = []

    class Watched(File):
        def state(self, kind: str, key: str) -> State | None:
            looked_up.append(key)
            return super().state(kind, key)

    Watched().run([Put(1, "a", b"1"), Delete(2, "a"), Put(3, "a", b"2")])
    assert looked_up == ["a"]
