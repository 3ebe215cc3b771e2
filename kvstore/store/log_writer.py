"""Writing the log: a record is appended, leaves for the copies, and is synced.

Owns: the position of the last record, the syncs, and where they run.
Promises: a record leaves for the copies before the own sync begins. Where the disk is quick the sync runs on the event
loop's thread, at once if no copy is to have the record first, else in the turn behind the one in which it has left.
Where it is not quick, it runs in a thread, and one sync covers all that was appended before it began.
Leaves to others: what is decided and answered (`pipeline`), the files (`storage.log`), shipping (`replication.sender`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.storage.record import CommitRecord
from kvstore.storage.segments import Entry
from kvstore.storage.sync_pace import SyncPace, timed_sync
from kvstore.store.applier import Applier
from kvstore.store.tables import Tables

_LOOK_S = 0.001


class LogWriter:
    """`on_synced`: called with the number of the last record that is on the own disk."""

    def __init__(self, tables: Tables, applier: Applier, on_synced: Callable[[int], None]) -> None:
        self.pace = SyncPace(tables.limits.sync_inline_ms_max)
        self.position = tables.log.last
        self._tables = tables
        self._applier = applier
        self._on_synced = on_synced
        self._is_due = asyncio.Event()
        self._is_syncing = False

    def append(self, record: CommitRecord) -> None:
        """Append the record, for which there is room, and send it to the copies. Raises LogFailed."""
        tables, records = self._tables, self._tables.log
        payload, previous = record.encode(), records.last.checksum
        records.append(payload, tables.term, frees=True)  # what is decided is not refused
        self.position = records.last
        if tables.sender is not None:
            number, checksum, term = records.last
            tables.sender.appended(Entry(number, term, payload, checksum, previous))
        if records.wants_segment:
            self._applier.segment_wanted.set()

    @property
    def is_inline(self) -> bool:
        """Whether the caller is to sync itself: never where the record has to leave for a copy before."""
        sender = self._tables.sender
        return self.pace.is_inline and not self._is_syncing and (sender is None or not sender.shipping.links)

    def sync_now(self) -> None:
        """Sync on this thread. Raises LogFailed."""
        self._note(*self._timed_sync())

    def sync_soon(self) -> None:
        """Have `run` call `on_synced`, after a sync if one is needed."""
        self._is_due.set()

    async def run(self) -> None:
        """Sync whatever the caller does not sync itself, for ever. Raises LogFailed."""
        records = self._tables.log
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            if self.pace.is_inline:
                await asyncio.sleep(0)  # the links were woken first; what they write leaves at the end of their turn
                if self.position.number > records.durable:
                    self.sync_now()
                self._on_synced(records.durable)
                continue
            self._is_syncing = True
            number = self.position.number
            if number > records.durable:
                await self._sync_in_thread()
                number = max(number, records.durable)  # also what was appended until the thread began
            self._is_syncing = False
            self._on_synced(number)
            if self.position.number > records.durable:
                self._is_due.set()

    async def _sync_in_thread(self) -> None:
        self._note(*await self._tables.environment.in_thread(self._timed_sync))

    def _timed_sync(self) -> tuple[int, float]:
        tables = self._tables
        if tables.sender is not None:
            tables.sender.stalls.sync_begins(tables.environment.boottime_s())
        return timed_sync(tables.log, tables.environment.monotonic_s)

    def _note(self, number: int, seconds: float) -> None:
        self.pace.observe(seconds)
        if self._tables.sender is not None:
            self._tables.sender.synced(number)

    async def has_stopped(self) -> None:
        """Wait for the sync that is under way; nothing is appended any more."""
        while self._is_syncing:
            await self._tables.environment.sleep(_LOOK_S)
