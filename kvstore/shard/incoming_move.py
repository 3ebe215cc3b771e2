"""One move to this shard: copy, tail, freeze, last pull, compare.

Owns: the order of the steps, their pace, how far they are.
Promises: nothing of a move is answered for here before it is committed. Each step may be broken off at any point: a
move that was begun and not finished is begun again, under another id.
Leaves to others: what each step does to the file (`store.migration`), asking the source (`move_source`), which moves
there are (`receiver`).

    source                                     destination: waits until its disk has room for it
      │ <─ pull: rows, page by page ─────────── copy: first it removes what lies here, then takes what comes
      │ <─ pull: what has changed since ─────── tail: until little does
      │ <─ freeze ───────────────────────────── from now on no shard answers for the partitions
      │ ── clock, floor, rows, digest ────────> and no row of theirs changes:
      │ <─ pull: what has changed since ─────── the last of it; then the digests are compared, and clock and
      │                                         floor are as high as the source's, durably
      │                                         done: the controller commits the move, this shard answers
      └─ trims, when it has the map

What has come is applied and added up with each round of the tail, at both ends: what is left to do while no shard
answers is the rows that changed last, and the partitions that these are in.

The tail is right because both ends see the source's order of changes: a page says as of which sequence it was read, and
the next one asks for what came after. A deletion is a row, a tombstone; should tombstones have been trimmed beyond the
sequence that is asked for, one may be missing: the move fails, and is begun again.

While others are at work in either store, a move takes no more than `limits.move_busy_share` of the time, in small
pages; else as much as it can.
"""

from __future__ import annotations

import asyncio
import logging
from operator import itemgetter

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.errors import Conflict, DiskFull, KvError
from kvstore.message_sizes import row_bytes
from kvstore.placement.cluster_map import Move
from kvstore.protocol import Freeze, Frozen, Info, MovedRow, Pull, Rows, Stats
from kvstore.shard.move_source import MoveSource
from kvstore.shard.peers import Peers
from kvstore.store.pacing import pause_s
from kvstore.store.store import Store

log = logging.getLogger(__name__)

_LAG_ROWS = 50  # so few that they are taken while no shard answers
_TAIL_ROUNDS_MAX = 20
_BUSY_PAGE_SHARE = 8
_PAUSE_S_MAX = 1.0

_COPIES = 2  # of a row: one in the log, one in the file
_ROW_BYTES = 128  # what a row takes beside its key and value, about


class IncomingMove:
    """`changed` is set, and replaced, with each step; `detail`: what this end waits for, or why it failed."""

    def __init__(self, move: Move, store: Store, peers: Peers, limits: Limits) -> None:
        self.move = move
        self.step = "copy"
        self.detail = ""
        self.rows_done = self.rows_total = self.bytes_done = 0
        self.changed = asyncio.Event()
        self._source = MoveSource(peers, move.source, store.tables.environment)
        self._store = store
        self._peers = peers
        self._limits = limits
        self._environment = store.tables.environment

    @property
    def waits_for(self) -> str:
        """What it waits for, or why it failed; empty if neither."""
        return self.detail or self._source.waits_for

    @property
    def is_over(self) -> bool:
        """Whether it is done, or has failed."""
        return self.step in ("done", "failed")

    def _go_on(self, step: str, detail: str = "") -> None:
        self.step, self.detail = step, detail
        self.changed.set()
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Carry it out; what goes wrong is told by `step` and `detail`."""
        if self._store.migration.is_complete(self.move.id):
            self._go_on("done")  # the order comes once more: the commit may be under way, and nothing is to be removed
            return
        try:
            failpoints.hit("move-before-copy")
            await self._store.migration.clear(self.move.id)
            await self._until_there_is_room()
            sequence = await self._copy()
            failpoints.hit("move-after-copy")
            self._go_on("tail")
            for _ in range(_TAIL_ROUNDS_MAX):
                count, sequence = await self._take_changes(sequence)
                await self._store.migration.add_up(self.move.id)
                if count <= _LAG_ROWS:
                    break
            self._go_on("freeze")
            failpoints.hit("move-before-freeze")
            frozen = await self._source.ask_with_map(Freeze(0, self.move.id), Frozen)
            failpoints.hit("move-after-freeze")
            last = await self._last_pull(sequence)
            failpoints.hit("move-after-last-pull")
            await self._store.migration.complete(self.move.id, frozen, last)
            failpoints.hit("move-after-complete")
            self._go_on("done")
        except KvError as error:
            log.warning(
                "the move of %d partitions from shard %s: %s", len(self.move.partitions), self.move.source, error.detail
            )
            self._go_on("failed", error.detail)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("the move of %d partitions from shard %s failed", len(self.move.partitions), self.move.source)
            self._go_on("failed", f"shard {self.move.to} failed; its log says why")

    async def _last_pull(self, sequence: int) -> list[MovedRow]:
        """Take what changed up to the freeze; returns the last page, which goes with the completion."""
        if failpoints.planted("move-without-last-pull"):
            return []
        page = await self._changes(sequence)
        while page.more:
            await self._take(page.rows)
            page = await self._changes(page.sequence)
        return page.rows

    async def _until_there_is_room(self) -> None:
        """Nothing is copied to a disk that has no room for it beside its reserve.
        The move waits, and says so."""
        while (spare_bytes := self._store.migration.spare_bytes()) < (needed_bytes := await self._needed()):
            self.detail = self._room_wanted(needed_bytes, spare_bytes)
            await asyncio.sleep(_PAUSE_S_MAX)
        self.detail = ""

    async def _needed(self) -> int:
        """About how many bytes the move takes here, in log and file: its share of what the source holds."""
        facts = (await self._source.ask(Stats(0), Info)).facts
        share = len(self.move.partitions) / max(1, len(self._peers.cluster_map.owned_by(self.move.source)))
        source_bytes: int = facts["bytes"] + facts["keys"] * _ROW_BYTES
        return round(_COPIES * source_bytes * share)

    def _room_wanted(self, needed_bytes: int, spare_bytes: int) -> str:
        needed, spare, reserve = (n / 1e6 for n in (needed_bytes, spare_bytes, self._limits.disk_reserve_bytes))
        return (
            f"waits for room on {self.move.to}: {needed:,.1f} MB needed, {spare:,.1f} MB free beside the reserve of "
            f"{reserve:,.1f} MB; delete keys, or cancel the moves"
        )

    async def _copy(self) -> int:
        """All rows as they are now, or later; the sequence as of which all was there.

        They come partition by partition, and are written in the order of their keys, a group's worth at a time:
        neighbours share a page of the index, which strangers would change for each alone.
        """
        rows: list[MovedRow] = []
        size, left = 0, self.move.partitions
        page = await self._source.ask_with_map(Pull(0, left, 0, 0, self._page_rows), Rows)
        sequence, self.rows_total = page.sequence, page.total
        while True:
            if page.busy:
                await self._pause(self._source.took_s)
            rows += page.rows
            size += sum(map(row_bytes, page.rows))
            if not page.more or size >= self._limits.move_group_bytes_max:
                await self._take(sorted(rows, key=itemgetter(0, 1)))
                rows, size = [], 0
            if not page.more:
                return sequence
            left = left[page.done :]
            page = await self._source.ask(Pull(0, left, sequence, page.after_row, self._page_rows), Rows)

    async def _take_changes(self, sequence: int) -> tuple[int, int]:
        """Take what has changed since that sequence: how many rows, and as of which sequence. Raises Conflict."""
        count, more = 0, True
        while more:
            page = await self._changes(sequence)
            await self._take(page.rows)
            count, more, sequence = count + len(page.rows), page.more, page.sequence
        return count, sequence

    async def _changes(self, sequence: int) -> Rows:
        """A page of what has changed since that sequence. Raises Conflict if a deletion may be missing."""
        pull = Pull(0, self.move.partitions, sequence, -1, self._limits.move_page_rows_max)
        page = await self._source.ask(pull, Rows)
        if page.floor > sequence:
            raise Conflict("deletions that the copy may have missed are forgotten: it begins again.")
        return page

    async def _take(self, rows: list[MovedRow]) -> None:
        done = 0
        while done < len(rows):
            started_s = self._environment.monotonic_s()
            some = _first_page(rows[done : done + self._page_rows], self._limits.page_bytes_max)
            self.bytes_done += await self._take_when_there_is_room(some)
            done += len(some)
            if self.step == "copy":
                self.rows_done += len(some)
            if self.step != "freeze" and self._is_busy:
                await self._pause(self._environment.monotonic_s() - started_s)

    async def _take_when_there_is_room(self, rows: list[MovedRow]) -> int:
        """A disk without room makes the move wait, and say so. Raises Conflict, DataCorrupt."""
        while True:
            try:
                taken = await self._store.migration.take(self.move.id, rows)
                self.detail = ""
                return taken
            except DiskFull:
                spare_bytes = self._store.migration.spare_bytes()
                self.detail = self._room_wanted(_COPIES * sum(map(row_bytes, rows)), spare_bytes)
                await asyncio.sleep(_PAUSE_S_MAX)

    async def _pause(self, spent_s: float) -> None:
        """Pause so that work which took so long takes no more than its share of the time."""
        await asyncio.sleep(min(pause_s(spent_s, self._limits.move_busy_share), _PAUSE_S_MAX))

    @property
    def _is_busy(self) -> bool:
        """Others are at work in either store."""
        return self._source.is_busy or self._store.applier.is_busy

    @property
    def _page_rows(self) -> int:
        rows = self._limits.move_page_rows_max
        return max(1, rows // _BUSY_PAGE_SHARE) if self._is_busy else rows


def _first_page(rows: list[MovedRow], bytes_max: int) -> list[MovedRow]:
    """Those at the beginning that make no more than that many bytes, but one at least."""
    size = 0
    for count, row in enumerate(rows):
        size += row_bytes(row)
        if size > bytes_max:
            return rows[: max(count, 1)]
    return rows
