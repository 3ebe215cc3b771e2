"""A primary's log, engine and sender, and nodes with copies, over connections that can be cut and held up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from kvstore.environment import Environment
from kvstore.replication import messages, shipping
from kvstore.replication.configuration import Configuration, Primary, Replica
from kvstore.replication.copy import StoreCopy
from kvstore.replication.copy_link import Surroundings
from kvstore.replication.files import make_copy
from kvstore.replication.places import Times
from kvstore.replication.sender import Sender
from kvstore.replication.serving import serve_copy
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost
from kvstore.storage.engine import Identity
from kvstore.storage.log import Log
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.replay import replay
from kvstore.storage.rows import VALUE, Clock, Row
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import FOLDER, STORE_ID, Node
from tests.unit.waiting import until

T = TypeVar("T")
TIMES = Times(lease_s=0.8, disk_stall_s=2.0, replica_timeout_s=0.2, failover_after_s=5.0)


class Inline(Environment):
    """The machine, but without threads, since a simulated disk is for one."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = 0

    async def in_thread(self, function: Callable[[], T]) -> T:
        self.hops += 1
        await asyncio.sleep(0)
        return function()


class QueueWire:
    """One end of a connection in memory; what is sent is encoded and decoded, as on a socket."""

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.other: QueueWire
        self.is_lost = False
        self.gate: asyncio.Event | None = None
        self._decode = decode

    async def send(self, message: Any) -> None:
        if self.is_lost:
            raise WireLost("it is cut")
        self.other.inbox.put_nowait(messages.encode(message))
        await asyncio.sleep(0)

    async def receive(self) -> Any:
        frame = await self.inbox.get()
        if self.gate is not None:
            await self.gate.wait()
        if frame is None or self.is_lost:
            self.is_lost = True
            raise WireLost("it is cut")
        return self._decode(frame)

    async def close(self) -> None:
        for end in (self, self.other):
            end.is_lost = True
            end.inbox.put_nowait(None)


class Cluster:
    """A primary's log and engine, its sender, and nodes with copies. `is_busy`: clients are at work on its node."""

    def __init__(
        self, *nodes: str, segment_bytes: int = 1 << 20, times: Times = TIMES, copy_times: Times | None = None
    ) -> None:
        """`copy_times`: of the copies, if they are others than the primary's."""
        self.environment = Inline()
        self._times = times
        self._copy_times = copy_times or times
        self.log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=segment_bytes)
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        self.copies: dict[str, StoreCopy] = {}
        self.nodes = {name: Node() for name in nodes}
        self.wires: dict[str, list[QueueWire]] = {name: [] for name in nodes}
        self.is_down: set[str] = set()
        self.committed: list[int] = []
        self.news = 0
        self.is_busy = False
        self.syncs: frozenset[object] = frozenset()  # of other logs on its node
        self.config = Configuration("s1", STORE_ID, 1, 1, Primary("n1", "primary"))
        self.sender: Sender
        self._serving: list[asyncio.Task[None]] = []

    async def connect(self, node: str, session: Session) -> Wire:
        if node in self.is_down:
            raise WireLost("the node is down")
        ours, theirs = QueueWire(messages.decode_from_copy), QueueWire(messages.decode_from_primary)
        ours.other, theirs.other = theirs, ours
        self.wires[node] += [ours, theirs]
        copy_of = self.copies.get
        served = serve_copy(theirs, lambda session: copy_of(node), self.environment)
        self._serving.append(asyncio.create_task(served))
        return ours

    async def cut(self, node: str) -> None:
        for wire in self.wires[node]:
            await wire.close()
        self.wires[node].clear()

    def hold_up(self, node: str) -> asyncio.Event:
        """What the copy sends is held up from now on, until the event is set."""
        gate = asyncio.Event()
        for wire in self.wires[node]:
            if not wire.is_lost:
                wire.gate = gate
        return gate

    def replica(self, node: str, state: Any = "joining", joined: int = 1) -> Replica:
        return Replica(node, self.copies[node].following.copy_id, state, joined)

    def put(self, key: str, value: bytes = b"value", *, sync: bool = True) -> int:
        number = self.log.last.number + 1
        record = CommitRecord(Clock(number, number), [Row(VALUE, key, number % 64, number, number, 0, value)])
        self.log.append(record.encode(), self.config.term, frees=True)
        (entry,) = self.log.entries(number - 1)
        self.sender.appended(entry)
        if sync:
            self.log.sync()
            self.sender.synced(number)
        return number

    async def apply(self) -> None:
        await replay(self.engine, list(self.log.entries(self.engine.applied.position.number)))

    def follow(self, *replicas: Replica) -> None:
        """A newer map that names these copies is heard of, then a record carries it."""
        self.config = self.config._replace(epoch=self.config.epoch + 1, replicas=replicas)
        self.sender.hear(self.config)
        self.sender.follow(self.config, self.put("map"))

    def falls_out(self, node: str) -> Replica:
        """A newer map names its copy joining, under another number."""
        fallen = self.replica(node, joined=self.config.epoch + 1)
        self.follow(fallen)
        return fallen

    async def limps_and_falls_out(self, node: str) -> Replica:
        """Its copy is connected and does not answer; the request to take it out is granted."""
        gate = self.hold_up(node)
        self.put("held up")
        await until(lambda: [each.kind for each in self.sender.requests()] == ["out"])
        fallen = self.falls_out(node)
        gate.set()
        return fallen

    def _note_news(self) -> None:
        self.news += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Cluster]:
        for name, node in self.nodes.items():
            self.copies[name] = await make_copy(node.place, STORE_ID, self.environment, self._copy_times)
        opening = self.log.append(CommitRecord(Clock()).encode(), 1)
        self.log.sync()
        state = shipping.opened(self.config, "n1", "start", opening, opening)
        self.sender = Sender(
            state,
            Surroundings(
                self.log,
                self.engine,
                self.environment,
                self.connect,
                self._times,
                self.committed.append,
                self._note_news,
                lambda: self.is_busy,
                syncs=lambda: self.syncs,
            ),
        )
        works = [
            asyncio.create_task(work) for work in (self.sender.run(), *(c.applier.run() for c in self.copies.values()))
        ]
        try:
            yield self
        finally:
            await self.sender.close()
            for task in (*works, *self._serving):
                task.cancel()
            results = await asyncio.gather(*works, *self._serving, return_exceptions=True)
            wrong = [each for each in results if isinstance(each, Exception)]
            assert not wrong, wrong

    async def in_sync(self, *nodes: str) -> None:
        """These copies join, and a map says so."""
        joined = [self.replica(node, joined=self.config.epoch + 1) for node in nodes]
        self.follow(*joined)
        await until(lambda: {each.copy_id for each in self.sender.requests()} == {each.copy_id for each in joined})
        assert {each.kind for each in self.sender.requests()} == {"in-sync"}
        self.follow(*(each._replace(state="in-sync") for each in joined))
        assert self.sender.requests() == ()
