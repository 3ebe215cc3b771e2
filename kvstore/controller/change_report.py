"""Changes of the cluster as clients see them: the documents of GET /v1/changes and GET /v1/changes/{id}.

Owns: what stands in such a document, what a change waits for, in words.
Promises: pure; what the controller's document says and what is under way in memory are of one map.
Leaves to others: what is kept (`changes`), what is under way (`mover`), HTTP (`routes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvstore.controller import changes
from kvstore.controller.changes import Change, Pauses
from kvstore.controller.membership import ClusterState
from kvstore.environment import utc_text
from kvstore.placement.cluster_map import Move
from kvstore.transport.change_documents import Change as ChangeShown
from kvstore.transport.change_documents import LastChange, MoveUnderWay

_SLOW_START_MS = 15_000
_WAITING_SHOWN_MAX = 3
_MOVES_NOTHING = ("remove-lost", "promote", "replicas", "failover", "rebuild")


class Doing(NamedTuple):
    """What is under way of a change.
    `partitions`: those of its moves as far as they are copied, so 0.5 is half of one.

    `waiting`: what its moves wait for, each thing once; `at_work`: how many of them do not.
    """

    partitions: float = 0.0
    keys: int = 0
    bytes: int = 0
    at_work: int = 0
    waiting: tuple[str, ...] = ()

    def plus(self, move: Move, report: MoveUnderWay) -> Doing:
        """With that move, which is at that point."""
        copied = min(report.keys_done / report.keys_total, 1.0) if report.keys_total else 0.0
        line = f"{move.source} to {move.to}: {report.detail.removesuffix('.')}"
        is_waiting = report.step == "waiting"
        return Doing(
            self.partitions + len(move.partitions) * copied,
            self.keys + report.keys_done,
            self.bytes + report.bytes_done,
            self.at_work + (report.step not in ("waiting", "queued")),
            (*self.waiting, line) if is_waiting and line not in self.waiting else self.waiting,
        )


class Around(NamedTuple):
    """What is known of a change beside the state.
    `opening`: why partitions of a lost shard are not opened yet, "" if nothing is in the way; `unanswered`:
    partitions of a move that is committed are not answered for yet; `ending`: the process of the shard that was
    removed still runs; `copies`: the shards of which the node of a shard that is added lacks a copy in sync.
    """

    doing: Doing = Doing()
    pauses: Pauses = Pauses()
    opening: str = ""
    unanswered: bool = False
    ending: bool = False
    copies: tuple[str, ...] = ()


def described(change: Change, state: ClusterState, around: Around, now_ms: int) -> ChangeShown:
    """The document of the change."""
    doing = around.doing if change.is_running else Doing()
    change = changes.with_pauses(change, around.pauses)
    total = change.partitions + (_standing(change, state) if change.is_running else change.left)
    keys = change.keys + doing.keys
    waiting = waiting_for(change, state, around, now_ms) if change.is_running else ""
    ended_ms = change.ended_ms if change.ended_ms is not None else now_ms
    return ChangeShown(
        id=change.id,
        kind=change.kind,
        shard=change.shard,
        weight=change.weight,
        to=change.to,
        replicas=change.replicas,
        state=change.state,
        detail=change.detail or _detail(change, total, waiting),
        waiting_for=waiting or None,
        progress=_progress(change, total, doing),
        partitions_done=change.partitions,
        partitions_total=total,
        keys_done=keys,
        keys_total=_keys_total(change, keys),
        bytes_done=change.bytes + doing.bytes,
        groups_done=change.groups,
        started_at=utc_text(change.began_ms),
        ended_at=utc_text(change.ended_ms) if change.ended_ms is not None else None,
        seconds=max(0, ended_ms - change.began_ms) / 1000,
        write_pause_ms_max=change.pause_ms_max,
        write_pause_ms_p99=change.pause_ms_p99,
    )


def last_change(known: Sequence[Change], pauses: Mapping[str, Pauses], now_ms: int) -> LastChange | None:
    """`last` of GET /v1/moves: of the last change that has moved something, or is about to."""
    moving = [c for c in known if c.partitions or (c.is_running and c.kind not in _MOVES_NOTHING)]
    if not moving:
        return None
    change = changes.with_pauses(moving[-1], pauses.get(moving[-1].id, Pauses()))
    ended_ms = change.ended_ms if change.ended_ms is not None else now_ms
    return LastChange(
        partitions=change.partitions,
        keys=change.keys,
        bytes=change.bytes,
        groups=change.groups,
        seconds=max(0, ended_ms - change.began_ms) / 1000,
        write_pause_ms_max=change.pause_ms_max,
        write_pause_ms_p99=change.pause_ms_p99,
    )


def waiting_for(change: Change, state: ClusterState, around: Around, now_ms: int) -> str:
    """What a change under way waits for, empty if for nothing; without a full stop."""
    if change.kind == "add" and change.shard in state.wanted:
        if now_ms - change.began_ms < _SLOW_START_MS:
            return f"shard {change.shard}, which `kvstore up` is starting"
        return (
            f"{change.shard}, which has not come yet; the log of `kvstore up` says why (another process may run with "
            f"its data, or its file be of another cluster). `kvstore shard remove {change.shard}` gives it up"
        )
    if around.opening and change.kind == "remove-lost":
        return around.opening
    if around.doing.waiting:
        return "; ".join(around.doing.waiting[:_WAITING_SHOWN_MAX])
    if change.kind in ("promote", "replicas"):
        return _waits_for_copies(change, state)
    if around.unanswered:
        return "shards to hear that partitions are theirs now"
    if around.ending:
        return f"the process of shard {change.shard} to end"
    if around.copies and not _standing(change, state):
        return f"copies of {', '.join(around.copies[:_WAITING_SHOWN_MAX])} on node {change.shard} to be in sync"
    if state.map is not None and state.map.moves and not _standing(change, state):
        return "moves of other changes"
    return ""


def _waits_for_copies(change: Change, state: ClusterState) -> str:
    if state.map is None:
        return ""
    if change.kind == "promote":
        return f"the primary of shard {change.shard} to hand over to node {change.to}"
    joining = [
        f"{shard.id} on {copy.node}" for shard in state.map.shards for copy in shard.replicas if copy.state == "joining"
    ]
    if joining:
        more = len(joining) - _WAITING_SHOWN_MAX
        shown = ", ".join(joining[:_WAITING_SHOWN_MAX])
        return f"copies to be in sync: {shown}{f', and {more} more' if more > 0 else ''}"
    return "nodes to make or drop copies, which those that are down do when they are back"


def _standing(change: Change, state: ClusterState) -> int:
    return changes.standing(state.map.moves).get(change.id, 0) if state.map is not None else 0


def _detail(change: Change, total: int, waiting: str) -> str:
    if change.kind in ("promote", "replicas"):
        return "It is done." if change.state == "done" else f"It waits for this: {waiting}."
    if change.state == "done":
        return f"All {total} partitions have moved." if total else "It is done; no partition had to move."
    moved = f"{change.partitions} of {total} partitions have moved" if total else "Nothing has moved yet"
    return f"{moved}; it waits for this: {waiting}." if waiting else f"{moved}."


def _progress(change: Change, total: int, doing: Doing) -> float | None:
    if not total:
        return 1.0 if change.state == "done" else None
    return round(min(1.0, (change.partitions + doing.partitions) / total), 4)


def _keys_total(change: Change, keys: int) -> int | None:
    if change.state == "done":
        return keys
    return max(keys, change.keys_expected) if change.keys_expected is not None else None
