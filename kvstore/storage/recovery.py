"""Opening a log after anything: what is believed, what is cut off, and what is refused.

Owns: the reading of all segments at opening, and the judgement of the first record that does not verify.
Promises: all is synced before it is believed. A torn end is kept aside, cut off and overwritten. A record that was
proved durable and does not verify is never dropped: opening is refused. A crash at any point of the recovery leaves
what the next one finishes.
Leaves to others: appending (`log`), the state that the records lead to.

A record proves by its header that the log was durable up to the number it carries; the note, the number that the file
has applied and the number that was told to others prove it as well. The first record that does not verify is damage if
its number is proved by any of them, and the end of the log otherwise: then nothing of it was ever acknowledged, also if
a later record is there, since a disk may keep the second of two records under one sync without the first.

What the log itself does not prove durable is written again and synced: after a sync that failed in an earlier process
the kernel holds pages that look written and are not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import LogDamaged, StoreBehind
from kvstore.storage.disk import FULL_ERRNOS, Disk, remove_if_there
from kvstore.storage.notes import Kind, Note, Notes
from kvstore.storage.segments import (
    DATA_OFFSET,
    RESTORE,
    Entry,
    Header,
    Place,
    Position,
    Segment,
    open_segment,
    read_whole,
    used_bytes,
    zero,
)
from kvstore.storage.walk import Broken, Walk, end_of, first_headers

log = logging.getLogger(__name__)

_TORN_BYTES_MAX = 1 << 20


class Scan(NamedTuple):
    """What the segments hold from a place on. `own_proven`, `proven`: the highest durable number that a record which
    verifies carries, and that any header carries from the first broken record on."""

    first: Header | None
    last: Position
    own_proven: int
    proven: int
    broken: Broken | None
    entries: list[Entry]
    applied_checksum: int | None


class Evidence(NamedTuple):
    """What was durable, known apart from the log: applied in the file, and told to others."""

    applied: Position
    told: int = 0


class Recovered(NamedTuple):
    """The log as it can be used. `entries` follow the applied number; segments behind place `open` are spare."""

    segments: list[Segment]
    open: int
    notes: Notes
    last: Position
    entries: list[Entry]


def recover(disk: Disk, place: Place, evidence: Evidence) -> Recovered:
    """Open the log, mend its end, and make all of it durable. Raises LogDamaged, StoreBehind, ForeignData, OSError."""
    notes, segments = open_all(disk, place)
    try:
        if notes.newest.kind is Kind.CUT:
            finish_cut(segments, place, notes)
        scan = scan_all(segments, place, evidence.applied, notes.newest.position)
        judge(scan, segments, evidence, notes.newest.position)
        if scan.broken:
            _keep_aside(disk, place, segments, scan.broken)
            zero_behind(segments, scan.broken.segment, scan.broken.offset)
        _write_again(segments, max(scan.own_proven, notes.newest.position.number))
        notes.write_durable(scan.last)
        _remove_leftovers(disk, place, segments[0].index)
    except BaseException:
        close_all(segments, notes)
        raise
    return Recovered(segments, _open_place(segments), notes, scan.last, scan.entries)


def open_all(disk: Disk, place: Place, *, write: bool = True) -> tuple[Notes, list[Segment]]:
    """Open the note and the segments, all synced if they may be written. Raises LogDamaged, ForeignData, OSError.

    Only segments without a gap before the newest belong to the log: a crash may undo any of the removals in front.
    """
    if write:
        remove_if_there(disk, place.new)
    notes = Notes.open(disk, place, write=write)
    segments: list[Segment] = []
    try:
        indices = [index for index in place.indices(disk) if index >= notes.newest.first_segment]
        if not indices:
            raise LogDamaged(f"{place.segment(1)} and all other segments of the log are missing. {RESTORE}.")
        indices = [index for place_, index in enumerate(indices) if indices[-1] - index == len(indices) - 1 - place_]
        for index in indices:
            segments.append(open_segment(disk, place, index, write=write))
        if write:
            disk.sync_folder(place.folder)
    except BaseException:
        close_all(segments, notes)
        raise
    return notes, segments


def close_all(segments: Sequence[Segment], notes: Notes) -> None:
    """Close the files of all segments and of the note."""
    for segment in segments:
        segment.file.close()
    notes.close()


# --- cutting


def find_end(segments: Sequence[Segment], place: Place, before: Position, number: int) -> tuple[int, int, Position]:
    """Where record `number` ends (place of the segment, offset), and its position. Raises LogDamaged.

    If the log begins behind that number, this is its beginning, which is behind the position `before`.
    """
    found = end_of(segments, place.seed, number)
    if found is None or (found[2] is None and number != before.number):
        raise LogDamaged(
            f"Record {number} is not in the log at {segments[0].path}, where it should be. {RESTORE}.",
            number=number, file=str(segments[0].path),
        )  # fmt: skip
    at, offset, position = found
    return at, offset, position or before


def zero_behind(segments: Sequence[Segment], at: int, offset: int) -> None:
    """Overwrite all that lies behind that place, from the end of the log towards its front, each step synced."""
    for segment in reversed(segments[at:]):
        start = offset if segment is segments[at] else DATA_OFFSET
        end = used_bytes(read_whole(segment))
        if end > start:
            zero(segment, start, end)


def finish_cut(segments: Sequence[Segment], place: Place, notes: Notes) -> None:
    """Do what the note of a cut says, and note that it is done. Raises LogDamaged, OSError."""
    position = notes.newest.position
    at, offset, _ = find_end(segments, place, position, position.number)
    zero_behind(segments, at, offset)
    notes.write_durable(position, twice=True)


def cut_offline(disk: Disk, place: Place, applied: Position, number: int) -> None:
    """Take away all records behind that number, damaged or not, of a log that is not open.

    What was durable behind it is lost. Raises LogDamaged if the log does not hold all up to there; OSError.
    """
    notes, segments = open_all(disk, place)
    try:
        _, _, position = find_end(segments, place, applied, number)
        notes.write(Note(Kind.CUT, position, notes.newest.first_segment))
        finish_cut(segments, place, notes)
    finally:
        close_all(segments, notes)


# --- reading


def scan_all(segments: Sequence[Segment], place: Place, applied: Position, noted: Position) -> Scan:
    """Read from the segment of the first record that the file lacks on. Raises LogDamaged, OSError."""
    firsts = first_headers(segments, place.seed)
    start = max((at for at, header in enumerate(firsts) if header and header.number <= applied.number), default=0)
    for at in range(start):
        _take_unread(segments[at], firsts[at])
    return _scan(segments, start, place.seed, applied, noted)


def _take_unread(segment: Segment, first: Header | None) -> None:
    """All in this segment is applied: it is for copies, and they check what they read. Raises LogDamaged."""
    segment.empty()
    if first:
        segment.first, segment.end = first.number, segment.bytes
        segment.marks.append((first.number, DATA_OFFSET))
    elif used_bytes(read_whole(segment)) > DATA_OFFSET:
        raise LogDamaged(
            f"The first record in {segment.path} (byte {DATA_OFFSET}) is damaged, and later ones are there. {RESTORE}.",
            file=str(segment.path), offset=DATA_OFFSET,
        )  # fmt: skip


def _scan(segments: Sequence[Segment], start: int, seed: int, applied: Position, noted: Position) -> Scan:
    first: Header | None = None
    own_proven, applied_checksum = 0, None
    entries: list[Entry] = []
    walk = Walk(segments, start, seed, applied.number + 1)
    for found in walk:
        header = found.header
        first = first or header
        own_proven = max(own_proven, header.durable)
        if header.number == applied.number:
            applied_checksum = header.checksum
        elif header.number > applied.number:
            entries.append(found.entry)
    last = walk.last.position if walk.last else noted
    return Scan(first, last, own_proven, walk.proven, walk.broken, entries, applied_checksum)


# --- judging


def judge(scan: Scan, segments: Sequence[Segment], evidence: Evidence, noted: Position) -> None:
    """Refuse the log if a record that was durable is lost or damaged. Raises LogDamaged, StoreBehind."""
    applied, broken = evidence.applied, scan.broken
    proofs = {
        scan.proven: "a later record",
        noted.number: "the note beside the log",
        applied.number: "the file, which has applied it",
        evidence.told: "the number last told to the controller",
    }
    proven = max(proofs)
    if broken and broken.number <= proven:
        path = segments[broken.segment].path
        raise LogDamaged(
            f"Record {broken.number} in {path} (byte {broken.offset}) is damaged or lost, and it was durable: "
            f"that is proved up to record {proven} by {proofs[proven]}. {_mend(broken.number - 1)}",
            number=broken.number, file=str(path), offset=broken.offset,
        )  # fmt: skip
    last = segments[_open_place(segments)]
    if scan.last.number < evidence.told and max(scan.proven, noted.number, applied.number) <= scan.last.number:
        raise StoreBehind(  # file and log fit together, and neither knows of more
            f"The store at {last.path} ends with record {scan.last.number}, and it has told the controller that record "
            f"{evidence.told} was durable.",
            number=scan.last.number, told=evidence.told,
        )  # fmt: skip
    if scan.last.number < proven:
        raise LogDamaged(
            f"The log ends with record {scan.last.number} in {last.path} (byte {last.end}), and record {proven} was "
            f"durable: that is proved by {proofs[proven]}. {_mend(scan.last.number)}",
            number=scan.last.number + 1, file=str(last.path), offset=last.end,
        )  # fmt: skip
    begins = scan.first.number if scan.first else noted.number + 1
    if begins > applied.number + 1:
        raise LogDamaged(
            f"The file has applied up to record {applied.number}, and the log begins with {begins} in "
            f"{segments[0].path}. Restore the file and the log from the same copy.",
            number=applied.number + 1, file=str(segments[0].path),
        )  # fmt: skip
    found = scan.applied_checksum
    if found is None:
        found = scan.first.previous if scan.first else noted.checksum
    if found != applied.checksum:
        raise LogDamaged(
            f"Record {applied.number} of the log at {segments[0].path} is not the one that the file has applied. "
            "Restore the file and the log from the same copy.",
            number=applied.number, file=str(segments[0].path),
        )  # fmt: skip


def _mend(after: int) -> str:
    return (
        f"{RESTORE}; where there is none, `kvstore store cut FILE --after {after} --accept-loss` opens it without "
        "what follows."
    )


# --- mending


def _open_place(segments: Sequence[Segment]) -> int:
    """The place of the last segment that has records."""
    return max((at for at, segment in enumerate(segments) if segment.first), default=0)


def _keep_aside(disk: Disk, place: Place, segments: Sequence[Segment], broken: Broken) -> None:
    """Save the torn end in a small file, for examination; without one if the disk is full."""
    data = read_whole(segments[broken.segment])
    torn = data[broken.offset : used_bytes(data)][:_TORN_BYTES_MAX]
    for segment in segments[broken.segment + 1 :]:
        data = read_whole(segment)
        torn += data[DATA_OFFSET : max(DATA_OFFSET, used_bytes(data))][: _TORN_BYTES_MAX - len(torn)]
    path = place.torn(broken.number)
    log.warning("the log of %s ends with a torn record %d: cut off, kept in %s", place.store, broken.number, path)
    others = [name for name in disk.names(place.folder) if name.startswith(place.torn_prefix)]
    if path.name in others:
        return  # what a recovery that crashed has saved is more complete
    try:
        file = disk.open(place.new, create=True)
        with contextlib.closing(file):
            file.pwrite(torn, 0)
            file.sync()
        disk.rename(place.new, path)
        for name in others:
            remove_if_there(disk, place.folder / name)
        disk.sync_folder(place.folder)
    except OSError as error:
        if error.errno not in FULL_ERRNOS:
            raise
        log.warning("the torn end could not be kept: %s", error)


def _write_again(segments: Sequence[Segment], proven: int) -> None:
    """Write all behind record `proven` once more, and sync it; also what was not read, because it is applied."""
    for segment in reversed(segments):
        if not segment.first:
            continue
        start = segment.offset_before(proven + 1)
        segment.file.pwrite(segment.file.pread(segment.end - start, start), start)
        segment.file.sync()
        if segment.first <= proven + 1:
            return


def _remove_leftovers(disk: Disk, place: Place, first_index: int) -> None:
    """Remove the segments in front that do not belong to the log any more."""
    leftovers = [index for index in place.indices(disk) if index < first_index]
    for index in leftovers:
        remove_if_there(disk, place.segment(index))
    if leftovers:
        disk.sync_folder(place.folder)
