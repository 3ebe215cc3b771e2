"""What a node does about the answers to its beats: real files, and a controller that answers what it likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.environment import SYSTEM
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.beats import Beat, BeatAnswer, CopyReport, Drop, GiveBack, Make
from kvstore.shard.beats import Beats
from kvstore.shard.copy_wires import connect
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node_stores import NodeStores
from kvstore.transport.sessions import ClusterSession
from tests.unit.shard.resident_copy import (
    LIMITS,
    PARTITIONS,
    STORE_ID,
    fatal,
    folder_of,
    named,
    nothing_told,
    promoted_before_a_copy,
)

ABOVE = 99  # epoch and term, of which no map that the node follows has heard


class Controller:
    """Answers each beat of node n2 with `orders`, by a map of epoch `ABOVE`. `beats`: what it was told."""

    def __init__(self) -> None:
        self.beats: list[Beat] = []
        self.orders = BeatAnswer(start="controller", beat=0, epoch=1)

    async def answer(self, request: web.Request) -> web.Response:
        self.beats.append(msgspec.json.decode(await request.read(), type=Beat))
        answer = msgspec.structs.replace(self.orders, beat=len(self.beats))
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    @property
    def told(self) -> tuple[int, CopyReport | None]:
        """The epoch that the node follows, and the copy of shard s1, by its last beat."""
        last = self.beats[-1]
        return last.epoch, next((each for each in last.copies if each.shard == "s1"), None)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not self.beats or not condition():
                await asyncio.sleep(0.01)

    async def answers(self, count: int) -> None:
        """So many beats from now on have been answered, and the node has done about them what it does."""
        end = len(self.beats) + count
        await self.until(lambda: len(self.beats) > end)


@asynccontextmanager
async def node_n2(folder: Path) -> AsyncIterator[tuple[NodeStores, Controller]]:
    """It has an empty copy of shard s1, follows no map, and beats once it does."""
    controller = Controller()
    app = web.Application()
    app.router.add_post("/v1/nodes/n2/beat", controller.answer)
    app.router.add_post("/v1/told", nothing_told)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        dial, cluster = partial(connect, http, ClusterSession()), ClusterSession()
        url = str(server.make_url("/"))
        stores = NodeStores(
            Surroundings("n2", folder_of(folder, "n2"), LIMITS, http, cluster, url, fatal, SYSTEM, dial)
        )
        await stores.make(Make(shard="s1", store_id=STORE_ID, partitions=PARTITIONS))
        beats = Beats("n2", stores, http, url, 0.1, SYSTEM)
        beating = asyncio.create_task(beats.run())
        try:
            yield stores, controller
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await beats.close()
            await stores.close()


def orders_about(copy_id: str) -> BeatAnswer:
    return BeatAnswer(
        start="controller",
        beat=0,
        epoch=ABOVE,
        make=[Make(shard="s1", store_id="f" * 32, partitions=PARTITIONS)],
        drop=[Drop(shard="s1", copy_id=copy_id)],
        give_back=[GiveBack(shard="s1", term=ABOVE, to="s1", copy_id="another")],
    )


async def follow(stores: NodeStores, map_with: Callable[[str], ClusterMap]) -> str:
    """The map that says this of the copy here, whose id is returned."""
    copy = stores.by_shard["s1"].local.copy
    assert copy is not None
    stores.hear(map_with(copy.identity.copy_id))
    return copy.identity.copy_id


async def test_no_answer_to_a_beat_changes_the_role_of_a_copy_that_the_map_names(tmp_path: Path) -> None:
    async with node_n2(tmp_path) as (stores, controller):
        copy_id = await follow(stores, named)
        await controller.answers(1)
        before = controller.told
        controller.orders = orders_about(copy_id)
        await controller.answers(3)
        epoch, copy = controller.told
        assert copy is not None
        assert (epoch, copy.role, copy.copy_id, copy.store_id) == (1, "copy", copy_id, STORE_ID)
        assert before[1] == msgspec.structs.replace(copy, silent_s=before[1].silent_s if before[1] else 0.0)


async def test_no_answer_to_a_beat_ends_a_primary_that_the_map_names(tmp_path: Path) -> None:
    async with node_n2(tmp_path) as (stores, controller):
        copy_id = await follow(stores, promoted_before_a_copy)

        def serves() -> bool:
            _, copy = controller.told
            return copy is not None and copy.serves

        await controller.until(serves)
        controller.orders = orders_about(copy_id)
        await controller.answers(3)
        epoch, store = controller.told
        assert store is not None
        assert (epoch, store.role, store.serves, store.given_back) == (3, "primary", True, 0)
        assert (store.copy_id, store.store_id, store.promised) == (copy_id, STORE_ID, 3)


async def test_a_copy_that_no_map_names_is_set_aside_by_order(tmp_path: Path) -> None:
    """What the others show would else be shown by a node that carries out no order at all."""
    async with node_n2(tmp_path) as (stores, controller):
        copy_id = await follow(stores, lambda copy_id: named("another"))
        await controller.answers(1)
        controller.orders = orders_about(copy_id)
        await controller.until(lambda: controller.told[1] is None or controller.told[1].copy_id != copy_id)
        await controller.until(lambda: (tmp_path / "shard-s1.copy-n2.db.removed").exists())
