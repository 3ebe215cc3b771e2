"""Applying a copy's records to its file.

Owns: when records are applied and how many at once, the checkpoints behind them, rows that go for good.
Promises: nothing is applied beyond the committed number, nor before it is durable in this copy's own log, unless the
copy is handed over. A file that takes no rows for now is waited for.
Leaves to others: the pace (`applying`), what is committed (`copy_records`), the file (`copy_engine`).

    learned ─> gather ─> committed and durable records, a piece ─> engine ─> checkpoint ─> old segments go ─> rest ─┐
                         └───────────────────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set
from functools import partial

from kvstore.environment import Environment
from kvstore.replication import chain, session
from kvstore.replication.copy_engine import CopyEngine
from kvstore.replication.copy_filling import CopyFilling
from kvstore.replication.copy_log import CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.copy_records import CopyRecords
from kvstore.replication.places import Times
from kvstore.replication.promise import Identity
from kvstore.replication.session import Session
from kvstore.said_once import SaidOnce
from kvstore.storage.engine import Digest, TryLater
from kvstore.storage.replay import replay

log = logging.getLogger(__name__)

_CLEANED_ROWS_MAX = 500  # in one step
_APPLIED_RECORDS_MAX, _HANDED_BYTES_MAX = 1000, 8 << 20
_RETRY_S = 0.5


class CopyApplier:
    """`run` must run beside all else."""

    def __init__(
        self,
        notes: CopyNotes,
        own_log: CopyLog,
        own_engine: CopyEngine,
        filling: CopyFilling,
        records: CopyRecords,
        learned: asyncio.Event,
        environment: Environment,
        times: Times,
    ) -> None:
        """`learned`: set when there may be more to apply."""
        self._notes = notes
        self._log = own_log
        self._engine = own_engine
        self._filling = filling
        self._records = records
        self._learned = learned
        self._environment = environment
        self._apply_delay_s = times.apply_delay_s
        self._said = SaidOnce()
        self._cleaned_floor = 0  # no tombstone up to that sequence is left in the file

    async def run(self) -> None:
        """Apply what is committed, for ever. Raises DataCorrupt, LogDamaged, OSError."""
        while True:
            await self._learned.wait()
            await self._log.gather(self._apply_delay_s)
            self._learned.clear()
            await self._log.keep_spare()
            try:
                while await self.apply_some() or await self._clean_some():
                    await self._log.rest()
                self._said.is_news("")
            except TryLater as error:
                await self._wait_for_the_file(error)
                self._learned.set()
                continue
            if self._notes.is_filling and self._filling.filled_to:
                await self._environment.sleep(_RETRY_S)  # the file could not be made durable, or records are to come
                self._learned.set()

    async def _wait_for_the_file(self, error: TryLater) -> None:
        """Nothing can be applied now, such as on a full disk."""
        if self._said.is_news(error.detail):
            log.warning("applying to a copy's file waits: %s", error.detail)
        await self._environment.sleep(_RETRY_S)

    async def apply_some(self) -> int:
        """Apply some records that are committed; how many. Raises DataCorrupt, LogDamaged, OSError."""
        if session.may_apply(self._notes.following) > self._engine.applied.position.number:
            await self._engine.examine()
        async with self._engine.turn:
            return await self._apply_up_to(session.may_apply(self._notes.following))

    async def _apply_up_to(self, number: int) -> int:
        applied, records = self._engine.applied.position.number, self._log.log
        if self._notes.is_filling and not self._filling.filled_to:
            return 0
        last = min(number, records.synced.number, applied + _APPLIED_RECORDS_MAX)  # more may be committed elsewhere
        if last <= applied:
            await self._filling.note_whole()
            return 0
        read = partial(chain.some_entries, records, applied, self._log.applying.piece_bytes)
        entries = [entry for entry in await self._environment.in_thread(read) if entry.number <= last]
        await replay(self._engine.engine, entries)
        self._log.applying.applied(sum(len(entry.payload) for entry in entries))
        await self._filling.note_whole()
        durable = await self._engine.engine.checkpoint(only_if_due=True)
        if durable:
            await self._environment.in_thread(lambda: records.release(durable))
        return len(entries)

    async def _clean_some(self) -> int:
        """Remove some rows that drops or the tombstones' floor cover, as the primary does in its file; how many."""
        async with self._engine.turn:
            applied = self._engine.applied
            if self._notes.is_filling or not (applied.drops or applied.clock.tombstones_floor > self._cleaned_floor):
                return 0
            removed = await self._engine.engine.clean(_CLEANED_ROWS_MAX)
            if not removed:
                self._cleaned_floor = applied.clock.tombstones_floor
            return removed

    async def digest_at(self, named: Session, number: int, partitions: Set[int]) -> Digest | None:
        """The digest of these partitions as of that record, applied up to there now; None if that cannot be.

        `number`: it is committed. Raises DataCorrupt, LogDamaged, OSError.
        """
        self._records.committed(named, number)
        await self._engine.examine()
        async with self._engine.turn:
            if self._notes.is_filling or not self._notes.is_current(named):
                return None
            while self._engine.applied.position.number < number and await self._apply_up_to(number):
                pass
            at, digest = await self._engine.engine.digest(partitions)
            return digest if at == number else None

    async def hand_over(self) -> Identity:
        """Apply all records, whether or not they are known to be committed: the term that begins has them all.

        Nothing else may use the copy from now on. Raises DataCorrupt, LogDamaged, OSError.
        """
        records = self._log.log
        while True:
            try:
                if self._engine.applied.position.number < records.last.number:
                    await self._engine.examine()
                async with self._log.turn, self._engine.turn:
                    await self._log.sync()
                    while (applied := self._engine.applied.position.number) < records.last.number:
                        read = partial(chain.some_entries, records, applied, _HANDED_BYTES_MAX)
                        await replay(self._engine.engine, await self._environment.in_thread(read))
                    return self._notes.identity
            except TryLater as error:
                await self._wait_for_the_file(error)
