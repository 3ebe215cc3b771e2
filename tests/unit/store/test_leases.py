"""Leases as rows: batches against a naive model on a real file, and what a store promises about a lease's time."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.errors import DataCorrupt
from kvstore.model import IdempotencyKey
from kvstore.protocol import Acquire, Answer, CancelWait, Delete, Get, GetLock, Put, Release, Renew, ScanLeases
from kvstore.storage import sqlite_file
from kvstore.storage.engine import Application
from kvstore.storage.rows import LEASE, VALUE
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.batch import Batch
from kvstore.store.leases import LeaseBody
from kvstore.store.log_writer import LogWriter
from kvstore.store.ops import EndWait, Expire, ExpireLease, Locks, WriteOp
from kvstore.store.store import Store
from kvstore.store.write_set import Context, RowMeta
from kvstore.transactions.intents import PreparedTxns, State
from kvstore.transactions.locks import LockTable
from tests.unit.store.harness import (
    PARTITIONS,
    Bench,
    Sink,
    StandingTime,
    TurnedTime,
    acquire,
    ask,
    asked,
    code,
    next_id,
    opened,
    token,
    until,
)
from tests.unit.store.real_files import copy_files, threads

# --- batches against a naive model ------------------------------------------------------------------------------------


@dataclass
class ModelLease:
    token: int
    owner: str
    ttl_s: float
    deadline_s: float


@dataclass
class ModelName:
    """A name and the key of that name."""

    lease: ModelLease | None = None
    queue: list[tuple[Acquire, Sink]] = field(default_factory=list)
    version: int | None = None


class Model:
    """What a batch should do, one operation after the other, with no regard to rows.

    `said` are the answers expected: id of the operation, status, and whether it brings a new version or a token.
    """

    def __init__(self) -> None:
        self.names = {"a": ModelName(), "b": ModelName()}
        self.said: list[tuple[int, int, str, str]] = []
        self.full = False
        self.now_s = 0.0
        self.waiters_max = 3

    def say(self, op: WriteOp, status: int, kind: str = "", name: str = "") -> None:
        self.said.append((op.id, status, kind, name))

    def due(self, name: str) -> None:
        lease = self.names[name].lease
        if lease is not None and lease.deadline_s <= self.now_s:
            self.over(name)

    def over(self, name: str) -> None:
        state = self.names[name]
        state.lease = None
        while state.lease is None and state.queue:
            op, sink = state.queue.pop(0)
            if not sink.closed:
                self.give(op)

    def give(self, op: Acquire) -> None:
        if self.full:
            self.say(op, 507)
        else:
            self.names[op.key].lease = ModelLease(-1, op.owner, op.ttl_ms / 1000, float("inf"))
            self.say(op, 201, "grant", op.key)

    def may_write(self, op: Put | Delete) -> bool:
        lease = self.names[op.key].lease
        shown = op.guard.token if op.guard else None
        if lease is not None and shown is None:
            self.say(op, 423)
            return False
        if shown is not None and (lease is None or lease.token != shown):
            self.say(op, 412)
            return False
        return True

    def do(self, op: WriteOp, sink: Sink) -> None:
        state = self.names[op.key]
        if not isinstance(op, CancelWait):  # who leaves is not granted anything any more
            self.due(op.key)
        if isinstance(op, Put) and self.may_write(op):
            if op.guard is not None and op.guard.absent and state.version is not None:
                self.say(op, 412)
            elif self.full:
                self.say(op, 507)
            else:
                self.say(op, 204 if state.version is not None else 201, "version", op.key)
                state.version = -1
        elif isinstance(op, Delete) and self.may_write(op):
            self.say(op, 404 if state.version is None else 204, "" if state.version is None else "version", op.key)
            state.version = None
        elif isinstance(op, Acquire):
            if state.lease is None:
                self.give(op)
            elif not op.wait_ms:
                self.say(op, 423)
            elif len(state.queue) == self.waiters_max:
                self.say(op, 429)
            else:
                state.queue.append((op, sink))
        elif isinstance(op, Renew | Release):
            self.renew_or_release(op)
        elif isinstance(op, EndWait | CancelWait):
            gone = op.acquire if isinstance(op, CancelWait) else op.acquire.id
            for waiter in [waiter for waiter in state.queue if waiter[0].id == gone]:
                state.queue.remove(waiter)
                self.say(waiter[0], 423)
            self.say(op, 200)
        elif isinstance(op, ExpireLease):
            self.say(op, 200)
        elif isinstance(op, GetLock):
            self.say(op, 404 if state.lease is None else 200, "" if state.lease is None else "token", op.key)

    def renew_or_release(self, op: Renew | Release) -> None:
        lease = self.names[op.key].lease
        if lease is None or lease.token != op.token:
            self.say(op, 412)
        elif isinstance(op, Renew):
            lease.deadline_s = float("inf")
            self.say(op, 200, "token", op.key)
        else:
            self.over(op.key)
            self.say(op, 204)


NAMES = st.sampled_from(["a", "b"])
KINDS = st.sampled_from(
    ["acquire", "wait", "renew", "release", "put", "put if absent", "delete", "expire", "end wait", "leave", "inspect"]
)
TOKENS = st.sampled_from(["none", "holder", "stale", "made up"])
STEP = st.tuples(KINDS, NAMES, TOKENS, st.integers(0, 5))


class Applied:
    """The rows of an engine, as a batch looks at them."""

    def __init__(self, engine: SqliteEngine) -> None:
        self._engine = engine

    def before(self, kind: str, key: str) -> RowMeta | None:
        row = self._engine.read_now((kind, key))
        return row and RowMeta(row.version, row.expires_at_ms, len(row.body or b""), row.body is not None)

    def state(self, kind: str, key: str) -> State | None:
        row = self._engine.read_now((kind, key))
        return row and State(row.version, row.expires_at_ms, row.body)


class BatchesOnAFile(RuleBasedStateMachine):
    """Real batches on a real SQLite file; only the time is the test's own."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="leases-"))
        self.model = Model()
        self.waiting: list[tuple[Acquire, Sink]] = []
        self.sinks: dict[int, Sink] = {}
        self.granted: dict[str, list[int]] = {"a": [], "b": []}
        self.highest = 0
        self.now_s = 0.0
        self.openings = 0
        self.open()

    def open(self) -> None:
        self.openings += 1
        path = self.folder / "store.db"
        if not path.exists():
            sqlite_file.create_file(path, {"store_id": "ab" * 16, "shard_id": "s1", "partitions": str(PARTITIONS)})
        self.engine = self.runner.run(SqliteEngine.open(path, "s1", PARTITIONS, 1 << 20))
        self.locks: Locks = LockTable(f"opening {self.openings}", self.model.waiters_max)
        for name, version, stored in self.leases_in_the_file():
            body = msgspec.json.decode(stored, type=LeaseBody)
            self.locks.start(self.locks.grant(name, body.owner, version, body.ttl_ms / 1000), self.now_s)

    def leases_in_the_file(self) -> list[tuple[str, int, bytes]]:
        with closing(sqlite3.connect(self.folder / "store.db")) as connection:
            return connection.execute("SELECT name, token, lease FROM locks").fetchall()

    def teardown(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    def shown(self, name: str, which: str) -> int | None:
        lease = self.model.names[name].lease
        if which == "holder" and lease is not None:
            return lease.token
        if which == "stale" and self.granted[name]:
            return self.granted[name][0]
        return None if which == "none" else 10**9

    def operation(self, kind: str, name: str, which: str, number: int) -> WriteOp:
        op_id = next_id()
        shown = self.shown(name, which)
        guard = None if shown is None else token(shown)
        if kind == "put if absent":
            guard = token(0) if guard is None else guard
            guard.token, guard.absent = shown, True
        queue = self.model.names[name].queue
        if kind in ("end wait", "leave") and queue:
            waiter = queue[number % len(queue)][0]
            return EndWait(name, waiter, op_id) if kind == "end wait" else CancelWait(op_id, name, waiter.id)
        if kind in ("acquire", "wait"):
            return acquire(name, 1.0 + number, 60.0 * (kind == "wait"), f"owner {op_id}", op_id=op_id)
        if kind in ("renew", "release"):
            return (Renew if kind == "renew" else Release)(op_id, name, shown or 0)
        if kind in ("put", "put if absent"):
            return Put(op_id, name, b"value", 0, guard)
        if kind == "delete":
            return Delete(op_id, name, guard)
        return GetLock(op_id, name) if kind == "inspect" else ExpireLease(name, op_id)

    @rule(steps=st.lists(STEP, min_size=1, max_size=8), later_s=st.floats(0.0, 2.0), full=st.integers(0, 9))
    def batch(self, steps: list[tuple[str, str, str, int]], later_s: float, full: int) -> None:
        self.now_s += later_s
        self.model.now_s, self.model.full = self.now_s, full == 0
        self.model.said = []
        work: list[tuple[WriteOp, Sink]] = []
        for step in steps:
            op = self.operation(*step)
            sink = self.sinks.setdefault(op.id, Sink())
            if isinstance(op, CancelWait):
                sink = self.sinks[op.acquire]
            work.append((op, sink))
        for op, sink in work:
            self.model.do(op, sink)
        now_ms = 1_700_000_000_000 + round(self.now_s * 1000)
        context = Context(now_ms, self.now_s, [1] * PARTITIONS, 1, self.model.full, 600_000, 1 << 24)
        applied = self.engine.applied
        batch = Batch(applied.clock, context, self.locks, PreparedTxns(), Applied(self.engine))
        for op, sink in work:
            batch.decide(op, sink)
        position = applied.position._replace(number=applied.position.number + 1)
        rows = list(batch.changes.rows.values())
        self.runner.run(self.engine.apply(Application(rows, position, batch.changes.clock)))
        self.check(batch.changes.answers)
        for lease in batch.leases.started:
            self.locks.start(lease, self.now_s)
        for state in self.model.names.values():
            if state.lease is not None and state.lease.deadline_s == float("inf"):
                state.lease.deadline_s = self.now_s + state.lease.ttl_s

    def check(self, answers: list) -> None:
        """The same answers in the same order; versions and tokens rise."""
        assert [(answer.id, answer.status) for _, answer in answers] == [said[:2] for said in self.model.said]
        newest: dict[str, int] = {}
        for (sink, answer), (_, _, kind, name) in zip(answers, self.model.said, strict=True):
            if kind in ("grant", "version"):
                assert answer.version > self.highest
                self.highest = answer.version
            if kind == "grant":
                self.granted[name].append(answer.version)
                newest[name] = answer.version
            sink.send(answer)
        for name, state in self.model.names.items():
            if state.lease is not None and state.lease.token == -1:
                state.lease.token = newest[name]
        for (_, answer), (_, _, kind, name) in zip(answers, self.model.said, strict=True):
            if kind == "token":
                assert answer.version in self.granted[name]

    @rule(name=NAMES, which=st.integers(0, 5))
    def a_waiter_goes_away(self, name: str, which: int) -> None:
        queue = self.model.names[name].queue
        if queue:
            queue[which % len(queue)][1].closed = True

    @rule(pause_s=st.floats(0.0, 20.0))
    def restart(self, pause_s: float) -> None:
        """Those who waited are gone with their connections; a lease has its token still, and all of its time again."""
        self.runner.run(self.engine.close())
        self.now_s += pause_s
        for state in self.model.names.values():
            state.queue = []
            if state.lease is not None:
                state.lease.deadline_s = self.now_s + state.lease.ttl_s
        self.open()

    @invariant()
    def the_leases_are_those_of_the_model(self) -> None:
        for name, state in self.model.names.items():
            lease, expected = self.locks.lease(name), state.lease
            assert (lease is None) == (expected is None)
            if lease is not None and expected is not None:
                assert (lease.token, lease.owner, lease.ttl_s) == (expected.token, expected.owner, expected.ttl_s)
                assert lease.deadline_s == expected.deadline_s
            assert [op for op, _ in self.locks.waiting_for_lease(name)] == [op for op, _ in state.queue]

    @invariant()
    def the_file_has_the_leases_too(self) -> None:
        rows = {name: version for name, version, _ in self.leases_in_the_file()}
        assert rows == {name: state.lease.token for name, state in self.model.names.items() if state.lease}

    @invariant()
    def nobody_was_answered_twice(self) -> None:
        for op_id, sink in self.sinks.items():
            assert len([reply for reply in sink.replies if reply.id == op_id]) <= 1


TestBatchesOnAFile = BatchesOnAFile.TestCase
TestBatchesOnAFile.settings = settings(max_examples=40, stateful_step_count=20, suppress_health_check=list(HealthCheck))

# --- one batch --------------------------------------------------------------------------------------------------------


def test_a_release_and_the_next_grant_are_one_batch():
    bench = Bench()
    first = bench.acquire("k")
    assert bench.run(acquire("k", wait_s=5)) == []
    granted, released = bench.run(Release(0, "k", first))
    assert (granted.status, released.status) == (201, 204)
    assert granted.version > first
    assert bench.lease("k").token == granted.version


def test_an_expiry_and_the_next_grant_are_one_batch():
    bench = Bench()
    first = bench.acquire("k", 10)
    bench.run(acquire("k", wait_s=60))
    bench.now_s += 10
    granted, expired = bench.run(ExpireLease("k"))
    assert (granted.status, expired.status) == (201, 200)
    assert granted.version > first


def test_a_holders_put_does_not_stand_behind_those_who_wait_for_its_lease():
    bench = Bench()
    mine = bench.acquire("k")
    answers = bench.run(
        acquire("k", wait_s=60, op_id=1),
        acquire("k", wait_s=60, op_id=2),
        Put(3, "k", b"v", 0, token(mine)),
        Renew(4, "k", mine),
        Delete(5, "k", token(mine)),
        GetLock(6, "k"),
    )
    assert [(answer.id, answer.status) for answer in answers] == [(3, 201), (4, 200), (5, 204), (6, 200)]
    assert msgspec.json.decode(answers[-1].value or b"")["waiting"] == 2


def test_an_expiry_is_a_tombstone_among_the_rows_and_a_step_of_the_clock():
    bench = Bench()
    granted = bench.acquire("k", 10)
    bench.now_s += 10
    assert bench.lease("k").token == granted  # nobody has looked, so it stands
    bench.run(ExpireLease("k"))
    row = bench.rows.rows[LEASE, "k"]
    assert row.body is None
    assert row.version > granted
    assert row.version == bench.clock.version


def test_a_lease_that_was_renewed_in_time_does_not_end_at_its_old_deadline():
    bench = Bench()
    mine = bench.acquire("k", 10)
    bench.now_s += 9
    assert bench.one(Renew(1, "k", mine)).ttl_left_ms == 10_000
    bench.now_s += 9
    bench.run(ExpireLease("k"))
    assert bench.lease("k").token == mine


def test_what_meets_a_lease_past_its_deadline_ends_it_first():
    bench = Bench()
    for number, (late, status) in enumerate(
        [
            (lambda t: Renew(1, "k", t), 412),
            (lambda t: Release(1, "k", t), 412),
            (lambda t: Put(1, "k", b"late", 0, token(t)), 412),
            (lambda t: Delete(1, "k", token(t)), 412),
            (lambda t: GetLock(1, "k"), 404),
            (lambda t: Put(1, "k", b"free"), 201),
        ]
    ):
        mine = bench.acquire("k", 10)
        bench.now_s += 10
        answer = bench.one(late(mine))
        assert answer.status == status, number
        assert code(answer) == ("lock-lost" if status == 412 else "")
        assert bench.locks.lease("k") is None
    assert bench.value("k") == b"free"


def test_a_token_rises_through_release_expiry_delete_and_restart():
    bench = Bench()
    tokens = []
    for ending in ("release", "expire", "delete", "restart", "trim"):
        mine = bench.acquire("k", 10)
        tokens.append(mine)
        if ending == "expire":
            bench.now_s += 10
            bench.run(ExpireLease("k"))
        elif ending == "delete":
            bench.run(Put(1, "k", b"v", 0, token(mine)), Delete(2, "k", token(mine)), Release(3, "k", mine))
        elif ending == "restart":
            bench.open()
            assert bench.lease("k").token == mine
            bench.run(Release(1, "k", mine))
        else:
            bench.run(Release(1, "k", mine))
        if ending == "trim":
            bench.rows.rows.clear()  # the tombstone is gone, too: only the clock's row knows
    tokens.append(bench.acquire("k"))
    assert tokens == sorted(set(tokens))


def test_waiters_who_have_left_are_passed_over():
    bench = Bench()
    mine = bench.acquire("k")
    sinks = [Sink() for _ in range(4)]
    bench.run(*[(acquire("k", wait_s=60, op_id=number), sink) for number, sink in enumerate(sinks)])
    sinks[0].closed = sinks[1].closed = True
    answers = bench.run(Release(9, "k", mine))
    assert [(answer.id, answer.status) for answer in answers] == [(2, 201), (9, 204)]
    assert [op.id for op, _ in bench.locks.waiting_for_lease("k")] == [3]


def test_whoever_leaves_is_answered_and_only_by_its_own_connection():
    bench = Bench()
    bench.acquire("k")
    mine, other = Sink(), Sink()
    bench.run((acquire("k", wait_s=60, op_id=7), mine), (acquire("k", wait_s=60, op_id=7), other))
    bench.run((CancelWait(8, "k", 7), other))
    assert [reply.id for reply in other.replies] == [7, 8]
    assert mine.replies == []
    assert len(bench.locks.waiting_for_lease("k")) == 1


def once(key: str = "K") -> IdempotencyKey:
    return IdempotencyKey(key, "digest")


def test_a_grant_that_its_only_asker_has_not_taken_is_given_back_and_its_reply_forgotten():
    bench, asker = Bench(), Sink()
    asked = acquire("k", once=once())
    bench.run((asked, asker))
    token = bench.lease("k").token
    assert bench.one(Release(9, "k", token, None, asked.id)).status == 412  # of another connection
    answers = bench.run((Release(9, "k", token, None, asked.id), asker))
    assert [answer.status for answer in answers] == [204]
    assert bench.locks.lease("k") is None
    again = bench.one(acquire("k", once=once()))
    assert again.status == 201
    assert again.version > token


@pytest.mark.parametrize("how", ["waited, too", "came later"])
def test_a_grant_that_a_duplicate_was_told_of_is_not_given_back(how: str):
    bench, asker = Bench(), Sink()
    first = bench.acquire("k")
    asked = acquire("k", wait_s=5, once=once())
    bench.run((asked, asker))
    if how == "waited, too":
        bench.run(acquire("k", wait_s=5, once=once()))
    bench.run(Release(9, "k", first))
    if how == "came later":
        assert bench.one(acquire("k", wait_s=5, once=once())).status == 201
    token = bench.lease("k").token
    (answer,) = bench.run((Release(9, "k", token, None, asked.id), asker))
    assert answer.status == 412
    assert bench.lease("k").token == token


def test_what_is_withdrawn_leaves_the_queue_and_the_others_go_on():
    bench, leaves = Bench(), Sink()
    token = bench.acquire("k")
    bench.run((acquire("k", wait_s=5, once=once()), leaves), acquire("k", wait_s=5, once=once("other"), op_id=7))
    answers = bench.run(Release(1, "k", 0, withdraw="K"), Release(2, "k", token))
    assert [(answer.id, code(answer)) for answer in answers if answer.id != leaves.replies[0].id] == [
        (1, ""), (7, ""), (2, ""),
    ]  # fmt: skip
    assert [code(reply) for reply in leaves.replies if isinstance(reply, Answer)] == ["lock-lost"]


def test_what_was_granted_and_is_withdrawn_goes_to_the_next_and_a_late_duplicate_is_refused():
    bench = Bench()
    assert bench.one(acquire("k", once=once())).status == 201
    bench.run(acquire("k", wait_s=5, op_id=7))
    answers = bench.run(Release(1, "k", 0, withdraw="K"))
    assert [(answer.id, answer.status) for answer in answers] == [(7, 201), (1, 204)]
    assert code(bench.one(acquire("k", once=once()))) == "lock-lost"
    assert bench.one(Release(2, "k", 0, withdraw="K")).status == 204  # again
    assert bench.lease("k").token == answers[0].version


def test_an_acquire_that_comes_after_its_withdrawal_is_refused():
    bench = Bench()
    assert bench.one(Release(1, "k", 0, withdraw="K")).status == 204
    assert code(bench.one(acquire("k", once=once()))) == "lock-lost"
    assert bench.one(acquire("k", once=once("another"))).status == 201


def test_a_full_queue_refuses_the_next_waiter_with_429():
    bench = Bench(waiters_max=2)
    bench.acquire("k")
    answers = bench.run(*[acquire("k", wait_s=60, op_id=number) for number in (1, 2, 3)])
    assert [(answer.id, code(answer)) for answer in answers] == [(3, "too-many-requests")]


def test_on_a_full_disk_nobody_is_granted_anything_and_releases_go_on():
    bench = Bench()
    mine = bench.acquire("k")
    bench.run(acquire("k", wait_s=60, op_id=1), acquire("k", wait_s=60, op_id=2))
    bench.frees_only = True
    answers = bench.run(Release(3, "k", mine))
    assert [(answer.id, answer.status) for answer in answers] == [(1, 507), (2, 507), (3, 204)]
    assert bench.one(acquire("k")).status == 507
    assert bench.locks.lease("k") is None


def test_the_expiry_of_a_key_passes_through_a_lease():
    bench = Bench()
    bench.one(Put(1, "k", b"v", 1000))
    mine = bench.acquire("k", 60)
    bench.now_ms += 1000
    assert bench.one(Expire("k", VALUE)).status == 410
    assert bench.value("k") is None
    assert bench.lease("k").token == mine


def test_what_the_store_does_not_own_it_does_not_touch():
    bench = Bench()
    mine = bench.acquire("k", 10)
    bench.arrivals = [0] * PARTITIONS
    bench.now_s += 10
    asks = [ExpireLease("k"), Renew(0, "k", mine), Release(0, "k", mine), acquire("k"), GetLock(0, "k")]
    assert [answer.status for answer in bench.run(*asks)] == [421] * len(asks)
    assert bench.lease("k").token == mine


def test_a_put_without_a_token_names_the_holder_and_when_to_come_again():
    bench = Bench()
    bench.run(acquire("k", 30, owner="worker 7"))
    bench.now_s += 10
    problem = bench.one(Put(1, "k", b"v")).problem
    assert problem is not None
    assert (problem["code"], problem["owner"], problem["ttl_left"]) == ("locked", "worker 7", 20)
    assert problem["retry_after_ms"] > 0


# --- a store ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def turned() -> TurnedTime:
    return TurnedTime()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, asyncio.Event]]:
    """Syncs of the log stand still while one of these is not set: before the sync, or when it has returned."""
    events = {name: asyncio.Event() for name in ("before-sync", "after-sync")}
    for event in events.values():
        event.set()
    sync = LogWriter._sync_in_thread

    async def held(writer: LogWriter) -> None:
        await events["before-sync"].wait()
        await sync(writer)
        await events["after-sync"].wait()

    monkeypatch.setattr(LogWriter, "_sync_in_thread", held)
    yield events
    for event in events.values():
        event.set()


async def lease_rows(store: Store) -> list[tuple[str, int, bool]]:
    """What a person with `sqlite3` would see: name, version, whether it is a tombstone."""
    await store.applier.flush()
    with closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as file:
        return file.execute("SELECT key, version, body IS NULL FROM rows WHERE kind = 'lease' ORDER BY key").fetchall()


async def test_a_lease_ends_by_itself_as_a_tombstone_in_the_file(tmp_path: Path):
    clock = StandingTime()
    async with opened(tmp_path, clock) as store:
        granted = (await ask(store, acquire("k", 0.2))).version
        assert await lease_rows(store) == [("k", granted, False)]
        clock.now_s += 0.3
        waiter = asked(store, acquire("k", 30, wait_s=20))
        assert (await waiter.answer()).status == 201
        await ask(store, Release(0, "k", waiter.replies[0].version))  # type: ignore[union-attr]
        ((name, version, deleted),) = await lease_rows(store)
        assert (name, deleted) == ("k", True)
        assert version > granted


async def test_a_waiter_has_the_lease_within_half_a_second_of_its_end(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, acquire("k", 0.3))
        began = time.monotonic()
        assert (await asked(store, acquire("k", wait_s=20)).answer()).status == 201
        assert 0.2 < time.monotonic() - began < 15  # well before it has waited for long enough


async def test_a_short_lease_after_a_long_one_ends_in_its_own_time(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, Release(0, "k", (await ask(store, acquire("k", 3600))).version))
        await ask(store, acquire("k", 0.2))
        assert (await asked(store, acquire("k", wait_s=20)).answer(15)).status == 201


async def test_a_lease_ends_although_the_queue_of_writes_was_full_when_it_was_due(tmp_path: Path, gate):
    async with opened(tmp_path, sync_inline_ms_max=0.0, queue_ops_max=3) as store:
        await ask(store, acquire("k", 0.2))
        waiter = asked(store, acquire("k", wait_s=20))
        await until(lambda: store.tables.locks.waiting_for_lease("k"))
        gate["before-sync"].clear()
        await ask_until_full(store)
        await asyncio.sleep(0.5)
        gate["before-sync"].set()
        assert (await waiter.answer()).status == 201


async def test_a_wait_ends_although_the_queue_of_writes_was_full_when_it_was_due(tmp_path: Path, gate):
    async with opened(tmp_path, sync_inline_ms_max=0.0, queue_ops_max=3) as store:
        await ask(store, acquire("k", 3600))
        waiter = asked(store, acquire("k", wait_s=0.2))
        await until(lambda: store.tables.locks.waiting_for_lease("k"))
        gate["before-sync"].clear()
        await ask_until_full(store)
        await asyncio.sleep(0.5)
        gate["before-sync"].set()
        answer = await waiter.answer()
        assert (answer.status, code(answer)) == (423, "locked")
        assert store.tables.locks.waiting_for_lease("k") == ()


async def ask_until_full(store: Store) -> None:
    """Batches are at work and cannot end; the queue behind them is full."""
    asked(store, Put(0, "other", b""))
    await until(lambda: not len(store.pipeline))
    while not (sink := asked(store, Put(0, "other", b""))).replies:
        pass
    assert sink.replies[0].status == 429  # type: ignore[union-attr]


async def test_no_answer_leaves_before_the_commit_and_no_lease_runs_before_it_is_visible(tmp_path: Path, gate):
    clock = StandingTime()
    async with opened(tmp_path, clock, sync_inline_ms_max=0.0) as store:
        for point in gate:
            gate[point].clear()
            sink = asked(store, acquire("k", 0.2))
            lost = asked(store, Release(0, "k", 10**9))
            await until(lambda: store.tables.locks.lease("k"))
            lease = store.tables.locks.lease("k")
            assert lease is not None
            clock.now_s += 0.4  # longer than the lease
            await asyncio.sleep(0.4)
            assert sink.replies == lost.replies == []
            assert lease.left_s(clock.now_s) == 0.2
            gate[point].set()
            granted = await sink.answer()
            assert (granted.status, (await lost.answer()).status) == (201, 412)
            assert (await ask(store, Renew(0, "k", granted.version))).status == 200
            await ask(store, Release(0, "k", granted.version))


async def test_a_renewal_that_is_not_visible_yet_keeps_the_lease_from_ending(tmp_path: Path, gate):
    clock = StandingTime()
    async with opened(tmp_path, clock, sync_inline_ms_max=0.0) as store:
        granted = (await ask(store, acquire("k", 0.5))).version
        gate["before-sync"].clear()
        asked(store, Put(0, "other", b""))  # for a renewal alone nothing is synced: it changes no row
        await until(lambda: not len(store.pipeline))
        lease = store.tables.locks.lease("k")
        assert lease is not None
        clock.now_s += 0.1
        renewed = asked(store, Renew(0, "k", granted))
        await until(lambda: lease.left_s(clock.now_s) == 0.5)  # it is decided, and stands still
        clock.now_s += 0.8
        await asyncio.sleep(0.8)
        assert store.tables.locks.lease("k") is lease
        assert lease.left_s(clock.now_s) == 0.5
        gate["before-sync"].set()
        assert (await renewed.answer()).status == 200
        assert (await ask(store, Put(0, "k", b"v", 0, token(granted)))).status == 201


async def test_steps_of_the_wall_clock_do_not_touch_a_lease(tmp_path: Path, turned: TurnedTime):
    async with opened(tmp_path, turned) as store:
        granted = (await ask(store, acquire("k", 60))).version
        for step_s in (1e6, -2e6):
            turned.wall_step_s += step_s
            await ask(store, ExpireLease("k"))
            assert (await ask(store, Renew(0, "k", granted))).status == 200
            document = msgspec.json.decode((await ask(store, GetLock(0, "k"))).value or b"")
            assert 30 < document["ttl_left"] <= 60


async def test_after_a_pause_longer_than_the_lease_the_late_write_of_its_holder_is_refused(
    tmp_path: Path, turned: TurnedTime
):
    """All that came in during the pause is there at once: the holder's write first, then the next holder's."""
    async with opened(tmp_path, turned) as store:
        paused = (await ask(store, acquire("k", 60))).version
        waiter = asked(store, acquire("k", 60, wait_s=60))
        await ask(store, GetLock(0, "k"))
        turned.monotonic_step_s += 61
        late = asked(store, Put(0, "k", b"late", 0, token(paused)))
        assert code(await late.answer()) == "lock-lost"
        granted = await waiter.answer()
        assert granted.version > paused
        assert (await ask(store, Put(0, "k", b"mine", 0, token(granted.version)))).status == 201
        assert code(await ask(store, Renew(0, "k", paused))) == "lock-lost"
        assert code(await ask(store, Release(0, "k", paused))) == "lock-lost"


async def test_a_lease_survives_a_restart_with_its_token_and_all_of_its_time(tmp_path: Path, turned: TurnedTime):
    async with opened(tmp_path, turned) as store:
        granted = (await ask(store, acquire("k", 60, owner="me"))).version
        identity = store.tables.locks.lease("k").identity  # type: ignore[union-attr]
        turned.monotonic_step_s += 50
    turned.monotonic_step_s += 1000
    async with opened(tmp_path, turned) as store:
        lease = store.tables.locks.lease("k")
        assert lease is not None
        assert lease.identity != identity
        document = msgspec.json.decode((await ask(store, GetLock(0, "k"))).value or b"")
        assert (document["token"], document["owner"]) == (granted, "me")
        assert document["ttl_left"] > 30
        turned.monotonic_step_s += 30
        assert (await ask(store, Put(0, "k", b"v", 0, token(granted)))).status == 201
        turned.monotonic_step_s += 31
        assert code(await ask(store, Put(0, "k", b"v", 0, token(granted)))) == "lock-lost"


async def test_a_lease_survives_a_crash_also_where_its_end_was_decided_but_not_committed(tmp_path: Path, gate):
    crashed = tmp_path / "crashed"
    async with opened(tmp_path, apply_delay_s=3600.0, sync_inline_ms_max=0.0) as store:
        granted = (await ask(store, acquire("k", 60))).version
        gate["before-sync"].clear()
        copy_files(tmp_path, crashed)  # what a loss of power leaves of what is appended, and not synced, below
        released = asked(store, Release(0, "k", granted))
        await until(lambda: store.tables.locks.lease("k") is None)
        assert released.replies == []
        gate["before-sync"].set()
        assert (await released.answer()).status == 204
    async with opened(crashed) as store:
        assert (await ask(store, Renew(0, "k", granted))).status == 200


async def test_a_lease_that_ended_before_the_crash_does_not_come_back(tmp_path: Path):
    crashed = tmp_path / "crashed"
    async with opened(tmp_path, apply_delay_s=3600.0) as store:
        released = (await ask(store, acquire("released", 60))).version
        await ask(store, Release(0, "released", released))
        expired = (await ask(store, acquire("expired", 0.1))).version
        await asked(store, acquire("expired", 60, wait_s=20)).answer()
        copy_files(tmp_path, crashed)
    async with opened(crashed) as store:
        assert code(await ask(store, Renew(0, "released", released))) == "lock-lost"
        assert code(await ask(store, Renew(0, "expired", expired))) == "lock-lost"
        assert (await ask(store, acquire("released"))).version > released


async def test_a_damaged_lease_keeps_the_store_from_opening_and_nothing_from_ending(tmp_path: Path):
    """Whoever held it would write as if it still did; and a process that cannot open its store must be able to end."""
    async with opened(tmp_path) as store:
        await ask(store, acquire("k", 60))
    with closing(sqlite3.connect(tmp_path / "store.db")) as file, file:
        file.execute("UPDATE rows SET version = version + 1 WHERE kind = 'lease'")
    before = threads()
    with pytest.raises(DataCorrupt, match="'k'"):
        async with opened(tmp_path):
            pytest.fail("it was opened")
    await until(lambda: threads() <= before)


async def test_a_restored_lease_ends_by_itself(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, acquire("k", 0.3))
    async with opened(tmp_path) as store:
        assert (await asked(store, acquire("k", wait_s=20)).answer()).status == 201


async def test_reads_of_a_leased_key_go_on(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, Put(0, "k", b"v"))
        await ask(store, acquire("k", 60))
        sink = Sink()
        store.get(Get(1, "k"), sink)
        assert (await sink.answer()).value == b"v"


async def test_the_leases_of_a_store_are_listed_by_name(tmp_path: Path):
    async with opened(tmp_path) as store:
        tokens = {name: (await ask(store, acquire(name, 60, owner=f"o-{name}"))).version for name in ("b", "a", "c/1")}
        await ask(store, Release(0, "b", tokens["b"]))
        page = await store.scans.leases(ScanLeases(0, "", "", 10))
        assert [item[:3] for item in page.items] == [("a", tokens["a"], b"o-a"), ("c/1", tokens["c/1"], b"o-c/1")]
        assert all(30_000 < left_ms <= 60_000 for *_, left_ms in page.items)
        first = await store.scans.leases(ScanLeases(0, "", "", 1))
        assert (first.more, first.last) == (True, "a")
        assert [item[0] for item in (await store.scans.leases(ScanLeases(0, "c", "", 10))).items] == ["c/1"]


async def test_a_hundred_waiters_are_served_in_order_of_arrival(tmp_path: Path):
    async with opened(tmp_path) as store:
        holder = (await ask(store, acquire("k", 60))).version
        waiters = [asked(store, acquire("k", 60, wait_s=60)) for _ in range(100)]
        for number, waiter in enumerate(waiters):
            await ask(store, Release(0, "k", holder))
            answer = await waiter.answer()
            assert answer.status == 201
            assert answer.version > holder
            assert all(later.replies == [] for later in waiters[number + 1 :])
            holder = answer.version


async def test_writes_and_leases_in_one_stream_keep_the_fence(tmp_path: Path):
    """Twenty who acquire, write and release, all at once: what each wrote while it held the lease is what it reads."""
    async with opened(tmp_path) as store:
        log: list[int] = []

        async def worker(number: int) -> None:
            granted = await asked(store, acquire("k", 30, wait_s=30)).answer()
            assert granted.status == 201
            shown = token(granted.version)
            answers: list[Answer] = [await ask(store, Put(0, "k", b"%d" % number, 0, shown)) for _ in range(2)]
            assert all(answer.status in (201, 204) for answer in answers)
            log.append(granted.version)
            await ask(store, Release(0, "k", granted.version))
            assert code(await ask(store, Put(0, "k", b"late", 0, shown))) == "lock-lost"

        await asyncio.gather(*map(worker, range(20)))
        assert log == sorted(set(log))
