"""The far end of a channel: a shard whose answers are the test's."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from kvstore.errors import KvError
from kvstore.protocol import Answer, Request, decode_requests, encode_frame
from tests.unit.waiting import WAIT_S

MIB = 1 << 20


class FarEnd:
    """A shard whose answers are the test's: it keeps the frames that arrive, and sends what it is told to."""

    def __init__(self) -> None:
        self.frames: list[list[Request]] = []
        self.queries: list[str] = []
        self.sockets: list[web.WebSocketResponse] = []
        self.transports: list[Any] = []
        self.reads = True
        self.answers_all = False
        self.gone = asyncio.Event()

    @property
    def requests(self) -> list[Request]:
        return [request for frame in self.frames for request in frame]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.queries.append(request.path_qs)
        socket = web.WebSocketResponse(compress=False, max_msg_size=0)
        await socket.prepare(request)
        assert request.transport is not None
        if not self.reads:
            request.transport.pause_reading()
        self.transports.append(request.transport)
        self.sockets.append(socket)
        async for message in socket:
            requests = decode_requests(message.data)
            self.frames.append(requests)
            if self.answers_all:
                await self.send(*(Answer(request.id, 200) for request in requests))
        self.gone.set()
        return socket

    async def send(self, *replies: Any) -> None:
        await self.sockets[-1].send_bytes(encode_frame(list(replies)))

    def hang_up(self) -> None:
        """Without a closing handshake, as kill -9 does."""
        self.transports[-1].abort()


async def outcome(future: asyncio.Future[Any]) -> Any:
    """The reply, or the error instead of it."""
    try:
        return await asyncio.wait_for(asyncio.shield(future), WAIT_S)
    except KvError as error:
        return error
