"""What a router can tell of the cluster and of a key at a moment.
Its map, and what it asks the shards for that.

Owns: the last numbers of each shard, which are told while it does not answer.
Promises: a shard that does not answer holds nothing up for longer than a second.
Leaves to others: the form of what is told (`cluster_documents`), the map and the channels (`service`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from kvstore.errors import KvError, Unavailable, from_problem
from kvstore.metrics import ShardStats, StoreLabels
from kvstore.protocol import Answer, Explain, Info, Reply, Stats
from kvstore.router import cluster_documents
from kvstore.router.service import RouterService
from kvstore.transport.channel import Channel

_STATS_WAIT_S = 1.0
_BEHIND_WAIT_S = 0.02


class ClusterViews:
    """Documents of the cluster as of now."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._last: dict[str, ShardStats] = {}
        self._in_doubt: dict[str, dict[str, float]] = {}

    async def shard_stats(self, epoch: int = 0) -> dict[str, ShardStats | None]:
        """What each shard counts, as of now; None for one that does not answer.

        One that is behind that epoch has a moment to follow.
        """
        deadline_s = asyncio.get_running_loop().time() + _STATS_WAIT_S

        async def one(channel: Channel) -> ShardStats | None:
            try:
                reply = await self._stats_of(channel)
                while reply.epoch < epoch and asyncio.get_running_loop().time() < deadline_s:
                    await asyncio.sleep(_BEHIND_WAIT_S)
                    reply = await self._stats_of(channel)
                stats = msgspec.convert(reply.facts, ShardStats)
            except (KvError, TimeoutError):
                return None
            self._last[channel.shard_id] = stats
            self._service.note_floor(reply.facts.get("attempts_floor", 0))
            self._in_doubt[channel.shard_id] = reply.facts.get("attempts", {})
            return stats

        channels = list(self._service.table.channels.values())
        return dict(zip((c.shard_id for c in channels), await asyncio.gather(*map(one, channels)), strict=True))

    async def _stats_of(self, channel: Channel) -> Info:
        """Raises KvError, also for a node that does not serve that store now; TimeoutError."""
        reply: Reply = await asyncio.wait_for(channel.request(Stats(0)), _STATS_WAIT_S)
        if not isinstance(reply, Info):
            raise from_problem(reply.problem if isinstance(reply, Answer) else None)
        return reply

    def labelled(self, stats: Mapping[str, ShardStats | None]) -> dict[StoreLabels, ShardStats]:
        """These numbers with the labels of their primaries; without shards that do not answer, or have left."""
        shards = self._service.table.cluster_map.shards if self._service.table.cluster_map is not None else []
        return {
            StoreLabels(shard.primary.node, shard.id, "primary"): known
            for shard in shards
            if (known := stats.get(shard.id)) is not None
        }

    async def cluster(self, epoch: int = 0) -> dict[str, Any]:
        """The document of GET /v1/cluster, as of that epoch or a later one, if that comes within a second.

        Who is told that a move has ended finds it in these numbers. A shard that does not answer is `down`, with its
        last known numbers. Raises Unavailable.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STATS_WAIT_S):
                await self._service.table.await_map(epoch)
        cluster_map = self._service.table.cluster_map
        if cluster_map is None:
            raise Unavailable("this router has no cluster map yet.", retry_after_ms=500)
        stats = await self.shard_stats(cluster_map.epoch)
        return cluster_documents.cluster(cluster_map, stats, self._last, self._in_doubt)

    async def explain(self, key: str) -> dict[str, Any]:
        """The way of a key: hash, partition, ring walk, owner, and what the owner knows of it.

        A shard that does not answer is told as `owner_state`. Raises Unavailable without a map.
        """
        self._service.table.owner_of(key)  # raises Unavailable without a map
        partition = self._service.table.partition_of(key)
        facts: dict[str, Any]
        try:
            reply = await self._service.ask_owner(partition, Explain(0, key))
            if not isinstance(reply, Info):
                raise from_problem(reply.problem if isinstance(reply, Answer) else None)
            facts = {"owner_state": "up", **reply.facts}
        except KvError as error:
            facts = {"owner_state": "down" if isinstance(error, Unavailable) else "up", "detail": error.detail}
        cluster_map = self._service.table.cluster_map
        assert cluster_map is not None
        return cluster_documents.way(cluster_map, key, partition, self._service.table.owner_of(key).url) | facts
