"""What the clients of a chaos run get done: counted as it happens, a point for every second.

Owns: `Meter`, and `MeteredWire`, a Wire whose requests are counted by workload and timed.
Leaves to others: what is asked for (clients), the shape of a point (summary).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import aiohttp

from loadtest.chaos.summary import Point
from loadtest.histories.history import now_s
from loadtest.txn_wire import Reply, Wire, problem_of

_REPEAT_PAUSE_S = 0.05
_CODES = {0: "not connected", -1: "no answer"}


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
            self._failed[code_of(reply)] += 1
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


def code_of(reply: Reply) -> str:
    """The problem code of a refusal, or words for an answer that did not come."""
    problem = problem_of(reply) if reply.status > 0 else None
    return problem.code if problem is not None else _CODES.get(reply.status, str(reply.status))


def _percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    if not seconds:
        return None
    place = min(math.ceil(share * len(seconds)), len(seconds)) - 1
    return 1000 * sorted(seconds)[max(place, 0)]


class MeteredWire(Wire):
    """A Wire that counts into `meter` what it does as part of the workload. `patience_s`: for how long `insist` asks
    again. `was_repeated`: whether the request with this Idempotency-Key was delivered twice on its way: then a refusal
    is that of one delivery, and its outcome is unknown."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        seed: int,
        meter: Meter,
        workload: str,
        patience_s: float = 0.0,
        was_repeated: Callable[[str], bool] = lambda once: False,
    ) -> None:
        super().__init__(http, urls, seed)
        self._meter = meter
        self._workload = workload
        self._patience_s = patience_s
        self._was_repeated = was_repeated

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """As that of a Wire."""
        began_s = now_s()
        reply = await super().ask(method, path, body, headers)
        waits = method == "POST" and path.startswith("/v1/locks/")
        self._meter.take(self._workload, reply, None if waits else now_s() - began_s)
        once = (headers or {}).get("Idempotency-Key")
        if once is not None and reply.outcome == "refused" and self._was_repeated(once):
            return Reply(-1)
        return reply

    async def insist(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        """Sent again, with its Idempotency-Key, while the outcome is unknown; `Reply(-1)` if that takes too long.

        A refusal says nothing about the tries before it.
        """
        deadline_s, was_sent = now_s() + self._patience_s, False
        while True:
            reply = await self.ask(method, path, body, headers)
            was_sent = was_sent or reply.outcome == "unknown"
            if reply.outcome == "done" or not was_sent:
                return reply
            if now_s() > deadline_s:
                return Reply(-1)
            self.counts["repeats"] += 1
            await asyncio.sleep(_REPEAT_PAUSE_S)
