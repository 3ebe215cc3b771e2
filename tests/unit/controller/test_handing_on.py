"""Shards that are handed on: by nodes that stop, home to nodes that return, and as a person wants it."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.controller.changes import Change, is_reached
from kvstore.controller.copy_places import Places
from tests.unit.controller.copy_nodes_model import LIMITS, replicated


def test_a_node_that_returns_joins_again_and_its_shard_goes_home_when_it_has_settled() -> None:
    model = replicated()
    model.down("s1")
    model.run(5)
    model.up("s1")
    model.run(5)
    assert "s1" in model.copy_nodes("s1")
    assert model.config("s1").primary.node != "s1"
    model.run(10)
    assert model.config("s1").primary.node == "s1"
    assert [change.kind for change in model.state.changes] == ["promote"]
    assert is_reached(model.state.changes[0], model.map, ())


def test_a_restart_gives_the_primary_a_new_term_and_changes_nothing_else() -> None:
    model = replicated()
    before = model.config("s1")
    model.down("s1")
    model.run(0.5)
    model.up("s1")
    model.run(1)
    after = model.config("s1")
    assert (after.primary, after.in_sync) == (before.primary, before.in_sync)
    assert after.term > before.term


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_node_that_stops_hands_on_what_it_serves_and_its_copies_are_out_before_it_may_end(replicas: int) -> None:
    model = replicated(4, replicas)
    model.nodes["s2"].stops = True
    model.turn()
    assert not model.may_stop("s2")
    model.run(5)
    assert model.may_stop("s2")
    assert all(shard.primary.node != "s2" for shard in model.map.shards)
    assert all("s2" not in model.copy_nodes(shard.id) for shard in model.map.shards), "no primary waits for it"
    assert {step.why for step in model.steps} <= {"planned", "out", "in-sync"}
    model.run(30)
    assert all(shard.primary.node != "s2" for shard in model.map.shards), "nothing is given to it"
    model.state = msgspec.structs.replace(model.state, changes=[])  # they are done
    model.down("s2")
    model.up("s2")
    model.run(30)
    assert model.config("s2").primary.node == "s2"
    assert all(len(model.copy_nodes(shard.id)) == replicas - 1 for shard in model.map.shards)


def test_when_all_nodes_stop_at_once_nothing_changes_and_all_may_end() -> None:
    model = replicated()
    before = model.map.epoch
    for node in model.nodes.values():
        node.stops = True
    model.run(5)
    assert model.map.epoch == before
    assert all(model.may_stop(node) for node in model.nodes)


def test_a_node_that_stops_keeps_the_last_copy_of_a_primary_that_has_just_died_and_lost_its_disk() -> None:
    model = replicated()
    (last,) = model.copy_nodes("s1")
    model.down("s1")
    model.wipe("s1")
    model.nodes[last].stops = True
    model.turn()
    assert model.copy_nodes("s1") == {last}
    model.down(last)
    model.run(1)
    model.up("s1")
    model.up(last)
    model.run(6)
    assert model.config("s1").primary.node == last


def test_a_planned_change_to_a_node_that_stops_is_over() -> None:
    model = replicated(3, 3)
    first, second = sorted(model.copy_nodes("s1"))
    model.state = msgspec.structs.replace(
        model.state, changes=[Change(id="x", kind="promote", shard="s1", to=first, began_ms=0)]
    )
    model.nodes["s1"].stops = model.nodes[first].stops = True
    model.run(5)
    assert model.config("s1").primary.node == second
    assert (model.state.changes[0].to, model.state.changes[0].state) == (first, "cancelled")


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_home_whose_copy_was_dropped_while_it_was_down_gets_its_shard_back(is_empty: bool) -> None:
    """After a failover one copy is asked for, and the home stays away for long."""
    model = replicated()
    model.down("s1")
    model.run(5)
    heir = model.config("s1").primary.node
    asked = msgspec.structs.replace(model.map, epoch=model.map.epoch + 1, replicas=1)
    model.state = msgspec.structs.replace(model.state, map=asked)
    model.run(LIMITS.down_out_s + 5)
    assert model.config("s1").primary.node == heir
    assert model.config("s1").replicas == ()
    if is_empty:
        model.wipe("s1")
    model.up("s1")
    model.run(30)
    assert model.config("s1").primary.node == "s1"
    assert model.config("s1").replicas == ()


def test_a_primary_moves_where_a_person_wants_it_and_stays_there() -> None:
    model = replicated()
    (to,) = model.copy_nodes("s1")
    before = model.config("s1")
    change = Change(id="x", kind="promote", shard="s1", to=to, began_ms=0)
    model.state = msgspec.structs.replace(model.state, changes=[change], preferred={"s1": to})
    model.run(20)
    after = model.config("s1")
    assert after.primary.node == to
    assert after.term > before.term
    assert model.copy_nodes("s1") == {"s1"}
    assert [step.why for step in model.steps if step.after.shard == "s1"] == ["planned"]


def test_a_primary_that_a_person_keeps_where_no_copy_would_lie_has_no_copy_more_than_others() -> None:
    model = replicated(4, 3)
    to = Places(model.map, model.heard, LIMITS, model.now).walk("s1")[2]
    change = Change(id="x", kind="promote", shard="s1", to=to, began_ms=0)
    model.state = msgspec.structs.replace(model.state, changes=[change], preferred={"s1": to})
    model.run(20)
    model.state = msgspec.structs.replace(
        model.state, map=msgspec.structs.replace(model.map, replicas=2, epoch=model.map.epoch + 1)
    )
    model.run(30)
    assert to not in Places(model.map, model.heard, LIMITS, model.now).walk("s1")
    assert model.config("s1").primary.node == to
    assert model.copy_nodes("s1") == {"s1"}
    assert model.copy_nodes("s1", "joining") == set()


def test_a_planned_change_to_a_copy_that_falls_out_is_over_and_its_primary_opens_again() -> None:
    model = replicated()
    (to,) = model.copy_nodes("s1")
    change = Change(id="x", kind="promote", shard="s1", to=to, began_ms=0)
    model.state = msgspec.structs.replace(model.state, changes=[change])
    model.down(to)
    model.nodes["s1"].copies["s1"].given_back = model.config("s1").term
    model.nodes["s1"].hears_controller = False  # so that the change is not made before the copy falls out
    model.run(1)
    model.nodes["s1"].hears_controller = True
    model.run(5)
    assert model.state.changes[0].state in ("cancelled", "running")
    assert model.nodes[model.config("s1").primary.node].is_up
    assert model.config("s1").term == model.nodes[model.config("s1").primary.node].copies["s1"].opened
