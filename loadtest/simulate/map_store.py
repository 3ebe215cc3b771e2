"""The controller's store in a simulation: a durable register, whose answers are sometimes lost.

Owns: `SimulatedMapStore`.
Promises: what `kvstore.controller.map_store.interface.MapStore` asks for. What was acknowledged is there after every
restart. While it is `away`, a call ends in `Unavailable` after a while, and a swap among them was done or was not.
Leaves to others: when it is away (`cluster_faults`).
"""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

from kvstore.controller.map_store.interface import Stored, Told
from kvstore.errors import Unavailable

_LATENCY_S = (0.0002, 0.003)
_TIMEOUT_S = (0.05, 1.0)


class Record(NamedTuple):
    """All that was kept at one moment."""

    stored: Stored
    told: dict[str, Told]
    clock_floors: dict[str, int]
    kept: dict[str, bytes]


class Register:
    """What survives the controller's process."""

    def __init__(self) -> None:
        self.away = False
        self.has_backup = False  # which is to be put back
        self.lose()

    def lose(self) -> None:
        """Begin with nothing, as in an empty file."""
        self.stored = Stored(0, None)
        self.told: dict[str, Told] = {}
        self.clock_floors: dict[str, int] = {}
        self.kept: dict[str, bytes] = {}

    def back_up(self) -> Record:
        """A copy of it."""
        return Record(self.stored, dict(self.told), dict(self.clock_floors), dict(self.kept))

    def put_back(self, record: Record) -> None:
        """In place of what was kept since; no process may run."""
        self.stored, self.told, self.clock_floors, self.kept = record


class SimulatedMapStore:
    """The register as one process of a controller has it open."""

    def __init__(self, register: Register, rng: random.Random) -> None:
        self._register = register
        self._rng = rng
        self._changed = asyncio.Event()

    async def read(self) -> Stored:
        await self._travel()
        stored = self._register.stored
        await self._travel()
        return stored

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        await self._travel(may_arrive=True)
        if self._register.stored.revision != revision:
            await self._travel()
            return None
        self._register.stored = Stored(revision + 1, document)
        self._changed.set()
        self._changed = asyncio.Event()
        await self._travel()
        return revision + 1

    async def watch(self, revision: int) -> Stored:
        while True:
            changed = self._changed
            stored = await self.read()
            if stored.revision > revision:
                return stored
            await changed.wait()

    async def tell(self, store_id: str, told: Told) -> Told:
        await self._travel()
        before = self._register.told.get(store_id, Told())
        kept = Told(max(before.number, told.number), max(before.version, told.version), self._floor(store_id))
        self._register.told[store_id] = kept
        await self._travel()
        return kept

    async def forget(self, store_id: str, clock_floor: int = 0) -> Told:
        await self._travel()
        self._register.clock_floors[store_id] = max(self._floor(store_id), clock_floor)
        return self._register.told.pop(store_id, Told())

    async def keep(self, name: str, document: bytes) -> None:
        await self._travel()
        self._register.kept[name] = document
        await self._travel()

    async def close(self) -> None:
        return None

    def _floor(self, store_id: str) -> int:
        return self._register.clock_floors.get(store_id, 0)

    async def _travel(self, *, may_arrive: bool = False) -> None:
        """Raises Unavailable, when the store is away; a swap may arrive all the same."""
        await asyncio.sleep(self._rng.uniform(*_LATENCY_S))
        if self._register.away and not (may_arrive and self._rng.random() < 0.5):
            await asyncio.sleep(self._rng.uniform(*_TIMEOUT_S))
            raise Unavailable("the controller's store did not answer in time", retry_after_ms=1000)
