"""Where the copies of a shard lie: a second circle, on which each node stands once.

Owns: the order in which nodes are asked to keep a copy.
Promises: pure, and the same result whatever the order in which nodes are named. The nodes of a shard's copies are
distinct, and in as many zones as there can be. Without zones every node keeps as many copies of others as every other
node. A node that joins or leaves changes only the copies that it takes or gave: of each shard one at most, also where
there are zones, since a newcomer takes the place of the one that is chosen last or of the one in its zone, which then
is among those that are taken whatever their zone.
Leaves to others: which of these nodes has a copy by now (`cluster_map`), how it is made (shard), when (controller).

A node stands at the hash of its id, weights do not enter. The copies of a shard go to the next nodes clockwise of its
home. One in a zone that has a copy already is skipped while there is one that is not; a node without `zone` is in that
of its `host`, and without both in one of its own. Zones bind copies only: partitions are placed on shards by the ring.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.placement.cluster_map import ClusterMap, Node
from kvstore.placement.ring import key_hash


def copy_nodes(home: str, nodes: Sequence[Node], replicas: int) -> list[str]:
    """The ids of the nodes that keep the shard of that home.
    The home first, then its copies in order of the walk.

    `replicas`: how many, 1 or more; fewer where there are not so many nodes. A home that is not among `nodes`, or was
    given up, keeps none, and is where the walk begins.
    """
    circle = [(key_hash(node.id.encode()), node.id, node) for node in nodes if not node.given_up]
    begin = (key_hash(home.encode()), home)
    clockwise = [node for *_, node in sorted(circle, key=lambda entry: (entry[:2] < begin, entry[:2]))]
    chosen: list[Node] = []
    while clockwise and len(chosen) < replicas:
        used = {zone_of(node) for node in chosen}
        next_node = next((node for node in clockwise if zone_of(node) not in used), clockwise[0])
        clockwise.remove(next_node)
        chosen.append(next_node)
    return [node.id for node in chosen]


def copies_that_fit(cluster_map: ClusterMap) -> int:
    """How many copies beside its primary a shard is to have.
    They lie on nodes that are not given up and whose shard stays.

    Fewer than are asked for where too few stay: what leaves must not wait for a copy that has no place.
    """
    stay = {shard.id for shard in cluster_map.shards if shard.state != "leaving"}
    places = sum(node.id in stay and not node.given_up for node in cluster_map.nodes)
    return max(0, min(cluster_map.replicas, places) - 1)


def zone_of(node: Node) -> tuple[str, str]:
    """What the node shares with others that may fail together with it."""
    if node.zone:
        return "zone", node.zone
    return ("host", node.host) if node.host else ("node", node.id)
