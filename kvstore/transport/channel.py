"""The channel between a router and a shard.
One WebSocket per node, many operations to a frame, an answer to each as it is done.

Owns: the router's view of one shard's store, and the shard's end of a connection. (The connection of the router's end
is the `link`'s, which all channels to one node share; frames are the `outbox`'s.)
Promises:
  - What is asked within three turns of the loop, or while the frame before is still being taken in by the socket,
    leaves in one frame. No timer is involved: frames fill by themselves under load and shrink when idle. What no client
    waits for (the finishes of transactions) goes with the next frame, which comes at once under load, and after 2 ms
    else.
  - Every operation gets exactly one outcome: its answer, or an error that says whether it may have been executed.
    Nothing is ever sent twice.
  - Operations and bytes under way are bounded; past the bound `TooManyRequests`, at once. What a read may bring counts,
    too: a get for the mean of the values that gets brought lately (those with a `bytes_max` and those without have a
    mean each), a page of values for the bytes that it may have.
  - A frame is bounded at both ends: one that is larger than any message can be is not read, and ends the connection.
  - A shard begins no request while its answers, of more than `channel_bytes_max`, wait for the router to take them.
  - A shard does not begin an operation whose connection has ended (`Connection.closed`).
Leaves to others: what the operations mean (`shard.service`), which shard to ask (`router.service`).

A lost connection means for an operation that never left: `Unavailable`, nothing was done. For a read that left: the
same. For a write that left: `OutcomeUnknown`. The same holds for one that was not answered within
`request_timeout_s`; a shard that let a request time out and has sent nothing at all in that time (it hangs, or the
network swallows frames) loses its connection. A shard that ends in order answers what it has executed, then closes the
connection with the code SETTLED: nothing else was, and all of it is `Unavailable`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import Unavailable
from kvstore.protocol import Answer, ForStore, Names, Reply, Request, decode_requests
from kvstore.transport.frames import decode_apart
from kvstore.transport.link import Links
from kvstore.transport.outbox import Outbox
from kvstore.transport.sessions import ClusterSession
from kvstore.transport.under_way import SETTLED

log = logging.getLogger(__name__)


Handle = Callable[[Request, "Connection"], None]


class Connection:
    """The shard's end. `send` queues an answer; `closed` turns True when the router is gone."""

    def __init__(self, limits: Limits) -> None:
        self.closed = False
        self.strike = 0  # the last one that the other end follows
        self._socket: web.WebSocketResponse | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._outbox = Outbox(limits.frame_bytes_max)
        self._bytes_max = limits.channel_bytes_max

    def send(self, reply: Reply) -> None:
        """Queue an answer; no-op once the router is gone."""
        if not self.closed:
            self._outbox.put(reply)

    async def serve(
        self, socket: web.WebSocketResponse, handle: Handle, store_of: Callable[[str], Handle | None] | None = None
    ) -> None:
        """Pass each request to `handle` until the router leaves; those for another store to what `store_of` names."""
        self._socket = socket
        sender = asyncio.create_task(self._outbox.run(socket))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    log.error("a router's connection ends: %s", message.data)  # too large a frame, for example
                    break
                if self.closed:
                    continue
                for request in self._requests(message.data):
                    if type(request) is Names:
                        self.strike = request.strike
                    elif type(request) is ForStore:
                        handle = (store_of(request.store_id) if store_of is not None else None) or _refuse
                    else:
                        handle(request, self)
                await self._outbox.room_for_more(self._bytes_max)
        except msgspec.DecodeError as error:
            log.error("a router sent a frame that is none: %s", error)
        finally:
            self.closed = True
            if self._leaving is not None:
                await asyncio.wait((self._leaving,))  # else the server would end the connection before the router does
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            await socket.close()

    async def leave(self, *, is_settled: bool) -> None:
        """Close the connection once the answers that are there have left. It is `closed` by now.

        `is_settled`: nothing that is not answered was executed, or will be. Else the router cannot know.
        """
        self._leaving = asyncio.create_task(self._leave(is_settled))
        await self._leaving

    async def _leave(self, is_settled: bool) -> None:
        if self._socket is not None:
            has_all = await self._outbox.flushed()
            await self._socket.close(code=SETTLED if is_settled and has_all else aiohttp.WSCloseCode.GOING_AWAY)

    def _requests(self, frame: bytes) -> list[Request]:
        """Those of the frame; what is none is refused by itself. Raises msgspec.DecodeError if all of it is none."""
        try:
            return decode_requests(frame)
        except msgspec.DecodeError as error:
            requests, refusals = decode_apart(frame)
            log.error("a router sent a message that is none: %s", error)
            for refusal in refusals:
                self.send(refusal)
            return requests


def _refuse(request: Request, connection: Connection) -> None:
    """It is meant for a store that is not served here."""
    refusal = Unavailable("this node does not serve that store.", retry_after_ms=1000)
    connection.send(Answer(request.id, refusal.status, problem=refusal.problem()))


class Channel:
    """The router's end: one store, asked by the link to its node, which stays connected and brings each answer."""

    def __init__(
        self,
        shard_id: str,
        url: str,
        limits: Limits,
        session: aiohttp.ClientSession,
        store_id: str = "",
        cluster: ClusterSession | None = None,
        links: Links | None = None,
    ) -> None:
        """`store_id`: only that very store is asked; empty: whichever the node serves under that shard's id.

        `cluster`: the node refuses the connection unless it belongs to the session that this process is in. `links`:
        those of this process; None: this channel has one of its own.
        """
        self.shard_id = shard_id
        self.url = url
        self.store_id = store_id
        self.answered = False
        self._links = links or Links(limits, session, cluster)
        self._link = self._links.attach(self, url)

    @property
    def connected(self) -> bool:
        """Whether the node is connected."""
        return self._link.connected

    @property
    def bytes_under_way(self) -> int:
        """What the operations under way to the node count for, in bytes, of all channels to it."""
        return self._link.under_way.bytes

    @property
    def ops_under_way(self) -> int:
        """How many operations of this channel wait for their answers."""
        return self._link.under_way.count(self)

    def name_strike(self, strike: int) -> None:
        """What is asked from now on is asked by a map whose last strike is that one."""
        self._link.name_strike(strike)

    async def close(self) -> None:
        """Ask no more; every waiting request gets an error. The connection ends with its last channel."""
        await self._links.detach(self, self._link)

    def request(self, request: Request, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        """Send it; the future brings the Reply. Its `id` is set here.

        `at_leisure`: with the next frame that leaves. Raises TooManyRequests and Unavailable at once; the future raises
        Unavailable or OutcomeUnknown. A reply may be an Answer with a problem.
        """
        return self._link.request(self, request, at_leisure)

    async def flushed(self) -> None:
        """All that was asked for until now has left, or the connection has ended. For failpoints."""
        await self._link.flushed()
