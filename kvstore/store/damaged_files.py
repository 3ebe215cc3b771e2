"""The damaged files of a store that has copies, or is not at home.
What is still known of them, and putting them out of the way.

Owns: `salvage`, `set_damaged_aside`, the names of what is set aside: `….db.damaged` and its log and id, then
`….db.damaged.1`, and so on.
Promises: nothing is deleted or written over. After a crash at any line what is left is what was there, or has the id of
a copy that is to be filled, and a file `.id.begun`: the next start goes on, and takes it for nothing else.
Leaves to others: whether another copy takes its place (the controller), and filling that (`replication`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvstore.data_file import make_sparse
from kvstore.errors import KvError
from kvstore.placement.cluster_map import ClusterMap, newest_of
from kvstore.placement.map_format import decode_map
from kvstore.replication.promise import Identity, identity_path, read_identity, write_identity
from kvstore.set_aside import names_for
from kvstore.storage import schema
from kvstore.storage.disk import Disk, OsDisk, remove_if_there
from kvstore.storage.log_check import read_log
from kvstore.storage.record import decode_record
from kvstore.storage.sqlite_file import uri_path

_BEGUN = ".id.begun"  # the id of files that are being set aside
_BESIDE = ("-wal", "-shm", "")  # the file itself goes last


class Salvaged(NamedTuple):
    """What is known of a copy whose files are damaged. `copy_id`: empty if it is not known.
    `newest_map`: one that is known here, and has the shard."""

    store_id: str
    copy_id: str
    promised: int
    newest_map: ClusterMap


def salvage(
    path: Path, shard_id: str, node_id: str, known: ClusterMap | None, others: Sequence[Path]
) -> Salvaged | None:
    """What is known of the damaged store whose file is `path`.
    None if no map here has it, or it is a home's and no map says that it lies on other nodes, too.

    `known`: a map that is known already. `others`: files of other stores on this node, which are not open.
    """
    identity: Identity | None = None
    with suppress(KvError, OSError):
        identity = read_identity(OsDisk(), path.parent, path.stem)
    applied = [known, *(_map_in(each) for each in (path, *others))]
    logged = (each for file in (path, *others) for each in logged_maps(OsDisk(), file))
    return salvaged_with(applied, logged, shard_id, node_id, identity)


def salvaged_with(
    applied: Iterable[ClusterMap | None],
    logged: Iterable[ClusterMap],
    shard_id: str,
    node_id: str,
    identity: Identity | None,
) -> Salvaged | None:
    """What the newest of those maps says; those in logs are read only if the others do not tell.

    A file follows its log late, so what it has applied may be older than the first copy.
    """
    maps = [each for each in applied if each is not None and each.shard(shard_id) is not None]
    salvaged = salvaged_by(newest_of(maps), shard_id, node_id, identity)
    if salvaged is None:
        maps += [each for each in logged if each.shard(shard_id) is not None]
        salvaged = salvaged_by(newest_of(maps), shard_id, node_id, identity)
    return salvaged


def salvaged_by(newest: ClusterMap | None, shard_id: str, node_id: str, identity: Identity | None) -> Salvaged | None:
    """What the map says, and the copy's id, if that can be read.
    None if the map does not have the shard, or no other copy of it and this is its home, which is refused then."""
    shard = newest.shard(shard_id) if newest is not None else None
    if newest is None or shard is None or (shard_id == node_id and not set(shard.nodes) - {node_id}):
        return None
    if identity is None or identity.store_id != shard.store_id:
        return Salvaged(shard.store_id, "", 0, newest)
    return Salvaged(shard.store_id, identity.copy_id, identity.promised, newest)


def _map_in(path: Path) -> ClusterMap | None:
    """That of the file's own entries, if it verifies."""
    with suppress(sqlite3.Error, KvError, msgspec.DecodeError, UnicodeDecodeError, OSError):
        uri = f"file:{uri_path(path)}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            encoded = schema.read_meta(connection)[0].get("cluster_map")
        return decode_map(encoded.encode()) if encoded is not None else None
    return None


def logged_maps(disk: Disk, path: Path) -> Iterator[ClusterMap]:
    """Those in the log beside that file, in the records that verify, up to the first that does not."""
    with suppress(KvError, msgspec.DecodeError, UnicodeDecodeError, OSError):
        for logged in read_log(disk, path.parent, path.stem):
            encoded = decode_record(logged.entry.payload).cluster_map
            if encoded is not None:
                yield decode_map(encoded)


def set_damaged_aside(disk: Disk, folder: Path, store: str, fresh: Identity) -> str:
    """Rename the files of the store, none of which is open.
    Leaves the id `fresh`, of a copy that is to be filled.

    Returns what the file of the rows is called now, or would be. Raises OSError; may be repeated after that.
    """
    names = disk.names(folder)
    aside = _begun(store, names) or _free(store, names)
    _keep(disk, identity_path(folder, store), folder / f"{aside}{_BEGUN}")
    disk.sync_folder(folder)  # before the fresh id says that all that lies here may be written over
    write_identity(disk, folder, store, fresh)
    finish_setting_aside(disk, folder, store)
    return aside


def finish_setting_aside(disk: Disk, folder: Path, store: str) -> None:
    """Rename what a crash has left under its first name, if one has broken off `set_damaged_aside`. Raises OSError."""
    names = disk.names(folder)
    aside = _begun(store, names)
    if aside is None:
        return
    for name in names:
        if name.startswith(f"{store}.log."):
            disk.rename(folder / name, folder / f"{aside}{name.removeprefix(store)}")
    for suffix in _BESIDE:
        if (name := f"{store}.db{suffix}") in names:
            disk.rename(folder / name, folder / f"{aside}{suffix}")
    disk.sync_folder(folder)
    disk.rename(folder / f"{aside}{_BEGUN}", folder / f"{aside}.id")
    disk.sync_folder(folder)


def spare_room(folder: Path, aside: str) -> None:
    """Give back the room that was made for records that never came. Raises OSError."""
    for path in folder.glob(f"{aside}.log.*"):
        make_sparse(path)


def _begun(store: str, names: Iterable[str]) -> str | None:
    """The name under which the store's files are being set aside."""
    begun = (each for each in names if each.startswith(f"{store}.db.damaged") and each.endswith(_BEGUN))
    return next((each.removesuffix(_BEGUN) for each in begun), None)


def _free(store: str, names: Iterable[str]) -> str:
    return next(each for each in names_for(f"{store}.db.damaged") if not _is_taken(each, names))


def _is_taken(aside: str, names: Iterable[str]) -> bool:
    taken = (f"{aside}.id", f"{aside}.log.", f"{aside}-")
    return any(name == aside or name.startswith(taken) for name in names)


def _keep(disk: Disk, path: Path, copy: Path) -> None:
    """Copy a small file, durably once its folder is synced; an empty one if there is none."""
    data = b""
    if path.name in disk.names(path.parent):
        source = disk.open(path, write=False)
        try:
            data = source.pread(source.size(), 0)
        finally:
            source.close()
    remove_if_there(disk, copy)
    kept = disk.open(copy, create=True)
    try:
        kept.pwrite(data, 0)
        kept.sync()
    finally:
        kept.close()
