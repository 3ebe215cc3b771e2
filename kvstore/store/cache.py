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

from collections.abc import Iterable, Sequence, Set

from kvstore import failpoints
from kvstore.storage.rows import Row
from kvstore.transactions.intents import State


def state_of(row: Row) -> State:
    """What the row says."""
    _, _, _, _, version, expires_at_ms, body, intent = row
    return State(version, expires_at_ms, body, intent is not None)


_OVERHEAD_BYTES = 250  # of a dictionary slot, the key, the tuple and its integers, as measured with sys.getsizeof


class Cache:
    """The newest visible states by key, in about `bytes_max` bytes. Of the event loop's thread, but for `peek`."""

    def __init__(self, bytes_max: int) -> None:
        self._half_bytes = bytes_max // 2
        self._young: dict[str, State] = {}
        self._old: dict[str, State] = {}
        self._young_bytes = 0
        self._reads: dict[str, int] = {}
        self._read_count = 0
        self._left: set[int] = set()

    def get(self, key: str) -> State | None:
        """The visible state of the key, or None if the cache does not know it."""
        state = self._young.get(key)
        if state is not None:
            return state
        state = self._old.pop(key, None)
        if state is not None:
            self._add(((key, state),))
        return state

    def peek(self, key: str) -> State | None:
        """As `get`, without counting as use; safe to call from another thread."""
        return self._young.get(key) or self._old.get(key)

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """Those of which it knows nothing."""
        young, old = self._young, self._old
        return [key for key in keys if key not in young and key not in old]

    def publish(self, key: str, state: State) -> None:
        """A change of the key becomes visible."""
        self.publish_all(((key, state),))

    def publish_all(self, changes: Sequence[tuple[str, State]]) -> None:
        """These changes of keys become visible."""
        if reads := self._reads:
            for key, _ in changes:
                reads.pop(key, None)
        self._add(changes)

    def begin(self, key: str) -> int:
        """A reader sets out for the key; the ticket goes to `finish`."""
        self._read_count += 1
        self._reads[key] = self._read_count
        return self._read_count

    def finish(self, key: str, ticket: int, state: State | None) -> bool:
        """The reader is back; returns whether no change and no later reader of the key came since it set out.

        `state` None gives the ticket back without a find.
        """
        if self._reads.get(key) != ticket and not failpoints.planted("late-cache-fill"):
            return False
        self._reads.pop(key, None)
        if state is not None:
            self._add(((key, state),))
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

    def _add(self, states: Iterable[tuple[str, State]]) -> None:
        young, old, half_bytes = self._young, self._old, self._half_bytes
        for key, state in states:
            if old:
                old.pop(key, None)
            overhead = len(key) + _OVERHEAD_BYTES
            size = len(state.body or b"") + overhead
            if (before := young.get(key)) is not None:
                self._young_bytes -= len(before.body or b"") + overhead
            if size > half_bytes:
                young.pop(key, None)
                continue
            young[key] = state
            self._young_bytes = size = self._young_bytes + size
            if size > half_bytes:
                self._old = old = young
                self._young = young = {}
                self._young_bytes = 0
