"""A store on a real file in a temporary folder, and hands to stop it at the steps that matter."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap, Move, at_home, map_of
from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Count, Delete, Get, Put, Scan
from kvstore.storage.engine import FeedPage, FeedQuery
from kvstore.storage.sync_pace import SyncPace
from kvstore.store.store import Store

PARTITIONS = 64
SEGMENT_BYTES = 4 << 20  # small, so that a test does not write much of nothing
WAIT_S = 8.0
Opener = Callable[..., Awaitable[Any]]  # opens a harness with the given limits


class Call:
    """A sink, and the answer that came to it. `answered` is shared: the order in which answers left."""

    def __init__(self, answered: list[Call], on_answer: Callable[[], None] | None = None) -> None:
        self.closed = False
        self._answered = answered
        self._on_answer = on_answer
        self._future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def send(self, reply: Any, /) -> None:
        assert not self._future.done(), "one operation, one answer"
        if self._on_answer is not None:
            self._on_answer()
        self._answered.append(self)
        self._future.set_result(reply)

    @property
    def done(self) -> bool:
        return self._future.done()

    def __await__(self) -> Any:
        return asyncio.wait_for(asyncio.shield(self._future), WAIT_S).__await__()


class Gate:
    """Stands in for a method: does the work, then holds its result back until it is opened; or waits `before`.

    With `once` only the first call is held, and later ones overtake it.
    """

    def __init__(self, method: Callable[..., Awaitable[Any]], before: bool = False, once: bool = False) -> None:
        self._method = method
        self._before = before
        self._once = once
        self._open = asyncio.Event()
        self.arrived = asyncio.Event()
        self.calls = 0

    async def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self._once and self.calls > 1:
            return await self._method(*args)
        if self._before:
            self.arrived.set()
            await self._open.wait()
        result = await self._method(*args)
        self.arrived.set()
        await self._open.wait()
        return result

    def open(self) -> None:
        self._open.set()


def make_map(epoch: int, owner_of: Callable[[int], int] = lambda _: 0, moves: Sequence[Move] = ()) -> ClusterMap:
    """Of the shards s1, whose store is under test, and s2."""
    members = [at_home(shard, f"http://{shard}", shard) for shard in ("s1", "s2")]
    owners = [owner_of(partition) for partition in range(PARTITIONS)]
    return map_of(members, cluster_id="c", epoch=epoch, partitions=PARTITIONS, owners=owners, moves=list(moves))


class Harness:
    """The store under test. Asking returns a `Call` at once; awaiting that brings the answer."""

    def __init__(self, store: Store, path: Path, fatal: list[BaseException], environment: Environment) -> None:
        self.store = store
        self.environment = environment
        self.path = path
        self.fatal = fatal
        self.closed = False
        self.answered: list[Call] = []
        self.gates: list[Gate] = []
        self._ids = itertools.count(1)
        self._moves: list[Move] = []

    def put(self, key: str, value: bytes = b"value", ttl_ms: int = 0, **call: Any) -> Call:
        return self.write(Put(next(self._ids), key, value, ttl_ms), **call)

    def delete(self, key: str, **call: Any) -> Call:
        return self.write(Delete(next(self._ids), key), **call)

    def write(self, op: Any, **call: Any) -> Call:
        sink = Call(self.answered, **call)
        self.store.write(op, sink)
        return sink

    def get(self, key: str, bytes_max: int = 0, **call: Any) -> Call:
        sink = Call(self.answered, **call)
        self.store.get(Get(next(self._ids), key, bytes_max), sink)
        return sink

    async def changes(
        self, after: int = 0, partitions: Sequence[int] = range(PARTITIONS), limit: int = 1000
    ) -> FeedPage:
        """What has changed since that sequence, as a destination asks for it."""
        await self.store.applier.flush()
        return await self.store.tables.engine.feed(FeedQuery(list(partitions), after, -1, limit, 1 << 24))

    async def decided(self) -> None:
        """Wait until all that was asked for is decided."""
        async with asyncio.timeout(WAIT_S):
            while len(self.store.pipeline):
                await asyncio.sleep(0)

    async def flush(self) -> None:
        """Wait until all that is visible is in the file."""
        await self.store.applier.flush()

    async def trim(self, sequence: int, count_max: int) -> bool:
        """Trim tombstones up to that sequence and remove them from the file; whether there were any."""
        await self.store.applier.flush()
        trimmed = await self.store.maintenance.trim_some(sequence, count_max)
        await self.store.applier.flush()
        while await self.store.applier.clean_some():
            pass
        return trimmed

    async def keys(self, prefix: str = "", after: str = "", limit: int = 1000) -> list[str]:
        return [item[0] for item in (await self.store.scans.scan(Scan(1, prefix, after, limit))).items]

    async def count(self, prefix: str) -> int:
        return (await self.store.scans.count(Count(1, prefix))).count

    def hold(self, method: str, *, before: bool = False, once: bool = False) -> Gate:
        """From now on `engine.<method>` does its work, but its results stay out until the gate is opened.

        With `before` the work itself waits. "commit" stands for the sync of the log, in a thread from now on.
        """
        owner: Any = self.store.tables.engine
        if method == "commit":
            owner, method = self.store.pipeline.writer, "_sync_in_thread"
            self.store.pipeline.writer.pace = SyncPace(0)
        gate = Gate(getattr(owner, method), before, once)
        self.gates.append(gate)
        setattr(owner, method, gate)
        return gate

    def forget_cache(self) -> None:
        """As if everything had been evicted."""
        self.store.tables.cache.clear()

    async def own(self, *, everything: bool) -> None:
        await self.store.partitions.adopt(make_map(self.store.served.epoch + 1, lambda _: 0 if everything else 1))

    async def leave(self, *keys: str) -> None:
        """The partitions of these keys are fenced, to go to another shard."""
        await self.store.partitions.freeze(await self.plan(*keys))

    async def plan(self, *keys: str) -> str:
        """From now on a move of the partitions of these keys to another shard stands: its id."""
        partitions = sorted({partition_of(key.encode(), PARTITIONS) for key in keys})
        epoch = self.store.served.epoch + 1
        self._moves.append(Move(id=f"move-{epoch}", source="s1", to="s2", partitions=partitions))
        await self.store.partitions.adopt(make_map(epoch, moves=self._moves))
        return self._moves[-1].id

    async def arrive(self, *keys: str) -> None:
        """The partitions of these keys come back: their move is given up."""
        gone = {partition_of(key.encode(), PARTITIONS) for key in keys}
        self._moves = [move for move in self._moves if not gone & set(move.partitions)]
        await self.store.partitions.adopt(make_map(self.store.served.epoch + 1, moves=self._moves))

    def partitions(self, *keys: str) -> bytes:
        """The set of the partitions of these keys, as it travels."""
        of_keys = {partition_of(key.encode(), PARTITIONS) for key in keys}
        return partition_set.encode(sum(1 << partition for partition in of_keys), PARTITIONS)

    def all_but(self, *keys: str) -> bytes:
        """The set of all partitions but those of these keys."""
        without = partition_set.decode(self.partitions(*keys))
        return partition_set.encode(partition_set.all_of(PARTITIONS) & ~without, PARTITIONS)

    async def sql(self, statement: str, *parameters: Any) -> list[Any]:
        """What another connection sees in the file, or does to it, once all that is visible is applied."""
        await self.flush()
        return self.sql_now(statement, *parameters)

    def sql_now(self, statement: str, *parameters: Any) -> list[Any]:
        """What another connection sees in the file, whatever is applied."""
        connection = sqlite3.connect(self.path, timeout=10)
        try:
            with connection:
                return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    async def reopen(self, **limits: Any) -> None:
        """An orderly end, and a new start."""
        await self.close()
        await self.reopen_after_close(**limits)

    async def close(self) -> None:
        """An orderly end."""
        if not self.closed:
            self.closed = True
            await self.store.close()

    async def reopen_after_close(self, **limits: Any) -> None:
        self.store = await open_store(self.path, self.fatal, self.environment, **limits)
        self.closed = False


class Machine(Environment):
    """The machine, but for its wall clock while a test has that in its hands."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed_ms: int | None = None

    def now_ms(self) -> int:
        return super().now_ms() if self.fixed_ms is None else self.fixed_ms


async def open_store(path: Path, fatal: list[BaseException], environment: Environment = SYSTEM, **limits: Any) -> Store:
    # the sweep sleeps unless a test is about it: what it does is then seen to have been done by another client
    settings = Limits(**{"expiry_sweep_s": 3600.0, "log_segment_bytes": SEGMENT_BYTES, **limits})
    return await Store.open(path, settings, "s1", PARTITIONS, fatal.append, environment)  # type: ignore[arg-type]


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
async def open_harness(tmp_path: Path, machine: Machine) -> AsyncIterator[Callable[..., Awaitable[Harness]]]:
    """Opens a store with the given limits; closes it after the test, which fails if the store had to give up."""
    opened: list[tuple[Harness, bool]] = []

    async def open_one(*, may_fail: bool = False, **limits: Any) -> Harness:
        fatal: list[BaseException] = []
        path = tmp_path / f"store-{len(opened)}.db"
        harness = Harness(await open_store(path, fatal, machine, **limits), path, fatal, machine)
        await harness.own(everything=True)
        opened.append((harness, may_fail))
        return harness

    yield open_one
    for harness, may_fail in opened:
        for gate in harness.gates:  # a test that failed may have left one closed
            gate.open()
        if not harness.fatal:
            await asyncio.wait_for(harness.close(), WAIT_S)
        assert may_fail or not harness.fatal


@pytest.fixture
async def harness(open_harness: Callable[..., Awaitable[Harness]]) -> Harness:
    return await open_harness()
