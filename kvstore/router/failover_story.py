"""What is seen of one failover from outside.
Looks at the map and at what nodes told, put into words as they change.

Owns: the order in which things are noticed, and the words; when it is over.
Promises: pure. Every step is one that was seen in a map that the router follows, or that the controller has told; how
long ago a node said it is told with it.
Leaves to others: looking, and the kill itself (`demo_failover`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from kvstore.placement.cluster_map import ClusterMap

Kind = Literal[
    "killed", "silent", "lease", "promoted", "serves", "out", "back", "in-sync", "home", "acknowledged",
]  # fmt: skip
Position = Mapping[str, Any]
HOME_S = 25.0  # after all is in sync again: the controller lets a shard go home after ten

_NO_POSITION: Position = {"term": 0, "number": 0, "silent_s": 0.0, "told_s": 0.0, "serves": False, "role": ""}


class Step(NamedTuple):
    """`shard`: None if it is about the node."""

    at_ms: float
    kind: Kind
    says: str
    shard: str | None = None


class Look(NamedTuple):
    """What is known at a moment. `facts`: of the controller; None while it does not answer."""

    at_ms: float
    cluster_map: ClusterMap
    facts: Mapping[str, Any] | None


class FailoverStory:
    """Of one node, killed at `killed_ms`. `led`: the shards whose primary was there; `kept`: those of its copies."""

    def __init__(self, node: str, cluster_map: ClusterMap, killed_ms: float, lease_s: float) -> None:
        self.node = node
        self.led = [shard.id for shard in cluster_map.shards if shard.primary.node == node]
        self.kept = [shard.id for shard in cluster_map.shards if node in shard.nodes[1:]]
        self.is_over = False
        self.is_home = False
        self.positions: dict[str, Sequence[Position]] = {}
        self._killed_ms = killed_ms
        self._lease_s = lease_s
        self._seen: dict[tuple[Kind, str | None], None] = {}
        self._in_sync_ms: float | None = None

    def look(self, look: Look) -> list[Step]:
        """What is new."""
        found: list[Step] = []
        if look.facts is not None:
            self.positions = {shard: look.facts["positions"].get(shard, ()) for shard in (*self.led, *self.kept)}
            self._look_at_node(look, look.facts, found)
        for shard_id in self.led:
            self._look_at_primary(look, shard_id, found)
        for shard_id in (*self.led, *self.kept):
            self._look_at_copy(look, shard_id, found)
        self._look_at_end(look)
        return found

    def _has_seen(self, kind: Kind) -> bool:
        return any(seen == kind for seen, _ in self._seen)

    def _note(self, found: list[Step], look: Look, kind: Kind, says: str, shard: str | None = None) -> None:
        if (kind, shard) not in self._seen:
            self._seen[kind, shard] = None
            found.append(Step(look.at_ms, kind, says, shard))

    def _after_s(self, look: Look) -> str:
        return f"{(look.at_ms - self._killed_ms) / 1000:.1f} s"

    def _look_at_node(self, look: Look, facts: Mapping[str, Any], found: list[Step]) -> None:
        silent_s = facts["silent"].get(self.node)
        if silent_s is not None:
            says = f"The controller has not heard node {self.node} for {silent_s:.1f} s, and holds it for dead."
            self._note(found, look, "silent", says)
        elif self._has_seen("silent"):
            self._note_back(look, found)

    def _note_back(self, look: Look, found: list[Step]) -> None:
        says = f"Node {self.node} is heard again, {self._after_s(look)} after its end."
        self._note(found, look, "back", says)

    def _position(self, shard_id: str, node: str) -> Position | None:
        return next((each for each in self.positions.get(shard_id, ()) if each["node"] == node), None)

    def _look_at_primary(self, look: Look, shard_id: str, found: list[Step]) -> None:
        shard = look.cluster_map.shard(shard_id)
        if shard is None:
            return
        now_at = shard.primary.node
        if now_at == self.node:
            if ("promoted", shard_id) not in self._seen:
                self._look_at_lease(look, shard_id, found)
            elif ("in-sync", shard_id) in self._seen:
                says = f"Shard {shard_id} is back on node {self.node}, in term {shard.term}: a planned change."
                self._note(found, look, "home", says, shard_id)
            return
        position = self._position(shard_id, now_at) or _NO_POSITION
        self._note_lease(look, shard_id, now_at, f"longer than {self._lease_s:g} s, or it could not be promoted", found)
        end = f", its log ends at number {position['number']}" if position["number"] else ""
        says = f"Node {now_at} is the primary of {shard_id} in the new term {shard.term}{end}."
        self._note(found, look, "promoted", says, shard_id)
        if position["serves"] and position["role"] == "primary":
            says = f"Node {now_at} has opened {shard_id} in term {shard.term}, and serves it."
            self._note(found, look, "serves", says, shard_id)

    def _look_at_lease(self, look: Look, shard_id: str, found: list[Step]) -> None:
        for position in self.positions.get(shard_id, ()):
            silent_s = position["silent_s"] + position["told_s"]
            if position["role"] == "copy" and silent_s >= self._lease_s:
                self._note_lease(look, shard_id, position["node"], f"{silent_s:.1f} s", found)

    def _note_lease(self, look: Look, shard_id: str, node: str, silence: str, found: list[Step]) -> None:
        says = (
            f"Node {node} has not heard the primary of {shard_id} for {silence}: the lease of {self._lease_s:g} s that "
            "it had granted is over, so the old primary answers nothing more."
        )
        self._note(found, look, "lease", says, shard_id)

    def _look_at_copy(self, look: Look, shard_id: str, found: list[Step]) -> None:
        shard = look.cluster_map.shard(shard_id)
        copy = next((each for each in shard.replicas if each.node == self.node), None) if shard is not None else None
        if copy is None:
            return
        if copy.state == "joining":
            says = f"The copy of {shard_id} on node {self.node} is out: nothing waits for it until it has caught up."
            self._note(found, look, "out", says, shard_id)
        elif ("out", shard_id) in self._seen:
            self._note_back(look, found)
            says = f"The copy of {shard_id} on node {self.node} has all that it lacked: it is in sync again."
            self._note(found, look, "in-sync", says, shard_id)

    def _look_at_end(self, look: Look) -> None:
        shards = [found for shard in (*self.led, *self.kept) if (found := look.cluster_map.shard(shard)) is not None]
        copies = [copy for shard in shards for copy in shard.replicas]
        if not self._has_seen("back") or not all(copy.state == "in-sync" for copy in copies):
            self._in_sync_ms = None
            return
        if self._in_sync_ms is None:
            self._in_sync_ms = look.at_ms
        self.is_home = all(
            shard.primary.node == self.node and (self._position(shard.id, self.node) or _NO_POSITION)["serves"]
            for shard in shards
            if shard.id in self.led
        )
        self.is_over = self.is_home or look.at_ms - self._in_sync_ms >= HOME_S * 1000
