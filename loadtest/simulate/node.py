"""A node of a simulated cluster: the real node of `kvstore.shard` on a simulated disk and network.

Owns: its stores' engines, which outlive its processes as files do; by what its process may end.
Promises: stores are made, found, opened, served and closed by the code of real processes, several on a node if maps
say so. What the disk has kept, and the engines, is all that outlives a process.
Leaves to others: what a node does (`kvstore.shard.node`), when it dies (`cluster_faults`).
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Set
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from kvstore.config import Limits
from kvstore.environment import StopAsked
from kvstore.errors import DataCorrupt, ForeignData, KvError, StoreBehind, is_damage
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.replication import files
from kvstore.replication.messages import decode_from_primary
from kvstore.replication.places import Place
from kvstore.replication.promise import Identity as CopyIdentity
from kvstore.replication.promise import read_identity
from kvstore.shard.copy_wires import SocketWire, connect
from kvstore.shard.folder import copies_in, open_by_map
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node import Node, Refused
from kvstore.shard.resident import Resident
from kvstore.storage.engine import Identity, TryLater
from kvstore.storage.log import BEGINNING, Log
from kvstore.storage.record import newest_map
from kvstore.store.copy_file import check_readable, make_copy, open_copy
from kvstore.store.copy_place import CopyFiles, as_copy, as_copy_again, times_of
from kvstore.store.damaged_files import (
    Salvaged,
    finish_setting_aside,
    logged_maps,
    salvaged_with,
    set_damaged_aside,
)
from kvstore.store.opening import Opened, ToldNumber, Unapplied, store_path
from kvstore.transport.sessions import PARAMETER, ClusterSession
from loadtest.simulate.disk import SimulatedDisk, keep_all, put_back
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.environment import SimulatedEnvironment
from loadtest.simulate.loop import Killed, Process
from loadtest.simulate.machine import FOLDER, PARTITIONS, Found
from loadtest.simulate.network import End, Network
from loadtest.simulate.servers import CONTROLLER, Server
from loadtest.simulate.session import Channel, Question, SimulatedSocket
from loadtest.simulate.store_invariants import Violation

OnFatal = Callable[[BaseException], NoReturn]


class SimulatedFolder:
    """`kvstore.shard.hosted.Folder` on a simulated disk. `engines`: by the file for which each stands."""

    def __init__(
        self, node_id: str, disk: SimulatedDisk, limits: Limits, before_application: Callable[[], None]
    ) -> None:
        self.engines: dict[Path, SimulatedEngine] = {}
        self._leaving: dict[Path, None] = {}  # files that have their second name
        self._node_id = node_id
        self._disk = disk
        self._limits = limits
        self._before_application = before_application
        self.environment: SimulatedEnvironment

    def copies(self) -> list[str]:
        names = self._disk.names(FOLDER)
        return copies_in([path.name for path in self.engines if f"{path.stem}.id" in names], self._node_id)

    async def open(self, shard_id: str, partitions: int, told: ToldNumber) -> Opened | CopyFiles:
        path = self._path(shard_id)
        if path in self._leaving:
            await self.set_aside(shard_id)
        with suppress(DataCorrupt):
            identity = read_identity(self._disk, FOLDER, path.stem)
            if identity is not None and identity.filling:
                finish_setting_aside(self._disk, FOLDER, path.stem)
                return await self._open_copy(shard_id, partitions)
        engine = self.engines.get(path)
        if engine is None:
            return self._make(path, shard_id, partitions)

        async def applied_map() -> ClusterMap | None:
            applied = engine.applied.cluster_map
            return decode_map(applied) if applied is not None else None

        unapplied = partial(self._unapplied, path, engine)
        found, is_alone = await open_by_map(shard_id, self._node_id, told, applied_map, unapplied)
        if is_alone:
            return await found.apply()
        return as_copy(found, self._place(path, engine.identity), self._limits, self.environment)

    async def as_copy(self, shard_id: str, opened: Opened, logged: ClusterMap | None) -> CopyFiles:
        store_id, _, _, partitions = opened.engine.identity
        place = self._place(self._path(shard_id), Identity(store_id, None, shard_id, partitions))
        return await as_copy_again(opened, logged, place, self._limits, self.environment)

    async def _open_copy(self, shard_id: str, partitions: int) -> CopyFiles:
        path = self._path(shard_id)
        identity = read_identity(self._disk, FOLDER, path.stem)
        assert identity is not None
        place = self._place(path, Identity(identity.store_id, None, shard_id, partitions))
        copy = await files.open_copy(place, identity, self.environment, times_of(self._limits))
        newest = newest_map(list(copy.log.entries(copy.engine.applied.position.number))) or None
        return CopyFiles(path, copy, None, self._disk, decode_map(newest) if newest is not None else None)

    async def make_copy(self, shard_id: str, store_id: str, partitions: int) -> CopyFiles:
        path = self._path(shard_id)
        place = self._place(path, Identity(store_id, None, shard_id, partitions))
        is_whole = path in self.engines and f"{path.stem}.id" in self._disk.names(FOLDER)
        try:
            is_home, times = shard_id == self._node_id, times_of(self._limits)
            copy = await files.make_copy(place, store_id, self.environment, times, is_home=is_home)
        except ForeignData:
            if is_whole:
                raise
            return await self._begin_anew(shard_id, store_id, 0, partitions)
        return CopyFiles(path, copy, None, self._disk)

    async def set_aside(self, shard_id: str) -> None:
        path = self._path(shard_id)
        self._leaving[path] = None
        for ending in (".id", ".log."):
            for name in self._disk.names(FOLDER):
                if name.startswith(f"{path.stem}{ending}"):
                    self._disk.unlink(FOLDER / name)
            self._disk.sync_folder(FOLDER)
        self.engines.pop(path)
        del self._leaving[path]

    async def salvage(self, shard_id: str, known: ClusterMap | None) -> Salvaged | None:
        path = self._path(shard_id)
        paths = [path, *(each for each in self.engines if each != path and shard_id == self._node_id)]
        found = [self.engines[each].applied.cluster_map for each in paths if each in self.engines]
        applied = [known, *(decode_map(each) for each in found if each is not None)]
        logged = (each for file in paths for each in logged_maps(self._disk, file))
        identity = None
        with suppress(DataCorrupt):
            identity = read_identity(self._disk, FOLDER, path.stem)
        return salvaged_with(applied, logged, shard_id, self._node_id, identity)

    async def rebuild(self, shard_id: str, was: Salvaged, partitions: int) -> CopyFiles:
        return await self._begin_anew(shard_id, was.store_id, was.promised, partitions)

    async def _begin_anew(self, shard_id: str, store_id: str, promised: int, partitions: int) -> CopyFiles:
        path = self._path(shard_id)
        fresh = CopyIdentity(store_id, self.environment.random_hex(16), promised, filling=True)
        set_damaged_aside(self._disk, FOLDER, path.stem, fresh)
        place = self._place(path, Identity(store_id, None, shard_id, partitions))
        copy = await files.open_copy(place, fresh, self.environment, times_of(self._limits))
        return CopyFiles(path, copy, None, self._disk)

    def _path(self, shard_id: str) -> Path:
        return store_path(FOLDER, shard_id, self._node_id)

    def _place(self, path: Path, identity: Identity) -> Place:
        async def opened() -> SimulatedEngine:
            engine = self.engines.get(path)
            if engine is None:
                raise DataCorrupt(f"{path} is not there")
            engine.environment = self.environment
            return engine

        async def renewed() -> SimulatedEngine:
            return self._engine(path, Identity(identity.store_id, None, identity.shard_id, identity.partitions))

        return Place(self._disk, FOLDER, path.stem, opened, renewed, self._limits.log_segment_bytes)

    def _engine(self, path: Path, identity: Identity) -> SimulatedEngine:
        self.engines[path] = engine = SimulatedEngine(identity)
        engine.fail, engine.environment = self._before_application, self.environment
        return engine

    def _make(self, path: Path, shard_id: str, partitions: int) -> Opened:
        identity = Identity(self.environment.random_hex(16), None, shard_id, partitions)
        size = self._limits.log_segment_bytes
        log = Log.create(self._disk, FOLDER, path.stem, identity.store_id, BEGINNING, size)
        engine = self._engine(path, identity)
        copy_id = self.environment.random_hex(16)
        return Opened(engine, log, None, copy_file=make_copy(path, identity.store_id, copy_id, self._disk))

    async def _unapplied(self, path: Path, engine: SimulatedEngine, told: ToldNumber) -> Unapplied:
        """What `open_unapplied` does."""
        engine.environment = self.environment
        position, (store_id, _, shard_id, _) = engine.applied.position, engine.identity
        before, size = await told(store_id), self._limits.log_segment_bytes
        try:
            log, entries = Log.open(self._disk, FOLDER, path.stem, store_id, position, before.number, size)
        except StoreBehind:
            check_readable(path, self._disk)
            raise
        newest = newest_map(entries) or engine.applied.cluster_map
        logged = decode_map(newest) if newest is not None else None
        copy_file = open_copy(path, shard_id, store_id, logged, self._disk)
        opened = Opened(engine, log, None, copy_file=copy_file, clock_floor=before.clock_floor)
        return Unapplied(path, opened, entries, False, logged)


class Backup(NamedTuple):
    """The files of a copy as they were at one moment. `number`: of the last record that was on disk."""

    copy_id: str
    path: Path
    files: dict[Path, bytes]
    engine: SimulatedEngine
    number: int


class NodeServer(Server):
    """A host with a node. `weight` counts when it joins a cluster that is there already."""

    def __init__(self, name: str, network: Network, rng: random.Random, limits: Limits, found: Found) -> None:
        super().__init__(name, network, rng, limits, found)
        self.weight = 1
        self.may_join = False
        self.is_removed: Callable[[], bool] = lambda: False  # no member, by the controller's store
        self.is_over = False  # that was said to it, so it does not come back
        self.folder = SimulatedFolder(name, self.disk, limits, self.before_application)
        self.node: Node | None = None  # while it serves
        self.is_damaged = False  # a bit of its disk is wrong
        self.refused = False  # it has not started because of that, or without one of its copies
        self.was_full = False  # the disk, at some time
        self.fate: Callable[[int], int] = keep_all  # what a cut of the power leaves of what was not synced
        self._channels: dict[End, None] = {}
        self._last_session = ""

    async def run(self, process: Process) -> None:
        self.folder.environment = self.environment
        session = self.session(process)
        cluster = ClusterSession()
        around = Surroundings(
            self.name,
            self.folder,
            self.limits,
            session,  # type: ignore[arg-type]
            cluster,
            CONTROLLER,
            self._on_fatal_of(process),
            self.environment,
            partial(connect, session, cluster),  # type: ignore[arg-type]
        )
        at_the_end = AsyncExitStack()  # not entered: a process that is killed closes nothing
        node = await Node.open(around, PARTITIONS, self, at_the_end)
        if self.is_damaged and (alone := set(self.folder.copies()) - node.stores.by_shard.keys()):
            _check_unknown(alone, node.stores.newest_map)
            self.refused = True  # a copy is left alone, and its log says so: a person ends the process and restores it
            process.kill()
            return
        self.node = node
        for hosted in node.stores.by_shard.served:
            store = hosted.store
            self.loop.note(f"{self.name} serves {hosted.shard_id} at {store.clock.version}, record {store.durable}")
        self._stop = StopAsked()
        await node.run(f"http://{self.name}", self.weight, self.may_join, self._stop)
        await node.connections.close()
        for end in list(self._channels):
            end.close()
        await at_the_end.aclose()
        self.loop.note(f"{self.name} has stopped in order")
        process.kill()

    def _on_fatal_of(self, process: Process) -> OnFatal:
        def on_fatal(error: BaseException) -> NoReturn:
            self.end(process, error)
            raise Killed from error

        return on_fatal

    def stop(self) -> None:
        """In order, as SIGTERM does: others take over first, if they can."""
        if self.node is not None and self.process is not None:
            self.loop.call_soon(self._stop.ask, context=self.process.context)

    def read(self) -> str:
        """The session that its file has kept."""
        return self._last_session

    def keep(self, session_id: str) -> None:
        self._last_session = session_id

    def may_end_by(self, error: BaseException) -> bool:
        is_full = isinstance(error, TryLater) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
        if is_full and self.node is None and self.was_full:
            return True  # it opens as soon as there is room
        if self.is_damaged and isinstance(error, KvError) and is_damage(error):
            self.refused = True  # also if it is no member: its request to join may be under way
            return True
        if isinstance(error, ForeignData) and (not self.wanted or self.is_removed()):
            self.is_over = True
            return True
        return super().may_end_by(error)

    def on_death(self) -> None:
        self.node = None
        self._channels.clear()

    def cut_power(self, fate: Callable[[int], int]) -> None:
        """The process ends, and what survives is up to `fate`."""
        self.fate = fate
        self.lose_power()

    def lose_disk(self) -> None:
        """The process ends, and the next one finds an empty folder."""
        if self.process is not None:
            self.process.kill()
        self.disk.wipe()
        self.folder.engines.clear()
        self._last_session = ""

    def back_up(self, shard_id: str) -> Backup | None:
        """What lies here of that shard's store, primary or copy, if the process runs and has it whole."""
        resident = self.node.stores.by_shard.get(shard_id) if self.node is not None else None
        local, path = resident.local if resident is not None else None, self.folder._path(shard_id)
        stored = local.log_with_copies if local is not None else None
        is_filling = local is not None and local.copy is not None and local.copy.is_filling
        if local is None or stored is None or is_filling or path not in self.folder.engines:
            return None
        files = {each: self.disk.content(each) for each in self.disk.files if each.name.startswith(f"{path.stem}.")}
        return Backup(local.copy_id, path, files, self.folder.engines[path].backed_up(), stored.synced.number)

    def put_back(self, kept: Backup) -> None:
        """In place of what lies here of it by now; no process may run."""
        for each in self.disk.files:
            if each.name.startswith(f"{kept.path.stem}."):
                self.disk.remove(each)
        for path, data in kept.files.items():
            put_back(self.disk, path, data)
        self.folder.engines[kept.path] = kept.engine

    def start(self) -> None:
        if not self.host.has_power:
            self.disk.restart(self.fate)
            for engine in self.folder.engines.values():
                engine.crash(self.rng.randrange(100))
        super().start()

    # --- its door

    async def answer(self, question: Question) -> tuple[int, bytes]:
        node = self.node
        if node is None:
            return 503, b"{}"
        if question.path == "/map":
            return 200, msgspec.json.encode(node.newest_map())
        query = question.query
        return 200, msgspec.json.encode(await node.facts(query.get(PARAMETER), query.get("store"), None))

    async def serve_channel(self, asked: Channel, end: End) -> None:
        node, query = self.node, asked.query
        if node is None:
            await end.send(b"refused")
            return
        admitted: Resident | Refused | None
        if asked.path == "/copies":
            admitted = await node.admit_process(query.get(PARAMETER, ""), None)
        else:
            admitted = await node.admit(query.get("shard", ""), query.get("store"), query.get(PARAMETER, ""), None)
        if isinstance(admitted, Refused):
            await end.send(b"refused")
            return
        await end.send(b"welcome")
        self._channels[end] = None
        socket: Any = SimulatedSocket(end)
        try:
            if admitted is None:
                await node.stores.serve_session(query.get("store", ""), SocketWire(socket, decode_from_primary))
            else:
                await node.connections.serve(socket, admitted.handle, node.stores.handle_of)
        finally:
            self._channels.pop(end, None)


def _check_unknown(shards: Set[str], newest: ClusterMap | None) -> None:
    """Damaged copies of these shards are left alone. Raises Violation if a map that the node has knows of one."""
    if known := [shard for shard in sorted(shards) if newest is not None and newest.shard(shard) is not None]:
        raise Violation(f"the damaged copy of shard {known[0]} is left alone, and told to no one")
