"""The cached cluster map of a router: which channel leads to each partition's owner; waiting for a newer map.

Owns: when a newer map is taken over.
Promises: a new member's channel is open before its first partition is asked for there. Holds no state worth keeping.
Leaves to others: who brings maps (`transport.map_follower`), channels (`channels`), what is asked (`service`), the last
word on ownership (the shard).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import aiohttp

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import Unavailable, WrongOwner, from_problem
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Reply
from kvstore.router.channels import MemberChannels, fails_over
from kvstore.transport.channel import Channel
from kvstore.transport.sessions import ClusterSession

log = logging.getLogger(__name__)

PRIMARY_WAIT_S = 0.05
_STALE_SHARD_WAIT_S = 0.02
_FENCED_WAIT_S = 0.2
_CONNECT_WAIT_S = 1.0


class RoutingTable:
    """`owners`: by partition, its owner's channel; empty without a map. `partitions`: their number, 0 without a map.

    `channels`: by shard id. `largest_part`: of the partitions, in one shard.
    """

    def __init__(
        self,
        limits: Limits,
        session: aiohttp.ClientSession,
        environment: Environment = SYSTEM,
        cluster: ClusterSession | None = None,
    ) -> None:
        self.cluster_map: ClusterMap | None = None
        self.owners: list[Channel] = []
        self.partitions = 0
        self.largest_part = 1.0
        self._opened = MemberChannels(limits, session, cluster)
        self.channels = self._opened.by_shard
        self._limits = limits
        self._environment = environment
        self._moving: frozenset[int] = frozenset()
        self._map_changed = asyncio.Event()
        self._next_map: ClusterMap | None = None

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take over a newer map: open channels to new members and addresses, let go those to old ones.

        Where a partition has an owner that is not connected yet, it is taken over as soon as that one is, in a second
        at the latest: until then the old owners are asked, who say 421.
        """
        self._opened.open_for(cluster_map)
        self._next_map = cluster_map
        channels = self._new_owners(cluster_map)
        if all(channel.connected for channel in channels):
            self._take_over(cluster_map)
        else:
            self._opened.spawn(self._take_over_when_connected(cluster_map, channels))

    def _new_owners(self, cluster_map: ClusterMap) -> list[Channel]:
        """The channels by which partitions are reached in that map, and were not in the present one."""
        if self.cluster_map is None or self.partitions != cluster_map.partitions:
            return []
        of_shard = self._opened.leading(cluster_map)
        owners = zip(self.owners, cluster_map.owners, strict=True)
        return list(dict.fromkeys(of_shard[new] for old, new in owners if of_shard[new] is not old))

    async def _take_over_when_connected(self, cluster_map: ClusterMap, channels: list[Channel]) -> None:
        deadline_s = asyncio.get_running_loop().time() + _CONNECT_WAIT_S
        while asyncio.get_running_loop().time() < deadline_s:
            if all(channel.connected for channel in channels):
                break
            await asyncio.sleep(0.005)
        if self._next_map is cluster_map:  # else there is a newer one by now
            self._take_over(cluster_map)

    def _take_over(self, cluster_map: ClusterMap) -> None:
        self._opened.switch(self.cluster_map, cluster_map)
        of_shard = [self.channels[shard.id] for shard in cluster_map.shards]
        for channel in of_shard:
            channel.name_strike(cluster_map.last_strike)
        self.owners = [of_shard[owner] for owner in cluster_map.owners]
        self.partitions = cluster_map.partitions
        self.largest_part = max(Counter(cluster_map.owners).values()) / cluster_map.partitions
        self._moving = frozenset(partition for move in cluster_map.moves for partition in move.partitions)
        self.cluster_map = cluster_map
        log.info("epoch %d: %d shards", cluster_map.epoch, len(cluster_map.shards))
        self._map_changed.set()
        self._map_changed = asyncio.Event()

    async def close(self) -> None:
        """Close all channels; requests that still wait end in an error."""
        self._next_map = None
        await self._opened.close()

    # --- what the map says

    @property
    def epoch(self) -> int:
        """Of the cached map, 0 without one."""
        return self.cluster_map.epoch if self.cluster_map is not None else 0

    def partition_of(self, key: str) -> int:
        """The partition of the key. Raises KeyError before the first map."""
        return partition_of(key.encode(), self.partitions)

    def owner_of(self, key: str) -> Channel:
        """The channel to the owner, as of the cached map. Raises Unavailable without one."""
        if not self.owners:
            raise Unavailable("this router has no cluster map yet.", retry_after_ms=500)
        return self.owners[self.partition_of(key)]

    def fails_over(self, shard_id: str) -> bool:
        """Whether another copy may take over from its primary, as of the cached map."""
        return fails_over(self.cluster_map, shard_id)

    @property
    def any_fails_over(self) -> bool:
        """Whether any shard has copies."""
        return self.cluster_map is not None and any(shard.replicas for shard in self.cluster_map.shards)

    def is_owner(self, channel: Channel, partition: int) -> bool:
        """As of the cached map."""
        return self.owners[partition] is channel

    def is_moving(self, partition: int) -> bool:
        """It may change hands soon, as of the cached map."""
        return partition in self._moving

    # --- waiting for another map

    async def await_primary(self, wait_s: float = PRIMARY_WAIT_S) -> None:
        """A moment, or until there is a newer map."""
        await self._environment.wait_for(self._map_changed.wait(), wait_s)

    async def await_map(self, epoch: int) -> None:
        """Wait until the cached map, if there is one, is of that epoch or a later one."""
        while self.cluster_map is not None and self.cluster_map.epoch < epoch:
            await self._map_changed.wait()

    async def await_other_owner(self, channel: Channel, partition: int, refusal: Reply) -> None:
        """`channel` has answered 421 for the partition: wait until it makes sense to ask its owner again."""
        if self.is_owner(channel, partition):  # else there is a newer map already
            await self.await_epoch(*epoch_of(refusal))

    async def await_epoch(self, epoch: int, fenced: bool = False) -> None:
        """Wait for a map of at least that epoch.
        If it is the shard that is behind, give it a moment.

        `fenced`: the shard has stopped to answer for the partition, as of that epoch: wait for a map beyond it, but not
        for long, since the move may be given up.
        """
        changed = self._map_changed
        wait_s = _FENCED_WAIT_S if fenced else self._limits.reroute_timeout_s
        if self.cluster_map is not None and self.cluster_map.epoch >= epoch + fenced:
            wait_s = _STALE_SHARD_WAIT_S
        await self._environment.wait_for(changed.wait(), wait_s)


def epoch_of(refusal: Reply) -> tuple[int, bool]:
    """What a 421 says of itself: as of which epoch, and whether it is fenced."""
    error = from_problem(refusal.problem if isinstance(refusal, Answer) else None)
    return (error.epoch, error.fenced) if isinstance(error, WrongOwner) else (0, False)
