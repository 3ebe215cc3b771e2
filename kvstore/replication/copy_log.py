"""A copy's log: what a primary sends is appended, and synced where that is quickest.

Owns: the log's turn, which is held by whatever syncs, cuts or replaces it beside the event loop; where syncs run; the
spare segment; for how long records gather before they are applied.
Promises: as a primary's log (`kvstore.store.log_writer`): where the disk is quick the sync runs on the event loop's
thread, where it is not in a thread, one sync for all that was appended before it. Nothing is appended while the log is
cut or replaced.
Leaves to others: which records follow (`session`), what is acknowledged (`copy_records`), the files (`storage.log`),
how long the pauses are (`applying`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstore.environment import Environment, to_its_end
from kvstore.replication.applying import WAITING_BYTES_MIN, ApplyPace
from kvstore.storage.log import Log, NotNext
from kvstore.storage.segments import HEADER_BYTES, Entry
from kvstore.storage.sync_pace import SyncPace, timed_sync

ROOM_RETRY_S = 0.5  # after which a full disk is tried again
_DELAYS_MAX = 20  # so long records gather while many come
_MANY_RECORDS = 10  # within one delay
_INLINE_BYTES_MAX = 1 << 16  # synced on the loop's thread; more takes longer, and others wait for that thread


class CopyLog:
    """`sync_since`: when the sync began that is under way in a thread. `applying`: the pace of what applies."""

    def __init__(self, log: Log, environment: Environment, inline_ms_max: float, apply_share: float) -> None:
        self.log = log
        self.applying = ApplyPace(apply_share)
        self.turn = asyncio.Lock()
        self.is_changing = False
        self.sync_since: float | None = None
        self._environment = environment
        self._pace = SyncPace(inline_ms_max)
        self._unsynced_bytes = 0
        self._rested_s = 0.0  # when it last had rested, or gathered

    # --- appending

    def takes_at_once(self, entries: Sequence[Entry]) -> bool:
        """Whether these can be appended and synced on this thread: the disk is quick, and nothing is in the way."""
        if not self._pace.is_inline or self.turn.locked():
            return False
        size = sum(len(entry.payload) + HEADER_BYTES for entry in entries)
        return self._unsynced_bytes + size <= _INLINE_BYTES_MAX and self.log.room(frees=True) >= size

    async def has_room(self, entry: Entry) -> bool:
        """Make a segment for it if none has room; False: the disk is full."""
        while self.log.room(frees=True) < len(entry.payload):
            if not await self._make_segment():
                return False
        return True

    def append(self, entry: Entry) -> bool:
        """Append the record; False if it is not the next one, or the log is being changed. Raises LogFailed."""
        if self.is_changing:
            return False
        try:
            self.log.extend(entry)
        except NotNext:
            return False
        self.applying.come(len(entry.payload))
        self._unsynced_bytes += len(entry.payload)
        return True

    async def gather(self, delay_s: float) -> None:
        """Wait a while, longer while many records come: a row costs less the more are applied together."""
        for _ in range(_DELAYS_MAX):
            before = self.log.last.number
            await self._environment.sleep(delay_s)
            if self.log.last.number - before < _MANY_RECORDS or self.applying.waiting_bytes >= WAITING_BYTES_MIN:
                break
        self._rested_s = self._environment.monotonic_s()

    async def rest(self) -> None:
        """Pause behind some that were applied: the node's other stores share its disk and its processors."""
        await self._environment.sleep(self.applying.pause_s(self._environment.monotonic_s() - self._rested_s))
        self._rested_s = self._environment.monotonic_s()

    async def keep_spare(self) -> None:
        """Make the next segment ahead of need; on a full disk not before it is needed."""
        while self.log.wants_segment and not self.log.full:
            await self._make_segment()

    async def _make_segment(self) -> bool:
        return await to_its_end(self._environment, self._environment.in_thread(self.log.prepare_segment))

    # --- syncing

    @property
    def is_synced(self) -> bool:
        """Whether all that was appended is durable."""
        return self.log.synced.number >= self.log.last.number

    def sync_now(self) -> None:
        """Sync on this thread; nothing may hold the turn. Raises LogFailed."""
        if not self.is_synced:
            self._unsynced_bytes = 0
            self._pace.observe(self._timed_sync())

    async def sync(self) -> None:
        """Make durable what was appended before; only with the turn, since nothing may be cut off during it."""
        is_much = self._unsynced_bytes > _INLINE_BYTES_MAX
        if self._pace.is_inline and not is_much:
            self.sync_now()
        elif not self.is_synced:
            self._unsynced_bytes = 0
            self.sync_since = self._environment.boottime_s()
            try:
                seconds = await to_its_end(self._environment, self._environment.in_thread(self._timed_sync))
            finally:
                self.sync_since = None
            if not is_much:  # else it says little about the disk
                self._pace.observe(seconds)

    def _timed_sync(self) -> float:
        return timed_sync(self.log, self._environment.monotonic_s)[1]

    # --- cutting

    async def change(self, change: Callable[[], None]) -> None:
        """Cut or replace the log, in a thread; nothing is appended during it. Only with the turn."""
        self.is_changing = True
        try:
            await to_its_end(self._environment, self._environment.in_thread(change))
        finally:
            self.is_changing = False
            self.applying.forget()
