"""Moves that are voided and begin again: failed, frozen for too long, of a term that is over, cut off."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from kvstore.controller.map_store.sqlite import SqliteMapStore
from tests.unit.controller.far_shards import FarShard
from tests.unit.controller.moving import Controller, controlled, form, in_new_term, loads
from tests.unit.waiting import until


async def test_a_move_that_fails_begins_again_under_another_id(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    far["s4"].fails = 3
    await controller.changes.add("s4", far["s4"].url, 1)
    done = await controller.settled()
    assert loads(done)["s4"] == 16
    assert controller.mover.record.stats.voided == 3
    failed = [move_id for move_id, step in far["s4"].seen if step == "failed"]
    finished = [move_id for move_id, step in far["s4"].seen if step == "done"]
    assert len(set(failed)) == 3
    assert not set(failed) & set(finished)


async def test_a_move_that_fails_again_and_again_is_tried_ever_more_slowly(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    far["s4"].fails = 1000
    async with controlled(store, reconnect_wait_s_max=0.4) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        loop = asyncio.get_running_loop()
        stats, began_s, is_told = controller.mover.record.stats, loop.time(), False
        while loop.time() < began_s + 1.5 or stats.voided < 3 or not is_told:
            assert loop.time() < began_s + 60
            await asyncio.sleep(0.1)
            details = [move["detail"] for move in await controller.moves() if move["step"] == "waiting"]
            is_told = is_told or any("times so far: the digests differ" in each for each in details)
        assert stats.voided <= 12 * (loop.time() - began_s)
        far["s4"].fails = 0
        assert loads(await controller.settled())["s4"] == 16


async def test_a_freeze_that_lasts_too_long_ends_and_the_move_begins_again(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    far["s4"].gates["freeze"].clear()
    async with controlled(store, move_freeze_timeout_s=0.3) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: far["s1"].freezes)
        frozen = set(far["s1"].freezes)
        await until(lambda: not frozen & far["s1"].freezes)
        await until(lambda: controller.mover.record.stats.voided > 0)
        far["s4"].gates["freeze"].set()
        assert loads(await controller.settled())["s4"] == 16


@pytest.mark.parametrize("replaced", ["s1", "s4"])
async def test_a_move_whose_source_or_destination_has_another_primary_by_then_begins_again(
    controller: Controller, far: dict[str, FarShard], replaced: str
) -> None:
    far["s4"].gates["freeze"].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: far["s1"].freezes)

    await controller.document.change(partial(in_new_term, replaced))
    far["s4"].gates["freeze"].set()
    assert loads(await controller.settled())["s4"] == 16
    assert controller.mover.record.stats.voided > 0


async def test_a_move_began_in_the_terms_of_the_map_that_its_shards_follow_and_not_of_one_that_came_meanwhile(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    """The primary of s1 that acknowledges the freeze does not know yet that there is another one."""
    links = controller.shards._links
    await until(lambda: len(links) == 3 and all(link.channel.connected for link in links.values()))
    far["s1"].gates["follow"].clear()
    await controller.changes.reweigh("s3", 2)
    await until(lambda: links["s1"].telling.locked())  # the map of the move is sent
    changed = await controller.document.change(partial(in_new_term, "s1"))
    assert changed.after.map is not None
    in_term = changed.after.map.epoch
    await until(lambda: controller.mover._map is not None and controller.mover._map.epoch >= in_term)
    far["s1"].gates["follow"].set()
    assert loads(await controller.settled())["s3"] == 32
    assert far["s1"].followed[0] < in_term, "it froze partitions by this map"
    assert controller.mover.record.stats.voided > 0


async def test_a_destination_that_says_nothing_is_taken_to_have_frozen_its_partitions(
    store: SqliteMapStore, far: dict[str, FarShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silence(request: Any) -> Any:
        await asyncio.sleep(3600)

    await form(store, far, "s1", "s2", "s3")
    monkeypatch.setattr(far["s4"], "_receive", silence)
    async with controlled(store, move_freeze_timeout_s=0.3) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        before = {move.id for move in (await controller.map()).moves}
        await until(lambda: controller.mover.record.stats.voided >= 3)
        assert len({move.id for move in (await controller.map()).moves} - before) >= 3
        monkeypatch.undo()
        assert loads(await controller.settled())["s4"] == 16


@pytest.mark.parametrize("step", ["copy", "tail", "freeze"])
async def test_a_lost_connection_voids_what_may_be_frozen(
    controller: Controller, far: dict[str, FarShard], step: str
) -> None:
    far["s4"].gates[step].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: step in far["s4"].begun.values())
    lost = {move_id for move_id, at in far["s4"].begun.items() if at == step}
    far["s4"].hang_up()
    far["s4"].gates[step].set()
    done = await controller.settled()
    assert loads(done)["s4"] == 16
    assert controller.mover.record.stats.voided > 0
    assert not any(shard.freezes for shard in far.values())
    assert lost & {move_id for move_id, _ in far["s4"].seen}


async def test_a_shard_that_has_forgotten_the_map_is_told_again_and_nothing_is_voided(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    far["s4"].forgets_maps = 2
    await controller.changes.add("s4", far["s4"].url, 1)
    assert loads(await controller.settled())["s4"] == 16
    assert controller.mover.record.stats.voided == 0
