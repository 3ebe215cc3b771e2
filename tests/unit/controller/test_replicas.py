"""What the controller decides of copies: placing them, failing over, taking out, going home, by a model of nodes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.controller.changes import Change, is_reached
from kvstore.controller.copies_heard import CopiesHeard
from kvstore.controller.copy_places import Places
from kvstore.controller.replicas import too_many_silent
from kvstore.placement.cluster_map import at_home
from kvstore.placement.moves import with_leaving
from tests.unit.controller.copy_nodes_model import LIMITS, Model, ModelCopy, ModelNode


def replicated(nodes: int = 3, replicas: int = 2) -> Model:
    model = Model(nodes, replicas)
    model.run(5)
    model.steps.clear()
    return model


@pytest.mark.parametrize(("nodes", "replicas"), [(2, 2), (3, 2), (4, 3), (3, 5)])
def test_every_shard_gets_its_copies_in_sync(nodes: int, replicas: int) -> None:
    model = replicated(nodes, replicas)
    for shard in model.map.shards:
        assert len(model.copy_nodes(shard.id)) == min(nodes, replicas) - 1
        assert shard.primary.node == shard.id


def test_with_one_copy_of_everything_nothing_is_ever_decided() -> None:
    model = Model(3, 1)
    model.run(10)
    model.down("s1")
    model.run(10)
    assert model.map.epoch == 1


def test_a_node_that_stops_is_given_no_copy() -> None:
    model = Model(3, 2)
    model.nodes["s2"].stops = True
    model.run(5)
    assert set(model.nodes["s2"].copies) == {"s2"}
    there = [shard.id for shard in model.map.shards if shard.id != "s2" and "s2" in shard.nodes]
    model.nodes["s2"].stops = False
    model.run(10)
    assert there == []
    assert all(len(model.copy_nodes(shard.id)) == 1 for shard in model.map.shards)


def test_of_each_shard_one_copy_joins_at_a_time() -> None:
    model = Model(4, 4)
    for _ in range(20):
        model.turn()
        assert all(len(model.copy_nodes(shard.id, "joining")) <= 1 for shard in model.map.shards)
    assert all(len(model.copy_nodes(shard.id)) == 3 for shard in model.map.shards)


def test_a_node_that_cannot_make_its_copies_keeps_no_other_node_from_making_them() -> None:
    model = Model(3, 3)
    model.nodes["s2"].may_make = False
    model.run(10)
    assert [model.copy_nodes(shard) for shard in ("s1", "s2", "s3")] == [{"s3"}, {"s1", "s3"}, {"s1"}]


def test_a_silent_primary_is_replaced_by_its_copy_in_a_new_term_and_taken_out() -> None:
    model = replicated()
    before = model.config("s1")
    (heir,) = model.copy_nodes("s1")
    model.down("s1")
    model.run(1.5)
    assert model.config("s1") == before._replace(epoch=model.map.epoch)
    model.run(1.5)
    after = model.config("s1")
    assert after.primary.node == heir
    assert after.term > before.term
    assert [step.why for step in model.steps if step.after.shard == "s1"][:2] == ["silent", "out"]
    assert model.copy_nodes("s1", "joining") == {"s1"}


def test_a_controller_that_hears_nobody_promotes_nobody() -> None:
    """Its own deafness says nothing about the copies, whenever it begins between their beats."""
    for turns in range(3):
        model = replicated(4)
        for _ in range(turns):
            model.turn()
        model.hears_nobody = True
        model.run(5)
        assert model.steps == []
        model.hears_nobody = False
        model.run(5)
        assert model.steps == []


def test_what_was_not_heard_while_all_machines_stood_still_is_no_silence() -> None:
    """The first node that wakes has not heard its primary either."""
    model = replicated()
    (heir,) = model.copy_nodes("s1")
    model.now += 3600
    model.wakes(heir)
    model.decide()
    model.run(5)
    assert model.steps == []
    assert not any(node.given_up for node in model.map.nodes)


def test_a_node_that_tells_and_does_not_hear_is_silent() -> None:
    model = replicated()
    model.nodes["s1"].hears_controller = False
    model.run(4)
    silent = [name for name in model.nodes if model.heard.detector.is_silent(name, model.now)]
    assert silent == ["s1"]
    model.nodes["s1"].hears_controller = True
    model.run(1)
    assert not model.heard.detector.is_silent("s1", model.now)


def test_a_copy_on_a_node_that_does_not_hear_does_not_take_over() -> None:
    """It would win by its name, and never follow the map that promotes it."""
    model = replicated(3, 3)
    model.nodes["s3"].hears_controller = False
    model.run(8)
    model.down("s1")
    model.run(5)
    assert [step.after.primary.node for step in model.steps if step.why == "silent"] == ["s2"]
    assert model.config("s1").primary.node == "s2"


def test_what_a_primary_asks_for_that_does_not_hear_is_not_granted() -> None:
    model = replicated()
    (copy,) = model.copy_nodes("s1")
    model.nodes["s1"].hears_controller = False
    model.run(4)
    model.down(copy)
    model.run(4)
    assert model.copy_nodes("s1") == {copy}


def test_what_a_primary_asked_for_before_it_fell_silent_is_not_granted_any_more() -> None:
    """The controller could not decide in time; by then the copy may be there and the primary dead."""
    model = replicated()
    (copy,) = model.copy_nodes("s1")
    model.down(copy)
    model.beats()
    asked = model.heard.beat_of("s1")
    assert asked is not None
    assert [(each.kind, each.shard) for each in asked.requests] == [("out", "s1")]
    model.down("s1")
    for _ in range(9):
        model.beats()
    model.decide()
    assert model.copy_nodes("s1") == {copy}


def test_a_dead_copy_in_sync_stays_until_the_file_of_the_one_that_opens_is_found_to_be_whole() -> None:
    model = replicated()
    (heir,) = model.copy_nodes("s1")
    model.nodes[heir].copies["s1"].is_examined = False
    model.down("s1")
    model.run(5)
    assert model.config("s1").primary.node == heir
    assert model.copy_nodes("s1") == {"s1"}, "the old primary is still one of those in sync"
    model.nodes[heir].copies["s1"].is_examined = True
    model.run(1)
    assert model.copy_nodes("s1") == set()


def with_old_folder(model: Model, node: str, others: int = 10) -> None:
    """All copies of s1 have records up to `others`, which is committed, and that node's old folder is put back."""
    for each in model.nodes.values():
        if "s1" in each.copies:
            each.copies["s1"].number = others if each.name != node else 5
    model.told[model.config("s1").store_id] = 10


def test_an_old_folder_is_not_promoted_and_the_shard_is_served_when_the_newer_one_is_back() -> None:
    model = replicated()
    (copy,) = model.copy_nodes("s1")
    with_old_folder(model, copy)
    before = model.config("s1")
    model.down("s1")
    model.run(20)
    assert model.config("s1") == before._replace(epoch=model.map.epoch)
    older = CopiesHeard(model.heard, model.now).older(before)
    assert older is not None
    assert older.number == 5
    model.up("s1")
    model.run(5)
    assert model.config("s1").primary.node == "s1"
    assert model.copy_nodes("s1") == {copy}


def test_of_two_copies_the_old_folder_is_passed_over() -> None:
    model = replicated(3, 3)
    with_old_folder(model, "s2")
    model.down("s1")
    model.run(5)
    assert model.config("s1").primary.node == "s3"


def test_an_old_folder_is_not_opened_without_the_copy_that_has_what_it_lacks() -> None:
    model = replicated()
    (copy,) = model.copy_nodes("s1")
    model.down("s1")
    model.down(copy)
    with_old_folder(model, "s1")
    model.up("s1")
    model.run(20)
    assert model.copy_nodes("s1") == {copy}, "it may not be out"
    assert CopiesHeard(model.heard, model.now).older(model.config("s1")) is not None
    model.up(copy)
    model.run(5)
    assert CopiesHeard(model.heard, model.now).serves(model.config("s1"))


def test_no_copy_is_promoted_while_the_copies_still_hear_the_primary() -> None:
    model = replicated()
    model.nodes["s1"].hears_controller = False
    model.run(10)
    assert model.config("s1").primary.node == "s1"


def test_a_controller_that_stood_still_promotes_no_copy() -> None:
    model = replicated()
    before = model.map.epoch
    model.now += 3600
    for node in model.nodes.values():
        for copy in node.copies.values():
            copy.heard_primary_at = model.now
    model.run(3)
    assert model.map.epoch == before


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


def test_a_primary_whose_disk_is_lost_is_replaced_though_its_node_is_back_at_once() -> None:
    model = replicated()
    (heir,) = model.copy_nodes("s1")
    model.down("s1")
    model.wipe("s1")
    model.up("s1")
    model.run(6)
    assert model.config("s1").primary.node == heir
    model.run(2)
    assert model.copy_nodes("s1") == {"s1"}


def test_a_copy_whose_disk_is_lost_is_made_again() -> None:
    model = replicated()
    (keeper,) = model.copy_nodes("s1")
    old = model.config("s1").in_sync[0].copy_id
    model.down(keeper)
    model.wipe(keeper)
    model.up(keeper)
    model.run(8)
    assert model.copy_nodes("s1") == {keeper}
    assert model.config("s1").in_sync[0].copy_id != old


def test_a_copy_of_an_earlier_shard_of_that_name_is_dropped_and_one_of_this_is_made() -> None:
    """Its node was away when the shard was given up, and added again."""
    model = replicated()
    (node,) = model.copy_nodes("s1")
    model.down(node)
    model.nodes[node].copies["s1"] = ModelCopy("an-earlier-store", "an-earlier-copy", promised=1, number=5)
    model.up(node)
    model.run(10)
    assert model.copy_nodes("s1") == {node}
    assert model.nodes[node].copies["s1"].store_id == model.config("s1").store_id


def test_without_a_copy_in_sync_a_dead_primary_is_waited_for() -> None:
    model = replicated(2)
    model.down("s2")
    model.run(5)
    model.down("s1")
    model.run(5)
    model.up("s2")
    model.run(5)
    assert model.config("s1").primary.node == "s1"
    assert model.copy_nodes("s1") == set()
    model.up("s1")
    model.run(5)
    assert model.copy_nodes("s1") == {"s2"}


def test_a_node_dead_for_long_is_given_up_and_its_copies_are_elsewhere_in_sync() -> None:
    model = replicated(4)
    model.down("s1")
    model.run(LIMITS.down_out_s + 10)
    assert [node.id for node in model.map.nodes if node.given_up] == ["s1"]
    for shard in model.map.shards:
        assert "s1" not in shard.nodes
        assert len(model.copy_nodes(shard.id)) == 1


def test_a_node_that_was_given_up_and_is_heard_again_keeps_copies_again() -> None:
    model = replicated(3)
    model.down("s1")
    model.run(LIMITS.down_out_s + 10)
    model.up("s1")
    model.run(30)
    assert not any(node.given_up for node in model.map.nodes)
    assert all(shard.primary.node == shard.id for shard in model.map.shards)
    assert all(len(model.copy_nodes(shard.id)) == 1 for shard in model.map.shards)


def test_while_too_many_nodes_are_silent_none_is_given_up() -> None:
    model = replicated(4)
    model.down("s1")
    model.down("s2")
    model.run(LIMITS.down_out_s + 10)
    assert too_many_silent(model.map, model.heard, model.now)
    assert not any(node.given_up for node in model.map.nodes)


def test_while_too_many_nodes_are_silent_missing_copies_are_still_made_one_shard_at_a_time() -> None:
    model = replicated(8)
    silent = ["s1", "s2", "s3", "s4"]
    for name in silent:
        model.down(name)
    model.run(LIMITS.down_out_s - 1)
    model.steps.clear()
    model.run(60)
    assert too_many_silent(model.map, model.heard, model.now)
    made = [step.after.epoch for step in model.steps if len(step.after.replicas) > len(step.before.replicas)]
    assert len(made) >= 2
    assert len(set(made)) == len(made)
    for config in map(model.config, ("s5", "s6", "s7", "s8")):
        assert config.in_sync, "it is served, and there are nodes for its copy"


def test_takings_out_of_one_moment_are_one_map() -> None:
    """One stall of a shared disk, or one dead host, costs one map, not one for each copy of each shard."""
    model = replicated(5, 3)
    before = model.map.epoch
    model.down("s4")
    model.down("s5")
    model.turn()
    out = [step for step in model.steps if step.why == "out"]
    assert len(out) >= 2
    assert any(len(step.before.in_sync) - len(step.after.in_sync) == 2 for step in out), "two copies of one shard"
    assert {step.after.epoch for step in out} == {before + 1} == {model.map.epoch}


def test_never_is_a_node_given_up_with_down_out_s_0() -> None:
    model = Model(3, 2, msgspec.structs.replace(LIMITS, down_out_s=0))
    model.run(5)
    model.down("s1")
    model.run(200)
    assert not any(node.given_up for node in model.map.nodes)


def test_raising_the_number_of_copies_makes_them_and_lowering_it_drops_them_and_their_files() -> None:
    model = replicated(3, 2)
    for replicas in (3, 1):
        asked = msgspec.structs.replace(model.map, epoch=model.map.epoch + 1, replicas=replicas)
        change = Change(id="x", kind="replicas", replicas=replicas, began_ms=0)
        model.state = msgspec.structs.replace(model.state, map=asked)
        assert not is_reached(change, model.map, ())
        model.run(5)
        assert is_reached(change, model.map, ())
        assert all(len(model.copy_nodes(shard.id)) == replicas - 1 for shard in model.map.shards)
    assert all(list(node.copies) == [name] for name, node in model.nodes.items())


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


def test_a_node_whose_shard_leaves_goes_when_its_copies_are_in_sync_elsewhere() -> None:
    model = replicated(4)
    leaving = with_leaving(model.map, "s2")
    model.state = msgspec.structs.replace(model.state, map=leaving)
    model.run(5)
    assert all("s2" not in shard.nodes for shard in model.map.shards if shard.id != "s2")
    shards = [shard for shard in model.map.shards if shard.id != "s2"]
    owners = [0 for _ in model.map.owners]
    left = msgspec.structs.replace(model.map, epoch=model.map.epoch + 1, shards=shards, owners=owners)
    model.state = msgspec.structs.replace(model.state, map=left)
    model.run(2)
    assert model.map.node("s2") is None


def test_the_copies_that_a_new_node_is_to_have_are_awaited_before_the_map_names_them_until_they_are_in_sync() -> None:
    model = replicated(3, 2)
    home = at_home("s4", "http://s4", "store-4", copy_id="c4")
    nodes, shards = [*model.map.nodes, home.node], [*model.map.shards, home.shard]
    joined = msgspec.structs.replace(model.map, epoch=model.map.epoch + 1, nodes=nodes, shards=shards)
    model.state = msgspec.structs.replace(model.state, map=joined)
    model.nodes["s4"] = ModelNode("s4", {"s4": ModelCopy("store-4", "c4", opened=1, promised=1)})
    awaited = Places(model.map, model.heard, model.limits, model.now).awaited_on("s4")
    assert awaited
    assert not any(model.config(shard).copy_on("s4") for shard in awaited)
    model.run(10)
    assert all("s4" in model.copy_nodes(shard) for shard in awaited)
    assert Places(model.map, model.heard, model.limits, model.now).awaited_on("s4") == []


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["down", "up", "wipe", "damage", "deaf", "cut", "run", "long"]),
        st.sampled_from(["s1", "s2", "s3", "s4"]),
    ),
    max_size=25,
)


def _happens(model: Model, event: str, name: str) -> None:
    node = model.nodes[name]
    if event == "down" and node.is_up:
        model.down(name)
    elif event == "up" and not node.is_up:
        model.up(name)
    elif event == "wipe" and all(each.is_up for each in model.nodes.values()) and _may_lose_a_disk(model):
        model.down(name)
        model.wipe(name)
    elif event == "damage" and all(each.is_up for each in model.nodes.values()) and _may_lose_a_disk(model):
        model.damage(name, next(iter(node.copies)))
    elif event == "deaf":
        node.hears_controller = not node.hears_controller
    elif event == "cut":
        model.hears_nobody = not model.hears_nobody
    model.run({"run": 1.0, "long": 4.0}.get(event, 0.5))


def _may_lose_a_disk(model: Model) -> bool:
    """All is copied again since the last one was lost: each copy that the map names is really there."""
    named = [(shard.primary.node, shard.id, shard.primary.copy_id) for shard in model.map.shards]
    named += [(copy.node, shard.id, copy.copy_id) for shard in model.map.shards for copy in shard.replicas]
    lies = {
        (node.name, shard, copy.copy_id)
        for node in model.nodes.values()
        for shard, copy in node.copies.items()
        if not copy.damage
    }
    return _all_synced(model) and lies.issuperset(named)


def _all_synced(model: Model) -> bool:
    wanted = min(model.map.replicas, len(model.nodes)) - 1
    return all(len(model.copy_nodes(shard.id)) == wanted for shard in model.map.shards)


def _check_steps(model: Model) -> None:
    """Only copies in sync are promoted, terms and epochs rise, and no shard loses its last copy in sync."""
    for step in model.steps:
        before, after = step.before, step.after
        assert after.epoch > before.epoch
        if after.primary != before.primary:
            assert after.term == after.epoch > before.term
            assert any((copy.node, copy.copy_id) == after.primary for copy in before.in_sync)
            assert any((copy.node, copy.copy_id) == before.primary for copy in after.in_sync)
        else:
            assert after.term in (before.term, after.epoch)


@settings(max_examples=60, deadline=None)
@given(replicas=st.sampled_from([2, 3]), events=EVENTS)
def test_whatever_nodes_die_and_return_all_is_served_and_copied_in_the_end(
    replicas: int, events: list[tuple[str, str]]
) -> None:
    model = replicated(4, replicas)
    for event, name in events:
        _happens(model, event, name)
    _check_steps(model)
    model.hears_nobody = False
    for name, node in model.nodes.items():
        node.hears_controller = True
        if not node.is_up:
            model.up(name)
    for _ in range(30):
        model.run(10)
        if _is_as_it_should_be(model):
            break
    _check_steps(model)
    assert _is_as_it_should_be(model)


def _is_as_it_should_be(model: Model) -> bool:
    at_home = all(shard.primary.node == shard.id for shard in model.map.shards)
    return at_home and _all_synced(model) and not any(node.given_up for node in model.map.nodes)
