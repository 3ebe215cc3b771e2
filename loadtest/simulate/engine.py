"""The engine in memory as its store sees a file.
Each call takes a while, and others go on during that time.

Owns: `SimulatedEngine`.
Promises: what a call does or finds is of one moment between its begin and its end. It keeps what `MemoryEngine` does.
Leaves to others: when it fails (`fail`), what survives a power cut (`crash`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set

from kvstore.errors import DataCorrupt
from kvstore.storage.engine import Application, Digest, FeedPage, FeedQuery, Identity, RowKey, ScanPage, ScanQuery
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.rows import Row
from loadtest.simulate.environment import SimulatedEnvironment


class SimulatedEngine(MemoryEngine):
    """`environment` is that of the process which has it open. `applications`: how many there were."""

    environment: SimulatedEnvironment

    def __init__(self, identity: Identity) -> None:
        super().__init__(identity)
        self.applications = 0

    def copied(self) -> MemoryEngine:
        """Another one, with all that this one has now."""
        other = MemoryEngine(self.identity, self.path)
        other._applied, other._rows, other._places = self._applied, dict(self._rows), dict(self._places)
        other._count = itertools.count(max(self._places.values(), default=0) + 1)
        return other

    def backed_up(self) -> SimulatedEngine:
        """Another one, with all that this one has now, which a later process opens."""
        other = SimulatedEngine(self.identity)
        other._applied, other._rows, other._places = self._applied, dict(self._rows), dict(self._places)
        other._count = itertools.count(max(self._places.values(), default=0) + 1)
        other._history = [(other._applied, dict(other._rows), other.identity, dict(other._places))]
        other.fail = self.fail
        return other

    async def apply(self, application: Application) -> None:
        await self.environment.pause()
        await super().apply(application)
        self.applications += 1
        await self.environment.pause()

    async def checkpoint(self, *, only_if_due: bool = False) -> int:
        await self.environment.pause()
        number = await super().checkpoint(only_if_due=only_if_due)
        await self.environment.pause()
        return number

    async def clean(self, rows_max: int) -> int:
        await self.environment.pause()
        count = await super().clean(rows_max)
        await self.environment.pause()
        return count

    async def read(self, keys: list[RowKey]) -> list[Row | DataCorrupt | None]:
        await self.environment.pause()
        found = await super().read(keys)
        await self.environment.pause()
        return found

    async def scan(self, query: ScanQuery) -> ScanPage:
        await self.environment.pause()
        page = await super().scan(query)
        await self.environment.pause()
        return page

    async def feed(self, query: FeedQuery) -> FeedPage:
        await self.environment.pause()
        page = await super().feed(query)
        await self.environment.pause()
        return page

    async def kept_in_memory(self, partitions: Set[int]) -> list[Row]:
        await self.environment.pause()
        rows = await super().kept_in_memory(partitions)
        await self.environment.pause()
        return rows

    async def due(self, now_ms: int, generations: Sequence[int], count_max: int) -> list[tuple[str, str, int]]:
        await self.environment.pause()
        found = await super().due(now_ms, generations, count_max)
        await self.environment.pause()
        return found

    async def digest(self, partitions: Set[int]) -> tuple[int, Digest]:
        await self.environment.pause()
        found = await super().digest(partitions)
        await self.environment.pause()
        return found

    async def occupied(self) -> set[int]:
        await self.environment.pause()
        found = await super().occupied()
        await self.environment.pause()
        return found

    async def old_tombstones(self, sequence: int, count_max: int) -> int:
        await self.environment.pause()
        found = await super().old_tombstones(sequence, count_max)
        await self.environment.pause()
        return found
