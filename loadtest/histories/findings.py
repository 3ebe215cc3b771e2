"""What a checker found, and how it tells of operations.

Owns: a violation, the list of them that stays short, the words for an operation's time, what was known at a time.
Promises: pure.
Leaves to others: the rules (the checkers of this folder).
"""

from __future__ import annotations

import bisect
from collections import Counter
from typing import Generic, NamedTuple, TypeVar

from loadtest.histories.history import Operation

_SHOWN_MAX = 3  # of violations of one kind and place: one fault of a store shows in hundreds of operations

By = TypeVar("By")


class Violation(NamedTuple):
    """`kind`: one of those that its checker lists."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class Findings:
    """The violations, in the order in which they were found: the first few of each kind and place."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._told: Counter[tuple[str, str]] = Counter()

    def blame(self, kind: str, place: str, detail: str) -> None:
        """`place`: the key, set or lock that it is about."""
        self._told[kind, place] += 1
        if self._told[kind, place] <= _SHOWN_MAX:
            self.violations.append(Violation(kind, detail))


class Floor(Generic[By]):
    """The greatest number that was known, since when, and who said so."""

    def __init__(self, known: list[tuple[float, int, By]]) -> None:
        """`known`: since when, which number, who said so; in any order."""
        self._since: list[float] = []
        self._steps: list[tuple[int, By]] = []
        for since_s, number, by in sorted(known, key=lambda step: step[:2]):
            if not self._steps or number > self._steps[-1][0]:
                self._since.append(since_s)
                self._steps.append((number, by))

    def before(self, now_s: float) -> tuple[int, By] | None:
        """What was known before `now_s`, and who said so; None: nothing."""
        place = bisect.bisect_left(self._since, now_s)
        return self._steps[place - 1] if place else None


def ended_s(operation: Operation) -> float:
    """When it ended; never, if its outcome is unknown."""
    return float("inf") if operation.end_s is None else operation.end_s


def times(operation: Operation) -> str:
    """Who called it, and when; in brackets, to be put behind what was called."""
    end = "never answered" if operation.end_s is None else f"{operation.end_s:.4f}"
    said = f", told: {operation.said}" if operation.said else ""
    return f"[{operation.client}, {operation.begin_s:.4f} to {end}{said}]"
