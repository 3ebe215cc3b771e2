"""Which copy of its store a folder has, as its store opens it.
`shard-<id>.id`, when it is made, and what replaces it.

Owns: the making of that file with a store; what stands for it where it is lost; promises to serve a term.
Promises: what was promised is durable before anything is done in that term, and never falls. The file of another store
is never taken for this one's.
Leaves to others: the form of the file (`replication.promise`), terms (`placement.cluster_map`), the lock under which it
is read and written (`opening`).

A primary without replicas can do without its file: no other can have been named, so the durable map says which copy
this is. With replicas a lost promise is no promise, and the copy is refused. So is one on another node than the
primary's, though the map that it has names no replica yet: it joins, and its file may be half of a snapshot.
"""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock

from kvstore.errors import DataCorrupt, ForeignData
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.promise import Identity, identity_path, read_identity, write_identity
from kvstore.storage.disk import Disk, OsDisk

log = logging.getLogger(__name__)

_OS = OsDisk()
_DAMAGED = "is damaged"


class CopyFile:
    """The identity of the copy whose rows are in the file `db`, as its own file on that disk says."""

    def __init__(self, db: Path, identity: Identity, disk: Disk = _OS) -> None:
        self._db = db
        self._disk = disk
        self._one_at_a_time = Lock()  # the same map may come by two ways at once, each in a thread of its own
        self.identity = identity

    def promise(self, term: int) -> None:
        """Agree to serve that term, durably. Raises ForeignData for one below what was promised, OSError.

        Blocks the thread for a sync; may be called from several threads.
        """
        with self._one_at_a_time:
            if term < self.identity.promised:
                raise ForeignData(
                    f"{copy_path(self._db)} has promised term {self.identity.promised}, and the map names term {term}: "
                    "it is that of an older controller's file."
                )
            if term > self.identity.promised:
                self.identity = _written(self._disk, self._db, self.identity._replace(promised=term))

    def settled(self) -> Identity:
        """What is on the disk, once the promise that is being written is. Blocks the thread until then."""
        with self._one_at_a_time:
            return self.identity


def copy_path(db: Path) -> Path:
    """The file of the copy whose rows are in the file `db`."""
    return identity_path(db.parent, db.stem)


def make_copy(db: Path, store_id: str, copy_id: str, disk: Disk = _OS) -> CopyFile:
    """The file of a copy that is being made, in place of what an earlier one has left. Raises OSError."""
    return CopyFile(db, _written(disk, db, Identity(store_id, copy_id)), disk)


def open_copy(db: Path, shard_id: str, store_id: str, durable_map: ClusterMap | None, disk: Disk = _OS) -> CopyFile:
    """The file of a copy that was there before.
    Made where an earlier program had none, or the map stands for it.

    One of another store, which was there before these files were put in their place, is as good as lost. Raises
    ForeignData where it is lost and cannot be done without; OSError.
    """
    try:
        found: Identity | None = read_identity(disk, db.parent, db.stem)
        why = "is missing"
    except DataCorrupt:
        found, why = None, _DAMAGED
    if found is not None and found.store_id != store_id:
        why = f"is of store {found.store_id}, and the files beside it are of store {store_id}"
        found = None
    if found is None:
        found = _written(disk, db, _stand_in(db, shard_id, store_id, durable_map, why))
    return CopyFile(db, found, disk)


def check_readable(db: Path, disk: Disk = _OS) -> None:
    """Refuse files that know of less than their store has told, if its id is damaged.

    Nothing says any more, then, whether they are a copy; an empty copy on its shard's home knows of nothing, too.
    Raises ForeignData; OSError.
    """
    try:
        read_identity(disk, db.parent, db.stem)
    except DataCorrupt as error:
        raise _lost(
            f"{copy_path(db)} {_DAMAGED}, and the files beside it know of less than this shard has told: if another "
            "node serves it, move them away, and they are copied from there. Else restore all of them."
        ) from error


def rename_store(db: Path, store_id: str) -> None:
    """The copy's store has another id from now on, as after `kvstore cluster adopt`. Raises DataCorrupt, OSError."""
    found = read_identity(_OS, db.parent, db.stem)
    if found is not None and found.store_id != store_id:
        _written(_OS, db, found._replace(store_id=store_id))


def _stand_in(db: Path, shard_id: str, store_id: str, durable_map: ClusterMap | None, why: str) -> Identity:
    shard = durable_map.shard(shard_id) if durable_map is not None else None
    if shard is not None and shard.replicas:
        raise _lost(
            f"{copy_path(db)} {why}, so what this copy has promised is not known: it must not serve. Put the file "
            "back, or move this copy's files away: another copy takes their place."
        )
    is_elsewhere = shard is not None and shard.primary.node != _node_of(db, shard_id)
    if is_elsewhere or (shard is None and ".copy-" in db.stem):
        raise _lost(
            f"{copy_path(db)} {why}, so which copy this is is not known: move its files away, and another is made."
        )
    if shard is None and why == _DAMAGED:
        raise _lost(
            f"{copy_path(db)} {why}, and no map here names this copy: put the file back, or, if this shard has never "
            "joined its cluster, move its files away."
        )
    if shard is None:  # of a program that knew of no copies, or of a cluster that it has not joined yet
        return Identity(store_id, store_id)
    if shard.primary.copy_id != store_id:
        log.warning("%s %s: it is made again from the map, which names no other copy", copy_path(db), why)
    return Identity(store_id, shard.primary.copy_id, shard.term)


def _node_of(db: Path, shard_id: str) -> str:
    """The node whose copy it is, as `opening.store_path` names the file."""
    return db.stem.partition(".copy-")[2] or shard_id


def _lost(detail: str) -> ForeignData:
    error = ForeignData(detail)
    error.is_damage = True
    return error


def _written(disk: Disk, db: Path, identity: Identity) -> Identity:
    write_identity(disk, db.parent, db.stem, identity)
    return identity
