"""A node apart from its HTTP.
Its stores, who may open channels to them, and how the node takes part in the cluster.

Owns: opening and closing in the right order; following the map and announcing the node; what is told at its door.
Promises: serves only with a map; a restarted shard starts from its own durable map, so it does not need the
controller to serve; a shard whose file belongs to another cluster ends with an error instead of serving.
Leaves to others: HTTP (`app`), each of its stores (`hosted`), requests (`service`).
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from kvstore.environment import StopAsked, until_one_ends, until_quiet
from kvstore.errors import ForeignData
from kvstore.metrics import StoreLabels
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap
from kvstore.shard.beats import Beats
from kvstore.shard.hellos import Hellos, Memory
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node_stores import NodeStores
from kvstore.shard.resident import Resident
from kvstore.transport.connections import Connections
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import ClusterSession

log = logging.getLogger(__name__)

_NOT_FOUND, _CONFLICT, _UNAVAILABLE = 404, 409, 503


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
    """`stores`: all that lie here. `home`: the node's own shard's."""

    def __init__(
        self, around: Surroundings, stores: NodeStores, hellos: Hellos, follower: MapFollower, beats: Beats
    ) -> None:
        self.node_id = around.node_id
        self.stores = stores
        self.connections = Connections(around.limits)
        self._hellos = hellos
        self._follower = follower
        self._beats = beats
        self._cluster = around.cluster
        self._limits = around.limits
        self._environment = around.environment

    @classmethod
    async def open(cls, around: Surroundings, partitions: int, memory: Memory, at_the_end: AsyncExitStack) -> Node:
        """Open the home's store, and the others that lie here; `at_the_end` closes them.

        `partitions`: their number while the home's store is of no cluster. `memory`: keeps the last session. Raises
        what `Store.open` raises.
        """
        node_id, limits, cluster, environment = around.node_id, around.limits, around.cluster, around.environment
        session, url = around.session, around.controller_url
        news = _News()
        stores = NodeStores(around._replace(on_news=news.tell))
        at_the_end.push_async_callback(stores.close)
        await stores.begin(partitions)
        follower = MapFollower(session, url, limits, environment=environment, cluster=cluster)
        beats = Beats(node_id, stores, session, url, limits.failover_after_s, environment)
        at_the_end.push_async_callback(beats.close)
        news.beats = beats
        return cls(around, stores, Hellos(node_id, cluster, follower.ask_session, memory), follower, beats)

    # --- at its door

    async def admit(self, shard: str, store_id: str | None, session_id: str, peer: str | None) -> Resident | Refused:
        """The store to which a channel is asked for, by a process that names this session."""
        resident = self.stores.by_shard.get(shard)
        identity = resident.local.identity if resident is not None else None
        if resident is None or identity is None:
            return Refused(_NOT_FOUND, f"this is shard {self.node_id}")
        # An empty or foreign file has a map and partitions of its own, or none: to the router's cluster it is not this
        # shard, also while the controller, which refuses it, is away. Else a key of this shard would be "not there".
        if store_id not in (None, "", identity.store_id):
            return Refused(_CONFLICT, f"shard {shard} serves another data file")
        return await self.admit_process(session_id, peer) or resident

    async def admit_process(self, session_id: str, peer: str | None) -> Refused | None:
        """Whether a process that names this session is refused."""
        if self.connections.ended:
            return Refused(_UNAVAILABLE, f"shard {self.node_id} ends")
        status = await self._hellos.refusal(session_id, peer)
        return Refused(status, f"shard {self.node_id} is in another session") if status is not None else None

    async def facts(self, session_id: str | None, store_id: str | None, peer: str | None) -> dict[str, Any]:
        """What the node is, for a controller, which names its session, and for people."""
        home, identity = self.stores.home, self.stores.identity
        if session_id and store_id == identity.store_id:
            await self._hellos.refusal(session_id, peer)  # which says so if that is a stranger
        ids = {"store_id": identity.store_id, "copy_id": home.local.copy_id, "session": self._cluster.id}
        facts: dict[str, Any] = {**ids, "cluster_id": identity.cluster_id, "partitions": identity.partitions}
        if not all(each.told.is_verified for each in self.stores.by_shard.served):
            facts["unverified"] = True  # the controller has not confirmed that none of them is an older copy
        if home.local.hosted is not None and (missing := home.local.hosted.store.partitions.missing):
            facts["missing"] = partition_set.as_text(missing)  # no move has brought them, or not surely all of them
        if damage := self.stores.by_shard.damage:
            facts["damaged"] = damage  # by shard; other copies take the place of these
        if disputed := self.stores.by_shard.disputed:
            facts["disputed"] = disputed  # by shard; a person decides
        return {"status": "alive", "shard": self.node_id, **facts}

    def newest_map(self) -> dict[str, Any]:
        """That of its stores, for a controller that has lost its file."""
        served = [(each.shard_id, each.store.identity.store_id) for each in self.stores.by_shard.served]
        beside = [each for each in served if each[0] != self.node_id]
        ids = {"shard": self.node_id, "store_id": self.stores.identity.store_id}
        return {**ids, "map": self.stores.newest_map, "beside": beside, "copies": self.stores.by_shard.whole_copies}

    def stats(self) -> dict[StoreLabels, Any]:
        """Of each store that is served, for the metrics."""
        return {each.labels(self.node_id): each.store.inspection.snapshot() for each in self.stores.by_shard.served}

    # --- in the cluster

    async def run(self, url: str, weight: int, may_join: bool, stop: StopAsked, host: str = "", zone: str = "") -> None:
        """Serve at that address until `stop` is set. Raises OtherPartitions, ForeignData, StoreBehind.

        `may_join`: if it is no member, it asks to become one, with that weight. `host`, `zone`: of this node.
        """
        go_on_with_last_session(self._hellos, self._cluster, self.stores.newest_map, self.node_id, url)
        part = self._take_part(url, weight, may_join, host, zone)
        await until_one_ends(part, self.stores.run(), self._beats.run(), self._stopped(stop))

    async def _take_part(self, url: str, weight: int, may_join: bool, host: str, zone: str) -> None:
        """Announce the node, then follow the map for ever."""
        stores, identity, newest = self.stores, self.stores.identity, self.stores.newest_map
        epoch = newest.epoch if newest is not None and identity.cluster_id is not None else 0
        try:
            await self._follower.announce(
                self.node_id,
                url,
                identity.store_id,
                identity.cluster_id,
                weight,
                join=may_join,
                partitions=identity.partitions,
                epoch=epoch,
                clock=stores.by_shard.clock,
                copy_id=stores.home.local.copy_id,
                host=host,
                zone=zone,
            )
        except ForeignData as refused:
            wanted = refused.members.get("partitions")
            if identity.cluster_id is None and isinstance(wanted, int) and wanted != identity.partitions:
                raise OtherPartitions(wanted) from None
            raise
        cluster_id = stores.identity.cluster_id
        await self._follower.follow(max(epoch - 1, 0), stores.hear, cluster_id, lambda: stores.by_shard.clock)

    async def _stopped(self, stop: StopAsked) -> None:
        await stop.wait()
        if not stop.at_once.is_set():
            await until_one_ends(self._hand_on(), stop.at_once.wait())
        await self.stores.end()
        # Where none is connected, none waits for an answer.
        is_settled = not self.connections or await self.stores.settle(self._limits.settle_timeout_s)
        self.connections.end(is_settled=is_settled)  # before anything is awaited: nothing is begun in between

    async def _hand_on(self) -> None:
        """Have others take over what this node serves, and refuse for a moment what routers still ask here.

        A router whose map is a moment behind is told that nothing was done. If it lost the connection instead, it could
        not know.
        """
        if not self._beats.has_to_tell:
            return
        self.stores.note_stop()
        if not await self._beats.hand_on(self._limits.hand_on_timeout_s):
            log.warning("not all that is served here could be handed on: the process ends all the same")
        quiet_s, quiet_s_max = self._limits.hand_on_quiet_s, self._limits.hand_on_quiet_s_max
        await until_quiet(self._environment, lambda: self.stores.by_shard.refused_s, quiet_s, quiet_s_max)


class _News:
    """Told by stores, which are there before the beats."""

    def __init__(self) -> None:
        self.beats: Beats | None = None

    def tell(self) -> None:
        if self.beats is not None:
            self.beats.hurry()


def go_on_with_last_session(
    hellos: Hellos, cluster: ClusterSession, cluster_map: ClusterMap | None, shard_id: str, url: str
) -> None:
    """Name this node's address to other shards while the controller is away.
    Only if this is where their map says that this shard is.

    At another address this may be a copy of the data directory, which must not disturb the original.
    """
    node = cluster_map.node(shard_id) if cluster_map is not None else None
    if node is not None and node.url == url:
        cluster.enter(hellos.last)
