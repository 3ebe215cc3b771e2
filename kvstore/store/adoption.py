"""Making the stores of a copied data directory stores of another cluster, offline.

Owns: the ids of the new cluster's stores, what changes in a store's file and log.
Promises: nothing that was acknowledged is lost: the file has applied the whole log before the log, which is chained by
the old store's id, is replaced by an empty one behind the same position. After a crash at any point the same call
finishes it; a store that has gone on since under its new id is left as it is.
Leaves to others: the controller's document and the order of the whole (`controller.adoption`).
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import msgspec

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import ForeignData, LogDamaged
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.storage import sqlite_file
from kvstore.storage.disk import Disk, OsDisk, remove_if_there
from kvstore.storage.log import Log
from kvstore.storage.schema import FORMAT
from kvstore.storage.segments import Place, Position
from kvstore.store.copy_file import rename_store
from kvstore.store.opening import lock, open_files


def new_store_id(cluster_id: str, store_id: str) -> str:
    """The id of a store in the new cluster: always the same, so that the whole may be repeated."""
    return hashlib.blake2b(f"{cluster_id}\0{store_id}".encode(), digest_size=16).hexdigest()


def of_cluster(cluster_map: ClusterMap, cluster_id: str) -> ClusterMap:
    """The map as the new cluster's: the same shards with other store ids."""
    shards = [
        msgspec.structs.replace(shard, store_id=new_store_id(cluster_id, shard.store_id))
        for shard in cluster_map.shards
    ]
    return msgspec.structs.replace(cluster_map, cluster_id=cluster_id, shards=shards)


def check_store(path: Path, store_id: str, cluster_id: str) -> None:
    """Check that this is the store with that id, or what it becomes.

    Raises ForeignData if it is not, DataInUse while a process has it, sqlite3.Error, OSError.
    """
    os.close(lock(path))
    meta = sqlite_file.meta_of(path)
    if meta.get("store_id") not in (store_id, new_store_id(cluster_id, store_id)):
        raise ForeignData(f"{path} is store {meta.get('store_id')}, and the controller's map names {store_id}.")


async def adopt_store(path: Path, store_id: str, cluster_id: str, limits: Limits) -> None:
    """Give the store with that id its new one. Raises what `open_files` raises, sqlite3.Error, OSError."""
    meta = sqlite_file.meta_of(path)
    new_id = new_store_id(cluster_id, store_id)
    if meta["store_id"] == store_id:
        opened = await open_files(path, meta["shard_id"], int(meta["partitions"]), limits, SYSTEM)
        lock_fd = opened.lock_fd
        assert lock_fd is not None
        cluster_map = opened.engine.applied.cluster_map
        opened.log.close()
        await opened.engine.close()
        changed = {"store_id": new_id}
        if cluster_map is not None:
            adopted = of_cluster(decode_map(cluster_map), cluster_id)
            changed |= {"cluster_id": cluster_id, "cluster_map": msgspec.json.encode(adopted).decode()}
    else:
        lock_fd, changed = lock(path), {}
    try:
        if changed:
            await SYSTEM.in_thread(partial(sqlite_file.set_identity, path, changed))
        await SYSTEM.in_thread(partial(rename_store, path, new_id))
        await SYSTEM.in_thread(partial(_renew_log, OsDisk(), path, new_id, limits.log_segment_bytes))
    finally:
        os.close(lock_fd)


def _renew_log(disk: Disk, path: Path, store_id: str, segment_bytes: int) -> None:
    """Put an empty log in the place of the old store's, unless the new store's is there."""
    position, _ = sqlite_file.position_of(path)
    place = Place(path.parent, path.stem, store_id)
    if _is_there(disk, place, position, segment_bytes):
        return
    for old in (*(place.segment(index) for index in place.indices(disk)), place.note, place.new):
        remove_if_there(disk, old)
    disk.sync_folder(place.folder)
    Log.create(disk, place.folder, place.store, store_id, position, segment_bytes).close()


def _is_there(disk: Disk, place: Place, position: Position, segment_bytes: int) -> bool:
    try:
        log, _ = Log.open(disk, place.folder, place.store, place.store_id, position, 0, segment_bytes)
    except (ForeignData, LogDamaged):
        return False
    log.close()
    return True


def is_store(path: Path) -> bool:
    """Whether there is a file of the present format. Raises ForeignData."""
    return path.is_file() and sqlite_file.format_of(path, write=False) == FORMAT
