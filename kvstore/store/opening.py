"""Opening a store: one process, one identity, a log and a file that belong together.

Owns: the lock of the operating system, the names of a copy's files, the making of a new store, the conversion of
older formats, the replay.
Promises: a second process is refused, with the pid of the first, however close the two starts are. A new or converted
file is whole or not there: the log's first segment is durable before the file says format 4, and a file of format 4
without its log is refused, never guessed. Nothing is applied to a file before it was examined. When this returns, the
engine has every record that the log has.
Leaves to others: recovery of the log (`storage.recovery`), what is served (`partitions`).

A crash in the middle of making or converting leaves a file that is empty or of the older format, and perhaps a log
without a record, which the next opening makes again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvstore.config import Limits
from kvstore.data_file import prepare_data_file
from kvstore.environment import Environment
from kvstore.errors import DataCorrupt, DataInUse, ForeignData
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.replication.promise import Identity
from kvstore.storage import sqlite_file
from kvstore.storage.disk import OsDisk
from kvstore.storage.engine import Engine
from kvstore.storage.log import Log
from kvstore.storage.record import newest_map
from kvstore.storage.replay import replay
from kvstore.storage.schema import FORMAT
from kvstore.storage.segments import BEGINNING, Entry
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.copy_file import CopyFile, make_copy, open_copy


class ToldBefore(NamedTuple):
    """`number`: of a record that the store has told to be durable. `clock_floor`: above that version it goes on."""

    number: int = 0
    clock_floor: int = 0


ToldNumber = Callable[[str], Awaitable[ToldBefore]]


async def close_files(engine: Engine, log: Log, lock_fd: int | None) -> None:
    """Close the files of a store or a copy, and let their lock go."""
    await engine.close()
    log.close()
    if lock_fd is not None:
        os.close(lock_fd)


class Opened(NamedTuple):
    """`lock_fd` is held until the store is closed; None where nothing but this process can reach the files.

    `is_examined`: the file was found to be whole, or is new. `copy_file`: which copy this is; None for one in memory.
    `clock_floor`: if the version clock is below it, the files are an older copy that was accepted.
    """

    engine: Engine
    log: Log
    lock_fd: int | None
    is_examined: bool = True
    copy_file: CopyFile | None = None
    clock_floor: int = 0

    async def close(self) -> None:
        """Close all, and let the lock go. Nothing may use the store any more."""
        await close_files(self.engine, self.log, self.lock_fd)


def store_path(data_dir: Path, shard_id: str, node_id: str) -> Path:
    """The file with the rows of that node's copy of the shard.
    Its log, lock and id lie beside it, with other ends."""
    copy = "" if node_id == shard_id else f".copy-{node_id}"
    return data_dir / f"shard-{shard_id}{copy}.db"


async def untold(store_id: str) -> ToldBefore:
    """Of a store that tells no controller how far it has come."""
    return ToldBefore()


class Unapplied(NamedTuple):
    """The files of a store, before what the log has beyond the rows is applied. `entries`: those records.

    `is_new`: the files were made just now. `logged`: the newest map in log and rows.
    """

    path: Path
    opened: Opened
    entries: list[Entry]
    is_new: bool
    logged: ClusterMap | None

    @property
    def identity(self) -> Identity:
        """Which copy this is, and what it has promised."""
        assert self.opened.copy_file is not None
        return self.opened.copy_file.identity

    async def apply(self) -> Opened:
        """Apply what the file lacks; closes all where that fails. Raises DataCorrupt, OSError."""
        opened, entries = self.opened, self.entries
        try:
            if entries and (wrong := (await opened.engine.verify(None)).faults):
                raise DataCorrupt(
                    f"{self.path} is damaged ({wrong[0].detail}), so the records of its log cannot be applied.",
                    next_step="Restore file and log from a copy; `kvstore store check FILE` names all that is damaged.",
                )
            await replay(opened.engine, entries)
        except BaseException:
            await opened.close()
            raise
        return opened._replace(is_examined=bool(entries))


async def open_files(
    path: Path,
    shard_id: str,
    partitions: int,
    limits: Limits,
    environment: Environment,
    told: ToldNumber = untold,
) -> Opened:
    """Open or make the store whose file is `path`.

    `told` is asked what the store with that id has told before.

    Raises ForeignData, DataInUse, StoreBehind, DataCorrupt, LogDamaged, ConfigError, OSError.
    """
    unapplied = await open_unapplied(path, shard_id, partitions, limits, environment, told)
    return await unapplied.apply()


async def open_unapplied(
    path: Path,
    shard_id: str,
    partitions: int,
    limits: Limits,
    environment: Environment,
    told: ToldNumber = untold,
) -> Unapplied:
    """As `open_files`, but nothing is applied: of a store that has copies it is not known what is committed.

    Raises what `open_files` raises.
    """
    prepare_data_file(path)
    lock_fd = lock(path)
    async with AsyncExitStack() as where_it_fails:
        where_it_fails.callback(os.close, lock_fd)
        found, store_id = await environment.in_thread(partial(_found, path))
        before = await told(store_id) if store_id else ToldBefore()
        open_log = partial(_open_log, path, shard_id, partitions, limits, environment, found, before.number)
        log, entries = await environment.in_thread(open_log)
        where_it_fails.callback(log.close)
        engine = await SqliteEngine.open(path, shard_id, partitions, limits.wal_bytes_max)
        where_it_fails.push_async_callback(engine.close)
        open_id = partial(_open_copy, path, engine, entries, not found, environment)
        copy_file, logged = await environment.in_thread(open_id)
        where_it_fails.pop_all()
    opened = Opened(engine, log, lock_fd, copy_file=copy_file, clock_floor=before.clock_floor)
    return Unapplied(path, opened, entries, not found, logged)


def _open_copy(
    path: Path, engine: Engine, entries: list[Entry], is_new: bool, environment: Environment
) -> tuple[CopyFile, ClusterMap | None]:
    """Raises ForeignData, DataCorrupt, OSError."""
    store_id, _, shard_id, _ = engine.identity
    if is_new:
        return make_copy(path, store_id, environment.random_hex(16)), None
    newest = newest_map(entries) or engine.applied.cluster_map
    logged = decode_map(newest) if newest is not None else None
    return open_copy(path, shard_id, store_id, logged), logged


def _found(path: Path) -> tuple[int, str]:
    """The format of the file, and the store's id if it is the present one. Raises ForeignData, DataCorrupt."""
    found = sqlite_file.format_of(path)
    return found, sqlite_file.position_of(path)[1] if found == FORMAT else ""


def lock(path: Path) -> int:
    """Take the store's lock for this process; the descriptor holds it. Raises DataInUse with the holder's pid."""
    lock_path = path.with_suffix(".lock")
    fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise DataInUse(f"{path} is in use by the process with pid {holder}. End that process first.") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _open_log(
    path: Path, shard_id: str, partitions: int, limits: Limits, environment: Environment, found: int, told: int
) -> tuple[Log, list[Entry]]:
    """The log, and its records that the file lacks; the file is of the present format afterwards."""
    disk, name, size = OsDisk(), path.stem, limits.log_segment_bytes
    if found == FORMAT:
        position, store_id = sqlite_file.position_of(path)
        return Log.open(disk, path.parent, name, store_id, position, told, size)
    if found == 0:
        meta = {"store_id": environment.random_hex(16), "shard_id": shard_id, "partitions": str(partitions)}
        log = Log.create(disk, path.parent, name, meta["store_id"], BEGINNING, size)
        sqlite_file.create_file(path, meta)
    else:
        meta = sqlite_file.meta_of(path)
        if meta.get("shard_id") != shard_id:
            raise ForeignData(f"{path} belongs to shard_id {meta.get('shard_id')}, not {shard_id}.")
        if not meta.get("partitions", "").isdecimal():
            raise ForeignData(f"{path} does not say of how many partitions it is.")
        if "store_id" not in meta:
            raise ForeignData(f"{path} does not say which store it is: it has no store_id.")
        log = Log.create(disk, path.parent, name, meta["store_id"], BEGINNING, size)
        sqlite_file.convert_file(path, found, BEGINNING)
    disk.sync_folder(path.parent)
    return log, []
