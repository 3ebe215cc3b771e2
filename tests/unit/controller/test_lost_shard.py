"""Giving up a shard: who must follow the strike before anything is opened, what is refused until then, the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
from msgspec import structs

from kvstore.controller import membership
from kvstore.controller.document import CLOCK_STEP
from kvstore.controller.lost import Reopener
from kvstore.controller.map_store.interface import MapStore
from kvstore.controller.membership import Announcement, ClusterState, FirstMembers
from kvstore.errors import ChangeRefused, ForeignData, NotFound
from kvstore.placement.cluster_map import ClusterMap, Replica
from tests.unit.controller.far_shards import LIMITS, FarShard, far_shards
from tests.unit.controller.moving import Controller, controlled, form
from tests.unit.waiting import until

FIRST = FirstMembers({}, 64, 1)


@pytest.fixture
async def far() -> AsyncIterator[dict[str, FarShard]]:
    async with far_shards("s1", "s2", "s3") as shards:
        yield shards
        for shard in shards.values():
            shard.wrongs.clear()  # what is opened came by no move


@asynccontextmanager
async def reopening(controller: Controller) -> AsyncIterator[Reopener]:
    reopener = Reopener(controller.document, controller.shards, LIMITS)
    controller.service.on_clock = reopener.tell
    task = asyncio.create_task(reopener.run())
    try:
        yield reopener
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def opened(controller: Controller) -> ClusterMap:
    async with asyncio.timeout(30):
        while any(not strike.opened for strike in (await controller.map()).strikes):
            await asyncio.sleep(0.005)
    return await controller.map()


async def test_nothing_is_opened_before_every_other_shard_follows_the_strike(
    store: MapStore, far: dict[str, FarShard]
) -> None:
    before = await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller, reopening(controller) as reopener:
        await far["s3"].kill()
        far["s2"].gates["follow"].clear()
        reopener.tell(1000)
        with pytest.raises(ChangeRefused, match="confirm=s3"):
            await controller.changes.give_up("s3", None)
        answer = await controller.changes.give_up("s3", "s3")
        assert (answer["epoch"], answer["partitions"]) == (before.epoch + 1, len(before.owned_by("s3")))
        await until(lambda: before.epoch + 1 in far["s1"].followed)
        await asyncio.sleep(0.1)
        assert [strike.opened for strike in (await controller.map()).strikes] == [0]
        for change in (controller.changes.cancel(), controller.changes.replan(), controller.changes.remove("s2")):
            with pytest.raises(ChangeRefused, match="is being given up"):
                await change
        far["s2"].gates["follow"].set()
        after = await opened(controller)
        assert [member.id for member in after.shards] == ["s1", "s2"]
        assert after.strikes[0].clock == 1000 + CLOCK_STEP
        assert (await controller.document.read()).clock == after.strikes[0].clock
        await controller.changes.replan()


async def test_the_confirmation_lists_the_transactions_whose_first_key_is_lost(
    store: MapStore, far: dict[str, FarShard]
) -> None:
    before = await form(store, far, "s1", "s2", "s3")
    theirs, other = (
        next(key for key in map(str, range(1000)) if before.owner_of(key.encode()).id == owner)
        for owner in ("s3", "s2")
    )
    async with controlled(store) as controller:
        await controller.changes.replan()
        await far["s3"].kill()
        far["s1"].attempts = [{"id": "1-a", "anchor": theirs}, {"id": "2-b", "anchor": other}]
        far["s2"].attempts = [{"id": "1-a", "anchor": theirs}]
        lost = [{"id": "1-a", "anchor": theirs}]
        with pytest.raises(ChangeRefused, match="1 undecided transactions") as refused:
            await controller.changes.give_up("s3", None)
        for word in ("Idempotency-Keys", "locks end early", "set aside", "If its process may still run, end it first"):
            assert word in refused.value.detail
        assert refused.value.members["transactions"] == lost
        assert (await controller.changes.give_up("s3", "s3"))["transactions"] == lost


async def test_the_confirmation_names_the_nodes_whose_copies_are_given_up_too(
    store: MapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller:
        for state, said in (
            ("in-sync", "Node s1 has a copy of shard s3 in sync, with all that was acknowledged: if it can come back"),
            ("joining", "Node s1 may have an older copy of shard s3: `kvstore shard promote s3 --to s1 --accept-loss`"),
        ):

            def with_copy(present: ClusterState, state: Any = state) -> ClusterState:
                assert present.map is not None
                copy = Replica(node="s1", copy_id="c1", state=state, joined=present.map.epoch + 1)
                shards = [structs.replace(s, replicas=[copy]) if s.id == "s3" else s for s in present.map.shards]
                return structs.replace(
                    present, map=structs.replace(present.map, epoch=present.map.epoch + 1, shards=shards)
                )

            await controller.document.change(with_copy)
            with pytest.raises(ChangeRefused) as refused:
                await controller.changes.give_up("s3", None)
            assert refused.value.detail.startswith(said)
            assert "would be reopened, empty" in refused.value.detail


async def test_a_controller_that_died_between_the_two_maps_opens_after_its_start(
    store: MapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller:
        await controller.changes.give_up("s3", "s3")
        assert not (await controller.map()).strikes[0].opened
    async with controlled(store) as controller, reopening(controller):
        assert (await opened(controller)).strikes[0].opened


async def test_the_clock_that_was_told_long_ago_is_known_after_a_restart(
    store: MapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller, reopening(controller) as reopener:
        reopener.tell(1 << 40)
        async with asyncio.timeout(30):
            while (await controller.document.read()).clock < 1 << 40:
                await asyncio.sleep(0.005)
    async with controlled(store) as controller, reopening(controller):
        await controller.changes.give_up("s3", "s3")
        assert (await opened(controller)).strikes[0].clock == (1 << 40) + CLOCK_STEP


async def test_the_file_of_a_shard_that_was_given_up_is_refused_under_any_name(
    store: MapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller, reopening(controller):
        await controller.changes.give_up("s3", "s3")
        state = ClusterState(map=await opened(controller))
    lost = far["s3"].store_id
    for name in ("s3", "s7"):
        said = Announcement(id=name, url="http://x:1", store_id=lost, cluster_id="c", join=True)
        for announced in (said, msgspec.structs.replace(said, cluster_id=None)):
            with pytest.raises(ForeignData, match="given up as lost"):
                membership.decide(state, announced, FIRST, "d", lambda cluster_map: cluster_map)


async def test_the_last_shard_and_who_is_none_cannot_be_given_up(store: MapStore, far: dict[str, FarShard]) -> None:
    await form(store, far, "s1")
    async with controlled(store) as controller:
        with pytest.raises(ChangeRefused, match="last one"):
            await controller.changes.give_up("s1", "s1")
        with pytest.raises(NotFound):
            await controller.changes.give_up("s9", "s9")
