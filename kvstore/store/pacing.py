"""When work may run where: syncs on the loop or in a thread, moves beside clients.

Owns: the choice between syncing on the event loop's thread and in a thread; how long moves leave a store alone.
Promises: pure: durations and times are arguments.
Leaves to others: syncing (`pipeline`), moving (`partitions`, `shard.receiver`).
"""

from __future__ import annotations

from statistics import median

_SAMPLES = 31
_STALL_FACTOR = 50  # one sync that took so many times the bound speaks for itself
_LOAD_WINDOW_S = 0.1
_IDLE_OPS_PER_S = 20
_PAUSE_S = 0.002


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


class LoadMeter:
    """Whether clients are at work: more than a few operations a second, within the last fraction of one."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._done = 0
        self._is_busy = False

    def is_busy(self, now_s: float, done: int) -> bool:
        """`done`: operations since the start of the process."""
        if now_s - self._since_s >= _LOAD_WINDOW_S:
            self._is_busy = done - self._done > _IDLE_OPS_PER_S * (now_s - self._since_s)
            self._since_s, self._done = now_s, done
        return self._is_busy


def pause_s(worked_s: float, share: float) -> float:
    """How long to pause after work of that length so that it takes no more than `share` of the time."""
    return max(worked_s, _PAUSE_S) * (1 / share - 1)
