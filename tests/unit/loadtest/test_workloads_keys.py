"""The distributions of keys, against the laws that they claim to follow."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from loadtest.workloads.keys import THETA, Keys, Zipfian, fnv_1a

DRAWS = 200_000


def draws(zipfian: Zipfian, count: int = DRAWS, seed: int = 1) -> Counter[int]:
    rng = random.Random(seed)
    return Counter(zipfian.next(rng) for _ in range(count))


@pytest.mark.parametrize("count", [2, 3, 100, 10_000])
def test_zipfian_numbers_are_below_the_count_and_the_first_two_follow_the_law(count: int) -> None:
    zipfian = Zipfian(count)
    found = draws(zipfian)
    assert min(found) == 0
    assert max(found) < count
    for rank in (0, 1):
        assert found[rank] / DRAWS == pytest.approx(zipfian.probability(rank), rel=0.05)


def test_zipfian_shares_of_the_first_ranks_follow_the_law() -> None:
    zipfian = Zipfian(10_000)
    found = draws(zipfian)
    for first in (10, 100, 1_000, 5_000):
        law = sum(zipfian.probability(rank) for rank in range(first))
        share = sum(found[rank] for rank in range(first)) / DRAWS
        assert share == pytest.approx(law, rel=0.05), first


def test_the_probabilities_of_all_ranks_add_up_to_one() -> None:
    zipfian = Zipfian(1_000)
    assert sum(zipfian.probability(rank) for rank in range(1_000)) == pytest.approx(1)
    assert zipfian.probability(0) / zipfian.probability(9) == pytest.approx(10**THETA)


def test_a_zipfian_that_has_grown_is_the_same_as_one_of_that_size() -> None:
    grown = Zipfian(10)
    for count in range(11, 501):
        grown.grow(count)
    assert draws(grown, 20_000) == draws(Zipfian(500), 20_000)


def test_fewer_than_two_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="two at least"):
        Zipfian(1)


def test_the_hash_of_a_number_is_fnv_1a() -> None:
    # the published vectors are of texts: "foobar" has six bytes, so two bytes 0 follow
    expected = 0x85944171F73967E8  # FNV-1a of "foobar" by its authors' test vectors
    for _ in range(2):
        expected = expected * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    assert fnv_1a(int.from_bytes(b"foobar", "little")) == expected


def test_hot_keys_are_scattered_over_the_order_of_the_keys() -> None:
    keys = Keys("p/", 10_000)
    hottest = [keys.name(number) for number in range(64)]
    assert len({name[:3] for name in hottest}) > 10  # of 16 first digits


def test_uniform_keys_come_equally_often() -> None:
    keys = Keys("p/", 50)
    rng = random.Random(2)
    found = Counter(keys.uniform(rng) for _ in range(50_000))
    assert len(found) == 50
    assert max(found.values()) < 1.2 * min(found.values())


def test_the_latest_key_is_the_one_that_was_inserted_last() -> None:
    keys = Keys("p/", 100)
    rng = random.Random(3)
    assert Counter(keys.latest(rng) for _ in range(5_000)).most_common(1)[0][0] == keys.name(99)
    fresh = [keys.fresh() for _ in range(5)]
    for name in fresh:
        keys.insert(name)
    found = Counter(keys.latest(rng) for _ in range(20_000))
    assert [name for name, _ in found.most_common(2)] == [fresh[-1], fresh[-2]]
    assert set(fresh) | {keys.name(number) for number in range(100)} == set(found)
    share = Zipfian(105).probability(0)
    assert found[fresh[-1]] / 20_000 == pytest.approx(share, rel=0.1)


def test_processes_insert_different_keys() -> None:
    one, other = Keys("p/", 10, process=0), Keys("p/", 10, process=1)
    inserted = [keys.fresh() for keys in (one, other) for _ in range(100)]
    assert len({*inserted, *(one.name(number) for number in range(10))}) == 210


@pytest.mark.parametrize(("count", "digits"), [(50, 0), (1_600, 1), (10_000, 1), (25_600, 2)])
def test_a_scan_finds_at_least_a_hundred_keys_under_its_prefix(count: int, digits: int) -> None:
    keys = Keys("p/", count)
    bucket = keys.bucket(keys.name(7))
    assert len(bucket) == 2 + digits
    assert keys.name(7).startswith(bucket)
