"""Making a failing run smaller: faults and clients are taken out while it still fails.

Owns: which are tried, in what order (delta debugging: halves first, then ever smaller pieces).
Promises: what it returns has failed in a run of its own, in the same way as the whole; `runs_max` tries at most.
Leaves to others: the runs (`cluster_run`).
"""

from __future__ import annotations

from collections.abc import Callable

from loadtest.simulate.cluster_run import Cut


def shrink(fails: Callable[[Cut], bool], faults: int, clients: int, runs_max: int) -> Cut:
    """The faults and clients that can be left out of a run that fails, so that it still fails."""
    left = runs_max

    def still_fails(cut: Cut) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(cut)

    gone = _reduce(range(faults), lambda out: still_fails(Cut(out)))
    without = _reduce(range(1, clients + 1), lambda out: len(out) < clients and still_fails(Cut(gone, out)))
    return Cut(gone, without)


def _reduce(numbers: range, fails_without: Callable[[frozenset[int]], bool]) -> frozenset[int]:
    """The numbers that are not needed, found piece by piece."""
    kept = list(numbers)
    size = len(kept)
    while size >= 1 and kept:
        at = 0
        while at < len(kept):
            tried = kept[:at] + kept[at + size :]
            if fails_without(frozenset(numbers) - frozenset(tried)):
                kept = tried
            else:
                at += size
        size //= 2
    return frozenset(numbers) - frozenset(kept)
