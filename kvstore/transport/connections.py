"""The connections of routers to a node, and how all of them end when its process does.

Owns: which are open; what a router is told when the node leaves.
Promises: answers that are there leave before the connection is closed. A router is told that nothing else was executed
only if that is so: then it asks again, elsewhere, what was not answered.
Leaves to others: one connection (`channel`), whether all that was taken is answered (shard).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from kvstore.config import Limits
from kvstore.transport.channel import Connection, Handle

_CLOSE_S = 2.0


class Connections:
    """Of one node. `ended`: it leaves, and takes no others."""

    def __init__(self, limits: Limits) -> None:
        self.ended = False
        self._limits = limits
        self._is_settled = False
        self._open: dict[Connection, None] = {}

    async def serve(
        self, socket: web.WebSocketResponse, handle: Handle, store_of: Callable[[str], Handle | None] | None = None
    ) -> None:
        """See `Connection.serve`. Nothing is begun for one that is opened when the node has ended."""
        connection = Connection(self._limits)
        connection.closed = self.ended
        self._open[connection] = None
        try:
            await connection.serve(socket, handle, store_of)
        finally:
            del self._open[connection]

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def end(self, *, is_settled: bool) -> None:
        """Begin nothing more that comes, and answer nothing more.

        `is_settled`: no write that came is executed without its answer having been sent to its connection.
        """
        self.ended, self._is_settled = True, is_settled
        for connection in self._open:
            connection.closed = True

    async def close(self) -> None:
        """Close all of them, in two seconds at most.

        Without `end` before it, routers cannot know what was executed.
        """
        if not self.ended:
            self.end(is_settled=False)
        leaving = [connection.leave(is_settled=self._is_settled) for connection in self._open]
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.gather(*leaving)
        except TimeoutError:
            pass
