"""A simulated cluster: routers, nodes, a controller, their network, and what must hold after each of their events.

Owns: which servers there are, starting each again when it has ended, the invariants that are cheap to look at.
Promises: every server draws from a generator of random numbers of its own, so that one fault more or less does not
change what the others draw.
Leaves to others: the servers (`servers`), faults (`cluster_faults`), clients (`cluster_clients`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections import Counter
from collections.abc import Iterator

import msgspec

from kvstore.config import Limits
from kvstore.controller.membership import ClusterState
from kvstore.placement.cluster_map import ClusterMap
from kvstore.store.store import Store
from loadtest.simulate.loop import Killed, Process, SimulatedLoop, running_process
from loadtest.simulate.machine import Violation
from loadtest.simulate.network import Network
from loadtest.simulate.node import NodeServer
from loadtest.simulate.servers import ControllerServer, RouterServer, Server

SHARDS, ROUTERS = 4, 2
SHARDS_MAX = 6
LIMITS = Limits(
    log_segment_bytes=160 * 1024,
    disk_reserve_bytes=200 * 1024,
    cache_bytes_max=4000,
    page_bytes_max=4000,
    apply_rows=20,
    unapplied_rows_max=200,
    unapplied_bytes_max=100_000,
    tombstone_kept_s=2.0,
    txn_timeout_s=2.0,
    batch_ops_max=16,
    request_timeout_s=4.0,
    reroute_timeout_s=4.0,
    reconnect_wait_s_max=0.5,
    map_poll_s=3.0,
    told_every_s=2.0,
    told_timeout_s=1.0,
    move_group_keys_max=40,
    move_page_rows_max=20,
    move_fence_timeout_s=1.0,
    expiry_sweep_s=1.5,
)
_RESTART_S = (0.01, 0.6)
_LOOK_S = 0.2

Copy = tuple[str, str]  # node and shard


class Cluster:
    """`faults`: how often each kind came; `points`: how often each failpoint was hit."""

    def __init__(self, loop: SimulatedLoop, seed: int, replicas: int = 1) -> None:
        self.loop = loop
        self.seed = seed
        self.network = Network(loop, self.random("network"))
        self.faults: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.failed: asyncio.Future[None] = loop.create_future()
        self._made = 0
        self.kill_at: dict[str, int] = {}  # at the n-th time of that failpoint
        first = [f"s{number}" for number in range(1, SHARDS + 1)]
        self.controller = ControllerServer(self.network, self.random("controller"), LIMITS, self.found, first, replicas)
        self.routers = [self._router(f"r{number}") for number in range(1, ROUTERS + 1)]
        self.nodes = {name: self._node(name) for name in first}
        self._members: dict[str, None] = {}
        self._serving: dict[int, Copy] = {}
        self._looked_at: dict[Copy, object] = {}
        self._terms: dict[tuple[str, int], str] = {}  # the copy that served a store in that term
        self._floors: dict[Copy, tuple[int, int, int]] = {}  # what each copy's clocks have shown

    def random(self, name: str) -> random.Random:
        """A generator of its own for each name."""
        return random.Random(f"{self.seed} {name}")

    def _router(self, name: str) -> RouterServer:
        return RouterServer(name, self.network, self.random(name), LIMITS, self.found)

    def _node(self, name: str) -> NodeServer:
        self._made += 1  # one that comes back with another disk is not who it was
        node = NodeServer(name, self.network, self.random(f"{name} {self._made}"), LIMITS, self.found)
        node.is_removed = lambda: self._is_removed(name)
        return node

    def _is_removed(self, name: str) -> bool:
        cluster_map = self.stored_map
        return cluster_map is not None and cluster_map.shard(name) is None

    @property
    def servers(self) -> Iterator[Server]:
        yield self.controller
        yield from self.routers
        yield from self.nodes.values()

    def found(self, error: BaseException) -> None:
        """The simulation ends with this finding."""
        if not self.failed.done():
            said = "".join(traceback.format_exception(error))
            self.failed.set_exception(error if isinstance(error, Violation) else RuntimeError(said))

    # --- starting and ending ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start all, and again whenever one has ended. For ever."""
        tasks = [self.loop.create_task(self._keep(server)) for server in list(self.servers)]
        tasks.append(self.loop.create_task(self._end_removed()))
        await asyncio.gather(*tasks)

    async def _keep(self, server: Server) -> None:
        rng = self.random(f"keep {server.name}")
        while True:
            await server.gone.wait()
            if isinstance(server, NodeServer) and server.is_over:
                await self._end(server.name)
            if not server.wanted:
                return
            await asyncio.sleep(rng.uniform(*_RESTART_S))
            if server.wanted and server.gone.is_set():
                self._unserve(server.name)
                server.start()

    @property
    def stored_map(self) -> ClusterMap | None:
        """As the controller's store has it now."""
        document = self.controller.register.stored.document
        return msgspec.json.decode(document, type=ClusterState).map if document is not None else None

    def add_shard(self) -> str | None:
        """A new one, with an empty disk, which asks to join; None if there are enough."""
        for number in range(1, SHARDS_MAX + 1):
            name = f"s{number}"
            if name not in self.nodes:
                node = self.nodes[name] = self._node(name)
                node.may_join = True
                self.loop.create_task(self._keep(node))
                return name
        return None

    async def _end_removed(self) -> None:
        """What a launcher does with those that are members no more."""
        while True:
            await asyncio.sleep(_LOOK_S)
            cluster_map = self.stored_map
            if cluster_map is None:
                continue
            present = {shard.id: None for shard in cluster_map.shards}
            for name in [name for name in self._members if name not in present]:
                self.loop.create_task(self._end(name))
            self._members = present

    async def _end(self, name: str) -> None:
        node = self.nodes.get(name)
        if node is None:
            return
        node.wanted = False
        node.stop()
        while node.is_alive:
            await asyncio.sleep(_LOOK_S)
            node.stop()
        if self.nodes.get(name) is not node:
            return  # it was ended twice
        self._unserve(name)
        del self.nodes[name]
        for copy in [copy for copy in self._floors if copy[0] == name]:
            del self._floors[copy]
        self.loop.note(f"{name} has left")

    # --- what must always hold ----------------------------------------------------------------------------------------

    def hit(self, names: tuple[str, ...]) -> None:
        """The running process is at these failpoints. Raises Killed."""
        self.points.update(names)
        if not self.kill_at:
            return
        process = running_process()
        for name in names:
            left = self.kill_at.get(name)
            if left is None or process is None:
                continue
            self.kill_at[name] = left - 1
            if left <= 1:
                del self.kill_at[name]
                self.faults["killed at a failpoint"] += 1
                self.loop.note(f"{process.name} is killed at {name}")
                process.kill()
                raise Killed

    def check(self, process: Process) -> None:
        """After every event of a process. Raises Violation."""
        server = self.nodes.get(process.name)
        if server is None or server.node is None or server.process is not process:
            return
        for hosted in server.node.stores.served:
            copy = server.name, hosted.shard_id
            self._check_store(copy, hosted.store)
            served = hosted.store.served
            if hosted.is_open and served is not self._looked_at.get(copy) and hosted.store.tables.may_answer():
                self._looked_at[copy] = served
                self._note_served(copy, hosted.store)

    def _check_store(self, copy: Copy, store: Store) -> None:
        log = store.tables.log
        applied, visible = store.tables.engine.applied.position.number, store.applier.visible
        if not applied <= visible <= log.durable <= log.last.number:
            order = f"applied {applied}, visible {visible}, durable {log.durable}, last {log.last.number}"
            raise Violation(f"{' of '.join(copy)}: {order}")
        clock = store.clock
        now, before = (clock.version, clock.sequence, clock.attempts_floor), self._floors.get(copy)
        if now != before:
            if before is not None and any(after < early for after, early in zip(now, before, strict=True)):
                raise Violation(f"{' of '.join(copy)}: version, sequence, floor went from {before} to {now}")
            self._floors[copy] = now

    def note_term(self, store_id: str, term: int, copy_id: str) -> None:
        """That copy serves in that term: no other one ever did. Raises Violation."""
        first = self._terms.setdefault((store_id, term), copy_id)
        if first != copy_id:
            raise Violation(f"copy {copy_id} of store {store_id} serves in term {term}, in which copy {first} has")

    def _note_served(self, copy: Copy, store: Store) -> None:
        """One owner per partition, one primary per term, of those that may answer. Raises Violation."""
        shard = store.cluster_map.shard(copy[1]) if store.cluster_map is not None else None
        if shard is not None:
            self.note_term(store.identity.store_id, shard.term, store.copy_id)
        self._serving = {partition: owner for partition, owner in self._serving.items() if owner != copy}
        for partition, generation in enumerate(store.served.generations):
            if not generation or partition in store.served.frozen:
                continue
            other = self._serving.setdefault(partition, copy)
            if other != copy:
                if self._answers(other):
                    both = f"{' of '.join(other)} and by {' of '.join(copy)}"
                    raise Violation(f"partition {partition} is served by {both}")
                self._looked_at.pop(other, None)  # it is looked at once more if it may answer again
            self._serving[partition] = copy

    def _answers(self, copy: Copy) -> bool:
        """Whether that copy may answer now: it is a primary that holds its lease."""
        server = self.nodes[copy[0]]
        if not server.is_alive or server.node is None:
            return False
        found = [each for each in server.node.stores.served if each.shard_id == copy[1]]
        return any(each.is_open and each.store.tables.may_answer() for each in found)

    def _unserve(self, name: str) -> None:
        """The process of that node has ended."""
        self._serving = {partition: owner for partition, owner in self._serving.items() if owner[0] != name}
        self._looked_at = {copy: served for copy, served in self._looked_at.items() if copy[0] != name}


class Errors(logging.Handler):
    """What a process says of an error that it did not expect is a finding."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(logging.ERROR)
        self._cluster = cluster

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, Killed):
            self._cluster.found(error)
        elif "as before" in record.getMessage():
            self._cluster.found(RuntimeError(record.getMessage()))
