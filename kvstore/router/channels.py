"""The channels of a router: one for each member, and how those of former members and addresses end.

Owns: opening and closing.
Promises: a channel to a new address is opened beside the one to the old address, which is asked until the map is taken
over. What was asked by a channel that is let go is listened for until it is answered.
Leaves to others: which map is followed, and when it is taken over (`routing_table`), connections (`transport.link`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import aiohttp

from kvstore.config import Limits
from kvstore.placement.cluster_map import ClusterMap
from kvstore.transport.channel import Channel
from kvstore.transport.link import Links
from kvstore.transport.sessions import ClusterSession

_DEPOSED_S = 0.1
_LINGER_S = 2.0


class MemberChannels:
    """`by_shard`: the channel to the store of each shard's primary, as of the map that was taken over last."""

    def __init__(self, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession | None) -> None:
        self.by_shard: dict[str, Channel] = {}
        self._successors: dict[str, Channel] = {}  # which lead where the next map says, until that is taken over
        self._limits = limits
        self._session = session
        self._cluster = cluster
        self._links = Links(limits, session, cluster)
        self._background: dict[asyncio.Task[None], None] = {}

    def open_for(self, cluster_map: ClusterMap) -> None:
        """One for each shard; where the present one leads elsewhere its successor is opened beside it.

        A newer map is news of all nodes: one that was started again and has a new term is reached at once.
        """
        self._links.hurry()
        for shard in cluster_map.shards:
            reached = cluster_map.url_of(shard), shard.store_id
            present, successor = self.by_shard.get(shard.id), self._successors.get(shard.id)
            if present is None:
                self.by_shard[shard.id] = self._channel(shard.id, *reached)
            elif _leads(present) != reached and (successor is None or _leads(successor) != reached):
                if successor is not None:
                    self.spawn(successor.close())  # nothing was asked there yet
                self._successors[shard.id] = self._channel(shard.id, *reached)

    def _channel(self, shard_id: str, url: str, store_id: str) -> Channel:
        return Channel(shard_id, url, self._limits, self._session, store_id, self._cluster, self._links)

    def leading(self, cluster_map: ClusterMap) -> list[Channel]:
        """Those that lead where that map says, for which they were opened, in the order of its shards."""
        return [self._successors.get(shard.id, self.by_shard[shard.id]) for shard in cluster_map.shards]

    def switch(self, before: ClusterMap | None, after: ClusterMap) -> None:
        """Ask by the map `after` from now on; let go what leads elsewhere."""
        reached = {shard.id: (after.url_of(shard), shard.store_id) for shard in after.shards}
        for shard_id, channel in [*self.by_shard.items(), *self._successors.items()]:
            if reached.get(shard_id) != _leads(channel):
                of_old = self.by_shard if self.by_shard.get(shard_id) is channel else self._successors
                del of_old[shard_id]
                is_deposed = shard_id in reached and fails_over(before, shard_id)
                self.spawn(self._depose(channel) if is_deposed else self._let_go(channel))
        self.by_shard |= self._successors
        self._successors.clear()
        self.open_for(after)

    async def _let_go(self, channel: Channel) -> None:
        """Close the channel to a former member, or address, once nothing waits there any more.

        Not at once: a transaction that was split up under the map before may not have asked there yet.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._limits.request_timeout_s
        try:
            await asyncio.sleep(_LINGER_S)
            while channel.ops_under_way and loop.time() < deadline_s:  # noqa: ASYNC110 (it happens once)
                await asyncio.sleep(0.05)
        finally:
            await channel.close()

    async def _depose(self, channel: Channel) -> None:
        """Another node is the primary.
        What the old one was asked last has a moment, then all that waits there ends."""
        try:
            await asyncio.sleep(_DEPOSED_S)
        finally:
            await channel.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run until it ends, or the channels are closed."""
        task = asyncio.create_task(work)
        self._background[task] = None
        task.add_done_callback(self._background.pop)

    async def close(self) -> None:
        """Close all channels; requests that still wait end in an error."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(each.close() for each in [*self.by_shard.values(), *self._successors.values()]))


def _leads(channel: Channel) -> tuple[str, str]:
    """Where that channel leads: to the store of that id, at that address."""
    return channel.url, channel.store_id


def fails_over(cluster_map: ClusterMap | None, shard_id: str) -> bool:
    """Whether another copy may take over from its primary, as of that map."""
    shard = cluster_map.shard(shard_id) if cluster_map is not None else None
    return shard is not None and bool(shard.replicas)
