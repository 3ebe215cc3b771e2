"""What the server saves beside aiohttp's own: a task for each request, a second look at each body."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from kvstore.config import Limits
from kvstore.errors import ValueTooLarge
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import read_head
from kvstore.transport.http.responses import Response
from kvstore.transport.http.server import Server, start_server

_LIMITS = Limits()


async def _answers(handle: Callable[[web.BaseRequest], Awaitable[Any]], sent: bytes, count: int) -> list[bytes]:
    """The first `count` answers to what is sent by one connection; each has a body of one line."""
    runner = await start_server(Server(handle, _LIMITS), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
    try:
        writer.write(sent)
        async with asyncio.timeout(60):
            return [(await reader.readuntil(b"\r\n\r\n"), await reader.readline())[1] for _ in range(count)]
    finally:
        writer.transport.abort()
        await runner.cleanup()


def _put(body: bytes) -> bytes:
    return b"PUT /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="from Python 3.12 on aiohttp begins its tasks eagerly")
async def test_the_requests_of_a_connection_are_answered_in_one_task() -> None:
    tasks = set()

    async def handle(request: web.BaseRequest) -> Any:
        tasks.add(asyncio.current_task())
        await asyncio.sleep(0)
        return Response(200, b"done\n")

    await _answers(handle, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3, 3)
    assert len(tasks) == 1


async def test_a_body_that_came_whole_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = list[int]()
    feed = RequestHandler.data_received

    def counted(self: RequestHandler, data: bytes) -> None:
        parsed.append(len(data))
        feed(self, data)

    monkeypatch.setattr(RequestHandler, "data_received", counted)
    bodies = BodyReader(_LIMITS)

    async def handle(request: web.BaseRequest) -> Any:
        return Response(200, b"%d\n" % len(await bodies.read(request, read_head(request), 1 << 20, ValueTooLarge)))

    assert await _answers(handle, _put(b"v" * 100), 1) == [b"100\n"]
    assert 0 not in parsed


async def test_bodies_that_are_sent_ahead_and_make_the_reading_pause_all_arrive() -> None:
    bodies = BodyReader(_LIMITS)

    async def handle(request: web.BaseRequest) -> Any:
        await asyncio.sleep(0.001)
        return Response(200, b"%d\n" % len(await bodies.read(request, read_head(request), 1 << 20, ValueTooLarge)))

    sizes = [(number * 7919) % 300_000 for number in range(60)]
    sent = b"".join(_put(b"v" * size) for size in sizes)
    assert await _answers(handle, sent, len(sizes)) == [b"%d\n" % size for size in sizes]
