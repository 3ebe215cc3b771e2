"""Far ends over real sockets: a server of HTTP that shows what it gets, a shard behind a channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, ValueTooLarge
from kvstore.transport.bodies import BodyReader
from kvstore.transport.channel import Channel
from kvstore.transport.http.requests import read_head
from kvstore.transport.http.responses import BINARY, Response, json_response, problem_response
from kvstore.transport.http.server import Server, start_server
from tests.unit.transport.far_end import FarEnd
from tests.unit.transport.raw_http import LINE_BYTES_MAX, VALUE_BYTES_MAX, Site
from tests.unit.waiting import until


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    limits = Limits(
        connections_max=20,
        request_line_bytes_max=LINE_BYTES_MAX,
        header_bytes_max=LINE_BYTES_MAX,
        body_bytes_in_flight_max=4 * VALUE_BYTES_MAX,
    )
    bodies = BodyReader(limits)
    seen: list[str] = []

    async def handle(request: web.BaseRequest) -> Any:
        try:
            head = read_head(request)
            if head.path == "/fails":
                raise RuntimeError("a bug")
            if head.path == "/fails-midway":
                stream = web.StreamResponse()
                await stream.prepare(request)
                await stream.write(b"the beginning ")
                raise RuntimeError("a bug")
            if head.method == "PUT":
                value = await bodies.read(request, head, VALUE_BYTES_MAX, ValueTooLarge)
                seen.append(f"PUT {len(value)}")
                return Response(200, value, BINARY)
            seen.append(f"{head.method} {head.path}?{head.query}")
            if head.path == "/large":
                return Response(200, b"v" * 300_000, BINARY, head_only=head.method == "HEAD")
            if head.path == "/nothing":
                return Response(204, lines="X-Mine: 1\r\n")
            return json_response(200, {"path": head.path.encode("ascii", "backslashreplace").decode()})
        except KvError as error:
            return problem_response(error)

    runner = await start_server(Server(handle, limits), "127.0.0.1", 0)
    site = Site(runner.addresses[0][1], bodies, seen)
    yield site
    await site.close()
    await runner.cleanup()
    assert bodies.under_way_bytes == 0, "what was reserved was given back"


@pytest.fixture
async def far() -> AsyncIterator[Any]:
    far = FarEnd()
    app = web.Application()
    app.router.add_get("/channel", far.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    far.url = f"http://127.0.0.1:{runner.addresses[0][1]}"  # type: ignore[attr-defined]
    yield far
    await runner.cleanup()


@pytest.fixture
async def connect(far: Any) -> AsyncIterator[Callable[..., Awaitable[Channel]]]:
    """Opens a channel to the far end with the given limits, and waits until it is connected."""
    channels: list[Channel] = []
    async with aiohttp.ClientSession() as session:

        async def connect_one(*, wait: bool = True, **limits: Any) -> Channel:
            channel = Channel("s1", far.url, Limits(**{"reconnect_wait_s_max": 0.02, **limits}), session)
            channels.append(channel)
            if wait:
                await until(lambda: channel.connected)
            return channel

        yield connect_one
        for channel in channels:
            await channel.close()


@pytest.fixture
async def channel(connect: Any) -> Channel:
    return await connect()
