"""Putting together what all shards say: one page of a listing, one count, while partitions change hands.

Owns: which reply counts for which partition, and where a page ends.
Promises: pure. Every partition is taken from exactly one reply, that of a shard that owned it all the time it was
looking; nothing is finished while a partition is missing, unless it is left out on demand, and named. So a key that
stays is listed exactly once, and counted exactly once, whatever moved while it was made.
Leaves to others: asking, and asking again for what is missing (`all_shards`).

Shards are not asked to agree on an epoch: while a cluster is growing it changes with every commit, and a listing would
never end. A partition that moved between two replies is in both, or in neither. In both: the first is taken, the
other's part is dropped. In neither: it is asked for again, alone.

A page of a shard may end before its keys do. What all have said holds only up to where the first of them ended, the
horizon: the page ends there, and the next one begins there, for all.

Of the next hundred keys a shard of four has about 25, since the hash decides which. It is asked for what it hardly ever
exceeds, and not for all hundred, which would cost the more the more shards there are. When it does, the horizon comes
early, and the rest of the page is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from kvstore.placement.partition_set import all_of, decode
from kvstore.placement.ring import partition_of
from kvstore.protocol import Page

Item = tuple[str, int, bytes | None, int]


class Listing(NamedTuple):
    """A page over all shards, in key order; `last` is where the next one goes on, None at the end.
    `missing`: the set of partitions that were left out, of which keys may lack. `left_out`: the sizes of values
    that are still to be asked for, by key."""

    items: list[Item]
    last: str | None
    missing: int = 0
    left_out: Mapping[str, int] = MappingProxyType({})

    def cut(self, bytes_max: int) -> tuple[Listing, int]:
        """The items up to the one with which they have `bytes_max` bytes of keys and values; their bytes."""
        size = 0
        for count, item in enumerate(self.items, start=1):
            size += len(item[0]) + (self.left_out.get(item[0], 0) if item[2] is None else len(item[2]))
            if size >= bytes_max and count < len(self.items):
                return self._replace(items=self.items[:count], last=item[0]), size
        return self, size


class Counted(NamedTuple):
    """How many keys there are, without those of the set of partitions `missing`."""

    keys: int
    missing: int = 0


def share(limit: int, part: float) -> int:
    """How many keys to ask of a shard with that part of all partitions.
    Of the next `limit` keys it has more in one case of a thousand: three standard deviations above the mean of the
    binomial distribution."""
    mean = limit * part
    return min(limit, math.ceil(mean + 3 * math.sqrt(mean * (1 - part))))


class Merge:
    """A page under way. `missing`: the set of partitions that no shard has shown; `horizon`: beyond it nothing is
    known, None if there is no such place."""

    def __init__(self, partitions: int) -> None:
        self.missing = all_of(partitions)
        self.horizon: str | None = None
        self._partitions = partitions
        self._items: list[Item] = []
        self._left_out: dict[str, int] = {}

    def take(self, page: Page) -> None:
        """What a shard has shown, as far as it is news."""
        owned = decode(page.owned)
        news = owned & self.missing
        if not news:
            return
        self.missing &= ~news
        if page.more and (self.horizon is None or page.last < self.horizon):
            self.horizon = page.last
        if news == owned:
            self._items += page.items
        else:
            self._items += [item for item in page.items if news >> partition_of(item[0].encode(), self._partitions) & 1]
        self._left_out |= page.left_out

    def listing(self, limit: int) -> Listing:
        """The page, once nothing is missing. It may be empty without being the last."""
        horizon = self.horizon
        items = sorted(item for item in self._items if horizon is None or item[0] <= horizon)
        if len(items) > limit:
            return Listing(items[:limit], items[limit - 1][0], left_out=self._left_out)
        return Listing(items, horizon, left_out=self._left_out)


class Tally:
    """A count under way; `missing` as in `Merge`."""

    def __init__(self, partitions: int) -> None:
        self.missing = all_of(partitions)
        self.horizon: str | None = None
        self.count = 0

    def take(self, page: Page) -> None:
        """A number cannot be split.
        One that is partly known already is not taken at all, and what is missing of it will be asked for alone."""
        owned = decode(page.owned)
        if not owned & ~self.missing:
            self.missing &= ~owned
            self.count += page.count
