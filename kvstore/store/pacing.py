"""How much of the time work in the background takes: moves beside clients.

Owns: how long moves leave a store alone.
Promises: pure: durations and times are arguments.
Leaves to others: moving (`partitions`, `shard.receiver`), where syncs run (`storage.sync_pace`).
"""

from __future__ import annotations

_LOAD_WINDOW_S = 0.1
_IDLE_OPS_PER_S = 20
_PAUSE_S = 0.002


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
