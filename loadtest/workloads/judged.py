"""The workloads whose histories can be judged, and what begins and ends a run of them.

Owns: their names, and which of them need an opening or closing reads.
Promises: pure. A history that begins with `opening` and ends with `closing` can be judged by itself.
Leaves to others: sending the calls, the clients in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

from loadtest.workloads import append, bank, counter, register, sets
from loadtest.workloads.append import Appends
from loadtest.workloads.bank import Bank
from loadtest.workloads.calls import Steps
from loadtest.workloads.counter import Counters
from loadtest.workloads.expiry import Expiring
from loadtest.workloads.place import Place, Workload
from loadtest.workloads.register import Registers
from loadtest.workloads.section import CriticalSections
from loadtest.workloads.sets import Sets

TxnShare = Callable[[Place], Steps[bool]]


class Plan(NamedTuple):
    """`client` makes one; `opening` and `closing` say whether they could be done."""

    client: Callable[[Place], Workload]
    opening: TxnShare | None = None
    closing: TxnShare | None = None


class Judged(Enum):
    BANK = Plan(Bank, bank.opening, bank.closing)
    COUNTER = Plan(Counters, None, counter.closing)
    SECTION = Plan(CriticalSections)
    REGISTER = Plan(Registers, None, register.closing)
    APPEND = Plan(Appends, None, append.closing)
    SET = Plan(Sets, None, sets.closing)
    EXPIRY = Plan(Expiring)


def opening(place: Place, kinds: Iterable[Judged]) -> Steps[list[str]]:
    """What these need before their clients may begin; the name of the first that could not be opened."""
    return (yield from _all(place, [(kind.name, kind.value.opening) for kind in kinds]))


def closing(place: Place, kinds: Iterable[Judged]) -> Steps[list[str]]:
    """The last reads, when their clients have ended; the name of the first that could not be read."""
    return (yield from _all(place, [(kind.name, kind.value.closing) for kind in kinds]))


def _all(place: Place, parts: Iterable[tuple[str, TxnShare | None]]) -> Steps[list[str]]:
    """It stops at the first that fails: whatever keeps that one from its answer has been waited for."""
    for name, part in parts:
        if part is not None and not (yield from part(place)):
            return [name.lower()]
    return []
