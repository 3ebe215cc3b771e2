"""Which transactions are in doubt, as GET /v1/cluster shows it, and for how long.

Owns: looking, by any router that answers, until nothing is in doubt.
Promises: a look counts only if it has seen every shard.
Leaves to others: when a fault is over (loadtest.chaos.phase).
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import aiohttp

from loadtest.cluster import changes
from loadtest.drivers.aio import Wire

_POLL_S = 0.05
_ANEW_MAX_S = 90.0


class Doubts:
    """Looks at `in_doubt` of /v1/cluster again and again, by any router that answers."""

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str]) -> None:
        self.count = -1  # of the last look; -1: no answer came, or one of a router that does not see every shard
        self.oldest_s = 0.0
        self._wire = Wire(http, urls, seed=0)

    async def look(self) -> None:
        document = await changes.cluster(self._wire)
        if not document or any(shard["state"] != "up" for shard in document["shards"]):
            self.count = -1
            return
        self.count = document["in_doubt"]["count"]
        self.oldest_s = document["in_doubt"]["oldest_s"] or 0.0

    async def none_left(self, timeout_s: float) -> bool:
        """Look until nothing is in doubt at all, that long at most; whether nothing is.

        The time begins again with a look that does not count, and whenever there are fewer than ever, for a minute
        and a half: on a slow machine not all shards are seen at once.
        """
        began_s, fewest = time.monotonic(), sys.maxsize
        deadline_s = began_s + timeout_s
        while True:
            await self.look()
            now_s = time.monotonic()
            if self.count == 0:
                return True
            if self.count < fewest and now_s - began_s <= _ANEW_MAX_S:
                deadline_s = now_s + timeout_s
            if self.count > 0:
                fewest = min(fewest, self.count)
            if now_s > deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
