"""What tests of leases and conditions share: sinks that remember, rows in memory, a clock to turn, a store to open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import msgspec

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.model import IdempotencyKey, Preconditions
from kvstore.placement.cluster_map import ClusterMap, at_home, map_of
from kvstore.protocol import Acquire, Answer, Reply
from kvstore.storage.rows import LEASE, REPLY, VALUE, Clock, Row
from kvstore.store.batch import Batch
from kvstore.store.leases import LeaseBody
from kvstore.store.ops import Locks, WriteOp
from kvstore.store.store import Store
from kvstore.store.write_set import Context
from kvstore.transactions.intents import PreparedTxns, State
from kvstore.transactions.locks import Lease, LockTable

PARTITIONS = 64
SEGMENT_BYTES = 4 << 20  # small, so that a test does not write much of nothing


class Sink:
    """Remembers what was sent to it."""

    def __init__(self) -> None:
        self.closed = False
        self.replies: list[Reply] = []
        self._wake = asyncio.Event()

    def send(self, reply: Reply, /) -> None:
        self.replies.append(reply)
        self._wake.set()

    async def answer(self, timeout_s: float = 60.0) -> Answer:
        """The only answer, once it is there."""
        await asyncio.wait_for(self._wake.wait(), timeout_s)
        (answer,) = self.replies
        assert isinstance(answer, Answer)
        return answer


class Rows:
    """The committed rows, in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

    def state(self, kind: str, key: str) -> State | None:
        row = self.rows.get((kind, key))
        return row and State(row.version, row.expires_at_ms, row.body)

    before = state


class Bench:
    """Batches without a file: each `run` is one batch, committed and visible at once."""

    def __init__(self, waiters_max: int = 100) -> None:
        self.waiters_max = waiters_max
        self.rows = Rows()
        self.clock = Clock()
        self.now_s = 1000.0
        self.now_ms = 1_700_000_000_000
        self.frees_only = False
        self.kept_ms = 600_000
        self.openings = 0
        self.boot = "this"
        self.arrivals = [1] * PARTITIONS
        self.batch: Batch
        self.open()

    def open(self) -> None:
        """Begin again with nothing but the rows, as after a restart."""
        self.openings += 1
        self.holds = PreparedTxns()
        self.locks: Locks = LockTable(f"opening {self.openings}", self.waiters_max)
        for (kind, key), row in self.rows.rows.items():
            if kind == LEASE and row.body is not None:
                body = msgspec.json.decode(row.body, type=LeaseBody)
                lease = self.locks.grant(key, body.owner, row.version, body.ttl_ms / 1000)
                self.locks.start(lease, self.now_s)

    def run(self, *work: WriteOp | tuple[WriteOp, Sink]) -> list[Answer]:
        """Decide these as one batch; the answers, in the order in which they leave."""
        replies = self.run_any(*work)
        answers = [reply for reply in replies if isinstance(reply, Answer)]
        assert len(answers) == len(replies)
        return answers

    def run_any(self, *work: WriteOp | tuple[WriteOp, Sink]) -> list[Reply]:
        """As `run`, where replies may be of any kind."""
        context = Context(
            self.now_ms, self.now_s, self.arrivals, 1, self.frees_only, self.kept_ms, 1 << 24, boot=self.boot
        )
        self.batch = batch = Batch(self.clock, context, self.locks, self.holds, self.rows)
        for each in work:
            op, sink = each if isinstance(each, tuple) else (each, Sink())
            batch.decide(op, sink)
        self.rows.rows.update(batch.changes.rows)
        self.clock = batch.changes.clock
        for lease in batch.leases.started:
            self.locks.start(lease, self.now_s)
        for sink, reply in batch.changes.answers:
            sink.send(reply)
        return [reply for _, reply in batch.changes.answers]

    def one(self, op: WriteOp) -> Answer:
        """The answer to the only operation of a batch."""
        (answer,) = self.run(op)
        return answer

    def lease(self, name: str) -> Lease:
        lease = self.locks.lease(name)
        assert lease is not None
        return lease

    def acquire(self, name: str, ttl_s: float = 10.0) -> int:
        """A new lease's token."""
        answer = self.one(acquire(name, ttl_s))
        assert answer.status == 201
        return answer.version

    def value(self, key: str) -> bytes | None:
        state = self.rows.state(VALUE, key)
        return state.body if state else None

    def replies(self) -> list[Row]:
        """The rows of replies that are kept."""
        return [row for (kind, _), row in self.rows.rows.items() if kind == REPLY and row.body is not None]


_ids = iter(range(1, 1 << 60))


def next_id() -> int:
    return next(_ids)


def acquire(
    name: str,
    ttl_s: float = 10.0,
    wait_s: float = 0.0,
    owner: str = "",
    once: IdempotencyKey | None = None,
    op_id: int = 0,
) -> Acquire:
    return Acquire(op_id or next_id(), name, round(ttl_s * 1000), round(wait_s * 1000), owner, once)


def token(number: int) -> Preconditions:
    return Preconditions(token=number)


def code(answer: Answer) -> str:
    """The code of the problem that an answer is; empty if it is none."""
    return str((answer.problem or {}).get("code", ""))


class TurnedTime(Environment):
    """The machine, but each clock can be stepped by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.monotonic_step_s = 0.0
        self.wall_step_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.monotonic_step_s

    def now_ms(self) -> int:
        return super().now_ms() + round(self.wall_step_s * 1000)


class StandingTime(Environment):
    """The machine, but its monotonic clock moves only when the test says so. Timers ring in real time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = super().monotonic_s()

    def monotonic_s(self) -> float:
        return self.now_s


def _fatal(error: BaseException) -> NoReturn:
    raise error


def all_mine(epoch: int) -> ClusterMap:
    members = [at_home("s1", "http://s1", "s1")]
    return map_of(members, cluster_id="c", epoch=epoch, partitions=PARTITIONS, owners=[0] * PARTITIONS)


@asynccontextmanager
async def opened(folder: Path, environment: Environment = SYSTEM, **limits: float) -> AsyncIterator[Store]:
    """A store in that folder that owns everything."""
    settings = Limits(**{"disk_reserve_bytes": 1, "log_segment_bytes": SEGMENT_BYTES} | limits)  # type: ignore[arg-type]
    store = await Store.open(folder / "store.db", settings, "s1", PARTITIONS, _fatal, environment)
    try:
        await store.partitions.adopt(all_mine(store.served.epoch + 1))
        yield store
    finally:
        await asyncio.wait_for(store.close(), 30)  # a test that failed may hold back what the store waits for


@asynccontextmanager
async def turns_counted() -> AsyncIterator[list[None]]:
    """One for each turn that the event loop has had for others."""
    turns: list[None] = []

    async def others() -> None:
        while True:
            turns.append(None)
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    try:
        yield turns
    finally:
        beside.cancel()


def asked(store: Store, op: WriteOp) -> Sink:
    """Where the answer to the operation will be."""
    sink = Sink()
    store.write(op, sink)
    return sink


async def ask(store: Store, op: WriteOp) -> Answer:
    return await asked(store, op).answer()
