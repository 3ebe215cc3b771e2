"""What the controller has heard of the nodes: their last beats, who echoes, who stops.

Owns: the memory of one controller process; nothing of it is stored.
Promises: a node is heard only while it echoes this process's answers, or has just announced itself; the copies of
another one take over from no primary.
Leaves to others: since when a node is silent (`failure_detector`), what follows from it (`replicas`), where copies go
(`copy_places`). Times are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvstore.config import Limits
from kvstore.controller.failure_detector import FailureDetector
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication import beats, failover
from kvstore.replication.beats import Beat, CopyReport

_ECHOES_MAX = 2  # answers lost in a row: a node beats again only once the last beat is answered, or given up


class NodeHeard(NamedTuple):
    """A node: its last beat and when it came.
    The number of the last answer to it; when the first beat came by which its process stops."""

    beat: Beat | None = None
    at: float = float("-inf")
    number: int = 0
    stops_at: float | None = None


class Heard:
    """`start`: the id of this process, which nodes echo. `told`: by store id, the number of a committed record.

    Every copy in sync has that record, so one that ends below it is an older copy of its files.
    """

    def __init__(self, start: str, limits: Limits, now: float, told: Mapping[str, int] | None = None) -> None:
        self.start = start
        self._told: Mapping[str, int] = told if told is not None else {}
        self.detector = FailureDetector(limits.failover_after_s, now)
        self._nodes: dict[str, NodeHeard] = {}
        self._lacking: dict[tuple[str, str], float] = {}  # (node, copy id by the map): since when it is not reported
        self._synced: dict[tuple[str, str, int], float] = {}  # (shard, copy id, joined): since when it is in sync
        self._committed: dict[str, tuple[int, float]] = {}  # by store id: a number that was told, and since when
        self._asks_for_beats = False

    # --- what comes in

    def take(self, beat: Beat, now: float) -> int:
        """A beat has come; the number of the answer, which the node is to echo."""
        before = self._nodes.get(beat.node, NodeHeard())
        echoes = failover.is_echo((beat.echo.start, beat.echo.beat), self.start, before.number, _ECHOES_MAX)
        if echoes:
            self.detector.note(beat.node, now)
        stops_at = (now if before.stops_at is None else before.stops_at) if beat.stops else None
        self._nodes[beat.node] = NodeHeard(beat, now, before.number + 1, stops_at)
        return before.number + 1

    def announced(self, node: str, now: float) -> None:
        """The node has announced itself: it is heard without an echo, and what it told before its start is over."""
        number = self._nodes.get(node, NodeHeard()).number
        self._nodes[node] = NodeHeard(number=number)
        self.detector.note(node, now)

    def follow(self, cluster_map: ClusterMap, now: float) -> None:
        """Count by that map. From the first one on that asks for beats, silence counts."""
        asks = beats.beats(cluster_map)
        if asks and not self._asks_for_beats:
            self.detector.count_from(now)
        self._asks_for_beats = asks
        self._committed = {shard.store_id: self._committed_of(shard.store_id, now) for shard in cluster_map.shards}
        lacking, synced = self._lacking, self._synced
        self._lacking, self._synced = {}, {}
        for shard in cluster_map.shards:
            for place in [(shard.primary.node, shard.primary.copy_id), *((c.node, c.copy_id) for c in shard.replicas)]:
                if self.beat_of(place[0]) is not None and self.report(place[0], shard.id, place[1]) is None:
                    self._lacking[place] = lacking.get(place, now)
            for copy in shard.replicas:
                name = shard.id, copy.copy_id, copy.joined
                if copy.state == "in-sync" and not self.detector.is_silent(copy.node, now):
                    self._synced[name] = synced.get(name, now)
        nodes = {node.id for node in cluster_map.nodes}
        self._nodes = {node: heard for node, heard in self._nodes.items() if node in nodes}
        self.detector.keep(nodes)

    # --- what follows from it

    def beat_of(self, node: str) -> Beat | None:
        """The node's last beat."""
        return self._nodes.get(node, NodeHeard()).beat

    def stops(self, node: str) -> bool:
        """It told last that its process is about to end; not so any more once it has announced itself."""
        beat = self.beat_of(node)
        return beat is not None and beat.stops

    def told_since_stop(self, node: str, stopping: str) -> bool:
        """Whether a beat of the node came after the first one by which the other node's process stops."""
        stops_at = self._nodes.get(stopping, NodeHeard()).stops_at
        return stops_at is not None and self.told_at(node) > stops_at

    def told_at(self, node: str) -> float:
        """When its last beat came, whether it echoes or not."""
        return self._nodes.get(node, NodeHeard()).at

    def is_here(self, node: str, now: float) -> bool:
        """It has told of its copies, and is not held for dead."""
        return self.beat_of(node) is not None and not self.detector.is_silent(node, now)

    def report(self, node: str, shard: str, copy_id: str | None = None) -> CopyReport | None:
        """What the node told last of its copy of that shard, under that id if one is given."""
        beat = self.beat_of(node)
        reports = beat.copies if beat is not None else []
        return next((r for r in reports if r.shard == shard and copy_id in (None, r.copy_id)), None)

    def primary_silent_since(self, node: str, copy_id: str, now: float) -> float | None:
        """Since when the primary is not heard, if for so long that it is replaced.
        Its node is silent, or has another copy than that one."""
        if self.detector.is_silent(node, now):
            return self.detector.heard_at(node)
        return self._lacking[node, copy_id] if self.lacks(node, copy_id, now) else None

    def lacks(self, node: str, copy_id: str, now: float) -> bool:
        """Whether the node has told of its copies, and not of that one, which the map names.
        For so long that a silent one would be replaced."""
        since = self._lacking.get((node, copy_id))
        return since is not None and now - since >= self.detector.failover_after_s

    def in_sync_since(self, shard: str, copy_id: str, joined: int) -> float | None:
        """Since when that copy is in sync and its node is heard."""
        return self._synced.get((shard, copy_id, joined))

    def reports_of(self, shard: str, now: float) -> Iterator[failover.Report]:
        """What the nodes that are near told last of their copies of that shard; of damaged ones nothing.

        A node that tells and does not hear would not follow a map that promotes its copy.
        """
        for node, heard in self._nodes.items():
            for told in heard.beat.copies if heard.beat is not None and self.is_near(node, now) else ():
                if told.shard == shard and told.role != "damaged":
                    yield failover.Report(node, told.copy_id, heard.at, told.silent_s, told.term, told.number)

    def committed(self, store_id: str) -> int:
        """The number of a record that was committed, as its primaries told; 0 if nothing was told."""
        return self._told.get(store_id, 0)

    def committed_since(self, store_id: str) -> float:
        """Since when that number is known: what a node told before does not have it, whatever lies there."""
        return self._committed.get(store_id, (0, float("-inf")))[1]

    def _committed_of(self, store_id: str, now: float) -> tuple[int, float]:
        number = self.committed(store_id)
        if (before := self._committed.get(store_id)) is None:
            return number, float("-inf")
        return before if before[0] == number else (number, now)

    def is_near(self, node: str, now: float) -> bool:
        """What it asks for in its last beat still holds: it was heard with that beat, and not long ago."""
        return self.detector.is_near(node, self.told_at(node), now)

    @property
    def beats(self) -> Mapping[str, Beat]:
        """The last beat of each node."""
        return {node: heard.beat for node, heard in self._nodes.items() if heard.beat is not None}
