"""Counters in keys, raised one by one by compare-and-set: does each raise count once, and only once?

Owns: the rules for counters that begin at 0 (absent) and are only raised.
Promises: pure. What it reports is wrong with certainty: a raise of unknown outcome may count, at any time, once.
Leaves to others: counters written under a lock (locks).

A raise goes from `value` - 1 to `value` if no client was faster, so a value is made by one raise only. A raise that is
sent twice with one Idempotency-Key counts once: otherwise there is a value that no client can have made.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from enum import StrEnum

from loadtest.histories.findings import Findings, Floor, Violation, ended_s, times
from loadtest.histories.history import Count


class Kind(StrEnum):
    TWICE = "one value, two raises"
    TOO_FEW = "raises are missing"  # fewer than were acknowledged before
    TOO_MANY = "too many raises"  # more than can have been made until then
    FROM_NOWHERE = "value that no client made"
    BACK = "went back"


def check(history: Iterable[Count]) -> list[Violation]:
    """All that is wrong with it, counter by counter."""
    by_key: dict[str, list[Count]] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
    findings = Findings()
    for key, operations in by_key.items():
        _Counter(key, operations, findings).judge()
    return findings.violations


class _Counter:
    def __init__(self, key: str, operations: Sequence[Count], findings: Findings) -> None:
        self._key = key
        self._findings = findings
        self._raises = [op for op in operations if op.action == "raise" and op.outcome != "refused"]
        self._done = [op for op in self._raises if op.outcome == "done"]
        self._reads = [op for op in operations if op.action == "read" and op.outcome == "done"]

    def judge(self) -> None:
        self._check_values_made_once()
        self._check_numbers()
        self._check_makers()
        self._check_order()

    def _blame(self, kind: Kind, detail: str) -> None:
        self._findings.blame(kind, self._key, f"counter {self._key}: {detail}")

    def _check_values_made_once(self) -> None:
        made: dict[int, Count] = {}
        for operation in self._done:
            if operation.value is not None and made.setdefault(operation.value, operation) is not operation:
                self._blame(Kind.TWICE, f"{_name(made[operation.value])} and {_name(operation)} were both acknowledged")

    def _check_numbers(self) -> None:
        """As many as were acknowledged before the read began, and no more than were begun when it ended."""
        ends_s = sorted(ended_s(operation) for operation in self._done)
        begins_s = sorted(operation.begin_s for operation in self._raises)
        for read in self._reads:
            least, most = bisect_left(ends_s, read.begin_s), bisect_right(begins_s, ended_s(read))
            if (read.value or 0) < least:
                self._blame(Kind.TOO_FEW, f"{_name(read)}, and {least} raises had been acknowledged before it began")
            if (read.value or 0) > most:
                self._blame(Kind.TOO_MANY, f"{_name(read)}, and only {most} raises had begun when it ended")

    def _check_makers(self) -> None:
        """Of each value up to the one that was found there is a raise that had begun.
        (Not if a client raised to an unknown value.)"""
        if any(operation.value is None for operation in self._raises):
            return
        begun_s: dict[int, float] = {}
        for operation in self._raises:
            value = operation.value or 0
            begun_s[value] = min(operation.begin_s, begun_s.get(value, operation.begin_s))
        since_s = [float("-inf")]  # at place n: since when raises to each value up to n had begun
        while len(since_s) in begun_s:
            since_s.append(max(since_s[-1], begun_s[len(since_s)]))
        for operation in [*self._reads, *self._raises]:
            shown = (operation.value or 0) - (operation.action == "raise")
            known = bisect_right(since_s, ended_s(operation)) - 1
            if shown > known:
                detail = f"{_name(operation)}, and no client had begun to raise it to {known + 1} when that ended"
                self._blame(Kind.FROM_NOWHERE, detail)

    def _check_order(self) -> None:
        """A client that began after a client had ended found at least what that one left."""
        told = [op for op in [*self._done, *self._reads] if op.value is not None]
        floor = Floor([(ended_s(op), op.value or 0, op) for op in told])
        for operation in [*self._reads, *self._done]:
            found = (operation.value or 0) - (operation.action == "raise")
            known = floor.before(operation.begin_s)
            if known is not None and found < known[0] and (operation.action == "read" or operation.value is not None):
                self._blame(Kind.BACK, f"{_name(operation)}; before it began, {_name(known[1])}")


def _name(operation: Count) -> str:
    if operation.action == "read":
        return f"a read showed {operation.value or 0} {times(operation)}"
    return f"a raise to {operation.value} {times(operation)}"
