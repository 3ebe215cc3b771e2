"""What the newest map that a node follows says of one shard there.

Owns: that map, read for this shard and node; whether the copy here is dropped; waiting for either to change.
Promises: without a map nothing is concluded: no term has ended, and no damaged copy is rebuilt.
Leaves to others: following the map (`transport.map_follower`), what is done about it (`resident`).
"""

from __future__ import annotations

import asyncio
from typing import Literal

from kvstore.environment import Environment
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.configuration import Configuration, configuration_of
from kvstore.storage.engine import Identity

Fate = Literal["wait", "rebuild", "refuse"]


class FollowedMap:
    """Of that shard on that node. `newest`: None before one is heard of. `is_dropped`: no map names this copy."""

    def __init__(self, shard_id: str, node_id: str, environment: Environment) -> None:
        self.shard_id = shard_id
        self.node_id = node_id
        self.newest: ClusterMap | None = None
        self.is_dropped = False
        self._environment = environment
        self._changed = asyncio.Event()

    def hear(self, cluster_map: ClusterMap) -> None:
        """A newer map is followed. `wake` is called once all parts of the store have heard of it."""
        self.newest = cluster_map

    def drop(self, copy_id: str) -> None:
        """Drop that copy, unless the newest map names it: an order that comes late may be older than the map."""
        config = self.config
        named = {config.primary.copy_id, *(each.copy_id for each in config.replicas)} if config is not None else set()
        if copy_id not in named:
            self.is_dropped = True
            self._changed.set()

    def wake(self) -> None:
        """End the wait for a change: a map has come, or the store itself has changed."""
        self._changed.set()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until `wake` or `drop` is called from now on, or the time is over."""
        self._changed.clear()
        await self._environment.wait_for(self._changed.wait(), timeout_s)

    @property
    def config(self) -> Configuration | None:
        """The shard's copies; None if the map has no such shard."""
        return configuration_of(self.newest, self.shard_id) if self.newest is not None else None

    @property
    def term(self) -> int:
        """The shard's term; 0 if the map has no such shard."""
        config = self.config
        return config.term if config is not None else 0

    @property
    def is_primary(self) -> bool:
        """Whether the copy here is the primary's."""
        config = self.config
        return config is not None and config.primary.node == self.node_id

    @property
    def fate(self) -> Fate:
        """What becomes of a damaged copy here.

        `refuse`: it is the primary's, and no copy in sync can take its place.
        """
        config = self.config
        if config is None:
            return "wait"
        if self.is_primary:
            return "wait" if config.in_sync else "refuse"
        here = config.copy_on(self.node_id)
        return "wait" if here is not None and here.state == "in-sync" else "rebuild"

    def is_in_sync(self, joined: int) -> bool:
        """Whether the copy here is in sync under that joining number."""
        here = self.config.copy_on(self.node_id) if self.config is not None else None
        return here is not None and (here.state, here.joined) == ("in-sync", joined)

    def ends(self, served: Identity, *, has_copies: bool) -> bool:
        """Whether the store `served` here follows no map any more: the newest has it no more for this node.

        `has_copies`: it ships to them, and its sender hears of another primary.
        """
        return self.has_left(served) or self.has_lost(served) or (not has_copies and self.is_elsewhere(served))

    def is_elsewhere(self, served: Identity) -> bool:
        """Whether another node has the primary of the store `served` here.
        If that has no copies, a person has gone on with an older one."""
        config = self.config
        return config is not None and config.store_id == served.store_id and config.primary.node != self.node_id

    def has_left(self, served: Identity) -> bool:
        """Whether the store `served` here for another home is not the shard's any more, or the shard is gone.

        A home that has left answers until no router asks any more, and its process ends.
        """
        if self.newest is None or self.shard_id == self.node_id:
            return False
        shard = self.newest.shard(self.shard_id)
        return shard is None or shard.store_id != served.store_id

    def has_lost(self, served: Identity) -> bool:
        """Whether the store `served` here was made because there were no files, and the cluster knows of some.

        Only on its home is one made. A guest whose file has not applied its first map yet is not meant.
        """
        config = self.config
        if config is None or self.shard_id != self.node_id or served.cluster_id is not None:
            return False
        return served.store_id != config.store_id and self.fate != "refuse"
