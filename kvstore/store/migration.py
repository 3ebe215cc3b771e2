"""The rows of a move: what the source gives, what the destination takes.

Owns: pages of the feed for another store; the copy of another store's rows.
Promises: every step at the destination is one commit, refused (Conflict) once the move stands no more. What is taken is
what the source has, row by row, with checksums; a move is complete only if rows and digest are equal at both ends.
Where a copy begins again, the source looks at its own rows, too: the first one may not have taken one that is damaged.
Leaves to others: the order of the steps (`shard.receiver`), freezes and maps (`partitions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from kvstore import failpoints
from kvstore.errors import Conflict, DataCorrupt
from kvstore.message_sizes import row_bytes
from kvstore.protocol import Frozen, MovedRow, Pull, Rows
from kvstore.storage.engine import FeedQuery
from kvstore.storage.rows import Row, checksum
from kvstore.store.applier import Applier
from kvstore.store.batch import Batch
from kvstore.store.disk_room import spare_of
from kvstore.store.partitions import Partitions
from kvstore.store.pipeline import Pipeline
from kvstore.store.tables import Tables

_RECORD_BYTES = 4096
_BUSY_SHARE = 8  # while clients are active a page is so many times smaller


class Migration:
    """The store's part in moves, as source and as destination."""

    def __init__(self, tables: Tables, pipeline: Pipeline, applier: Applier, partitions: Partitions) -> None:
        self._tables = tables
        self._pipeline = pipeline
        self._applier = applier
        self._partitions = partitions
        self._begun: Counter[int] = Counter()  # by partition, how often its copy for another store has begun

    # --- at the source ------------------------------------------------------------------------------------------------

    async def pull(self, pull: Pull) -> Rows:
        """A page for another store.

        Raises Conflict for partitions that no standing move takes away, TryLater, DataCorrupt.

        Deletions are kept for it from the map on that names the move, so a copy begins no earlier.
        """
        view = self._partitions.view
        if not view.owned.issuperset(pull.partitions) or not view.going.issuperset(pull.partitions):
            raise Conflict("This shard does not own these partitions, or no move takes them away.", retry_after_ms=100)
        is_busy = self._applier.is_busy
        bytes_max = self._tables.limits.page_bytes_max // (_BUSY_SHARE if is_busy else 1)
        await self._applier.flush()
        query = FeedQuery(pull.partitions, pull.sequence, pull.after_row, pull.rows_max, bytes_max)
        page = await self._tables.engine.feed(query)
        if not pull.sequence:
            self._begun.update(pull.partitions)
        if any(self._begun[partition] > 1 for partition in pull.partitions):
            await self._check_own(page.rows)
        return Rows(pull.id, *page[:7], is_busy)

    async def _check_own(self, rows: Sequence[MovedRow]) -> None:
        """Raises DataCorrupt, of which the verification knows then, so that a copy can take over."""
        try:
            await self._tables.environment.in_thread(partial(_check, rows))
        except DataCorrupt as damage:
            self._tables.verification.found(damage)
            raise

    # --- at the destination -------------------------------------------------------------------------------------------

    def _receiving(self, move: str) -> frozenset[int]:
        view = self._partitions.view
        partitions = view.receiving.get(move)
        if partitions is None or partitions & view.owned:
            shard_id = self._partitions.shard_id
            raise Conflict(f"The move {move} to shard {shard_id} does not stand.", retry_after_ms=100)
        return partitions

    async def clear(self, move: str) -> None:
        """Drop what lies here of the partitions that the move is to bring, and remove it.

        Raises Conflict, also once the move is complete, since it may be committed by now; TryLater.
        """

        def drop(batch: Batch) -> None:
            if self.is_complete(move):
                raise Conflict(f"The move {move} is complete here: its rows are not removed any more.")
            batch.steps.append("clear")
            batch.extras.dropped = sorted(self._receiving(move))

        await self._pipeline.step(drop)
        await self._applier.flush()
        while self._tables.engine.applied.drops:
            await self._applier.clean_some()

    def is_complete(self, move: str) -> bool:
        """Whether all has come, and was compared, durably: also in an earlier process, and a copy that took over."""
        return self._partitions.is_complete(move)

    def spare_bytes(self) -> int:
        """How many bytes the disk has room for, beside its reserve."""
        return spare_of(self._tables)

    async def take(self, move: str, rows: Sequence[MovedRow]) -> int:
        """Commit rows that the move brings; returns how many bytes they are.

        Raises Conflict if the move does not stand, DataCorrupt for a row that is not what its source has, DiskFull.
        """
        record_bytes = sum([row_bytes(row) + 8 * len(row[1]) for row in rows]) + _RECORD_BYTES
        return await self._pipeline.step(lambda batch: self._take(batch, move, rows), record_bytes=record_bytes)

    def _take(self, batch: Batch, move: str, rows: Sequence[MovedRow]) -> int:
        """The rows as they are at the source, with sequences of this store; a tombstone stays one."""
        partitions = self._receiving(move)
        batch.changes.need_room()
        taken: list[Row] = []
        size = 0
        _check(rows)
        for kind, key, partition, version, expires_at_ms, body, intent, _ in rows:
            if partition not in partitions:
                raise DataCorrupt(f"The {kind} row of key {key!r} came with a move that its partition has no part in.")
            if (body, intent) != (None, None):
                size += len(key) + len(body or b"")
            taken.append(Row(kind, key, partition, 0, version, expires_at_ms, body, intent))
        batch.steps.append("take")
        batch.changes.take(taken)
        return size

    async def add_up(self, move: str) -> None:
        """Apply what has come so far, and have its digest remembered: `complete` then has little left to do.

        Raises Conflict if the move does not stand, DataCorrupt, TryLater.
        """
        await self._applier.flush()
        await self._tables.engine.digest(self._receiving(move))

    async def complete(self, move: str, frozen: Frozen, rows: Sequence[MovedRow]) -> None:
        """With these rows all has come: compare, and bring clock and floor as high as the source's, durably.

        Raises Conflict if something is missing or the move does not stand, DataCorrupt, DiskFull, TryLater.
        """
        await self.take(move, rows)
        await self._applier.flush()
        _, here = await self._tables.engine.digest(self._receiving(move))
        is_whole = (here.rows, here.low, here.high) == (frozen.rows, *frozen.digest)
        if not is_whole and not failpoints.planted("move-without-last-pull"):
            raise Conflict(f"The copy of move {move} differs from its source: {here.rows} rows, there {frozen.rows}.")

        def see(batch: Batch) -> None:
            self._receiving(move)
            batch.steps.append("complete")
            batch.changes.see(frozen.version)
            batch.changes.raise_floor(frozen.attempts_floor)
            self._partitions.note_complete(batch, move)

        await self._pipeline.step(see, urgent=True)


def _check(rows: Sequence[MovedRow]) -> None:
    """Raises DataCorrupt for one that is not what was once written; a tombstone has no checksum."""
    for kind, key, _, version, expires_at_ms, body, intent, check in rows:
        if (body, intent) != (None, None) and checksum(kind, key, version, expires_at_ms, body, intent) != check:
            raise DataCorrupt(f"The {kind} row of key {key!r} does not match its checksum.")
