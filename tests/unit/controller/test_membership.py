"""Who may come, go and weigh what: the rules, each with its refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest

from kvstore.controller.membership import (
    Announcement,
    ClusterState,
    FirstMembers,
    check_id,
    check_newcomer,
    check_url,
    check_weight,
    decide,
    may_join,
    replanned,
    reweighed,
    with_joining,
    with_wanted,
    without,
    without_moves,
)
from kvstore.errors import BadBody, ChangeRefused, Conflict, ForeignData, KvError, NotFound, Unavailable
from kvstore.placement.cluster_map import ClusterMap, Home, at_home, first_map
from kvstore.placement.moves import committed, planned

FIRST = FirstMembers(weights={"s1": 1, "s2": 1}, partitions=64, replicas=1)
ids = itertools.count(1)


def plan(cluster_map: ClusterMap) -> ClusterMap:
    return planned(cluster_map, lambda source: 8, lambda: f"m{next(ids)}")


def member(shard_id: str, weight: int = 1) -> Home:
    return at_home(shard_id, f"http://{shard_id}:1", f"store-{shard_id}", weight=weight)


def said(shard_id: str, **changes: object) -> Announcement:
    announcement = Announcement(id=shard_id, url=f"http://{shard_id}:1", store_id=f"store-{shard_id}")
    return msgspec.structs.replace(announcement, **changes)


def announce(state: ClusterState, announcement: Announcement) -> ClusterState:
    return decide(state, announcement, FIRST, "never", plan)


FORMED = ClusterState(map=first_map("c", 64, [member("s1"), member("s2")]))


def the_map(state: ClusterState) -> ClusterMap:
    assert state.map is not None
    return state.map


def states(state: ClusterState) -> dict[str, str]:
    return {member.id: member.state for member in the_map(state).shards}


def commit_all(state: ClusterState) -> ClusterState:
    cluster_map = the_map(state)
    while cluster_map.moves:
        cluster_map = committed(cluster_map, cluster_map.moves[0].id)
    return msgspec.structs.replace(state, map=cluster_map)


# --- joining ---------------------------------------------------------------------------------------------------------


def test_who_joins_and_its_moves_come_in_one_epoch() -> None:
    joined = with_joining(FORMED, member("s3"), plan)
    assert the_map(joined).epoch == 2
    assert states(joined) == {"s1": "up", "s2": "up", "s3": "joining"}
    assert {move.to for move in the_map(joined).moves} == {"s3"}


def test_a_wanted_shard_joins_when_it_announces_itself_with_the_weight_that_was_asked_for() -> None:
    wanted = with_wanted(FORMED, "s3", 2)
    assert (wanted.wanted, wanted.map) == ({"s3": 2}, FORMED.map)
    assert may_join(wanted, said("s3"))
    joined = announce(wanted, said("s3", weight=7))
    assert joined.wanted == {}
    assert (newcomer := the_map(joined).shard("s3")) is not None
    assert (newcomer.weight, newcomer.state, newcomer.store_id) == (2, "joining", "store-s3")
    assert announce(joined, said("s3")) is joined
    assert not may_join(joined, said("s3"))


def test_a_shard_that_asks_to_join_joins_with_its_own_weight() -> None:
    joined = announce(FORMED, said("s3", join=True, weight=3))
    assert (newcomer := the_map(joined).shard("s3")) is not None
    assert newcomer.weight == 3


def test_a_first_member_may_say_join_too() -> None:
    state = announce(announce(ClusterState(), said("s1", join=True)), said("s2"))
    assert states(state) == {"s1": "up", "s2": "up"}


def test_who_does_not_ask_and_is_not_wanted_does_not_join() -> None:
    with pytest.raises(Conflict, match="add it first"):
        announce(FORMED, said("s3"))
    with pytest.raises(Conflict, match="add it first"):
        announce(ClusterState(), said("s3", join=True))


@pytest.mark.parametrize("state", [FORMED, with_wanted(FORMED, "s3", 1)])
def test_a_file_of_a_removed_shard_does_not_join(state: ClusterState) -> None:
    with pytest.raises(ForeignData, match=r"was removed from this cluster.*move shard-\w+\.\* away"):
        announce(state, said("s3", cluster_id="c", join=True))


def test_a_foreign_or_copied_file_does_not_join() -> None:
    wanted = with_wanted(FORMED, "s3", 1)
    with pytest.raises(ForeignData, match="belongs to cluster other"):
        announce(wanted, said("s3", cluster_id="other"))
    with pytest.raises(ForeignData, match="copy of that of shard s1"):
        announce(wanted, said("s3", store_id="store-s1", join=True))
    with pytest.raises(ForeignData, match="copy of that of shard s1"):
        with_joining(FORMED, at_home("s3", "http://s3:1", "store-s1"), plan)


def test_a_file_of_another_number_of_partitions_does_not_join() -> None:
    """Else it would be a member that can never follow the map."""
    why = "is for 4096 partitions, this cluster has 64: start the shard with an empty data_dir"
    with pytest.raises(ForeignData, match=why):
        announce(FORMED, said("s3", join=True, partitions=4096))
    with pytest.raises(ForeignData, match=why):
        announce(ClusterState(), said("s1", partitions=4096))
    with pytest.raises(ForeignData, match=why):
        check_newcomer(FORMED, "s3", None, 4096)
    assert states(announce(FORMED, said("s3", join=True, partitions=64)))["s3"] == "joining"


def test_an_id_that_is_taken_is_refused_with_what_to_do() -> None:
    with pytest.raises(ChangeRefused, match="exists already: choose another id"):
        check_newcomer(FORMED, "s1")
    with pytest.raises(ChangeRefused, match="asked for already"):
        with_wanted(with_wanted(FORMED, "s3", 1), "s3", 1)
    with pytest.raises(ChangeRefused, match="is leaving: add it again when it has left"):
        with_joining(without(FORMED, "s1", plan), member("s1"), plan)


def test_a_removed_id_is_free_again() -> None:
    gone = commit_all(without(FORMED, "s1", plan))
    assert states(gone) == {"s2": "up"}
    newcomer = at_home("s1", "http://s1:1", "another")
    assert states(commit_all(with_joining(gone, newcomer, plan))) == {"s2": "up", "s1": "up"}


def test_a_file_with_a_cluster_is_refused_by_its_id() -> None:
    check_newcomer(FORMED, "s3", None)
    with pytest.raises(ForeignData, match="was removed from this cluster"):
        check_newcomer(FORMED, "s3", "c")
    with pytest.raises(ForeignData, match="belongs to cluster x, not to this one"):
        check_newcomer(FORMED, "s3", "x")


# --- leaving, weights, cancelling ------------------------------------------------------------------------------------


def test_who_leaves_and_its_moves_come_in_one_epoch() -> None:
    leaving = without(FORMED, "s1", plan)
    assert the_map(leaving).epoch == 2
    assert states(leaving) == {"s1": "leaving", "s2": "up"}
    assert without(leaving, "s1", plan) == leaving


def test_the_last_shard_that_stays_cannot_be_removed() -> None:
    with pytest.raises(ChangeRefused, match=r"the last one that stays.*Add another shard first"):
        without(without(FORMED, "s1", plan), "s2", plan)


def test_a_wanted_shard_that_never_came_is_forgotten() -> None:
    assert without(with_wanted(FORMED, "s3", 1), "s3", plan) == FORMED


def test_a_new_weight_is_planned_in_one_epoch_and_counts_for_a_wanted_shard_too() -> None:
    weighed = reweighed(FORMED, "s1", 3, plan)
    assert the_map(weighed).epoch == 2
    assert sum(len(move.partitions) for move in the_map(weighed).moves) == 16
    assert reweighed(weighed, "s1", 3, plan) == weighed
    assert reweighed(with_wanted(FORMED, "s3", 1), "s3", 5, plan).wanted == {"s3": 5}
    with pytest.raises(ChangeRefused, match="is leaving"):
        reweighed(without(FORMED, "s1", plan), "s1", 2, plan)


def test_a_cancel_forgets_all_that_is_not_done() -> None:
    busy = with_wanted(without(with_joining(FORMED, member("s3"), plan), "s2", plan), "s4", 1)
    stopped = without_moves(busy)
    assert states(stopped) == {"s1": "up", "s2": "up"}
    assert stopped.wanted == {}
    assert the_map(stopped).moves == []
    assert the_map(replanned(stopped, plan)) == the_map(stopped)


def test_a_new_plan_goes_on_after_a_cancel() -> None:
    stopped = without_moves(reweighed(FORMED, "s1", 3, plan))
    again = replanned(stopped, plan)
    assert the_map(again).epoch == the_map(stopped).epoch + 1
    assert len(the_map(commit_all(again)).owned_by("s1")) == 48


@pytest.mark.parametrize(
    "ask",
    [lambda state: without(state, "s9", plan), lambda state: reweighed(state, "s9", 2, plan)],
)
def test_an_unknown_shard_is_not_found_and_the_known_ones_are_named(ask: Callable[[ClusterState], object]) -> None:
    with pytest.raises(NotFound, match="'s9': the members are s1, s2") as caught:
        ask(FORMED)
    assert caught.value.problem()["title"] == "There is no such shard"


@pytest.mark.parametrize(
    "ask",
    [
        lambda state: with_joining(state, member("s9"), plan),
        lambda state: with_wanted(state, "s9", 1),
        lambda state: without(state, "s1", plan),
        lambda state: reweighed(state, "s1", 2, plan),
        lambda state: replanned(state, plan),
        without_moves,
    ],
)
def test_before_the_cluster_is_formed_nothing_can_be_changed(ask: Callable[[ClusterState], object]) -> None:
    with pytest.raises(Unavailable, match="not formed yet"):
        ask(ClusterState())


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (check_id, ""), (check_id, "S1"), (check_id, "a" * 33), (check_url, "s1:1"), (check_url, "http://x/y"),
        (check_url, "http://0.0.0.0:9101"), (check_url, "http://[::]:9101"), (check_url, "http://x:0"),
        (check_url, "http://x:port"), (check_url, "http://:80"), (check_url, "http://[::1:80"),
        (check_weight, 0), (check_weight, 1001), (check_weight, -1),
    ],
)  # fmt: skip
def test_a_value_without_sense_is_refused(check: Callable[[object], None], value: object) -> None:
    with pytest.raises(BadBody):
        check(value)


def test_every_refusal_says_what_to_do() -> None:
    for ask in (
        lambda: check_newcomer(FORMED, "s1"),
        lambda: check_newcomer(FORMED, "s3", "c"),
        lambda: without(without(FORMED, "s1", plan), "s2", plan),
        lambda: without(FORMED, "s9", plan),
        lambda: replanned(ClusterState(), plan),
    ):
        with pytest.raises(KvError) as caught:
            ask()
        assert caught.value.problem()["next_step"]
