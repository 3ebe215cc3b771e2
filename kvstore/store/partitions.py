"""Partitions come and go: what a store does with a new cluster map, a freeze, and rows left behind.

Owns: the cluster map and the view, as of the newest decided step; the adoption of maps; freezes; orphaned rows.
Promises: every step is one commit, decided alone between two batches, and what it asks is looked at there, so a message
that comes late finds a move that stands no more and is refused (Conflict), having changed nothing. Each step is
idempotent. Steps of one store are made one after the other.
Leaves to others: when which step is due (`shard.receiver`, the controller), rows that a move brings (`migration`),
waiters and locks (`batch`).

A partition is served here if the durable map says that it is owned and it is not frozen. When it leaves, by a freeze or
by a map, all that is in memory of it goes: locks, leases, queues; operations that wait there are bounced, unexecuted.
When it arrives, by a map, by the end of a freeze or at the opening of the store, that is rebuilt from its rows. So
there is one way out and one way in, and nothing in memory can outlive its partition.

A freeze names its move, and is durable before it is acknowledged. It survives a restart, and ends only when a map is
durable here in which that move stands no more: as long as the move might be committed, no store serves the partition.
Since the source itself freezes, and no other store can take a partition without that, a store that restarts may start
from its durable map, however old: what it does not find frozen is its own.

Rows of a partition that the store neither owns nor is to receive, by its durable map, are orphaned. They are dropped,
by a record that names the partitions, once a controller has confirmed the map since the store was opened. No message
asks for that, so none can come late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set

import msgspec

from kvstore import failpoints
from kvstore.errors import Conflict, ForeignData
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.protocol import Frozen
from kvstore.storage.engine import Digest
from kvstore.storage.rows import Row
from kvstore.store.applier import Applier
from kvstore.store.batch import Batch
from kvstore.store.pipeline import Pipeline
from kvstore.store.replicas import Replicas
from kvstore.store.tables import Tables
from kvstore.store.view import View, view_of
from kvstore.transactions.openings import Openings

log = logging.getLogger(__name__)


class Partitions:
    """`cluster_map` None: the store has none yet, and owns nothing. `is_older_copy`: an accepted one was opened.

    `missing`: partitions that were adopted though no move has brought them to these files, or not surely all of them.
    """

    def __init__(
        self,
        shard_id: str,
        tables: Tables,
        pipeline: Pipeline,
        applier: Applier,
        replicas: Replicas,
        is_older_copy: bool = False,
    ) -> None:
        self.shard_id = shard_id
        self.cluster_map: ClusterMap | None = None
        self.view = View()
        self._tables = tables
        self._pipeline = pipeline
        self._applier = applier
        self._replicas = replicas
        self._one_step = asyncio.Lock()
        self._orphaned: set[int] = set()
        self._orphans_found = asyncio.Event()
        self._is_older_copy = is_older_copy
        self.missing: frozenset[int] = frozenset()

    # --- the map ------------------------------------------------------------------------------------------------------

    async def restore(self, opens: ClusterMap | None = None) -> None:
        """At the opening: serve what the durable map says, if it names no copies.

        `opens`: a newer map, which names this copy primary in a new term. The record that carries it opens the term;
        this returns, and the store serves, once every copy in sync has it.

        Raises DataCorrupt; ForeignData for another format, or a store that has copies and no new term.
        """
        applied = self._tables.engine.applied
        cluster_map = decode_map(applied.cluster_map) if applied.cluster_map is not None else None
        if cluster_map is not None:
            self._look(cluster_map, view_of(self.shard_id, cluster_map, applied.freezes))
        if opens is not None:
            async with self._one_step:
                await self._adopt_newer(opens, opens=True)
        elif cluster_map is not None:
            shard = cluster_map.shard(self.shard_id)
            if shard is not None and shard.replicas:
                raise ForeignData(f"shard {self.shard_id} has copies: without a new term it must not be served.")
            rows = await self._tables.engine.kept_in_memory(self.view.served)
            await self._pipeline.step(lambda batch: self._serve(batch, rows), urgent=True)

    async def adopt(self, cluster_map: ClusterMap) -> bool:
        """Act by the map, once it is durable; False if it is not newer than the last.

        Raises DataCorrupt, TryLater; ValueError if it names copies and the store cannot reach any.
        """
        async with self._one_step:
            before = self.view
            if self.cluster_map is not None and cluster_map.epoch <= before.epoch:
                if cluster_map.epoch == before.epoch:
                    self._note_orphans(await self._tables.engine.occupied())
                return False
            await self._adopt_newer(cluster_map)
            return True

    async def _adopt_newer(self, cluster_map: ClusterMap, *, opens: bool = False) -> None:
        """`opens`: with that map the term of a store that serves nothing yet begins."""
        before = self.view
        view = view_of(self.shard_id, cluster_map, before.freezes)
        opened, clock = _opened(cluster_map, before, view)
        floor = _clock_floor(self.shard_id, cluster_map)
        self._is_older_copy = self._is_older_copy or (opens and self._tables.clock.version < floor)
        rows, counted = await self._prepare(before, view, opened, frozenset() if opens else before.served)

        def adopt(batch: Batch) -> None:
            batch.changes.see(max(clock, floor))
            batch.extras.dropped = sorted(opened)
            now = view_of(self.shard_id, cluster_map, self.view.freezes)  # a move may be complete since `before`
            self._adopt(batch, cluster_map, now, rows, counted)
            self._replicas.prepare(cluster_map, opens=opens)
            batch.extras.when_appended.append(lambda number: self._replicas.carried(cluster_map, number))

        await self._pipeline.step(adopt, urgent=True)
        self._note_missing(before, view.owned - opened)
        # Rows of a move that ended may have come just now, and be in the file only later.
        self._note_orphans(await self._tables.engine.occupied() | before.coming)

    def _note_missing(self, before: View, owned: Set[int]) -> None:
        """Say which partitions came without a move that these files have seen: what was in them is not here."""
        self.missing &= owned
        if not before.epoch and not self._is_older_copy:
            return  # a new store: its first partitions are empty
        came = owned - before.owned
        if missing := came if self._is_older_copy else came - before.coming:
            self.missing |= missing
            log.warning(
                "the partitions %s came after this copy of the files was made: they open empty, or with a part of "
                "their keys",
                partition_set.as_text(missing),
            )

    async def _prepare(self, before: View, view: View, opened: Set[int], served: Set[int]) -> tuple[list[Row], Digest]:
        """What the file has in memory for partitions that arrive beside those that are `served`; keys and bytes by
        which the counts change.

        Nothing of it changes before the step: what arrives is not served yet, and what leaves is frozen.
        """
        engine, left = self._tables.engine, before.owned - view.owned
        came = view.owned - before.owned - opened
        await self._applier.flush()
        rows = await engine.kept_in_memory(view.served - served - opened)
        _, more = await engine.digest(came)
        _, less = await engine.digest(left)
        return rows, Digest(keys=more.keys - less.keys, bytes=more.bytes - less.bytes)

    def _adopt(self, batch: Batch, cluster_map: ClusterMap, view: View, rows: list[Row], counted: Digest) -> None:
        batch.steps.append("adopt")
        batch.extras.cluster_map = msgspec.json.encode(cluster_map)
        if view.freezes != self.view.freezes:
            batch.extras.freezes = view.freezes
        batch.changes.count(counted.keys, counted.bytes)
        self._look(cluster_map, view)
        self._serve(batch, rows)

    def _look(self, cluster_map: ClusterMap, view: View) -> None:
        self.cluster_map, self.view = cluster_map, view
        self._tables.openings = Openings(*cluster_map.openings())
        self._applier.kept = view.going
        shard = cluster_map.shard(self.shard_id)
        self._tables.term = max(self._tables.log.last.term, shard.term if shard is not None else 0)

    def _serve(self, batch: Batch, rows: list[Row]) -> None:
        """From now on what is owned and not frozen, and nothing else; `rows` are of what arrives."""
        view = self.view
        present = {partition for partition, generation in enumerate(batch.ownership.generations) if generation}
        batch.depart(present - view.served, view.epoch, view.frozen)
        if arriving := view.served - present:
            batch.arrive(arriving, rows)

    # --- at the source of a move --------------------------------------------------------------------------------------

    async def freeze(self, move: str) -> Frozen:
        """Serve the partitions of that move no more; durable and visible when it returns.

        Returns the clock, the digest and the count of what they hold. Raises Conflict if the move does not stand,
        DataCorrupt, TryLater.
        """
        async with self._one_step:
            self._refuse_damaged(self.view.leaving.get(move, frozenset()))
            partitions, clock = await self._pipeline.step(lambda batch: self._freeze(batch, move), urgent=True)
            await self._applier.flush()
            _, digest = await self._tables.engine.digest(partitions)
        return Frozen(0, clock[0], clock[1], digest.rows, (digest.low, digest.high))

    def _refuse_damaged(self, partitions: Set[int]) -> None:
        """Raises DataCorrupt: the copy would lack what the indexes here have lost, and this store would drop it."""
        verification = self._tables.verification
        for partition in sorted(partitions & verification.damaged):
            if (damage := verification.miss_in(partition)) is not None:
                raise damage

    def _freeze(self, batch: Batch, move: str) -> tuple[frozenset[int], tuple[int, int]]:
        partitions = self.view.leaving.get(move)
        if partitions is None:
            raise Conflict(f"The move {move} from shard {self.shard_id} does not stand.", retry_after_ms=100)
        batch.steps.append("freeze")
        if move not in self.view.freezes:
            self.view = self.view._replace(freezes=self.view.freezes | {move: partitions})
            batch.extras.freezes = self.view.freezes
            self._serve(batch, [])
        return partitions, (batch.changes.clock.version, batch.changes.clock.attempts_floor)

    # --- at the destination of a move ---------------------------------------------------------------------------------

    def is_complete(self, move: str) -> bool:
        """Whether all that the standing move brings is here."""
        return move in self.view.receiving and move in self.view.freezes

    def note_complete(self, batch: Batch, move: str) -> None:
        """Write down that all has come: beside the freezes, as a move that freezes nothing here."""
        if move not in self.view.freezes and not failpoints.planted("done-not-kept"):
            self.view = self.view._replace(freezes=self.view.freezes | {move: frozenset()})
            batch.extras.freezes = self.view.freezes

    # --- orphaned rows ------------------------------------------------------------------------------------------------

    def _note_orphans(self, occupied: Set[int]) -> None:
        """A controller has confirmed the map: rows of these that belong elsewhere may go."""
        if orphaned := self.view.orphaned(occupied):
            self._orphaned |= orphaned
            self._orphans_found.set()

    async def drop_orphans(self) -> None:
        """Drop rows that belong elsewhere, when no move is under way here: those come first. For ever."""
        while True:
            await self._orphans_found.wait()
            self._orphans_found.clear()
            if self.view.takes_part:
                continue  # the map without that move is adopted, and finds them again
            partitions, self._orphaned = self._orphaned, set()
            await self._drop(partitions)

    async def _drop(self, partitions: Set[int]) -> None:
        def drop(batch: Batch) -> None:
            if orphaned := self.view.orphaned(partitions):
                batch.steps.append("trim")
                batch.extras.dropped = sorted(orphaned)

        await self._pipeline.step(drop)


def _clock_floor(shard_id: str, cluster_map: ClusterMap) -> int:
    """Above that version the shard's store goes on, if an older copy of it was made the primary."""
    shard = cluster_map.shard(shard_id)
    return shard.clock_floor if shard is not None else 0


def _opened(cluster_map: ClusterMap, before: View, view: View) -> tuple[frozenset[int], int]:
    """The partitions that this map opens again here, after their shard was lost.
    With them a version above all that it gave.

    They have no rows, whatever lies here of an earlier time. What came by a move after that came with a map that knew
    of it.
    """
    opened: set[int] = set()
    clock = 0
    for strike in cluster_map.strikes:
        if before.epoch < strike.opened and (theirs := view.owned.intersection(strike.partitions)):
            opened |= theirs
            clock = max(clock, strike.clock)
    return frozenset(opened), clock
