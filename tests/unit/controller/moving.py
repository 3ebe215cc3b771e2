"""A mover and a service on one document, as in the controller's process, and what tests ask of the map."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from kvstore.config import Limits, default_config
from kvstore.controller.change_views import ChangeViews
from kvstore.controller.closer import ChangeCloser
from kvstore.controller.copy_places import Places
from kvstore.controller.document import ClusterDocument
from kvstore.controller.heard import Heard
from kvstore.controller.launches import Launches
from kvstore.controller.map_store.interface import MapStore
from kvstore.controller.membership import ClusterState
from kvstore.controller.mover import Mover
from kvstore.controller.operator_changes import OperatorChanges
from kvstore.controller.planning import Planner
from kvstore.controller.recovery import Recovery
from kvstore.controller.service import ClusterService
from kvstore.controller.shards import ShardClients
from kvstore.placement.cluster_map import ClusterMap, at_home, first_map
from tests.unit.controller.far_shards import FarShard
from tests.unit.waiting import WAIT_S

PARTITIONS = 64
LIMITS = Limits(
    reconnect_wait_s_max=0.05,
    moves_of_shard_max=4,
    move_group_keys_max=250,
    move_freeze_timeout_s=10.0,
    map_write_tries_max=50,
)


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


def loads(cluster_map: ClusterMap) -> dict[str, int]:
    return {member.id: len(cluster_map.owned_by(member.id)) for member in cluster_map.shards}


def states(cluster_map: ClusterMap) -> dict[str, str]:
    return {member.id: member.state for member in cluster_map.shards}


# --- voiding ---------------------------------------------------------------------------------------------------------


def in_new_term(replaced: str, state: ClusterState) -> ClusterState:
    """With another primary of that shard."""
    assert state.map is not None
    epoch = state.map.epoch + 1
    shards = [
        msgspec.structs.replace(shard, term=epoch) if shard.id == replaced else shard for shard in state.map.shards
    ]
    return msgspec.structs.replace(state, map=msgspec.structs.replace(state.map, epoch=epoch, shards=shards))
