"""The cache beside a model of what is visible: it may forget, it may never be behind."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.store.cache import Cache
from kvstore.transactions.intents import ABSENT, State

KEYS = ["a", "b", "c", "d", "e"]
BYTES_MAX = 2000


def entry(version: int, size: int = 1) -> State:
    return State(version, 0, b"v" * size)


class CacheMachine(RuleBasedStateMachine):
    """Writers publish, readers look at the visible state and come back late, partitions come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(BYTES_MAX)
        self.visible: dict[str, State] = {}
        self.away: list[tuple[str, int, State]] = []
        self.version = 0

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from([0, 1, 100, 600, 900, 5000]), there=st.booleans())
    def a_change_becomes_visible(self, key: str, size: int, there: bool) -> None:
        self.version += 1
        new = entry(self.version, size) if there else State(self.version, 0, None)
        self.visible[key] = new
        self.cache.publish(key, new)

    @rule(key=st.sampled_from(KEYS))
    def a_reader_looks(self, key: str) -> None:
        self.away.append((key, self.cache.begin(key), self.visible.get(key, ABSENT)))

    @rule(number=st.integers(0, 10), found=st.booleans())
    def a_reader_comes_back(self, number: int, found: bool) -> None:
        if self.away:
            key, ticket, seen = self.away.pop(number % len(self.away))
            self.cache.finish(key, ticket, seen if found else None)

    @rule(key=st.sampled_from(KEYS))
    def a_client_asks(self, key: str) -> None:
        assert self.cache.get(key) in (None, self.visible.get(key, ABSENT))

    @rule()
    def a_partition_comes_or_goes(self) -> None:
        """The owner in between may change all keys."""
        self.cache.clear()
        for key in self.visible:
            self.version += 1
            self.visible[key] = entry(self.version)

    @invariant()
    def nothing_in_it_is_behind_what_is_visible(self) -> None:
        for key in KEYS:
            assert self.cache.peek(key) in (None, self.visible.get(key, ABSENT))

    @invariant()
    def it_is_bounded(self) -> None:
        held = [self.cache.peek(key) for key in KEYS]
        assert sum(len(e.body or b"") for e in held if e) <= BYTES_MAX
        assert len(self.cache) == sum(e is not None for e in held)


TestCacheBesideItsModel = CacheMachine.TestCase
TestCacheBesideItsModel.settings = settings(max_examples=60, stateful_step_count=30)


def test_what_was_published_is_found() -> None:
    cache = Cache(BYTES_MAX)
    cache.publish("a", entry(1))
    assert cache.get("a") == entry(1)
    assert cache.get("b") is None


def test_a_readers_find_enters() -> None:
    cache = Cache(BYTES_MAX)
    cache.finish("a", cache.begin("a"), ABSENT)
    assert cache.get("a") == ABSENT


def test_a_reader_that_is_late_does_not_overwrite_what_became_visible_since() -> None:
    cache = Cache(BYTES_MAX)
    ticket = cache.begin("a")
    cache.publish("a", entry(2))
    cache.finish("a", ticket, entry(1))
    assert cache.get("a") == entry(2)


def test_a_reader_that_is_late_does_not_enter_even_when_the_newer_change_was_forgotten() -> None:
    cache = Cache(BYTES_MAX)
    ticket = cache.begin("a")
    cache.publish("a", entry(2))
    for number in range(20):
        cache.publish(f"other-{number}", entry(3))
    assert cache.get("a") is None
    cache.finish("a", ticket, ABSENT)
    assert cache.get("a") is None


def test_a_reader_that_is_late_does_not_enter_after_its_partition_left() -> None:
    cache = Cache(BYTES_MAX)
    ticket = cache.begin("a")
    cache.clear()
    cache.finish("a", ticket, entry(1))
    assert cache.get("a") is None


def test_of_two_readers_of_one_key_the_later_one_counts() -> None:
    cache = Cache(BYTES_MAX)
    first, second = cache.begin("a"), cache.begin("a")
    cache.finish("a", first, entry(1))
    assert cache.get("a") is None
    cache.finish("a", second, entry(1))
    assert cache.get("a") == entry(1)


def test_what_is_used_stays_and_what_is_not_used_goes() -> None:
    cache = Cache(BYTES_MAX)
    cache.publish("hot", entry(1))
    cache.publish("cold", entry(1))
    for number in range(50):
        cache.publish(f"new-{number}", entry(1))
        assert cache.get("hot") == entry(1)
    assert cache.get("cold") is None


def test_a_peek_does_not_count_as_use() -> None:
    cache = Cache(BYTES_MAX)
    cache.publish("peeked", entry(1))
    for number in range(50):
        cache.publish(f"new-{number}", entry(1))
        cache.peek("peeked")
    assert cache.peek("peeked") is None


@pytest.mark.parametrize("size", [1001, 1 << 20])
def test_a_value_too_large_for_the_cache_is_not_kept_and_what_it_replaces_is_forgotten(size: int) -> None:
    cache = Cache(BYTES_MAX)
    cache.publish("a", entry(1))
    cache.publish("a", entry(2, size))
    assert cache.get("a") is None


def test_readers_that_found_nothing_to_keep_leave_nothing_behind() -> None:
    cache = Cache(BYTES_MAX)
    ticket = cache.begin("a")
    cache.finish("a", ticket, None)
    assert len(cache) == 0
    cache.finish("a", ticket, entry(1))
    assert cache.get("a") is None
