"""Reading a log that is not open, without changing it: the report on its chain, and its records for people.

Owns: `check_log`, `read_log`.
Promises: writes nothing, not even what an opening would mend. The whole chain is walked, from the first record kept, so
damage is found that an opening does not look at because the file has applied those records. Records are judged by the
rules of an opening: what it would cut off as a torn end is reported as that.
Leaves to others: the file beside the log, and what is shown (the command line).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvstore.errors import LogDamaged
from kvstore.storage import recovery
from kvstore.storage.disk import Disk
from kvstore.storage.notes import Kind, Notes
from kvstore.storage.segments import (
    BEGINNING,
    RESTORE,
    Entry,
    Place,
    Position,
    Segment,
    header_bytes_of,
    indices_of,
    segment_path,
    store_id_of,
)
from kvstore.storage.walk import Broken, Found, Walk


class LogReport(NamedTuple):
    """What a log holds; all is empty if it cannot be read at all.
    `first` is 0 in a log without records.

    `proven`: up to which number something shows it was durable. `torn`: where the next opening cuts off a torn end.
    `cut_to`: behind that number it finishes a cut. `damage`: which record is lost or damaged, where, what to do.
    """

    store_id: str
    segments: int
    bytes: int
    records: int
    first: int
    last: Position
    proven: int
    torn: Broken | None
    cut_to: int | None
    damage: LogDamaged | None


class Logged(NamedTuple):
    """A record, where it lies, and up to which number the log was durable when it was written."""

    file: Path
    offset: int
    entry: Entry
    durable: int


def place_of(disk: Disk, folder: Path, store: str) -> Place:
    """The log of that store, whose id is that of its newest segment with a whole header. Raises LogDamaged, OSError."""
    for index in reversed(indices_of(disk, folder, store)):
        file = disk.open(segment_path(folder, store, index), write=False)
        try:
            found = store_id_of(header_bytes_of(file))
        finally:
            file.close()
        if found:
            return Place(folder, store, found)
    raise LogDamaged(f"{folder} holds no segment of the log of {store} with a whole header. {RESTORE}.")


def check_log(
    disk: Disk,
    folder: Path,
    store: str,
    applied: Position | None = None,
    told: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> LogReport:
    """Walk the whole chain; `progress` is called with bytes read and in all. Raises ForeignData, OSError.

    `applied` is what the file has applied, if that is known.
    """
    try:
        place = place_of(disk, folder, store)
        notes, segments = recovery.open_all(disk, place, write=False)
    except LogDamaged as damage:
        return LogReport("", 0, 0, 0, 0, BEGINNING, 0, None, None, damage)
    try:
        return _Check(place, notes, segments).report(applied, told, progress)
    finally:
        recovery.close_all(segments, notes)


def read_log(disk: Disk, folder: Path, store: str, after: int = 0) -> Iterator[Logged]:
    """The records behind number `after`, oldest first, up to the torn end if there is one.

    Raises LogDamaged where a record is damaged or lost; ForeignData, OSError.
    """
    place = place_of(disk, folder, store)
    notes, segments = recovery.open_all(disk, place, write=False)
    try:
        check = _Check(place, notes, segments)
        for found in check.records():
            if found.header.number > after:
                yield Logged(segments[found.segment].path, found.offset, found.entry, found.header.durable)
        check.judge(None, 0)
    finally:
        recovery.close_all(segments, notes)


class _Check:
    """One walk over a log, and its judgement."""

    def __init__(self, place: Place, notes: Notes, segments: list[Segment]) -> None:
        self._store_id = place.store_id
        self._segments = segments
        self._note = notes.newest
        self._cut_to = self._note.position.number if self._note.kind is Kind.CUT else None
        self._walk = Walk(segments, 0, place.seed, self._note.position.number + 1)
        self._first: Found | None = None
        self._last = self._note.position
        self._own_proven = 0
        self._checksums: dict[int, int] = {}
        self.count = 0

    def records(self, wanted: int = 0) -> Iterator[Found]:
        """All records, except those that an unfinished cut takes away; remembers the checksum of number `wanted`."""
        for found in self._walk:
            header = found.header
            if self._cut_to is not None and header.number > self._cut_to:
                return
            self._first = self._first or found
            self._last = header.position
            self._own_proven = max(self._own_proven, header.durable)
            self.count += 1
            if header.number == wanted:
                self._checksums[wanted] = header.checksum
            yield found

    def judge(self, applied: Position | None, told: int) -> Broken | None:
        """Where the torn end begins, if there is one. Raises LogDamaged."""
        first = self._first.header if self._first else None
        if applied is None:  # then the file fits, and what it has proves nothing
            applied = Position(first.number - 1, first.previous) if first else self._note.position
        broken, proven = self._walk.broken, self._walk.proven
        if self._cut_to is not None and self._last.number == self._cut_to:
            broken, proven = None, 0  # what follows goes, whatever it is
        scan = recovery.Scan(
            first, self._last, self._own_proven, proven, broken, [], self._checksums.get(applied.number)
        )
        recovery.judge(scan, self._segments, recovery.Evidence(applied, told), self._note.position)
        return broken

    def report(self, applied: Position | None, told: int, progress: Callable[[int, int], object]) -> LogReport:
        total = sum(segment.bytes for segment in self._segments)
        at, done = -1, 0
        for found in self.records(applied.number if applied else 0):
            if found.segment != at:
                progress(done, total)
                at, done = found.segment, done + self._segments[found.segment].bytes
        progress(total, total)
        torn: Broken | None = None
        damage: LogDamaged | None = None
        try:
            torn = self.judge(applied, told)
        except LogDamaged as error:
            damage = error
        proven = max(self._own_proven, self._walk.proven, self._note.position.number, told)
        first = self._first.header.number if self._first else 0
        return LogReport(
            self._store_id, len(self._segments), total, self.count, first, self._last,
            max(proven, applied.number if applied else 0), torn, self._cut_to, damage,
        )  # fmt: skip
