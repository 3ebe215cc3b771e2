"""Changes of the cluster as resources: the pure rules of what begins, goes on, ends, and is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from kvstore.controller import change_report, change_steps, changes
from kvstore.controller.change_report import Around, Doing
from kvstore.controller.changes import Change, Kind, Pauses
from kvstore.controller.membership import ClusterState, formed_map
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap, Replica, Shard, at_home, first_map
from kvstore.transport.change_documents import MoveUnderWay

FORMED = first_map("c", 64, [at_home(f"s{i}", f"http://s{i}:1", f"store-{i}") for i in (1, 2, 3)])
NEW = at_home("s4", "http://s4:1", "store-4")


def change(change_id: str, kind: Kind, shard: str | None = None, weight: int | None = None, at: int = 1) -> Change:
    return Change(id=change_id, kind=kind, shard=shard, weight=weight, began_ms=at)


@dataclass
class World:
    """A state that changes are taken into, as the controller does."""

    state: ClusterState
    ids: int = 0
    kept_max: int = 100

    def plan(self, cluster_map: ClusterMap, change_id: str) -> ClusterMap:
        def new_id() -> str:
            self.ids += 1
            return f"m{self.ids}"

        return moves.planned(cluster_map, lambda _: 8, new_id, change_id)

    def take(self, asked: Change, after: ClusterMap) -> str:
        found = changes.running_like(self.state.changes, asked) or asked
        planned = msgspec.structs.replace(self.state, map=self.plan(after, found.id))
        self.state = change_steps.taken(self.state, planned, found, lambda _, count: 10 * count, self.kept_max)
        return found.id

    def commit(self, count: int = 1, change_id: str = "") -> None:
        for _ in range(count):
            standing = [m for m in self.map.moves if not change_id or m.change == change_id]
            if not standing:
                return
            keys = 10 * len(standing[0].partitions)
            self.state = change_steps.committed(self.state, standing[0].id, keys, 1000, 5.0, self.kept_max)

    def end(self) -> None:
        pauses = {c.id: Pauses(7.0, 6.0) for c in self.state.changes if self.reached(c)}
        self.state = change_steps.ended(self.state, pauses, 9, self.kept_max)

    def reached(self, one: Change) -> bool:
        return changes.is_reached(one, self.map, self.state.wanted)

    @property
    def map(self) -> ClusterMap:
        return formed_map(self.state)

    def one(self, change_id: str) -> Change:
        found = changes.find(self.state.changes, change_id)
        assert found is not None
        return found

    def shown(self, change_id: str, **around: Any) -> dict[str, Any]:
        return msgspec.to_builtins(change_report.described(self.one(change_id), self.state, Around(**around), 1_000))


@pytest.fixture
def world() -> World:
    return World(ClusterState(map=FORMED))


def test_an_added_shard_is_a_change_that_is_done_when_its_share_has_come(world: World) -> None:
    added = world.take(change("a", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    shown = world.shown(added)
    assert (shown["state"], shown["partitions_done"], shown["partitions_total"]) == ("running", 0, 16)
    assert (shown["keys_total"], shown["progress"], shown["ended_at"]) == (160, 0.0, None)
    assert shown["detail"] == "0 of 16 partitions have moved."
    world.commit()
    assert 0 < world.shown(added)["progress"] < 1
    world.end()
    assert world.one(added).is_running, "a part of it is not all of it"
    world.commit(99)
    world.end()
    shown = world.shown(added)
    assert (shown["state"], shown["partitions_done"], shown["keys_done"], shown["progress"]) == ("done", 16, 160, 1.0)
    assert (shown["write_pause_ms_max"], shown["write_pause_ms_p99"]) == (7.0, 6.0)
    assert shown["ended_at"] == "1970-01-01T00:00:00.009Z"


def test_asking_for_the_same_again_while_it_runs_is_the_same_change(world: World) -> None:
    first = world.take(change("a", "weight", "s1", 3), moves.with_weight(FORMED, "s1", 3))
    again = world.take(change("b", "weight", "s1", 3), moves.with_weight(world.map, "s1", 3))
    assert (first, again, len(world.state.changes)) == ("a", "a", 1)


def test_another_weight_supersedes_the_first_and_takes_over_what_still_has_to_move(world: World) -> None:
    world.take(change("a", "weight", "s1", 2), moves.with_weight(FORMED, "s1", 2))
    world.commit()
    world.take(change("b", "weight", "s1", 4, at=5), moves.with_weight(world.map, "s1", 4))
    first = world.one("a")
    assert (first.state, first.ended_ms) == ("superseded", 5)
    assert first.detail.startswith("Superseded by change b (weight s1 4): ")
    assert {move.change for move in world.map.moves} == {"b"}
    world.commit(99)
    world.end()
    assert world.one("b").state == "done"


def test_taking_over_moves_makes_another_map(world: World) -> None:
    """Two maps of one epoch are equal, for all that compare them after the controller's file was lost."""
    world.take(change("a", "weight", "s1", 2), moves.with_weight(FORMED, "s1", 2))
    before = world.map
    planned = msgspec.structs.replace(world.state, map=before)
    world.state = change_steps.taken(world.state, planned, change("b", "recover"), lambda *_: None, 100)
    assert world.one("a").state == "superseded"
    assert world.map != before
    assert world.map.epoch == before.epoch + 1


@pytest.mark.parametrize("kind", ["remove", "remove-lost"])
def test_removing_a_shard_supersedes_what_runs_about_it_and_nothing_else(world: World, kind: Kind) -> None:
    world.take(change("a", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    world.take(change("b", "weight", "s1", 2), moves.with_weight(world.map, "s1", 2))
    world.take(change("c", kind, "s4"), moves.with_leaving(world.map, "s4"))
    assert [each.state for each in world.state.changes] == ["superseded", "running", "running"]


def test_partitions_that_two_changes_move_are_counted_for_the_one_that_planned_them(world: World) -> None:
    world.take(change("a", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    world.take(change("b", "remove", "s3"), moves.with_leaving(world.map, "s3"))
    totals = [world.shown(each)["partitions_total"] for each in "ab"]
    assert sum(totals) == sum(len(move.partitions) for move in world.map.moves)
    assert all(totals)
    world.commit(99, "a")
    world.end()
    states = {each.id: each.state for each in world.state.changes}
    assert states["b"] == "running"
    world.commit(99)
    world.end()
    assert [world.shown(each)["state"] for each in "ab"] == ["done", "done"]
    assert world.map.shard("s3") is None


def test_cancelling_ends_all_that_run_and_says_how_far_they_were(world: World) -> None:
    world.take(change("a", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    world.commit()
    moved = world.one("a").partitions
    after = msgspec.structs.replace(world.state, map=moves.cancelled(world.map))
    world.state = change_steps.cancelled(world.state, after, change("x", "cancel", at=7), 100)
    first, cancel = world.state.changes
    assert first.state == "cancelled"
    assert first.detail == f"Cancelled by change x: {moved} of 16 partitions had moved, and stay where they are."
    assert world.shown("a")["partitions_total"] == 16
    assert (cancel.state, cancel.detail) == ("done", "1 change cancelled.")
    world.end()
    assert world.one("a").state == "cancelled"


def test_only_the_last_that_ended_are_kept_and_all_that_run(world: World) -> None:
    world.kept_max = 2
    world.take(change("runs", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    for i in range(5):
        done = changes.done(change(f"e{i}", "accept-old", "s1"), 10 + i)
        world.state = change_steps.noted(world.state, done, world.kept_max)
    assert [each.id for each in world.state.changes] == ["runs", "e3", "e4"]


def test_a_rebalance_waits_for_the_moves_of_others_and_says_so(world: World) -> None:
    world.take(change("a", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    world.take(change("r", "rebalance"), world.map)
    shown = world.shown("r")
    assert (shown["state"], shown["waiting_for"]) == ("running", "moves of other changes")
    assert not world.reached(world.one("r"))
    world.commit(99)
    assert world.reached(world.one("r"))


def test_a_shard_that_is_to_be_started_is_waited_for_and_after_a_while_the_mend_is_named() -> None:
    world = World(ClusterState(map=FORMED, wanted={"s4": 1}, changes=[change("a", "add", "s4", 1, at=0)]))
    assert world.shown("a")["waiting_for"] == "shard s4, which `kvstore up` is starting"
    late = change_report.described(world.one("a"), world.state, Around(), 20_000)
    assert "`kvstore shard remove s4` gives it up" in (late.waiting_for or "")
    assert not world.reached(world.one("a"))


def test_what_moves_wait_for_is_said(world: World) -> None:
    world.take(change("a", "add", "s4", 1), moves.with_new_shard(FORMED, NEW))
    report = MoveUnderWay(
        source="s1",
        to="s4",
        partitions=1,
        step="waiting",
        keys_done=0,
        keys_total=0,
        bytes_done=0,
        write_pause_ms=0.0,
        detail="shard s4 is down",
    )
    doing = Doing().plus(world.map.moves[0], report)
    shown = world.shown("a", doing=doing)
    source = world.map.moves[0].source
    assert shown["waiting_for"] == f"{source} to s4: shard s4 is down"
    assert shown["detail"] == f"0 of 16 partitions have moved; it waits for this: {source} to s4: shard s4 is down."


def test_moves_of_an_earlier_program_become_those_of_a_change() -> None:
    planned = World(ClusterState(map=FORMED)).plan(moves.with_new_shard(FORMED, NEW), "")
    state = change_steps.adopted(ClusterState(map=planned), change("r", "rebalance"))
    assert [each.id for each in state.changes] == ["r"]
    assert {move.change for move in formed_map(state).moves} == {"r"}
    assert change_steps.adopted(state, change("q", "rebalance")) is state


def test_the_kinds_that_are_not_about_moves_need_none() -> None:
    world = World(ClusterState(map=FORMED, changes=[change("a", "remove", "s9")]))
    world.end()
    assert world.one("a").state == "done"
    assert world.shown("a")["detail"] == "It is done; no partition had to move."


@pytest.mark.parametrize(("kind", "shard"), [("replicas", None), ("promote", "s1")])
def test_what_is_asked_of_copies_goes_on_when_moves_are_cancelled(kind: Kind, shard: str | None) -> None:
    asked = msgspec.structs.replace(change("a", kind, shard), replicas=2, to="s2")
    world = World(ClusterState(map=msgspec.structs.replace(FORMED, replicas=2), changes=[asked]))
    world.state = change_steps.cancelled(world.state, world.state, change("x", "cancel", at=7), 100)
    assert world.one("a").state == "running"
    assert world.one("x").detail == "There was nothing to cancel."


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        (1, "Every key has 1 copy."),
        (3, "Every key has 3 copies."),
        (5, "Every key has 3 copies, not 5: there are only 3 nodes for them. `kvstore shard add` adds one, which gets"),
    ],
)
def test_how_many_copies_there_are_is_said_when_there_are_as_many_as_there_can_be(asked: int, detail: str) -> None:
    def copied(shard: Shard) -> Shard:
        others = [node for node in ("s1", "s2", "s3") if node != shard.id][: asked - 1]
        copies = [Replica(node=node, copy_id=f"{shard.id}-{node}", state="in-sync", joined=1) for node in others]
        return msgspec.structs.replace(shard, replicas=copies)

    cluster_map = msgspec.structs.replace(FORMED, replicas=asked, shards=[copied(shard) for shard in FORMED.shards])
    goal = msgspec.structs.replace(change("a", "replicas"), replicas=asked)
    world = World(ClusterState(map=cluster_map, changes=[goal]))
    world.end()
    assert world.shown("a")["state"] == "done"
    assert world.shown("a")["detail"].startswith(detail)


def test_of_many_copies_that_are_waited_for_some_are_named_and_the_others_counted() -> None:
    def joining(shard: Shard) -> Shard:
        others = [node for node in ("s1", "s2", "s3") if node != shard.id]
        copies = [Replica(node=node, copy_id=f"{shard.id}-{node}", state="joining", joined=1) for node in others]
        return msgspec.structs.replace(shard, replicas=copies)

    cluster_map = msgspec.structs.replace(FORMED, replicas=3, shards=[joining(shard) for shard in FORMED.shards])
    goal = msgspec.structs.replace(change("a", "replicas"), replicas=3)
    waiting = World(ClusterState(map=cluster_map, changes=[goal])).shown("a")["waiting_for"]
    assert waiting == "copies to be in sync: s1 on s2, s1 on s3, s2 on s1, and 3 more"
