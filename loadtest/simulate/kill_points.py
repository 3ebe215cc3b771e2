"""Failpoints of a simulation: how often each was hit, and at which a process is to die.

Owns: `KillPoints`.
Promises: the process that comes there dies at once, in the middle of its event.
Leaves to others: when that is wanted (`process_faults`, `faults`), which failpoints there are (`kvstore.failpoints`).
"""

from __future__ import annotations

from collections import Counter

from loadtest.simulate.loop import Killed, SimulatedLoop, running_process


class KillPoints:
    """`hits`: of each failpoint. `kill_at`: a process dies at the n-th hit from now. `faults` counts those deaths."""

    def __init__(self, loop: SimulatedLoop, faults: Counter[str]) -> None:
        self.hits: Counter[str] = Counter()
        self.kill_at: dict[str, int] = {}
        self._loop = loop
        self._faults = faults

    def hit(self, names: tuple[str, ...]) -> None:
        """The running process is at these failpoints. Raises Killed."""
        self.hits.update(names)
        if not self.kill_at:
            return
        process = running_process()
        for name in names:
            left = self.kill_at.get(name)
            if left is None or process is None:
                continue
            self.kill_at[name] = left - 1
            if left <= 1:
                del self.kill_at[name]
                self._faults["killed at a failpoint"] += 1
                self._loop.note(f"{process.name} is killed at {name}")
                process.kill()
                raise Killed
