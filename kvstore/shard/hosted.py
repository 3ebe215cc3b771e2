"""The stores that a node serves: its own shard's, and those of shards whose primary it is for another home.

Owns: one store with all that belongs to it (peers, moves, recovery, the number that it has told, the maps that it
follows); which copies that lie here are served; the folder in which they lie.
Promises: a copy that no durable map names as primary on this node is left alone. What one store cannot survive ends the
process, and with it all of its stores.
Leaves to others: the order of opening (`node`), HTTP (`app`), requests (`service`), the store (`store.store`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiohttp

from kvstore.config import Limits
from kvstore.metrics import StoreLabels
from kvstore.placement.cluster_map import ClusterMap
from kvstore.shard.peers import Peers
from kvstore.shard.receiver import Receiver
from kvstore.shard.recovery import Recovery
from kvstore.shard.service import ShardService
from kvstore.shard.told import ToldNumbers
from kvstore.storage.engine import TryLater
from kvstore.store.opening import ToldNumber, store_path
from kvstore.store.store import Store
from kvstore.store.tables import OnFatal
from kvstore.transport.sessions import ClusterSession

log = logging.getLogger(__name__)

_RETRY_S = 0.5


class Folder(Protocol):
    """Where the files of a node lie."""

    def copies(self) -> list[str]:
        """The shards of other homes of which a copy lies there, in order."""

    async def open(self, shard_id: str, partitions: int, told: ToldNumber) -> Store:
        """Open or make the node's copy of that shard's store. Raises what `Store.open` raises."""


class FileFolder:
    """A folder of the file system. `on_fatal`: what ends the process when a store cannot go on."""

    def __init__(self, data_dir: Path, node_id: str, limits: Limits, on_fatal: OnFatal) -> None:
        self._data_dir = data_dir
        self._node_id = node_id
        self._limits = limits
        self._on_fatal = on_fatal

    def copies(self) -> list[str]:
        return copies_in([path.name for path in self._data_dir.iterdir()], self._node_id)

    async def open(self, shard_id: str, partitions: int, told: ToldNumber) -> Store:
        path = store_path(self._data_dir, shard_id, self._node_id)
        return await Store.open(path, self._limits, shard_id, partitions, self._on_fatal, told=told)


class Surroundings(NamedTuple):
    """What the stores of a node share."""

    node_id: str
    folder: Folder
    limits: Limits
    session: aiohttp.ClientSession
    cluster: ClusterSession
    controller_url: str


class HostedStore(NamedTuple):
    """One store, served."""

    store: Store
    service: ShardService
    told: ToldNumbers
    recovery: Recovery
    maps: Maps

    @property
    def shard_id(self) -> str:
        return self.service.shard_id

    def labels(self, node_id: str) -> StoreLabels:
        """Of its metrics."""
        return StoreLabels(node_id, self.shard_id, "primary")

    def works(self) -> list[Coroutine[Any, Any, Any]]:
        """What goes on for ever while it is served."""
        return [self.told.run(self.store), self.recovery.run(), self.maps.follow()]

    async def end(self) -> None:
        """In order, before the process does."""
        await self.service.farewell()
        await self.told.tell(self.store)


async def open_hosted(
    shard_id: str, partitions: int, surroundings: Surroundings, at_the_end: AsyncExitStack
) -> HostedStore:
    """Open that shard's store on this node; closed by `at_the_end`. Raises what `Store.open` raises."""
    _, folder, limits, session, cluster, controller_url = surroundings
    told = ToldNumbers(session, controller_url, limits)
    store = await folder.open(shard_id, partitions, told.at_opening)
    at_the_end.push_async_callback(store.close)
    peers = Peers(store, limits, session, cluster)
    at_the_end.push_async_callback(peers.close)
    receiver = Receiver(shard_id, store, peers, limits)
    at_the_end.push_async_callback(receiver.close)
    recovery = Recovery(shard_id, store, peers, limits)
    at_the_end.push_async_callback(recovery.close)
    service = ShardService(shard_id, store, receiver, limits, told)
    return HostedStore(store, service, told, recovery, Maps(service))


async def open_copies(partitions: int, surroundings: Surroundings, at_the_end: AsyncExitStack) -> list[HostedStore]:
    """Open the stores of other homes that lie here, and whose durable map names this very copy as primary."""
    found = []
    for shard_id in surroundings.folder.copies():
        async with AsyncExitStack() as unless_served:
            hosted = await open_hosted(shard_id, partitions, surroundings, unless_served)
            if is_primary(hosted.store, shard_id, surroundings.node_id):
                found.append(hosted)
                at_the_end.push_async_callback(unless_served.pop_all().aclose)
            else:
                log.warning("%s is no primary: it is left alone", hosted.store.path)
    return found


def copies_in(names: Iterable[str], node_id: str) -> list[str]:
    """The shards of other homes of which one of the files with these names is a copy of that node's, in order."""
    begin, end = "shard-", f".copy-{node_id}.db"
    found = [name for name in names if name.startswith(begin) and name.endswith(end)]
    return sorted(name.removeprefix(begin).removesuffix(end) for name in found)


def is_primary(store: Store, shard_id: str, node_id: str) -> bool:
    """The store's own map says that this copy, on that node, answers for the shard."""
    shard = store.cluster_map.shard(shard_id) if store.cluster_map is not None else None
    return shard is not None and (shard.primary.node, shard.primary.copy_id) == (node_id, store.copy_id)


class Maps:
    """Follows the newest map that has come, one at a time."""

    def __init__(self, service: ShardService) -> None:
        self._service = service
        self._newest: asyncio.Queue[ClusterMap] = asyncio.Queue(maxsize=1)

    def put(self, cluster_map: ClusterMap) -> None:
        while not self._newest.empty():
            self._newest.get_nowait()
        self._newest.put_nowait(cluster_map)

    async def follow(self) -> None:
        """Raises ForeignData: then this shard must not serve."""
        while True:
            cluster_map = await self._newest.get()
            try:
                await self._service.follow(cluster_map)
            except TryLater as error:
                log.warning("the map of epoch %d waits: %s", cluster_map.epoch, error.detail)
                await asyncio.sleep(_RETRY_S)
                if self._newest.empty():
                    self._newest.put_nowait(cluster_map)
