"""The log of a store: one commit is one record, written with one `pwrite` and durable with one `fdatasync`.

Owns: the numbers and the chain of the records, the open segment and the spare ones, what is durable.
Promises: numbers are consecutive for ever. A record is durable once a `sync` that began after its `append` has
returned, never before. `append` refuses before it writes, or writes all; after a failed write or sync nothing is
written any more. The last spare segment is kept for records that free room. Nothing that was cut comes back.
Leaves to others: what a payload means, when to sync and in which thread, what is visible (the store); opening after a
crash (`recovery`), the forms on the disk (`segments`, `notes`).

Threads: `append` and `room` belong to one thread, `sync` to one at a time, which may be another: it first takes the
number of the last record, then the segments that are not synced, so that it never covers less than that number.
`prepare_segment`, `note_durable` and `release` may run beside them in a third; `entries` in any. `cut` and `restart`
need that neither `append` nor `sync` runs.

    append 7   append 8             append 9
       |          |  sync begins       |     sync returns: durable is 8, though 9 may be on the disk, too
       +----------+-----+--------------+----------+
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from kvstore.errors import ForeignData, LogDamaged
from kvstore.storage import recovery
from kvstore.storage.disk import FULL_ERRNOS, Disk, remove_if_there
from kvstore.storage.notes import Kind, Note, Notes
from kvstore.storage.segments import (
    BEGINNING,
    DATA_OFFSET,
    HEADER_BYTES,
    RESTORE,
    SEGMENT_BYTES,
    Entry,
    Place,
    Position,
    Segment,
    checksum_of,
    encode_record,
    entry_at,
    header_at,
    make_segment,
    records_in,
    used_bytes,
)

__all__ = ["BEGINNING", "Entry", "Log", "LogFailed", "LogFull", "NotNext", "Position", "RecordTooLarge", "Released"]


_PIECE_BYTES = 1 << 18  # read at a time; a larger record is read alone


class LogFailed(Exception):
    """A write or a sync failed.
    What is on the disk is not known, so the process ends and opens the log again."""


class LogFull(Exception):
    """No room for the record until another segment is made; nothing was written."""


class RecordTooLarge(Exception):
    """The record does not fit into a segment; nothing was written."""


class NotNext(Exception):
    """The entry does not follow the last record of this log; nothing was written."""


class Released(Exception):
    """The records that are asked for are in the log no more."""


class _Part(NamedTuple):
    """Of one segment, what a reader reads."""

    segment: int
    start: int
    end: int


class Log:
    """An open log. `last`: position of the last record appended; `synced`: of the last durable one; `full`: whether the
    last try to make a segment found no room on the disk; `sync_under_way`: another object for each sync, None between
    two of them."""

    def __init__(self, disk: Disk, place: Place, notes: Notes, segment_bytes: int) -> None:
        self._disk = disk
        self._place = place
        self._notes = notes
        self._segment_bytes = segment_bytes
        self._used: list[Segment] = []  # the last of them is open
        self._spare: list[Segment] = []
        self._left: list[Segment] = []  # used, not open any more, and not synced since
        self._lists = Lock()  # held while the lists change, never during I/O
        self._background = Lock()  # one thing at a time beside appending
        self._failed: OSError | None = None
        self._base = BEGINNING  # a position before or in the log, with its term
        self.last = self.synced = BEGINNING
        self.full = False
        self.sync_under_way: object | None = None

    @classmethod
    def create(
        cls,
        disk: Disk,
        folder: Path,
        store: str,
        store_id: str,
        start: Position = BEGINNING,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Log:
        """Make an empty log behind that position; it is durable when this returns. Raises ForeignData, OSError.

        What a crash has left of an earlier try is removed; a log with records is refused.
        """
        place = Place(folder, store, store_id)
        indices = place.indices(disk)
        for index in indices:
            _remove_empty(disk, place.segment(index))
        index = max(indices, default=0) + 1
        notes = Notes.create(disk, place, Note(Kind.DURABLE, start, index))
        log = cls(disk, place, notes, segment_bytes)
        try:
            log._used.append(make_segment(disk, place, index, segment_bytes))
        except OSError:
            notes.close()
            raise
        log.last = log.synced = log._base = start
        return log

    @classmethod
    def open(
        cls,
        disk: Disk,
        folder: Path,
        store: str,
        store_id: str,
        applied: Position,
        told: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> tuple[Log, list[Entry]]:
        """Open the log and make it durable; returns it with the records behind `applied`, which the file has.

        `told` is the highest number that was told to others. Raises LogDamaged, ForeignData, OSError.
        """
        place = Place(folder, store, store_id)
        found = recovery.recover(disk, place, recovery.Evidence(applied, told))
        log = cls(disk, place, found.notes, segment_bytes)
        log._used, log._spare = found.segments[: found.open + 1], found.segments[found.open + 1 :]
        log.last = log.synced = found.last
        log._base = applied
        return log, found.entries

    # --- writing

    @property
    def durable(self) -> int:
        """The number of the last durable record."""
        return self.synced.number

    @property
    def payload_bytes_max(self) -> int:
        """The largest payload that any segment has room for."""
        return self._segment_bytes - DATA_OFFSET - HEADER_BYTES

    def append(self, payload: bytes, term: int = 0, *, frees: bool = False) -> int:
        """Write a record; returns its number. `frees`: it may use the last spare segment, because it makes room.

        Raises LogFull, RecordTooLarge with nothing written; LogFailed.
        """
        size = HEADER_BYTES + len(payload)
        segment = _segment_for(size, self._used[-1], self._spare, frees, self.full)
        if segment is None:
            if len(payload) > self.payload_bytes_max:
                raise RecordTooLarge(f"a record of {size} bytes does not fit into a segment of {self._segment_bytes}")
            raise LogFull(f"the log of {self._place.store} has no segment for a record of {size} bytes")
        if self._failed:
            raise LogFailed(str(self._failed)) from self._failed
        if segment is not self._used[-1]:
            with self._lists:
                self._left.append(self._used[-1])  # before another one is open: see `sync`
                taken = self._spare.index(segment) + 1  # smaller ones, made with another setting, stay empty
                self._used += self._spare[:taken]
                del self._spare[:taken]
        before = self.last
        number = before.number + 1
        seed, durable = self._place.seed, self.synced.number
        data, checksum = encode_record(seed, number, term, before.checksum, durable, payload)
        try:
            segment.file.pwrite(data, segment.end)
        except OSError as error:
            raise self._fail(error) from error
        segment.added(number, size)
        self.last = Position(number, checksum, term)
        return number

    def extend(self, entry: Entry) -> None:
        """Append a record of another copy of this log. Raises NotNext, and what `append` raises.

        It may use the last spare segment.
        """
        if entry.number != self.last.number + 1 or entry.previous != self.last.checksum:
            raise NotNext(f"record {entry.number} does not follow record {self.last.number} of this log")
        if checksum_of(self._place.seed, entry) != entry.checksum:
            raise NotNext(f"record {entry.number} does not match its checksum")
        self.append(entry.payload, entry.term, frees=True)

    def sync(self) -> int:
        """Make all that was appended before this call durable; returns the durable number. Raises LogFailed."""
        if self._failed:
            raise LogFailed(str(self._failed)) from self._failed
        target = self.last  # first: whatever comes later is not covered
        opened = self._used[-1]  # then the open segment, and last those left before it was opened
        left = tuple(self._left)
        self.sync_under_way = object()
        try:
            for segment in left:
                segment.file.sync()
            opened.file.sync()
        except OSError as error:
            raise self._fail(error) from error
        finally:
            self.sync_under_way = None
        for segment in left:
            self._left.remove(segment)
        self.synced = target
        return target.number

    def _fail(self, error: OSError) -> LogFailed:
        self._failed = error
        return LogFailed(f"the log of {self._place.store} cannot be written: {error}")

    # --- room

    @property
    def bytes(self) -> int:
        """Of all segments, used and spare."""
        with self._lists:
            return sum(segment.bytes for segment in (*self._used, *self._spare))

    @property
    def wants_segment(self) -> bool:
        """Whether it is time to call `prepare_segment`: always one spare, two when the open one is half full."""
        opened = self._used[-1]
        return len(self._spare) < 1 + (opened.end * 2 > opened.bytes)

    def room(self, *, frees: bool = False) -> int:
        """The largest payload that `append` would write now."""
        opened, spare = self._used[-1], self._spare
        rooms = [opened.bytes - opened.end] if frees or spare or not self.full else []
        rooms += [segment.bytes - segment.end for segment in spare[: len(spare) if frees else len(spare) - 1]]
        return max(rooms, default=0) - HEADER_BYTES

    def prepare_segment(self) -> bool:
        """Make a spare segment; False, with nothing left of it, if the disk has no room now. Raises OSError."""
        with self._background:
            with self._lists:
                index = (*self._used, *self._spare)[-1].index + 1
            try:
                segment = make_segment(self._disk, self._place, index, self._segment_bytes)
            except OSError as error:
                if error.errno not in FULL_ERRNOS:
                    raise
                self.full = True
                return False
            with self._lists:
                self._spare.append(segment)
            self.full = False
            return True

    # --- reading

    @property
    def first(self) -> int:
        """The number of the first record that is kept; one more than the last if there is none."""
        with self._lists:
            return next((segment.first for segment in self._used if segment.first), self.last.number + 1)

    def entries(self, after: int) -> Iterator[Entry]:
        """The records behind number `after`, up to the last one now. Raises Released, LogDamaged, OSError."""
        last = self.last.number  # before the ends of the segments
        if after >= last:
            return
        if after + 1 < self.first:
            raise Released(f"the log begins with record {self.first}")
        expected = after + 1
        with self._lists:
            parts = _parts_from(self._used, expected)
        for part in parts:
            for entry in _read(self._disk, self._place, part):
                if entry.number == expected:
                    yield entry
                    expected += 1
                if expected > last:
                    return
        raise LogDamaged(
            f"Record {expected} of the log of {self._place.store} cannot be read back. {RESTORE}.",
            number=expected, file=str(self._place.folder),
        )  # fmt: skip

    # --- taking away

    def release(self, number: int) -> None:
        """Delete the segments all of whose records are at most that number.
        Those that are open, or that a sync still has to cover, stay. Raises OSError."""
        with self._background:
            with self._lists:
                used = self._used
                synced = next((at for at, segment in enumerate(used) if segment in self._left), len(used) - 1)
                behind = [at for at in range(synced + 1) if 0 < used[at].first <= number + 1]
                keep = max(behind, default=0)
                released, self._used = used[:keep], used[keep:]
            _delete(self._disk, self._place, released)

    def cut(self, number: int) -> None:
        """Take away all records behind that number, durably.

        Raises ValueError for a number that is not in the log, LogDamaged, LogFailed, OSError.
        """
        with self._background:
            self.sync()
            if not self.first - 1 <= number <= self.last.number:
                raise ValueError(f"record {number} is not in the log: {self.first} to {self.last.number}")
            if number == self.last.number:
                return
            segments = [*self._used, *self._spare]
            front = self._base
            if front.number != self.first - 1:
                entry = next(self.entries(self.first - 1))
                front = Position(entry.number - 1, entry.previous)
            at, offset, position = recovery.find_end(segments, self._place, front, number)
            try:
                self._notes.write(Note(Kind.CUT, position, self._notes.newest.first_segment))
                recovery.zero_behind(segments, at, offset)
                self._notes.write_durable(position, twice=True)
            except OSError as error:
                raise self._fail(error) from error
            self._used, self._spare = segments[: at + 1], segments[at + 1 :]
            segments[at].cut_back(number, offset)
            for segment in self._spare:
                segment.empty()
            self.last = self.synced = position

    def restart(self, start: Position) -> None:
        """Begin behind that position in a new segment, and delete all others: a snapshot takes their place.

        Raises OSError with nothing changed, if the segment cannot be made; LogFailed.
        """
        with self._background:
            old = [*self._used, *self._spare]
            index = old[-1].index + 1
            segment = make_segment(self._disk, self._place, index, self._segment_bytes)
            try:
                for _ in range(2):
                    self._notes.write(Note(Kind.DURABLE, start, segment.index))
            except OSError as error:
                raise self._fail(error) from error
            with self._lists:
                self._used, self._spare, self._left = [segment], [], []
            self.last = self.synced = self._base = start
            _delete(self._disk, self._place, old)

    def note_durable(self) -> None:
        """Note the durable number beside the log, so that the last record is known to have been durable.

        Raises LogFailed.
        """
        with self._background:
            position = self.synced
            if position.number > self._notes.newest.position.number:
                try:
                    self._notes.write_durable(position)
                except OSError as error:
                    raise self._fail(error) from error

    def close(self) -> None:
        """Close the files; what was not synced may be lost. The log must not be used any more."""
        with self._background:
            recovery.close_all([*self._used, *self._spare], self._notes)


def _segment_for(size: int, opened: Segment, spare: list[Segment], frees: bool, full: bool) -> Segment | None:
    """Where a record of that size goes.
    What frees no room leaves one spare segment behind it on a full disk.

    A copy of `spare` is not needed: only the thread that appends takes from its front.
    """
    if opened.end + size <= opened.bytes:
        return opened if frees or spare or not full else None
    last = len(spare) if frees else len(spare) - 1
    return next((segment for segment in spare[:last] if segment.fits(size)), None)


def _remove_empty(disk: Disk, path: Path) -> None:
    """Remove a segment without records, whatever store it was made for. Raises ForeignData if it has any."""
    file = disk.open(path, write=False)
    try:
        used = used_bytes(file.pread(file.size(), 0))
    finally:
        file.close()
    if used > DATA_OFFSET:
        error = ForeignData(f"{path} holds records of an earlier log. Move the files of that log away.")
        error.is_damage = True  # of a store whose file is lost
        raise error
    disk.unlink(path)


def _parts_from(used: list[Segment], number: int) -> list[_Part]:
    """What of which segments holds the records from that one on."""
    used = [segment for segment in used if segment.first]
    begin = max((at for at, segment in enumerate(used) if segment.first <= number), default=0)
    return [_Part(each.index, each.offset_before(number), each.end) for each in used[begin:]]


def _read(disk: Disk, place: Place, part: _Part) -> Iterator[Entry]:
    """The records of the part, read in pieces as they are asked for.
    Through a file of its own: the segment may be released during that."""
    try:
        file = disk.open(place.segment(part.segment), write=False)
    except FileNotFoundError:
        raise Released(f"segment {part.segment} of the log of {place.store} is no more") from None
    try:
        start, size = part.start, _PIECE_BYTES
        while start < part.end:
            data = file.pread(min(size, part.end - start), start)
            whole = 0
            for offset, header in records_in(data, 0, place.seed, None):
                whole = offset + HEADER_BYTES + header.length
                yield entry_at(data, offset, header)
            cut_off = None if whole else header_at(data, 0, place.seed)
            needed = HEADER_BYTES + cut_off.length if cut_off else 0
            if not whole and not len(data) < needed <= part.end - start:
                return  # what lies there is no record
            start, size = start + whole, max(needed, _PIECE_BYTES)
    finally:
        file.close()


def _delete(disk: Disk, place: Place, segments: list[Segment]) -> None:
    """Remove these files; a crash may leave any of them, which the next opening removes."""
    for segment in segments:
        segment.file.close()
        remove_if_there(disk, segment.path)
    if segments:
        disk.sync_folder(place.folder)
