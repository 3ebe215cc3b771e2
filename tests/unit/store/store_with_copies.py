"""A real store on a real file, whose records go to copies on simulated disks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.placement.cluster_map import ClusterMap, Replica, at_home, map_of
from kvstore.protocol import Get, Put
from kvstore.replication import lease, messages
from kvstore.replication.copy import StoreCopy
from kvstore.replication.files import Place, make_copy
from kvstore.replication.places import Times
from kvstore.replication.serving import serve_copy
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost
from kvstore.storage.engine import Engine, Identity
from kvstore.storage.memory import MemoryEngine
from kvstore.store.replicas import Replicating
from kvstore.store.store import Store
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import FOLDER
from tests.unit.replication.primary_with_copies import Inline, QueueWire
from tests.unit.store.harness import PARTITIONS, Sink, TurnedTime, asked, next_id
from tests.unit.waiting import until

TIMES = Times(lease_s=30.0, disk_stall_s=30.0, replica_timeout_s=30.0, failover_after_s=60.0)
_BEACON_S = 0.05


class Turned(TurnedTime):
    """The machine; the clock of leases can be stepped."""

    lease_step_s = 0.0

    def boottime_s(self) -> float:
        return super().boottime_s() + self.lease_step_s


def fatal(error: BaseException) -> NoReturn:
    raise error


class Primary:
    """A store of shard s1 on node s1, and copies on nodes n2, n3."""

    def __init__(self, folder: Path, times: Times = TIMES) -> None:
        self.times = times
        self.path = folder / "shard-s1.db"
        self.environment = Turned()
        self.limits = Limits(disk_reserve_bytes=1, log_segment_bytes=4 << 20, verify_share=1.0)
        self.copies: dict[str, StoreCopy] = {}
        self.wires: list[QueueWire] = []
        self.sessions: list[Session] = []
        self.news = 0
        self.epoch = 1
        self.is_closed = False
        self.store: Store
        self._tasks: list[asyncio.Task[Any]] = []

    # --- what the store is given

    async def connect(self, node: str, session: Session) -> Wire:
        if node not in self.copies:
            raise WireLost("the node is down")
        ours, theirs = QueueWire(messages.decode_from_copy), QueueWire(messages.decode_from_primary)
        ours.other, theirs.other = theirs, ours
        self.wires.append(ours)
        self.sessions.append(session)
        serving = serve_copy(theirs, lambda session: self.copies[node], Inline())
        self._tasks.append(asyncio.create_task(serving))
        return ours

    def _note_news(self) -> None:
        self.news += 1

    @property
    def replicating(self) -> Replicating:
        return Replicating("s1", "start", self.connect, self.times, self._note_news)

    async def open(self) -> Store:
        return await Store.open(
            self.path, self.limits, "s1", PARTITIONS, fatal, self.environment, replicating=self.replicating
        )

    # --- copies and maps

    async def make_copy(self, node: str) -> StoreCopy:
        identity = Identity(self.store.identity.store_id, None, "s1", PARTITIONS)

        async def empty() -> Engine:
            return MemoryEngine(identity)

        place = Place(SimulatedDisk(), FOLDER, f"shard-s1.copy-{node}", empty, empty, 1 << 20)
        copy = await make_copy(place, identity.store_id, Inline(), TIMES)
        self.copies[node] = copy
        self._tasks.append(asyncio.create_task(copy.applier.run()))
        return copy

    def replica(self, node: str, state: Any, joined: int) -> Replica:
        return Replica(node=node, copy_id=self.copies[node].following.copy_id, state=state, joined=joined)

    def map(self, *replicas: Replica, term: int = 1) -> ClusterMap:
        """The next map, with these copies."""
        self.epoch += 1
        home = at_home("s1", "http://s1", self.store.identity.store_id, copy_id=self.store.copy_id, term=term)
        shard = msgspec.structs.replace(home.shard, replicas=list(replicas))
        cluster_map = map_of([home], cluster_id="c", epoch=self.epoch, partitions=PARTITIONS, owners=[0] * PARTITIONS)
        nodes = [*cluster_map.nodes, *(msgspec.structs.replace(home.node, id=each.node) for each in replicas)]
        return msgspec.structs.replace(cluster_map, shards=[shard], nodes=nodes)

    async def in_sync(self, *nodes: str) -> list[Replica]:
        """These copies join, and a map says so."""
        joining = [self.replica(node, "joining", self.epoch + 1) for node in nodes]
        await self.store.partitions.adopt(self.map(*joining))
        sender = self.store.tables.sender
        assert sender is not None
        await until(lambda: {each.copy_id for each in sender.requests()} == {each.copy_id for each in joining})
        replicas = [msgspec.structs.replace(each, state="in-sync") for each in joining]
        await self.store.partitions.adopt(self.map(*replicas))
        await until(self.store.tables.may_answer)
        return replicas

    def hold_up(self) -> asyncio.Event:
        """What the copies answer is held up from now on, until the event is set."""
        gate = asyncio.Event()
        for wire in self.wires:
            wire.gate = gate
        return gate

    # --- operations

    def put(self, key: str, value: bytes = b"value") -> Sink:
        return asked(self.store, Put(next_id(), key, value))

    def get(self, key: str) -> Sink:
        sink = Sink()
        self.store.get(Get(next_id(), key), sink)
        return sink

    async def close(self) -> None:
        if not self.is_closed:
            await asyncio.wait_for(self.store.close(), 60)
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        wrong = [each for each in results if isinstance(each, Exception)]
        assert not wrong, wrong


@asynccontextmanager
async def primary(folder: Path, times: Times = TIMES) -> AsyncIterator[Primary]:
    """One that serves all partitions, without a copy. Leases are long, and beacons say often what is committed."""
    found = Primary(folder, times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "beacon_every_s", lambda lease_s: min(lease_s / 8, _BEACON_S))
        found.store = await found.open()
        try:
            await found.store.partitions.adopt(found.map())
            yield found
        finally:
            await found.close()
