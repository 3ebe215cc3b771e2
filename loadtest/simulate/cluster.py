"""A simulated cluster: routers, nodes, a controller, and their network.

Owns: which servers there are, starting each again when it has ended.
Promises: every server draws from a generator of random numbers of its own, so that one fault more or less does not
change what the others draw.
Leaves to others: the servers (`servers`), what must hold after each event (`invariants`), faults (`cluster_faults`),
clients (`cluster_clients`).
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
from kvstore.shard.resident import Resident
from loadtest.simulate.invariants import Invariants
from loadtest.simulate.loop import Killed, Process, SimulatedLoop, running_process
from loadtest.simulate.machine import Violation
from loadtest.simulate.network import Network
from loadtest.simulate.node import NodeServer
from loadtest.simulate.servers import ControllerServer, RouterServer, Server

SHARDS, ROUTERS = 4, 2
SHARDS_MAX = 6
LIMITS = Limits(
    log_segment_bytes=48 * 1024,
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
    move_freeze_timeout_s=1.0,
    compare_every_s=3.0,
    snapshot_share=0.1,
    snapshot_page_rows_max=5,
    expiry_sweep_s=1.5,
    down_out_s=4.0,
)
_RESTART_S = (0.01, 0.6)
_LOOK_S = 0.2


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
        self._lost = 0  # disks, since all was copied
        self.kill_at: dict[str, int] = {}  # at the n-th time of that failpoint
        first = [f"s{number}" for number in range(1, SHARDS + 1)]
        self._document: bytes | None = None
        self._map: ClusterMap | None = None  # that is in the document
        self.controller = ControllerServer(self.network, self.random("controller"), LIMITS, self.found, first, replicas)
        self.routers = [self._router(f"r{number}") for number in range(1, ROUTERS + 1)]
        self.nodes = {name: self._node(name) for name in first}
        self._members: dict[str, None] = {}
        self.invariants = Invariants(self.nodes, lambda: self.stored_map)

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
        return cluster_map is not None and cluster_map.node(name) is None

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
                self.invariants.process_ended(server.name)
                server.start()

    @property
    def stored_map(self) -> ClusterMap | None:
        """As the controller's store has it now."""
        document = self.controller.register.stored.document
        if document is not self._document:
            self._document = document
            self._map = msgspec.json.decode(document, type=ClusterState).map if document is not None else None
        return self._map

    def may_lose_a_disk(self) -> bool:
        """Whether fewer disks than there are copies would be lost since all was copied."""
        return self.disks_lost() < self._wanted() - 1 and (self._lost > 0 or self.is_whole())

    def disks_lost(self) -> int:
        """Since all was copied."""
        self._lost *= not self.is_whole()
        return self._lost

    def lose_disk(self, node: NodeServer) -> None:
        self._lost += 1
        node.lose_disk()
        self.invariants.disk_gone(node.name)

    def is_whole(self) -> bool:
        """Whether each shard has as many copies in sync as it is to have.
        On disks of processes that run."""
        cluster_map, wanted = self.stored_map, self._wanted()
        if cluster_map is None:
            return False
        for shard in cluster_map.shards:
            in_sync = [(each.node, each.copy_id) for each in shard.replicas if each.state == "in-sync"]
            places = [(shard.primary.node, shard.primary.copy_id), *in_sync]
            if len(places) < wanted or not all(self.has(node, shard.id, copy_id) for node, copy_id in places):
                return False
        return True

    def _wanted(self) -> int:
        """How many copies of each shard there are to be, on the nodes that there are."""
        cluster_map = self.stored_map
        nodes = cluster_map.nodes if cluster_map is not None else []
        return min(self.controller.config.replicas, sum(not node.given_up for node in nodes))

    def has(self, node: str, shard_id: str, copy_id: str) -> bool:
        """Whether the process of that node runs, and has that copy."""
        resident = self.resident(node, shard_id)
        return resident is not None and resident.copy_id == copy_id

    def resident(self, node: str, shard_id: str) -> Resident | None:
        """The store of that shard in the process of that node, if it runs and has it."""
        return self.invariants.resident(node, shard_id)

    def bring_back(self, node: NodeServer) -> None:
        """It was to stay dead, and is to run again."""
        node.wanted = True
        self.loop.create_task(self._keep(node))

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
        """What a launcher does with nodes that are members no more: one without a shard may keep copies of others."""
        while True:
            await asyncio.sleep(_LOOK_S)
            cluster_map = self.stored_map
            if cluster_map is None:
                continue
            present = {node.id: None for node in cluster_map.nodes}
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
        self.invariants.disk_gone(name)
        del self.nodes[name]
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
        if process.name == self.controller.name:
            self.invariants.check_map()
            return
        server = self.nodes.get(process.name)
        if server is not None and server.node is not None and server.process is process:
            self.invariants.check(server)


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
