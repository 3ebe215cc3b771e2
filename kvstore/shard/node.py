"""A node apart from its HTTP: its stores, who may open channels to them, and how the node takes part in the cluster.

Owns: opening and closing in the right order; following the map and announcing the node; what is told at its door.
Promises: serves only with a map; a restarted shard starts from its own durable map, so it does not need the
controller to serve; a shard whose file belongs to another cluster ends with an error instead of serving.
Leaves to others: HTTP (`app`), each of its stores (`hosted`), requests (`service`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from kvstore.environment import SYSTEM, Environment
from kvstore.errors import ForeignData
from kvstore.metrics import StoreLabels
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap
from kvstore.shard.hellos import Hellos, Memory
from kvstore.shard.hosted import HostedStore, Surroundings, open_copies, open_hosted
from kvstore.store.store import Store
from kvstore.transport.channel import Handle
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import ClusterSession

_NOT_FOUND, _CONFLICT = 404, 409


class OtherPartitions(Exception):
    """The cluster has another number of partitions than the node was told, and its file is of no cluster yet."""

    def __init__(self, partitions: int) -> None:
        super().__init__(f"the cluster has {partitions} partitions")
        self.partitions = partitions


class Refused(NamedTuple):
    """A channel is not opened: the status of HTTP, and why."""

    status: int
    why: str


class Node:
    """The stores that are served here. The first is its home's."""

    def __init__(
        self, stores: list[HostedStore], hellos: Hellos, follower: MapFollower, cluster: ClusterSession
    ) -> None:
        self.stores = stores
        self.home = stores[0]
        self._by_shard = {hosted.shard_id: hosted for hosted in stores}
        self._hellos = hellos
        self._follower = follower
        self._cluster = cluster

    @classmethod
    async def open(
        cls,
        surroundings: Surroundings,
        partitions: int,
        memory: Memory,
        at_the_end: AsyncExitStack,
        environment: Environment = SYSTEM,
    ) -> Node:
        """Open the home's store, and the others that are served here; `at_the_end` closes them.

        `partitions`: their number while the home's store is of no cluster. `memory`: keeps the last session. Raises
        what `Store.open` raises.
        """
        node_id, limits, cluster = surroundings.node_id, surroundings.limits, surroundings.cluster
        home = await open_hosted(node_id, partitions, surroundings, at_the_end)
        stores = [home, *await open_copies(home.store.identity.partitions, surroundings, at_the_end)]
        session, url = surroundings.session, surroundings.controller_url
        follower = MapFollower(session, url, limits, environment=environment, cluster=cluster)
        return cls(stores, Hellos(node_id, cluster, follower.ask_session, memory), follower, cluster)

    # --- at its door

    async def admit(self, shard: str, store_id: str | None, session_id: str, peer: str | None) -> HostedStore | Refused:
        """The store to which a channel is asked for, by a process that names this session."""
        hosted = self._by_shard.get(shard)
        if hosted is None:
            return Refused(_NOT_FOUND, f"this is shard {self.home.shard_id}")
        # An empty or foreign file has a map and partitions of its own, or none: to the router's cluster it is not this
        # shard, also while the controller, which refuses it, is away. Else a key of ours would be "not there".
        if store_id not in (None, "", hosted.store.identity.store_id):
            return Refused(_CONFLICT, f"shard {shard} serves another data file")
        status = await self._hellos.refusal(session_id, peer)
        if status is not None:
            return Refused(status, f"shard {shard} is in another session")
        return hosted

    def handle_of(self, store_id: str) -> Handle | None:
        """What begins a request for that store; None if it is not served here."""
        for hosted in self.stores:
            if hosted.store.identity.store_id == store_id:
                return hosted.service.handle
        return None

    async def facts(self, session_id: str | None, store_id: str | None, peer: str | None) -> dict[str, Any]:
        """What the node is, for a controller, which names its session, and for people."""
        store = self.home.store
        identity = store.identity
        if session_id and store_id == identity.store_id:
            await self._hellos.refusal(session_id, peer)  # which says so if that is a stranger
        ids = {"store_id": identity.store_id, "copy_id": store.copy_id, "session": self._cluster.id}
        facts = {**ids, "cluster_id": identity.cluster_id, "partitions": len(store.served.generations)}
        if not self.home.told.is_verified:
            facts["unverified"] = True  # the controller has not confirmed that this is no older copy
        if missing := store.partitions.missing:
            facts["missing"] = partition_set.as_text(missing)  # no move has brought them, or not surely all of them
        return {"status": "alive", "shard": self.home.shard_id, **facts}

    def newest_map(self) -> dict[str, Any]:
        """That of its stores, for a controller that has lost its file."""
        newest = max(self.stores, key=lambda hosted: hosted.store.served.epoch)
        home, *beside = [(hosted.shard_id, hosted.store.identity.store_id) for hosted in self.stores]
        return {"shard": home[0], "store_id": home[1], "map": newest.store.cluster_map, "beside": beside}

    def stats(self) -> dict[StoreLabels, Any]:
        """Of each store, for the metrics."""
        return {each.labels(self.home.shard_id): each.store.inspection.snapshot() for each in self.stores}

    # --- in the cluster

    async def run(self, url: str, weight: int, may_join: bool, stop: asyncio.Event) -> None:
        """Serve at that address until `stop` is set. Raises OtherPartitions, ForeignData, StoreBehind.

        `may_join`: if it is no member, it asks to become one, with that weight.
        """
        go_on_with_last_session(self._hellos, self._cluster, self.home.store, self.home.shard_id, url)
        works = [work for hosted in self.stores for work in hosted.works()]
        await until_one_ends(self._take_part(url, weight, may_join), *works, self._stopped(stop))

    async def _take_part(self, url: str, weight: int, may_join: bool) -> None:
        """Announce the node, then follow the map for ever."""
        store = self.home.store
        identity = store.identity
        try:
            await self._follower.announce(
                self.home.shard_id,
                url,
                identity.store_id,
                identity.cluster_id,
                weight,
                join=may_join,
                partitions=identity.partitions,
                epoch=store.served.epoch,
                clock=store.clock.version,
                copy_id=store.copy_id,
            )
        except ForeignData as refused:
            wanted = refused.members.get("partitions")
            if identity.cluster_id is None and isinstance(wanted, int) and wanted != identity.partitions:
                raise OtherPartitions(wanted) from None
            raise
        cluster_id = store.identity.cluster_id
        await self._follower.follow(
            max(store.served.epoch - 1, 0), self._follow, cluster_id, lambda: store.clock.version
        )

    def _follow(self, cluster_map: ClusterMap) -> None:
        for hosted in self.stores:
            hosted.maps.put(cluster_map)

    async def _stopped(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await asyncio.gather(*(hosted.end() for hosted in self.stores))


def go_on_with_last_session(hellos: Hellos, cluster: ClusterSession, store: Store, shard_id: str, url: str) -> None:
    """Name it to other shards while the controller is away, if this is where their map says that this shard is.

    At another address this may be a copy of the data directory, which must not disturb the original.
    """
    node = store.cluster_map.node(shard_id) if store.cluster_map is not None else None
    if node is not None and node.url == url:
        cluster.enter(hellos.last)


async def until_one_ends(*works: Coroutine[Any, Any, Any]) -> None:
    """Then the others are cancelled. Raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in done:
            task.result()
