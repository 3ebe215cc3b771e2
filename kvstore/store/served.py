"""Which partitions a store serves, and since when.

Owns: the value that reads compare before and after they look.
Promises: plain data.
Leaves to others: how partitions come and go (`partitions`, `ownership`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple


class Served(NamedTuple):
    """The partitions that the store serves.

    `generations`: for each partition the number of its arrival in this store, 0 while it is not served. A partition
    that leaves and comes back has another number, so "the same generation" means that no other store had it in between.
    `frozen`: those that are owned, but not served until a newer map says who is to have them.
    """

    generations: list[int]
    epoch: int = 0
    frozen: Set[int] = frozenset()
