"""Adding, removing and weighing shards while everything else goes wrong.

Owns: which change is asked for, asking without patience for ever, and waiting for the end of all changes.
Promises: at the end of a phase every change that was answered 202 is known by its id, and has ended: done, with the
members that it asks for, or cancelled if something was, or superseded by another one of the same shard.
Leaves to others: what a change asks for and how (loadtest.cluster.changes), when (schedule).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from loadtest.cluster import changes
from loadtest.cluster.changes import Change
from loadtest.drivers.aio import Wire
from loadtest.workloads.answers import Reply

_INSIST_S = 4.0
_MOVE_S = 2.0
_POLL_S = 0.1
_FORWARD_MAX = 4
_MORE_SHARDS_MAX = 2
_FEWER_SHARDS_MAX = 1
_WEIGHT_MAX = 4


class Move(NamedTuple):
    """Partitions on their way, by the ids of their shards."""

    source: str
    destination: str


class Reshard:
    """`shards`: how many the cluster began with; about so many it has all the time."""

    def __init__(self, wire: Wire, shards: int) -> None:
        self._wire = wire
        self._shards = shards
        self._last_number = shards
        self._members = {f"s{number}": 1 for number in range(1, shards + 1)}  # as they are to become
        self._taken: dict[str, Change] = {}  # by the id of the answer 202, since the last time that all had ended
        self._asked: list[Change] = []  # whatever was answered
        self._cancelled = False  # something was, perhaps, since then
        self._left_over = False  # what was cancelled is not planned again yet
        self._one_by_one = asyncio.Lock()
        self._doers: dict[str, Callable[[random.Random], Awaitable[tuple[list[str], str]]]] = {
            "add": self._add_or_remove,
            "remove": self._remove_or_add,
            "weigh": self._weigh,
            "cancel": self._cancel,
            "two at once": self._two,
        }

    async def do(self, kind: str, rng: random.Random) -> tuple[list[str], str]:
        """The shards, and how it was answered. One after the other, however they are asked for."""
        async with self._one_by_one:
            return await self._doers[kind](rng)

    async def _add_or_remove(self, rng: random.Random) -> tuple[list[str], str]:
        return await self._ask(self._new() if self._may_grow else self._leaver(rng))

    async def _remove_or_add(self, rng: random.Random) -> tuple[list[str], str]:
        return await self._ask(self._leaver(rng) if self._may_shrink else self._new())

    async def _weigh(self, rng: random.Random) -> tuple[list[str], str]:
        return await self._ask(Change("weigh", self._any(rng), rng.randint(1, _WEIGHT_MAX)))

    async def _two(self, rng: random.Random) -> tuple[list[str], str]:
        first = self._new() if self._may_grow else self._leaver(rng)
        asking = asyncio.create_task(self._ask(first))
        await asyncio.sleep(rng.uniform(0.0, 0.4))
        others = [shard for shard in self._members if shard != first.shard]
        second = Change("weigh", rng.choice(others), rng.randint(1, _WEIGHT_MAX))
        if self._may_shrink and first.verb == "add" and rng.random() < 0.5:
            second = Change("remove", second.shard)
        found = await asyncio.gather(asking, self._ask(second))
        return [shard for shards, _ in found for shard in shards], "; ".join(note for _, note in found)

    async def _cancel(self, rng: random.Random) -> tuple[list[str], str]:
        """A change, and soon after that it is cancelled, with whatever else is under way."""
        shards, note = await self._ask(Change("weigh", self._any(rng), _WEIGHT_MAX + 1))
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        self._cancelled = self._left_over = True
        reply = await self._insist("DELETE", "/v1/moves", None)
        return shards, f"{note}; cancel: {reply.words}"

    async def a_move(self) -> Move | None:
        """One that is being carried out; None if there is none for a moment."""
        deadline_s = time.monotonic() + _MOVE_S
        while time.monotonic() < deadline_s:
            document = await changes.cluster(self._wire)
            begun = [move for move in document.get("moves") or [] if move["step"] in ("copy", "tail", "freeze")]
            if begun:
                return Move(begun[0]["from"], begun[0]["to"])
            await asyncio.sleep(_POLL_S / 5)
        return None

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def _may_grow(self) -> bool:
        return len(self._members) < self._shards + _MORE_SHARDS_MAX

    @property
    def _may_shrink(self) -> bool:
        return len(self._members) > max(2, self._shards - _FEWER_SHARDS_MAX)

    def _new(self) -> Change:
        """A name is never used again."""
        self._last_number += 1
        return Change("add", f"s{self._last_number}")

    def _any(self, rng: random.Random) -> str:
        return rng.choice(sorted(self._members))

    def _leaver(self, rng: random.Random) -> Change:
        return Change("remove", self._any(rng))

    async def _ask(self, change: Change) -> tuple[list[str], str]:
        self._asked.append(change)
        self._members = change.after(self._members)  # before the answer: the next change is not to fall on it
        reply = await self._insist(*change.request)
        if reply.status == 202:
            self._taken[reply.change] = change
        return [change.shard], f"{change}: {reply.words}"

    async def _insist(self, method: str, path: str, body: bytes | None) -> Reply:
        """Until it is taken down, or there is no such shard, or for some time in vain.
        A 409 may be for the moment."""
        deadline_s = time.monotonic() + _INSIST_S
        while True:
            reply = await self._wire.ask(method, path, body)
            if reply.status in (202, 404) or time.monotonic() > deadline_s:
                return reply
            await asyncio.sleep(_POLL_S)

    # --- afterwards --------------------------------------------------------------------------------------------------

    async def settle(self, timeout_s: float) -> str:
        """Wait until no change runs any more: a sentence if one of them has not come about.
        What was cancelled is planned again. Raises NotSettled if nothing comes forward for that long."""
        began_s, deadline = time.monotonic(), Forward(time.monotonic(), timeout_s)
        while True:
            if self._left_over:
                self._left_over = (await self._insist("POST", "/v1/moves", None)).status != 202
            known = await changes.known(self._wire)
            document = await changes.cluster(self._wire)
            running = [change for change in known or [] if change["state"] == "running"]
            if document and known is not None and not running and not self._left_over and is_settled(document):
                return self._judge(document, known)
            if deadline.is_over(time.monotonic(), document.get("epoch") or 0):
                shown = {name: document.get(name) for name in ("epoch", "shards", "nodes", "moves", "ending", "wanted")}
                waited_s = time.monotonic() - began_s
                raise NotSettled(
                    f"{waited_s:.0f} s after all faults were over, there are changes that run, or copies that are not "
                    f"in sync: {running}, {shown}"
                )
            await asyncio.sleep(_POLL_S)

    def _judge(self, document: dict[str, Any], known: list[dict[str, Any]]) -> str:
        """Of changes that have all ended. Those that are not known by now were taken down, and lost."""
        found = {shard["id"]: shard["weight"] for shard in document["shards"]}
        states = {change["id"]: change["state"] for change in known}
        wrong = [
            f"{change} ({states.get(change_id, 'not known')})"
            for change_id, change in self._taken.items()
            if not self._may_be(states.get(change_id), change)
        ]
        last = {change["shard"]: change["kind"] for change in known if change["state"] == "done" and change["shard"]}
        for shard, kind in last.items():
            if (kind in ("add", "remove")) and (shard in found) != (kind == "add"):
                wrong.append(f"{kind} {shard} (done)")
        self._members, self._taken, self._cancelled = found, {}, False
        return f"taken down (202), and not so: {', '.join(wrong)}; the members are {', '.join(found)}" if wrong else ""

    def _may_be(self, state: str | None, change: Change) -> bool:
        if state == "superseded":
            return any(other is not change and other.shard == change.shard for other in self._asked)
        return state == "done" or (state == "cancelled" and self._cancelled)


class NotSettled(Exception):
    """Changes or copies have not come to their end, as the message says."""


class Forward:
    """A deadline that lies `timeout_s` behind the last change of the map, but not behind `_FORWARD_MAX` times that.

    On a machine that is busy with something else moves and copies take their time; each step of theirs is a new epoch.
    """

    def __init__(self, now_s: float, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until_s, self._until_max_s = now_s + timeout_s, now_s + _FORWARD_MAX * timeout_s
        self._done = 0

    def is_over(self, now_s: float, done: int) -> bool:
        """`done`: the epoch by now."""
        if done > self._done:
            self._done = done
            self._until_s = min(now_s + self._timeout_s, self._until_max_s)
        return now_s > self._until_s


def is_settled(document: dict[str, Any]) -> bool:
    """Of GET /v1/cluster."""
    copies = min(document["replicas"], len(document["nodes"])) - 1
    is_up = all(
        shard["state"] == "up" and [copy["state"] for copy in shard["copies"]] == ["in-sync"] * copies
        for shard in document["shards"]
    )
    return is_up and document["moves"] == document["ending"] == document["wanted"] == []  # null: not known
