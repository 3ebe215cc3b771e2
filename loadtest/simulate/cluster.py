"""A simulated cluster: routers, shards, a controller, their network, and what must hold after each of their events.

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
from loadtest.simulate.loop import Killed, Process, SimulatedLoop, running_process
from loadtest.simulate.machine import Violation
from loadtest.simulate.network import Network
from loadtest.simulate.servers import ControllerServer, RouterServer, Server, ShardServer

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


class Cluster:
    """`faults`: how often each kind came; `points`: how often each failpoint was hit."""

    def __init__(self, loop: SimulatedLoop, seed: int) -> None:
        self.loop = loop
        self.seed = seed
        self.network = Network(loop, self.random("network"))
        self.faults: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.failed: asyncio.Future[None] = loop.create_future()
        self._made = 0
        self.kill_at: dict[str, int] = {}  # at the n-th time of that failpoint
        first = [f"s{number}" for number in range(1, SHARDS + 1)]
        self.controller = ControllerServer(self.network, self.random("controller"), LIMITS, self.found, first)
        self.routers = [self._router(f"r{number}") for number in range(1, ROUTERS + 1)]
        self.shards = {name: self._shard(name) for name in first}
        self._members: dict[str, None] = {}
        self._serving: dict[int, str] = {}
        self._looked_at: dict[str, object] = {}

    def random(self, name: str) -> random.Random:
        """A generator of its own for each name."""
        return random.Random(f"{self.seed} {name}")

    def _router(self, name: str) -> RouterServer:
        return RouterServer(name, self.network, self.random(name), LIMITS, self.found)

    def _shard(self, name: str) -> ShardServer:
        self._made += 1  # one that comes back with another disk is not who it was
        return ShardServer(name, self.network, self.random(f"{name} {self._made}"), LIMITS, self.found)

    @property
    def servers(self) -> Iterator[Server]:
        yield self.controller
        yield from self.routers
        yield from self.shards.values()

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
            if name not in self.shards:
                shard = self.shards[name] = self._shard(name)
                shard.may_join = True
                self.loop.create_task(self._keep(shard))
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
        shard = self.shards.get(name)
        if shard is None:
            return
        shard.wanted = False
        shard.stop()
        while shard.is_alive:
            await asyncio.sleep(_LOOK_S)
            shard.stop()
        self._unserve(name)
        del self.shards[name]
        self._looked_at.pop(name, None)
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
        shard = self.shards.get(process.name)
        if shard is None or shard.store is None or shard.engine is None or shard.process is not process:
            return
        store, engine = shard.store, shard.engine
        applied, visible, log = engine.applied.position.number, store.applier.visible, store.tables.log
        if not applied <= visible <= log.durable <= log.last.number:
            order = f"applied {applied}, visible {visible}, durable {log.durable}, last {log.last.number}"
            raise Violation(f"{shard.name}: {order}")
        clock = store.clock
        now = (clock.version, clock.sequence, clock.attempts_floor)
        if now != shard.floors:
            if any(after < before for after, before in zip(now, shard.floors, strict=True)):
                raise Violation(f"{shard.name}: version, sequence, floor went from {shard.floors} to {now}")
            shard.floors = now
        if store.served is not self._looked_at.get(shard.name):
            self._looked_at[shard.name] = store.served
            self._note_served(shard)

    def _note_served(self, shard: ShardServer) -> None:
        """One owner per partition. Raises Violation."""
        assert shard.store is not None
        self._unserve(shard.name)
        served = shard.store.served
        for partition, generation in enumerate(served.generations):
            if not generation or partition in served.frozen:
                continue
            other = self._serving.setdefault(partition, shard.name)
            if other != shard.name and self.shards[other].is_alive:
                raise Violation(f"partition {partition} is served by {other} and by {shard.name}")
            self._serving[partition] = shard.name

    def _unserve(self, name: str) -> None:
        self._serving = {partition: owner for partition, owner in self._serving.items() if owner != name}


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
