"""A copy on a simulated machine, and a primary's side of a session with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TypeVar

from kvstore.environment import Environment
from kvstore.replication import session
from kvstore.replication.copy import StoreCopy
from kvstore.replication.copy_greeting import Told
from kvstore.replication.files import Place, Times, make_copy, open_copy
from kvstore.replication.promise import read_identity
from kvstore.replication.session import Join, Session
from kvstore.storage.engine import Engine, FeedQuery, Identity
from kvstore.storage.log import Log
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.replay import replay
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.storage.segments import Entry
from loadtest.simulate.disk import Fate, SimulatedDisk, lose_all

T = TypeVar("T")
FOLDER, STORE, STORE_ID = Path("/data"), "shard-s1.copy-n2", "0123456789abcdef"
SEGMENT_BYTES = 8192
TIMES = Times(lease_s=1.0, disk_stall_s=2.0)


class Machine(Environment):
    """A clock to turn, and threads that are no threads; `gate`, where it is set, holds the work of threads up."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.gate: asyncio.Event | None = None

    def boottime_s(self) -> float:
        return self.now_s

    async def in_thread(self, function: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        return function()


class Moving(Environment):
    """A clock that only the test and sleeps move."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 50.0

    def monotonic_s(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class Node:
    """A machine with a copy on it."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.machine: Machine = Machine()
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        self.place = Place(self.disk, FOLDER, STORE, self._open, self._renew, SEGMENT_BYTES)

    async def _open(self) -> Engine:
        return self.engine

    async def _renew(self) -> Engine:
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        return self.engine

    async def make(self) -> StoreCopy:
        return await make_copy(self.place, STORE_ID, self.machine, TIMES)

    async def restart(self, fate: Fate = lose_all, kept: int = 0) -> StoreCopy:
        """Open the copy after a power cut."""
        self.disk.restart(fate)
        self.engine.crash(kept)
        identity = read_identity(self.disk, FOLDER, STORE)
        assert identity is not None
        return await open_copy(self.place, identity, self.machine, TIMES)


class Primary:
    """A primary's log and engine, and its side of a session with one copy."""

    def __init__(self, term: int = 1, start: str = "first") -> None:
        self.log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=1 << 20)
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        self.term = term
        self.start = start
        self.round = 0
        self.entries: list[Entry] = []

    def session(self, copy: StoreCopy) -> Session:
        return Session(STORE_ID, self.term, self.start, copy.following.copy_id, 1, self.round)

    async def put(self, key: str, value: bytes, *, apply: bool = True) -> Entry:
        number = self.log.last.number + 1
        row = Row(VALUE, key, 1, number, number, 0, value)
        return await self.append(CommitRecord(Clock(number, number), [row]), apply=apply)

    async def append(self, record: CommitRecord, *, apply: bool = True) -> Entry:
        number = self.log.append(record.encode(), self.term)
        (entry,) = self.log.entries(number - 1)
        self.entries.append(entry)
        if apply:
            await replay(self.engine, list(self.log.entries(self.engine.applied.position.number)))
        return entry

    async def common(self, copy: StoreCopy, told: Told) -> int | None:
        """Compare both chains, a few numbers at a time."""
        comparison = session.compare((0, self.log.last.number), told.known)
        while not comparison.done:
            numbers = session.probes(comparison, 3)
            ours = {number: self._checksum(number) for number in numbers}
            comparison = session.compared(comparison, ours, await copy.greeting.checksums(numbers))
        return comparison.agreed

    def _checksum(self, number: int) -> int:
        return self.entries[number - 1].checksum if number else 0

    async def greet(self, copy: StoreCopy, *, first_kept: int = 1) -> tuple[Told, Join]:
        self.round += 1
        told = await copy.greeting.hello(self.session(copy))
        assert told is not None
        common = None if told.filling else await self.common(copy, told)
        return told, session.how_to_join(
            common, told.position.number, told.applied, awaited=False, first_kept=first_kept
        )

    async def join(self, copy: StoreCopy) -> int | None:
        told, join = await self.greet(copy)
        return await copy.greeting.begin(self.session(copy), told.position, join)

    async def ship(self, copy: StoreCopy, committed: int = 0) -> int | None:
        behind = [entry for entry in self.entries if entry.number > copy.log.last.number]
        return await copy.records.take(self.session(copy), behind, committed)


def rows_of(engine: Engine) -> dict[str, tuple[bytes | None, int]]:
    assert isinstance(engine, MemoryEngine)
    return {row.key: (row.body, row.version) for row in engine._all() if row.body is not None}


class Threads(Machine):
    """Real threads, which cannot be ended; `let_go`, once set, lets the work of one begin."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = Event()
        self.let_go.set()

    async def in_thread(self, function: Callable[[], T]) -> T:
        def held_up() -> T:
            assert self.let_go.wait(30)
            return function()

        return await asyncio.get_running_loop().run_in_executor(None, held_up)


async def pages_of(primary: Primary, rows_max: int) -> list[list[Row]]:
    """The rows of the primary's engine as a feed brings them, in pages; what is between two pages may be written to."""
    pages, after_row, more = [], 0, True
    while more:
        page = await primary.engine.feed(FeedQuery([1], 0, after_row, rows_max, 1 << 20))
        pages.append(
            [Row(kind, key, p, 0, version, expires, body, intent)
             for kind, key, p, version, expires, body, intent, _ in page.rows]
        )  # fmt: skip
        after_row, more = page.after_row, page.more
    return pages


async def filling_copy(node: Node, primary: Primary) -> StoreCopy:
    """An empty copy, which a snapshot is to fill: the primary has 20 records, and keeps none of them."""
    copy = await node.make()
    for number in range(20):
        await primary.put(f"key-{number}", b"old")
    told, join = await primary.greet(copy, first_kept=21)
    assert join == Join(0, snapshot=True)
    assert await copy.greeting.begin(primary.session(copy), told.position, join) == 0
    return copy
