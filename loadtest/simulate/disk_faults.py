"""Faults of disks and clocks: failing and slow syncs, no room, a wrong bit, a lost disk; time that jumps.

Owns: what happens in which order, and that nothing is lost for which no other copy stands in.
Promises: each ends by itself, but for a disk that is lost.
Leaves to others: when they come (`cluster_faults`), what a fault means to the process (`node`, `disk`).
"""

from __future__ import annotations

import asyncio
import random

from loadtest.simulate.cluster import Cluster
from loadtest.simulate.disk import any_fate
from loadtest.simulate.environment import SYNC_S
from loadtest.simulate.node import NodeServer
from loadtest.simulate.victims import any_node, any_server


async def fail_sync(cluster: Cluster, rng: random.Random) -> None:
    any_node(cluster, rng).sync_fails = True


async def slow(cluster: Cluster, rng: random.Random) -> None:
    """At the end, often, the power is cut while something is not synced that others have."""
    node = any_node(cluster, rng)
    node.environment.sync_s = rng.choice((0.005, 0.02, 0.1))
    await asyncio.sleep(rng.uniform(0.1, 3.0))
    if rng.random() < 0.5:
        node.cut_power(any_fate(rng))
    node.environment.sync_s = SYNC_S


async def fill(cluster: Cluster, rng: random.Random) -> None:
    node = any_node(cluster, rng)
    disk, node.was_full = node.disk, True
    disk.capacity = disk.used_bytes + rng.choice((0, 1000, 150_000, 250_000, 500_000))
    await asyncio.sleep(rng.uniform(0.1, 3.0))
    disk.capacity = None


async def flip_a_bit(cluster: Cluster, rng: random.Random) -> None:
    """A bit of a log is wrong while its node starts: it must refuse, or not mind.
    Then the disk is mended. Or another copy takes the place of the damaged one, which is rebuilt; if
    there is none, the disk is mended."""
    node = any_node(cluster, rng)
    if not node.folder.engines or node.process is None:
        return
    node.process.kill()
    path = rng.choice(sorted(node.disk.files))
    bit = rng.randrange(8 * max(1, len(node.disk.content(path))))
    if node.is_damaged or bit >= 8 * len(node.disk.content(path)):
        return
    node.disk.flip(path, bit)
    node.is_damaged = True
    while node.is_damaged and not node.refused:
        await asyncio.sleep(0.05)
        if node.node is not None and not node.node.stores.by_shard.damage:
            break
        if node.process is not None and _damage_stays(cluster, node):
            node.refused = True
            node.process.kill()
    if node.refused and path in node.disk.files:
        node.disk.flip(path, bit)
    node.is_damaged = node.refused = False


def _damage_stays(cluster: Cluster, node: NodeServer) -> bool:
    """Whether it has the last copy of a damaged store: no other can take over."""
    shards = map(cluster.view.shard, node.node.stores.by_shard.damage if node.node is not None else ())
    return any(shard is not None and cluster.view.is_alone(node.name, shard) for shard in shards)


async def lose(cluster: Cluster, rng: random.Random) -> None:
    """Never the last copy of anything: so nothing may be lost by it."""
    node = any_node(cluster, rng)
    if cluster.view.is_member(node.name) and not node.is_damaged and cluster.lost_disks.may_be_more(node.name):
        cluster.loop.note(f"{node.name} loses its disk")
        cluster.lose_disk(node)


async def jump(cluster: Cluster, rng: random.Random) -> None:
    """Wall clocks, once, or to and fro for a while, as under a daemon that does not find the time."""
    most_ms = rng.choice((300, 3_000, 30_000))
    for _ in range(rng.choice((1, 1, 3, 6))):
        for node in list(cluster.nodes.values()):
            if rng.random() < 0.5:
                node.environment.jump(rng.randrange(-most_ms, most_ms))
        by_ms = rng.randrange(-most_ms, most_ms)
        any_server(cluster, rng).environment.jump(by_ms)
        await asyncio.sleep(rng.uniform(0.1, 0.8))
