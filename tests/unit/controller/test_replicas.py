"""Which nodes have copies of a shard, by a model of nodes: placed, made again, given up, more and fewer."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.controller.changes import Change, is_reached
from kvstore.controller.copy_places import Places
from kvstore.controller.replicas import too_many_silent
from kvstore.placement.cluster_map import at_home
from kvstore.placement.moves import with_leaving
from tests.unit.controller.copy_nodes_model import LIMITS, Model, ModelCopy, ModelNode, replicated


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


def test_a_copy_with_the_id_of_the_primarys_is_dropped_and_another_one_is_made() -> None:
    """As in files that a person copied from node to node: two copies that grant under one id would count as one."""
    model = replicated()
    (node,) = model.copy_nodes("s1")
    config = model.config("s1")
    model.down(node)
    model.nodes[node].copies["s1"] = ModelCopy(config.store_id, config.primary.copy_id, promised=1, number=5)
    model.up(node)
    for _ in range(10):
        model.turn()
        now = model.config("s1")
        assert now.primary.copy_id not in [copy.copy_id for copy in now.replicas]
    assert model.copy_nodes("s1") == {node}


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
