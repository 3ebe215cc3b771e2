"""Whatever nodes do, all is served and copied in the end: random events on the model of nodes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.controller.copy_nodes_model import Model, replicated

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
