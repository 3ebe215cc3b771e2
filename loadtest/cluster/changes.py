"""Changes of a cluster's members, as clients ask for them.

Owns: what each change is as a request, and the members when it is done.
Promises: pure, but for the reads of /v1/cluster and /v1/changes.
Leaves to others: which changes and when (loadtest.chaos).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from loadtest.drivers.aio import Wire


class Change(NamedTuple):
    """What is asked for: add or remove the shard, or give it a weight."""

    verb: Literal["add", "remove", "weigh"]
    shard: str
    weight: int = 1

    def __str__(self) -> str:
        return f"{self.verb} {self.shard}" + (f" {self.weight}" if self.verb == "weigh" else "")

    def after(self, members: Mapping[str, int]) -> dict[str, int]:
        """The members and their weights when it is done."""
        if self.verb == "remove":
            return {shard: weight for shard, weight in members.items() if shard != self.shard}
        return {**members, self.shard: self.weight}

    @property
    def request(self) -> tuple[str, str, bytes | None]:
        """Method, path and body of the call that asks for it."""
        path = f"/v1/shards/{self.shard}"
        if self.verb == "remove":
            return "DELETE", path, None
        if self.verb == "weigh":
            return "PATCH", path, msgspec.json.encode({"weight": self.weight})
        return "POST", "/v1/shards", msgspec.json.encode({"id": self.shard, "weight": self.weight})


async def cluster(wire: Wire) -> dict[str, Any]:
    """GET /v1/cluster; empty if it is refused."""
    reply = await wire.ask("GET", "/v1/cluster")
    return msgspec.json.decode(reply.body) if reply.status == 200 else {}


async def known(wire: Wire) -> list[dict[str, Any]] | None:
    """GET /v1/changes, in the order in which they began; None if it is refused."""
    reply = await wire.ask("GET", "/v1/changes")
    return msgspec.json.decode(reply.body)["items"][::-1] if reply.status == 200 else None
