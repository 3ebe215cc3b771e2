"""Background verification: whether a key that the file does not find is really not there.

Owns: which partitions of the file are verified, and which are damaged; the rate of the verification.
Promises: a miss is believed in a verified partition only. A partition that is asked for is verified at once, by the
index of partitions and not by the one that missed the key; so its first miss costs one look at its rows, and all later
ones nothing. In a damaged partition a miss is DataCorrupt, never "not there". The rest is verified in the background,
by partition and then by table, after every opening and every `verify_every_s`, for at most `verify_share` of the time.
Before anything is applied to the file it is examined as a whole; if its trees are damaged nothing more is written.
Leaves to others: the look at the rows (`storage.verification`), who answers a miss (`reads`, `pipeline`, `scans`).

    miss ─> verified? ─yes─> "not there"
              ├─ no ──> verified now, ahead of the background ─> asked again
              └─ damaged ─> 500 data-corrupt

A partition without rows is verified by the look that finds none; a store that has just been made is verified. What is
written later goes through the same indexes that were proved to be whole, so a verified partition stays one until a
later round finds damage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable
from typing import Any

from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.errors import DataCorrupt
from kvstore.placement.ring import partition_of
from kvstore.storage.engine import Engine
from kvstore.storage.rows import LEASE, VALUE
from kvstore.storage.verification import Fault, HomeOf, VerifyQuery
from kvstore.store.pacing import pause_s

log = logging.getLogger(__name__)

_ROWS_MAX = 250  # a few milliseconds of a reading thread
_FAULTS_LOGGED_MAX = 20
_UNVERIFIED, _VERIFIED, _DAMAGED = range(3)


def home_in(partitions: int) -> HomeOf:
    """The partition to which a value or a lease belongs, of so many.
    What other rows belong to is not in their keys."""

    def home_of(kind: str, key: str) -> int:
        return partition_of(key.encode(), partitions) if kind in (VALUE, LEASE) else -1

    return home_of


class Verification:
    """`rounds` counts how often the whole file was looked at since the opening. `file_damage`: why nothing more is
    written into it. `damage`: the first fault that was found; empty without one."""

    def __init__(
        self, environment: Environment, limits: Limits, engine: Engine, partitions: int, is_examined: bool
    ) -> None:
        self._environment = environment
        self._limits = limits
        self._engine = engine
        self._home_of = home_in(partitions)
        is_new = engine.applied.position.number == 0 and not engine.applied.clock.sequence
        self._states = bytearray([_VERIFIED if is_new else _UNVERIFIED]) * partitions
        self._urgent: deque[int] = deque()
        self._asked = asyncio.Event()
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        self._faults_logged = 0
        self.rounds = int(is_new)
        self._is_examined = is_examined or is_new
        self._examining = asyncio.Lock()
        self.file_damage: DataCorrupt | None = None
        self.damage = ""

    @property
    def is_examined(self) -> bool:
        """Whether the file as a whole was found to be whole."""
        return self._is_examined and self.file_damage is None

    def is_verified(self, partition: int) -> bool:
        """Whether a key of this partition that the file does not find is not there."""
        return self._states[partition] == _VERIFIED

    @property
    def damaged(self) -> frozenset[int]:
        """Partitions in which a key that is not found may be a lost one."""
        return frozenset(at for at, state in enumerate(self._states) if state == _DAMAGED)

    def miss_in(self, partition: int) -> DataCorrupt | None:
        """What a miss means in a partition that was looked at: None if the key is not there."""
        if self._states[partition] != _DAMAGED:
            return None
        return DataCorrupt(
            f"Rows of partition {partition} are damaged, so a key that is not found may be a lost one.",
            next_step="Restore the shard's file from a copy; `kvstore store check FILE` names what is damaged.",
        )

    async def settle(self, partitions: Iterable[int]) -> None:
        """Return when each of them is known to be verified or damaged."""
        asked = [
            self._ask(partition) for partition in sorted(set(partitions)) if self._states[partition] == _UNVERIFIED
        ]
        if asked:
            await asyncio.gather(*asked)

    def _ask(self, partition: int) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if partition not in self._waiting:
            self._urgent.append(partition)
            self._asked.set()
        self._waiting.setdefault(partition, []).append(future)
        return future

    def close(self) -> None:
        """Nothing is verified any more: give up what waits for it."""
        for future in [future for waiting in self._waiting.values() for future in waiting]:
            future.cancel()

    async def writable(self) -> None:
        """Return once the file was examined. Raises DataCorrupt if it must not be written to any more."""
        async with self._examining:
            if not self._is_examined:
                wrong = (await self._engine.verify(None)).faults
                self._is_examined = True
                if wrong:
                    self.stop_writing(DataCorrupt(f"The shard's file is damaged ({wrong[0].detail})."))
        if self.file_damage is not None:
            raise self.file_damage

    def stop_writing(self, damage: DataCorrupt) -> None:
        """Nothing more is written: clients are told so, and what the file lacks stays in the log."""
        self.found(damage)
        if self.file_damage is None:
            log.error("nothing more is written into %s: %s", self._engine.path, damage.detail)
            next_step = "Restore file and log from a copy; `kvstore store check FILE` names what is damaged."
            self.file_damage = DataCorrupt(f"Nothing more is written. {damage.detail}", next_step=next_step)

    # --- the work -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Verify what is asked for at once and the rest in the background, round after round, for ever."""
        with contextlib.suppress(DataCorrupt):
            await self.writable()
        if not self.rounds:
            await self._round()
        while True:
            await self._rest(self._limits.verify_every_s)
            await self._round()

    async def _round(self) -> None:
        try:
            occupied = sorted(await self._engine.occupied())
        except DataCorrupt as error:
            log.error("%s", error)
            occupied = list(range(len(self._states)))
        else:
            for empty in set(range(len(self._states))).difference(occupied):
                self._settled(empty)
        for partition in occupied:
            if self.rounds or self._states[partition] == _UNVERIFIED:
                await self._look(partition, paced=True)
        await self._look(-1, paced=True)
        self.rounds += 1
        if damaged := self.damaged:
            log.error("verification: %d partitions are damaged, %s first", len(damaged), min(damaged))

    async def _look(self, partition: int, *, paced: bool) -> None:
        """Look at the rows of the partition, or of the table (-1)."""
        after, more = 0, True
        while more:
            started_s = self._environment.monotonic_s()
            page = await self._engine.verify(VerifyQuery(partition, after, _ROWS_MAX, self._home_of))
            after, more = page.after, page.more
            for fault in page.faults:
                self._note(fault)
            if paced:
                await self._rest(pause_s(self._environment.monotonic_s() - started_s, self._limits.verify_share))
        if partition >= 0:
            self._settled(partition)

    async def _rest(self, seconds: float) -> None:
        """Do nothing for that long but what is asked for."""
        until_s = self._environment.monotonic_s() + seconds
        while True:
            while self._urgent:
                partition = self._urgent.popleft()
                if self._states[partition] == _UNVERIFIED:
                    await self._look(partition, paced=False)
                self._settled(partition)
            self._asked.clear()
            left_s = until_s - self._environment.monotonic_s()
            if left_s <= 0:
                return
            await self._environment.wait_for(self._asked.wait(), left_s)

    def found(self, damage: DataCorrupt) -> None:
        """Note damage that a reader has met; the first is kept."""
        self.damage = self.damage or damage.detail

    def _note(self, fault: Fault) -> None:
        self.damage = self.damage or f"{fault.detail[:1].upper()}{fault.detail[1:]}."
        if self._faults_logged < _FAULTS_LOGGED_MAX:
            self._faults_logged += 1
            log.error("damage in %s: %s", self._engine.path, fault.detail)
        affected: Any = range(len(self._states)) if fault.partitions is None else fault.partitions
        for partition in affected:
            if 0 <= partition < len(self._states):
                self._states[partition] = _DAMAGED

    def _settled(self, partition: int) -> None:
        if self._states[partition] == _UNVERIFIED:
            self._states[partition] = _VERIFIED
        for future in self._waiting.pop(partition, ()):
            if not future.done():
                future.set_result(None)
