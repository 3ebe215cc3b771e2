"""How long a primary waits for a copy before it asks to take it out.
Also how soon a copy that fell out is tried again.

Owns: the time that an awaited copy has owed an acknowledgement, the doubling pause.
Promises: time in which the primary's own loop or disk stood still does not count, so one stall of a disk that several
stores share does not throw out every copy of every shard. An answer of the copy takes the request back.
Leaves to others: what a request changes (nothing, by itself: `shipping`).
"""

from __future__ import annotations

from typing import NamedTuple


class Patience(NamedTuple):
    """`since`: when the copy began to owe an answer, None if it owes none.
    `stood_still_s`: what of that is not its."""

    since: float | None = None
    stood_still_s: float = 0.0


def owes(patience: Patience, now: float) -> Patience:
    """The state once something was sent that the copy must acknowledge."""
    return patience if patience.since is not None else Patience(now)


def answered(patience: Patience, now: float, owes_more: bool) -> Patience:
    """The state after any answer of the copy; `owes_more`: it still has to acknowledge something sent since."""
    return Patience(now) if owes_more else Patience()


def stood_still(patience: Patience, seconds: float) -> Patience:
    """The state after the primary's own loop or sync stood still for that long."""
    if patience.since is None:
        return patience
    return patience._replace(stood_still_s=patience.stood_still_s + seconds)


def is_over(patience: Patience, now: float, replica_timeout_s: float) -> bool:
    """Whether the primary asks to take the copy out."""
    return patience.since is not None and now - patience.since - patience.stood_still_s >= replica_timeout_s


def stall(expected_at: float, now: float, slack_s: float) -> float:
    """For how long a loop that was to turn at `expected_at` stood still; 0 within the slack."""
    late = now - expected_at
    return late if late > slack_s else 0.0


class Retry(NamedTuple):
    """When a copy that fell out may join again.
    `pause_s`: the pause after it was connected and owed an answer last."""

    not_before: float = float("-inf")
    pause_s: float = 0.0


def fell_out(retry: Retry, now: float, pause_min_s: float, pause_max_s: float) -> Retry:
    """The state once a copy that was connected fell out at `now`, for it owed an answer for too long.

    The pause doubles each time, and begins again once the copy was no trouble for as long as the longest one.
    """
    quiet = now - retry.not_before >= pause_max_s
    pause = pause_min_s if quiet else min(pause_max_s, max(pause_min_s, 2 * retry.pause_s))
    return Retry(now + pause, pause)


def may_join(retry: Retry, now: float) -> bool:
    """Whether the copy may be tried again."""
    return now >= retry.not_before
