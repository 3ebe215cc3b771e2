"""A shard that only lost disks could serve: when a person may go on with an older copy, and what is said."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.controller import copy_loss
from kvstore.controller.changes import Change
from kvstore.controller.copy_facts import described
from kvstore.controller.copy_places import Places
from kvstore.errors import ChangeRefused
from kvstore.router.advice import advice
from tests.unit.controller.copy_nodes_model import Model, replicated


def places(model: Model) -> Places:
    return Places(model.map, model.heard, model.limits, model.now)


def served_by_a_guest(replicas: int = 2) -> tuple[Model, str]:
    """The disk of s1 is dead, and a node of another home serves its shard, without a copy in sync."""
    model = replicated(3, replicas)
    for node in model.nodes.values():
        for copy in node.copies.values():
            copy.number = 10
    model.down("s1")
    model.run(5)
    return model, model.config("s1").primary.node


def both_down(model: Model, *nodes: str) -> None:
    for node in nodes:
        model.down(node)
    model.run(3)


def said_of(model: Model) -> str:
    """What `advice` says while s1 does not answer."""
    facts = described(places(model))
    shard = {"id": "s1", "state": "down", "primary": model.config("s1").primary.node, "copies": facts["copies"]["s1"]}
    nothing: dict[str, Any] = {"moves": [], "wanted": [], "in_doubt": {"count": 0, "oldest_s": None}}
    return advice(nothing | {"shards": [shard], "copies": facts})["sentence"]


def test_a_guest_that_is_damaged_without_a_copy_in_sync_is_told_and_an_older_copy_can_be_gone_on_with() -> None:
    model, guest = served_by_a_guest()
    assert model.copy_nodes("s1") == set()
    model.damage(guest, "s1")
    model.run(3)
    found = described(places(model))
    assert found["stranded"] == {"s1": {"nodes": [guest], "other": None, "is_damaged": True}}
    assert "Node s1 may have an older one to go on with: start it" in said_of(model)
    model.up("s1")
    model.run(60)
    assert model.config("s1").primary.node == guest, "nothing is lost by itself"
    assert "`kvstore shard promote s1 --to s1 --accept-loss` goes on with the older copy there" in said_of(model)
    loss = copy_loss.judged(places(model), "s1", "s1")
    assert (loss.to, loss.number, loss.is_older) == ("s1", 10, False)
    change = Change(id="c", kind="promote", shard="s1", to="s1", began_ms=0)
    model.state = copy_loss.with_loss(model.state, loss, 0, change, 10)
    model.run(10)
    assert model.config("s1").primary.node == "s1"
    assert model.copy_nodes("s1") == {guest}, "rebuilt"
    assert not model.nodes[guest].copies["s1"].damage


def test_a_damaged_primary_with_a_copy_in_sync_is_replaced_at_once_and_nothing_is_given_up() -> None:
    model = replicated(3, 2)
    (heir,) = model.copy_nodes("s1")
    model.damage("s1", "s1")
    with pytest.raises(ChangeRefused):
        copy_loss.judged(places(model), "s1", heir)
    model.run(0.5)
    assert model.config("s1").primary.node == heir
    model.run(3)
    assert model.copy_nodes("s1") == {"s1"}


def test_a_damaged_primary_whose_copy_in_sync_is_away_waits_for_it_and_says_so() -> None:
    model, guest = served_by_a_guest(3)
    (other,) = model.copy_nodes("s1")
    both_down(model, guest, other)
    model.damage(guest, "s1")
    model.up("s1")
    model.run(5)
    assert model.copy_nodes("s1") == {other}
    assert f"one in sync takes its place when node {other} is back. If that is lost, `kvstore shard prom" in said_of(
        model
    )
    model.up(other)
    model.run(5)
    assert model.config("s1").primary.node == other


def test_a_copy_in_sync_that_is_damaged_like_its_primary_does_not_stand_in_the_way_of_an_older_one() -> None:
    model, guest = served_by_a_guest(3)
    (other,) = model.copy_nodes("s1")
    both_down(model, guest, other)
    model.damage(other, "s1")
    model.up("s1")
    model.run(10)
    assert copy_loss.judged(places(model), "s1", "s1").to == "s1"
    with pytest.raises(ChangeRefused, match="or is damaged"):
        copy_loss.judged(places(model), "s1", other)


def test_a_copy_in_sync_whose_folder_is_empty_does_not_stand_in_the_way_of_an_older_one() -> None:
    model, guest = served_by_a_guest(3)
    (other,) = model.copy_nodes("s1")
    both_down(model, guest, other)
    model.wipe(other)
    model.up(other)
    model.up("s1")
    model.run(10)
    assert copy_loss.judged(places(model), "s1", "s1").to == "s1"
