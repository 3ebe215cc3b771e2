"""Leases as rows: any batches on a real file do what a naive model says."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.protocol import Acquire, CancelWait, Delete, GetLock, Put, Release, Renew
from kvstore.storage import sqlite_file
from kvstore.storage.engine import Application
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.batch import Batch
from kvstore.store.leases import LeaseBody
from kvstore.store.ops import EndWait, ExpireLease, Locks, WriteOp
from kvstore.store.write_set import Context
from kvstore.transactions.intents import PreparedTxns, State
from kvstore.transactions.locks import LockTable
from tests.unit.store.harness import (
    PARTITIONS,
    Sink,
    acquire,
    next_id,
    token,
)


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

    def state(self, kind: str, key: str) -> State | None:
        row = self._engine.read_now((kind, key))
        return row and State(row.version, row.expires_at_ms, row.body)

    before = state


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
    def no_client_was_answered_twice(self) -> None:
        for op_id, sink in self.sinks.items():
            assert len([reply for reply in sink.replies if reply.id == op_id]) <= 1


TestBatchesOnAFile = BatchesOnAFile.TestCase
TestBatchesOnAFile.settings = settings(max_examples=40, stateful_step_count=20, suppress_health_check=list(HealthCheck))
