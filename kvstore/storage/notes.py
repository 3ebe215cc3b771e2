"""The note of a log: one small file that says what the records themselves cannot.

Owns: `<store>.log.note`, with room for two notes on two pages, written in turn.
Promises: a note that is torn by a crash leaves the one before it in force.
Leaves to others: when to write one (`log`), and what follows from it (`recovery`).

A note of a durable number proves that the last record was durable, which no later record says. A note of a cut, in
force until the cut is finished, makes a cut survive crashes: without it, what a crash leaves of a cut tail looks like
damage, or like records that were never cut. Once finished it must be gone from both pages, since the older one comes
into force when the newer is damaged.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest as xxh3

from kvstore.errors import LogDamaged
from kvstore.storage.disk import Disk, DiskFile, remove_if_there
from kvstore.storage.segments import RESTORE, Place, Position

_PAGE = 4096
_NOTE = struct.Struct("<8sQIIQQQQ")  # magic, count, format, kind, number, checksum, term, first segment
_SUM = struct.Struct("<Q")
_MAGIC = b"KVLGNOTE"
_FORMAT = 1


class Kind(IntEnum):
    """What a note says of its position."""

    DURABLE = 1  # all up to the position was durable
    CUT = 2  # all behind the position is to be overwritten before anything is appended


class Note(NamedTuple):
    """`first_segment`: segments below that index do not belong to the log any more."""

    kind: Kind
    position: Position
    first_segment: int


class Notes:
    """The open file."""

    def __init__(self, path: Path, file: DiskFile, seed: int, count: int, newest: Note) -> None:
        self._path = path
        self._file = file
        self._seed = seed
        self._count = count
        self.newest = newest

    @classmethod
    def create(cls, disk: Disk, place: Place, note: Note) -> Notes:
        """Make the file, with that note on both pages; durable once its folder is synced. Raises OSError."""
        remove_if_there(disk, place.note)
        notes = cls(place.note, disk.open(place.note, create=True), place.seed, 0, note)
        notes.write(note)
        notes.write(note)  # both pages have their blocks now: a full disk must not refuse a note
        return notes

    @classmethod
    def open(cls, disk: Disk, place: Place, *, write: bool = True) -> Notes:
        """Read the newest note that verifies, once it is synced. Raises LogDamaged, OSError."""
        try:
            file = disk.open(place.note, write=write)
        except FileNotFoundError:
            raise LogDamaged(f"{place.note} is missing beside the log. {RESTORE}.", file=str(place.note)) from None
        if write:
            file.sync()
        found = [each for page in (0, _PAGE) if (each := _decode(file.pread(_PAGE, page), place.seed))]
        if not found:
            file.close()
            raise LogDamaged(f"{place.note} holds no note of this store's log. {RESTORE}.", file=str(place.note))
        count, newest = max(found)
        return cls(place.note, file, place.seed, count, newest)

    def write(self, note: Note) -> None:
        """Make the note durable. Raises OSError."""
        count = self._count + 1
        position = note.position
        data = _NOTE.pack(
            _MAGIC, count, _FORMAT, note.kind, position.number, position.checksum, position.term, note.first_segment
        )
        self._file.pwrite(data + _SUM.pack(xxh3(data, self._seed)), count % 2 * _PAGE)
        self._file.sync()
        self._count, self.newest = count, note

    def write_durable(self, position: Position, *, twice: bool = False) -> None:
        """Note that all up to the position is durable; `twice` when no older note may come into force again."""
        for _ in range(1 + twice):
            self.write(Note(Kind.DURABLE, position, self.newest.first_segment))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _decode(data: bytes, seed: int) -> tuple[int, Note] | None:
    """The count and the note that lie in a page, if they verify."""
    if len(data) < _NOTE.size + _SUM.size:
        return None
    (checksum,) = _SUM.unpack_from(data, _NOTE.size)
    magic, count, version, kind, number, summed, term, first_segment = _NOTE.unpack_from(data)
    if magic != _MAGIC or version != _FORMAT or xxh3(data[: _NOTE.size], seed) != checksum:
        return None
    return count, Note(Kind(kind), Position(number, summed, term), first_segment)
