"""The other shards, as this one reaches them: for recovery, and for the moves that bring partitions here.

Owns: a channel to each shard that was ever asked for something.
Promises: a channel is to the address and the data file that the map names; when that changes, a new one is opened.
Leaves to others: what is asked.
"""

from __future__ import annotations

import asyncio

import aiohttp

from kvstore.config import Limits
from kvstore.errors import Unavailable
from kvstore.placement.cluster_map import ClusterMap
from kvstore.store.store import Store
from kvstore.transport.channel import Channel
from kvstore.transport.link import Links
from kvstore.transport.sessions import ClusterSession


class Peers:
    """The channels of one store to the other shards."""

    def __init__(
        self, store: Store, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession | None = None
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._limits = limits
        self._session = session
        self._links = Links(limits, session, cluster)
        self._channels: dict[str, Channel] = {}

    @property
    def cluster_map(self) -> ClusterMap:
        """The map that the store follows. Raises Unavailable while there is none."""
        cluster_map = self._store.cluster_map
        if cluster_map is None:
            raise Unavailable("this shard has no cluster map yet.")
        return cluster_map

    def owner(self, key: str) -> str:
        """The id of the shard that owns the key, by this shard's map. Raises Unavailable."""
        cluster_map = self.cluster_map
        return cluster_map.owner_of(key.encode()).id

    def channel(self, shard_id: str) -> Channel:
        """The channel to that shard's store. Raises Unavailable if there is no such shard, or no map yet.

        It is opened when it is needed first, and not connected yet then.
        """
        shard = self.cluster_map.shard(shard_id)
        if shard is None:
            raise Unavailable(f"there is no shard {shard_id}.")
        url = self.cluster_map.url_of(shard)
        channel = self._channels.get(shard_id)
        if channel is not None and (channel.url, channel.store_id) != (url, shard.store_id):
            asyncio.get_running_loop().create_task(channel.close())
            channel = None
        if channel is None:
            channel = Channel(shard.id, url, self._limits, self._session, shard.store_id, self._cluster, self._links)
            self._channels[shard_id] = channel
        channel.name_strike(self.cluster_map.last_strike)
        return channel

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))
