"""What bodies count for while they are received, and how long a client may take: over real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, ValueTooLarge
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import read_head
from kvstore.transport.http.responses import Response, problem_response
from kvstore.transport.http.server import Server, start_server

WAIT_S = 10.0
MIB = 1024 * 1024
PUT = b"PUT /a HTTP/1.1\r\nHost: localhost\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    def __init__(self, limits: Limits) -> None:
        self.bodies = BodyReader(limits)
        self.limits = limits
        self.port = 0
        self.streams: list[Stream] = []

    async def handle(self, request: web.BaseRequest) -> Any:
        try:
            body = await self.bodies.read(request, read_head(request), self.limits.value_bytes_max, ValueTooLarge)
        except KvError as error:
            return problem_response(error)
        return Response(200, b"%d" % len(body))

    async def send(self, data: bytes) -> Stream:
        stream = await asyncio.open_connection("127.0.0.1", self.port)
        self.streams.append(stream)
        stream[1].write(data)
        return stream


@pytest.fixture
async def make_site() -> AsyncIterator[Callable[..., Any]]:
    made: list[tuple[Site, web.ServerRunner]] = []

    async def make(**limits: Any) -> Site:
        site = Site(Limits(**limits))
        runner = await start_server(Server(site.handle, site.limits), "127.0.0.1", 0)
        site.port = runner.addresses[0][1]
        made.append((site, runner))
        return site

    yield make
    for site, runner in made:
        for _, writer in site.streams:
            writer.transport.abort()
        await runner.cleanup()
        assert (site.bodies.under_way_bytes, site.bodies.receiving) == (0, 0), "what was reserved was given back"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def status(stream: Stream) -> int:
    line = await asyncio.wait_for(stream[0].readline(), WAIT_S)
    return int(line.split()[1])


@pytest.mark.parametrize(
    "begun", [b"Content-Length: 1048576\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n"]
)
async def test_bodies_that_are_announced_and_do_not_come_leave_the_room_to_others(
    make_site: Callable[..., Any], begun: bytes
) -> None:
    site = await make_site(body_bytes_in_flight_max=4 * MIB)
    for _ in range(40):
        await site.send(PUT + begun)
    await until(lambda: site.bodies.receiving == 40)
    assert site.bodies.under_way_bytes < MIB
    large = await site.send(PUT + b"Content-Length: 1000000\r\n\r\n" + bytes(1_000_000))
    assert await status(large) == 200


async def test_a_body_counts_for_what_has_arrived_of_it(make_site: Callable[..., Any]) -> None:
    site = await make_site(body_bytes_in_flight_max=MIB)
    first = await site.send(PUT + b"Content-Length: 800000\r\n\r\n" + bytes(700_000))
    await until(lambda: site.bodies.under_way_bytes >= 700_000)
    second = await site.send(PUT + b"Content-Length: 800000\r\n\r\n" + bytes(700_000))
    assert await status(second) == 429
    await until(lambda: site.bodies.receiving == 1)
    first[1].write(bytes(100_000))
    assert await status(first) == 200


async def test_a_body_that_stands_still_is_given_up_before_the_whole_time_is_over(
    make_site: Callable[..., Any],
) -> None:
    site = await make_site(body_stall_s=0.2)
    stream = await site.send(PUT + b"Content-Length: 1000000\r\n\r\n" + bytes(1000))
    assert await status(stream) == 408


async def test_a_body_that_trickles_is_given_up_when_its_time_is_over(make_site: Callable[..., Any]) -> None:
    site = await make_site(transfer_timeout_s=0.5)
    stream = await site.send(PUT + b"Content-Length: 1000000\r\n\r\n")
    answer = asyncio.create_task(status(stream))
    while not answer.done():
        stream[1].write(b"x")
        await asyncio.sleep(0.02)
    assert await answer == 408


async def test_large_bodies_follow_one_another_on_a_connection_in_whatever_pieces_they_come(
    make_site: Callable[..., Any],
) -> None:
    site = await make_site()
    reader, writer = await site.send(b"")
    for piece in (1_000, 131_073, 300_000, MIB):
        data = PUT + b"Content-Length: 1048576\r\n\r\n" + bytes(MIB)
        for start in range(0, len(data), piece):
            writer.write(data[start : start + piece])
            await asyncio.wait_for(writer.drain(), WAIT_S)
            await asyncio.sleep(0)
        answer = await asyncio.wait_for(reader.readuntil(b"1048576"), WAIT_S)
        assert answer.startswith(b"HTTP/1.1 200 ")
