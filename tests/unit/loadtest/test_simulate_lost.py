"""A shard whose only disk is lost is given up, in a simulated cluster with all of its invariants."""

from __future__ import annotations

import asyncio
from typing import Any

from loadtest.simulate.cluster import Cluster
from loadtest.simulate.cluster_clients import Client, History
from loadtest.simulate.loop import SimulatedLoop
from loadtest.workloads.calls import Call

KEYS = 40
DONE = (200, 201, 204, 404)
SHARD = "s3"


async def ask_all(client: Client, method: str, value: bytes | None = None) -> dict[int, tuple[int, bytes]]:
    """Status and body of each key, asked again while it is refused for now."""
    found = {}
    for number in range(KEYS):
        call = Call("key", method, f"/v1/kv/k{number}", value)
        while (reply := await client.ask(call)).status not in DONE:
            await asyncio.sleep(0.2)
        found[number] = reply.status, reply.body
    return found


async def give_up(cluster: Cluster) -> None:
    node = cluster.nodes[SHARD]
    node.wanted = False
    node.lose_disk()
    parts = cluster.controller.parts
    assert parts is not None
    controller = cluster.controller.process
    assert controller is not None
    lost = cluster.loop.create_task(parts.changes.give_up(SHARD, SHARD), context=controller.context)
    assert (await lost)["partitions"] > 0
    while (found := cluster.view.map) is None or not all(strike.opened for strike in found.strikes):
        await asyncio.sleep(0.1)
    assert found.strikes


async def scenario(cluster: Cluster) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    running = cluster.loop.create_task(cluster.run())
    client = Client("c1", cluster, History(cluster))
    await ask_all(client, "PUT", b"before")
    owners = cluster.view.map
    assert owners is not None
    await give_up(cluster)
    found, again = await ask_all(client, "GET"), await ask_all(client, "PUT", b"after")
    newest = await ask_all(client, "GET")
    running.cancel()
    lost = {number: owners.owner_of(f"k{number}".encode()).id == SHARD for number in range(KEYS)}
    assert {status for status, _ in again.values()} <= {201, 204}
    return lost, found, newest


def test_a_shard_that_is_given_up_leaves_empty_partitions_that_take_writes_and_no_other_key_is_touched() -> None:
    loop = SimulatedLoop()
    cluster = Cluster(loop, 5)
    loop.after_event = cluster.check
    try:
        lost, found, newest = loop.run_until_complete(asyncio.wait_for(scenario(cluster), 300))
    finally:
        loop.end()
    assert 0 < sum(lost.values()) < KEYS
    for number, (status, body) in found.items():
        assert status == 404 if lost[number] else (status, body) == (200, b"before")
    assert set(newest.values()) == {(200, b"after")}
