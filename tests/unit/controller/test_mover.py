"""The mover on a real store and real channels: what stands in the map is done, whatever dies, hangs or comes late."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from kvstore.config import Limits, default_config
from kvstore.controller.change_views import ChangeViews
from kvstore.controller.closer import ChangeCloser
from kvstore.controller.copy_places import Places
from kvstore.controller.document import ClusterDocument
from kvstore.controller.given_up import Retirer, retiring
from kvstore.controller.heard import Heard
from kvstore.controller.launches import Launches
from kvstore.controller.map_store.interface import MapStore, Stored
from kvstore.controller.map_store.sqlite import SqliteMapStore, open_sqlite
from kvstore.controller.membership import Announcement, ClusterState
from kvstore.controller.mover import Mover, Try, new_move_id
from kvstore.controller.operator_changes import OperatorChanges
from kvstore.controller.planning import Planner
from kvstore.controller.recovery import Recovery
from kvstore.controller.service import ClusterService
from kvstore.controller.shards import ShardClients
from kvstore.errors import Unavailable
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap, Move, Primary, Replica, at_home, first_map
from kvstore.protocol import Progress
from tests.unit.controller.far_shards import FarShard, far_shards

WAIT_S = 20.0
PARTITIONS = 64
LIMITS = Limits(
    reconnect_wait_s_max=0.05,
    moves_of_shard_max=4,
    move_group_keys_max=250,
    move_freeze_timeout_s=10.0,
    map_write_tries_max=50,
)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


class Documents(ChangeViews):
    """As clients see them: plain documents."""

    async def all(self) -> Any:
        return msgspec.to_builtins(await super().all())

    async def one(self, change_id: str) -> Any:
        return msgspec.to_builtins(await super().one(change_id))


class Controller:
    """A mover and a service on one document, as in the controller's process."""

    def __init__(self, store: MapStore, limits: Limits, session: aiohttp.ClientSession) -> None:
        self.limits = limits
        self.document = ClusterDocument(store, limits.map_write_tries_max)
        self.shards = ShardClients(limits, session)
        self.mover = Mover(self.document, self.shards, limits)
        config = msgspec.structs.replace(default_config(), partitions=PARTITIONS, replicas=1, limits=limits)
        recovery = Recovery(self.document, self.shards)
        planner = Planner(self.document, recovery, self.shards, limits)
        self.service = ClusterService(self.document, planner, recovery, config, self.shards)
        self.launches = Launches(self.document, recovery, limits)
        self.changes = OperatorChanges(self.document, planner, recovery, self.launches, self.shards, limits)
        self.replicas = 1  # as places for copies are looked for
        self.views = Documents(self.document, self.mover, self.launches, lambda: "", self.places)
        closer = ChangeCloser(self.document, self.mover, self.launches.may_run, limits, places=self.places)
        self.running = [asyncio.create_task(self.mover.run()), asyncio.create_task(closer.run())]

    def places(self, cluster_map: ClusterMap) -> Places:
        wanted = msgspec.structs.replace(cluster_map, replicas=self.replicas)
        return Places(wanted, Heard("controller", self.limits, 0.0, {}), self.limits, 0.0)

    async def map(self) -> ClusterMap:
        state = await self.document.read()
        assert state.map is not None
        return state.map

    async def moves(self) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = msgspec.to_builtins(self.mover.tries.report(await self.map()))
        return shown

    async def settled(self) -> ClusterMap:
        """The map once no move stands in it and all are told."""
        async with asyncio.timeout(WAIT_S):
            while (await self.map()).moves or self.mover._tasks:
                await asyncio.sleep(0.005)
        return await self.map()

    async def stop(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.shards.close()

    async def ended(self, change_id: str) -> dict[str, Any]:
        """The change, once it runs no more."""
        async with asyncio.timeout(WAIT_S):
            while (found := await self.views.one(change_id))["state"] == "running":
                await asyncio.sleep(0.005)
        return found


@pytest.fixture
async def far() -> AsyncIterator[dict[str, FarShard]]:
    async with far_shards("s1", "s2", "s3", "s4", "s5", "s6") as shards:
        yield shards


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteMapStore]:
    opened = await open_sqlite(tmp_path / "controller-0.db")
    yield opened
    await opened.close()


@asynccontextmanager
async def controlled(store: MapStore, **limits: Any) -> AsyncIterator[Controller]:
    async with aiohttp.ClientSession() as session:
        controller = Controller(store, msgspec.structs.replace(LIMITS, **limits), session)
        try:
            yield controller
        finally:
            await controller.stop()


async def form(store: MapStore, far: dict[str, FarShard], *shard_ids: str) -> ClusterMap:
    members = [at_home(name, far[name].url, far[name].store_id) for name in shard_ids]
    formed = first_map("c", PARTITIONS, members)
    await store.compare_and_swap(0, msgspec.json.encode(ClusterState(map=formed)))
    return formed


@pytest.fixture
async def controller(store: SqliteMapStore, far: dict[str, FarShard]) -> AsyncIterator[Controller]:
    """Of a formed cluster of s1, s2 and s3."""
    await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller:
        yield controller


def loads(cluster_map: ClusterMap) -> dict[str, int]:
    return {member.id: len(cluster_map.owned_by(member.id)) for member in cluster_map.shards}


def states(cluster_map: ClusterMap) -> dict[str, str]:
    return {member.id: member.state for member in cluster_map.shards}


# --- as it should go -------------------------------------------------------------------------------------------------


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


# --- voiding ---------------------------------------------------------------------------------------------------------


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


def in_new_term(replaced: str, state: ClusterState) -> ClusterState:
    """With another primary of that shard."""
    assert state.map is not None
    epoch = state.map.epoch + 1
    shards = [
        msgspec.structs.replace(shard, term=epoch) if shard.id == replaced else shard for shard in state.map.shards
    ]
    return msgspec.structs.replace(state, map=msgspec.structs.replace(state.map, epoch=epoch, shards=shards))


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


# --- the dead --------------------------------------------------------------------------------------------------------


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


# --- the controller's own death --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["copy", "tail", "freeze"])
async def test_a_controller_that_starts_gives_all_moves_new_ids_before_anything_else(
    store: SqliteMapStore, far: dict[str, FarShard], step: str
) -> None:
    await form(store, far, "s1", "s2", "s3")
    far["s4"].gates[step].clear()
    async with controlled(store) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: step in far["s4"].begun.values())
        old = {move.id for move in (await controller.map()).moves}
    received = len(far["s4"].received)
    far["s4"].gates[step].set()
    async with controlled(store) as controller:
        done = await controller.settled()
    assert loads(done) == {"s1": 16, "s2": 16, "s3": 16, "s4": 16}
    assert not old & set(far["s4"].received[received:])
    assert not any(shard.freezes for shard in far.values())


async def test_a_controller_without_moves_writes_nothing_at_its_start(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2")
    before = await store.read()
    async with controlled(store) as controller:
        await until(lambda: controller.mover._map is not None)
    assert await store.read() == before


class Troubled:
    """A store some of whose swaps happen without their outcome being told, or do not happen at all."""

    def __init__(self, store: MapStore) -> None:
        self._store = store
        self.watch, self.close = store.watch, store.close
        self.untold = 0
        self.unread = 0
        self.unreadable = False
        self.refused = 0
        self.overtaken = 0

    async def read(self) -> Stored:
        if self.unreadable:
            self.unreadable = False
            raise Unavailable("no answer")
        return await self._store.read()

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        if self.refused:
            self.refused -= 1
            raise Unavailable("the disk is full")
        if self.overtaken:
            self.overtaken -= 1
            present = await self._store.read()
            await self._store.compare_and_swap(present.revision, present.document or b"")
        outcome = await self._store.compare_and_swap(revision, document)
        if self.untold or self.unread:
            self.unreadable = self.unread > 0
            self.untold, self.unread = max(0, self.untold - 1), max(0, self.unread - 1)
            raise Unavailable("no answer")
        return outcome


@pytest.mark.parametrize("trouble", ["untold", "unread", "refused", "overtaken"])
async def test_swaps_that_fail_or_are_overtaken_or_untold_change_nothing_in_the_end(
    store: SqliteMapStore, far: dict[str, FarShard], trouble: str
) -> None:
    await form(store, far, "s1", "s2", "s3")
    troubled = Troubled(store)
    far["s4"].gates["freeze"].clear()
    far["s4"].fails = 1
    async with controlled(troubled) as controller:
        added = await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: any(shard.freezes for shard in far.values()))
        setattr(troubled, trouble, 12)
        far["s4"].gates["freeze"].set()
        assert loads(await controller.settled()) == {"s1": 16, "s2": 16, "s3": 16, "s4": 16}
        assert (await controller.ended(added.change))["partitions_done"] == 16, "each commit is counted once"
    assert getattr(troubled, trouble) < 12


async def test_a_change_whose_swap_was_untold_is_answered_as_done(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    troubled = Troubled(store)
    async with controlled(troubled) as controller:
        await until(lambda: controller.mover._map is not None)
        troubled.untold = 1
        assert (await controller.changes.add("s4", far["s4"].url, 1)).state == "joining"
        assert loads(await controller.settled())["s4"] == 16


async def test_a_store_that_cannot_be_read_for_a_while_is_waited_for(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    failing = 5

    class Unreadable(Troubled):
        def __init__(self, store: MapStore) -> None:
            super().__init__(store)
            self.watch = self._watch

        async def _watch(self, revision: int) -> Stored:
            nonlocal failing
            if failing:
                failing -= 1
                raise Unavailable("not now")
            return await store.watch(revision)

    async with controlled(Unreadable(store)) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        assert loads(await controller.settled())["s4"] == 16


# --- other plans during it -------------------------------------------------------------------------------------------


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
