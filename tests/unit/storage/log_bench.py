"""What tests of the log share: a small log on a simulated disk, and a model of what must be in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore.storage.log import BEGINNING, Entry, Log, Position
from loadtest.simulate.disk import Fate, SimulatedDisk, lose_all

FOLDER = Path("/data")
STORE = "shard-s1"
STORE_ID = "0123456789abcdef"
SEGMENT_BYTES = 6144  # 2,048 for records


class Bench:
    """A log, its disk, and the payloads that were appended to it, by number."""

    def __init__(self, start: Position = BEGINNING, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.disk = SimulatedDisk()
        self.segment_bytes = segment_bytes
        self.log = Log.create(self.disk, FOLDER, STORE, STORE_ID, start, segment_bytes)
        self.start = start
        self.payloads: dict[int, bytes] = {}

    def append(self, *payloads: bytes, frees: bool = True) -> int:
        """Append these, with a new segment where one is needed; the number of the last."""
        for payload in payloads:
            if self.log.room(frees=frees) < len(payload):
                assert self.log.prepare_segment()
            number = self.log.append(payload, frees=frees)
            self.payloads[number] = payload
        return self.log.last.number

    def fill(self, count: int, size: int = 300) -> int:
        """Append so many different records of that size, with one sync at the end; the number of the last."""
        first = self.log.last.number + 1
        last = self.append(*(b"%d:" % number + bytes(size) for number in range(first, first + count)))
        assert self.log.sync() == last
        return last

    def reopen(self, applied: Position | None = None, told: int = 0, fate: Fate = lose_all, cut: bool = True) -> Any:
        """Open the log after a power cut, or in the next process; the entries behind `applied`."""
        if cut:
            self.disk.restart(fate)
        applied = self.start if applied is None else applied
        self.log, entries = Log.open(self.disk, FOLDER, STORE, STORE_ID, applied, told, self.segment_bytes)
        return entries

    def path(self, index: int) -> Path:
        return FOLDER / f"{STORE}.log.{index:06d}"

    def place_of(self, number: int) -> tuple[Path, int, int]:
        """Where a record of the open log lies: file, offset, bytes."""
        segment = max((s for s in self.log._used if 0 < s.first <= number), key=lambda s: s.first)
        offset = 4096
        for before in range(segment.first, number):
            offset += 56 + len(self.payloads[before])
        return segment.path, offset, 56 + len(self.payloads[number])

    def positions(self) -> dict[int, Position]:
        """Of every record that is kept."""
        entries = self.log.entries(self.log.first - 1)
        return {entry.number: Position(entry.number, entry.checksum, entry.term) for entry in entries}


def payloads(entries: list[Entry]) -> list[bytes]:
    return [entry.payload for entry in entries]


def numbers(entries: list[Entry]) -> list[int]:
    return [entry.number for entry in entries]
