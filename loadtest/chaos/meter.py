"""What the clients of a chaos run get done: counted as it happens, a point for every second.

Owns: `Meter`.
Leaves to others: who tells it of which answer (clients), the shape of a point (summary).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence

from loadtest.chaos.summary import Point
from loadtest.workloads.answers import Reply


class Meter:
    """`points`: those of the seconds that are over. `began_s`: on the monotonic clock."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.points: list[Point] = []
        self._done: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._latencies_s: list[float] = []
        self._since_s = self.began_s

    def take(self, workload: str, reply: Reply, took_s: float | None) -> None:
        """An answer. `took_s` None: the time is not the store's, as that of a client that waits for a lease."""
        if reply.outcome == "done":
            self._done[workload] += 1
        else:
            self._failed[reply.code] += 1
        if took_s is not None and reply.status > 0:
            self._latencies_s.append(took_s)

    async def run(self) -> None:
        """A point every second, until cancelled."""
        self._since_s = time.monotonic()
        while True:
            await asyncio.sleep(1.0 - (time.monotonic() - self._since_s) % 1.0)
            self._close_second()

    def _close_second(self) -> None:
        now = time.monotonic()
        lasted_s = max(now - self._since_s, 0.001)
        point = Point(
            at_s=self._since_s - self.began_s,
            per_s={workload: count / lasted_s for workload, count in self._done.items()},
            failed_per_s={code: count / lasted_s for code, count in self._failed.items()},
            p50_ms=_percentile_ms(self._latencies_s, 0.50),
            p99_ms=_percentile_ms(self._latencies_s, 0.99),
        )
        self.points.append(point)
        self._done, self._failed, self._latencies_s, self._since_s = Counter(), Counter(), [], now


def _percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    if not seconds:
        return None
    place = min(math.ceil(share * len(seconds)), len(seconds)) - 1
    return 1000 * sorted(seconds)[max(place, 0)]
