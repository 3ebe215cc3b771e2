"""The files of a copy that is no primary: making them, opening them, handing them to a store.

Owns: how the log and the file of a store become those of a `StoreCopy`, and back; setting a copy aside.
Promises: the lock of the operating system is held as long as a process has the files, whatever they are to it. Nothing
of a copy is applied at its opening, since what is committed is not known; nor of a store that has copies.
Leaves to others: when a copy becomes a primary (shard), what a copy does (`replication.copy`), a store's own opening
(`opening`).
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvstore import set_aside
from kvstore.config import Limits
from kvstore.data_file import opening_error, prepare_data_file
from kvstore.environment import Environment
from kvstore.errors import DataCorrupt, ForeignData
from kvstore.placement.cluster_map import ClusterMap, newest_of
from kvstore.placement.map_format import decode_map
from kvstore.replication import files
from kvstore.replication.configuration import configuration_of
from kvstore.replication.copy import StoreCopy
from kvstore.replication.places import Place, Times
from kvstore.replication.promise import Identity, identity_path, read_identity
from kvstore.storage import sqlite_file
from kvstore.storage.disk import Disk, OsDisk, remove_if_there
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.copy_file import CopyFile
from kvstore.store.damaged_files import finish_setting_aside
from kvstore.store.opening import Opened, Unapplied, close_files, lock

_COPY_LEISURE = 4  # clients do not read a copy's file: it is written in larger pieces than a primary's
_BESIDE = ("", "-wal", "-shm")
_OS = OsDisk()


class CopyFiles(NamedTuple):
    """The files of an open copy of that shard's store.

    `logged`: the newest map in its log when it was opened.
    """

    path: Path
    copy: StoreCopy
    lock_fd: int | None
    disk: Disk = _OS
    logged: ClusterMap | None = None

    @property
    def newest_map(self) -> ClusterMap | None:
        """The newest map in its log, as far as that is known, and in its file.

        None without one. Raises ForeignData for one of another format.
        """
        encoded = self.copy.engine.applied.cluster_map
        return newest_of([self.logged, decode_map(encoded) if encoded is not None else None])

    async def close(self) -> None:
        """Close all, and let the lock go. Nothing may use the copy any more."""
        await close_files(self.copy.engine, self.copy.log, self.lock_fd)

    def as_opened(self, identity: Identity, clock_floor: int = 0) -> Opened:
        """For a store, which has them from now on; the engine has every record that the log has."""
        copy, copy_file = self.copy, CopyFile(self.path, identity, self.disk)
        return Opened(copy.engine, copy.log, self.lock_fd, copy.own_engine.is_examined, copy_file, clock_floor)


async def make_copy_files(
    path: Path, shard_id: str, store_id: str, partitions: int, limits: Limits, environment: Environment, is_home: bool
) -> CopyFiles:
    """Make an empty copy of that store; `is_home`: on the shard's home.

    Raises DataInUse, ForeignData, ConfigError, OSError.
    """
    prepare_data_file(path)
    lock_fd = lock(path)
    try:
        place = place_of(path, shard_id, store_id, partitions, limits, environment)
        copy = await files.make_copy(place, store_id, environment, times_of(limits), is_home=is_home)
    except BaseException:
        os.close(lock_fd)
        raise
    return CopyFiles(path, copy, lock_fd)


def is_filling(path: Path) -> bool:
    """Whether a snapshot was on its way into that file when its process ended: file and log are nothing, then.

    Raises OSError.
    """
    if not identity_path(path.parent, path.stem).exists():
        return False
    with suppress(DataCorrupt):
        identity = read_identity(_OS, path.parent, path.stem)
        return identity is not None and identity.filling
    return False


async def open_filling(
    path: Path, shard_id: str, partitions: int, limits: Limits, environment: Environment
) -> CopyFiles:
    """A copy with an empty log and an empty file, under the id and the promise that it had.

    Raises DataInUse, DataCorrupt, ForeignData, OSError.
    """
    lock_fd = lock(path)
    try:
        identity = await environment.in_thread(partial(read_identity, _OS, path.parent, path.stem))
        if identity is None:
            raise ForeignData(f"{path} has lost its id. Start the node again.")
        if identity.filling:
            await environment.in_thread(partial(finish_setting_aside, _OS, path.parent, path.stem))
        place = place_of(path, shard_id, identity.store_id, partitions, limits, environment)
        copy = await files.open_copy(place, identity, environment, times_of(limits))
    except BaseException:
        os.close(lock_fd)
        raise
    return CopyFiles(path, copy, lock_fd)


def as_copy(unapplied: Unapplied, place: Place, limits: Limits, environment: Environment) -> CopyFiles:
    """The files of a store that does not start alone, as those of a copy."""
    path, (engine, log, lock_fd, *_), entries, _, logged = unapplied
    config = configuration_of(logged, engine.identity.shard_id) if logged is not None else None
    times = times_of(limits)
    copy = StoreCopy(place, unapplied.identity, log, engine, config, environment, times, unapplied=entries)
    return CopyFiles(path, copy, lock_fd, place.disk, logged)


async def as_copy_again(
    opened: Opened, logged: ClusterMap | None, place: Place, limits: Limits, environment: Environment
) -> CopyFiles:
    """The open files of a store whose term has ended, as those of a copy.

    Nothing is closed, read again or applied. `logged`: the newest map in its log.
    """
    engine, log, lock_fd, is_examined, copy_file, _ = opened
    assert copy_file is not None
    identity = await environment.in_thread(copy_file.settled)
    config = configuration_of(logged, engine.identity.shard_id) if logged is not None else None
    times = times_of(limits)
    copy = StoreCopy(place, identity, log, engine, config, environment, times, was_served=True, is_examined=is_examined)
    return CopyFiles(place.folder / f"{place.store}.db", copy, lock_fd, place.disk, logged)


def times_of(limits: Limits) -> Times:
    """The times of a copy, as cluster.yaml gives them."""
    return Times(
        limits.lease_s,
        limits.disk_stall_s,
        limits.replica_timeout_s,
        limits.failover_after_s,
        limits.sync_inline_ms_max,
        _COPY_LEISURE * limits.apply_delay_s,
        limits.snapshot_share,
        limits.snapshot_page_rows_max,
        limits.catch_up_share,
        limits.copy_apply_share,
        limits.snapshot_busy_share,
        limits.log_bytes_max,
    )


def place_of(
    path: Path, shard_id: str, store_id: str, partitions: int, limits: Limits, environment: Environment
) -> Place:
    """Where the files of that copy lie."""

    async def opened() -> SqliteEngine:
        return await SqliteEngine.open(path, shard_id, partitions, limits.wal_bytes_max)

    async def renewed() -> SqliteEngine:
        meta = {"store_id": store_id, "shard_id": shard_id, "partitions": str(partitions)}
        try:
            await environment.in_thread(partial(_renew, path, meta))
        except sqlite3.Error as error:
            raise opening_error(path, error, "the file of a copy") from error
        return await opened()

    return Place(OsDisk(), path.parent, path.stem, opened, renewed, limits.log_segment_bytes)


def _renew(path: Path, meta: dict[str, str]) -> None:
    disk = OsDisk()
    for suffix in _BESIDE:
        remove_if_there(disk, path.with_name(path.name + suffix))
    sqlite_file.create_file(path, meta)
    disk.sync_folder(path.parent)


def set_copy_aside(path: Path) -> None:
    """Rename the files of a copy that no map names, and that are closed: `….removed`. Raises OSError."""
    set_aside.finish(path)
    path.with_suffix(".lock").unlink(missing_ok=True)
