"""A simulated machine with one store, and the way there.

Owns: what its process does, what a power cut leaves of it, the calls of clients on their way and back.
Promises: a call whose process ends before its answer is lost (`Lost`), done or not. A call that comes to a machine
which does not serve waits until it does.
Leaves to others: when what happens (`store_faults`), what is called and what that means (`store_clients`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any, NoReturn

from kvstore.errors import KvError
from kvstore.placement.cluster_map import ClusterMap, Move, at_home, map_of
from kvstore.protocol import Get, Reply
from kvstore.storage.engine import Identity, TryLater
from kvstore.storage.log import BEGINNING, Entry, Log
from kvstore.storage.replay import replay
from kvstore.store.opening import Opened
from kvstore.store.store import Store
from loadtest.simulate.disk import Fate
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.kill_points import KillPoints
from loadtest.simulate.loop import Killed, Process, SimulatedLoop
from loadtest.simulate.machine import FOLDER, LIMITS, PARTITIONS, Machine
from loadtest.simulate.network import Host
from loadtest.simulate.store_invariants import StoreInvariants

NAME, SHARD = "shard-s1", "s1"
_NETWORK_S = (0.0001, 0.003)


class Lost(Exception):
    """The call's process ended, or the client waited no longer: it was done, or not, or may be yet."""


class _Sink:
    """Where the answer to one call goes."""

    def __init__(self, machine: StoreMachine) -> None:
        self._machine = machine
        self.closed = False
        self.future: asyncio.Future[Any] = machine.loop.create_future()

    def send(self, reply: Any, /) -> None:
        self._machine.on_the_way(self._settle, reply)

    def _settle(self, reply: Any) -> None:
        if self.future.done():
            return
        if isinstance(reply, Exception):
            self.future.set_exception(reply)
        else:
            self.future.set_result(reply)


class StoreMachine(Machine):
    """`faults`: how often each kind came."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        super().__init__(Host(SHARD), loop, rng, LIMITS, self._note_finding)
        self.engine: SimulatedEngine | None = None
        self.store: Store | None = None
        self.serving = asyncio.Event()
        self.faults: Counter[str] = Counter()
        self.kill_points = KillPoints(loop, self.faults)
        self.epoch = 0
        self.failed: asyncio.Future[None] = loop.create_future()
        self._calls: list[_Sink] = []
        self._invariants = StoreInvariants()

    # --- the process --------------------------------------------------------------------------------------------------

    async def run(self, process: Process) -> None:
        self.store = store = await self._opened(process)
        self.loop.note(f"{SHARD} serves at {store.clock.version}, record {store.tables.log.durable}")
        self.serving.set()

    async def _opened(self, process: Process) -> Store:
        environment, size = self.environment, LIMITS.log_segment_bytes
        engine, entries = self.engine, list[Entry]()
        if engine is None:
            self.engine = engine = SimulatedEngine(Identity(environment.random_hex(16), None, SHARD, PARTITIONS))
            engine.fail = self.before_application
            log = Log.create(self.disk, FOLDER, NAME, engine.identity.store_id, BEGINNING, size)
        else:
            position, store_id = engine.applied.position, engine.identity.store_id
            log, entries = Log.open(self.disk, FOLDER, NAME, store_id, position, segment_bytes=size)
        engine.environment = environment
        await replay(engine, entries)

        def on_fatal(error: BaseException) -> NoReturn:
            self.end(process, error)
            raise Killed from error

        store = await Store.serve(Opened(engine, log, None), LIMITS, on_fatal, environment)
        self.epoch = max(self.epoch, store.served.epoch)
        if not store.served.epoch:
            await store.partitions.adopt(self.next_map())
        return store

    def may_end_by(self, error: BaseException) -> bool:
        return super().may_end_by(error) or (isinstance(error, TryLater) and self.store is None)  # until there is room

    def _note_finding(self, error: BaseException) -> None:
        """The simulation ends with it."""
        if not self.failed.done():
            self.failed.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def on_death(self) -> None:
        self.store = None
        self.serving.clear()
        calls, self._calls = self._calls, []
        for sink in calls:
            sink.closed = True
            self.on_the_way(sink._settle, Lost("the connection was lost"))

    def lose_power(self) -> None:
        """The process ends; the machine is off until `restart`."""
        self.host.has_power = False
        if self.process is not None:
            self.process.kill()

    def restart(self, fate: Fate) -> None:
        """After a power cut, what survives it is up to `fate`."""
        self.lose_power()
        self.disk.restart(fate)
        self.environment.reboot()
        if self.engine is not None:
            self.engine.crash(self.rng.randrange(100))

    def next_map(self, *moves: Move) -> ClusterMap:
        """All partitions are the store's."""
        self.epoch += 1
        members = [at_home(shard, f"http://{shard}", shard) for shard in (SHARD, "s2")]
        owners = [0] * PARTITIONS
        return map_of(
            members, cluster_id="c", epoch=self.epoch, partitions=PARTITIONS, owners=owners, moves=list(moves)
        )

    # --- calls --------------------------------------------------------------------------------------------------------

    def on_the_way(self, function: Callable[..., Any], *args: Any) -> None:
        """Call it, in no process's name, as late as the network takes."""
        self.loop.call_later(self.rng.uniform(*_NETWORK_S), function, *args, context=_OF_NO_PROCESS)

    async def ask(self, op: Any, patience_s: float = 0.0) -> Any:
        """The answer to the message, which may be a refusal. Raises Lost."""

        def deliver(store: Store, sink: _Sink) -> None:
            if isinstance(op, Get):
                store.get(op, sink)
            else:
                store.write(op, sink)

        return await self._call(deliver, patience_s)

    async def call(self, work: Callable[[Store], Awaitable[Any]]) -> Any:
        """What the work brings, done in the store's process. Raises Lost, KvError."""

        async def run(store: Store, sink: _Sink) -> None:
            try:
                sink.send(await work(store))
            except KvError as error:
                sink.send(error)
            except Exception as error:
                self.found(error)

        def deliver(store: Store, sink: _Sink) -> None:
            self.spawn(run(store, sink))

        return await self._call(deliver, 0.0)

    async def _call(self, deliver: Callable[[Store, _Sink], None], patience_s: float) -> Reply:
        await asyncio.sleep(self.rng.uniform(*_NETWORK_S))
        while (store := self.store) is None:
            await self.serving.wait()
        process = self.process
        assert process is not None
        sink = _Sink(self)
        self._calls.append(sink)
        self.loop.call_soon(deliver, store, sink, context=process.context)
        try:
            if patience_s:
                await asyncio.wait([sink.future], timeout=patience_s)
                if not sink.future.done():
                    raise Lost("the client waited no longer")
            return await sink.future  # type: ignore[no-any-return]
        finally:
            sink.closed = True
            if sink in self._calls:
                self._calls.remove(sink)

    # --- what must always hold ----------------------------------------------------------------------------------------

    def check(self, process: Process) -> None:
        """After every event. Raises Violation."""
        if self.store is not None and process is self.process:
            self._invariants.check((SHARD, SHARD), self.store)


_OF_NO_PROCESS = copy_context()
