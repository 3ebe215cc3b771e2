"""Where a client of a judged workload is: below which keys, under which name, and to whom it tells what it was told.

Owns: the prefix of a run, names of clients, numbers that are never used twice in a history.
Promises: pure.
Leaves to others: where the history goes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Protocol

from loadtest.histories.history import AnyOperation
from loadtest.workloads.calls import Steps

_NUMBERS_OF_A_PROCESS = 1_000_000_000_000
_KEYS_MIN = 4


class Place:
    """`prefix`: all keys of the run begin with it. `noted`: there is a history; without one `note` does nothing. All
    clients of a process take their numbers from the same `numbers`. `crowding`: only one key in so many is used."""

    def __init__(
        self,
        prefix: str,
        client: str,
        numbers: Iterator[int],
        rng: random.Random,
        note: Callable[[AnyOperation], None] | None = None,
        crowding: int = 1,
    ) -> None:
        self.prefix = prefix
        self.client = client
        self.rng = rng
        self.noted = note is not None
        self.note = _ignore if note is None else note
        self._numbers = numbers
        self._crowding = crowding

    def keys(self, usual: int) -> range:
        """The numbers of the keys that are used, where it is usually so many."""
        return range(max(_KEYS_MIN, usual // self._crowding))

    def number(self) -> int:
        """One that no other client of this history has."""
        return next(self._numbers)


class Workload(Protocol):
    """What one client does again and again."""

    def step(self) -> Steps[None]: ...


def numbers_of(process: int) -> Iterator[int]:
    """Those of one of the processes of a run, which count from 0."""
    return itertools.count(process * _NUMBERS_OF_A_PROCESS + 1)


def _ignore(operation: AnyOperation) -> None:
    """There is no history."""
