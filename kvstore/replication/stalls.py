"""When a primary's own loop or disk stood still.

Owns: from when to when, for stalls that are over; since when a sync is under way, and when the loop was to turn again;
which syncs of other logs on the node's disk were under way at the last look.
Promises: a stall counts as it grows, not only once it is over: what hangs cannot say so. A moment counts once, also
where loop and disk stood still together. What a sync or a turn of the loop takes within the slack is no stall, so a
disk that is slow at each sync leaves a copy its time, only later. The other logs tell of a stall that begins when the
own sync has just returned: they count while all of their syncs that were under way at one look still are at the next.
As soon as one has returned the disk is at work, however slow it is.
Leaves to others: the clock (times are arguments, in seconds), what does not count by that (`patience`), the end of a
process whose disk never answers (`shard.disk_watch`): until then a hung disk blames no copy.
"""

from __future__ import annotations

_KEPT_MAX = 256  # before each of them lies its slack, so what owed an answer through all had 12.8 s of its own


def no_syncs() -> frozenset[object]:
    """Of a store that is alone on its node."""
    return frozenset()


class Stalls:
    """`slack_s`: what a sync, or a turn of the loop, may take."""

    def __init__(self, slack_s: float) -> None:
        self._slack_s = slack_s
        self._over: list[tuple[float, float]] = []  # each begins behind the end of the one before it
        self._syncs_since: float | None = None
        self._turns_at: float | None = None
        self._under_way: frozenset[object] = frozenset()
        self._looked_at = 0.0

    def sync_begins(self, now: float) -> None:
        """A sync of the own log is under way. May be called by the thread that syncs."""
        self._syncs_since = now

    def sync_ends(self, now: float) -> None:
        """It has returned; no-op if none was told of."""
        if self._syncs_since is not None:
            self._note(self._syncs_since + self._slack_s, now)
            self._syncs_since = None

    def turns(self, now: float, next_at: float) -> None:
        """The loop turns; it is to turn again at `next_at`."""
        if self._turns_at is not None:
            self._note(self._turns_at + self._slack_s, now)
        self._turns_at = next_at

    def look(self, now: float, under_way: frozenset[object]) -> None:
        """These syncs of logs on the node are under way; another object for each."""
        if self._under_way and self._under_way <= under_way:
            self._note(self._looked_at, now)
        self._under_way, self._looked_at = under_way, now

    def seconds(self, since: float, now: float) -> float:
        """For how long loop or disk stood still between `since` and `now`."""
        grows = [began for began in (self._syncs_since, self._turns_at) if began is not None]
        over = self._over
        if grows and min(grows) + self._slack_s < now:
            over = _merged(over, min(grows) + self._slack_s, now)
        return sum(max(0.0, min(end, now) - max(began, since)) for began, end in over)

    def _note(self, began: float, end: float) -> None:
        if began < end:
            self._over = _merged(self._over, began, end)[-_KEPT_MAX:]


def _merged(over: list[tuple[float, float]], began: float, end: float) -> list[tuple[float, float]]:
    """With one more, which ends last; those that it touches are one with it."""
    kept = [each for each in over if each[1] < began]
    touched = over[len(kept) :]
    return [*kept, (min([began, *(each[0] for each in touched)]), end)]
