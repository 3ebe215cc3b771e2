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

from kvstore.config import Limits
from loadtest.simulate.invariants import Invariants
from loadtest.simulate.kill_points import KillPoints
from loadtest.simulate.loop import Killed, Process, SimulatedLoop
from loadtest.simulate.network import Network
from loadtest.simulate.node import NodeServer
from loadtest.simulate.servers import ControllerServer, RouterServer, Server
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.view import LostDisks, View

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
    snapshot_busy_share=0.1,
    snapshot_page_rows_max=40,
    expiry_sweep_s=1.5,
    down_out_s=4.0,
)
_RESTART_S = (0.01, 0.6)
_LOOK_S = 0.2


class Cluster:
    """`faults`: how often each kind came."""

    def __init__(self, loop: SimulatedLoop, seed: int, replicas: int = 1) -> None:
        self.loop = loop
        self.seed = seed
        self.network = Network(loop, self.random("network"))
        self.faults: Counter[str] = Counter()
        self.kill_points = KillPoints(loop, self.faults)
        self.failed: asyncio.Future[None] = loop.create_future()
        self._made = 0
        first = [f"s{number}" for number in range(1, SHARDS + 1)]
        self.controller = ControllerServer(self.network, self.random("controller"), LIMITS, self.found, first, replicas)
        self.routers = [self._router(f"r{number}") for number in range(1, ROUTERS + 1)]
        self.nodes: dict[str, NodeServer] = {}
        self.view = View(self.nodes, lambda: self.controller.register.stored.document, replicas, self.controller)
        self.lost_disks = LostDisks(self.view)
        self.invariants = Invariants(self.view)
        for name in first:
            self._add_node(name)

    def random(self, name: str) -> random.Random:
        """A generator of its own for each name."""
        return random.Random(f"{self.seed} {name}")

    def _router(self, name: str) -> RouterServer:
        return RouterServer(name, self.network, self.random(name), LIMITS, self.found)

    def _add_node(self, name: str) -> NodeServer:
        self._made += 1  # one that comes back with another disk is not who it was
        node = NodeServer(name, self.network, self.random(f"{name} {self._made}"), LIMITS, self.found)
        node.is_removed = lambda: self.view.map is not None and not self.view.is_member(name)
        self.nodes[name] = node
        return node

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
                self.invariants.owners.process_ended(server.name)
                server.start()

    def lose_disk(self, node: NodeServer) -> None:
        self.lost_disks.add()
        node.lose_disk()
        self.invariants.disk_gone(node.name)

    def bring_back(self, node: NodeServer) -> None:
        """It was to stay dead, and is to run again."""
        node.wanted = True
        self.loop.create_task(self._keep(node))

    def add_shard(self) -> str | None:
        """A new one, with an empty disk, which asks to join; None if there are enough."""
        for number in range(1, SHARDS_MAX + 1):
            name = f"s{number}"
            if name not in self.nodes:
                node = self._add_node(name)
                node.may_join = True
                self.loop.create_task(self._keep(node))
                return name
        return None

    async def _end_removed(self) -> None:
        """What a launcher does with nodes that are members no more: one without a shard may keep copies of others."""
        members: list[str] = []
        epoch = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            cluster_map = self.view.map
            if cluster_map is None or cluster_map.epoch < epoch:
                continue  # it was lost, or is that of an old copy
            epoch = cluster_map.epoch
            for name in members:
                if not self.view.is_member(name):
                    self.loop.create_task(self._end(name))
            members = [node.id for node in cluster_map.nodes]

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

    def check(self, process: Process) -> None:
        """After every event of a process. Raises Violation."""
        if process.name == self.controller.name:
            self.invariants.maps.check()
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
