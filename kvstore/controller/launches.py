"""What is known of the launcher, `kvstore up`: whether one is there, and which shards it runs.

Owns: what its questions have told.
Promises: a controller that has just started gives a launcher a moment to come before it says that there is none.
Leaves to others: what it is to run (`service`), the processes (`kvstore.launcher`).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from kvstore.environment import Environment

GRACE_S = 5.0  # for so long a launcher may be silent: after the end of its last question, or a start


class Launcher:
    """What its questions have told of a launcher. It asks again as soon as it is answered."""

    def __init__(self, poll_s: float, environment: Environment) -> None:
        self._clock_s = environment.monotonic_s
        self._known_s = poll_s + GRACE_S
        self._running: frozenset[str] = frozenset()
        self._began_s = self._clock_s()
        self._asked_s = float("-inf")
        self._came = asyncio.Event()

    def note(self, running: frozenset[str]) -> None:
        """It has asked, and runs these shards."""
        self._running, self._asked_s = running, self._clock_s()
        self._came.set()

    async def comes(self) -> bool:
        """Whether one is there.

        A controller that has just started does not know yet, and waits for its question, `GRACE_S` at most.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._began_s + GRACE_S - self._clock_s())):
                await self._came.wait()
        return self._is_there()

    def running(self) -> frozenset[str]:
        """The shards that it runs; none if no launcher is there."""
        return self._running if self._is_there() else frozenset()

    def may_run(self, shard_id: str, *, is_new: bool) -> bool:
        """Whether that process runs, as far as that is known; `is_new`: it was started in this controller's time."""
        unknown = not self._came.is_set() and self._clock_s() < self._began_s + GRACE_S
        return shard_id in self.running() or (unknown and not is_new)

    def _is_there(self) -> bool:
        return self._clock_s() - self._asked_s < self._known_s
