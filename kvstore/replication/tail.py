"""The newest records of a primary, as its copies will ask for them.

Owns: records in memory, up to a number of bytes.
Promises: what it gives is consecutive and begins right behind what was asked for; else it gives nothing, and the log
is read.
Leaves to others: the log (`storage.log`).
"""

from __future__ import annotations

from collections import deque

from kvstore.storage.segments import Entry

_ENTRY_BYTES = 96
RECORD_BYTES = 1024
"""What a record costs its copy, however small it is, as bytes: sizes of frames count them."""


def cost(entry: Entry) -> int:
    """What the record costs the copy that takes it, as bytes."""
    return len(entry.payload) + RECORD_BYTES


class Tail:
    """`bytes_max`: of all records together; older ones go first. `come_bytes`: what all that ever came cost."""

    def __init__(self, bytes_max: int) -> None:
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._bytes_max = bytes_max
        self.come_bytes = 0

    def add(self, entry: Entry) -> None:
        """The record behind the last one that was added."""
        if self._entries and self._entries[-1].number + 1 != entry.number:
            self._entries.clear()
            self._bytes = 0
        self._entries.append(entry)
        self.come_bytes += cost(entry)
        self._bytes += len(entry.payload) + _ENTRY_BYTES
        while self._bytes > self._bytes_max:
            self._bytes -= len(self._entries.popleft().payload) + _ENTRY_BYTES

    def after(self, number: int, bytes_max: int) -> list[Entry]:
        """The records behind that number, with about that many bytes; empty if the first of them is not here."""
        entries = self._entries
        if not entries or not entries[0].number <= number + 1 <= entries[-1].number:
            return []
        found: list[Entry] = []
        size = 0
        for back in range(entries[-1].number - number, 0, -1):  # a deque finds quickly what lies near its end
            found.append(entries[-back])
            size += cost(found[-1])
            if size >= bytes_max:
                break
        return found

    def reaches_end(self, number: int, last: int, bytes_max: int) -> bool:
        """Whether all records behind that number, up to the log's `last`, are here and cost no more than that."""
        lacking = self.after(number, bytes_max)
        return number >= last or (bool(lacking) and lacking[-1].number >= last)
