"""All stores that lie on a node: its own shard's, and those of which it has copies.

Owns: which of them are there; making and setting aside copies as the controller orders.
Promises: the node's own store comes first, and is always there. What one of them cannot survive ends the process.
Leaves to others: each of them (`resident`), what is asked of all of them (`residents`), HTTP (`app`), telling the
controller (`beats`).
"""

from __future__ import annotations

import asyncio
import logging

from kvstore.errors import ForeignData, KvError
from kvstore.placement.cluster_map import ClusterMap, newest_of
from kvstore.replication.beats import Drop, GiveBack, Make
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost
from kvstore.shard.hosted import Surroundings
from kvstore.shard.resident import Resident
from kvstore.shard.residents import Residents
from kvstore.storage.engine import Identity
from kvstore.transport.channel import Handle

log = logging.getLogger(__name__)

_SETTLE_LOOK_S = 0.002


class NodeStores:
    """`around`: what they share, but for connections to copies, which go where the newest map says that nodes are."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around = around._replace(
            connect=self._connect, is_busy=lambda: self.by_shard.is_busy, syncs=lambda: self.by_shard.syncs_under_way
        )
        self.home = Resident(around.node_id, self._around)
        self._identity: Identity | None = None
        self.by_shard = Residents({around.node_id: self.home})
        self.cluster_map: ClusterMap | None = None
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ordered: set[str] = set()
        self._stops = False  # the process is about to end
        self._refused: dict[str, str] = {}  # why a copy could not be made, as it was said last

    async def begin(self, partitions: int) -> None:
        """Open all that lies here. Raises what `Resident.begin` raises, of the node's own store.

        A copy whose files cannot be opened, and are not damaged, is left alone: another one is made when its files are
        out of the way.
        """
        await self.home.begin(partitions)
        identity = self.identity
        for shard_id in self._around.folder.copies():
            resident = Resident(shard_id, self._around)
            try:
                await resident.begin(identity.partitions, self.newest_map)
                _check_cluster(resident, identity)
            except KvError as error:
                await resident.close()
                log.error(
                    "the copy of shard %s here is not used: %s Another one is made once its files are out of the way.",
                    shard_id, error.sentences,
                )  # fmt: skip
            else:
                self.by_shard[shard_id] = resident

    async def run(self) -> None:
        """Until one of them cannot go on; raises what it raised."""
        for resident in list(self.by_shard.values()):
            self._spawn(resident)
        await self._failed

    async def close(self) -> None:
        """End all work, and close all files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for resident in reversed(list(self.by_shard.values())):
            await resident.close()

    def note_stop(self) -> None:
        """The process is about to end, once others have taken over."""
        self._stops = True
        for resident in self.by_shard.values():
            resident.stops = True

    async def end(self) -> None:
        """What served stores do before the process ends."""
        await asyncio.gather(*(hosted.end() for hosted in self.by_shard.served if hosted.is_open))

    async def settle(self, timeout_s: float) -> bool:
        """Take no more writes, and wait until those that came are answered or will never be executed.

        Returns whether they are; if they are not in that time, False.
        """
        environment = self._around.environment
        ends_s = environment.monotonic_s() + timeout_s
        while True:
            for hosted in self.by_shard.served:
                hosted.seal()  # each time: another may be served by now
            if all(resident.local.is_settled for resident in self.by_shard.values()):
                return True
            if environment.monotonic_s() >= ends_s:
                return False
            await environment.sleep(_SETTLE_LOOK_S)

    def _spawn(self, resident: Resident) -> None:
        task = asyncio.create_task(resident.run())
        self._tasks[task] = resident.shard_id
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        shard_id = self._tasks.pop(task)
        if task.cancelled() or self._failed.done():
            return
        if (error := task.exception()) is not None:
            self._failed.set_exception(error)
        else:
            self.by_shard.pop(shard_id, None)  # it was dropped

    # --- what it is

    @property
    def identity(self) -> Identity:
        """Of the node's own store.
        That which it had last, while its files change hands or once it was set aside."""
        self._identity = self.home.local.identity or self._identity
        if self._identity is None:
            raise RuntimeError("the node's own store was not opened")
        return self._identity

    @property
    def newest_map(self) -> ClusterMap | None:
        """That is followed, or lies here, of the node's own cluster; None without any."""
        home = self.home.local.identity or self._identity
        known = [each.cluster_id for each in (home, self.cluster_map) if each is not None and each.cluster_id]
        own = next(iter(known), None)
        maps = [self.cluster_map, *(each.local.logged_map for each in self.by_shard.values())]
        return newest_of(each for each in maps if each is not None and own in (None, each.cluster_id))

    def handle_of(self, store_id: str) -> Handle | None:
        """What begins a request for that store; None if it does not lie here."""
        resident = self.by_shard.of_store(store_id)
        return resident.handle if resident is not None else None

    async def serve_session(self, store_id: str, wire: Wire) -> None:
        """Serve a primary's session with the copy of that store that lies here, if one does."""
        resident = self.by_shard.of_store(store_id)
        if resident is None:
            await wire.close()
        else:
            await resident.sessions.serve(wire)

    # --- maps and orders

    def hear(self, cluster_map: ClusterMap) -> None:
        """A newer map is followed."""
        self.cluster_map = cluster_map
        for resident in list(self.by_shard.values()):
            resident.hear(cluster_map)

    async def make(self, order: Make) -> None:
        """Make an empty copy of that shard's store, unless one is there. Nothing is raised: the order comes again."""
        if order.shard in self.by_shard or order.shard in self._ordered:
            return
        self._ordered.add(order.shard)
        resident = Resident(order.shard, self._around)
        try:
            await resident.make(order)
        except (KvError, OSError) as error:
            why = error.sentences if isinstance(error, KvError) else str(error)
            if self._refused.get(order.shard) != why:  # the order comes again and again
                log.warning("a copy of shard %s cannot be made: %s", order.shard, why)
            self._refused[order.shard] = why
        else:
            self._refused.pop(order.shard, None)
            self.by_shard[order.shard] = resident
            resident.stops = self._stops
            if self.cluster_map is not None:
                resident.hear(self.cluster_map)
            self._spawn(resident)
            self._around.on_news()
        finally:
            self._ordered.discard(order.shard)

    def drop(self, order: Drop) -> None:
        """Set that copy aside, if it is here."""
        resident = self.by_shard.get(order.shard)
        if resident is not None:
            resident.drop(order)

    async def give_back(self, order: GiveBack) -> None:
        """Give back the lease of that term, if it is this node's."""
        resident = self.by_shard.get(order.shard)
        hosted = resident.local.hosted if resident is not None else None
        if hosted is not None and await hosted.give_back(order):
            self._around.on_news()

    async def _connect(self, node_id: str, session: Session) -> Wire:
        """Raises WireLost."""
        node = self.cluster_map.node(node_id) if self.cluster_map is not None else None
        if node is None:
            raise WireLost(f"no map names node {node_id}")
        return await self._around.dial(node.url, session)


def _check_cluster(resident: Resident, home: Identity) -> None:
    """Raises ForeignData for a copy of another cluster's shard, whose maps and promises mean nothing here."""
    found = resident.local.logged_map
    if found is not None and home.cluster_id not in (None, found.cluster_id):
        raise ForeignData(
            f"its files belong to cluster {found.cluster_id}, and those of this node's own shard to {home.cluster_id}."
        )
