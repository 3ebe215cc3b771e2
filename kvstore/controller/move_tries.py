"""Tries of moves under way: how far each is, and what is told of them.

Owns: the table of tries by pair of source and destination, and why those before failed; both in memory only.
Promises: nothing of it is needed by a controller that starts: the map is all there is.
Leaves to others: carrying tries out (`mover`), sums of what was done (`record`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import NamedTuple

from kvstore import failpoints
from kvstore.controller.change_report import Doing
from kvstore.controller.changes import Pauses
from kvstore.controller.commit_checks import Terms
from kvstore.controller.record import Record, milliseconds
from kvstore.placement.cluster_map import ClusterMap, Move
from kvstore.protocol import Progress
from kvstore.transport.change_documents import MoveUnderWay

Pair = tuple[str, str]
_FIRST_PAUSE_S = 0.1  # after a try that failed


class Trouble(NamedTuple):
    """Tries of a pair that failed one after the other: how many, and why the last one did."""

    tries: int
    detail: str

    def pause_s(self, pause_s_max: float) -> float:
        """How long to wait before the next one."""
        return min(_FIRST_PAUSE_S * 2.0 ** min(self.tries - 1, 10), pause_s_max)


class Try:
    """A move under way. `deciding`: its swap has begun, it must not be cancelled any more; `decided`: it is over."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self.pair = move.source, move.to
        self.task: asyncio.Task[None] | None = None
        self.deciding = False
        self.decided = asyncio.Event()
        self.step = "queued"
        self.detail = ""
        self.keys_done = 0
        self.keys_total = 0
        self.bytes_done = 0
        self.frozen_s: float | None = None
        self.terms: Terms | None = None  # in which it began
        self.waits_since_s: float | None = None

    def note(self, step: str, detail: str = "") -> None:
        """Say to operators what it does, and why it waits or ends."""
        self.step, self.detail = step, detail

    def has_waited_s(self, now_s: float) -> float:
        """For how long the destination has been waiting for the source."""
        return now_s - self.waits_since_s if self.waits_since_s is not None else 0.0

    def take(self, progress: Progress, asked_s: float, now_s: float) -> None:
        """How far the destination is. `asked_s`: when the question was sent."""
        if not progress.detail or progress.step not in ("copy", "tail"):
            self.waits_since_s = None
        elif self.waits_since_s is None:
            self.waits_since_s = now_s
        step = "freeze" if progress.step == "fence" else progress.step  # so nodes of earlier versions call it
        self.note(step if self.waits_since_s is None else "waiting", progress.detail)
        self.keys_done, self.keys_total = progress.rows_done, progress.rows_total
        self.bytes_done = progress.bytes_done
        if self.frozen_s is None and step in ("freeze", "done"):
            self.frozen_s = now_s if step == "freeze" else asked_s
            failpoints.hit("move-after-freeze-seen")


class Tries:
    """One at most for each pair."""

    def __init__(self, record: Record) -> None:
        self.by_pair: dict[Pair, Try] = {}
        self.troubles: dict[Pair, Trouble] = {}
        self._record = record

    def note_trouble(self, current: Try, detail: str) -> None:
        """The try has failed."""
        before = self.troubles.get(current.pair)
        self.troubles[current.pair] = Trouble(before.tries + 1 if before else 1, detail)

    async def caught_up(self, cluster_map: ClusterMap) -> None:
        """Returns when `last` counts all that map shows as done.
        A try hears of its swap a little later than others."""
        standing = {move.id for move in cluster_map.moves}
        for each in list(self.by_pair.values()):
            if each.deciding and each.move.id not in standing:
                await each.decided.wait()

    def report(self, cluster_map: ClusterMap) -> list[MoveUnderWay]:
        """The moves of that map, in order, and how far each is."""
        under_way = {each.move.id: each for each in self.by_pair.values()}
        now = now_s()
        return [_report(move, under_way.get(move.id), now) for move in cluster_map.moves]

    def steps(self, cluster_map: ClusterMap) -> dict[str, float]:
        """How many moves of that map are at each step."""
        return dict(Counter(move.step for move in self.report(cluster_map)))

    def doing(self, cluster_map: ClusterMap) -> dict[str, Doing]:
        """What is under way of each change, by its id."""
        found: dict[str, Doing] = {}
        for move, report in zip(cluster_map.moves, self.report(cluster_map), strict=True):
            found[move.change] = found.get(move.change, Doing()).plus(move, report)
        return found

    def pauses(self, cluster_map: ClusterMap, change_id: str) -> Pauses:
        """The write pauses of that change so far, as far as this process knows."""
        standing = {move.id for move in cluster_map.moves if move.change == change_id}
        tries = [t for t in self.by_pair.values() if t.move.id in standing]
        return self._record.pauses(change_id, now_s(), [t.frozen_s for t in tries if t.frozen_s is not None])


def _report(move: Move, current: Try | None, now_s: float) -> MoveUnderWay:
    pause_s = now_s - current.frozen_s if current is not None and current.frozen_s is not None else 0.0
    return MoveUnderWay(
        source=move.source,
        to=move.to,
        partitions=len(move.partitions),
        step=current.step if current is not None else "queued",
        keys_done=current.keys_done if current is not None else 0,
        keys_total=current.keys_total if current is not None else 0,
        bytes_done=current.bytes_done if current is not None else 0,
        write_pause_ms=milliseconds(pause_s),
        detail=current.detail if current is not None else "",
    )


def now_s() -> float:
    """The clock of the loop, which times of moves are read from (monotonic). Raises RuntimeError outside a loop."""
    return asyncio.get_running_loop().time()
