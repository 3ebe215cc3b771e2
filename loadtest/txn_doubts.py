"""Which transactions are in doubt, as GET /v1/cluster shows it, and for how long.

Owns: looking, again and again, by any router that answers, and judging from it when a fault has been got over.
Promises: a look counts only if it has seen every shard.
Leaves to others: when a fault is over (loadtest.txn_rounds).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import aiohttp
import msgspec

from loadtest.txn_wire import Wire

_POLL_S = 0.05


class Doubts:
    """Looks at `in_doubt` of /v1/cluster again and again, by any router that answers."""

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str]) -> None:
        self.count_max = 0
        self.count = -1  # of the last look; -1: nobody answered, or one that does not see every shard
        self.oldest_s = 0.0
        self.looked_s = 0.0
        self._wire = Wire(http, urls, seed=0)

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_POLL_S)

    async def look(self) -> None:
        began = time.monotonic()
        reply = await self._wire.ask("GET", "/v1/cluster")
        if reply.status != 200:
            self.count = -1
            return
        document = msgspec.json.decode(reply.body)
        if any(shard["state"] != "up" for shard in document["shards"]):
            self.count = -1
            return
        self.count = document["in_doubt"]["count"]
        self.oldest_s = document["in_doubt"]["oldest_s"] or 0.0
        self.looked_s = began
        self.count_max = max(self.count_max, self.count)

    async def resolved(self, fault_s: float, timeout_s: float) -> float | None:
        """How long after `fault_s` nothing was in doubt any more that is older than that; None: not in that time."""
        while True:
            if self.looked_s > fault_s and (self.count == 0 or 0 < self.oldest_s < self.looked_s - fault_s):
                return self.looked_s - fault_s
            if time.monotonic() - fault_s > timeout_s:
                return None
            await asyncio.sleep(_POLL_S)

    async def none_left(self, timeout_s: float) -> bool:
        """Wait until nothing is in doubt at all."""
        deadline = time.monotonic() + timeout_s
        asked_s = time.monotonic()
        while not (self.count == 0 and self.looked_s > asked_s):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True
