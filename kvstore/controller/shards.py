"""The controller's ways to the shards: a channel to each member, and a question to one that is none yet.

Owns: the channels, as the newest map names the members; how far each shard is known to follow the map.
Promises: one map at a time is on its way to a shard, and a request for it during that waits for the next one together.
Leaves to others: what moves (`mover`), who may become a member (`membership`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.errors import ChangeRefused, KvError, Unavailable, from_problem
from kvstore.placement.cluster_map import ClusterMap, Shard
from kvstore.protocol import Answer, Follow, Info, Receive, Request, Stats
from kvstore.transport.channel import Channel
from kvstore.transport.link import Links
from kvstore.transport.sessions import PARAMETER, ClusterSession

_MEASURE_TIMEOUT_S = 1.0
_IDENTIFY_TIMEOUT_S = 2.0
_IDENTITY_BYTES_MAX = 64 * 1024
_ANCHORED_MAX = 50
_MAP_BYTES_MAX = 4 * 1024 * 1024
_CONNECT_POLL_S = 0.01
_encode = msgspec.json.Encoder().encode
T = TypeVar("T", bound=msgspec.Struct)


class Size(msgspec.Struct, frozen=True):
    """What a shard holds, as it counts itself. `clock`: the highest version that it has given or seen.

    `disk_spare_bytes`: what its disk has room for, beside the reserve; None from an earlier program.
    """

    keys: int
    bytes: int
    clock: int = 0
    disk_spare_bytes: int | None = None


class Identity(msgspec.Struct, frozen=True):
    """What a shard's process says of itself. `cluster_id`: that of its file, None while it is new; `partitions`: of how
    many that is; `session`: to which it belongs."""

    shard: str
    store_id: str
    cluster_id: str | None = None
    partitions: int | None = None
    copy_id: str = ""
    session: str = ""


class _Link:
    """`epoch`: of the newest map that the shard is known to follow."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.epoch = 0
        self.telling = asyncio.Lock()


class ShardClients:
    """Channels to all shards of the map. `on_epoch`: called with the cluster and the epoch that a shard tells."""

    def __init__(self, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession | None = None) -> None:
        self.cluster = cluster or ClusterSession()
        self._limits = limits
        self._session = session
        self._node_links = Links(limits, session, cluster)
        self._links: dict[str, _Link] = {}
        self._closing: dict[asyncio.Task[None], None] = {}
        self._epoch = 0
        self._cluster_id = ""
        self._encoded = b""
        self.on_epoch: Callable[[str, int], None] = lambda cluster_id, epoch: None  # which map a shard follows

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take over this map, if it is newer: a channel to each of its shards."""
        if cluster_map.epoch <= self._epoch:
            return
        self._epoch, self._encoded = cluster_map.epoch, _encode(cluster_map)
        self._cluster_id = cluster_map.cluster_id
        for shard_id in list(self._links):
            shard = cluster_map.shard(shard_id)
            if shard is None or not _leads_to(self._links[shard_id].channel, cluster_map, shard):
                closing = asyncio.create_task(self._links.pop(shard_id).channel.close())
                self._closing[closing] = None
                closing.add_done_callback(self._closing.pop)
        for shard in cluster_map.shards:
            if shard.id not in self._links:
                url = cluster_map.url_of(shard)
                channel = Channel(
                    shard.id, url, self._limits, self._session, shard.store_id, self.cluster, self._node_links
                )
                self._links[shard.id] = _Link(channel)
            self._links[shard.id].channel.name_strike(cluster_map.last_strike)

    async def close(self) -> None:
        """End all channels."""
        await asyncio.gather(*(link.channel.close() for link in self._links.values()), *self._closing)
        self._links.clear()

    async def bring(self, shard_id: str, epoch: int, *, again: bool = False) -> None:
        """Return when the shard follows a map of that epoch or a later one, durably.
        `again`: even if it did before.

        Raises Unavailable if it does not answer, and the shard's error if it refuses.
        """
        link = self._link(shard_id)
        async with link.telling:
            if not link.channel.connected:
                raise _not_connected(shard_id)
            if link.epoch >= epoch and not again:
                return
            told = self._epoch
            answer = await link.channel.request(Follow(0, self._encoded))
            if not isinstance(answer, Answer) or answer.status != 200:
                raise from_problem(getattr(answer, "problem", None))
            link.epoch = max(told, link.epoch)
            self.on_epoch(self._cluster_id, answer.version)

    def receive(self, shard_id: str, move_id: str, seen: str) -> asyncio.Future[Any]:
        """Ask the destination to carry out the move; the future brings Progress, or the Answer that refuses.

        Raises Unavailable and TooManyRequests at once: then nothing was sent.
        """
        return self._link(shard_id).channel.request(Receive(0, move_id, seen))

    async def measure(self, cluster_map: ClusterMap) -> dict[str, Size]:
        """What the shards hold; without those that do not answer within a second."""
        self.follow(cluster_map)
        ids = [shard.id for shard in cluster_map.shards]
        sizes = await asyncio.gather(*(self._measure_one(shard_id) for shard_id in ids))
        return {shard_id: size for shard_id, size in zip(ids, sizes, strict=True) if size is not None}

    async def _measure_one(self, shard_id: str) -> Size | None:
        try:
            async with asyncio.timeout(_MEASURE_TIMEOUT_S):
                answer = await self._ask(shard_id, Stats(0))
            return msgspec.convert(answer.facts, Size) if isinstance(answer, Info) else None
        except (KvError, TimeoutError, msgspec.ValidationError):
            return None

    async def _ask(self, shard_id: str, request: Request) -> Any:
        channel = self._link(shard_id).channel
        while not channel.connected:  # noqa: ASYNC110 (this is its only waiter)
            await asyncio.sleep(_CONNECT_POLL_S)
        return await channel.request(request)

    async def anchored_at(self, cluster_map: ClusterMap, shard_id: str) -> list[dict[str, str]]:
        """Transactions whose first key is that shard's, as far as the other members hold keys of them: `id`, `anchor`.

        Without those of members that do not answer within a second.
        """
        others = [shard.id for shard in cluster_map.shards if shard.id != shard_id]
        answers = await asyncio.gather(*(self._live_attempts(other) for other in others))
        found = {attempt["id"]: attempt["anchor"] for attempts in answers for attempt in attempts}
        theirs = {name: key for name, key in found.items() if cluster_map.owner_of(key.encode()).id == shard_id}
        return [{"id": name, "anchor": key} for name, key in sorted(theirs.items())][:_ANCHORED_MAX]

    async def _live_attempts(self, shard_id: str) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(_MEASURE_TIMEOUT_S):
                answer = await self._ask(shard_id, Stats(0, _ANCHORED_MAX))
            return list(answer.facts["live"]["attempts"]) if isinstance(answer, Info) else []
        except (KvError, TimeoutError, KeyError):
            return []

    async def ask_http(self, url: str, path: str, kind: type[T]) -> T | None:
        """What the process there answers; None if nothing of that kind."""
        try:
            return await self._get(url, path, kind, _MAP_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    async def _get(self, url: str, path: str, kind: type[T], bytes_max: int) -> T:
        timeout = aiohttp.ClientTimeout(total=_IDENTIFY_TIMEOUT_S)
        async with self._session.get(f"{url.rstrip('/')}{path}", timeout=timeout, allow_redirects=False) as answer:
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > bytes_max:
                    raise ValueError("the answer is too large")
            return msgspec.json.decode(body, type=kind)

    async def identify(self, url: str) -> Identity:
        """Which shard serves there. Raises ChangeRefused, with the mend, if none does."""
        try:
            return await self._get(url, "/healthz", Identity, _IDENTITY_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise ChangeRefused(
                f"no shard answers at {url} ({reason}): start it there with `kvstore shard serve` first."
            ) from None

    async def served_at(self, url: str, store_id: str) -> Identity | None:
        """What serves there; one that has that store hears in which session it was asked. None: no shard does."""
        return await self.ask_http(url, f"/healthz?store={store_id}&{PARAMETER}={self.cluster.id}", Identity)

    def _link(self, shard_id: str) -> _Link:
        if shard_id not in self._links:
            raise Unavailable(f"shard {shard_id} is no member any more.", shard=shard_id, retry_after_ms=1000)
        return self._links[shard_id]


def _leads_to(channel: Channel, cluster_map: ClusterMap, shard: Shard) -> bool:
    return (channel.url, channel.store_id) == (cluster_map.url_of(shard), shard.store_id)


def _not_connected(shard_id: str) -> Unavailable:
    return Unavailable(f"shard {shard_id} cannot be reached.", shard=shard_id, retry_after_ms=1000)
