"""Following a change of the cluster to its end: how far it is, what it waits for, whether somebody cancelled it.

Owns: what the documents of GET /v1/cluster say about a change, one after the other; when it is done.
Promises: a router or controller that is away for a moment is waited for; nothing is asked of the cluster here that
changes it.
Leaves to others: asking for the change and telling its end (`shards`), drawing (`move_progress`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from kvstore.cli.frame import printable
from kvstore.cli.move_progress import MoveProgress
from kvstore.client import Client
from kvstore.errors import KvError, Unavailable

_POLL_S = 0.25
_AWAY_S_MAX = 60.0
_WAITING_PATIENCE_S = 1.0
_STARTING_PATIENCE_S = 15.0
_CANCELLED_S = 1.5  # so long it has to look like it: counts, moves and the map are not told as of one instant

Document = Mapping[str, Any]
Verdict = Literal["under way", "done", "cancelled"]


class Goal(Protocol):
    """What is waited for."""

    def judge(self, document: Document) -> Verdict:
        """Of documents one after the other, each of a map in which the change is."""
        ...


class Cancelled(Exception):
    """Somebody else has cancelled the change, or asked for the contrary."""


class Joins:
    """The shard is up, and no move stands any more."""

    def __init__(self, shard_id: str, weight: int = 1) -> None:
        self._shard_id = shard_id
        self._weight = weight

    def judge(self, document: Document) -> Verdict:
        state = state_of(document, self._shard_id)
        if state is None:
            wanted = document["wanted"]
            return "under way" if wanted is None or self._shard_id in wanted else "cancelled"
        if state == "leaving":
            return "cancelled"
        return "done" if state == "up" and not document["moves"] else "under way"

    def under_way(self, document: Document) -> Literal["wanted", "joining"] | None:
        """What has become of it if somebody has asked for the same already."""
        if self._shard_id in (document["wanted"] or ()):
            return "wanted"
        same = {"id": self._shard_id, "state": "joining", "weight": self._weight}
        return "joining" if any(same.items() <= shard.items() for shard in document["shards"]) else None


class Leaves:
    """The shard is no member any more, and its process has ended if `kvstore up` runs it."""

    def __init__(self, shard_id: str) -> None:
        self._shard_id = shard_id

    def judge(self, document: Document) -> Verdict:
        state = state_of(document, self._shard_id)
        if state is None:
            ending = document["ending"]
            return "done" if ending is not None and self._shard_id not in ending else "under way"
        # One that leaves is no member any more as soon as nothing is left to move.
        is_told = document["ending"] is not None
        return "cancelled" if state in ("up", "joining") or (is_told and not document["moves"]) else "under way"


class GivenUp:
    """The shard is no member any more: its partitions are open, with other shards."""

    def __init__(self, shard_id: str) -> None:
        self._shard_id = shard_id

    def judge(self, document: Document) -> Verdict:
        return "done" if state_of(document, self._shard_id) is None else "under way"


class Settles:
    """No move stands any more."""

    def judge(self, document: Document) -> Verdict:
        return "under way" if document["moves"] or document["ending"] is None else "done"


def state_of(document: Document, shard_id: str) -> str | None:
    """None if it is no member."""
    return next((str(shard["state"]) for shard in document["shards"] if shard["id"] == shard_id), None)


class Figures(NamedTuple):
    """What has moved and what is to move, of the present or last change; `pause_ms`: the longest write pause."""

    partitions: float = 0.0
    partitions_total: int = 0
    keys: int = 0
    bytes: int = 0
    pause_ms: float = 0.0

    def plus(self, other: Figures) -> Figures:
        return Figures(
            self.partitions + other.partitions,
            self.partitions_total + other.partitions_total,
            self.keys + other.keys,
            self.bytes + other.bytes,
            max(self.pause_ms, other.pause_ms),
        )


def committed(last: Document | None) -> Figures:
    """Those of the moves that are done, from `last_change`."""
    if last is None:
        return Figures()
    return Figures(
        last["partitions"], last["partitions"], last["keys"], last["bytes"], float(last["write_pause_ms_max"])
    )


def under_way(document: Document) -> Figures:
    """Those of the moves that stand; the part of a move that is done counts as a part of its partitions."""
    total = Figures()
    for move in document["moves"]:
        part = min(move["keys_done"] / move["keys_total"], 1.0) if move["keys_total"] else 0.0
        done = move["partitions"] * part
        pause_ms = float(move["write_pause_ms"])
        total = total.plus(Figures(done, move["partitions"], move["keys_done"], move["bytes_done"], pause_ms))
    return total


class Tally:
    """The figures of one change, over documents one after the other.

    `before`: the document before the change was asked for. What the controller counted for an earlier change is left
    out, and what it counted before it was restarted is kept.
    """

    def __init__(self, before: Document) -> None:
        self._earlier = None if before["moves"] else before["last_change"]
        self._kept = Figures()
        self._committed = Figures()
        self._seconds = 0.0
        self._expected = 0
        self._is_known = False

    def take(self, document: Document) -> Figures:
        """All that has moved so far and all that is to move."""
        last = document["last_change"]
        self._is_known = last is not None and last != self._earlier
        if last is not None and self._is_known:
            if last["seconds"] < self._seconds:  # it counts from nothing again
                self._kept = self._kept.plus(self._committed)
                self._expected -= self._committed.partitions_total
            self._committed, self._seconds = committed(last), last["seconds"]
        standing = under_way(document)
        if document["moves"]:
            self._expected = self._committed.partitions_total + standing.partitions_total
        return self._kept.plus(self._committed).plus(standing)

    def fell_short(self) -> bool:
        """Whether less was done than was to do, as far as that can be told. Asked when no move stands any more."""
        return self._is_known and self._committed.partitions_total < self._expected


async def follow(kv: Client, goal: Goal, progress: MoveProgress, before: Document, epoch: int) -> Figures:
    """Until the goal is reached, `epoch` being that of the first map with the change.

    Raises Cancelled; Unavailable when the router has not answered for a minute.
    """
    tally, watch = Tally(before), _Watch(kv, progress)
    clock, suspected_s = asyncio.get_running_loop().time, None
    while True:
        document = await watch.document()
        if document is not None and document["epoch"] >= epoch:
            progress.show(figures := tally.take(document))
            verdict = goal.judge(document)
            short = verdict == "done" and not isinstance(goal, Leaves) and tally.fell_short()
            if verdict == "done" and not short:
                return figures
            if verdict == "under way":
                suspected_s = None
            elif suspected_s is None:
                suspected_s = clock()
            elif clock() >= suspected_s + _CANCELLED_S:
                raise Cancelled
        await asyncio.sleep(_POLL_S)


class _Watch:
    """Asks the router, and says what is waited for, each thing once."""

    def __init__(self, kv: Client, progress: MoveProgress) -> None:
        self._kv = kv
        self._progress = progress
        self._clock = asyncio.get_running_loop().time
        self._began_s = self._heard_s = self._clock()
        self._waiting: dict[str, float] = {}
        self._told: set[str] = set()
        self._away = ""
        self._is_slow = False

    async def document(self) -> Document | None:
        """GET /v1/cluster, None while the router does not answer. Raises what it answered last after a minute."""
        try:
            document = await self._kv.cluster()
        except KvError as error:
            if self._clock() - self._heard_s > _AWAY_S_MAX:
                next_step = "The change goes on by itself; `kvstore status` shows how far it is, once it answers."
                raise Unavailable(error.detail, next_step=next_step) from None
            self._note_away(f"the router does not answer ({error.detail})")
            return None
        self._heard_s = self._clock()
        self._note_away("the controller does not answer" if document["ending"] is None else "")
        self._note_starting(document)
        self._note_waiting({_waiting_for(move) for move in document["moves"] if move["step"] == "waiting"})
        return document

    def _note_waiting(self, lines: set[str]) -> None:
        now_s = self._clock()
        self._waiting = {line: self._waiting.get(line, now_s) for line in sorted(lines)}
        for line, since_s in self._waiting.items():
            if line not in self._told and now_s >= since_s + _WAITING_PATIENCE_S:
                self._told.add(line)
                self._progress.say(f"waiting: {line}")
        if self._told and not lines:
            self._told.clear()
            self._progress.say("going on")

    def _note_away(self, reason: str) -> None:
        if reason and not self._away:
            self._progress.say(f"waiting: {printable(reason)}")
        if self._away and not reason:
            self._progress.say("it answers again")
        self._away = reason

    def _note_starting(self, document: Document) -> None:
        """A shard that was to be started and does not come: who started `kvstore up` can see why."""
        if not self._is_slow and document["wanted"] and self._clock() > self._began_s + _STARTING_PATIENCE_S:
            self._is_slow = True
            shard_id = document["wanted"][0]
            self._progress.say(
                f"waiting: {shard_id} has not come yet; the log of `kvstore up` says why (another process may run with "
                f"its data, or its file be of another cluster). `kvstore shard remove {shard_id}` gives it up"
            )


def _waiting_for(move: Document) -> str:
    return f"{move['from']} to {move['to']}: {printable(str(move['detail']))}"
