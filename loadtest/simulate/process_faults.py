"""Faults of processes and their machines: killed, stopped in order, without power, standing still, asleep.

Owns: what happens in which order.
Promises: what stands still goes on.
Leaves to others: when they come (`cluster_faults`), what a death means to the process (`servers`, `node`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from kvstore import failpoints
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.disk import any_fate
from loadtest.simulate.loop import Process
from loadtest.simulate.node import NodeServer
from loadtest.simulate.victims import any_node, any_server

POINTS = tuple(dict.fromkeys(point for points in failpoints.POINTS.values() for point in points))
_STILL_S = (0.05, 0.5, 3.0, 8.0)  # at most


async def kill(cluster: Cluster, rng: random.Random) -> None:
    """Between any two of its events."""
    process = any_server(cluster, rng).process
    if process is not None:
        process.dies_after = rng.randrange(300)


async def kill_at_failpoint(cluster: Cluster, rng: random.Random) -> None:
    cluster.kill_points.kill_at[rng.choice(POINTS)] = rng.randint(1, 3)


async def stop_in_order(cluster: Cluster, rng: random.Random) -> None:
    any_node(cluster, rng).stop()


async def cut_power(cluster: Cluster, rng: random.Random) -> None:
    """Of a node, of which only the disk stays; of another one, which has nothing to lose."""
    server = any_server(cluster, rng)
    if isinstance(server, NodeServer):
        server.cut_power(any_fate(rng))
    else:
        server.lose_power()


async def cut_power_in_call(cluster: Cluster, rng: random.Random) -> None:
    """Of a node, in the middle of a call of its disk."""
    node = any_node(cluster, rng)
    node.fate = any_fate(rng)
    node.disk.power_cut_at = node.disk.calls + rng.randint(1, 40)


async def stand_still(cluster: Cluster, rng: random.Random) -> None:
    await _hold(any_server(cluster, rng).process, rng, lambda process, _: cluster.loop.go_on(process))


async def sleep(cluster: Cluster, rng: random.Random) -> None:
    """The host sleeps, and its clock with it."""
    await _hold(any_server(cluster, rng).process, rng, cluster.loop.wake)


async def _hold(process: Process | None, rng: random.Random, release: Callable[[Process, float], None]) -> None:
    if process is not None and not process.stands_still:
        process.stands_still = True
        seconds = rng.choice(_STILL_S) * rng.random()
        await asyncio.sleep(seconds)
        release(process, seconds)
