"""A server of HTTP that shows what it was given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, ValueTooLarge
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import read_head
from kvstore.transport.http.responses import BINARY, Response, json_response, problem_response
from kvstore.transport.http.server import Server, start_server
from tests.unit.transport.raw_http import LINE_BYTES_MAX, VALUE_BYTES_MAX, Site


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
