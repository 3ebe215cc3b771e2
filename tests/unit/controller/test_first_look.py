"""A map is changed only once its nodes could tell which one they follow."""

from __future__ import annotations

import asyncio

from kvstore.controller.first_look import FirstLook
from kvstore.environment import SYSTEM
from kvstore.placement.cluster_map import at_home, first_map

MAP = first_map("c", 64, [at_home(shard, f"http://{shard}:1", f"store-{shard}") for shard in ("s1", "s2")])


async def test_a_map_waits_until_each_of_its_nodes_has_told() -> None:
    look = FirstLook(60.0, SYSTEM)
    waiting = asyncio.create_task(look.wait(MAP))
    for node in ("s1", "s3"):
        look.note(node)
        await asyncio.sleep(0.02)
        assert not waiting.done()
    look.note("s2")
    async with asyncio.timeout(30):
        await waiting
        await look.wait(MAP)


async def test_a_node_that_is_away_is_waited_for_no_longer_than_that_and_only_once() -> None:
    look, began_s = FirstLook(0.2, SYSTEM), SYSTEM.monotonic_s()
    look.note("s1")
    async with asyncio.timeout(30):
        await look.wait(MAP)
        assert SYSTEM.monotonic_s() - began_s >= 0.2
        await look.wait(MAP)
