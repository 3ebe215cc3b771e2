"""A primary that is silent or lost its disk: which copy takes over, when none does, what is waited for."""

from __future__ import annotations

from kvstore.controller.copies_heard import CopiesHeard
from tests.unit.controller.copy_nodes_model import Model, replicated


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
