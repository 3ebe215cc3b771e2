"""What a router does: find the shard of a key in the cached map, ask it, follow the map when the answer is 421.

Owns: the cached cluster map, a channel per member, merging what all shards say (listing, counting, status).
Promises: holds no state worth keeping. A write is sent once; only a shard's 421 (nothing was executed) sends it on to
another. A listing is complete for the epoch that all its pages name, or it is an error.
Leaves to others: HTTP (`app`), bounds and lost connections (`transport.channel`), the last word on ownership (the
shard).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.errors import KvError, Unavailable, WrongOwner, from_problem
from kvstore.metrics import ShardStats
from kvstore.placement.cluster_map import ClusterMap, Member
from kvstore.placement.ring import Node, key_hash, partition_of, walk
from kvstore.protocol import (
    Acquire,
    Answer,
    Count,
    Delete,
    Explain,
    Facts,
    Get,
    Inspect,
    Leave,
    Page,
    Put,
    Release,
    Renew,
    Reply,
    Request,
    Scan,
    ScanLeases,
    Stats,
)
from kvstore.transport.channel import Channel

log = logging.getLogger(__name__)

_STALE_SHARD_WAIT_S = 0.02

KeyRequest = Get | Put | Delete | Acquire | Renew | Release | Leave | Inspect
Item = tuple[str, int, bytes | None, int]


class Routed(NamedTuple):
    """An answer and where it came from."""

    answer: Answer
    shard_id: str
    partition: int


class Listing(NamedTuple):
    """A page over all shards, in key order; `last` is where the next one goes on, None at the end."""

    items: list[Item]
    last: str | None


class RouterService:
    def __init__(self, limits: Limits, session: aiohttp.ClientSession) -> None:
        self.cluster_map: ClusterMap | None = None
        self.channels: dict[str, Channel] = {}
        self._limits = limits
        self._session = session
        self._owners: list[Channel] = []
        self._partitions = 0
        self._map_changed = asyncio.Event()
        self._was_ready = False
        self._closing: set[asyncio.Task[None]] = set()
        self._last_stats: dict[str, ShardStats] = {}
        self.floor = 0  # the highest of any store, as far as it was heard of
        self._in_doubt: dict[str, dict[str, float]] = {}

    # --- the map ------------------------------------------------------------------------------------------------------

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take over a newer map: open channels to new members and addresses, close those to old ones."""
        wanted = {member.id: member for member in cluster_map.members}
        for shard_id, channel in list(self.channels.items()):
            member = wanted.get(shard_id)
            if member is None or (member.url, member.store_id) != (channel.url, channel.store_id):
                del self.channels[shard_id]
                task = asyncio.create_task(channel.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        for member in cluster_map.members:
            if member.id not in self.channels:
                self.channels[member.id] = Channel(member.id, member.url, self._limits, self._session, member.store_id)
        of_member = [self.channels[member.id] for member in cluster_map.members]
        self._owners = [of_member[owner] for owner in cluster_map.owners]
        self._partitions = cluster_map.partitions
        self.cluster_map = cluster_map
        log.info("epoch %d: %d shards", cluster_map.epoch, len(cluster_map.members))
        self._map_changed.set()
        self._map_changed = asyncio.Event()

    async def close(self) -> None:
        """Close all channels; requests that still wait end in an error."""
        await asyncio.gather(*(channel.close() for channel in self.channels.values()), *self._closing)

    def not_ready(self) -> str | None:
        """Why this router cannot serve yet; None from the moment it can, for good."""
        if self._was_ready:
            return None
        if self.cluster_map is None:
            return "this router has no cluster map yet: the controller is away or waits for the first shards"
        silent = [m.id for m in self.cluster_map.members if m.state == "up" and not self.channels[m.id].answered]
        if silent:
            return f"these shards have not answered yet: {', '.join(silent)}"
        self._was_ready = True
        return None

    async def greet(self) -> None:
        """Ask each shard that has not answered yet for something, so that `not_ready` can tell."""
        while True:
            for channel in list(self.channels.values()):
                if channel.connected and not channel.answered:
                    try:
                        channel.request(Stats(0)).add_done_callback(self._see_floor)
                    except KvError:
                        pass
            await asyncio.sleep(0.02 if self.not_ready() else 1.0)

    def _see_floor(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None and isinstance(future.result(), Facts):
            self.floor = max(self.floor, future.result().facts.get("attempts_floor", 0))

    # --- one key ------------------------------------------------------------------------------------------------------

    def begin(self, request: KeyRequest) -> tuple[asyncio.Future[Any], Channel, int]:
        """Send a request on its way: its future, its channel, its partition. Raises Unavailable, TooManyRequests."""
        if not self._owners:
            raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
        partition = partition_of(request.key.encode(), self._partitions)
        channel = self._owners[partition]
        return channel.request(request), channel, partition

    async def ask(self, request: KeyRequest) -> Routed:
        """The owner's answer. Raises the errors of `Channel.request`."""
        future, channel, partition = self.begin(request)
        return await self.settle(request, future, channel, partition)

    async def settle(
        self, request: KeyRequest, future: asyncio.Future[Any], channel: Channel, partition: int
    ) -> Routed:
        """Await what `begin` began, following 421 to the present owner."""
        answer: Answer = await future
        if answer.status == WrongOwner.status:
            return await self._reroute(request, answer)
        return Routed(answer, channel.shard_id, partition)

    async def _reroute(self, request: KeyRequest, answer: Answer) -> Routed:
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        while asyncio.get_running_loop().time() < deadline_s:
            await self.await_epoch(int((answer.problem or {}).get("epoch", 0)))
            future, channel, partition = self.begin(request)
            answer = await future
            if answer.status != WrongOwner.status:
                return Routed(answer, channel.shard_id, partition)
        raise Unavailable("no shard owns the key at present", retry_after_ms=500)

    async def await_epoch(self, epoch: int) -> None:
        """Wait for a map of at least that epoch; if it is the shard that is behind, give it a moment."""
        changed = self._map_changed
        wait_s = self._limits.reroute_timeout_s
        if self.cluster_map is not None and self.cluster_map.epoch >= epoch:
            wait_s = _STALE_SHARD_WAIT_S
        try:
            await asyncio.wait_for(changed.wait(), wait_s)
        except TimeoutError:
            pass

    # --- for transactions ---------------------------------------------------------------------------------------------

    @property
    def all_channels(self) -> list[Channel]:
        """To every member."""
        return list(self.channels.values())

    @property
    def partitions(self) -> int:
        """Their number, 0 without a map."""
        return self._partitions

    def partition_of(self, key: str) -> int:
        return partition_of(key.encode(), self._partitions)

    def owner_of(self, key: str) -> Channel:
        """The channel to the owner, as of the cached map. Raises Unavailable without one."""
        if not self._owners:
            raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
        return self._owners[self.partition_of(key)]

    async def ask_owner(self, partition: int, request: Request) -> Reply:
        """The reply of the partition's owner, following 421. Raises the errors of `Channel.request`."""
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        while True:
            reply: Reply = await self._owners[partition].request(request)
            wrong = isinstance(reply, Answer) and reply.status == WrongOwner.status
            if not wrong or asyncio.get_running_loop().time() > deadline_s:
                return reply
            await self.await_epoch(int((reply.problem or {}).get("epoch", 0)) if isinstance(reply, Answer) else 0)

    # --- all shards ---------------------------------------------------------------------------------------------------

    async def page(self, prefix: str, after: str, limit: int, values: bool) -> Listing:
        """A page of keys over all shards, in byte order. Raises Unavailable when a shard is down: a gap is worse."""
        return await self._merged(after, limit, lambda after: Scan(0, prefix, after, limit, values))

    async def leases(self, prefix: str, after: str, limit: int) -> Listing:
        """A page of leases over all shards, by name: (name, token, owner, milliseconds left). Raises Unavailable."""
        return await self._merged(after, limit, lambda after: ScanLeases(0, prefix, after, limit))

    async def _merged(self, after: str, limit: int, make: Callable[[str], Scan | ScanLeases]) -> Listing:
        while True:
            pages: list[Page] = await self._ask_all(partial(make, after))
            horizon = min((page.last for page in pages if page.more), default=None)
            items = sorted(item for page in pages for item in page.items if horizon is None or item[0] <= horizon)
            if len(items) > limit:
                return Listing(items[:limit], items[limit - 1][0])
            if items or horizon is None:
                return Listing(items, horizon)
            after = horizon

    async def count(self, prefix: str) -> int:
        """The number of keys that start with `prefix`. Raises Unavailable when a shard is down."""
        replies: list[Facts] = await self._ask_all(lambda: Count(0, prefix))
        return sum(int(reply.facts["count"]) for reply in replies)

    async def _ask_all(self, make: Callable[[], Scan | ScanLeases | Count]) -> list[Any]:
        """The replies of all members of one map, all as of its epoch: so each key is seen by exactly one of them.

        That they agree on a newer epoch would not do: its map may have a member that was not asked.
        """
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        while True:
            asked = self.cluster_map
            if asked is None:
                raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
            replies = await asyncio.gather(*[channel.request(make()) for channel in self.channels.values()])
            for reply in replies:
                if isinstance(reply, Answer):
                    raise from_problem(reply.problem or {})
            epochs = {reply.epoch for reply in replies}
            if epochs == {asked.epoch}:
                return replies
            if asyncio.get_running_loop().time() > deadline_s:
                raise Unavailable("the shards do not agree on the cluster map yet", retry_after_ms=500)
            await self.await_epoch(max(epochs))

    async def shard_stats(self) -> dict[str, ShardStats | None]:
        """What each shard counts, as of now; None for one that does not answer."""

        async def one(channel: Channel) -> ShardStats | None:
            try:
                reply: Facts = await asyncio.wait_for(channel.request(Stats(0)), 1.0)
                stats = msgspec.convert(reply.facts, ShardStats)
            except (KvError, TimeoutError):
                return None
            self._last_stats[channel.shard_id] = stats
            self.floor = max(self.floor, reply.facts.get("attempts_floor", 0))
            self._in_doubt[channel.shard_id] = reply.facts.get("attempts", {})
            return stats

        channels = list(self.channels.values())
        return dict(zip((c.shard_id for c in channels), await asyncio.gather(*map(one, channels)), strict=True))

    # --- for people ---------------------------------------------------------------------------------------------------

    async def cluster(self) -> dict[str, Any]:
        """The document of GET /v1/cluster. A shard that does not answer is `down`, with its last known numbers."""
        cluster_map = self.cluster_map
        if cluster_map is None:
            raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
        stats = await self.shard_stats()
        partitions = [0] * len(cluster_map.members)
        for owner in cluster_map.owners:
            partitions[owner] += 1
        return {
            "cluster_id": cluster_map.cluster_id,
            "epoch": cluster_map.epoch,
            "partitions": cluster_map.partitions,
            "replicas": cluster_map.replicas,
            "shards": [
                self._describe(member, count, stats.get(member.id))
                for member, count in zip(cluster_map.members, partitions, strict=True)
            ],
            "moves": [],
            "in_doubt": self._transactions_in_doubt(cluster_map),
        }

    def _transactions_in_doubt(self, cluster_map: ClusterMap) -> dict[str, Any]:
        """Attempts that hold keys in any shard, each counted once; of a shard that is down, those last known."""
        ages: dict[str, float] = {}
        for member in cluster_map.members:
            for name, age_s in self._in_doubt.get(member.id, {}).items():
                ages[name] = max(age_s, ages.get(name, 0.0))
        return {"count": len(ages), "oldest_s": max(ages.values(), default=None)}

    def _describe(self, member: Member, partitions: int, stats: ShardStats | None) -> dict[str, Any]:
        known = stats or self._last_stats.get(member.id) or ShardStats()
        return {
            "id": member.id,
            "url": member.url,
            "state": member.state if stats is not None else "down",
            "weight": member.weight,
            "partitions": partitions,
            "keys": known.keys,
            "bytes": known.bytes,
        }

    async def explain(self, key: str) -> dict[str, Any]:
        """The way of a key: hash, partition, ring walk, owner, and what the owner knows of it."""
        cluster_map = self.cluster_map
        if cluster_map is None:
            raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
        encoded = key.encode()
        partition = partition_of(encoded, cluster_map.partitions)
        channel = self._owners[partition]
        nodes = [Node(member.id, member.weight) for member in cluster_map.members]
        document: dict[str, Any] = {
            "key": key,
            "hash": f"{key_hash(encoded):016x}",
            "partition": partition,
            "partitions": cluster_map.partitions,
            "epoch": cluster_map.epoch,
            "walk": walk(nodes, partition, cluster_map.partitions),
            "owner": channel.shard_id,
            "owner_url": channel.url,
        }
        try:
            reply = await channel.request(Explain(0, key))
            if isinstance(reply, Answer):
                raise from_problem(reply.problem or {})
        except KvError as error:
            state = "down" if isinstance(error, Unavailable) else "up"
            return document | {"owner_state": state, "detail": error.detail}
        return document | {"owner_state": "up", **reply.facts}
