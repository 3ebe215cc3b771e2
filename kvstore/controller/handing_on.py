"""What becomes of the copies of a node that is told to stop.
Its primaries are handed on before it ends.

Owns: who takes over from a node that stops, which of its copies are out before it is gone, and when it may end.
Promises: pure. A node that stops is given nothing more. Nothing is taken from a shard whose primary stops, too: when
all nodes end at once every copy stays what it is.
Leaves to others: making the changes (`replicas`), the node's wait, which is bounded (`shard.beats`).

    time ──>
    node     SIGTERM, beats "stops" ── gives the leases back ── follows as a copy ── is out ── ends
    heir                                                    └─ opens, serves ───────┘
    clients                             waiting, some 0.05 s ────┘
"""

from __future__ import annotations

from kvstore.controller.heard import Heard
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication import failover
from kvstore.replication.configuration import Configuration, Replica, Request, configurations


def heir(config: Configuration, heard: Heard, now: float) -> str | None:
    """The node of the copy in sync with the highest position that takes over from a primary whose node stops.
    None if no living one stays."""
    staying = (each for each in heard.reports_of(config.shard, now) if stays(each.node, heard, now))
    best = failover.successor(config, staying, now, heard.detector.failover_after_s)
    return best.node if best is not None else None


def stays(node: str, heard: Heard, now: float) -> bool:
    """Whether the node is heard, and has not told that it stops."""
    return heard.is_near(node, now) and not heard.stops(node)


def is_leaving(copy: Replica, config: Configuration, heard: Heard, now: float) -> bool:
    """Whether the copy is about to be gone, and its shard is better without it: its primary serves, and stays.

    Else each write would wait for `replica_timeout_s` once the node has ended. The primary must have been heard since
    the node told that it stops: one that has just died may have lost its disk, and then this copy is all that is left.
    """
    primary = config.primary.node
    if not heard.told_since_stop(primary, copy.node) or not stays(primary, heard, now):
        return False
    report = heard.report(config.primary.node, config.shard, config.primary.copy_id)
    return report is not None and report.serves


def without_leaving(config: Configuration, asked: list[Request], heard: Heard) -> list[Request]:
    """What a primary asks for, but for copies in sync on nodes that stop."""
    leaving = {copy.copy_id for copy in config.replicas if heard.stops(copy.node)}
    return [each for each in asked if each.kind == "out" or each.copy_id not in leaving]


def may_stop(cluster_map: ClusterMap, node: str, heard: Heard, now: float) -> bool:
    """Whether nothing of that node is left that another one could take over, or would wait for."""
    for config in configurations(cluster_map):
        if config.primary.node == node:
            if heir(config, heard, now) is not None:
                return False
        elif any(copy.node == node for copy in config.in_sync) and stays(config.primary.node, heard, now):
            return False
    return True
