"""Where the syncs of a log run: on the event loop's thread, or in a thread.

Owns: the choice, by how long the last syncs took; the measure of that.
Promises: the choice is pure: durations are arguments.
Leaves to others: when there is a sync (`kvstore.store.log_writer`, `kvstore.replication.copy_log`).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from kvstore.storage.log import Log

_SAMPLES = 31
_STALL_FACTOR = 50  # one sync that took so many times the bound speaks for itself


class SyncPace:
    """Whether the disk is quick enough to sync on the event loop's thread: by the median of the last ones.

    The way back needs half the bound, so that a disk at the bound does not make it swing.
    """

    def __init__(self, inline_ms_max: float) -> None:
        self.is_inline = inline_ms_max > 0
        self._inline_ms_max = inline_ms_max
        self._samples_ms: list[float] = []

    def observe(self, seconds: float) -> None:
        """A sync took that long."""
        sample_ms = seconds * 1000
        self._samples_ms.append(sample_ms)
        if self.is_inline and sample_ms > _STALL_FACTOR * self._inline_ms_max:
            self.is_inline = False
            self._samples_ms.clear()
        elif len(self._samples_ms) == _SAMPLES:
            typical_ms = median(self._samples_ms)
            self.is_inline = typical_ms <= (self._inline_ms_max if self.is_inline else self._inline_ms_max / 2)
            self._samples_ms.clear()


def timed_sync(log: Log, monotonic_s: Callable[[], float]) -> tuple[int, float]:
    """Sync: up to which number the log is durable, and how many seconds the disk took. Raises LogFailed.

    To be called on the thread of the sync: the hops to a thread and back do not count.
    """
    started_s = monotonic_s()
    number = log.sync()
    return number, monotonic_s() - started_s
