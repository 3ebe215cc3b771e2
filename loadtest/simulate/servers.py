"""The processes of a simulated cluster: shards, routers, a controller, each on a host of its own.

Owns: putting the real services together as their processes do, from start to death; what each answers over HTTP.
Promises: a process that ends has ended by a fault that was made, or that is a finding. What a shard's disk has kept and
what the controller's store has is all that outlives it.
Leaves to others: the services (`kvstore`), when a process dies (`cluster_faults`), what travels (`session`).
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from kvstore.config import ClusterConfig, Limits, ShardConfig
from kvstore.controller.closer import ChangeCloser
from kvstore.controller.document import ClusterDocument
from kvstore.controller.lost import Reopener
from kvstore.controller.membership import Announcement
from kvstore.controller.mover import Mover
from kvstore.controller.service import ClusterService, Waiting
from kvstore.controller.shards import ShardClients
from kvstore.controller.store import Told
from kvstore.errors import DataCorrupt, ForeignData, KvError, LogDamaged
from kvstore.router.coordinator import Coordinator
from kvstore.router.service import RouterService
from kvstore.shard.app import _until_one_ends, go_on_with_last_session
from kvstore.shard.hellos import Hellos
from kvstore.shard.hosted import Maps
from kvstore.shard.peers import Peers
from kvstore.shard.receiver import Receiver
from kvstore.shard.recovery import Recovery
from kvstore.shard.service import ShardService
from kvstore.shard.told import ToldNumbers
from kvstore.storage.engine import Identity, TryLater
from kvstore.storage.log import BEGINNING, Entry, Log, LogFailed
from kvstore.storage.replay import replay
from kvstore.store.opening import Opened, ToldBefore
from kvstore.store.store import Store
from kvstore.transport.channel import Connection
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import HEADER, PARAMETER, ClusterSession
from loadtest.simulate.disk import PowerCut, SimulatedDisk, keep_all
from loadtest.simulate.door import Door
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.environment import SimulatedEnvironment
from loadtest.simulate.loop import Killed, Process
from loadtest.simulate.map_store import Register, SimulatedMapStore
from loadtest.simulate.network import End, Network
from loadtest.simulate.session import Channel, Question, SimulatedSession, SimulatedSocket
from loadtest.workloads.calls import Call

PARTITIONS = 64
CONTROLLER = "http://controller"
FOLDER = Path("/data")

Found = Callable[[BaseException], None]


class Server:
    """A host and the process that runs there, if one does. `wanted`: it is started again when it ends."""

    def __init__(self, name: str, network: Network, rng: random.Random, limits: Limits, found: Found) -> None:
        self.name = name
        self.network = network
        self.loop = network.loop
        self.rng = rng
        self.limits = limits
        self.host = network.host(name)
        self.host.accept = self._accept
        self.disk = SimulatedDisk()
        self.environment = SimulatedEnvironment(network.loop, rng, self.disk)
        self.process: Process | None = None
        self.wanted = True
        self.is_excused = False  # the process may end by the fault that was made
        self.found = found
        self.gone = asyncio.Event()
        self.gone.set()
        self.headers: dict[str, str] = {}  # of all answers of this process

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Begin a process, which serves as soon as it can."""
        self.gone.clear()
        self.is_excused = False
        self.host.has_power = True
        process = Process(self.name, self._on_death, self.environment.rate)
        self.process = self.host.process = process
        self.loop.note(f"{self.name} starts")
        self.spawn(self._guarded(process))

    def spawn(self, work: Any) -> None:
        """Run it in the process that runs now."""
        assert self.process is not None
        self.loop.create_task(work, context=self.process.context)

    async def _guarded(self, process: Process) -> None:
        try:
            await self.run(process)
        except (Killed, GeneratorExit):
            return
        except BaseException as error:
            self.end(process, error)

    def end(self, process: Process, error: BaseException) -> None:
        """It ends by itself: rightly so, or that is a finding."""
        if not process.alive or isinstance(error, GeneratorExit):
            return
        self.loop.note(f"{self.name} ends: {error!r}")
        if not self.may_end_by(error):
            self.found(error)
        process.kill()

    def may_end_by(self, error: BaseException) -> bool:
        return isinstance(error, PowerCut)

    def _on_death(self) -> None:
        process, self.process = self.process, None
        self.on_death()
        if process is not None:
            self.network.on_death(self.host, process)
        self.gone.set()

    def on_death(self) -> None:
        """What was in memory is lost."""

    def lose_power(self) -> None:
        """No word of it reaches anybody."""
        self.host.has_power = False
        if self.process is not None:
            self.process.kill()
        self.environment.reboot()

    async def run(self, process: Process) -> None:
        raise NotImplementedError

    def session(self, process: Process) -> SimulatedSession:
        return SimulatedSession(self.network, self.rng, self.name, process)

    # --- who comes to the door

    def _accept(self, greeting: Any, end: End) -> None:
        self.spawn(self._welcome(greeting, end))

    async def _welcome(self, greeting: Any, end: End) -> None:
        try:
            if isinstance(greeting, Question):
                await end.send(await self._answered(greeting))
            elif isinstance(greeting, Channel):
                await self.serve_channel(greeting, end)
            else:
                await self.serve_client(end)
        except ConnectionResetError:
            pass
        except Exception as error:
            self.found(error)
        end.close()

    async def _answered(self, question: Question) -> tuple[int, bytes, dict[str, str]]:
        try:
            return *await self.answer(question), self.headers
        except KvError as error:
            return error.status, msgspec.json.encode(error.problem()), self.headers

    async def answer(self, question: Question) -> tuple[int, bytes]:
        """Raises KvError."""
        return 404, b"{}"

    async def serve_channel(self, asked: Channel, end: End) -> None:
        await end.send(b"refused")

    async def serve_client(self, end: End) -> None:
        """One call after the other, until the client leaves."""


class ShardServer(Server):
    """A shard. `weight` counts when it joins a cluster that is there already."""

    def __init__(self, name: str, network: Network, rng: random.Random, limits: Limits, found: Found) -> None:
        super().__init__(name, network, rng, limits, found)
        self.disk.hook = self._before_disk
        self.weight = 1
        self.may_join = False
        self.engine: SimulatedEngine | None = None
        self.store: Store | None = None
        self.service: ShardService | None = None
        self.sync_fails = False
        self.is_damaged = False  # a bit of its disk is wrong
        self.refused = False  # it has not started because of that
        self.was_full = False  # the disk, at some time
        self.fate: Callable[[int], int] = keep_all  # what a cut of the power leaves of what was not synced
        self.floors = (0, 0, 0)
        self._channels: dict[End, None] = {}
        self._last_session = ""
        self._hellos: Hellos | None = None

    async def run(self, process: Process) -> None:
        limits, session = self.limits, self.session(process)
        told = ToldNumbers(session, CONTROLLER, limits)  # type: ignore[arg-type]
        store = await self._open(process, told)
        cluster = ClusterSession()
        peers = Peers(store, limits, session, cluster)  # type: ignore[arg-type]
        receiver = Receiver(self.name, store, peers, limits)
        recovery = Recovery(self.name, store, peers, limits)
        service = ShardService(self.name, store, receiver, limits, told)
        maps = Maps(service)
        follower = MapFollower(
            session,  # type: ignore[arg-type]
            CONTROLLER,
            limits,
            cluster=cluster,
            environment=self.environment,
        )
        self._hellos = hellos = Hellos(self.name, cluster, follower.ask_session, self)
        url = f"http://{self.name}"
        go_on_with_last_session(hellos, cluster, store, self.name, url)

        async def join_cluster() -> None:
            identity = store.identity
            await follower.announce(
                self.name, url, identity.store_id, identity.cluster_id, self.weight,
                join=self.may_join, partitions=identity.partitions, epoch=store.served.epoch,
                clock=store.clock.version,
            )  # fmt: skip
            cluster_id = store.identity.cluster_id
            await follower.follow(max(store.served.epoch - 1, 0), maps.put, cluster_id, lambda: store.clock.version)

        self.store, self.service = store, service
        self.loop.note(f"{self.name} serves at {store.clock.version}, record {store.tables.log.durable}")
        self._stop = asyncio.Event()
        works = join_cluster(), told.run(store), recovery.run(), maps.follow(), self._stopped(service, told, store)
        await _until_one_ends(*works)
        self.service = None
        for end in list(self._channels):
            end.close()
        await recovery.close()
        await receiver.close()
        await peers.close()
        await store.close()
        self.loop.note(f"{self.name} has stopped in order")
        process.kill()

    async def _stopped(self, service: ShardService, told: ToldNumbers, store: Store) -> None:
        await self._stop.wait()
        await service.farewell()
        await told.tell(store)

    def stop(self) -> None:
        """In order, as SIGTERM does."""
        if self.store is not None and self.process is not None:
            self.loop.call_soon(self._stop.set, context=self.process.context)

    def read(self) -> str:
        """The session that its file has kept."""
        return self._last_session

    def keep(self, session_id: str) -> None:
        self._last_session = session_id

    async def _open(self, process: Process, told: ToldNumbers) -> Store:
        size = self.limits.log_segment_bytes
        entries: list[Entry] = []
        before = ToldBefore()
        if self.engine is None:
            identity = Identity(self.environment.random_hex(16), None, self.name, PARTITIONS)
            log = Log.create(self.disk, FOLDER, f"shard-{self.name}", identity.store_id, BEGINNING, size)
            self.engine = SimulatedEngine(identity)
            self.engine.fail = self._before_application
        else:
            identity, position = self.engine.identity, self.engine.applied.position
            before = await told.at_opening(identity.store_id)
            log, entries = Log.open(
                self.disk, FOLDER, f"shard-{self.name}", identity.store_id, position, before.number, segment_bytes=size
            )
        self.engine.environment = self.environment
        await replay(self.engine, entries)

        def on_fatal(error: BaseException) -> NoReturn:
            self.end(process, error)
            raise Killed from error

        opened = Opened(self.engine, log, None, clock_floor=before.clock_floor)
        return await Store.serve(opened, self.limits, on_fatal, self.environment)

    def may_end_by(self, error: BaseException) -> bool:
        is_full = isinstance(error, TryLater) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
        if is_full and self.store is None and self.was_full:
            return True  # it opens as soon as there is room
        if isinstance(error, ForeignData) and not self.wanted:
            return True  # it was removed
        if self.is_damaged and isinstance(error, DataCorrupt | LogDamaged):
            self.refused = True
            return True
        return super().may_end_by(error) or (self.is_excused and isinstance(error, LogFailed | OSError))

    def on_death(self) -> None:
        self.store = self.service = None
        self._channels.clear()

    def cut_power(self, fate: Callable[[int], int]) -> None:
        """The process ends, and what survives is up to `fate`."""
        self.fate = fate
        self.lose_power()

    def start(self) -> None:
        if not self.host.has_power:
            self.disk.restart(self.fate)
            if self.engine is not None:
                self.engine.crash(self.rng.randrange(100))
        super().start()

    def _before_disk(self, call: str, path: Path) -> None:
        changes = call not in ("names", "pread", "open")
        if changes and self.disk.power_cut_at and self.disk.calls + 1 >= self.disk.power_cut_at and self.process:
            self.loop.note(f"{self.name}: the power is cut in {call} {path.name}")
            self.disk.power_cut_at = self.disk.calls + 1
            self.lose_power()
        if call != "sync":
            return
        self.environment.note_sync()
        if self.sync_fails:
            self.sync_fails, self.is_excused = False, True
            self.loop.note(f"{self.name}: the sync of {path.name} fails")
            self.disk.forget_dirty(path)
            raise OSError(errno.EIO, "Input/output error", str(path))

    def _before_application(self) -> None:
        if self.disk.capacity is not None and self.rng.random() < 0.5:
            raise TryLater("the disk is full")

    # --- its door

    async def answer(self, question: Question) -> tuple[int, bytes]:
        store = self.store
        if store is None:
            return 503, b"{}"
        if question.path == "/map":
            told = {"shard": self.name, "store_id": store.identity.store_id, "map": store.cluster_map}
            return 200, msgspec.json.encode(told)
        identity = store.identity
        facts = {"store_id": identity.store_id, "cluster_id": identity.cluster_id, "partitions": identity.partitions}
        return 200, msgspec.json.encode({"shard": self.name, **facts})

    async def serve_channel(self, asked: Channel, end: End) -> None:
        service, store = self.service, self.store
        wanted = asked.query.get("store")
        if service is None or store is None or wanted not in (None, "", store.identity.store_id):
            await end.send(b"refused")
            return
        assert self._hellos is not None
        if await self._hellos.refusal(asked.query.get(PARAMETER, ""), None) is not None:
            await end.send(b"refused")
            return
        await end.send(b"welcome")
        self._channels[end] = None
        try:
            await Connection(self.limits).serve(SimulatedSocket(end), service.handle)  # type: ignore[arg-type]
        finally:
            self._channels.pop(end, None)


class RouterServer(Server):
    """A router."""

    def __init__(self, name: str, network: Network, rng: random.Random, limits: Limits, found: Found) -> None:
        super().__init__(name, network, rng, limits, found)
        self._door: Door | None = None

    async def run(self, process: Process) -> None:
        session = self.session(process)
        cluster = ClusterSession()
        service = RouterService(self.limits, session, self.environment, cluster)  # type: ignore[arg-type]
        self._door = Door(service, Coordinator(service, self.limits, self.environment), self.limits)
        follower = MapFollower(
            session,  # type: ignore[arg-type]
            CONTROLLER,
            self.limits,
            cluster=cluster,
            environment=self.environment,
        )
        await asyncio.gather(follower.follow(0, service.follow), service.greet())

    def on_death(self) -> None:
        self._door = None

    async def serve_client(self, end: End) -> None:
        while True:
            call: Call | None = await end.receive()
            if call is None or self._door is None:
                return
            await end.send(await self._door.answer(call))


class ControllerServer(Server):
    """The controller. `register`: what its store keeps."""

    def __init__(self, network: Network, rng: random.Random, limits: Limits, found: Found, first: list[str]) -> None:
        super().__init__("controller", network, rng, limits, found)
        self.register = Register()
        self.config = ClusterConfig(
            routers=[], controllers=[], shards=[ShardConfig(id=each, listen="127.0.0.1:0") for each in first],
            partitions=PARTITIONS, limits=limits,
        )  # fmt: skip
        self.service: ClusterService | None = None

    async def run(self, process: Process) -> None:
        store = SimulatedMapStore(self.register, self.rng)
        document = ClusterDocument(store, self.limits.map_write_tries_max)
        cluster = ClusterSession(self.environment.random_hex(8))
        self.headers = {HEADER: cluster.id}
        shards = ShardClients(self.limits, self.session(process), cluster)  # type: ignore[arg-type]
        mover = Mover(document, shards, self.limits, self.environment)
        self.service = service = ClusterService(document, self.config, shards, self.environment)
        reopener = Reopener(document, shards, self.limits)
        closer = ChangeCloser(document, mover, service.may_run, self.limits, self.environment)
        service.on_clock = reopener.tell
        await asyncio.gather(mover.run(), service.watch_if_behind(), reopener.run(), closer.run())

    def on_death(self) -> None:
        self.service = None

    async def answer(self, question: Question) -> tuple[int, bytes]:
        service = self.service
        if service is None:
            return 503, b"{}"
        if question.path == "/healthz":
            return 200, b"{}"
        if question.path == "/v1/map":
            return await self._map(service, question.query)
        if question.path == "/v1/members":
            announcement = msgspec.json.decode(question.body, type=Announcement)
            found = await service.announce(announcement)
            if isinstance(found, Waiting):
                return 202, msgspec.json.encode({"waiting_for": found.waiting_for})
            return 200, msgspec.json.encode(found)
        if question.path == "/v1/told":
            told = msgspec.json.decode(question.body)
            kept = await service.tell(told["store_id"], Told(told["number"], told["version"]))
            return 200, msgspec.json.encode(kept._asdict())
        return 404, b"{}"

    async def _map(self, service: ClusterService, query: dict[str, str]) -> tuple[int, bytes]:
        epoch = int(query["after"])
        if cluster_id := query.get("cluster"):
            service.hear(cluster_id, epoch)
            service.on_clock(int(query.get("clock", "0")))
        if query.get(PARAMETER, self.headers[HEADER]) != self.headers[HEADER]:
            return 204, b""
        try:
            async with asyncio.timeout(self.limits.map_poll_s):
                return 200, msgspec.json.encode(await service.map_after(epoch))
        except TimeoutError:
            return 204, b""
