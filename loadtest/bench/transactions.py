"""Transactions of 4 puts.

Owns: which keys each transaction writes, and the check that a system carries transactions out.
Promises: the same transactions for every system, also those whose keys lie in one store of this cluster alone; the keys
of one transaction are distinct; a system that does not show all that a transaction wrote is not measured.
Leaves to others: the form of a request (dialects.py), replaying them and counting the answers (transactions.lua).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from loadtest.bench.data import Data
from loadtest.bench.dialects import Dialect
from loadtest.bench.http1 import Request, ask, ask_done

SCRIPT = Path(__file__).with_name("transactions.lua")
PUTS = 4
ZIPF_THETA = 0.99  # as in YCSB (Cooper et al. 2010)
_CHECKED = 10
_SEED = 3

# From the shard of each key, the numbers of the keys of each transaction: as many transactions as there are keys.
Draw = Callable[[Sequence[str], random.Random], list[list[int]]]


class Transactions(NamedTuple):
    """Those that `draw` draws; the same whenever they are asked for."""

    draw: Draw

    def requests(self, dialect: Dialect, data: Data) -> list[Request]:
        """Raises Unsupported for a system without transactions, RuntimeError when there are too few keys."""
        return [dialect.put_all(data.puts(numbers)) for numbers in self._drawn(data)]

    async def check(self, url: str, dialect: Dialect, data: Data) -> None:
        """Carry a few out. Raises RuntimeError if their keys are not written, or lie elsewhere than `data` says."""
        checked = self._drawn(data)[:_CHECKED]
        for numbers in checked:
            await ask_done(url, dialect.put_all(data.puts(numbers)))
        for number in (number for numbers in checked for number in numbers):
            key, owner = data.keys[number], data.owners[number]
            answer = await ask(url, dialect.get(key))
            if not dialect.shows(answer.body, data.written[number]):
                raise RuntimeError(f"{dialect.name} does not show what a transaction wrote to {key}")
            if (told := dialect.owner(answer)) not in (None, owner):
                raise RuntimeError(f"{dialect.name} keeps {key} in {told}, and not in {owner} as was reckoned")

    def _drawn(self, data: Data) -> list[list[int]]:
        if len(data.keys) < PUTS:
            raise RuntimeError(f"a transaction writes {PUTS} keys, and there are {len(data.keys)}")
        return self.draw(data.owners, random.Random(_SEED))


def over_all_stores(owners: Sequence[str], rng: random.Random) -> list[list[int]]:
    """Any keys, each as likely as any other."""
    return [rng.sample(range(len(owners)), PUTS) for _ in owners]


def in_one_store(owners: Sequence[str], rng: random.Random) -> list[list[int]]:
    """All keys of a transaction in one store, and each store as often as it has keys."""
    stores: dict[str, list[int]] = {}
    for number, owner in enumerate(owners):
        stores.setdefault(owner, []).append(number)
    if min(len(numbers) for numbers in stores.values()) < PUTS:
        raise RuntimeError(f"a store has fewer than the {PUTS} keys of a transaction: there must be more keys")
    return [rng.sample(stores[owner], PUTS) for owner in owners]


def zipf(owners: Sequence[str], rng: random.Random) -> list[list[int]]:
    """Key number k (from 1) with a likelihood in proportion to k**-ZIPF_THETA; one that is there is drawn again."""
    numbers = range(len(owners))
    likelihoods = list(accumulate((number + 1) ** -ZIPF_THETA for number in numbers))

    def transaction() -> list[int]:
        drawn: list[int] = []
        while len(drawn) < PUTS:
            (number,) = rng.choices(numbers, cum_weights=likelihoods)
            if number not in drawn:
                drawn.append(number)
        return drawn

    return [transaction() for _ in owners]
