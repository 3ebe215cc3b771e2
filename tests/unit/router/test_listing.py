"""Putting together what shards say while partitions change hands, against a cluster that is nothing but who owns what.

What shards show is made from the same keys by the plainest means. Between any two replies partitions leave a shard,
belong to no shard, and arrive at another; the merge knows nothing of it but what the replies say.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.placement.partition_set import all_of, decode, encode
from kvstore.placement.ring import partition_of
from kvstore.protocol import Page
from kvstore.router.listing import Listing, Merge, Tally, share

PARTITIONS = 64
GROUPS = 8  # partition p is of group p % GROUPS; a group changes hands together
SHARDS = 3
NO_OWNER = SHARDS
ROUNDS_MAX = 4  # after so many nothing moves any more


class World:
    """`keys` stay, and so does what they are worth; who shows them changes. `moves` is what happens, one at a time: a
    group of partitions and who has it from then on."""

    def __init__(self, keys: set[str], owners: list[int], moves: Iterator[tuple[int, int]]) -> None:
        self.keys = sorted(keys)
        self.owners = list(owners)
        self._moves = moves

    def move(self) -> None:
        group, owner = next(self._moves, (0, self.owners[0]))
        self.owners[group] = owner

    def settle(self) -> None:
        self.owners = [owner if owner != NO_OWNER else 0 for owner in self.owners]

    def page(self, shard: int, after: str, until: str, limit: int, wanted: int, *, moves: bool) -> Page:
        """What the shard shows; something moves before it looks and, with `moves`, while it does."""
        began = self._owned(shard) & wanted
        if moves:
            self.move()
        owned = began & self._owned(shard)
        seen = [key for key in self.keys if key > after and (not until or key <= until) and _is_in(key, began)]
        more = len(seen) > limit
        seen = seen[:limit]
        items: list[Any] = [(key, 1, None, 0) for key in seen if _is_in(key, owned)]
        return Page(0, encode(owned, PARTITIONS), more, seen[-1] if seen else after, items)

    def count(self, shard: int, wanted: int, *, moves: bool) -> Page:
        page = self.page(shard, "", "", len(self.keys), wanted, moves=moves)
        return Page(0, page.owned, False, "", [], len(page.items))

    def _owned(self, shard: int) -> int:
        return sum(1 << p for p in range(PARTITIONS) if self.owners[p % GROUPS] == shard)


def _is_in(key: str, bits: int) -> bool:
    return bool(bits >> partition_of(key.encode(), PARTITIONS) & 1)


names = st.text("ab/ü🔑", min_size=1, max_size=3)
owners_lists = st.lists(st.integers(0, NO_OWNER), min_size=GROUPS, max_size=GROUPS)
moves_lists = st.lists(st.tuples(st.integers(0, GROUPS - 1), st.integers(0, NO_OWNER)), max_size=30)
orders = st.lists(st.permutations(range(SHARDS)), min_size=3, max_size=3)


@settings(max_examples=600)
@given(
    keys=st.sets(names, max_size=20),
    owners=owners_lists,
    moves=moves_lists,
    limits=st.tuples(*[st.integers(1, 6)] * SHARDS),
    limit=st.integers(1, 6),
    order=orders,
)
def test_whatever_changes_hands_each_key_is_listed_once_in_order(
    keys: set[str],
    owners: list[int],
    moves: list[tuple[int, int]],
    limits: tuple[int, ...],
    limit: int,
    order: list[list[int]],
) -> None:
    world = World(keys, owners, iter(moves))
    turns = itertools.cycle(order)
    listed: list[str] = []
    after = ""
    for _ in range(3 * len(keys) + 5):
        listing = _one_page(world, after, limits, limit, turns)
        assert len(listing.items) <= limit
        listed += [item[0] for item in listing.items]
        if listing.last is None:
            assert listed == world.keys
            return
        assert listing.last > after
        assert all(after < item[0] <= listing.last for item in listing.items)
        after = listing.last
    raise AssertionError("the listing does not end")


def _one_page(world: World, after: str, limits: tuple[int, ...], limit: int, turns: Iterator[list[int]]) -> Listing:
    merge = Merge(PARTITIONS)
    for number in itertools.count():
        if number >= ROUNDS_MAX:
            world.settle()
        wanted, until = merge.missing, merge.horizon or ""
        for shard in next(turns):
            moves = number < ROUNDS_MAX
            if moves:
                world.move()
            merge.take(world.page(shard, after, until, limits[shard], wanted, moves=moves))
        if not merge.missing:
            return merge.listing(limit)
    raise AssertionError


@settings(max_examples=400)
@given(keys=st.sets(names, max_size=30), owners=owners_lists, moves=moves_lists, order=orders)
def test_whatever_changes_hands_each_key_is_counted_once(
    keys: set[str], owners: list[int], moves: list[tuple[int, int]], order: list[list[int]]
) -> None:
    world = World(keys, owners, iter(moves))
    tally = Tally(PARTITIONS)
    turns = itertools.cycle(order)
    for number in range(ROUNDS_MAX + SHARDS + 1):
        moves_now = number < ROUNDS_MAX
        if not moves_now:
            world.settle()
        wanted = tally.missing
        for shard in next(turns):
            if moves_now:
                world.move()
            tally.take(world.count(shard, wanted, moves=moves_now))
        if not tally.missing:
            assert tally.count == len(keys)
            return
    raise AssertionError("the count does not end")


# --- every way in which one partition can be shown by two shards ------------------------------------------------------

EVEN = sum(1 << p for p in range(0, PARTITIONS, 2))
ODD = all_of(PARTITIONS) & ~EVEN
KEYS = [f"{number:02}" for number in range(12)]
HERE = [key for key in KEYS if _is_in(key, EVEN)]
THERE = [key for key in KEYS if _is_in(key, ODD)]


def shown(owned: int, keys: list[str], limit: int) -> Page:
    taken = keys[:limit]
    more = len(keys) > limit
    return Page(0, encode(owned, PARTITIONS), more, taken[-1] if taken else "", [(key, 1, None, 0) for key in taken])


@pytest.mark.parametrize("first_limit", range(1, 14))
@pytest.mark.parametrize("second_limit", range(1, 14))
@pytest.mark.parametrize("limit", [1, 3, 12])
def test_of_a_partition_that_two_have_shown_one_page_counts(first_limit: int, second_limit: int, limit: int) -> None:
    assert HERE
    assert THERE
    merge = Merge(PARTITIONS)
    merge.take(shown(EVEN | ODD, KEYS, first_limit))
    merge.take(shown(ODD, THERE, second_limit))
    assert not merge.missing
    horizon = len(KEYS) if first_limit >= len(KEYS) else first_limit
    listing = merge.listing(limit)
    assert [item[0] for item in listing.items] == KEYS[: min(horizon, limit)]
    is_last = horizon == len(KEYS) and limit >= len(KEYS)
    assert listing.last == (None if is_last else KEYS[min(horizon, limit) - 1])

    merge = Merge(PARTITIONS)
    merge.take(shown(ODD, THERE, second_limit))
    assert merge.missing == EVEN
    merge.take(shown(EVEN | ODD, KEYS, first_limit))
    assert not merge.missing
    ends = [
        *([THERE[second_limit - 1]] if second_limit < len(THERE) else []),
        *([KEYS[first_limit - 1]] if first_limit < len(KEYS) else []),
    ]
    horizon_key = min(ends, default=None)
    up_to = [key for key in KEYS if horizon_key is None or key <= horizon_key]
    assert [item[0] for item in merge.listing(99).items] == up_to


def test_a_page_of_nothing_new_does_not_bring_the_end_nearer() -> None:
    merge = Merge(PARTITIONS)
    merge.take(shown(EVEN | ODD, KEYS, 99))
    merge.take(shown(EVEN, HERE, 1))
    merge.take(Page(0, b"", True, "", []))
    assert merge.listing(99) == Listing([(key, 1, None, 0) for key in KEYS], None)


def test_a_number_that_is_partly_known_is_not_taken() -> None:
    tally = Tally(PARTITIONS)
    tally.take(Page(0, encode(EVEN, PARTITIONS), False, "", [], 5))
    tally.take(Page(0, encode(EVEN | ODD, PARTITIONS), False, "", [], 12))
    assert (tally.missing, tally.count) == (ODD, 5)
    tally.take(Page(0, encode(ODD, PARTITIONS), False, "", [], 7))
    assert (tally.missing, tally.count) == (0, 12)


def test_before_any_shard_has_shown_anything_all_is_missing() -> None:
    assert Merge(64).missing == Tally(64).missing == all_of(64) == decode(b"\xff" * 8)


@given(limit=st.integers(1, 10_000), shards=st.integers(1, 64))
def test_a_shard_is_asked_for_more_than_its_share_and_for_no_more_than_the_page(limit: int, shards: int) -> None:
    assert math.ceil(limit / shards) <= share(limit, 1 / shards) <= limit
    assert share(limit, 1.0) == limit


@pytest.mark.parametrize(("limit", "shards"), [(100, 2), (100, 4), (100, 8), (1000, 4), (10, 4)])
def test_a_page_seldom_needs_to_ask_again(limit: int, shards: int) -> None:
    rng = random.Random(1)
    tries = 2000
    short = sum(
        max(Counter(rng.randrange(shards) for _ in range(limit)).values()) > share(limit, 1 / shards)
        for _ in range(tries)
    )
    assert short <= 0.03 * tries
