"""How much of the time work in the background takes beside clients: moves, verification, comparison.

Owns: how long such work pauses; whether clients are at work.
Promises: pure: durations and times are arguments.
Leaves to others: the work itself, where syncs run (`storage.sync_pace`).
"""

from __future__ import annotations

_LOAD_WINDOW_S = 0.1
_IDLE_OPS_PER_S = 20
_PAUSE_S = 0.002


class LoadMeter:
    """Whether clients are at work: more than 20 operations a second, within the last tenth of one."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._done = 0
        self._is_busy = False

    def is_busy(self, now_s: float, done: int) -> bool:
        """Whether they were in the last window.

        `now_s`: monotonic; `done`: operations since the start of the process.
        """
        if now_s - self._since_s >= _LOAD_WINDOW_S:
            self._is_busy = done - self._done > _IDLE_OPS_PER_S * (now_s - self._since_s)
            self._since_s, self._done = now_s, done
        return self._is_busy


def pause_s(worked_s: float, share: float) -> float:
    """How many seconds to pause after work of that length.

    So that it takes no more than `share`, between 0 and 1, of the time.
    """
    return max(worked_s, _PAUSE_S) * (1 / share - 1)
