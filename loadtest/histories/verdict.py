"""The verdict on a history: each of its parts before the checker that knows it.

Owns: which operations go to which checker, what was checked, what could not be concluded.
Promises: pure, but for the clock that says how long it took. Operations that no client judges do not exist.
Leaves to others: the rules (the checkers of this folder), files and words (`__main__`).

A bank opens with whole balances by the client "opening" and closes with whole balances and the markers by "closing".
A count of a key that is also written under a lock belongs to the locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from loadtest.histories import append, bank, counters, locks, registers, sets
from loadtest.histories.bank import Bank
from loadtest.histories.history import (
    AnyOperation,
    Balances,
    Count,
    Element,
    Guarded,
    Lease,
    Lists,
    Markers,
    Members,
    Register,
    Transfer,
)

OPENING, CLOSING = "opening", "closing"

_BANK = Transfer | Balances | Markers
_LOCKS = Lease | Guarded | Count


class Check(msgspec.Struct):
    """What one checker said. `note`: what could not be concluded, such as a search that was given up."""

    name: str
    operations: int
    violations: list[str]
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.violations and not self.note


class Verdict(msgspec.Struct):
    """One check for each kind of operations that occurs."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and nothing is left undecided."""
        return all(check.ok for check in self.checks)


class _Found(NamedTuple):
    violations: Sequence[object]
    note: str = ""


def judge(operations: Sequence[AnyOperation]) -> Verdict:
    """Judges what occurs. A part that proves nothing (a value written twice) has a note that says why."""
    guarded = {operation.key for operation in operations if isinstance(operation, Guarded)}
    under_locks = [op for op in operations if isinstance(op, _LOCKS) and not (_counts(op) - guarded)]
    lists = [operation for operation in operations if isinstance(operation, Lists)]
    registered = [operation for operation in operations if isinstance(operation, Register)]
    of_bank = [operation for operation in operations if isinstance(operation, _BANK)]
    of_sets = [operation for operation in operations if isinstance(operation, Element | Members)]
    counts = [op for op in operations if isinstance(op, Count) and op.key not in guarded]
    checks = [
        _check("registers", registered, lambda: _judge_registers(registered)),
        _check("lists", lists, lambda: _Found(append.check(lists))),
        _check("bank", of_bank, lambda: _judge_bank(of_bank)),
        _check("sets", of_sets, lambda: _Found(sets.check(of_sets))),
        _check("locks", under_locks, lambda: _Found(locks.check(under_locks))),
        _check("counters", counts, lambda: _Found(counters.check(counts))),
    ]
    return Verdict([check for check in checks if check is not None])


def _counts(operation: _LOCKS) -> set[str]:
    return {operation.key} if isinstance(operation, Count) else set()


def _check(name: str, operations: Sequence[AnyOperation], look: Callable[[], _Found]) -> Check | None:
    if not operations:
        return None
    began_s = time.perf_counter()
    try:
        found = look()
    except ValueError as error:
        found = _Found([], f"this history proves nothing: {error}")
    seconds = round(time.perf_counter() - began_s, 3)
    return Check(name, len(operations), list(map(str, found.violations)), seconds, found.note)


def _judge_registers(operations: Sequence[Register]) -> _Found:
    judgement = registers.check(operations)
    return _Found(judgement.violations, "\n".join(judgement.undecided))


def _judge_bank(operations: Sequence[_BANK]) -> _Found:
    """Raises ValueError without an opening, a closing or the markers at the end."""
    opening = _whole(operations, OPENING)
    closing = _whole(operations, CLOSING)
    markers = [op for op in operations if isinstance(op, Markers) and op.client == CLOSING and op.outcome == "done"]
    if not markers:
        raise ValueError(f'the bank has no listing of markers by the client "{CLOSING}"')
    history = [op for op in operations if isinstance(op, Transfer | Balances) and op is not closing]
    strangers = {
        number
        for op in history
        for number in ((op.source, op.target) if isinstance(op, Transfer) else op.accounts)
        if number not in opening.accounts
    }
    if strangers:
        raise ValueError(f"the bank opened without account {min(strangers)}, and later there is one")
    return _Found(bank.check(Bank(opening.accounts), history, Bank(closing.accounts), markers[-1].markers))


def _whole(operations: Sequence[_BANK], client: str) -> Balances:
    """The last whole balances of that client."""
    found = [op for op in operations if isinstance(op, Balances) and op.client == client and op.whole]
    done = [op for op in found if op.outcome == "done"]
    if not done:
        raise ValueError(f'the bank has no whole balances by the client "{client}"')
    return done[-1]
