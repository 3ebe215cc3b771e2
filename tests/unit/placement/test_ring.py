"""The ring's promises: balance, few moves, determinism, and a hash that never changes."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.placement.ring import ShardWeight, key_hash, partition_of, place, walk

PARTITIONS = 4096

weights = st.integers(1, 12)
counts = st.sampled_from([64, 256, 1024, 4096])
members = st.dictionaries(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=8), weights, min_size=2, max_size=64
)
# A change is a number that chooses a shard, and its new weight: 0 takes it out, another one may bring it in.
changes = st.lists(st.tuples(st.integers(0, 63), st.integers(0, 12)), min_size=1, max_size=8)


def nodes_of(cluster: dict[str, int]) -> list[ShardWeight]:
    return [ShardWeight(shard, weight) for shard, weight in cluster.items()]


def equal_nodes(count: int) -> list[ShardWeight]:
    return [ShardWeight(f"s{number}") for number in range(1, count + 1)]


def fair_share(cluster: dict[str, int], shard: str, partitions: int) -> Fraction:
    return Fraction(cluster.get(shard, 0) * partitions, sum(cluster.values()))


def moves(before: list[str], after: list[str]) -> list[tuple[str, str]]:
    return [(old, new) for old, new in zip(before, after, strict=True) if old != new]


# --- balance


@pytest.mark.parametrize("count", range(1, 65))
def test_equal_shards_share_alike(count: int) -> None:
    load = Counter(place(equal_nodes(count), PARTITIONS))
    mean = PARTITIONS / count
    assert max(load.values()) <= max(1.02 * mean, mean + 1)
    assert set(load.values()) <= {math.floor(mean), math.ceil(mean)}


@given(members, counts)
@settings(max_examples=60)
def test_no_shard_gets_more_than_its_fair_share_rounded_up(cluster: dict[str, int], partitions: int) -> None:
    owners = place(nodes_of(cluster), partitions)
    load = Counter(owners)
    assert len(owners) == partitions
    assert load.keys() <= cluster.keys()
    assert all(load[shard] <= math.ceil(fair_share(cluster, shard, partitions)) for shard in load)


def test_double_weight_gets_double_the_partitions() -> None:
    assert Counter(place([ShardWeight("a", 1), ShardWeight("b", 2), ShardWeight("c", 5)], 4096)) == {
        "a": 512,
        "b": 1024,
        "c": 2560,
    }


def test_weights_may_be_as_large_as_gigabytes() -> None:
    assert Counter(place([ShardWeight("a", 10_000), ShardWeight("b", 30_000)], 4096)) == {"a": 1024, "b": 3072}


def test_more_shards_than_partitions_leave_some_without() -> None:
    assert set(Counter(place(equal_nodes(100), 64)).values()) == {1}


# --- few moves


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15, 31, 62, 63])
def test_a_join_and_a_departure_move_no_more_than_one_fair_share(count: int) -> None:
    before = place(equal_nodes(count), PARTITIONS)
    joined = place(equal_nodes(count + 1), PARTITIONS, before)
    left = place(equal_nodes(count), PARTITIONS, joined)
    newcomer = f"s{count + 1}"
    share = PARTITIONS / (count + 1)
    assert {new for _, new in moves(before, joined)} == {newcomer}
    assert {old for old, _ in moves(joined, left)} == {newcomer}
    assert len(moves(before, joined)) <= 1.05 * share
    assert len(moves(joined, left)) <= 1.05 * share


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (3, 1), (4, 5), (1, 10)])
def test_a_new_weight_moves_the_difference_of_the_shares(old: int, new: int) -> None:
    others = equal_nodes(7)
    before = place([*others, ShardWeight("changed", old)], PARTITIONS)
    after = place([*others, ShardWeight("changed", new)], PARTITIONS, before)
    moved = moves(before, after)
    assert {new_owner if new > old else old_owner for old_owner, new_owner in moved} == {"changed"}
    assert len(moved) <= 1.05 * abs(new / (7 + new) - old / (7 + old)) * PARTITIONS


def check_step(before: dict[str, int], after: dict[str, int], present: list[str], changed: str) -> list[str]:
    """One change of one shard keeps every promise; returns the next placement."""
    partitions = len(present)
    owners = place(nodes_of(after), partitions, present)
    load = Counter(owners)
    assert load.keys() <= after.keys()
    assert all(load[shard] <= math.ceil(fair_share(after, shard, partitions)) for shard in load)

    moved = moves(present, owners)
    grows = after.get(changed, 0) > before.get(changed, 0)
    assert {new if grows else old for old, new in moved} <= {changed}
    assert len(moved) == abs(load[changed] - Counter(present)[changed])
    if changed not in before or changed not in after:
        minimum = float(fair_share(after if grows else before, changed, partitions))
        assert len(moved) <= max(1.05 * minimum, minimum + 1)
    return owners


@given(members, counts, changes)
@settings(max_examples=60)
def test_any_series_of_joins_departures_and_new_weights_moves_the_minimum(
    cluster: dict[str, int], partitions: int, changes: list[tuple[int, int]]
) -> None:
    present = place(nodes_of(cluster), partitions)
    for choice, weight in changes:
        names = [*sorted(cluster), "newcomer"]
        changed = names[choice % len(names)]
        after = {shard: old for shard, old in cluster.items() if shard != changed}
        if weight:
            after[changed] = weight
        if after:
            present = check_step(cluster, after, present, changed)
            cluster = after


@given(members, counts)
@settings(max_examples=30)
def test_what_is_placed_stays_while_nothing_changes(cluster: dict[str, int], partitions: int) -> None:
    owners = place(nodes_of(cluster), partitions)
    assert place(nodes_of(cluster), partitions, owners) == owners


def test_partitions_without_an_owner_are_placed_and_the_others_stay() -> None:
    owners = place(equal_nodes(4), PARTITIONS)
    present = [None if partition % 7 == 0 else owner for partition, owner in enumerate(owners)]
    healed = place(equal_nodes(4), PARTITIONS, present)
    assert all(new == old for old, new in zip(present, healed, strict=True) if old is not None)
    assert Counter(healed) == Counter(owners)


def test_a_lopsided_placement_is_evened_out_at_once() -> None:
    owners = place(equal_nodes(4), PARTITIONS, ["s2"] * PARTITIONS)
    assert set(Counter(owners).values()) == {1024}
    assert len(moves(["s2"] * PARTITIONS, owners)) == 3 * 1024


# --- the ring decides


@given(members, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_in_which_shards_are_named_does_not_matter(cluster: dict[str, int], rng: random.Random) -> None:
    nodes = nodes_of(cluster)
    shuffled = rng.sample(nodes, len(nodes))
    assert place(shuffled, 256) == place(nodes, 256)
    assert walk(shuffled, 77, 256) == walk(nodes, 77, 256)


@given(members, counts, st.integers(0, 4095))
@settings(max_examples=40)
def test_a_walk_meets_every_shard_once(cluster: dict[str, int], partitions: int, number: int) -> None:
    met = walk(nodes_of(cluster), number % partitions, partitions)
    assert len(met) == len(set(met))
    assert set(met) == cluster.keys()


def test_a_departure_changes_no_other_shards_place_on_the_walks() -> None:
    for partition in range(0, PARTITIONS, 64):
        met = walk(equal_nodes(5), partition, PARTITIONS)
        assert walk(equal_nodes(4), partition, PARTITIONS) == [shard for shard in met if shard != "s5"]


def test_most_partitions_live_where_their_walk_begins() -> None:
    nodes = equal_nodes(8)
    owners = place(nodes, 512)
    at_home = sum(walk(nodes, partition, 512)[0] == owner for partition, owner in enumerate(owners))
    assert at_home > 0.75 * 512


def test_a_newcomer_takes_first_those_partitions_whose_walk_meets_it_first() -> None:
    before = place(equal_nodes(8), PARTITIONS)
    after = place(equal_nodes(9), PARTITIONS, before)
    taken = [partition for partition, owner in enumerate(after) if owner == "s9"]
    first = sum(walk(equal_nodes(9), partition, PARTITIONS)[0] == "s9" for partition in taken[::16])
    assert first > 0.75 * len(taken[::16])


# --- keys


def test_every_key_finds_a_shard() -> None:
    """The article's ring asks whether the key's own hash is a virtual node's: ordinary keys find None."""
    owners = place(equal_nodes(4), PARTITIONS)
    found = Counter(owners[partition_of(f"user:{number}".encode(), PARTITIONS)] for number in range(20_000))
    assert found.keys() == {"s1", "s2", "s3", "s4"}
    assert found.total() == 20_000
    assert max(found.values()) <= 1.05 * 5_000


def test_virtual_nodes_are_many_points_not_one() -> None:
    """The article hashes the bare name for each replica: then all walks would go round in one order."""
    walks = {tuple(walk(equal_nodes(3), partition, PARTITIONS)) for partition in range(0, PARTITIONS, 16)}
    assert len(walks) == 6


GOLDEN = [
    # key, xxh3-64, partition of 64, of 4,096, of 65,536
    (b"", 0x2D06800538D394C2, 11, 720, 11526),
    (b"a", 0xE6C632B61E964E1F, 57, 3692, 59078),
    (b"user:42", 0x9FC1E605FA7174AA, 39, 2556, 40897),
    (b"a/b/c", 0x2AA921021E822567, 10, 682, 10921),
    (b"\x00", 0xC44BDFF4074EECDB, 49, 3140, 50251),
    ("schlüssel-鍵-🔑".encode(), 0x1CEA447EE7F35CBB, 7, 462, 7402),
    (b"k" * 240, 0xAA797E2A991A7490, 42, 2727, 43641),
    (b"k" * 241, 0x26D43597C3347BA2, 9, 621, 9940),
    (b"k" * 1024, 0x686D3DE82E988280, 26, 1670, 26733),
]


@pytest.mark.parametrize(("key", "digest", "of_64", "of_4096", "of_65536"), GOLDEN)
def test_the_hash_of_a_key_never_changes(key: bytes, digest: int, of_64: int, of_4096: int, of_65536: int) -> None:
    assert key_hash(key) == digest
    assert [partition_of(key, partitions) for partitions in (64, 4096, 65536)] == [of_64, of_4096, of_65536]


@given(st.binary(max_size=1024), st.sampled_from([64, 128, 4096, 65536]))
def test_a_partition_is_the_top_bits_of_the_hash(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == key_hash(key) * partitions // 2**64


# --- what is refused


@pytest.mark.parametrize(
    ("nodes", "partitions", "said"),
    [
        ([], 64, "no shards"),
        ([ShardWeight("s1"), ShardWeight("s2"), ShardWeight("s1")], 64, "'s1' is named 2 times"),
        ([ShardWeight("s1", 0)], 64, "'s1' has weight 0"),
        ([ShardWeight("s1", -1)], 64, "weight -1"),
        ([ShardWeight("s1")], 0, "power of two from 64 to 65536, not 0"),
        ([ShardWeight("s1")], 32, "not 32"),
        ([ShardWeight("s1")], 100, "not 100"),
        ([ShardWeight("s1")], 131_072, "not 131072"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_words(nodes: list[ShardWeight], partitions: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        place(nodes, partitions)
    with pytest.raises(ValueError, match=said):
        walk(nodes, 0, partitions)


def test_a_present_placement_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="63 partitions, the cluster 64"):
        place([ShardWeight("s1")], 64, ["s1"] * 63)
    with pytest.raises(ValueError, match="0 partitions"):
        place([ShardWeight("s1")], 64, [])


@pytest.mark.parametrize("partition", [-1, 64])
def test_a_walk_from_a_partition_that_does_not_exist_is_refused(partition: int) -> None:
    with pytest.raises(ValueError, match="they are 0 to 63"):
        walk([ShardWeight("s1")], partition, 64)
