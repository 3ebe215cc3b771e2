"""A move of partitions as its source sees it: copied, followed, frozen, compared.
Then it is given up, and they return.

Owns: what a destination asks of a source, the copy that it makes, and what must be equal in the end.
Promises: goes on where it was when the source's process ends and comes back, and always lets the partitions return.
Leaves to others: the destination's store (simulated when there are several), the controller.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from kvstore.errors import Conflict, KvError
from kvstore.placement.cluster_map import Move
from kvstore.protocol import Frozen, Pull, Rows
from kvstore.store.store import Store
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.store_machine import SHARD, Lost, StoreMachine

T = TypeVar("T")


class Mover:
    """One move at a time."""

    def __init__(self, machine: StoreMachine, rng: random.Random) -> None:
        self._machine = machine
        self._rng = rng
        self._copy: dict[tuple[str, str], Sequence[Any]] = {}

    async def run(self, partitions: list[int]) -> None:
        """Begin a move of these partitions, and give it up. Raises Violation if the copy differs from the source."""
        machine = self._machine
        move = Move(id=f"move-{machine.epoch + 1}", source=SHARD, to="s2", partitions=partitions)
        first = machine.next_map(move)
        await self._insist(lambda store: store.partitions.adopt(first))
        try:
            await self._move(move)
        except Conflict as error:
            machine.loop.note(f"the move is given up: {error}")
        second = machine.next_map()
        await self._insist(lambda store: store.partitions.adopt(second))

    async def _move(self, move: Move) -> None:
        self._copy.clear()
        sequence = await self._copy_all(move)
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(self._rng.expovariate(3.0))
            sequence = await self._follow(move, sequence)
        frozen: Frozen = await self._insist(lambda store: store.partitions.freeze(move.id))
        await self._follow(move, sequence)
        checks = [row[7] for row in self._copy.values()]
        digest = sum(check & 0xFFFFFFFF for check in checks), sum(check >> 32 for check in checks)
        if (len(checks), digest) != (frozen.rows, tuple(frozen.digest)):
            raise Violation(f"{move.id} copied {len(checks)} rows, of which the source has {frozen.rows}, or others")
        self._machine.loop.note(f"{move.id} has copied {len(checks)} rows")
        self._machine.faults["moved, compared and back"] += 1
        await asyncio.sleep(self._rng.uniform(0, 0.5))

    async def _copy_all(self, move: Move) -> int:
        """The sequence as of which all was there."""
        left, sequence, after_row = move.partitions, 0, 0
        while True:
            page = await self._pull(Pull(0, left, sequence, after_row, self._rng.choice((3, 20, 1000))))
            self._take(page)
            sequence, after_row, left = page.sequence, page.after_row, left[page.done :]
            if not page.more:
                return sequence
            await asyncio.sleep(self._rng.expovariate(20.0))

    async def _follow(self, move: Move, sequence: int) -> int:
        while True:
            page = await self._pull(Pull(0, move.partitions, sequence, -1, self._rng.choice((3, 1000))))
            if page.floor > sequence:
                raise Conflict("deletions that the copy may have missed are forgotten")
            self._take(page)
            sequence = page.sequence
            if not page.more:
                return sequence

    def _take(self, page: Rows) -> None:
        for row in page.rows:
            if row[5] is None and row[6] is None:
                self._copy.pop((row[0], row[1]), None)
            else:
                self._copy[row[0], row[1]] = row

    async def _pull(self, pull: Pull) -> Rows:
        page: Rows = await self._insist(lambda store: store.migration.pull(pull))
        return page

    async def _insist(self, work: Callable[[Store], Awaitable[T]]) -> T:
        """Ask until there is an answer. Raises Conflict."""
        while True:
            try:
                return await self._machine.call(work)  # type: ignore[no-any-return]
            except Conflict:
                raise
            except (Lost, KvError):
                await asyncio.sleep(0.05)
