"""Where copies lie: distinct nodes, as many zones as there are, evenly, and no more moves than need be."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvstore.config import REPLICAS_MAX
from kvstore.placement.cluster_map import Node
from kvstore.placement.copies import copy_nodes, zone_of
from kvstore.placement.ring import key_hash


def node(number: int, zone: str = "", host: str = "", *, given_up: bool = False) -> Node:
    return Node(id=f"s{number}", url=f"http://s{number}", zone=zone, host=host, given_up=given_up)


replicas = st.integers(1, REPLICAS_MAX)
plain = st.sets(st.integers(1, 99), min_size=1, max_size=12).map(lambda numbers: [node(n) for n in sorted(numbers)])


@st.composite
def mixed(draw: st.DrawFn) -> list[Node]:
    """Nodes of which some have a zone, some a host, some both, some are given up."""
    numbers = draw(st.sets(st.integers(1, 99), min_size=1, max_size=12))
    names = st.sampled_from(["", "a", "b", "c"])
    return [node(n, draw(names), draw(names), given_up=draw(st.booleans())) for n in sorted(numbers)]


def by_home(nodes: list[Node], count: int) -> dict[str, list[str]]:
    return {home.id: copy_nodes(home.id, nodes, count) for home in nodes}


@given(mixed(), replicas, st.randoms(use_true_random=False))
def test_copies_lie_on_distinct_living_nodes_whatever_the_order_of_names(
    nodes: list[Node], count: int, chance: object
) -> None:
    living = {each.id for each in nodes if not each.given_up}
    shuffled = sorted(nodes, key=lambda _: chance.random())  # type: ignore[attr-defined]
    for home, found in by_home(nodes, count).items():
        assert len(found) == len(set(found)) == min(count, len(living))
        assert set(found) <= living
        assert home not in living or found[:1] == [home]
        assert copy_nodes(home, shuffled, count) == found


@given(mixed(), replicas)
def test_copies_are_in_as_many_zones_as_there_can_be(nodes: list[Node], count: int) -> None:
    zones = {each.id: zone_of(each) for each in nodes}
    there_are = len({zones[each.id] for each in nodes if not each.given_up})
    for found in by_home(nodes, count).values():
        assert len({zones[each] for each in found}) == min(len(found), there_are)


@given(plain, replicas)
def test_without_zones_every_node_keeps_as_many_copies_as_every_other(nodes: list[Node], count: int) -> None:
    kept = Counter(copy for found in by_home(nodes, count).values() for copy in found)
    assert set(kept.values()) == {min(count, len(nodes))}


@given(mixed(), replicas, st.integers(100, 199), st.sampled_from(["", "a", "b", "c", "d"]))
def test_a_node_that_joins_takes_copies_and_moves_no_other(
    nodes: list[Node], count: int, number: int, zone: str
) -> None:
    """So `kvstore shard add` waits for those of the new node only, with zones, too."""
    newcomer = node(number, zone)
    before, after = by_home(nodes, count), by_home([*nodes, newcomer], count)
    for home, found in before.items():
        assert set(after[home]) - set(found) <= {newcomer.id}
        assert len(set(found) - set(after[home])) <= 1


@given(mixed(), replicas, st.integers(100, 199), st.sampled_from(["", "a", "b", "c", "d"]))
def test_of_a_node_that_leaves_each_shard_gets_one_other_place_and_keeps_the_rest(
    nodes: list[Node], count: int, number: int, zone: str
) -> None:
    leaver = node(number, zone)
    before, after = by_home([*nodes, leaver], count), by_home(nodes, count)
    for home, found in after.items():
        assert set(before[home]) - set(found) <= {leaver.id}
        assert len(set(found) - set(before[home])) <= 1


@given(plain, replicas)
def test_fewer_copies_are_the_first_of_more(nodes: list[Node], count: int) -> None:
    for home, found in by_home(nodes, count).items():
        assert copy_nodes(home, nodes, REPLICAS_MAX)[: len(found)] == found


def test_copies_go_clockwise_from_home_at_the_hash_of_the_id() -> None:
    nodes = [node(number) for number in range(1, 6)]
    circle = [each.id for each in sorted(nodes, key=lambda each: key_hash(each.id.encode()))]
    for at, home in enumerate(circle):
        assert copy_nodes(home, nodes, 3) == [circle[(at + step) % 5] for step in range(3)]


def test_a_home_that_is_given_up_keeps_none_and_its_copies_stay_where_they_are() -> None:
    nodes = [node(number) for number in range(1, 6)]
    home, *copies = copy_nodes("s3", nodes, 3)
    given_up = [msgspec.structs.replace(each, given_up=each.id == home) for each in nodes]
    gone = [each for each in nodes if each.id != home]
    assert copy_nodes("s3", given_up, 3)[:2] == copies
    assert copy_nodes("s3", gone, 3) == copy_nodes("s3", given_up, 3)


def test_a_host_is_a_zone_and_a_zone_goes_before_the_host() -> None:
    assert zone_of(node(1, host="h")) == zone_of(node(2, host="h")) != zone_of(node(3))
    assert zone_of(node(1, zone="z", host="h")) == zone_of(node(2, zone="z")) != zone_of(node(3, host="z"))
    assert zone_of(node(1)) != zone_of(node(2))
