"""The mover on a real store and real channels: what stands in the map is done, and shown."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import msgspec

from kvstore.controller.map_store.sqlite import SqliteMapStore
from kvstore.controller.membership import ClusterState
from kvstore.controller.mover import Try
from kvstore.placement.cluster_map import Move, Replica
from kvstore.protocol import Progress
from tests.unit.controller.far_shards import FarShard
from tests.unit.controller.moving import Controller, controlled, form, loads, states
from tests.unit.waiting import WAIT_S, until


async def test_a_shard_that_is_added_gets_its_share_and_is_up(controller: Controller, far: dict[str, FarShard]) -> None:
    asked = await controller.changes.add("s4", far["s4"].url, 1)
    assert (asked.id, asked.state) == ("s4", "joining")
    done = await controller.settled()
    assert loads(done) == {"s1": 16, "s2": 16, "s3": 16, "s4": 16}
    assert states(done)["s4"] == "up"
    assert far["s4"].map == done
    assert not any(shard.freezes for shard in far.values())


async def test_a_shard_that_is_removed_gives_all_away_and_is_no_member(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    assert (await controller.changes.remove("s2")).state == "leaving"
    done = await controller.settled()
    assert loads(done) == {"s1": 32, "s3": 32}


async def test_source_and_destination_follow_the_map_of_the_move_before_it_begins(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    far["s2"].gates["follow"].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    async with asyncio.timeout(WAIT_S):
        while {move.source for move in (await controller.map()).moves} != {"s2"}:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    assert not {move.id for move in (await controller.map()).moves} & set(far["s4"].received)
    far["s2"].gates["follow"].set()
    assert loads(await controller.settled())["s2"] == 16


async def test_no_more_moves_are_at_work_than_allowed_and_one_of_each_pair(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    for name in ("s4", "s5"):
        far[name].gates["copy"].clear()
    async with controlled(store, moves_at_once_max=3, move_group_keys_max=60) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        await controller.changes.add("s5", far["s5"].url, 1)
        await until(lambda: len(far["s4"].begun) + len(far["s5"].begun) >= 3)
        at_work: list[tuple[str, str]] = []
        async with asyncio.timeout(60):
            while len(at_work) < 3:
                await asyncio.sleep(0.1)
                moves = await controller.moves()
                at_work = [(move["from"], move["to"]) for move in moves if move["step"] == "copy"]
                assert len(at_work) == len(set(at_work)) <= 3
        steps = {move["step"] for move in moves} - {"waiting"}  # on a machine that stands still a shard may be silent
        assert steps == {"copy", "queued"}
        for name in ("s4", "s5"):
            far[name].gates["copy"].set()
        assert max(loads(await controller.settled()).values()) == 13


async def test_no_more_moves_of_a_shard_are_at_work_than_allowed(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    far["s4"].gates["copy"].clear()
    async with controlled(store, moves_of_shard_max=2) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: len(far["s4"].begun) == 2)
        await asyncio.sleep(0.1)
        assert len(far["s4"].begun) == 2
        far["s4"].gates["copy"].set()
        await controller.settled()


async def test_two_adds_and_a_remove_at_the_same_time_end_well(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    changes = controller.changes
    await asyncio.gather(changes.add("s4", far["s4"].url, 1), changes.remove("s1"), changes.add("s5", far["s5"].url, 2))
    done = await controller.settled()
    assert set(states(done).values()) == {"up"}
    assert sorted(done.shard(name).weight for name in ("s2", "s3", "s4", "s5")) == [1, 1, 1, 2]  # type: ignore[union-attr]
    assert max(loads(done).values()) <= 26
    assert "s1" not in states(done)


async def test_a_new_weight_moves_what_it_asks_for(controller: Controller, far: dict[str, FarShard]) -> None:
    assert (await controller.changes.reweigh("s3", 2)).state == "up"
    assert loads(await controller.settled()) == {"s1": 16, "s2": 16, "s3": 32}


async def test_progress_is_reported_while_it_goes_on_and_summed_up_after(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    assert await controller.views.all() == []
    far["s4"].gates["freeze"].clear()
    added = await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: any(step == "freeze" for _, step in far["s4"].seen))
    await asyncio.sleep(0.02)
    frozen = [move for move in await controller.moves() if move["step"] == "freeze"]
    assert frozen
    assert frozen[0]["to"] == "s4"
    assert frozen[0]["keys_done"] == frozen[0]["keys_total"] == 10 * frozen[0]["partitions"]
    assert frozen[0]["write_pause_ms"] > 0
    running = await controller.views.one(added.change)
    assert (running["state"], running["partitions_total"], running["ended_at"]) == ("running", 16, None)
    assert running["write_pause_ms_max"] > 0
    assert 0 < running["keys_done"] < 160
    far["s4"].gates["freeze"].set()
    done = await controller.ended(added.change)
    assert (done["kind"], done["shard"], done["state"], done["waiting_for"]) == ("add", "s4", "done", None)
    assert (done["partitions_done"], done["keys_done"], done["keys_total"], done["progress"]) == (16, 160, 160, 1.0)
    assert done["groups_done"] >= 3
    assert 0 < done["write_pause_ms_p99"] <= done["write_pause_ms_max"] < 10_000
    assert done["seconds"] > 0
    removed = await controller.changes.remove("s4")
    assert (await controller.ended(removed.change))["partitions_done"] == 16
    assert await controller.views.one(added.change) == done, "what ended stays as it is"


async def test_a_destination_waits_for_its_copies_before_keys_are_its_own(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    def with_copies(of: list[str], state: ClusterState) -> ClusterState:
        assert state.map is not None
        epoch = state.map.epoch + 1
        copy = Replica(node="s2", copy_id="c", state="in-sync", joined=epoch)
        shards = [
            msgspec.structs.replace(shard, replicas=[copy]) if shard.id in of else shard for shard in state.map.shards
        ]
        cluster_map = msgspec.structs.replace(state.map, epoch=epoch, shards=shards, replicas=2)
        return msgspec.structs.replace(state, map=cluster_map)

    await controller.document.change(partial(with_copies, ["s1", "s3"]))
    await controller.changes.add("s4", far["s4"].url, 1)
    while not any("copies of shard s4" in move["detail"] for move in await controller.moves()):
        await asyncio.sleep(0.01)
    assert loads(await controller.map())["s4"] < 16
    await controller.document.change(partial(with_copies, ["s4"]))
    assert loads(await controller.settled())["s4"] == 16


async def test_a_shard_is_added_once_the_copies_that_its_node_is_to_have_are_in_sync_also_those_not_yet_named(
    controller: Controller, far: dict[str, FarShard]
) -> None:
    controller.replicas = 2
    added = await controller.changes.add("s4", far["s4"].url, 1)
    assert loads(await controller.settled())["s4"] == 16
    await asyncio.sleep(0.3)
    running = await controller.views.one(added.change)
    (shard,) = controller.places(await controller.map()).awaited_on("s4")
    assert (running["state"], running["waiting_for"]) == ("running", f"copies of {shard} on node s4 to be in sync")
    controller.replicas = 1
    assert (await controller.ended(added.change))["state"] == "done"


async def test_moves_are_counted_by_step(controller: Controller, far: dict[str, FarShard]) -> None:
    far["s4"].gates["copy"].clear()
    await controller.changes.add("s4", far["s4"].url, 1)
    await until(lambda: len(far["s4"].begun) == 3)
    await asyncio.sleep(0.05)
    cluster_map = await controller.map()
    steps = controller.mover.tries.steps(cluster_map)
    assert steps["copy"] == 3
    assert sum(steps.values()) == len(cluster_map.moves)
    assert Counter(move["step"] for move in await controller.moves()) == steps
    far["s4"].gates["copy"].set()
    await controller.settled()


def test_what_a_node_of_an_earlier_version_calls_a_fence_is_a_freeze() -> None:
    current = Try(Move(id="m1", source="s1", to="s2", partitions=[0]))
    current.take(Progress(1, "fence", 10, 10, 1000), 1.0, 2.0)
    assert (current.step, current.frozen_s) == ("freeze", 2.0)
