"""The decisions that a store keeps, in memory: where each is anchored, since when, and who has finished.

Owns: which of them may go, and which must still be finished.
Promises: a decision is called finished only once it is acknowledged by all who hold keys of its attempt, and not before
twice the time that a transaction may take.
Leaves to others: the rows (`participant`), finishing and dropping (`shard.recovery`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvstore import failpoints
from kvstore.environment import Environment
from kvstore.model import Attempt


class _Kept(msgspec.Struct):
    """`since_s`: monotonic."""

    partition: int
    since_s: float
    acknowledged: bool


class DecisionTable:
    """The decisions that are kept, oldest first; `kept_s`: for how many seconds at least, by the monotonic clock."""

    def __init__(self, environment: Environment, kept_s: float) -> None:
        self._environment = environment
        self._kept_s = kept_s
        self._of: dict[Attempt, _Kept] = {}  # in the order in which they were made, or came here

    def __len__(self) -> int:
        return len(self._of)

    def note(self, decided: Iterable[tuple[Attempt, int, bool]], dropped: Iterable[Attempt]) -> None:
        """What a batch has decided, with the anchor's partition and whether it is committed; and what went."""
        for attempt, partition, committed in decided:
            self._of[attempt] = _Kept(partition, self._environment.monotonic_s(), acknowledged=not committed)
        for attempt in dropped:
            self._of.pop(attempt, None)

    def acknowledge(self, attempts: Iterable[Attempt]) -> None:
        """These are finished everywhere."""
        for attempt in attempts:
            kept = self._of.get(attempt)
            if kept is not None:
                kept.acknowledged = True

    def old(self, arrivals: Sequence[int], finished_max: int) -> tuple[list[Attempt], list[Attempt]]:
        """(finished, unfinished) decisions that have been kept long enough, of partitions that have an arrival.

        The finished ones may go, at most `finished_max`. The others no router has acknowledged yet; all of them are
        returned: some may have to wait for a shard that is away, and must not stand before others.
        """
        horizon_s = self._environment.monotonic_s() - self._kept_s
        finished: list[Attempt] = []
        unfinished: list[Attempt] = []
        is_early = failpoints.planted("decision-dropped-early")
        for attempt, kept in self._of.items():
            if kept.since_s > horizon_s and not is_early:
                break
            if not arrivals[kept.partition]:
                continue
            if not kept.acknowledged and not is_early:
                unfinished.append(attempt)
            elif len(finished) < finished_max:
                finished.append(attempt)
        return finished, unfinished
