"""Which key comes next: the distributions of YCSB.

Owns: zipfian, latest and uniform choice, and names for keys.
Promises: pure; the same generator of random numbers, the same keys. Keys that are added later are chosen, too.
Leaves to others: what is done to a key (ycsb).

The zipfian generator is that of Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD 1994), as
in YCSB (Cooper et al., "Benchmarking cloud serving systems with YCSB", SoCC 2010): rank i of n is chosen with
probability 1 / (i + 1)^theta / zeta(n, theta), exactly for the first two ranks and closely for all others, in constant
time. It is scrambled by the names: a key's name is a hash of its number, so hot keys lie anywhere among the others.
"""

from __future__ import annotations

import itertools
import random
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
        self._alpha = 1 / (1 - theta)
        self._zeta_2 = 1 + 0.5**theta
        self._count = 0
        self._zeta = 0.0
        self._eta = 0.0
        self.grow(count)

    def grow(self, count: int) -> None:
        """Choose among that many from now on: more, never fewer. It takes as long as there are new ones."""
        self._zeta += sum(1 / float(rank) ** self._theta for rank in range(self._count + 1, count + 1))
        self._count = count
        self._eta = (1 - (2 / count) ** (1 - self._theta)) / (1 - self._zeta_2 / self._zeta) if count > 2 else 0.0

    def next(self, rng: random.Random) -> int:
        part = rng.random()
        scaled = part * self._zeta
        if scaled < 1:
            return 0
        if scaled < self._zeta_2 or self._count == 2:
            return 1
        return min(int(self._count * (self._eta * part - self._eta + 1) ** self._alpha), self._count - 1)

    def probability(self, rank: int) -> float:
        """What the law says."""
        return float((rank + 1) ** -self._theta / self._zeta)


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
