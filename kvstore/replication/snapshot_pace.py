"""How much of a snapshot goes at once, and the pause behind it.

Owns: for one snapshot, how large a page is, and how long nothing of the snapshot is read, sent or written behind it.
Promises: pure: sizes and durations are arguments. While clients are at work at either end a page is small, and for most
of the time none is under way; without clients pages are large and one follows the other soon. The more of the log is
kept, and the longer the copy is being filled, the less clients count: past what may be kept the snapshot would begin
again, and as long as the copy is not there another disk may be lost.
Leaves to others: who is at work (`snapshot`), reading (`snapshot`), writing and its checkpoints (`copy`).

The time that a page takes is the primary's for reading it, and the copy's for writing it and for the checkpoint of its
file that is due. A part of that is done under the interpreter's lock, and keeps calls waiting; a call of a hundred may.
"""

from __future__ import annotations

from kvstore.replication.places import Times

PAGE_BYTES = 1 << 20
BUSY_SHARE = 16  # so many times smaller is a page beside clients
HURRY_FROM, HURRY_TO = 1 / 8, 1 / 2  # of what may be kept of the log: from there on clients count less, then not at all
HURRY_FROM_S, HURRY_TO_S = 600.0, 1800.0  # and so long after the copy's first snapshot has begun
PAUSE_S_MAX = 1.0  # a disk or a process that has stood still is not waited for many times as long


def never_busy() -> bool:
    """No clients are at work on a node."""
    return False


class SnapshotPace:
    """The pace of one snapshot. `look` says how things stand before each page."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._ease = 0.0

    def look(self, *, is_busy: bool, kept_bytes: int, filling_s: float) -> None:
        """Note how things stand. `is_busy`: clients are at work at either end; `kept_bytes`: of the primary's log;
        `filling_s`: for how long the copy is being filled, by this snapshot and those that it goes on from or repeats.
        """
        kept = kept_bytes / self._times.log_bytes_max
        by_log = (kept - HURRY_FROM) / (HURRY_TO - HURRY_FROM)
        by_time = (filling_s - HURRY_FROM_S) / (HURRY_TO_S - HURRY_FROM_S)
        hurry = min(1.0, max(0.0, by_log, by_time))
        self._ease = 1.0 - hurry if is_busy else 0.0

    @property
    def rows_max(self) -> int:
        """How many rows a page has at most."""
        return max(1, self._smaller(self._times.snapshot_page_rows_max))

    @property
    def bytes_max(self) -> int:
        """About how many bytes of rows a page has at most."""
        return self._smaller(PAGE_BYTES)

    def _smaller(self, size: int) -> int:
        return int(size / BUSY_SHARE**self._ease)

    def pause_s(self, worked_s: float) -> float:
        """How long to pause behind a page that took so long."""
        most, least = self._times.snapshot_share, self._times.snapshot_busy_share
        share = most + self._ease * min(0.0, least - most)
        return min(worked_s * max(0.0, 1 / share - 1), PAUSE_S_MAX)
