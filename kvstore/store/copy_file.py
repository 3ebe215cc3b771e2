"""Which copy of its store a folder has, and the highest term that it has promised: `shard-<id>.id`.

Owns: the small file of a copy, its form, when it is made, and what stands for it where it is lost.
Promises: what was promised is durable before anything is done in that term, and never falls. The file is replaced as a
whole: a crash leaves it as it was or as it is to be. It belongs to one store and one shard; another one's is refused.
Leaves to others: terms (`placement.cluster_map`), the lock under which it is read and written (`opening`).

It is neither in the log, which is equal on all copies of a store, nor in the file, which may forget what was written
last. A copy without replicas can do without it: nobody else can have been named primary, so the durable map says
which copy this is. With replicas a lost promise is no promise, and the copy is refused.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_hexdigest

from kvstore.data_file import write_durably
from kvstore.errors import ForeignData
from kvstore.placement.cluster_map import ClusterMap

log = logging.getLogger(__name__)

_FORMAT = 1


class Copy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`promised`: the highest term that this copy has agreed to serve or to follow."""

    store_id: str
    shard_id: str
    copy_id: str
    promised: int = 0
    format: int = _FORMAT


class _Written(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    copy: msgspec.Raw
    checksum: str


class Owner(NamedTuple):
    """Of whose copy a file must be."""

    store_id: str
    shard_id: str


class CopyFile:
    """The copy as its file says."""

    def __init__(self, path: Path, copy: Copy) -> None:
        self._path = path
        self.copy = copy

    def promise(self, term: int) -> None:
        """Agree to serve or follow that term, durably. Raises ForeignData for one below what was promised, OSError."""
        if term < self.copy.promised:
            raise ForeignData(
                f"{self._path} has promised term {self.copy.promised}, and the map names term {term}: it is that of an "
                "older controller's file."
            )
        if term > self.copy.promised:
            copy = msgspec.structs.replace(self.copy, promised=term)
            _write(self._path, copy)
            self.copy = copy


def copy_path(db: Path) -> Path:
    """That of the copy whose rows are in the file `db`."""
    return db.with_suffix(".id")


def make_copy(db: Path, owner: Owner, copy_id: str) -> CopyFile:
    """The file of a copy that is being made, in place of what an earlier one has left. Raises OSError."""
    path = copy_path(db)
    copy = Copy(store_id=owner.store_id, shard_id=owner.shard_id, copy_id=copy_id)
    _write(path, copy)
    return CopyFile(path, copy)


def open_copy(db: Path, owner: Owner, durable_map: ClusterMap | None) -> CopyFile:
    """The file of a copy that was there before; made where an earlier program had none, or the map stands for it.

    Raises ForeignData where it is another store's, or lost and cannot be done without; OSError.
    """
    path = copy_path(db)
    found, why = _read(path)
    if found is None:
        found = _stand_in(path, owner, durable_map, why)
        _write(path, found)
    if (found.store_id, found.shard_id) != owner:
        raise ForeignData(
            f"{path} is of shard {found.shard_id} and store {found.store_id}, and the files beside it are of shard "
            f"{owner.shard_id} and store {owner.store_id}: put back the one that belongs to them."
        )
    return CopyFile(path, found)


def rename_store(db: Path, store_id: str) -> None:
    """The copy's store has another id from now on, as after `kvstore cluster adopt`. Raises OSError."""
    path = copy_path(db)
    found, _ = _read(path)
    if found is not None and found.store_id != store_id:
        _write(path, msgspec.structs.replace(found, store_id=store_id))


def _stand_in(path: Path, owner: Owner, durable_map: ClusterMap | None, why: str) -> Copy:
    shard = durable_map.shard(owner.shard_id) if durable_map is not None else None
    if shard is not None and shard.replicas:
        raise ForeignData(
            f"{path} {why}, so what this copy has promised is not known: it must not serve. Put the file back, or "
            "move this copy's files away: another copy takes their place."
        )
    if shard is None:  # of a program that knew of no copies, or of a cluster that it has not joined yet
        return Copy(store_id=owner.store_id, shard_id=owner.shard_id, copy_id=owner.store_id)
    if shard.primary.copy_id != shard.store_id:
        log.warning("%s %s: it is made again from the map, which names no other copy", path, why)
    copy_id = shard.primary.copy_id
    return Copy(store_id=owner.store_id, shard_id=owner.shard_id, copy_id=copy_id, promised=shard.term)


def _read(path: Path) -> tuple[Copy | None, str]:
    """The copy; or None and what is wrong, as the end of a sentence. Raises OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, "is missing"
    try:
        written = msgspec.json.decode(content, type=_Written)
        if written.checksum != xxh3_64_hexdigest(bytes(written.copy)):
            return None, "is damaged"
        copy = msgspec.json.decode(written.copy, type=Copy)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None, "is damaged"
    return (copy, "") if copy.format == _FORMAT else (None, f"has the unknown format {copy.format}")


def _write(path: Path, copy: Copy) -> None:
    encoded = msgspec.json.encode(copy)
    written = _Written(copy=msgspec.Raw(encoded), checksum=xxh3_64_hexdigest(encoded))
    write_durably(path, msgspec.json.encode(written) + b"\n")
