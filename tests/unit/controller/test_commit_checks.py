"""When a move may be committed, where shards have copies."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.controller.commit_checks import Terms, lacks_copies, refusal, terms_of
from kvstore.placement.cluster_map import ClusterMap, Move, Node, Replica, Shard, at_home, first_map

MOVE = Move(id="m", source="s1", to="s2", partitions=[0])


def copies(shard: Shard, **states: str) -> Shard:
    """The shard, with a copy on each node named."""
    replicas = [Replica(node=node, copy_id=node, state=state, joined=1) for node, state in states.items()]  # type: ignore[arg-type]
    return msgspec.structs.replace(shard, replicas=replicas)


def cluster_map(source: dict[str, str], to: dict[str, str], replicas: int = 2, nodes: int = 4) -> ClusterMap:
    homes = [at_home(f"s{n}", f"http://s{n}", f"store-{n}") for n in range(1, nodes + 1)]
    found = first_map("c", 64, homes)
    shards = [copies(found.shards[0], **source), copies(found.shards[1], **to), *found.shards[2:]]
    return msgspec.structs.replace(found, replicas=replicas, shards=shards)


def all_live(node: str) -> bool:
    return False


SYNCED, JOINING = {"s3": "in-sync"}, {"s3": "joining"}


@pytest.mark.parametrize(
    ("source", "to", "replicas", "may"),
    [
        ({}, {}, 1, True),
        (SYNCED, SYNCED, 2, True),
        (SYNCED, JOINING, 2, False),
        (SYNCED, {}, 2, False),
        ({}, {}, 2, True),  # no key is on fewer disks than before
        (JOINING, {}, 2, False),  # it was on two, or soon is
        ({"s3": "in-sync", "s4": "in-sync"}, SYNCED, 3, False),
        ({"s3": "in-sync", "s4": "in-sync"}, SYNCED, 2, True),
    ],
)
def test_a_destination_has_as_many_copies_as_are_asked_for_or_as_the_source_has(
    source: dict[str, str], to: dict[str, str], replicas: int, may: bool
) -> None:
    assert (lacks_copies(cluster_map(source, to, replicas), MOVE, all_live) == "") is may


def test_a_copy_of_the_source_that_is_out_does_not_count_once_its_node_is_dead() -> None:
    assert lacks_copies(cluster_map(JOINING, {}), MOVE, all_live)
    assert not lacks_copies(cluster_map(JOINING, {}), MOVE, lambda node: node == "s3")


def test_where_there_are_fewer_nodes_than_copies_all_of_them_are_enough() -> None:
    source, to = {"s2": "in-sync"}, {"s1": "in-sync"}
    assert not lacks_copies(cluster_map(source, to, replicas=5, nodes=2), MOVE, all_live)


@pytest.mark.parametrize(("leaving", "waits"), [(["s1"], True), (["s1", "s3"], False)])
def test_what_leaves_does_not_wait_for_copies_that_have_no_place_once_it_has_left(
    leaving: list[str], waits: bool
) -> None:
    """No copy is made on a node whose shard leaves, or has left: here one stays, and would never get a copy."""
    found = cluster_map(SYNCED, {}, nodes=3)
    shards = [msgspec.structs.replace(s, state="leaving") if s.id in leaving else s for s in found.shards]
    left = msgspec.structs.replace(found, shards=shards, nodes=[*found.nodes, Node(id="s9", url="http://s9")])
    assert bool(lacks_copies(left, MOVE, all_live)) is waits


@pytest.mark.parametrize("changed", [Terms(9, 1), Terms(1, 9)])
def test_a_move_is_not_committed_in_another_term_than_it_began_in(changed: Terms) -> None:
    found = cluster_map(SYNCED, SYNCED)
    began = terms_of(found, MOVE)
    assert began == Terms(1, 1)
    assert refusal(found, MOVE, began, all_live) == ""
    terms = [changed.source, changed.to, 1, 1]
    shards = [msgspec.structs.replace(s, term=term) for s, term in zip(found.shards, terms, strict=True)]
    later = msgspec.structs.replace(found, shards=shards)
    assert "has changed" in refusal(later, MOVE, began, all_live)
