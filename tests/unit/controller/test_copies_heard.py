"""What is read from the beats of the nodes about the copies of one shard."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.controller.copies_heard import CopiesHeard
from kvstore.controller.heard import Heard
from kvstore.placement.cluster_map import Replica as ReplicaOfMap
from kvstore.placement.cluster_map import at_home, first_map
from kvstore.replication.beats import Beat, CopyReport, Echo, Role
from kvstore.replication.configuration import Configuration, Primary, Replica

LIMITS = Limits(failover_after_s=2.0)
CONFIG = Configuration("s1", "store", 5, 2, Primary("n1", "a"), (Replica("n2", "b", "in-sync", 3),))
COPY = ReplicaOfMap(node="n2", copy_id="b", state="in-sync", joined=3)
HOMES = [at_home(node, f"http://{node}", f"store-{node}") for node in ("n1", "n2")]
SHARD = msgspec.structs.replace(HOMES[0].shard, id="s1", replicas=[COPY])
A_MAP = msgspec.structs.replace(first_map("c", 64, HOMES), shards=[SHARD])
JOINING = CONFIG._replace(replicas=(Replica("n2", "b", "joining", 6),))


def heard(*told: tuple[str, str, Role, int], committed: int = 10, serves: bool = False) -> Heard:
    """Beats at second 1 of (node, copy id, role, the number its log ends with), each node heard by its echo."""
    found = Heard("start", LIMITS, 0.0, {"store": committed})
    for node, copy_id, role, number in told:
        copy = CopyReport(shard="s1", store_id="store", copy_id=copy_id, role=role, number=number, serves=serves)
        beat = Beat(node=node, start="x", cluster_id="c", epoch=5, copies=[copy])
        for _ in range(2):
            answered = found.take(beat, 1.0)
            beat = Beat(
                node=node, start="x", cluster_id="c", epoch=5, copies=[copy], echo=Echo(start="start", beat=answered)
            )
    return found


def test_a_silent_node_tells_nothing_though_its_last_beat_is_remembered() -> None:
    told = heard(("n1", "a", "primary", 12), serves=True)
    assert CopiesHeard(told, 2.9).serves(CONFIG)
    assert not CopiesHeard(told, 3.0).serves(CONFIG)
    assert told.report("n1", "s1") is not None


def test_a_copy_in_sync_takes_over_only_if_its_log_has_all_that_was_committed() -> None:
    assert CopiesHeard(heard(("n2", "b", "copy", 10)), 2.0).in_sync_here(CONFIG) == ["n2"]
    older = CopiesHeard(heard(("n2", "b", "copy", 9)), 2.0)
    assert older.in_sync_here(CONFIG) == []
    assert older.ends_early(CONFIG)


def test_a_shard_waits_for_newer_files_when_its_primary_is_silent_and_the_longest_log_here_is_too_short() -> None:
    found = CopiesHeard(heard(("n2", "b", "copy", 9)), 2.5).older(CONFIG)
    assert found is not None
    assert found.number == 9
    assert CopiesHeard(heard(("n2", "b", "damaged", 9)), 2.5).older(CONFIG) is None, (
        "a damaged copy has no log to go by"
    )


@pytest.mark.parametrize(("role", "waits"), [("opening", True), ("damaged", True), ("primary", False)])
def test_a_shard_waits_too_when_its_primary_is_heard_and_is_not_opened(role: Role, waits: bool) -> None:
    found = CopiesHeard(heard(("n1", "a", role, 7), ("n2", "b", "copy", 9)), 2.5).older(CONFIG)
    assert (found is not None and found.number == 9) is waits


def test_a_number_that_is_told_behind_a_nodes_last_beat_makes_its_copy_no_older_one() -> None:
    """A primary that opens its term tells its new last record as soon as it has it, and beats a moment later."""
    numbers, opening = {"store": 9}, CopyReport(shard="s1", store_id="store", copy_id="a", role="opening", number=9)
    told = Heard("start", LIMITS, 0.0, numbers)
    a_map = msgspec.structs.replace(A_MAP, shards=[msgspec.structs.replace(SHARD, store_id="store")])
    told.announced("n1", 1.0)
    told.take(Beat(node="n1", start="x", cluster_id="c", epoch=5, copies=[opening]), 1.0)
    told.follow(a_map, 1.0)
    numbers["store"] = 10
    told.follow(a_map, 1.1)
    assert CopiesHeard(told, 1.1).older(CONFIG) is None
    told.take(Beat(node="n1", start="x", cluster_id="c", epoch=5, copies=[opening]), 1.2)
    told.follow(a_map, 1.2)
    assert CopiesHeard(told, 1.2).older(CONFIG) == opening, "it has told since, and still ends below"


@pytest.mark.parametrize(
    ("role", "copy_id", "joins"), [("copy", "b", True), ("damaged", "b", False), ("copy", "c", False)]
)
def test_a_copy_joins_while_its_node_tells_of_that_very_copy_undamaged(role: Role, copy_id: str, joins: bool) -> None:
    assert CopiesHeard(heard(("n2", copy_id, role, 3)), 2.0).is_joining(JOINING) is joins


def test_a_shard_whose_primary_is_damaged_has_none_and_one_that_is_heard_undamaged_has_one() -> None:
    assert CopiesHeard(heard(("n1", "a", "damaged", 0)), 2.0).has_no_primary(CONFIG)
    assert CopiesHeard(heard(("n1", "", "damaged", 0)), 2.0).has_no_primary(CONFIG), "its id is lost, too"
    assert not CopiesHeard(heard(("n1", "a", "opening", 12)), 2.0).has_no_primary(CONFIG)


def test_a_copy_that_its_node_does_not_have_or_finds_damaged_takes_over_from_nothing() -> None:
    assert CopiesHeard(heard(("n2", "b", "damaged", 0), committed=0), 2.0).in_sync_here(CONFIG) == []
    told = heard(("n2", "another", "filling", 0), committed=0)
    told.follow(A_MAP, 1.0)
    assert CopiesHeard(told, 2.9).in_sync_here(CONFIG) == ["n2"], "its files may change hands"
    told.detector.note("n2", 2.9)
    assert CopiesHeard(told, 3.0).in_sync_here(CONFIG) == []
