"""A machine of the simulation: a disk, the process that serves a store from it, and the way there.

Owns: starting and ending the process, what its disk does to it, the calls of clients on their way and back.
Promises: a call whose process ends before its answer is lost (`Lost`), done or not. A call that comes to a machine
which does not serve waits until it does.
Leaves to others: when what happens (`faults`), what is called and what that means (`clients`).
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any, NoReturn

from kvstore.config import Limits
from kvstore.errors import KvError
from kvstore.placement.cluster_map import ClusterMap, Move, at_home, map_of
from kvstore.protocol import Get, Reply
from kvstore.storage.engine import Identity, TryLater
from kvstore.storage.log import BEGINNING, Entry, Log, LogFailed
from kvstore.storage.replay import replay
from kvstore.store.opening import Opened
from kvstore.store.store import Store
from loadtest.simulate.disk import PowerCut, SimulatedDisk
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.environment import SimulatedEnvironment
from loadtest.simulate.loop import Killed, Process, SimulatedLoop
from loadtest.simulate.store_invariants import Violation

PARTITIONS = 64
FOLDER = Path("/data")
NAME, SHARD = "shard-s1", "s1"
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
)
_NETWORK_S = (0.0001, 0.003)


class Lost(Exception):
    """The call's process ended, or the client waited no longer: it was done, or not, or may be yet."""


class _Sink:
    """Where the answer to one call goes."""

    def __init__(self, machine: Machine) -> None:
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


class Machine:
    """`faults`: how often each kind came; `points`: how often each failpoint was hit."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.disk = SimulatedDisk()
        self.disk.hook = self._before_disk
        self.environment = SimulatedEnvironment(loop, rng, self.disk)
        self.engine: SimulatedEngine | None = None
        self.store: Store | None = None
        self.process: Process | None = None
        self.serving = asyncio.Event()
        self.gone = asyncio.Event()
        self.faults: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.kill_at: tuple[str, int] | None = None  # at the n-th time of that failpoint
        self.sync_fails = False
        self.epoch = 0
        self.failed: asyncio.Future[None] = loop.create_future()
        self.power_is_off = False
        self._excused = False  # the process may end by the fault that was made
        self._calls: list[_Sink] = []
        self._floors = (0, 0, 0)
        self._latest_ms = 0

    # --- the process --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, which opens the store."""
        self.gone.clear()
        self._excused = False
        self.process = process = Process("s1", self._on_death, self.environment.rate)
        self.loop.note("s1 starts")
        work = self._open(process)
        process.tasks.append(self.loop.create_task(work, context=process.context))

    async def _open(self, process: Process) -> None:
        try:
            store = await self._opened(process)
        except (Killed, GeneratorExit):
            return
        except BaseException as error:
            self._end(process, error)
            return
        try:
            self._check_reopened(store)
        except Violation as error:
            self.found(error)
            return
        self.store = store
        self.loop.note(f"s1 serves at {store.clock.version}, record {store.tables.log.durable}")
        self.serving.set()

    async def _opened(self, process: Process) -> Store:
        environment, size = self.environment, LIMITS.log_segment_bytes
        identity = (
            self.engine.identity if self.engine else Identity(environment.random_hex(16), None, SHARD, PARTITIONS)
        )
        if self.engine is None:
            log = Log.create(self.disk, FOLDER, NAME, identity.store_id, BEGINNING, size)
            engine = SimulatedEngine(identity)
            engine.fail = self._before_application
            entries: list[Entry] = []
        else:
            engine = self.engine
            log, entries = Log.open(
                self.disk, FOLDER, NAME, identity.store_id, engine.applied.position, segment_bytes=size
            )
        engine.environment = environment
        self.engine = engine
        await replay(engine, entries)

        def on_fatal(error: BaseException) -> NoReturn:
            self._end(process, error)
            raise Killed from error

        opened = Opened(engine, log, None)
        store = await Store.serve(opened, LIMITS, on_fatal, environment)
        self.epoch = max(self.epoch, store.served.epoch)
        if not store.served.epoch:
            await store.partitions.adopt(self.next_map())
        return store

    def _end(self, process: Process, error: BaseException) -> None:
        """It ends by itself: rightly so, or that is a finding."""
        if not process.alive or isinstance(error, GeneratorExit):
            return
        is_full = isinstance(error, TryLater) and self.store is None  # it opens as soon as there is room
        excused = self._excused and isinstance(error, LogFailed | OSError)
        expected = isinstance(error, PowerCut) or is_full or excused
        self.loop.note(f"s1 ends: {error!r}")
        if not expected:
            self.found(error)
        process.kill()

    def found(self, error: BaseException) -> None:
        """The simulation ends with this finding."""
        if not self.failed.done():
            self.failed.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def _on_death(self) -> None:
        self.store = None
        self.serving.clear()
        self.gone.set()
        calls, self._calls = self._calls, []
        for sink in calls:
            sink.closed = True
            self.on_the_way(sink._settle, Lost("the connection was lost"))

    def cut_power(self, fate: Callable[[int], int]) -> None:
        """The process ends, and what survives is up to `fate`."""
        if self.process is not None:
            self.process.kill()
        self.disk.restart(fate)
        self.environment.reboot()
        self.power_is_off = False
        if self.engine is not None:
            self.engine.crash(self.rng.randrange(100))

    @property
    def latest_ms(self) -> int:
        """The latest that its wall clock has shown."""
        self._latest_ms = max(self._latest_ms, self.environment.now_ms())
        return self._latest_ms

    def jump(self, by_ms: int) -> None:
        """The wall clock is set to another time."""
        _ = self.latest_ms
        self.environment.jump_ms = by_ms

    def next_map(self, *moves: Move) -> ClusterMap:
        """All partitions are the store's."""
        self.epoch += 1
        members = [at_home(shard, f"http://{shard}", shard) for shard in (SHARD, "s2")]
        owners = [0] * PARTITIONS
        return map_of(
            members, cluster_id="c", epoch=self.epoch, partitions=PARTITIONS, owners=owners, moves=list(moves)
        )

    # --- what its disk does -------------------------------------------------------------------------------------------

    def _before_disk(self, call: str, path: Path) -> None:
        changes = call not in ("names", "pread", "open")
        if changes and self.disk.power_cut_at and self.disk.calls + 1 >= self.disk.power_cut_at and self.process:
            self.loop.note(f"the power is cut in {call} {path.name}")
            self.disk.power_cut_at = self.disk.calls + 1
            self.power_is_off = True
            self.process.kill()
        if call != "sync":
            return
        self.environment.note_sync()
        if self.sync_fails:
            self.sync_fails, self._excused = False, True
            self.faults["sync failed"] += 1
            self.loop.note(f"the sync of {path.name} fails")
            self.disk.forget_dirty(path)
            raise OSError(errno.EIO, "Input/output error", str(path))

    def _before_application(self) -> None:
        if self.disk.capacity is not None and self.rng.random() < 0.5:
            raise TryLater("the disk is full")

    def hit(self, names: tuple[str, ...]) -> None:
        """The process is at these failpoints."""
        self.points.update(names)
        process = self.process
        if self.kill_at is None or process is None or self.kill_at[0] not in names:
            return
        name, left = self.kill_at
        self.kill_at = (name, left - 1) if left > 1 else None
        if left <= 1:
            self.faults["killed at a failpoint"] += 1
            self.loop.note(f"s1 is killed at {name}")
            process.kill()
            raise Killed

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
            assert self.process is not None
            self.process.tasks.append(self.loop.create_task(run(store, sink)))

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
        """After every event: applied, visible, durable, in this order; clocks never go back. Raises Violation."""
        store, engine = self.store, self.engine
        if store is None or engine is None or process is not self.process:
            return
        applied, visible, log = engine.applied.position.number, store.applier.visible, store.tables.log
        if not applied <= visible <= log.durable <= log.last.number:
            raise Violation(f"applied {applied}, visible {visible}, durable {log.durable}, last {log.last.number}")
        clock = store.clock
        now = (clock.version, clock.sequence, clock.attempts_floor)
        if now != self._floors:
            if any(after < before for after, before in zip(now, self._floors, strict=True)):
                raise Violation(f"version, sequence, floor went from {self._floors} to {now}")
            self._floors = now

    def _check_reopened(self, store: Store) -> None:
        clock = store.clock
        now = (clock.version, clock.sequence, clock.attempts_floor)
        if any(after < before for after, before in zip(now, self._floors, strict=True)):
            raise Violation(f"what was visible before the crash is gone: from {self._floors} to {now}")


_OF_NO_PROCESS = copy_context()
