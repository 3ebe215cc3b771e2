"""A bounded cache of visible rows, so that hot reads need no thread hop.

Owns: the newest visible state of recently read or written keys, "not there" included.
Promises: it never holds anything older than the visible state. Two doors lead in: `publish`, called in batch order
for each change as it becomes visible, and `finish`, for what a reader thread found. A reader's find enters only if
its `begin` is still the newest event of that key: no change of the key became visible and the partition did not leave
since.
Leaves to others: what is visible (`store`), expiry (the reader compares the deadline).

Eviction is by generation: entries live in a young and an old dictionary; a hit in the old one moves the entry to the
young; when the young is full the old is thrown away and the young becomes old. A hit costs one dictionary look-up,
and what was used within the last half of the cache's bytes is always kept.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import msgspec

from kvstore import failpoints
from kvstore.storage.rows import Row


class Entry(msgspec.Struct, frozen=True, gc=False):
    """The visible state of a key: `value` None means there is none. `expires_at_ms` 0 means never. `has_intent`: a
    transaction that may be committed any moment will change it, or not.

    Not tracked by the garbage collector, which would otherwise walk a full cache again and again: it took a quarter of
    a shard's time.
    """

    value: bytes | None
    version: int
    expires_at_ms: int
    has_intent: bool = False


ABSENT = Entry(None, 0, 0)


def entry_of(row: Row) -> Entry:
    """The visible state that a value's row says."""
    _, _, _, _, version, expires_at_ms, body, intent = row
    return Entry(body, version, expires_at_ms, intent is not None)


_OVERHEAD_BYTES = 250  # of a dictionary slot, the key, the tuple and its integers, as measured with sys.getsizeof


class Cache:
    def __init__(self, bytes_max: int) -> None:
        self._half_bytes = bytes_max // 2
        self._young: dict[str, Entry] = {}
        self._old: dict[str, Entry] = {}
        self._young_bytes = 0
        self._reads: dict[str, int] = {}
        self._read_count = 0
        self._left: set[int] = set()

    def get(self, key: str) -> Entry | None:
        """The visible state of the key, or None if the cache does not know it."""
        entry = self._young.get(key)
        if entry is not None:
            return entry
        entry = self._old.pop(key, None)
        if entry is not None:
            self._add(key, entry)
        return entry

    def peek(self, key: str) -> Entry | None:
        """As `get`, without counting as use; safe to call from another thread."""
        return self._young.get(key) or self._old.get(key)

    def publish(self, key: str, entry: Entry) -> None:
        """A change of the key becomes visible."""
        if self._reads:
            self._reads.pop(key, None)
        if self._old:
            self._old.pop(key, None)
        self._add(key, entry)

    def begin(self, key: str) -> int:
        """A reader sets out for the key; the ticket goes to `finish`."""
        self._read_count += 1
        self._reads[key] = self._read_count
        return self._read_count

    def finish(self, key: str, ticket: int, entry: Entry | None) -> bool:
        """The reader is back; None gives the ticket back without a find. Whether nothing has happened to the key since
        it set out: no change, and no later reader."""
        if self._reads.get(key) != ticket and not failpoints.planted("late-cache-fill"):
            return False
        self._reads.pop(key, None)
        if entry is not None:
            self._old.pop(key, None)
            self._add(key, entry)
        return True

    def leave(self, partitions: Set[int]) -> None:
        """These partitions are served no more: what is known of them is wrong when they come back, not before."""
        self._left |= partitions

    def come_back(self, generations: Sequence[int]) -> None:
        """It is decided which partitions are served from now on.
        What is known of one that had left must not be seen by the next operation that is decided, which may be
        before the arrival is visible: forget everything."""
        if any(generations[partition] for partition in self._left):
            self.clear()

    def clear(self) -> None:
        """Forget everything, readers under way included."""
        self._left.clear()
        self._young, self._old, self._reads, self._young_bytes = {}, {}, {}, 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def _add(self, key: str, entry: Entry) -> None:
        young = self._young
        size = len(key) + len(entry.value or b"") + _OVERHEAD_BYTES
        before = young.get(key)
        if before is not None:
            self._young_bytes -= len(key) + len(before.value or b"") + _OVERHEAD_BYTES
        if size > self._half_bytes:
            young.pop(key, None)
            return
        young[key] = entry
        self._young_bytes += size
        if self._young_bytes > self._half_bytes:
            self._old = self._young
            self._young, self._young_bytes = {}, 0
