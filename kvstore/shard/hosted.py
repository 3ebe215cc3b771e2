"""A store that a node serves.
Its own shard's, or that of a shard whose primary it is for another home.

Owns: one store with all that belongs to it: peers, moves, recovery, the number that it has told, the maps that it
follows.
Promises: what one store cannot survive ends the process, and with it all of its stores.
Leaves to others: whether it is served (`resident`), HTTP (`app`), requests (`service`), the store (`store.store`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple

import aiohttp

from kvstore.config import Limits
from kvstore.environment import Environment, to_its_end
from kvstore.metrics import StoreLabels
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.beats import GiveBack
from kvstore.replication.configuration import Configuration, Request
from kvstore.replication.session import Session
from kvstore.replication.snapshot_pace import never_busy
from kvstore.replication.stalls import no_syncs
from kvstore.replication.wire import Connect, Wire, WireLost
from kvstore.shard.folder import Folder
from kvstore.shard.peers import Peers
from kvstore.shard.receiver import Receiver
from kvstore.shard.recovery import Recovery
from kvstore.shard.service import ShardService
from kvstore.shard.told import ToldNumbers
from kvstore.storage.engine import TryLater
from kvstore.store.copy_place import CopyFiles, times_of
from kvstore.store.opening import Opened
from kvstore.store.replicas import Replicating
from kvstore.store.store import Store
from kvstore.store.tables import OnFatal
from kvstore.transport.sessions import ClusterSession

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_GIVE_BACK_S = 1.0


Dial = Callable[[str, Session], Awaitable[Wire]]


def _nothing() -> None:
    """The answer is discarded."""


async def _nowhere(node_id: str, session: Session) -> Wire:
    raise WireLost("this node has no map yet")


class Surroundings(NamedTuple):
    """What the stores of a node share. `on_fatal`: what ends the process. `dial`: connects to a copy at an address.

    `on_news`: the controller is to hear of something soon. `connect`: connects to a copy on a node of the newest map.
    `is_busy`: whether clients are at work in a store that is served on this node; `syncs`: those of all logs of it that
    are under way.
    """

    node_id: str
    folder: Folder
    limits: Limits
    session: aiohttp.ClientSession
    cluster: ClusterSession
    controller_url: str
    on_fatal: OnFatal
    environment: Environment
    dial: Dial
    on_news: Callable[[], None] = _nothing
    connect: Connect = _nowhere
    is_busy: Callable[[], bool] = never_busy
    syncs: Callable[[], frozenset[object]] = no_syncs


class StoreEnd:
    """How a served store ends. `keeps_files`: they are left open, for a copy."""

    def __init__(self, store: Store) -> None:
        self.keeps_files = False
        self._store = store

    async def close(self) -> None:
        """Not to be broken off: until all work of the store has ended, it uses its files."""
        await to_its_end(self._store.tables.environment, self._store.close(keeps_files=self.keeps_files))


class HostedStore:
    """One store, served once `open` has returned. `given_back`: the term whose lease it has given back."""

    def __init__(
        self, store: Store, end: StoreEnd, service: ShardService, told: ToldNumbers, recovery: Recovery, maps: Maps
    ) -> None:
        self.store = store
        self._end = end
        self.service = service
        self.told = told
        self.maps = maps
        self.is_open = False
        self.given_back = 0
        self._recovery = recovery

    @property
    def shard_id(self) -> str:
        """The shard whose store it is."""
        return self.service.shard_id

    @property
    def has_copies(self) -> bool:
        """Whether it ships to copies, or did in this term."""
        return self.store.tables.sender is not None

    @property
    def is_sound(self) -> bool:
        """Whether its file was found to be whole."""
        verification = self.store.tables.verification
        return verification.is_examined and not verification.damage

    def requests(self) -> list[Request]:
        """What the controller is asked for.

        No copy is to be taken out for a term that begins on a file that may be damaged.
        """
        sender, may_take_out = self.store.tables.sender, self.is_open or self.is_sound
        found = sender.requests() if sender is not None else ()
        return [each for each in found if may_take_out or each.kind != "out"]

    def controller_heard(self, *, decides: bool) -> None:
        """The controller has answered a beat. `decides`: it may change the map."""
        if (sender := self.store.tables.sender) is not None:
            sender.controller_heard(decides=decides)

    async def give_back(self, order: GiveBack) -> bool:
        """Give back the lease of that term, once the copy that is to take over has all.

        Returns whether it was given back.
        """
        sender = self.store.tables.sender
        if sender is None or sender.shipping.config.term != order.term:
            return False
        if not await self.store.replicas.give_back(order.copy_id, _GIVE_BACK_S):
            return False
        self.given_back = order.term
        return True

    def seal(self) -> None:
        """Take no more writes: they are refused, unexecuted."""
        self.store.tables.is_sealed = True

    @property
    def is_settled(self) -> bool:
        """Whether all writes that it took are answered, but for those that wait for a lock, unexecuted."""
        return not self.is_open or self.given_back > 0 or self.store.pipeline.is_idle

    def labels(self, node_id: str) -> StoreLabels:
        """Of its metrics."""
        return StoreLabels(node_id, self.shard_id, "primary")

    async def open(self, opens: ClusterMap | None) -> None:
        """Serve what the durable map says; `opens`: what this one says, which begins a term of the store.

        Raises ForeignData, DataCorrupt.
        """
        await self.store.partitions.restore(opens)
        self.is_open = True

    def works(self) -> list[Coroutine[Any, Any, Any]]:
        """What goes on for ever while it is served."""
        return [self.told.run(self.store), self._recovery.run(), self.maps.follow()]

    async def as_copy(self, at_the_end: AsyncExitStack, folder: Folder, config: Configuration | None) -> CopyFiles:
        """End what `at_the_end` closes but for the files, which are a copy's from now on.

        `config`: of the newest map. Another primary is about to ask for its term, which is promised meanwhile.
        Raises OSError.
        """
        store = self.store
        self._end.keeps_files = True
        promising = store.tables.environment.spawn(self._promise(config))
        try:
            await at_the_end.aclose()
            await promising
            files = store.opened._replace(is_examined=store.tables.verification.is_examined)
            return await folder.as_copy(self.shard_id, files, store.cluster_map)
        except BaseException:
            promising.cancel()
            await store.opened.close()
            raise

    async def _promise(self, config: Configuration | None) -> None:
        """On a disk without room, it is once the primary asks.
        A term that is to be opened here is promised with that."""
        store, copy_file = self.store, self.store.opened.copy_file
        if config is None or copy_file is None or config.store_id != store.identity.store_id:
            return
        if config.primary.copy_id == store.copy_id:
            return
        if config.term > copy_file.identity.promised:
            with suppress(TryLater):
                await store.promise(config.term)

    async def end(self) -> None:
        """In order, before the process does."""
        await self.service.farewell()
        await self.told.tell(self.store)


async def host(
    opened: Opened, shard_id: str, around: Surroundings, told: ToldNumbers, at_the_end: AsyncExitStack, start: str
) -> HostedStore:
    """What belongs to a served store, which has these files from now on; closed by `at_the_end`.

    `start`: a random id of this opening of the store.
    """
    limits, session, cluster = around.limits, around.session, around.cluster
    times = times_of(limits)
    replicating = Replicating(
        around.node_id, start, around.connect, times, around.on_news, around.is_busy, around.syncs
    )
    store = Store(opened, limits, around.environment, around.on_fatal, replicating)
    store.begin()
    end = StoreEnd(store)
    at_the_end.push_async_callback(end.close)
    peers = Peers(store, limits, session, cluster)
    at_the_end.push_async_callback(peers.close)
    receiver = Receiver(shard_id, store, peers, limits)
    at_the_end.push_async_callback(receiver.close)
    recovery = Recovery(shard_id, store, peers, limits)
    at_the_end.push_async_callback(recovery.close)
    service = ShardService(shard_id, store, receiver, limits, told)
    return HostedStore(store, end, service, told, recovery, Maps(service))


class Maps:
    """Follows the newest map that has come, one at a time."""

    def __init__(self, service: ShardService) -> None:
        self._service = service
        self._newest: asyncio.Queue[ClusterMap] = asyncio.Queue(maxsize=1)

    def put(self, cluster_map: ClusterMap) -> None:
        """A newer map has come: it is heard now, and followed when those before it are."""
        self._service.hear(cluster_map)  # now: the one before it may wait for a copy that is out by this one
        while not self._newest.empty():
            self._newest.get_nowait()
        self._newest.put_nowait(cluster_map)

    async def follow(self) -> None:
        """Follow the maps that come, for ever. Raises ForeignData: then this shard must not serve."""
        while True:
            cluster_map = await self._newest.get()
            try:
                await self._service.follow(cluster_map)
            except TryLater as error:
                log.warning("the map of epoch %d waits: %s", cluster_map.epoch, error.detail)
                await asyncio.sleep(_RETRY_S)
                if self._newest.empty():
                    self._newest.put_nowait(cluster_map)
