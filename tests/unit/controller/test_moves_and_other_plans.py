"""Moves under way when something else is planned: cancelled, removed, planned again, moved to another address."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from kvstore.controller.membership import Announcement
from kvstore.controller.mover import new_move_id
from kvstore.placement import moves
from tests.unit.controller.far_shards import FarShard
from tests.unit.controller.moving import Controller, loads, states
from tests.unit.waiting import WAIT_S, until


async def test_cancelling_ends_the_moves_under_way_and_their_freezes(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    before = await controller.map()
    far["s4"].gates["freeze"].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: far["s1"].freezes)
    after = (await controller.changes.cancel()).map
    assert (after.shards, after.owners, after.moves) == (before.shards, before.owners, [])
    await until(lambda: not any(shard.freezes for shard in far.values()))
    assert await controller.settled() == after


async def test_a_try_that_is_cancelled_before_it_has_begun_makes_room_for_the_next(controller: Controller) -> None:
    """As when two maps come within one turn of the loop."""
    first = moves.planned(moves.with_weight(await controller.map(), "s1", 3), lambda _: 4, new_move_id)
    second = moves.all_voided(first, new_move_id)
    controller.mover._take(first)
    controller.mover._take(second)
    await controller.document.change(lambda state: msgspec.structs.replace(state, map=second))
    after = await controller.settled()
    assert loads(after)["s1"] == max(loads(after).values()) > loads(first)["s1"]


async def test_what_was_done_but_cancelled_before_its_commit_is_not_committed(
    controller: Controller, far: dict[str, FarShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await controller.map()
    change, asked = controller.document.change, asyncio.Event()
    go_on = asyncio.Event()

    async def slow_change(decide: Any) -> Any:
        if not asked.is_set() and await _is_commit(controller, decide):
            asked.set()
            await go_on.wait()
        return await change(decide)

    await controller.changes.add("s4", far["s4"].url, 1)
    monkeypatch.setattr(controller.document, "change", slow_change)
    await asyncio.wait_for(asked.wait(), WAIT_S)
    monkeypatch.undo()
    stopped = (await controller.changes.cancel()).map
    assert stopped.moves == []
    go_on.set()
    done = await controller.settled()
    assert done == stopped
    if stopped.shard("s4") is None:
        assert done.owners == before.owners


async def _is_commit(controller: Controller, decide: Any) -> bool:
    state = await controller.document.read()
    assert state.map is not None
    try:
        after = decide(state)
    except KeyError:
        return False
    return bool(after.map.owners != state.map.owners)


async def test_after_a_cancel_the_rest_is_planned_again_when_asked_for(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    far["s4"].gates["copy"].clear()
    far["s4"].keys = 0
    await controller.changes.reweigh("s1", 2)
    stopped = (await controller.changes.cancel()).map
    assert stopped.moves == []
    planned = (await controller.changes.replan()).map
    assert planned.moves or loads(planned)["s1"] == 32
    assert loads(await controller.settled())["s1"] == 32


async def test_removing_a_shard_that_is_still_joining_brings_everything_back(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    before = await controller.map()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: controller.mover.record.stats.groups >= 2)
    await controller.changes.remove("s4")
    done = await controller.settled()
    assert loads(done) == loads(before)
    assert "s4" not in states(done)


async def test_a_member_that_moves_to_another_address_is_found_there(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    far["s4"].gates["tail"].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: "tail" in far["s4"].begun.values())
    await far["s4"].kill()
    far["s4"]._port = 0
    far["s4"].gates["tail"].set()
    await far["s4"].start()
    said = Announcement(id="s4", url=far["s4"].url, store_id="store-s4", cluster_id="c")
    await controller.service.announce(said)
    assert loads(await controller.settled())["s4"] == 16
