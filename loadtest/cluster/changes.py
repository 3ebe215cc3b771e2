"""Changes of a cluster's members: asking for one until it is taken down, and waiting until it has come true.

Owns: what each change is as a request, who gives and who gets partitions, how its end shows in GET /v1/cluster.
Promises: a change is asked for again while it cannot be known whether it was heard.
Leaves to others: which changes and when (loadtest.chaos).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from loadtest.drivers.aio import Wire

_ASK_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 40.0
_POLL_S = 0.05


class ChangeError(Exception):
    """A change was refused, or does not end; the message says what and when."""


class Change(NamedTuple):
    """What is asked for.
    Add or remove the shard, give it a weight, or cancel what has not moved and plan it again (only while no shard
    joins or leaves)."""

    verb: Literal["add", "remove", "weigh", "replan"]
    shard: str = ""
    weight: int = 1

    def __str__(self) -> str:
        return f"{self.verb} {self.shard}".strip() + (f" {self.weight}" if self.verb == "weigh" else "")

    def shards(self, members: Mapping[str, int]) -> tuple[list[str], list[str]]:
        """(sources, destinations) of its moves, given the members and their weights before it."""
        others = [shard for shard in members if shard != self.shard]
        gains = self.verb == "add" or (self.verb == "weigh" and self.weight > members[self.shard])
        return (others, [self.shard]) if gains else ([self.shard], others)

    def after(self, members: Mapping[str, int]) -> dict[str, int]:
        """The members and their weights when it is done."""
        if self.verb == "replan":
            return dict(members)
        if self.verb == "remove":
            return {shard: weight for shard, weight in members.items() if shard != self.shard}
        return {**members, self.shard: self.weight}


async def cluster(wire: Wire) -> dict[str, Any]:
    """GET /v1/cluster; empty if it is refused."""
    reply = await wire.ask("GET", "/v1/cluster")
    return msgspec.json.decode(reply.body) if reply.status == 200 else {}


async def known(wire: Wire) -> list[dict[str, Any]] | None:
    """GET /v1/changes, in the order in which they began; None if it is refused."""
    reply = await wire.ask("GET", "/v1/changes")
    return msgspec.json.decode(reply.body)["items"][::-1] if reply.status == 200 else None


async def ask(wire: Wire, change: Change) -> None:
    """Until it is known to be taken down. Raises ChangeError."""
    if change.verb == "replan":
        await _insist(wire, change, "DELETE", "/v1/moves", None)
    await _insist(wire, change, *request_of(change))


def request_of(change: Change) -> tuple[str, str, bytes | None]:
    """Method, path and body of the call that asks for it; of a `replan` the second one, after DELETE /v1/moves."""
    method, path, body = {
        "add": ("POST", "/v1/shards", {"id": change.shard, "weight": change.weight}),
        "remove": ("DELETE", f"/v1/shards/{change.shard}", None),
        "weigh": ("PATCH", f"/v1/shards/{change.shard}", {"weight": change.weight}),
        "replan": ("POST", "/v1/moves", None),
    }[change.verb]
    return method, path, None if body is None else msgspec.json.encode(body)


async def _insist(wire: Wire, change: Change, method: str, path: str, encoded: bytes | None) -> None:
    deadline_s, is_told = time.monotonic() + _ASK_TIMEOUT_S, False
    while True:
        reply = await wire.ask(method, path, encoded)
        was_heard = is_told and reply.status == {"add": 409, "remove": 404}.get(change.verb)
        if reply.status == 202 or (was_heard and await _is_there(wire, change.shard) == (change.verb == "add")):
            return
        if time.monotonic() > deadline_s or (reply.status == 404 and not was_heard):
            raise ChangeError(f"{change} was answered {reply.words}")
        is_told = is_told or reply.outcome == "unknown"
        await asyncio.sleep(_POLL_S)


async def _is_there(wire: Wire, shard: str) -> bool:
    """A member, or wanted."""
    document = await cluster(wire)
    return shard in [*(each["id"] for each in document.get("shards", [])), *(document.get("wanted") or [])]


async def until_settled(wire: Wire, members: Mapping[str, int]) -> dict[str, Any]:
    """Nothing moves, and the members are these, with these weights; /v1/cluster as it is then. Raises ChangeError."""
    return await _until(wire, lambda document: _is_settled(document, members), "end")


async def _until(wire: Wire, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        document = await cluster(wire)
        if document and condition(document):
            return document
        if time.monotonic() > deadline_s:
            raise ChangeError(f"the change does not {what}: {document}")
        await asyncio.sleep(_POLL_S)


def _is_settled(document: dict[str, Any], members: Mapping[str, int]) -> bool:
    shards = {shard["id"]: shard["weight"] for shard in document["shards"] if shard["state"] == "up"}
    return document["moves"] == [] and document["ending"] == [] and shards == members
