"""The file `<store>.id`: the id of a copy of a store, and the highest term that it has promised.

Owns: the form of that small file, writing and reading it.
Promises: a promise is durable before `write_identity` returns, and a crash leaves the old or the new one whole. It lies
neither in the log, which is equal on all copies, nor in SQLite, whose last transactions a power cut may take.
Leaves to others: what is promised, and when (`session`, `opening`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_hexdigest

from kvstore.errors import DataCorrupt
from kvstore.storage.disk import FULL_ERRNOS, Disk, remove_if_there
from kvstore.storage.engine import TryLater


class Identity(NamedTuple):
    """Of one folder: the store and the copy whose files it holds, and the promise of that copy.

    `filling`: a snapshot is on its way into the file, which is nothing before it is whole.
    """

    store_id: str
    copy_id: str
    promised: int = 0
    filling: bool = False


class _Written(msgspec.Struct):
    store_id: str
    copy_id: str
    promised: int
    filling: bool
    checksum: str


_ID_BYTES_MAX = 4096


def identity_path(folder: Path, store: str) -> Path:
    """The file of the copy whose store has that name."""
    return folder / f"{store}.id"


def write_identity(disk: Disk, folder: Path, store: str, identity: Identity) -> None:
    """Make the identity durable. Raises OSError, with the old one still in force or the new one already."""
    path, new = identity_path(folder, store), folder / f"{store}.id.new"
    written = _Written(*identity, checksum=_checksum(identity))
    remove_if_there(disk, new)
    file = disk.open(new, create=True)
    try:
        file.pwrite(msgspec.json.encode(written) + b"\n", 0)
        file.sync()
    finally:
        file.close()
    disk.rename(new, path)
    disk.sync_folder(folder)


@contextmanager
def room_may_come() -> Iterator[None]:
    """A promise that finds no room on the disk is tried again later: raises TryLater then, in place of OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_ERRNOS:
            raise
        raise TryLater(f"a promise finds no room on the disk ({error}): make room there.") from error


def read_identity(disk: Disk, folder: Path, store: str) -> Identity | None:
    """The identity, once it is durable; None if there is no such file. Raises DataCorrupt, OSError.

    It is made durable again before it is believed: a crash may have come between the rename and the folder's sync.
    """
    path = identity_path(folder, store)
    if path.name not in disk.names(folder):
        return None
    file = disk.open(path)
    try:
        data = file.pread(_ID_BYTES_MAX, 0)
        file.sync()
    finally:
        file.close()
    disk.sync_folder(folder)
    try:
        written = msgspec.json.decode(data, type=_Written)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataCorrupt(f"{path} cannot be read: {error}. Copy this store again from another node.") from None
    identity = Identity(written.store_id, written.copy_id, written.promised, written.filling)
    if written.checksum != _checksum(identity):
        raise DataCorrupt(f"{path} does not match its checksum. Copy this store again from another node.")
    return identity


def _checksum(identity: Identity) -> str:
    return xxh3_64_hexdigest(msgspec.json.encode(list(identity)))
