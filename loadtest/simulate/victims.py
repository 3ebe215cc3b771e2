"""Which server of a simulated cluster a fault meets, drawn at random.

Owns: how often it is a router, the controller, a node.
Leaves to others: what happens to it (`process_faults`, `network_faults`, `disk_faults`).
"""

from __future__ import annotations

import random

from loadtest.simulate.cluster import Cluster
from loadtest.simulate.network import Link
from loadtest.simulate.node import NodeServer
from loadtest.simulate.servers import Server


def any_server(cluster: Cluster, rng: random.Random) -> Server:
    """A node, mostly."""
    chosen = rng.random()
    if chosen < 0.2:
        return rng.choice(cluster.routers)
    return cluster.controller if chosen < 0.35 else any_node(cluster, rng)


def any_node(cluster: Cluster, rng: random.Random) -> NodeServer:
    return rng.choice(list(cluster.nodes.values()))


def any_link(cluster: Cluster, rng: random.Random) -> Link:
    """From one host to another."""
    one = any_server(cluster, rng).name
    return one, rng.choice(others(cluster, one))


def others(cluster: Cluster, name: str) -> list[str]:
    """The hosts but for that one."""
    return [server.name for server in cluster.servers if server.name != name]
