"""Faults of the network: links cut both ways or one way, slow ones, connections reset, messages that come twice.

Owns: what happens in which order.
Promises: each ends by itself, and leaves no link cut.
Leaves to others: when they come (`cluster_faults`), what a cut means to what is under way (`network`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import combinations

from loadtest.simulate.cluster import Cluster
from loadtest.simulate.network import Link, both_ways
from loadtest.simulate.victims import any_link, any_server, others


async def cut(cluster: Cluster, rng: random.Random) -> None:
    one, other = any_link(cluster, rng)
    await _cut_for_a_while(cluster, rng, both_ways(one, [other]))


async def cut_one_way(cluster: Cluster, rng: random.Random) -> None:
    await _cut_for_a_while(cluster, rng, [any_link(cluster, rng)])


async def isolate(cluster: Cluster, rng: random.Random) -> None:
    """A host reaches no other one, and none reaches it."""
    one = any_server(cluster, rng).name
    away = others(cluster, one)
    await _cut_for_a_while(cluster, rng, [(one, other) for other in away] + [(other, one) for other in away])


async def _cut_for_a_while(cluster: Cluster, rng: random.Random, links: Sequence[Link]) -> None:
    await cut_for(cluster, rng, links, rng.choice((0.1, 1.0, 6.0)) * rng.random())


async def cut_for(cluster: Cluster, rng: random.Random, links: Sequence[Link], seconds: float) -> None:
    """All of these links."""
    cluster.network.cut_links(links)
    await asyncio.sleep(seconds)
    cluster.network.heal_links(links, rng.choice((0.0, 0.5, 1.0)))


async def reset(cluster: Cluster, rng: random.Random) -> None:
    """The connections between some pairs of hosts."""
    for one, other in combinations([server.name for server in cluster.servers], 2):
        if rng.random() < 0.3:
            cluster.network.reset_between(one, other)


async def slow_link(cluster: Cluster, rng: random.Random) -> None:
    network, link = cluster.network, any_link(cluster, rng)
    network.slow[link] = rng.choice((0.005, 0.05, 0.3))
    await asyncio.sleep(rng.uniform(0.2, 4.0))
    network.slow.pop(link, None)


async def send_twice(cluster: Cluster, rng: random.Random) -> None:
    cluster.network.doubles = True
    await asyncio.sleep(rng.uniform(0.5, 5.0))
    cluster.network.doubles = False
