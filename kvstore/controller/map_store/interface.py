"""Where the controller keeps its state: one document with a revision, changed by compare-and-swap only.

Owns: the interface that every backend keeps to, and the words that state the atomicity asked for.
Promises: nothing beyond that interface; `tests/conformance/test_map_store.py` holds every backend to it.
Leaves to others: what the document says (`controller.service`), where its bytes lie (`sqlite`, others later).

Beside the document it keeps what each store has last told of its log. That changes all the time and decides nothing
about others, so it is no part of the document, whose every change wakes all who watch it.

One document instead of a tree of keys: a process that swaps it has seen all of it, so no reader ever meets half a
change and no rule has to span two writes. It is small (some 10 kB for 4,096 partitions) and changes rarely.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Stored(NamedTuple):
    """The document as of a revision. Revision 0, and only that, has no document: nothing was ever stored."""

    revision: int
    document: bytes | None


class Told(NamedTuple):
    """What a store has told: the number of its last durable record, and its version clock. Zeros: nothing yet.

    `clock_floor`: the store may open with less than it told, and then goes on above that version.
    """

    number: int = 0
    version: int = 0
    clock_floor: int = 0


class MapStore(Protocol):
    """One durable, linearizable register. Any number of tasks may call any method at the same time."""

    async def read(self) -> Stored:
        """The present document: it shows every swap that was acknowledged before the call began."""
        ...

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        """Replace the document if its revision is still `revision`: one atomic step, then durable.

        Returns the new, higher revision, or None if another swap came first: then nothing was changed. Of any
        number of swaps from the same revision, by any number of processes, exactly one succeeds.

        If it raises (`Unavailable`, or CancelledError to a caller that was cancelled), the swap may have
        happened or not: read again to know. It is never half done.
        """
        ...

    async def watch(self, revision: int) -> Stored:
        """The present document as soon as its revision is above `revision`; at once if it already is.

        Revisions may be skipped: a watcher sees the newest document, not every one. No change is missed:
        after a swap was acknowledged every watcher of a lower revision returns. Waits for ever if nothing
        changes; the caller bounds it by cancelling. Raises `Unavailable` when the store is closed.
        """
        ...

    async def tell(self, store_id: str, told: Told) -> Told:
        """Keep the higher number and version for that store, durably; returns what is kept now. Raises Unavailable."""
        ...

    async def forget(self, store_id: str, clock_floor: int = 0) -> Told:
        """That store may start with less than it has told, with versions above the floor, which is never lowered.

        Returns what was kept. If it raises (`Unavailable`), the floor may be kept, and the number not forgotten; the
        number is never forgotten without the floor.
        """
        ...

    async def keep(self, name: str, document: bytes) -> None:
        """Keep a copy of the document under that name beside the present one, durably, in place of an earlier one.

        Raises Unavailable.
        """
        ...

    async def close(self) -> None:
        """Give up files and threads once the swaps under way have ended; watchers raise `Unavailable`."""
        ...
