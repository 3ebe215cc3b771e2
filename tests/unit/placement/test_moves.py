"""Moves: whatever is asked for, in whatever order moves end, the maps keep their promises and come to the fair one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import msgspec
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.placement.cluster_map import ClusterMap, Home, Move, Replica, Strike, at_home, first_map
from kvstore.placement.moves import (
    all_voided,
    cancelled,
    committed,
    opened,
    planned,
    voided,
    with_leaving,
    with_new_shard,
    with_struck,
    with_weight,
)

PARTITIONS = 256


class Ids:
    """Move ids, each once."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def __call__(self) -> str:
        return f"m{next(self._numbers)}"


def member(shard_id: str, weight: int = 1) -> Home:
    return at_home(shard_id, f"http://{shard_id}", f"store-{shard_id}", weight=weight)


def cluster(*shard_ids: str, partitions: int = PARTITIONS) -> ClusterMap:
    return first_map("c", partitions, [member(shard_id) for shard_id in shard_ids])


def plan(cluster_map: ClusterMap, ids: Ids, group: int = 16) -> ClusterMap:
    return planned(cluster_map, lambda source: group, ids)


def commit_all(cluster_map: ClusterMap) -> ClusterMap:
    while cluster_map.moves:
        cluster_map = committed(cluster_map, cluster_map.moves[0].id)
    return cluster_map


def states(cluster_map: ClusterMap) -> dict[str, str]:
    return {member.id: member.state for member in cluster_map.shards}


def loads(cluster_map: ClusterMap) -> dict[str, int]:
    return {member.id: len(cluster_map.owned_by(member.id)) for member in cluster_map.shards}


def owner_ids(cluster_map: ClusterMap) -> list[str]:
    return [cluster_map.shards[index].id for index in cluster_map.owners]


def moved(before: ClusterMap, after: ClusterMap) -> int:
    return sum(old != new for old, new in zip(owner_ids(before), owner_ids(after), strict=True))


# --- one after another -----------------------------------------------------------------------------------------------


def test_a_shard_that_is_added_joins_gets_its_share_and_is_up() -> None:
    before = cluster("s1", "s2", "s3")
    after = plan(with_new_shard(before, member("s4")), Ids())
    assert states(after) == {"s1": "up", "s2": "up", "s3": "up", "s4": "joining"}
    assert after.owners == before.owners
    assert {move.to for move in after.moves} == {"s4"}
    done = commit_all(after)
    assert states(done)["s4"] == "up"
    assert loads(done) == {"s1": 64, "s2": 64, "s3": 64, "s4": 64}
    assert moved(before, done) == 64


def test_a_shard_that_is_removed_leaves_gives_all_away_and_is_gone() -> None:
    before = cluster("s1", "s2", "s3", "s4")
    leaving = plan(with_leaving(before, "s2"), Ids())
    assert states(leaving)["s2"] == "leaving"
    assert {move.source for move in leaving.moves} == {"s2"}
    done = commit_all(leaving)
    assert [member.id for member in done.shards] == ["s1", "s3", "s4"]
    assert sorted(loads(done).values()) == [85, 85, 86]
    assert moved(before, done) == 64


def test_each_step_is_a_new_epoch_and_nothing_new_is_the_same_map() -> None:
    ids = Ids()
    before = cluster("s1", "s2")
    assert plan(before, ids) is before
    joining = with_new_shard(before, member("s3"))
    assert joining.epoch == 2
    standing = plan(joining, ids)
    assert standing.epoch == 3
    assert plan(standing, ids) is standing
    assert committed(standing, standing.moves[0].id).epoch == 4
    assert with_weight(before, "s1", 1) is before
    assert cancelled(before) is before
    assert all_voided(before, ids) is before
    leaving = with_leaving(before, "s1")
    assert with_leaving(leaving, "s1") is leaving


def test_a_group_has_no_more_partitions_than_its_source_allows() -> None:
    before = with_new_shard(cluster("s1", "s2"), member("s3"))
    after = planned(before, {"s1": 5, "s2": 0}.__getitem__, Ids())
    sizes = {source: Counter(len(m.partitions) for m in after.moves if m.source == source) for source in ("s1", "s2")}
    assert max(sizes["s1"]) == 5
    assert min(sizes["s1"]) >= 4
    assert set(sizes["s2"]) == {1}


def test_the_first_moves_have_different_sources_and_destinations() -> None:
    before = cluster("s1", "s2", "s3", "s4")
    for shard_id in ("s5", "s6", "s7"):
        before = with_new_shard(before, member(shard_id))
    moves = plan(before, Ids(), group=2).moves
    assert len({move.source for move in moves[:3]}) == 3
    assert len({move.to for move in moves[:3]}) == 3
    assert len({(move.source, move.to) for move in moves[:12]}) == 12


def test_a_plan_keeps_the_moves_that_still_lead_where_they_should() -> None:
    ids = Ids()
    first = plan(with_new_shard(cluster("s1", "s2", "s3"), member("s4")), ids, group=1)
    second = plan(with_new_shard(first, member("s5")), ids, group=1)
    kept = {move.id for move in first.moves} & {move.id for move in second.moves}
    assert len(kept) > 0.7 * len(first.moves)
    assert [move.id for move in second.moves][: len(kept)] == [move.id for move in first.moves if move.id in kept]
    assert sorted(loads(commit_all(second)).values()) == [51, 51, 51, 51, 52]


def test_what_a_newcomer_got_already_stays_when_another_one_comes() -> None:
    ids = Ids()
    standing = plan(with_new_shard(cluster("s1", "s2"), member("s3")), ids, group=8)
    for move in standing.moves[: len(standing.moves) // 2]:
        standing = committed(standing, move.id)
    got = set(standing.owned_by("s3"))
    assert got
    done = commit_all(plan(with_new_shard(standing, member("s4")), ids, group=8))
    assert got <= set(done.owned_by("s3"))


def test_there_and_back_before_any_commit_leaves_no_trace() -> None:
    before = cluster("s1", "s2", "s3")
    joining = plan(with_new_shard(before, member("s4")), Ids())
    for back in (cancelled(joining), plan(with_leaving(joining, "s4"), Ids())):
        assert (back.shards, back.owners, back.moves) == (before.shards, before.owners, [])


def test_there_and_back_half_way_moves_only_what_had_moved() -> None:
    ids = Ids()
    before = cluster("s1", "s2", "s3")
    half = plan(with_new_shard(before, member("s4")), ids, group=4)
    for move in half.moves[: len(half.moves) // 2]:
        half = committed(half, move.id)
    gone = len(half.owned_by("s4"))
    back = plan(with_leaving(half, "s4"), ids)
    assert sum(len(move.partitions) for move in back.moves) == gone
    assert loads(commit_all(back)) == loads(before)


def test_a_weight_there_and_back_half_way_moves_only_what_had_moved() -> None:
    ids = Ids()
    before = cluster("s1", "s2", "s3")
    half = plan(with_weight(before, "s3", 4), ids, group=4)
    for move in half.moves[: len(half.moves) // 2]:
        half = committed(half, move.id)
    gone = len(half.owned_by("s3")) - len(before.owned_by("s3"))
    back = plan(with_weight(half, "s3", 1), ids)
    assert sum(len(move.partitions) for move in back.moves) == gone
    assert loads(commit_all(back)) == loads(before)


def test_cancelling_half_way_keeps_who_owns_something_and_a_plan_goes_on() -> None:
    ids = Ids()
    half = plan(with_new_shard(plan(with_leaving(cluster("s1", "s2", "s3"), "s3"), ids), member("s4")), ids, group=4)
    half = committed(half, next(move.id for move in half.moves if move.to == "s4"))
    stopped = cancelled(half)
    assert states(stopped) == {"s1": "up", "s2": "up", "s3": "up", "s4": "up"}
    assert stopped.moves == []
    assert stopped.owners == half.owners
    assert set(loads(commit_all(plan(stopped, ids))).values()) == {64}


def test_a_voided_move_has_the_same_partitions_and_another_id() -> None:
    standing = plan(with_new_shard(cluster("s1", "s2"), member("s3")), Ids())
    before = standing.moves[1]
    after = voided(standing, before.id, "fresh")
    assert after.moves[1] == msgspec.structs.replace(before, id="fresh")
    assert len(after.moves) == len(standing.moves)
    again = all_voided(standing, iter("abcdefghijklmnopqrstuvwxyz").__next__)
    assert not {move.id for move in again.moves} & {move.id for move in standing.moves}
    assert [move.partitions for move in again.moves] == [move.partitions for move in standing.moves]


def test_a_joining_shard_without_room_is_up_at_once() -> None:
    full = cluster(*(f"s{i}" for i in range(70)), partitions=64)
    after = plan(with_new_shard(full, member("a")), Ids())
    assert after.moves == []
    assert states(after)["a"] == "up"


def test_a_leaver_that_owns_nothing_is_gone_at_once() -> None:
    full = cluster(*(f"s{i:02}" for i in range(70)), partitions=64)
    (idle, *_) = [shard for shard, load in loads(full).items() if load == 0]
    after = plan(with_leaving(full, idle), Ids())
    assert after.moves == []
    assert after.shard(idle) is None
    assert owner_ids(after) == owner_ids(full)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_stand_is_refused() -> None:
    standing = plan(with_new_shard(cluster("s1", "s2"), member("s3")), Ids())
    gone = standing.moves[0].id
    done = committed(standing, gone)
    for refused in (lambda: committed(done, gone), lambda: voided(done, gone, "x")):
        with pytest.raises(KeyError):
            refused()
    for unknown in (lambda: with_leaving(done, "s9"), lambda: with_weight(done, "s9", 2)):
        with pytest.raises(KeyError):
            unknown()


def test_a_move_whose_partitions_have_another_owner_is_refused() -> None:
    before = cluster("s1", "s2")
    move = Move(id="m", source="s1", to="s2", partitions=before.owned_by("s2")[:1])
    with pytest.raises(ValueError, match="not shard s1's any more"):
        committed(msgspec.structs.replace(before, moves=[move]), "m")


def test_a_double_id_a_copied_file_a_bad_weight_and_a_last_leaver_are_refused() -> None:
    before = cluster("s1", "s2")
    copied = at_home("s3", "http://s3", "store-s1")
    for newcomer in (member("s1"), copied):
        with pytest.raises(ValueError, match="s1 is there"):
            with_new_shard(before, newcomer)
    with pytest.raises(ValueError, match="below 1"):
        with_weight(before, "s1", 0)
    with pytest.raises(ValueError, match="no shard would stay"):
        with_leaving(with_leaving(before, "s1"), "s2")


def test_a_shard_brings_its_node_and_takes_it_along_unless_a_copy_of_another_lies_there() -> None:
    ids = Ids()
    joined = plan(with_new_shard(cluster("s1", "s2"), member("s3")), ids)
    assert [node.id for node in joined.nodes] == ["s1", "s2", "s3"]
    assert joined.shards[2].term == joined.epoch - 1, "the epoch of the map that named it"
    leaving = with_leaving(commit_all(joined), "s3")
    assert [node.id for node in commit_all(plan(leaving, ids)).nodes] == ["s1", "s2"]
    replica = Replica(node="s3", copy_id="c", state="in-sync", joined=4)
    first = msgspec.structs.replace(leaving.shards[0], replicas=[replica])
    kept = commit_all(plan(msgspec.structs.replace(leaving, shards=[first, *leaving.shards[1:]]), ids))
    assert ([shard.id for shard in kept.shards], [node.id for node in kept.nodes]) == (["s1", "s2"], ["s1", "s2", "s3"])


# --- any series of changes -------------------------------------------------------------------------------------------


class Cluster(RuleBasedStateMachine):
    """Members come, go and change weight while moves are committed, voided and cancelled, in any order."""

    @initialize(
        partitions=st.sampled_from([64, 256]),
        weights=st.lists(st.integers(1, 5), min_size=1, max_size=6),
        group=st.integers(1, 40),
    )
    def begin(self, partitions: int, weights: list[int], group: int) -> None:
        self.names = (f"s{number}" for number in itertools.count(1))
        members = [member(next(self.names), weight) for weight in weights]
        self.map = first_map("c", partitions, members)
        self.ids = Ids()
        self.group = group
        self.old_ids: set[str] = set()

    def change(self, after: ClusterMap) -> None:
        assert after is self.map or after.epoch > self.map.epoch
        self.old_ids |= {move.id for move in self.map.moves} - {move.id for move in after.moves}
        self.map = after

    def plan(self, changed: ClusterMap) -> None:
        before = self.map
        after = plan(changed, self.ids, self.group)
        self.change(after)
        assert owner_ids(after) == owner_ids(before)
        self.check_minimum(after)
        done = commit_all(after)
        self.check_fair(done)
        assert {member.id for member in done.shards} == {m.id for m in changed.shards if m.state != "leaving"}
        assert set(states(done).values()) == {"up"}

    def check_minimum(self, after: ClusterMap) -> None:
        done = loads(commit_all(after))
        wanted = sum(max(0, load - len(after.owned_by(shard))) for shard, load in done.items())
        assert sum(len(move.partitions) for move in after.moves) == wanted

    def check_fair(self, done: ClusterMap) -> None:
        weights = sum(member.weight for member in done.shards)
        for shard in done.shards:
            share = Fraction(shard.weight * done.partitions, weights)
            load = len(done.owned_by(shard.id))
            assert load <= math.ceil(share)
            if weights == len(done.shards):
                assert load <= max(1.02 * share, share + 1)

    def some(self, choice: int) -> str:
        return self.map.shards[choice % len(self.map.shards)].id

    @rule(weight=st.integers(1, 5))
    @precondition(lambda self: len(self.map.shards) < 12)
    def add(self, weight: int) -> None:
        settled = not self.map.moves and set(states(self.map).values()) == {"up"} and self.is_fair()
        joined = with_new_shard(self.map, member(next(self.names), weight))
        self.plan(joined)
        if settled:
            share = Fraction(weight * self.map.partitions, sum(member.weight for member in self.map.shards))
            moves = sum(len(move.partitions) for move in self.map.moves)
            assert moves <= max(1.05 * share, share + 1)

    @rule(choice=st.integers(0, 99))
    def remove(self, choice: int) -> None:
        name = self.some(choice)
        settled = not self.map.moves and self.is_fair()
        try:
            leaving = with_leaving(self.map, name)
        except ValueError:
            assert all(member.id == name or member.state == "leaving" for member in self.map.shards)
            return
        owned = len(self.map.owned_by(name))
        self.plan(leaving)
        if settled:
            assert sum(len(move.partitions) for move in self.map.moves) == owned

    def is_fair(self) -> bool:
        return plan(self.map, Ids(), self.group) is self.map

    @rule(choice=st.integers(0, 99), weight=st.integers(1, 5))
    def weigh(self, choice: int, weight: int) -> None:
        self.plan(with_weight(self.map, self.some(choice), weight))

    @rule()
    def plan_again(self) -> None:
        standing = bool(self.map.moves)
        before = self.map
        self.plan(self.map)
        if standing:
            assert self.map is before

    @rule()
    def cancel(self) -> None:
        before = self.map
        self.change(cancelled(self.map))
        assert self.map.moves == []
        assert owner_ids(self.map) == owner_ids(before)
        assert set(states(self.map).values()) == {"up"}

    @precondition(lambda self: self.map.moves)
    @rule(choices=st.lists(st.integers(0, 999), min_size=1, max_size=30))
    def commit(self, choices: list[int]) -> None:
        for choice in choices:
            if self.map.moves:
                move = self.map.moves[choice % len(self.map.moves)]
                self.change(committed(self.map, move.id))
                assert set(move.partitions) <= set(self.map.owned_by(move.to))
        event("committed")

    @precondition(lambda self: self.map.moves)
    @rule()
    def commit_the_rest(self) -> None:
        self.change(commit_all(self.map))

    @precondition(lambda self: self.map.moves)
    @rule(choice=st.integers(0, 999))
    def void(self, choice: int) -> None:
        move = self.map.moves[choice % len(self.map.moves)]
        self.change(voided(self.map, move.id, self.ids()))

    @precondition(lambda self: self.map.moves)
    @rule()
    def restart(self) -> None:
        self.change(all_voided(self.map, self.ids))

    @invariant()
    def every_partition_has_one_owner_and_is_in_one_move_at_most(self) -> None:
        assert len(self.map.owners) == self.map.partitions
        assert all(0 <= owner < len(self.map.shards) for owner in self.map.owners)
        moving = [partition for move in self.map.moves for partition in move.partitions]
        assert len(moving) == len(set(moving))

    @invariant()
    def a_move_leads_from_the_owner_to_one_that_stays(self) -> None:
        state = states(self.map)
        for move in self.map.moves:
            assert set(move.partitions) <= set(self.map.owned_by(move.source))
            assert 1 <= len(move.partitions) <= self.group
            assert move.source != move.to
            assert state[move.to] != "leaving"

    @invariant()
    def no_id_comes_again(self) -> None:
        standing = [move.id for move in self.map.moves]
        assert len(standing) == len(set(standing))
        assert not self.old_ids & set(standing)

    @invariant()
    def who_leaves_owns_something_and_who_joins_is_to_get_something(self) -> None:
        for shard in self.map.shards:
            if shard.state == "leaving":
                assert self.map.owned_by(shard.id)
            if shard.state == "joining":
                assert any(move.to == shard.id for move in self.map.moves)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=25)


# --- a lost shard -----------------------------------------------------------------------------------------------------


def test_a_lost_shard_is_struck_with_its_moves_and_then_its_partitions_are_opened_by_the_others() -> None:
    before = cluster("s1", "s2", "s3")
    owned = before.owned_by("s3")
    standing = [
        Move(id="from", source="s3", to="s1", partitions=owned[:1]),
        Move(id="to", source="s1", to="s3", partitions=before.owned_by("s1")[:1]),
        Move(id="else", source="s1", to="s2", partitions=before.owned_by("s1")[1:2]),
    ]
    struck = with_struck(msgspec.structs.replace(before, moves=standing), "s3")
    assert (struck.epoch, struck.owners) == (before.epoch + 1, before.owners)
    assert [move.id for move in struck.moves] == ["else"]
    lost = before.shards[2].store_id
    assert struck.strikes == [Strike(shard="s3", store_id=lost, epoch=struck.epoch, partitions=owned)]
    assert struck.openings() == (dict.fromkeys(owned, struck.epoch), {}, struck.epoch)
    assert with_struck(struck, "s3") is struck

    after = opened(struck, 99)
    assert (after.epoch, [member.id for member in after.shards]) == (struck.epoch + 1, ["s1", "s2"])
    for partition, owner in enumerate(before.owners):
        assert (after.shards[after.owners[partition]].id == before.shards[owner].id) == (partition not in owned)
    assert [(each.opened, each.clock) for each in after.strikes] == [(after.epoch, 99)]
    assert after.openings() == (dict.fromkeys(owned, struck.epoch), dict.fromkeys(owned, after.epoch), struck.epoch)
    assert opened(after, 100) is after
    assert after.is_struck(lost)


def test_two_lost_shards_are_opened_at_once_and_none_gives_to_the_other() -> None:
    before = cluster("s1", "s2", "s3")
    after = opened(with_struck(with_struck(before, "s3"), "s2"), 1)
    assert [member.id for member in after.shards] == ["s1"]
    assert set(after.owners) == {0}
    with pytest.raises(ValueError, match="no shard would stay"):
        with_struck(after, "s1")


def test_what_is_asked_for_after_the_loss_moves_nothing_to_a_lost_shard() -> None:
    struck = msgspec.structs.replace(with_struck(cluster("s1", "s2", "s3"), "s3"))
    shards = [msgspec.structs.replace(shard, state="up") for shard in struck.shards]
    after = opened(msgspec.structs.replace(struck, shards=shards), 1)
    assert [member.id for member in after.shards] == ["s1", "s2"]
