"""Which key comes next: the distributions of YCSB.

Owns: zipfian, latest and uniform choice, and names for keys.
Promises: pure; the same generator of random numbers, the same keys. Keys that are added later are chosen, too.
Leaves to others: what is done to a key (ycsb).

As in YCSB (Cooper et al., "Benchmarking cloud serving systems with YCSB", SoCC 2010), rank i of n is chosen with
probability 1 / (i + 1)^theta / zeta(n, theta), and scrambled by the names: a key's name is a hash of its number, so hot
keys lie anywhere among the others.
"""

from __future__ import annotations

import bisect
import itertools
import random
from array import array
from collections.abc import Callable

THETA = 0.99
_FNV_OFFSET = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3
_MASK = 0xFFFFFFFFFFFFFFFF


class Zipfian:
    """Numbers below `count`, 0 most often. Raises ValueError for fewer than two."""

    def __init__(self, count: int, theta: float = THETA) -> None:
        if count < 2:
            raise ValueError(f"{count} keys: choose among two at least")
        self._theta = theta
        self._sums = array("d", [1.0])  # of the weights of all ranks up to each one
        self.grow(count)

    def grow(self, count: int) -> None:
        """Choose among that many from now on: more, never fewer. It takes as long as there are new ones."""
        for rank in range(len(self._sums), count):
            self._sums.append(self._sums[-1] + float(rank + 1) ** -self._theta)

    def next(self, rng: random.Random) -> int:
        return bisect.bisect_right(self._sums, rng.random() * self._sums[-1], hi=len(self._sums) - 1)

    def probability(self, rank: int) -> float:
        """What the law says."""
        return float((rank + 1) ** -self._theta / self._sums[-1])


class Keys:
    """The keys of a run as one process knows them: `count` loaded ones, and those that it has inserted since.

    `name` is for numbers below `count`; `fresh` makes one that no other client has, `insert` tells that it is there
    now.
    """

    def __init__(self, prefix: str, count: int, process: int = 0) -> None:
        self._prefix = prefix
        self._count = count
        self._process = process
        self._inserted: list[str] = []
        self._numbers = itertools.count()
        self._zipfian = Zipfian(count)
        self._recent = Zipfian(count)

    def name(self, number: int) -> str:
        return f"{self._prefix}{fnv_1a(number):016x}"

    def fresh(self) -> str:
        number = next(self._numbers)
        return f"{self._prefix}{fnv_1a((self._process + 1 << 40) + number):016x}"

    def insert(self, name: str) -> None:
        self._inserted.append(name)
        self._recent.grow(self._count + len(self._inserted))

    def zipfian(self, rng: random.Random) -> str:
        """A loaded key, some of them far more often than others."""
        return self.name(self._zipfian.next(rng))

    def latest(self, rng: random.Random) -> str:
        """Any key, the last inserted one most often."""
        back = self._recent.next(rng)
        if back < len(self._inserted):
            return self._inserted[-1 - back]
        return self.name(self._count - 1 - (back - len(self._inserted)))

    def uniform(self, rng: random.Random) -> str:
        """Any key, each as often as any other."""
        number = rng.randrange(self._count + len(self._inserted))
        return self.name(number) if number < self._count else self._inserted[number - self._count]

    def bucket(self, name: str) -> str:
        """A prefix of that key that at least 100 loaded keys share, if there are that many."""
        digits = 0
        while self._count >= 100 * 16 ** (digits + 1):
            digits += 1
        return name[: len(self._prefix) + digits]


Choice = Callable[[Keys, random.Random], str]


def fnv_1a(number: int) -> int:
    """FNV-1a over the eight bytes of a number, 64 bits: the hash of YCSB (Fowler, Noll, Vo)."""
    value = _FNV_OFFSET
    for byte in number.to_bytes(8, "little"):
        value = (value ^ byte) * _FNV_PRIME & _MASK
    return value
