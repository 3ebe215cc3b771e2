"""Where the copies of each shard are to be, and the next step towards that.

Owns: which nodes may keep copies, what a node is told to make and to drop, which copies the map names next.
Promises: pure. One copy at a time joins for each shard. A copy that is not where it should be goes only when those that
are there are in sync, and only while the shard's primary serves; one that is only joining, at once.
Leaves to others: the walk over the nodes (`placement.copies`), requests, terms and promotions (`replicas`).

A node that has no shard of its own, or whose shard leaves, is to go: its copies get places elsewhere, and it goes with
the last one. One that was silent for `down_out_s`, or was given up, keeps its place in the map and gets no copy.
"""

from __future__ import annotations

import msgspec

from kvstore.config import Limits
from kvstore.controller.copies_heard import CopiesHeard
from kvstore.controller.heard import Heard
from kvstore.placement.cluster_map import ClusterMap, Node, Shard
from kvstore.placement.copies import copy_nodes
from kvstore.replication import failover
from kvstore.replication.beats import CopyReport, Drop, Make
from kvstore.replication.configuration import Configuration, Replica, configuration_of, configurations


class Places:
    """The places for copies as of one map and one moment."""

    def __init__(self, cluster_map: ClusterMap, heard: Heard, limits: Limits, now: float) -> None:
        self.cluster_map = cluster_map
        self.heard = heard
        self.now = now
        self.limits = limits
        self.copies = CopiesHeard(heard, now)
        self._walks: dict[str, list[str]] = {}
        self._nodes = [_as_place(cluster_map, node, heard, limits, now) for node in cluster_map.nodes]

    def walk(self, shard_id: str) -> list[str]:
        """The nodes that keep that shard, its home first if that may."""
        if shard_id not in self._walks:
            self._walks[shard_id] = copy_nodes(shard_id, self._nodes, self.cluster_map.replicas)
        return self._walks[shard_id]

    def wanted(self, config: Configuration) -> list[str]:
        """The nodes that keep it beside its primary's. Of a shard that leaves, those that do now.

        But where it leaves because its home is given up, what did not move yet must not lie on one disk until then.
        A primary that stays outside of the walk, where a person wants it, is one of the copies all the same.
        """
        home = self.cluster_map.node(config.shard)
        if not _stays(self.cluster_map.shard(config.shard)) and not (home is not None and home.given_up):
            return [copy.node for copy in config.replicas]
        others = [node for node in self.walk(config.shard) if node != config.primary.node]
        if not self.may_keep(config.primary.node):
            return others
        return others[: max(1, self.cluster_map.replicas - 1)]  # the first is where the primary belongs

    def may_keep(self, node: str) -> bool:
        """Copies may lie there."""
        return any(each.id == node and not each.given_up for each in self._nodes)

    def missing(self, config: Configuration) -> list[str]:
        """The nodes whose copy is not in sync yet, or not there."""
        synced = {copy.node for copy in config.in_sync}
        return [node for node in self.wanted(config) if node not in synced]

    def awaited_on(self, node: str) -> list[str]:
        """The shards of which that node is to have a copy that is not in sync yet."""
        return [config.shard for config in configurations(self.cluster_map) if node in self.missing(config)]

    def unserved(self) -> list[str]:
        """The shards whose primary does not answer, as far as nodes tell."""
        return [config.shard for config in configurations(self.cluster_map) if not self.copies.serves(config)]

    def surplus(self, config: Configuration) -> list[Replica]:
        """The copies that are elsewhere."""
        wanted = self.wanted(config)
        return [copy for copy in config.replicas if copy.node not in wanted]

    # --- the map

    def next_step(self, config: Configuration, epoch: int, *, may_join: bool = True) -> Configuration | None:
        """With one more copy named, or without those that are not wanted; None if nothing is to change now."""
        if not self.copies.serves(config):
            return None
        for copy in self.surplus(config):
            if copy.state == "joining":
                return failover.dropped(config, copy.node, epoch)
        found = self._newcomer(config) if may_join else None
        if found is not None:
            return failover.named(config, *found, epoch)
        if self.missing(config):
            return None
        after = config
        for copy in self.surplus(config):
            after = failover.dropped(after, copy.node, epoch) or after
        return None if after is config else after

    def _newcomer(self, config: Configuration) -> tuple[str, str] | None:
        """The node, and the id of its copy, which the map is to name."""
        if self.copies.is_joining(config):
            return None
        for node in self.wanted(config):
            there = config.copy_on(node)
            report = self.copies.report(node, config.shard)
            if report is None or report.store_id != config.store_id or report.role not in ("copy", "filling"):
                continue
            if self.heard.stops(node) or _is_of_another(config, node, report.copy_id):
                continue
            if there is None or there.copy_id != report.copy_id:
                return node, report.copy_id
        return None

    # --- what a node is told

    def to_make(self, node: str) -> list[Make]:
        """The copies that the node is to make, of shards that have none that joins."""
        found = []
        for shard in self.cluster_map.shards:
            config = configuration_of(self.cluster_map, shard.id)
            if config is not None and self._is_lacking(config, node):
                found.append(Make(shard=shard.id, store_id=shard.store_id, partitions=self.cluster_map.partitions))
        return found

    def _is_lacking(self, config: Configuration, node: str) -> bool:
        """Whether the node is here, is to keep the shard's store, and has no copy of it.
        It waits for no other node, which may not be able to make its own."""
        if node not in self.wanted(config) or not self.heard.is_here(node, self.now) or self.heard.stops(node):
            return False
        report = self.heard.report(node, config.shard)
        if report is not None and report.store_id == config.store_id:
            return False
        return self.copies.serves(config) and not self.copies.is_joining(config)

    def to_drop(self, node: str) -> list[Drop]:
        """The copies that the node has, which no map names or will name."""
        beat = self.heard.beat_of(node)
        if beat is None or beat.epoch < self.cluster_map.epoch:
            return []
        return [
            Drop(shard=report.shard, copy_id=report.copy_id)
            for report in beat.copies
            if report.role in ("copy", "filling", "damaged") and self._is_left_over(node, report)
        ]

    def _is_left_over(self, node: str, report: CopyReport) -> bool:
        """One of another store, such as that of an earlier shard of that name, is in the way.
        So is one with the id of the copy on another node, as in files that a person copied."""
        config = configuration_of(self.cluster_map, report.shard)
        if config is None:
            return True
        is_of_another = _is_of_another(config, node, report.copy_id)
        is_needed = node in self.wanted(config) and report.store_id == config.store_id and not is_of_another
        is_named = config.ids.get(node) == report.copy_id
        return not is_named and not is_needed and self.copies.serves(config)


def _is_of_another(config: Configuration, node: str, copy_id: str) -> bool:
    """Whether that id is the one of the shard's copy on another node: no two may grant under one id."""
    return any(each == copy_id and at != node for at, each in config.ids.items())


def without_empty_nodes(cluster_map: ClusterMap) -> list[Node]:
    """The nodes of the map that have a shard of their own or a copy of another one."""
    homes = {shard.id for shard in cluster_map.shards}
    needed = {node for shard in cluster_map.shards for node in shard.nodes}
    return [node for node in cluster_map.nodes if node.id in homes or node.id in needed]


def _as_place(cluster_map: ClusterMap, node: Node, heard: Heard, limits: Limits, now: float) -> Node:
    """The node, given up where no copy may lie."""
    home = cluster_map.shard(node.id)
    is_out = bool(limits.down_out_s) and heard.detector.silent_for(node.id, now) >= limits.down_out_s
    return msgspec.structs.replace(node, given_up=node.given_up or is_out or not _stays(home))


def _stays(shard: Shard | None) -> bool:
    return shard is not None and shard.state != "leaving"
