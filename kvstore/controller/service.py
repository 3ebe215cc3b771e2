"""What nodes ask of the controller: to be members, the map, to keep what they tell.

Owns: what an announcement is checked for, and in which order.
Promises: a node that is told that it is a member is one in the stored map.
Leaves to others: HTTP (`routes`), every rule (`membership`), the document's races (`document`), what people ask for
(`operator_changes`), what a launcher asks (`launches`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from kvstore.config import ClusterConfig
from kvstore.controller import changes, membership
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import Announcement, ClusterState, FirstMembers
from kvstore.controller.planning import Planner
from kvstore.controller.recovery import Recovery
from kvstore.controller.shards import ShardClients
from kvstore.controller.twins import Twins
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import ForeignData, Unavailable
from kvstore.placement.cluster_map import ClusterMap
from kvstore.said_once import SaidOnce

_log = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """The cluster is not formed: these first members have not announced themselves yet."""

    waiting_for: list[str]


class ClusterService:
    """Every method may be called by any number of tasks at the same time."""

    def __init__(
        self,
        document: ClusterDocument,
        planner: Planner,
        recovery: Recovery,
        config: ClusterConfig,
        shards: ShardClients,
        environment: Environment = SYSTEM,
    ) -> None:
        self._environment = environment
        self._document = document
        self._planner = planner
        self._recovery = recovery
        self._twins = Twins(shards)
        self._look_if_behind = asyncio.Event()
        self.on_clock: Callable[[int], None] = lambda clock: None  # a store has told its own
        self.on_told: Callable[[str], None] = lambda node: None  # a node has told which map it follows
        self.on_announced: Callable[[str], None] = lambda node: None
        shards.on_epoch = self.hear
        self._first = FirstMembers(
            weights={shard.id: shard.weight for shard in config.shards},
            partitions=config.partitions,
            replicas=config.replicas,
        )

    async def report_start(self) -> None:
        """Log what is stored and where cluster.yaml differs from it, once it is of the present format.

        Raises ForeignData if it is unreadable, Unavailable.
        """
        if (older := await self._document.convert()) is not None:
            _log.warning("the stored map was of format %d; the old document is kept beside it", older)
        state = await self._document.read()
        if state.map is None:
            missing = ", ".join(membership.waiting_for(state.announced, self._first))
            _log.info("the cluster is not formed yet, waiting for shards %s", missing)
            return
        _log.info("cluster %s, epoch %d", state.map.cluster_id, state.map.epoch)
        for difference in membership.differences(self._first, state.map):
            _log.warning("cluster.yaml differs from the stored map, which stands: %s", difference)

    async def announce(self, announcement: Announcement) -> ClusterMap | Waiting:
        """Write down that a shard is there: the map if it is a member, or who is waited for.

        Raises BadBody, ForeignData and Conflict as `membership.check`, `decide` and `Twins` do; ControllerBehind in
        place of ForeignData where this controller's record is an old copy; Unavailable if the store cannot answer or
        other writers always came first: then the shard announces itself again.
        """
        membership.check(announcement)
        state = await self._document.read()
        self._recovery.note(announcement)
        if announcement.cluster_id is not None:
            self.hear(announcement.cluster_id, announcement.epoch)
            self.on_clock(announcement.clock)
        self.on_told(announcement.id)
        if self._recovery.is_offered and (lost := self._recovery.lost(state)):
            raise lost  # also for a new file: no second cluster is formed beside the one that is there
        await self._twins.check(state, announcement)
        sizes = await self._planner.measured(state) if membership.may_join(state, announcement) else {}
        asked = self._planner.new_change("add", announcement.id, announcement.weight)

        def decide(present: ClusterState) -> ClusterState:
            change = changes.joining(present.changes, announcement.id) or asked
            plan = self._planner.plan(sizes, change.id)
            cluster_id = self._environment.random_hex(16)
            decided = membership.decide(present, announcement, self._first, cluster_id, plan)
            is_change = membership.joins(present, decided)
            return self._planner.taken(present, decided, change, sizes) if is_change else decided

        try:
            before, after = await self._document.change(decide)
        except ForeignData:
            if announcement.cluster_id is not None and (behind := self._document.behind(state)):
                raise behind from None  # the newest map may name it
            raise
        self.on_announced(announcement.id)
        _report_change(announcement, before, after)
        return after.map or Waiting(membership.waiting_for(after.announced, self._first))

    def hear(self, cluster_id: str, epoch: int) -> None:
        """A shard or router follows a map of that epoch of that cluster."""
        before = self._document.heard(cluster_id)
        self._document.hear(cluster_id, epoch)
        if epoch > before:
            self._look_if_behind.set()

    async def watch_if_behind(self) -> None:
        """Say so in the log when this controller's file turns out to be an old copy, or lost. For ever."""
        said = SaidOnce()
        while True:
            await self._look_if_behind.wait()
            self._look_if_behind.clear()
            with suppress(Unavailable):
                state = await self._document.read()
                why = self._document.behind(state) or self._recovery.lost(state)
                if why is not None and said.is_news(why.detail):
                    _log.error("%s Until that is mended nothing is changed. %s", why.detail, why.next_step)

    async def tell(self, store_id: str, told: Told, copy_id: str = "") -> Told:
        """Keep what a store tells of its log, which that copy serves; returns the highest that it has told.

        Raises Conflict if another copy is its primary, Unavailable.
        """
        return await self._document.tell(store_id, told, copy_id)

    async def map_after(self, epoch: int) -> ClusterMap:
        """The map as soon as there is one with a higher epoch; waits for ever if none comes.

        Raises Unavailable when the store is closed, ControllerBehind if it was lost.
        """
        revision = -1
        while True:
            revision, state = await self._document.after(revision)
            if lost := self._recovery.lost(state):
                raise lost
            if state.map is not None and state.map.epoch > epoch:
                return state.map


def _report_change(announcement: Announcement, before: ClusterState, after: ClusterState) -> None:
    if before == after:
        return
    if after.map is None:
        _log.debug("shard %s announced itself from %s", announcement.id, announcement.url)  # the line below names all
    elif before.map is None:
        shards = ", ".join(shard.id for shard in after.map.shards)
        _log.info("cluster %s is formed: epoch 1, shards %s", after.map.cluster_id, shards)
    elif before.map.shard(announcement.id) is None:
        _log.info("shard %s joins: epoch %d, %d moves", announcement.id, after.map.epoch, len(after.map.moves))
    elif before.map.epoch != after.map.epoch:
        _log.info("shard %s moved to %s: epoch %d", announcement.id, announcement.url, after.map.epoch)
