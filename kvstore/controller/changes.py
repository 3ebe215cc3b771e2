"""A change of the cluster as a resource: what was asked for, how far it is, how it ended.

Owns: `Change`, which the controller's document keeps; which change takes up, supersedes or cancels which others; when
one has reached its goal; how many that ended are kept.
Promises: pure. An id is random and never used again, also after the controller's file was lost. A change that ended
stays as it is. Of the same change at most one runs at a time, so the members bound the number of those that run.
Leaves to others: the state that they are a part of (`change_steps`), marking them as done (`closer`), how they are
shown (`change_report`).

    begun ──> running ──┬─> done        its goal is reached, and clients are answered for all that it moved
                        ├─> cancelled   the moves were cancelled before
                        └─> superseded  another change asks for the contrary, or for something else of the same shard

A change moves what it has planned: each move of the map names the change that it belongs to. A plan made for a later
change keeps the moves that still lead to the right place with the change that planned them.

Another kind of change needs a name in `Kind`, its goal in `is_reached`, and an entry in `_SUPERSEDES` if it overrules
others.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from typing import Literal

import msgspec

from kvstore.placement.cluster_map import ClusterMap, Move, Shard
from kvstore.placement.copies import copies_that_fit

Kind = Literal[
    "add", "remove", "remove-lost", "weight", "rebalance", "cancel", "accept-old", "recover",
    "promote", "replicas", "failover", "rebuild",
]  # fmt: skip
State = Literal["running", "done", "cancelled", "superseded"]

_SUPERSEDES: Mapping[Kind, frozenset[Kind]] = {  # of the same shard
    "remove": frozenset({"add", "weight", "promote"}),
    "remove-lost": frozenset({"add", "weight", "remove", "promote"}),
    "weight": frozenset({"weight"}),
    "promote": frozenset({"promote"}),
    "replicas": frozenset({"replicas"}),
}
_OVERTAKES_ALL: Container[Kind] = ("recover",)


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One change. Times are Unix time. `shard`, `weight`, `replicas` and `to` (a node) as they were asked for.

    `partitions`, `keys`, `bytes` and `groups`: of its moves that are committed; `left`: partitions that it had planned
    and that had not moved when it ended. `keys_expected`: what it moves in all, as estimated with the last plan; None
    if a source could not be measured. `pause_ms_max` and `pause_ms_p99`: of the write pauses of its moves.
    """

    id: str
    kind: Kind
    began_ms: int
    shard: str | None = None
    weight: int | None = None
    to: str | None = None
    replicas: int | None = None
    state: State = "running"
    detail: str = ""
    ended_ms: int | None = None
    partitions: int = 0
    left: int = 0
    keys: int = 0
    bytes: int = 0
    groups: int = 0
    keys_expected: int | None = None
    pause_ms_max: float = 0.0
    pause_ms_p99: float = 0.0

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.state == "running"


class Pauses(msgspec.Struct, frozen=True):
    """The longest write pause of a change's moves, and the nearest-rank percentile 99, in milliseconds."""

    max_ms: float = 0.0
    p99_ms: float = 0.0


def find(changes: Sequence[Change], change_id: str) -> Change | None:
    """The change of that id, or None."""
    return next((change for change in changes if change.id == change_id), None)


def running_like(changes: Sequence[Change], asked: Change) -> Change | None:
    """The change under way that asks for just the same, if there is one: asking again does not begin another."""
    return next((c for c in changes if c.is_running and _goal(c) == _goal(asked)), None)


def _goal(change: Change) -> tuple[object, ...]:
    return change.kind, change.shard, change.weight, change.to, change.replicas


def joining(changes: Sequence[Change], shard_id: str) -> Change | None:
    """The change under way that adds that shard."""
    return next((c for c in changes if c.is_running and (c.kind, c.shard) == ("add", shard_id)), None)


def begun(changes: Sequence[Change], change: Change, planned: Mapping[str, int], now_ms: int) -> list[Change]:
    """With the change, and without going on with those that it overrules.

    `planned`: how many partitions stand to be moved by each change, by its id.
    """
    why = f"Superseded by change {change.id} ({named(change)})"
    before = [
        _ended(other, "superseded", why, planned, now_ms) if _overrules(change, other) else other for other in changes
    ]
    return [*before, change]


def cancelled(changes: Sequence[Change], by: str, planned: Mapping[str, int], now_ms: int) -> list[Change]:
    """None of them goes on: their moves were cancelled by the change of that id.

    What is asked of copies moves no partition, and goes on until another such change takes it back.
    """
    why = f"Cancelled by change {by}"
    return [_ended(c, "cancelled", why, planned, now_ms) if is_cancellable(c) and c.id != by else c for c in changes]


def is_cancellable(change: Change) -> bool:
    """Whether it runs, and is about moves."""
    return change.is_running and change.kind not in ("promote", "replicas")


def done(change: Change, now_ms: int, detail: str = "") -> Change:
    """The change has reached its goal."""
    return msgspec.structs.replace(change, state="done", ended_ms=now_ms, detail=detail)


def ended_early(change: Change, now_ms: int, why: str) -> Change:
    """The change cannot reach its goal any more."""
    return msgspec.structs.replace(change, state="cancelled", ended_ms=now_ms, detail=why)


def with_commit(change: Change, partitions: int, keys: int, size_bytes: int, pause_ms: float) -> Change:
    """A move of the change is done; writes to it have waited for so long by now."""
    return msgspec.structs.replace(
        change,
        partitions=change.partitions + partitions,
        keys=change.keys + keys,
        bytes=change.bytes + size_bytes,
        groups=change.groups + 1,
        pause_ms_max=max(change.pause_ms_max, pause_ms),
    )


def with_pauses(change: Change, pauses: Pauses) -> Change:
    """With these, too: those of before a restart of the controller are kept as the maximum of both."""
    return msgspec.structs.replace(
        change,
        pause_ms_max=max(change.pause_ms_max, pauses.max_ms),
        pause_ms_p99=max(change.pause_ms_p99, pauses.p99_ms),
    )


def kept(changes: Sequence[Change], ended_max: int) -> list[Change]:
    """All that run, and the last `ended_max` of those that ended, in the order in which they began."""
    ended = sorted((c for c in changes if not c.is_running), key=lambda c: c.ended_ms or 0)
    gone = {change.id for change in ended[: max(0, len(ended) - ended_max)]}
    return [change for change in changes if change.id not in gone]


def is_reached(change: Change, cluster_map: ClusterMap, wanted: Collection[str]) -> bool:
    """Whether the map shows what the change asks for."""
    if any(move.change == change.id for move in cluster_map.moves):
        return False
    found = cluster_map.shard(change.shard) if change.shard is not None else None
    match change.kind:
        case "add":
            return found is not None and found.state == "up" and _has_copies(cluster_map, found)
        case "remove" | "remove-lost":
            has_left = found is None and cluster_map.node(change.shard or "") is None
            return has_left and change.shard not in wanted
        case "promote":
            return found is not None and found.primary.node == change.to
        case "replicas":
            return cluster_map.replicas == change.replicas and all(
                _has_copies(cluster_map, shard) for shard in cluster_map.shards if shard.state != "leaving"
            )
        case "weight":
            return not any(change.shard in (move.source, move.to) for move in cluster_map.moves)
        case _:
            return not cluster_map.moves


def _has_copies(cluster_map: ClusterMap, shard: Shard) -> bool:
    """Whether the shard has as many copies as it is to have, all in sync.
    Those on the node that is its home count, too."""
    here = [copy for other in cluster_map.shards for copy in other.replicas if copy.node == shard.id]
    is_in_sync = all(copy.state == "in-sync" for copy in (*shard.replicas, *here))
    return is_in_sync and len(shard.replicas) == copies_that_fit(cluster_map)


def standing(moves: Sequence[Move]) -> dict[str, int]:
    """How many partitions each change is still to move, by its id."""
    left: dict[str, int] = {}
    for move in moves:
        left[move.change] = left.get(move.change, 0) + len(move.partitions)
    return left


def named(change: Change) -> str:
    """What was asked for, in words: "remove s5", "weight s1 2", "rebalance"."""
    words: list[object] = [change.kind, *([change.shard] if change.shard else [])]
    goal: dict[str, list[object]] = {
        "weight": [change.weight], "promote": ["to", change.to], "failover": ["to", change.to],
        "rebuild": ["on", change.to],
        "replicas": [change.replicas],
    }  # fmt: skip
    return " ".join(map(str, [*words, *goal.get(change.kind, [])]))


def _overrules(change: Change, other: Change) -> bool:
    if not other.is_running or change.kind in _OVERTAKES_ALL:
        return other.is_running
    return other.shard == change.shard and other.kind in _SUPERSEDES.get(change.kind, frozenset())


def _ended(change: Change, state: State, why: str, planned: Mapping[str, int], now_ms: int) -> Change:
    left = planned.get(change.id, 0)
    moved = f"{change.partitions} of {change.partitions + left} partitions had moved, and stay where they are"
    detail = f"{why}: {moved if left else 'nothing was left to move'}."
    return msgspec.structs.replace(change, state=state, ended_ms=now_ms, left=left, detail=detail)
