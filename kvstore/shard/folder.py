"""Where the files of a node lie: what is found there, made, opened and set aside.

Owns: the names of the files of each shard's copy on this node; whether a store may be served by what its own map says.
Promises: a store whose newest map names a copy, or another node or copy as primary, or that has promised a higher term,
is opened as a copy, unapplied. One that serves by its own map has asked the controller first how far it had come.
Leaves to others: the files themselves (`store.opening`, `store.copy_place`), what becomes of a copy (`resident`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import ForeignData, StoreBehind
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.replication import opening
from kvstore.replication.configuration import configuration_of
from kvstore.replication.promise import Identity
from kvstore.set_aside import has_begun
from kvstore.storage import sqlite_file
from kvstore.storage.disk import OsDisk
from kvstore.store.copy_file import check_readable, copy_path
from kvstore.store.copy_place import (
    CopyFiles,
    as_copy,
    as_copy_again,
    is_filling,
    make_copy_files,
    open_filling,
    place_of,
    set_copy_aside,
)
from kvstore.store.damaged_files import Salvaged, finish_setting_aside, salvage, set_damaged_aside, spare_room
from kvstore.store.opening import (
    Opened,
    ToldBefore,
    ToldNumber,
    Unapplied,
    lock,
    open_unapplied,
    store_path,
    untold,
)

log = logging.getLogger(__name__)


class Folder(Protocol):
    """The files of one node's stores."""

    def copies(self) -> list[str]:
        """The shards of other homes of which a copy lies there, in order."""

    async def open(self, shard_id: str, partitions: int, told: ToldNumber) -> Opened | CopyFiles:
        """Open or make the node's copy of that shard's store; `Opened`: it may be served.

        Raises what `open_files` raises.
        """

    async def as_copy(self, shard_id: str, opened: Opened, logged: ClusterMap | None) -> CopyFiles:
        """The open files of a store that was served until now, as a copy's.

        `logged`: the newest map in its log.
        """

    async def make_copy(self, shard_id: str, store_id: str, partitions: int) -> CopyFiles:
        """Make an empty copy. Raises DataInUse, ForeignData, ConfigError, OSError."""

    async def set_aside(self, shard_id: str) -> None:
        """Rename the files of a copy, which are closed. Raises OSError."""

    async def salvage(self, shard_id: str, known: ClusterMap | None) -> Salvaged | None:
        """What is known of a copy whose files are damaged; `known`: a map.
        None if no map has its shard, or it is a home's and none names another copy."""

    async def rebuild(self, shard_id: str, was: Salvaged, partitions: int) -> CopyFiles:
        """Set the damaged files aside, which are closed, and make an empty copy that is to be filled.

        `was`: what is known of them. Raises DataInUse, OSError.
        """


class FileFolder:
    """A folder of the file system, as a `Folder`."""

    def __init__(self, data_dir: Path, node_id: str, limits: Limits) -> None:
        self._data_dir = data_dir
        self._node_id = node_id
        self._limits = limits

    def copies(self) -> list[str]:
        """Only those that have an id: others were being made when the process died, and are rebuilt."""
        names = {path.name for path in self._data_dir.iterdir()}
        made = [name for name in names if f"{name.removesuffix('.db')}.id" in names]
        return copies_in(made, self._node_id)

    async def open(self, shard_id: str, partitions: int, told: ToldNumber) -> Opened | CopyFiles:
        path, limits = self._path(shard_id), self._limits
        is_home = shard_id == self._node_id
        if is_home and await SYSTEM.in_thread(partial(has_begun, path)):  # a crash has broken it off
            await self.set_aside(shard_id)
        if await SYSTEM.in_thread(partial(is_filling, path)):
            return await open_filling(path, shard_id, partitions, limits, SYSTEM)

        async def applied_map() -> ClusterMap | None:
            return await SYSTEM.in_thread(partial(_map_in_file, path))

        async def unapplied(told: ToldNumber) -> Unapplied:
            try:
                return await open_unapplied(path, shard_id, partitions, limits, SYSTEM, told)
            except StoreBehind:
                await SYSTEM.in_thread(partial(check_readable, path))
                raise

        found, is_alone = await open_by_map(shard_id, self._node_id, told, applied_map, unapplied)
        if is_alone:
            return await found.apply()
        store_id, _, _, partitions = found.opened.engine.identity
        place = place_of(path, shard_id, store_id, partitions, limits, SYSTEM)
        return as_copy(found, place, limits, SYSTEM)

    async def as_copy(self, shard_id: str, opened: Opened, logged: ClusterMap | None) -> CopyFiles:
        path, (store_id, _, _, partitions) = self._path(shard_id), opened.engine.identity
        place = place_of(path, shard_id, store_id, partitions, self._limits, SYSTEM)
        return await as_copy_again(opened, logged, place, self._limits, SYSTEM)

    async def make_copy(self, shard_id: str, store_id: str, partitions: int) -> CopyFiles:
        path, is_home = self._path(shard_id), shard_id == self._node_id
        is_whole = path.exists() and copy_path(path).exists()
        if await SYSTEM.in_thread(partial(is_filling, path)):  # a crash may have broken off what made room for it
            await SYSTEM.in_thread(partial(finish_setting_aside, OsDisk(), path.parent, path.stem))
        try:
            return await make_copy_files(path, shard_id, store_id, partitions, self._limits, SYSTEM, is_home)
        except ForeignData:
            if is_whole:
                raise
        # There are records of a log that has lost its file, or its id.
        await SYSTEM.in_thread(
            partial(_set_damaged_aside, path, Identity(store_id, SYSTEM.random_hex(16), filling=True))
        )
        return await open_filling(path, shard_id, partitions, self._limits, SYSTEM)

    async def set_aside(self, shard_id: str) -> None:
        await SYSTEM.in_thread(partial(set_copy_aside, self._path(shard_id)))

    async def salvage(self, shard_id: str, known: ClusterMap | None) -> Salvaged | None:
        others = [self._path(each) for each in self.copies()] if shard_id == self._node_id else []
        path, node_id = self._path(shard_id), self._node_id
        return await SYSTEM.in_thread(partial(salvage, path, shard_id, node_id, known, others))

    async def rebuild(self, shard_id: str, was: Salvaged, partitions: int) -> CopyFiles:
        path, limits = self._path(shard_id), self._limits
        fresh = Identity(was.store_id, SYSTEM.random_hex(16), was.promised, filling=True)
        if not await SYSTEM.in_thread(partial(is_filling, path)):  # else a full disk has broken it off
            await SYSTEM.in_thread(partial(_set_damaged_aside, path, fresh))
        return await open_filling(path, shard_id, partitions, limits, SYSTEM)

    def _path(self, shard_id: str) -> Path:
        return store_path(self._data_dir, shard_id, self._node_id)


def _set_damaged_aside(path: Path, fresh: Identity) -> None:
    lock_fd = lock(path)
    try:
        aside = set_damaged_aside(OsDisk(), path.parent, path.stem, fresh)
    finally:
        os.close(lock_fd)
    log.warning("the damaged files of %s are kept as %s, with log and id beside it", path, path.with_name(aside))
    spare_room(path.parent, aside)


async def open_by_map(
    shard_id: str,
    node_id: str,
    told: ToldNumber,
    applied_map: Callable[[], Awaitable[ClusterMap | None]],
    unapplied: Callable[[ToldNumber], Awaitable[Unapplied]],
) -> tuple[Unapplied, bool]:
    """The files of a store, opened, and whether the node serves it before it has heard the controller.

    A store that has copies asks them how far it had come, and not the controller, `told`: only its log says which of
    both it is, and what the controller says is needed to read the log. `applied_map`: in the file, a guess. Raises what
    `unapplied` raises, which opens the files.
    """
    asked = False

    async def told_before(store_id: str) -> ToldBefore:
        nonlocal asked
        asked = _may_be_alone(await applied_map(), shard_id, node_id)
        return await told(store_id) if asked else ToldBefore()

    try:
        found = await unapplied(told_before)
    except StoreBehind:
        found = await unapplied(untold)
        if starts_alone(found.logged, shard_id, node_id, found.identity):
            await found.opened.close()
            raise
        return found, False
    is_alone = starts_alone(found.logged, shard_id, node_id, found.identity)
    if is_alone and not asked and not found.is_new:
        await found.opened.close()
        found = await unapplied(told)
    return found, is_alone


def starts_alone(logged: ClusterMap | None, shard_id: str, node_id: str, identity: Identity) -> bool:
    """Whether a node serves the store before it has heard the controller, by its log and its id.

    On its home, one that no map names owns nothing, and serves until one does. One that has promised a term had a map.
    """
    config = configuration_of(logged, shard_id) if logged is not None else None
    if config is None:
        return shard_id == node_id and (logged is not None or not identity.promised)
    return opening.starts_alone(config, node_id, identity.copy_id, identity.promised)


def _may_be_alone(applied: ClusterMap | None, shard_id: str, node_id: str) -> bool:
    shard = applied.shard(shard_id) if applied is not None else None
    if shard is None:
        return shard_id == node_id
    return shard.primary.node == node_id and not shard.replicas


def copies_in(names: Iterable[str], node_id: str) -> list[str]:
    """The shards of other homes of which this node has a copy, in order.
    One of the files with these names is that copy's."""
    begin, end = "shard-", f".copy-{node_id}.db"
    found = [name for name in names if name.startswith(begin) and name.endswith(end)]
    return sorted(name.removeprefix(begin).removesuffix(end) for name in found)


def _map_in_file(path: Path) -> ClusterMap | None:
    """The map that the file has applied."""
    with suppress(Exception):
        encoded = sqlite_file.meta_of(path, write=False).get("cluster_map")
        return decode_map(encoded.encode()) if encoded is not None else None
    return None
