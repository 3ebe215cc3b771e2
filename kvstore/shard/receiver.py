"""The destination's part in a move: copy, tail, freeze, last pull, compare.

Owns: one task for each move to this shard that the controller has asked for; its pace.
Promises: nothing of a move is answered for here before it is committed; a move that stands no more ends at once. Each
step may be broken off at any point: a move that was begun and not finished is begun again, under another id.
Leaves to others: what each step does to the file (`store.migration`), when a move is begun, given up or committed (the
controller).

    source                                     destination: waits until its disk has room for it
      │ <─ pull: rows, page by page ─────────── copy: first it removes what lies here, then takes what comes
      │ <─ pull: what has changed since ─────── tail: until little does
      │ <─ freeze ───────────────────────────── from now on no shard answers for the partitions
      │ ── clock, floor, rows, digest ────────> and no row of theirs changes:
      │ <─ pull: what has changed since ─────── the last of it; then the digests are compared, and clock and
      │                                         floor are as high as the source's, durably
      │                                         done: the controller commits the move, this shard answers
      └─ trims, when it has the map

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
from typing import TypeVar

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.errors import Conflict, DiskFull, KvError, OutcomeUnknown, TooManyRequests, Unavailable, from_problem
from kvstore.message_sizes import row_bytes
from kvstore.placement.cluster_map import Move
from kvstore.protocol import Answer, Freeze, Frozen, Info, MovedRow, Progress, Pull, Receive, Rows, Stats
from kvstore.shard.peers import Peers
from kvstore.store.pacing import pause_s
from kvstore.store.store import Store

log = logging.getLogger(__name__)

_PROGRESS_S = 0.5
_LAG_ROWS = 50  # so few that they are taken while no shard answers
_TAIL_ROUNDS_MAX = 20
_BUSY_PAGE_SHARE = 8
_RETRY_S = 0.02
_PAUSE_S_MAX = 1.0
_FREEZE_TRIES_MAX = 50  # of a source whose map is behind

_COPIES = 2  # of a row: one in the log, one in the file
_ROW_BYTES = 128  # what a row takes beside its key and value, about

T = TypeVar("T", Rows, Frozen, Info)


class _State:
    """How far a move is. `changed` is set, and replaced, with each step."""

    def __init__(self) -> None:
        self.step = "copy"
        self.detail = ""
        self.source_is_busy = True  # until it says otherwise
        self.rows_done = self.rows_total = self.bytes_done = 0
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def go_on(self, step: str, detail: str = "") -> None:
        self.step, self.detail = step, detail
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.step in ("done", "failed")


class Receiver:
    def __init__(self, shard_id: str, store: Store, peers: Peers, limits: Limits) -> None:
        self._shard_id = shard_id
        self._store = store
        self._peers = peers
        self._limits = limits
        self._environment = store.tables.environment
        self._moves: dict[str, _State] = {}

    async def receive(self, request: Receive) -> Progress:
        """Begin the move, if it is not begun; how far it is. Raises Conflict if it does not stand, Unavailable."""
        self.drop_what_is_over()
        move = next((move for move in self._peers.cluster_map.moves if move.id == request.move), None)
        if move is None or move.to != self._shard_id:
            raise Conflict(f"the move {request.move} to shard {self._shard_id} does not stand", retry_after_ms=50)
        state = self._moves.get(move.id)
        if state is None:
            state = self._moves[move.id] = _State()
            state.task = asyncio.create_task(self._carry_out(move, state))
        if state.step == request.seen and not state.is_over:
            await self._environment.wait_for(state.changed.wait(), _PROGRESS_S)
        return Progress(request.id, state.step, state.rows_done, state.rows_total, state.bytes_done, state.detail)

    def drop_what_is_over(self) -> None:
        """Called when there is a new map: moves that do not stand end."""
        standing = {move.id for move in self._peers.cluster_map.moves}
        for move_id in [move_id for move_id in self._moves if move_id not in standing]:
            state = self._moves.pop(move_id)
            if state.task is not None:
                state.task.cancel()

    async def close(self) -> None:
        tasks = [state.task for state in self._moves.values() if state.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the steps ----------------------------------------------------------------------------------------------------

    async def _carry_out(self, move: Move, state: _State) -> None:
        if self._store.migration.is_complete(move.id):
            state.go_on("done")  # the order comes once more: the commit may be under way, and nothing is to be removed
            return
        try:
            failpoints.hit("move-before-copy")
            await self._store.migration.clear(move.id)
            await self._until_there_is_room(move, state)
            sequence = await self._copy(move, state)
            failpoints.hit("move-after-copy")
            state.go_on("tail")
            for _ in range(_TAIL_ROUNDS_MAX):
                count, sequence = await self._take_changes(move, state, sequence)
                if count <= _LAG_ROWS:
                    break
            state.go_on("freeze")
            failpoints.hit("move-before-freeze")
            frozen = await self._freeze(move, state)
            failpoints.hit("move-after-freeze")
            last = await self._last_pull(move, state, sequence)
            failpoints.hit("move-after-last-pull")
            await self._store.migration.complete(move.id, frozen, last)
            failpoints.hit("move-after-complete")
            state.go_on("done")
        except KvError as error:
            log.warning("the move of %d partitions from shard %s: %s", len(move.partitions), move.source, error.detail)
            state.go_on("failed", error.detail)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("the move of %d partitions from shard %s failed", len(move.partitions), move.source)
            state.go_on("failed", f"shard {self._shard_id} failed; its log says why")

    async def _last_pull(self, move: Move, state: _State, sequence: int) -> list[MovedRow]:
        """Take what changed up to the freeze; returns the last page, which goes with the completion."""
        if failpoints.planted("move-without-last-pull"):
            return []
        page = await self._changes(move, state, sequence)
        while page.more:
            await self._take(move, state, page.rows)
            page = await self._changes(move, state, page.sequence)
        return page.rows

    async def _until_there_is_room(self, move: Move, state: _State) -> None:
        """Nothing is copied to a disk that has no room for it beside its reserve.
        The move waits, and says so."""
        while (spare_bytes := self._store.migration.spare_bytes()) < (needed_bytes := await self._needed(move, state)):
            state.detail = self._room_wanted(needed_bytes, spare_bytes)
            await asyncio.sleep(_PAUSE_S_MAX)
        state.detail = ""

    async def _needed(self, move: Move, state: _State) -> int:
        """About how many bytes the move takes here, in log and file: its share of what the source holds."""
        facts = (await self._ask(move, state, Stats(0), Info)).facts
        share = len(move.partitions) / max(1, len(self._peers.cluster_map.owned_by(move.source)))
        source_bytes: int = facts["bytes"] + facts["keys"] * _ROW_BYTES
        return round(_COPIES * source_bytes * share)

    def _room_wanted(self, needed_bytes: int, spare_bytes: int) -> str:
        needed, spare, reserve = (n / 1e6 for n in (needed_bytes, spare_bytes, self._limits.disk_reserve_bytes))
        return (
            f"waits for room on {self._shard_id}: {needed:,.1f} MB needed, {spare:,.1f} MB free beside the reserve of "
            f"{reserve:,.1f} MB; delete keys, or cancel the moves"
        )

    async def _copy(self, move: Move, state: _State) -> int:
        """All rows as they are now, or later; the sequence as of which all was there.

        They come partition by partition, and are written in the order of their keys, a group's worth at a time:
        neighbours share a page of the index, which strangers would change for each alone.
        """
        rows: list[MovedRow] = []
        size, left = 0, move.partitions
        page = await self._first_page(move, state)
        sequence, state.rows_total = page.sequence, page.total
        while True:
            rows += page.rows
            size += sum(map(row_bytes, page.rows))
            if not page.more or size >= self._limits.move_group_bytes_max:
                await self._take(move, state, sorted(rows, key=itemgetter(0, 1)))
                rows, size = [], 0
            if not page.more:
                return sequence
            left = left[page.done :]
            page = await self._pull(move, state, Pull(0, left, sequence, page.after_row, self._page_rows(state)))

    async def _first_page(self, move: Move, state: _State) -> Rows:
        """The source may not have the map yet that this shard has. Raises what it refuses with."""
        for _ in range(_FREEZE_TRIES_MAX):
            try:
                return await self._pull(move, state, Pull(0, move.partitions, 0, 0, self._page_rows(state)))
            except Conflict as error:
                last = error
                await asyncio.sleep(_RETRY_S)
        raise last

    async def _pull(self, move: Move, state: _State, pull: Pull) -> Rows:
        started_s = self._environment.monotonic_s()
        page = await self._ask(move, state, pull, Rows)
        if page.busy:
            await self._pause(started_s)
        return page

    async def _take_changes(self, move: Move, state: _State, sequence: int) -> tuple[int, int]:
        """Take what has changed since that sequence: how many rows, and as of which sequence. Raises Conflict."""
        count, more = 0, True
        while more:
            page = await self._changes(move, state, sequence)
            await self._take(move, state, page.rows)
            count, more, sequence = count + len(page.rows), page.more, page.sequence
        return count, sequence

    async def _changes(self, move: Move, state: _State, sequence: int) -> Rows:
        """A page of what has changed since that sequence. Raises Conflict if a deletion may be missing."""
        pull = Pull(0, move.partitions, sequence, -1, self._limits.move_page_rows_max)
        page = await self._ask(move, state, pull, Rows)
        if page.floor > sequence:
            raise Conflict("deletions that the copy may have missed are forgotten: it begins again")
        return page

    async def _take(self, move: Move, state: _State, rows: list[MovedRow]) -> None:
        done = 0
        while done < len(rows):
            started_s = self._environment.monotonic_s()
            some = self._page(rows[done : done + self._page_rows(state)])
            state.bytes_done += await self._take_when_there_is_room(move, state, some)
            done += len(some)
            if state.step == "copy":
                state.rows_done += len(some)
            if state.step != "freeze" and self._is_busy(state):
                await self._pause(started_s)

    async def _take_when_there_is_room(self, move: Move, state: _State, rows: list[MovedRow]) -> int:
        """A disk without room makes the move wait, and say so. Raises Conflict, DataCorrupt."""
        while True:
            try:
                return await self._store.migration.take(move.id, rows)
            except DiskFull:
                spare_bytes = self._store.migration.spare_bytes()
                state.detail = self._room_wanted(_COPIES * sum(map(row_bytes, rows)), spare_bytes)
                await asyncio.sleep(_PAUSE_S_MAX)

    def _page(self, rows: list[MovedRow]) -> list[MovedRow]:
        """Those at the beginning that make no more than a page of bytes, but one at least."""
        size = 0
        for count, row in enumerate(rows):
            size += row_bytes(row)
            if size > self._limits.page_bytes_max:
                return rows[: max(count, 1)]
        return rows

    async def _pause(self, started_s: float) -> None:
        """Pause so that the work since `started_s` takes no more than its share of the time."""
        spent_s = self._environment.monotonic_s() - started_s
        await asyncio.sleep(min(pause_s(spent_s, self._limits.move_busy_share), _PAUSE_S_MAX))

    def _is_busy(self, state: _State) -> bool:
        """Others are at work in either store."""
        return state.source_is_busy or self._store.applier.is_busy

    def _page_rows(self, state: _State) -> int:
        rows = self._limits.move_page_rows_max
        return max(1, rows // _BUSY_PAGE_SHARE) if self._is_busy(state) else rows

    async def _freeze(self, move: Move, state: _State) -> Frozen:
        for _ in range(_FREEZE_TRIES_MAX):
            try:
                return await self._ask(move, state, Freeze(0, move.id), Frozen)
            except Conflict as error:  # the source may not have the map yet that this shard has
                last = error
                await asyncio.sleep(_RETRY_S)
        raise last

    async def _ask(self, move: Move, state: _State, request: Pull | Freeze | Stats, wanted: type[T]) -> T:
        """The source's reply; while it is away, or busy, ask again. Raises what it refuses with."""
        while True:
            try:
                reply = await self._peers.channel(move.source).request(request)
            except (Unavailable, OutcomeUnknown, TooManyRequests) as error:
                state.detail = f"waiting for shard {move.source}: {error.detail}"
                await asyncio.sleep(_RETRY_S)
                continue
            if isinstance(reply, wanted):
                state.detail = ""
                if isinstance(reply, Rows):
                    state.source_is_busy = reply.busy
                return reply
            refusal = from_problem(reply.problem or {}) if isinstance(reply, Answer) else Conflict("an odd reply")
            if not isinstance(refusal, TooManyRequests | Unavailable):
                raise refusal
            await asyncio.sleep(_RETRY_S)
