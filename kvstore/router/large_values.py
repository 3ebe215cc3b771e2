"""Values of at least `LARGE_BYTES`, on their way from the shards.

Owns: when such a value is asked for.
Promises: what it takes is in the room of its request before it is asked for. Of each shard one is on its way at a time:
what others ask of that shard does not come behind a row of them, and the router does not have to take in more at once
than a few. A shard that does not answer delays those of no other.
Leaves to others: asking (`service`), room (`transport.answers`).

A get asks for what is smaller in any case, and says how large the value is if it is not (`left_out_bytes`); a page of
a listing does, too (`left_out`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Protocol

from kvstore.protocol import Get
from kvstore.router.service import KeyRequest, Routed
from kvstore.transport.answers import Room


class Asking(Protocol):
    """What is needed of the service."""

    async def ask(self, request: KeyRequest) -> Routed:
        """The answer of the key's owner. Raises as `RouterService.ask`."""


class LargeValues:
    """Asks for large values, one of each shard at a time, for the whole router."""

    def __init__(self, service: Asking) -> None:
        self._service = service
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by shard

    async def get(self, key: str, size: int, shard_id: str, room: Room) -> Routed:
        """The value, of which that shard said that it has about `size` bytes. Raises TooManyRequests, and as `ask`."""
        await room.add(size)
        return await self.bring(key, shard_id)

    async def bring(self, key: str, shard_id: str) -> Routed:
        """The same, where there is room for it already."""
        async with self._turns[shard_id]:
            return await self._service.ask(Get(0, key))
