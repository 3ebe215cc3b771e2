"""Two shards with real files in one process, and the moves between them, step by step.

Messages go from one to the other as they would over a channel, but by a call; what a test wants to happen in between
it hangs on `before_message`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from kvstore.config import Limits
from kvstore.placement.cluster_map import ClusterMap, Move, at_home, map_of
from kvstore.placement.ring import partition_of
from kvstore.protocol import Freeze, Get, Progress, Pull, Receive, Reply
from kvstore.shard.receiver import Receiver
from kvstore.shard.service import ShardService
from kvstore.store.store import Store

PARTITIONS = 64
IDS = ("s1", "s2")
_SMALL = {"disk_reserve_bytes": 1, "expiry_sweep_s": 3600.0, "log_segment_bytes": 4 << 20}


def at(key: str) -> int:
    return partition_of(key.encode(), PARTITIONS)


class Sink:
    """Remembers what was sent to it."""

    def __init__(self) -> None:
        self.closed = False
        self.replies: list[Any] = []

    def send(self, reply: Reply, /) -> None:
        self.replies.append(reply)

    async def reply(self) -> Any:
        async with asyncio.timeout(60):
            while not self.replies:
                await asyncio.sleep(0.002)
        return self.replies[0]


def _fatal(error: BaseException) -> NoReturn:
    raise error


class _Loopback:
    """A channel to a shard of this process."""

    def __init__(self, cluster: Cluster, shard_id: str) -> None:
        self._cluster = cluster
        self._shard_id = shard_id

    def request(self, request: Pull | Freeze) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._ask(request))

    async def _ask(self, request: Pull | Freeze) -> Any:
        await self._cluster.before_message(request)
        reply = await self._cluster.ask(self._shard_id, request)
        await self._cluster.after_message(request)
        return reply


class _Peers:
    def __init__(self, cluster: Cluster, shard_id: str) -> None:
        self._cluster = cluster
        self._shard_id = shard_id

    @property
    def cluster_map(self) -> ClusterMap:
        cluster_map = self._cluster.stores[self._shard_id].cluster_map
        assert cluster_map is not None
        return cluster_map

    def channel(self, shard_id: str) -> _Loopback:
        return _Loopback(self._cluster, shard_id)


async def nothing(_: Any) -> None:
    """Happens between two messages, unless a test says otherwise."""


class Cluster:
    """`map` is the newest map, which a shard has when it was told."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self._folder = folder
        self._limits = Limits(**{**_SMALL, **limits})
        self.stores: dict[str, Store] = {}
        self._services: dict[str, ShardService] = {}
        self._receivers: dict[str, Receiver] = {}
        self._count = 0
        self.map = map_of([], cluster_id="c", epoch=1, partitions=PARTITIONS, owners=[0] * PARTITIONS)
        self.before_message: Callable[[Any], Awaitable[None]] = nothing
        self.after_message: Callable[[Any], Awaitable[None]] = nothing

    async def start(self, shard_id: str) -> None:
        path = self._folder / f"{shard_id}.db"
        store = await Store.open(path, self._limits, shard_id, PARTITIONS, _fatal)
        receiver = Receiver(shard_id, store, _Peers(self, shard_id), self._limits)  # type: ignore[arg-type]
        self.stores[shard_id], self._receivers[shard_id] = store, receiver
        self._services[shard_id] = ShardService(shard_id, store, receiver, self._limits)

    async def stop(self, shard_id: str) -> None:
        await self._receivers[shard_id].close()
        await self.stores.pop(shard_id).close()

    async def restart(self, shard_id: str) -> None:
        """An orderly end: what a killed process leaves in its file is the same, or less by what no client was told."""
        await self.stop(shard_id)
        await self.start(shard_id)

    # --- the controller's part ----------------------------------------------------------------------------------------

    async def form(self) -> None:
        for shard_id in IDS:
            await self.start(shard_id)
        homes = [
            at_home(shard_id, f"http://{shard_id}", store.identity.store_id, copy_id=store.copy_id)
            for shard_id, store in self.stores.items()
        ]
        self.map = map_of(homes, cluster_id="c", epoch=1, partitions=PARTITIONS, owners=[0] * PARTITIONS)
        await self.spread()

    async def spread(self, *shard_ids: str) -> None:
        for shard_id in shard_ids or IDS:
            await self._services[shard_id].follow(self.map)

    def plan(self, *keys: str, to: str = "s2", spare: Iterable[int] = ()) -> str:
        """A move of the partitions of these keys, in the next map, that no process has yet; its id."""
        self._count += 1
        source = next(shard_id for shard_id in IDS if shard_id != to)
        partitions = sorted({*map(at, keys), *spare})
        move = Move(id=f"move-{self._count}", source=source, to=to, partitions=partitions)
        self._next(moves=[*self.map.moves, move])
        return move.id

    def void(self, move_id: str) -> None:
        self._next(moves=[move for move in self.map.moves if move.id != move_id])

    def commit(self, move_id: str) -> None:
        move = next(move for move in self.map.moves if move.id == move_id)
        owner = IDS.index(move.to)
        owners = [owner if partition in move.partitions else old for partition, old in enumerate(self.map.owners)]
        self._next(owners=owners, moves=[other for other in self.map.moves if other.id != move_id])

    def _next(self, **changes: Any) -> None:
        self.map = msgspec.structs.replace(self.map, epoch=self.map.epoch + 1, **changes)

    async def progress(self, move_id: str, to: str = "s2") -> Progress:
        """How far the move is; it is begun, if it was not."""
        return await self._receivers[to].receive(Receive(0, move_id))

    async def carry(self, move_id: str, to: str = "s2") -> Progress:
        """Until the destination says that it is done, or has failed."""
        seen = ""
        async with asyncio.timeout(20):
            while True:
                progress: Progress = await self._receivers[to].receive(Receive(0, move_id, seen))
                if progress.step in ("done", "failed"):
                    return progress
                seen = progress.step

    async def move(self, *keys: str, to: str = "s2", spare: Iterable[int] = ()) -> None:
        """All of it."""
        move_id = self.plan(*keys, to=to, spare=spare)
        await self.spread()
        progress = await self.carry(move_id, to)
        assert progress.step == "done", progress.detail
        self.commit(move_id)
        await self.spread(to, next(shard_id for shard_id in IDS if shard_id != to))

    # --- clients ------------------------------------------------------------------------------------------------------

    def begin(self, shard_id: str, request: Any) -> Sink:
        sink = Sink()
        self._services[shard_id].handle(request, sink)
        return sink

    async def ask(self, shard_id: str, request: Any) -> Any:
        return await self.begin(shard_id, request).reply()

    async def value(self, shard_id: str, key: str) -> bytes | int | None:
        """The value; None if there is no such key; 421 if the shard does not answer for it."""
        answer = await self.ask(shard_id, Get(1, key))
        if answer.status == 421:
            return 421
        return answer.value if answer.status == 200 else None

    def owner(self, key: str) -> str:
        return IDS[self.map.owners[at(key)]]


@asynccontextmanager
async def cluster_of_two(folder: Path, **limits: Any) -> AsyncIterator[Cluster]:
    """s1 owns everything."""
    cluster = Cluster(folder, **limits)
    await cluster.form()
    try:
        yield cluster
    finally:
        for shard_id in list(cluster.stores):
            await cluster.stop(shard_id)


def rows(folder: Path, shard_id: str) -> dict[tuple[str, str], bytes | None]:
    """All that is in the file of that shard: bodies, by kind and key."""
    with closing(sqlite3.connect(folder / f"{shard_id}.db")) as connection:
        return {(kind, key): body for kind, key, body in connection.execute("SELECT kind, key, body FROM rows")}


async def trimmed(folder: Path, shard_id: str, *keys: str) -> None:
    """Wait until none of these keys is in the file of that shard."""
    async with asyncio.timeout(60):
        while {key for _, key in rows(folder, shard_id)} & set(keys):
            await asyncio.sleep(0.01)
