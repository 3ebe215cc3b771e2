"""What lies on the disk of a log: segments full of records, and where each file of a log is.

Owns: the forms of a segment and of a record, their checksums, the names of the files, the making of a segment.
Promises: a segment is seen under its name only when it is whole and durable; its header is never written again.
Leaves to others: which records are believed (`recovery`), and what is written when (`log`).

A segment is a page with a header, then records one after the other, then zeros. It is made ahead of need and written
full of real zeros, so that a record's `fdatasync` has no size and no blocks to record.

A record has two checksums. `checksum` covers length, term, number, the checksum of the record before, and the payload;
it is equal in every copy of the log, so two logs that agree on it for one number are equal up to there. `guard` covers
the header, with what belongs to this log only: up to which number it was durable when the record was written. A header
is therefore known to be one without its payload, and can be found behind a damaged one. Both are seeded with the
store's id, so a record of another store is none.
"""

from __future__ import annotations

import contextlib
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest as xxh3

from kvstore.errors import ForeignData, LogDamaged
from kvstore.storage.disk import Disk, DiskFile, remove_if_there

FORMAT = 1
DATA_OFFSET = 4096  # of the first record: the segment's header has a page to itself
SEGMENT_BYTES = 16 * 1024 * 1024
RESTORE = "Restore this copy of the store from another one"

_MAGIC = b"KVSEGMNT"
_SEGMENT = struct.Struct("<8sIQQ64sQ")  # magic, format, bytes, index, store id, checksum of all that
_RECORD_MAGIC = b"KVR\x01"
_RECORD = struct.Struct("<4sQQQIQQQ")  # magic, guard, then what `Header` lists
_GUARD = struct.Struct("<Q")
_LOCAL = struct.Struct("<QQ")  # checksum, durable
_CHAINED = struct.Struct("<IQQQ")  # length, term, number, previous
HEADER_BYTES = _RECORD.size
_GUARDED = len(_RECORD_MAGIC) + _GUARD.size  # where that begins which the guard covers
_CHAINED_AT = HEADER_BYTES - _CHAINED.size
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_MARK_BYTES = 1 << 16  # between two remembered places of a segment


class Position(NamedTuple):
    """A place in a log: behind the record with this number, checksum and term. Number 0 is the beginning."""

    number: int
    checksum: int
    term: int = 0


BEGINNING = Position(0, 0)


class Entry(NamedTuple):
    """One record. `previous` is the checksum of the one before."""

    number: int
    term: int
    payload: bytes
    checksum: int
    previous: int


class Header(NamedTuple):
    """A record's header whose guard is right. `durable`: the log was durable up to there when this was written."""

    checksum: int
    durable: int
    length: int
    term: int
    number: int
    previous: int

    @property
    def position(self) -> Position:
        """Behind this record."""
        return Position(self.number, self.checksum, self.term)


def segment_path(folder: Path, store: str, index: int) -> Path:
    """The file of the segment: `<store>.log.<index>`, with six digits or more."""
    return folder / f"{store}.log.{index:06d}"


def indices_of(disk: Disk, folder: Path, store: str) -> list[int]:
    """Those of the segments that are there, ascending."""
    pattern = re.compile(re.escape(f"{store}.log.") + "([0-9]{6,19})")
    return sorted(int(match[1]) for match in map(pattern.fullmatch, disk.names(folder)) if match)


class Place:
    """The names of a log's files. Raises ValueError for a store id that is not of 1 to 64 bytes.

    `<store>.log.000042`, `.log.note`, `.log.new` while one is made, `.log.torn-<n>`.
    """

    def __init__(self, folder: Path, store: str, store_id: str) -> None:
        self.folder = folder
        self.store = store
        self.store_id = store_id
        self.id_bytes = store_id.encode()
        if not 0 < len(self.id_bytes) <= 64:
            raise ValueError(f"a store id has 1 to 64 bytes, not {store_id!r}")
        self.seed = xxh3(self.id_bytes)
        self.note = folder / f"{store}.log.note"
        self.new = folder / f"{store}.log.new"
        self.torn_prefix = f"{store}.log.torn-"

    def segment(self, index: int) -> Path:
        """The file of that segment."""
        return segment_path(self.folder, self.store, index)

    def torn(self, number: int) -> Path:
        """The file that keeps a torn end which began with that record."""
        return self.folder / f"{self.torn_prefix}{number}"

    def indices(self, disk: Disk) -> list[int]:
        """Those of the segments that are there, ascending."""
        return indices_of(disk, self.folder, self.store)


class Segment:
    """One open segment. `first`: number of its first record, 0 while it has none; `end`: where the next record goes."""

    __slots__ = ("bytes", "end", "file", "first", "index", "marks", "path")

    def __init__(self, index: int, path: Path, file: DiskFile, size: int) -> None:
        self.index = index
        self.path = path
        self.file = file
        self.bytes = size
        self.empty()

    def empty(self) -> None:
        """Forget its records."""
        self.first = 0
        self.end = DATA_OFFSET
        self.marks: list[tuple[int, int]] = []

    def fits(self, record_bytes: int) -> bool:
        """Whether a record of that size has room behind the last one."""
        return self.end + record_bytes <= self.bytes

    def added(self, number: int, record_bytes: int) -> None:
        """A record lies at `end` now."""
        if not self.marks or self.end - self.marks[-1][1] >= _MARK_BYTES:
            self.first = self.first or number
            self.marks.append((number, self.end))
        self.end += record_bytes

    def cut_back(self, number: int, end: int) -> None:
        """Its last record is `number` now, and ends at `end`."""
        self.end = end
        del self.marks[bisect_right(self.marks, (number, end)) :]
        if not self.marks:
            self.first = 0

    def offset_before(self, number: int) -> int:
        """Where a record begins at or before that one, and not far from it."""
        place = bisect_right(self.marks, (number, self.bytes)) - 1
        return self.marks[place][1] if place >= 0 else DATA_OFFSET


# --- records


def encode_record(seed: int, number: int, term: int, previous: int, durable: int, payload: bytes) -> tuple[bytes, int]:
    """The record as it is written, and its checksum in the chain."""
    chained = _CHAINED.pack(len(payload), term, number, previous)
    body = chained + payload
    checksum = xxh3(body, seed)
    local = _LOCAL.pack(checksum, durable)
    return b"".join((_RECORD_MAGIC, _GUARD.pack(xxh3(local + chained, seed)), local, body)), checksum


def checksum_of(seed: int, entry: Entry) -> int:
    """The checksum in the chain that the entry must have in a log of that seed."""
    return xxh3(_CHAINED.pack(len(entry.payload), entry.term, entry.number, entry.previous) + entry.payload, seed)


def header_at(data: bytes, offset: int, seed: int) -> Header | None:
    """The header that begins there, if one does."""
    end = offset + HEADER_BYTES
    if len(data) < end or data[offset : offset + len(_RECORD_MAGIC)] != _RECORD_MAGIC:
        return None
    _, guard, *fields = _RECORD.unpack_from(data, offset)
    return Header(*fields) if xxh3(data[offset + _GUARDED : end], seed) == guard else None


def entry_at(data: bytes, offset: int, header: Header) -> Entry:
    """The record with the header that was found there."""
    payload = data[offset + HEADER_BYTES : offset + HEADER_BYTES + header.length]
    return Entry(header.number, header.term, payload, header.checksum, header.previous)


def records_in(data: bytes, offset: int, seed: int, before: Position | None) -> Iterator[tuple[int, Header]]:
    """The records from `offset` on, up to the first that does not verify or does not follow the one before."""
    while header := header_at(data, offset, seed):
        end = offset + HEADER_BYTES + header.length
        if before and (header.number != before.number + 1 or header.previous != before.checksum):
            return
        if end > len(data) or xxh3(data[offset + _CHAINED_AT : end], seed) != header.checksum:
            return
        yield offset, header
        offset, before = end, header.position


def headers_in(data: bytes, offset: int, seed: int) -> Iterator[Header]:
    """Every header from `offset` on, wherever it begins: a damaged length hides where the next one does."""
    while (offset := data.find(_RECORD_MAGIC, offset)) >= 0:
        if header := header_at(data, offset, seed):
            yield header
        offset += 1


# --- segments


def segment_header(place: Place, index: int, size: int) -> bytes:
    """The bytes that a segment of that size begins with; the checksum is their last 8."""
    head = _SEGMENT.pack(_MAGIC, FORMAT, size, index, place.id_bytes, 0)[: -_GUARD.size]
    return head + _GUARD.pack(xxh3(head))


def make_segment(disk: Disk, place: Place, index: int, size: int) -> Segment:
    """Write a segment full of zeros; returns it once it is durable under its name. Raises OSError, leaving nothing."""
    file = None
    try:
        remove_if_there(disk, place.new)
        file = disk.open(place.new, create=True)
        zeros = bytes(min(size, _CHUNK))
        for offset in range(0, size, _CHUNK):
            file.pwrite(zeros[: size - offset], offset)
            if offset + _CHUNK < size:
                file.sync()  # piece by piece: other syncs of that disk would wait for all of it
        file.pwrite(segment_header(place, index, size), 0)
        file.sync()
        disk.rename(place.new, place.segment(index))
        disk.sync_folder(place.folder)
    except OSError:
        if file is not None:
            file.close()
        for path in (place.new, place.segment(index)):
            with contextlib.suppress(OSError):  # the next try, or the next opening, does it
                remove_if_there(disk, path)
        raise
    return Segment(index, place.segment(index), file, size)


def open_segment(disk: Disk, place: Place, index: int, *, write: bool = True) -> Segment:
    """Open it, sync it if it may be written, and check its header. Raises LogDamaged, ForeignData, OSError."""
    path = place.segment(index)
    file = disk.open(path, write=write)
    try:
        if write:
            file.sync()
        size = _segment_bytes(place, index, header_bytes_of(file), file.size())
    except BaseException:
        file.close()
        raise
    return Segment(index, path, file, size)


def header_bytes_of(file: DiskFile) -> bytes:
    """What should be the header of a segment."""
    return file.pread(_SEGMENT.size, 0)


def store_id_of(data: bytes) -> str | None:
    """The id of the store to which a segment belongs, by its first bytes; None if they are no header."""
    if len(data) < _SEGMENT.size or xxh3(data[: _SEGMENT.size - _GUARD.size]) != _SEGMENT.unpack_from(data)[-1]:
        return None
    return str(_SEGMENT.unpack_from(data)[4].rstrip(b"\0"), "utf-8", "replace")


def _segment_bytes(place: Place, index: int, data: bytes, found: int) -> int:
    """The size with which the segment was made."""
    path = place.segment(index)
    where = {"file": str(path), "offset": 0}
    if store_id_of(data) is None:
        raise LogDamaged(f"{path} does not begin with the header of a segment of a log. {RESTORE}.", **where)
    magic, version, size, own_index, _, _ = _SEGMENT.unpack_from(data)
    if magic != _MAGIC or version != FORMAT:
        raise ForeignData(f"{path} is a log of format {version}; this program reads format {FORMAT}.")
    if (found_id := store_id_of(data)) != place.store_id:
        raise ForeignData(f"{path} belongs to the log of store {found_id}, not {place.store_id}.")
    if own_index != index:
        raise LogDamaged(f"{path} is segment {own_index} under a wrong name. Give it its own name again.", **where)
    if found < size:
        raise LogDamaged(f"{path} has {found} bytes and was made with {size}. {RESTORE}.", **where)
    return int(size)


# --- a whole segment in memory


def read_whole(segment: Segment) -> bytes:
    """All bytes of the segment, the zeros at its end included. Raises OSError."""
    return segment.file.pread(segment.bytes, 0)


def read_used(segment: Segment) -> bytes:
    """As `read_whole`, without the zeros at its end, of which most segments are made: reading them takes longest."""
    end = segment.bytes
    while end:
        start = max(0, end - _CHUNK)
        chunk = segment.file.pread(end - start, start)
        if chunk != _ZEROS[: len(chunk)]:
            return segment.file.pread(start + used_bytes(chunk), 0)
        end = start
    return b""


def used_bytes(data: bytes) -> int:
    """Behind there are only zeros."""
    end = len(data)
    while data.endswith(
        _ZEROS, max(0, end - _CHUNK), end
    ):  # of most segments nearly all: rstrip takes ten times as long
        end -= _CHUNK
    start = max(0, end - _CHUNK)
    return start + len(data[start:end].rstrip(b"\0"))


def zero(segment: Segment, start: int, end: int) -> None:
    """Overwrite that part with zeros, durably."""
    for offset in range(start, end, _CHUNK):
        segment.file.pwrite(bytes(min(_CHUNK, end - offset)), offset)
    segment.file.sync()
