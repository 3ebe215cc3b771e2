"""`Client.update` on a key that many change at once, over a store that is a few lines long."""

from __future__ import annotations

import asyncio
from typing import Any

from kvstore.client import Client, Item
from kvstore.errors import PreconditionFailed

CLIENTS = 60
UPDATES = 5


class Register(Client):
    """One key, answered after a turn of network and disk."""

    def __init__(self) -> None:
        super().__init__()
        self.item: Item | None = None
        self.puts = 0

    async def get(self, key: str) -> Item | None:
        await asyncio.sleep(0.001)
        return self.item

    async def put(self, key: str, value: bytes, **conditions: Any) -> int:
        self.puts += 1
        await asyncio.sleep(0.001)
        version = None if self.item is None else self.item.version
        if version != conditions["if_version"] or conditions["if_absent"] != (self.item is None):
            raise PreconditionFailed("it has changed")
        self.item = Item(value, (version or 0) + 1)
        return self.item.version


async def test_sixty_clients_that_change_one_key_all_get_through() -> None:
    register = Register()

    async def client() -> None:
        for _ in range(UPDATES):
            await register.update("hot", lambda old: b"%d" % (int(old or b"0") + 1))

    async with asyncio.timeout(60):
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    assert register.item is not None
    assert register.item.value == b"%d" % (CLIENTS * UPDATES)
    assert register.puts < 12 * CLIENTS * UPDATES, "most tries are not in vain"
