"""Moves while shards are dead, or nodes silent or given up: who is waited for, and what goes on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from kvstore.controller.given_up import Retirer, retiring
from kvstore.controller.map_store.sqlite import SqliteMapStore
from kvstore.controller.membership import ClusterState
from kvstore.placement.cluster_map import Primary, at_home, first_map
from tests.unit.controller.far_shards import FarShard
from tests.unit.controller.moving import Controller, controlled, form, loads, states
from tests.unit.waiting import WAIT_S, until


async def test_while_too_many_nodes_are_silent_nothing_moves(controller: Controller, far: dict[str, FarShard]) -> None:
    held = True
    controller.mover.holds_still = lambda cluster_map: held
    await controller.changes.add("s4", far["s4"].url, 1)
    async with asyncio.timeout(WAIT_S):
        while not any("too many nodes are silent" in move["detail"] for move in await controller.moves()):
            await asyncio.sleep(0.01)
    assert loads(await controller.map())["s4"] == 0
    assert not far["s4"].received
    held = False
    assert loads(await controller.settled())["s4"] == 16


async def test_a_move_that_waits_for_its_place_when_too_many_fall_silent_does_not_begin(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    held = False
    controller.mover.holds_still = lambda cluster_map: held
    async with AsyncExitStack() as places:
        for _ in range(controller.mover._limits.moves_of_shard_max):
            await places.enter_async_context(controller.mover._places.place("s0", "s4"))
        await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: len(controller.mover._places._waiting) == 3)
        held = True
    async with asyncio.timeout(WAIT_S):
        while not any("too many nodes are silent" in move["detail"] for move in await controller.moves()):
            await asyncio.sleep(0.01)
    assert not far["s4"].received
    held = False
    assert loads(await controller.settled())["s4"] == 16


async def test_a_move_that_is_done_when_too_many_fall_silent_is_not_committed(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    held = False
    controller.mover.holds_still = lambda cluster_map: held
    far["s4"].gates["freeze"].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: far["s4"].freezes or any(shard.freezes for shard in far.values()) or far["s4"].received)
    held = True
    far["s4"].gates["freeze"].set()
    await until(lambda: controller.mover.record.stats.voided)
    assert loads(await controller.map())["s4"] == 0
    held = False
    assert loads(await controller.settled())["s4"] == 16


async def test_the_shard_of_a_node_that_was_given_up_leaves_and_its_partitions_are_the_others(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    def given_up(state: ClusterState) -> ClusterState:
        assert state.map is not None
        nodes = [msgspec.structs.replace(node, given_up=node.id == "s1") for node in state.map.nodes]
        heir = Primary(node="s2", copy_id="c")
        shards = [msgspec.structs.replace(s, primary=heir) if s.id == "s1" else s for s in state.map.shards]
        changed = msgspec.structs.replace(state.map, epoch=state.map.epoch + 1, nodes=nodes, shards=shards)
        return msgspec.structs.replace(state, map=changed)

    retirer = Retirer(controller.document, controller.changes.remove)
    controller.running.append(asyncio.create_task(retirer.run()))
    await asyncio.sleep(0.05)
    assert states(await controller.map()) == dict.fromkeys(("s1", "s2", "s3"), "up")
    await controller.document.change(given_up)
    async with asyncio.timeout(WAIT_S):
        while states(await controller.map())["s1"] != "leaving":
            await asyncio.sleep(0.01)
    asked = [change for change in (await controller.document.read()).changes if change.kind == "remove"]
    assert [change.shard for change in asked] == ["s1"]
    await controller.changes.cancel()
    await asyncio.sleep(0.05)
    assert states(await controller.map())["s1"] == "up"  # a person wants it so


@pytest.mark.parametrize(("primary", "state"), [("s1", "up"), ("s2", "leaving")])
def test_a_shard_stays_that_its_own_node_serves_and_one_that_leaves_is_not_asked_again(
    primary: str, state: Any
) -> None:
    home = at_home("s1", "http://s1", "a")
    shard = msgspec.structs.replace(home.shard, primary=Primary(node=primary, copy_id="c"), state=state)
    node = msgspec.structs.replace(home.node, given_up=True)
    assert retiring(first_map("c", 64, [home._replace(node=node, shard=shard), at_home("s2", "http://s2", "b")])) == []


async def test_a_dead_source_is_waited_for_while_others_go_on(controller: Controller, far: dict[str, FarShard]) -> None:
    await far["s2"].kill()
    await controller.changes.add("s4", far["s4"].url, 1)
    async with asyncio.timeout(WAIT_S):
        while {move["from"] for move in await controller.moves()} != {"s2"}:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    waiting, *queued = await controller.moves()
    assert (waiting["step"], waiting["detail"]) == ("waiting", "shard s2 cannot be reached.")
    assert {move["step"] for move in queued} <= {"queued"}
    await far["s2"].start()
    assert loads(await controller.settled()) == {"s1": 16, "s2": 16, "s3": 16, "s4": 16}


async def test_dead_shards_take_no_place_among_those_at_work(store: SqliteMapStore, far: dict[str, FarShard]) -> None:
    await form(store, far, "s1", "s2", "s3")
    await far["s1"].kill()
    await far["s2"].kill()
    async with controlled(store, moves_at_once_max=1) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        async with asyncio.timeout(WAIT_S):
            while {move["from"] for move in await controller.moves()} != {"s1", "s2"}:
                await asyncio.sleep(0.01)


async def test_a_destination_killed_in_each_step_does_not_stop_the_move(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    await controller.changes.add("s4", far["s4"].url, 1)
    for step in ("copy", "tail", "freeze"):
        far["s4"].gates[step].clear()
        await until(lambda step=step: step in far["s4"].begun.values())
        frozen = {name: set(shard.freezes) for name, shard in far.items()}
        await far["s4"].kill()
        await until(lambda frozen=frozen: not any(frozen[name] & shard.freezes for name, shard in far.items()))
        far["s4"].gates[step].set()
        await far["s4"].start()
    assert loads(await controller.settled())["s4"] == 16


async def test_a_destination_that_waits_for_its_source_for_long_makes_room(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    far["s4"].waits_for_source = True
    far["s4"].gates["copy"].clear()
    async with controlled(store, moves_at_once_max=1, request_timeout_s=0.3) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: controller.mover.record.stats.voided >= 2)
        async with asyncio.timeout(WAIT_S):
            while not any("waiting for the source" in move["detail"] for move in await controller.moves()):
                await asyncio.sleep(0.002)
        far["s4"].gates["copy"].set()
        await controller.settled()
