"""What has come of the moves: the present or last change as people see it, and totals for the metrics.

Owns: the sums since this process began, and those since moves began to stand while none stood.
Promises: pure; times are arguments, in seconds of any one clock.
Leaves to others: the moves themselves (`mover`), names of metrics (`kvstore.metrics`).
"""

from __future__ import annotations

import math
from typing import Any

from kvstore.metrics import MoveStats
from kvstore.placement.cluster_map import Move


class Change:
    """From the first plan to the last commit. `open_s`: since when pauses last that have not ended yet."""

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.ended_s: float | None = None
        self.partitions = 0
        self.keys = 0
        self.bytes = 0
        self.groups = 0
        self.pauses_s: list[float] = []
        self.open_s: list[float] = []

    def report(self, now_s: float) -> dict[str, Any]:
        """`last` of GET /v1/moves."""
        pauses_s = [*self.pauses_s, *(now_s - since_s for since_s in self.open_s)]
        return {
            "partitions": self.partitions,
            "keys": self.keys,
            "bytes": self.bytes,
            "groups": self.groups,
            "seconds": round((self.ended_s if self.ended_s is not None else now_s) - self.began_s, 3),
            "write_pause_ms_max": milliseconds(max(pauses_s, default=0.0)),
            "write_pause_ms_p99": milliseconds(percentile(pauses_s, 99)),
        }


class Record:
    def __init__(self) -> None:
        self.stats = MoveStats()
        self.change: Change | None = None

    def note_standing(self, before: list[Move], after: list[Move], now_s: float) -> None:
        """Another map has come."""
        if after and (not before or self.change is None):
            self.change = Change(now_s)
        if before and not after and self.change is not None:
            self.change.ended_s = now_s

    def note_commit(self, move: Move, keys: int, size_bytes: int, fenced_s: float) -> Change | None:
        """The move is done, and nobody has answered for its partitions since `fenced_s`; the change that it is part of.

        To be told before the map in which it no longer stands.
        """
        for sums in (self.stats, self.change):
            if sums is not None:
                sums.partitions += len(move.partitions)
                sums.keys += keys
                sums.bytes += size_bytes
                sums.groups += 1
        if self.change is not None:
            self.change.open_s.append(fenced_s)
        return self.change

    def note_answering(self, change: Change | None, fenced_s: float, now_s: float) -> None:
        """The pause of a committed move has ended."""
        self.stats.write_pause_s.observe(now_s - fenced_s)
        if change is not None:
            change.open_s.remove(fenced_s)
            change.pauses_s.append(now_s - fenced_s)

    def note_void(self) -> None:
        self.stats.voided += 1


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that so many percent of all are at most (nearest rank); 0 if there are none."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1] if values else 0.0


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
