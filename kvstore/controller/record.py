"""What has come of the moves since this process began.
Totals for the metrics, and the write pauses of each change.

Owns: sums; pauses that have not ended yet.
Promises: pure; times are arguments, in seconds of any one clock.
Leaves to others: what is kept with the map (`changes`), the moves themselves (`mover`), names of metrics
(`kvstore.metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Collection

from kvstore.controller.changes import Pauses
from kvstore.metrics import MoveStats
from kvstore.placement.cluster_map import Move


class _Pauses:
    """Of one change. `open_s`: since when those last that have not ended yet."""

    def __init__(self) -> None:
        self.ended_s: list[float] = []
        self.open_s: list[float] = []


class Record:
    """Counts of moves, and the write pauses of each change; in memory only. Times are monotonic, in seconds."""

    def __init__(self) -> None:
        self.stats = MoveStats()
        self._pauses: dict[str, _Pauses] = {}

    def note_commit(self, move: Move, keys: int, size_bytes: int, frozen_s: float) -> None:
        """The move is done, and no shard has answered for its partitions since `frozen_s`."""
        self.stats.partitions += len(move.partitions)
        self.stats.keys += keys
        self.stats.bytes += size_bytes
        self.stats.groups += 1
        self._pauses.setdefault(move.change, _Pauses()).open_s.append(frozen_s)

    def note_answering(self, move: Move, frozen_s: float, now_s: float) -> None:
        """The pause of a committed move has ended."""
        self.stats.write_pause_s.observe(now_s - frozen_s)
        if (pauses := self._pauses.get(move.change)) is not None and frozen_s in pauses.open_s:
            pauses.open_s.remove(frozen_s)
            pauses.ended_s.append(now_s - frozen_s)

    def note_void(self) -> None:
        """A try was given up."""
        self.stats.voided += 1

    def is_open(self, change_id: str) -> bool:
        """Whether clients wait for a move of the change that is committed."""
        return change_id in self._pauses and bool(self._pauses[change_id].open_s)

    def pauses(self, change_id: str, now_s: float, standing_s: Collection[float] = ()) -> Pauses:
        """Those of the change so far; `standing_s`: since when pauses last of moves that are not committed yet."""
        found = self._pauses.get(change_id, _Pauses())
        all_s = [*found.ended_s, *(now_s - since_s for since_s in (*found.open_s, *standing_s))]
        return Pauses(milliseconds(max(all_s, default=0.0)), milliseconds(percentile(all_s, 99)))

    def known(self) -> list[str]:
        """The changes of which there are pauses."""
        return list(self._pauses)

    def forget(self, change_id: str) -> None:
        """The pauses of the change are kept elsewhere."""
        self._pauses.pop(change_id, None)


def percentile(values: list[float], percent: int) -> float:
    """The nearest-rank percentile; 0 if there are no values."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1] if values else 0.0


def milliseconds(seconds: float) -> float:
    """Seconds as milliseconds, to a tenth of one."""
    return round(seconds * 1000, 1)
