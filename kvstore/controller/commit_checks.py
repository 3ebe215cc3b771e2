"""When a move may be committed, where shards have copies: checked in the very map that the commit replaces.

Owns: both rules, and what is said while one of them is not met.
Promises: pure. What is committed is known to the primaries that are named in that map, and afterwards no key is on
fewer disks than the cluster asks for, or than it was on before; unless too few nodes stay for that.
Leaves to others: which nodes are held for dead (`heard`), the commit (`placement.moves`), trying again (`mover`).

A primary that acknowledged a freeze, or that all is received, may have been replaced since: then nothing is known of
what its successor has. Copies of the source that are out or joining count for it while their nodes live, since they had
the rows, or would have them: else adding a shard could leave acknowledged data on one disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvstore import failpoints
from kvstore.placement.cluster_map import ClusterMap, Move, Shard
from kvstore.placement.copies import copies_that_fit


class Terms(NamedTuple):
    """Of the primaries of a move's source and destination."""

    source: int
    to: int


def terms_of(cluster_map: ClusterMap, move: Move) -> Terms | None:
    """Those of the map; None if it has not both shards."""
    source, to = cluster_map.shard(move.source), cluster_map.shard(move.to)
    return Terms(source.term, to.term) if source is not None and to is not None else None


def lacks_copies(cluster_map: ClusterMap, move: Move, is_dead: Callable[[str], bool]) -> str:
    """What the destination waits for before keys may be its own; empty if for nothing."""
    source, to = cluster_map.shard(move.source), cluster_map.shard(move.to)
    if source is None or to is None:
        return ""
    wanted = min(copies_that_fit(cluster_map), _had(source, is_dead))
    found = sum(copy.state == "in-sync" for copy in to.replicas)
    if found >= wanted:
        return ""
    return f"copies of shard {to.id} to be in sync: {found} of {wanted} are"


def refusal(cluster_map: ClusterMap, move: Move, began: Terms | None, is_dead: Callable[[str], bool]) -> str:
    """Why a move that began in those terms may not be committed; empty if it may."""
    if terms_of(cluster_map, move) != began:
        return f"the primary of shard {move.source} or {move.to} has changed since the move began"
    if failpoints.planted("commit-without-copies"):
        return ""
    waits_for = lacks_copies(cluster_map, move, is_dead)
    return f"it waits for {waits_for}" if waits_for else ""


def _had(source: Shard, is_dead: Callable[[str], bool]) -> int:
    return sum(copy.state == "in-sync" or not is_dead(copy.node) for copy in source.replicas)
