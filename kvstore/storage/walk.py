"""Reading segments from front to end: every record that verifies, and the first that does not.

Owns: `Walk`, the search behind a broken record.
Promises: writes nothing. What it finds behind a broken record is looked for at every byte of all segments that follow,
since a damaged length hides where the next record begins.
Leaves to others: whether a broken record is the torn end of the log or damage (`recovery`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore.storage.segments import (
    DATA_OFFSET,
    HEADER_BYTES,
    Entry,
    Header,
    Position,
    Segment,
    entry_at,
    header_at,
    headers_in,
    read_used,
    read_whole,
    records_in,
    used_bytes,
)


class Broken(NamedTuple):
    """Where the first record lies that does not verify (segment by place in the list); `number` is its own."""

    segment: int
    offset: int
    number: int


class Found(NamedTuple):
    """A record in a segment, whose bytes are `data`."""

    segment: int
    offset: int
    header: Header
    data: bytes

    @property
    def entry(self) -> Entry:
        """The record."""
        return entry_at(self.data, self.offset, self.header)


class Walk:
    """The records of the segments from place `start` on; each segment learns what it holds.

    `number` is that of the first record wanted: if none comes before it, the log must not begin behind it in a later
    segment than its first. Known when the walk is over: `broken`, the first record that does not verify, and `proven`,
    the highest durable number that its header or any behind it carries. `last` is the record before that.
    """

    def __init__(self, segments: Sequence[Segment], start: int, seed: int, number: int) -> None:
        self._segments = segments
        self._start = start
        self._seed = seed
        self._number = number
        self.last: Header | None = None
        self.broken: Broken | None = None
        self.proven = 0

    def __iter__(self) -> Iterator[Found]:
        for at in range(self._start, len(self._segments)):
            segment = self._segments[at]
            segment.empty()
            data = read_used(segment)
            if not self.last and at > self._start and self._begins_behind(data):
                self._search(self._start)
                return
            yield from self._records(at, data, DATA_OFFSET)
            if len(data) > segment.end:  # the next record is damaged, or ends with zeros
                data = read_whole(segment)
                yield from self._records(at, data, segment.end)
                if used_bytes(data) > segment.end:
                    self._search(at)
                    return

    def _records(self, at: int, data: bytes, offset: int) -> Iterator[Found]:
        for place, header in records_in(data, offset, self._seed, self.last and self.last.position):
            self.last = header
            self._segments[at].added(header.number, HEADER_BYTES + header.length)
            yield Found(at, place, header, data)

    def _begins_behind(self, data: bytes) -> bool:
        """Whether the segment begins with a later record than is wanted: what lay before it, the disk has not kept."""
        header = header_at(data, DATA_OFFSET, self._seed)
        return header is not None and header.number > self._number

    def _search(self, at: int) -> None:
        """Find the number of the record that is broken at the end of that segment, and what proves it durable.

        Where none comes before, it is that of its header if this verifies; else it lies below all that are behind.
        """
        segment = self._segments[at]
        own = header_at(read_whole(segment), segment.end, self._seed)
        behind = list(headers_in(read_whole(segment), segment.end, self._seed))
        for each in self._segments[at + 1 :]:
            behind += headers_in(read_whole(each), DATA_OFFSET, self._seed)
        if self.last:
            number = self.last.number + 1
        else:
            number = own.number if own else min([self._number, *(header.number - 1 for header in behind)])
        self.broken = Broken(at, segment.end, number)
        self.proven = max((header.durable for header in behind), default=0)


def first_headers(segments: Sequence[Segment], seed: int) -> list[Header | None]:
    """The header of the first record of each segment, if it has one that verifies."""
    return [header_at(each.file.pread(HEADER_BYTES, DATA_OFFSET), 0, seed) for each in segments]


def end_of(segments: Sequence[Segment], seed: int, number: int) -> tuple[int, int, Position | None] | None:
    """Where record `number` ends (place of the segment, offset), and its position.
    None if it is not where it must be.

    If all records have higher numbers, this is the beginning of the log, without a position.
    """
    before = [at for at, header in enumerate(first_headers(segments, seed)) if header and header.number <= number]
    if not before:
        return 0, DATA_OFFSET, None
    at = before[-1]
    for offset, header in records_in(read_whole(segments[at]), DATA_OFFSET, seed, None):
        if header.number == number:
            return at, offset + HEADER_BYTES + header.length, header.position
    return None
