"""How long a primary waits for a copy before it asks to take it out.
Also how soon a copy that fell out is tried again.

Owns: the time that an awaited copy has owed an acknowledgement, the doubling pause.
Promises: time in which the primary's own loop or disk stands still does not count, neither while it does nor
afterwards, so one stall of a disk that several stores share does not throw out every copy of every shard. An answer of
the copy takes the request back.
Leaves to others: when loop and disk stood still (`stalls`), what a request changes (nothing, by itself: `shipping`).
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.replication.stalls import Stalls


class Patience(NamedTuple):
    """`since`: when the copy began to owe an answer, None if it owes none."""

    since: float | None = None


def owes(patience: Patience, now: float) -> Patience:
    """The state once something was sent that the copy must acknowledge."""
    return patience if patience.since is not None else Patience(now)


def answered(patience: Patience, now: float, owes_more: bool) -> Patience:
    """The state after any answer of the copy; `owes_more`: it still has to acknowledge something sent since."""
    return Patience(now) if owes_more else Patience()


def is_over(patience: Patience, stalls: Stalls, now: float, replica_timeout_s: float) -> bool:
    """Whether the primary asks to take the copy out. `stalls`: of the primary's own loop and disk."""
    if patience.since is None or now - patience.since < replica_timeout_s:
        return False
    return now - patience.since - stalls.seconds(patience.since, now) >= replica_timeout_s


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
