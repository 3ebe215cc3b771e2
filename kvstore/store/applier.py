"""The applier: what is visible goes into the file, in bulk, and the log behind it may go.

Owns: when an application begins, checkpoints, the release of log segments, the removal of rows that drops cover.
Promises: only what is visible is applied. A store to which little is written has applied everything within
`apply_delay_s`, so that a person with the `sqlite3` shell sees what was just written. Under load it takes a second, or
`apply_rows`: twenty times the rows are written at half the cost of each. What waits is bounded: past
`unapplied_rows_max` or `unapplied_bytes_max` the pipeline waits (`has_room`). The log goes only up to what a completed
checkpoint has made durable in the file.
Leaves to others: what is written (`storage.engine`), durability of commits (`storage.log`).

A crash here means nothing: the file stands at some application, and the log has the records behind it. A disk that is
full, or another program that holds the file, makes applications wait; an error of the disk is tried again, then ends
the process.
"""

from __future__ import annotations

import asyncio
import logging

from kvstore.errors import DataCorrupt
from kvstore.said_once import SaidOnce
from kvstore.storage.engine import Application, Freezes, NoRoom, TryLater
from kvstore.storage.record import CommitRecord
from kvstore.storage.segments import Position
from kvstore.store.pacing import LoadMeter, pause_s
from kvstore.store.tables import Tables
from kvstore.store.write_set import WriteSet

log = logging.getLogger(__name__)

_DISK_ERRORS_MAX = 5
_RETRY_S = 0.5
_NOTE_S = 1.0
_CLEANED_ROWS_MAX = 2000
_BUSY_SHARE = 8
_DELAYS_MAX = 20  # so long rows gather while many come
_MANY_ROWS = 20  # within one delay


class _Pending:
    """What the next application writes beside rows."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.cluster_map: bytes | None = None
        self.freezes: Freezes | None = None
        self.drops: dict[int, int] = {}


class Applier:
    """Applies visible changes to the file, in bulk.

    `kept` names the partitions whose deletions a move has to hear of. `turn`: held by what changes the file.
    """

    def __init__(self, tables: Tables) -> None:
        self.kept: frozenset[int] = frozenset()
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._tables = tables
        self._pending = _Pending(tables.engine.applied.position)
        self.turn = asyncio.Lock()
        self._something = asyncio.Event()
        self._hurry = asyncio.Event()
        self._may_clean = asyncio.Event()
        self._load = LoadMeter()
        self.room_wanted = 0  # the largest payload for which the log must have room, whatever it wants by itself
        self.segment_wanted = asyncio.Event()
        self.segment_made = asyncio.Event()

    def publish(self, record: CommitRecord, changes: WriteSet, position: Position) -> None:
        """The record, which carries these changes, is visible: it is to be applied."""
        pending, memtable = self._pending, self._tables.memtable
        pending.position = position
        if record.dropped:
            memtable.drop(frozenset(record.dropped), record.clock.sequence)
            pending.drops |= dict.fromkeys(record.dropped, record.clock.sequence)
        if record.cluster_map is not None:
            pending.cluster_map = record.cluster_map
        if record.freezes is not None:
            pending.freezes = record.freezes
        if changes.rows:
            memtable.publish(changes.rows, changes.bytes)
        self._something.set()
        limits = self._tables.limits
        if memtable.unapplied_count >= limits.apply_rows or memtable.bytes >= limits.wal_bytes_max // 4:
            self._hurry.set()
        if len(memtable) >= limits.unapplied_rows_max or memtable.bytes >= limits.unapplied_bytes_max:
            self.has_room.clear()

    @property
    def visible(self) -> int:
        """The number of the newest visible record."""
        return self._pending.position.number

    async def flush(self) -> None:
        """Apply all that is visible now.

        Raises TryLater while that is impossible, DataCorrupt where it is for ever, OSError.
        """
        number = self._pending.position.number
        self._hurry.set()
        self._something.set()
        while self._tables.engine.applied.position.number < number:
            async with self.turn:
                if self._tables.engine.applied.position.number < number:
                    await self._apply()

    async def run(self) -> None:
        """Apply for ever. Raises OSError when the disk goes on failing."""
        environment = self._tables.environment
        errors, said = 0, SaidOnce()
        while True:
            await self._something.wait()
            await self._gather()
            self._something.clear()
            self._hurry.clear()
            try:
                async with self.turn:
                    await self._apply()
                    await self._checkpoint_if_due()
                errors, self._tables.file_full = 0, False
                said.is_news("")
            except DataCorrupt as error:
                self._tables.verification.stop_writing(error)  # the log has what is not applied
                return
            except TryLater as error:
                if said.is_news(error.detail):
                    log.warning("applying to the file waits: %s", error.detail)
                self._tables.file_full = isinstance(error, NoRoom)
                self._something.set()
                await environment.sleep(_RETRY_S)
            except OSError:
                errors += 1
                if errors == _DISK_ERRORS_MAX:
                    raise
                log.exception("applying to the file failed; it is tried again")
                self._something.set()
                await environment.sleep(_RETRY_S)

    async def _gather(self) -> None:
        """Wait while many rows come, since a row costs less the more are applied together."""
        environment, memtable = self._tables.environment, self._tables.memtable
        for _ in range(_DELAYS_MAX):
            before = memtable.unapplied_count
            is_hurried = await environment.wait_for(self._hurry.wait(), self._tables.limits.apply_delay_s)
            if is_hurried or memtable.unapplied_count - before < _MANY_ROWS:
                return

    async def _apply(self) -> None:
        tables, pending = self._tables, self._pending
        if pending.position == tables.engine.applied.position:
            return
        await tables.verification.writable()
        self._pending = _Pending(pending.position)
        rows = tables.memtable.begin_application()
        application = Application(
            rows, pending.position, tables.visible, pending.cluster_map, pending.freezes, pending.drops, self.kept
        )
        try:
            await tables.engine.apply(application)
        except BaseException:
            self._put_back(pending)
            raise
        tables.memtable.end_application()
        if application.drops or tables.visible.tombstones_floor:
            self._may_clean.set()
        self.has_room.set()

    def _put_back(self, pending: _Pending) -> None:
        """The application failed: what it would have written joins what came since."""
        newer = self._pending
        newer.drops = {**pending.drops, **newer.drops}
        newer.cluster_map = newer.cluster_map if newer.cluster_map is not None else pending.cluster_map
        newer.freezes = newer.freezes if newer.freezes is not None else pending.freezes

    # --- the log behind -----------------------------------------------------------------------------------------------

    async def _checkpoint_if_due(self) -> None:
        await self._checkpoint(only_if_due=True)

    async def _checkpoint(self, *, only_if_due: bool = False) -> None:
        durable = await self._tables.engine.checkpoint(only_if_due=only_if_due)
        durable = min(durable, self._kept_from)
        if durable:
            await self._tables.environment.in_thread(lambda: self._tables.log.release(durable))

    @property
    def _kept_from(self) -> int:
        """Records behind that number stay for copies that join; they begin again where that has become too much."""
        tables = self._tables
        kept = tables.sender.links.keeps if tables.sender is not None else None
        return tables.log.durable if kept is None or tables.log.bytes > tables.limits.log_bytes_max else kept

    async def make_segments(self) -> None:
        """Keep one segment of the log ready beyond the open one, for ever. Raises OSError.

        And one more if a large record needs it.
        """
        environment, records = self._tables.environment, self._tables.log
        while True:
            while records.wants_segment or records.room() < self.room_wanted:
                made = await environment.in_thread(records.prepare_segment)
                self.segment_made.set()
                if not made:
                    log.warning("the disk has no room for another segment of the log")
                    await environment.sleep(_RETRY_S)
            self.segment_wanted.clear()
            await self.segment_wanted.wait()

    async def keep_log(self) -> None:
        """Once a second, note up to where the log is durable. Raises LogFailed, OSError.

        So rot of its last record is seen. On a full disk, release what the file has, since applications, which do it
        otherwise, may not come any more.
        """
        environment, records = self._tables.environment, self._tables.log
        noted = 0
        while True:
            await environment.sleep(_NOTE_S)
            if records.durable > noted:
                noted = records.durable
                await environment.in_thread(records.note_durable)
            if self._tables.stats.disk_full:
                await self._release_early()

    async def _release_early(self) -> None:
        try:
            async with self.turn:
                await self._checkpoint()
        except (TryLater, OSError) as error:
            if not self._tables.file_full:  # which was told already
                log.warning("releasing segments of the log waits: %s", error)

    # --- what drops cover ---------------------------------------------------------------------------------------------

    async def clean(self) -> None:
        """Remove rows that drops or the tombstones' floor cover, in small steps, for ever."""
        environment, said = self._tables.environment, SaidOnce()
        while True:
            await self._may_clean.wait()
            self._may_clean.clear()
            try:
                while await self.clean_some():
                    pass
                said.is_news("")
            except DataCorrupt as error:
                self._tables.verification.stop_writing(error)
                return
            except (TryLater, OSError) as error:
                if said.is_news(str(error)):
                    log.warning("removing rows waits: %s", error)
                self._may_clean.set()
                await environment.sleep(_RETRY_S)

    async def clean_some(self) -> int:
        """One step; how many rows it removed. Raises TryLater, DataCorrupt, OSError."""
        tables = self._tables
        started_s = tables.environment.monotonic_s()
        is_busy = self.is_busy
        async with self.turn:
            await tables.verification.writable()
            removed = await tables.engine.clean(_CLEANED_ROWS_MAX // (_BUSY_SHARE if is_busy else 1))
            await self._checkpoint_if_due()
        if removed and is_busy:
            worked_s = tables.environment.monotonic_s() - started_s
            await tables.environment.sleep(pause_s(worked_s, tables.limits.move_busy_share))
        return removed

    @property
    def is_busy(self) -> bool:
        """Whether clients are at work in this store."""
        return self._load.is_busy(self._tables.environment.monotonic_s(), self._tables.stats.done)

    async def close(self) -> None:
        """Apply everything, and make it durable in the file; what that fails for stays in the log."""
        try:
            await self.flush()
            async with self.turn:
                await self._checkpoint()
        except (TryLater, DataCorrupt, OSError) as error:
            log.warning("what the file lacks stays in the log: %s", error)
