"""How a node's connections end when it leaves, over real WebSockets: no router is left in doubt without need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, OutcomeUnknown, Unavailable
from kvstore.protocol import Answer, Get, Put, Request, encode_frame
from kvstore.transport.channel import Channel, Connection
from kvstore.transport.connections import Connections
from kvstore.transport.under_way import SETTLED
from tests.unit.waiting import WAIT_S, until

LIMITS = Limits(reconnect_wait_s_max=0.02)


class Node:
    """It keeps what reached it, and answers nothing by itself."""

    def __init__(self) -> None:
        self.connections = Connections(LIMITS)
        self.reached: list[tuple[Request, Connection]] = []

    async def channel(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        await self.connections.serve(socket, lambda asked, connection: self.reached.append((asked, connection)))
        return socket

    def answer(self, value: bytes | None = None) -> None:
        """What came first."""
        asked, connection = self.reached.pop(0)
        connection.send(Answer(asked.id, 200, value=value))


@pytest.fixture
async def node() -> AsyncIterator[tuple[Node, Channel]]:
    """And a router's channel to it."""
    found, app = Node(), web.Application()
    app.router.add_get("/channel", found.channel)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        channel = Channel("s1", f"http://127.0.0.1:{runner.addresses[0][1]}", LIMITS, session)
        await until(lambda: channel.connected)
        yield found, channel
        await channel.close()
    await runner.cleanup()


async def outcomes(*futures: asyncio.Future[Any]) -> list[Any]:
    """The status of each, or the kind of its error."""
    async with asyncio.timeout(WAIT_S):
        found = await asyncio.gather(*futures, return_exceptions=True)
    return [type(each) if isinstance(each, KvError) else each.status for each in found]


async def test_of_a_node_that_has_settled_what_is_not_answered_was_not_executed(node: tuple[Node, Channel]) -> None:
    at, channel = node
    answered, waiting = channel.request(Put(0, "a", b"")), channel.request(Put(0, "b", b""))
    await until(lambda: len(at.reached) == 2)
    at.answer()
    at.connections.end(is_settled=True)
    at.answer()  # too late: the router is told that it was not executed
    late = channel.request(Put(0, "c", b""))
    await channel.flushed()
    await at.connections.close()
    assert await outcomes(answered, waiting, late) == [200, Unavailable, Unavailable]
    assert at.reached == [], "nothing is begun once it has ended"


async def test_of_a_node_that_has_not_settled_a_write_without_an_answer_is_of_unknown_outcome(
    node: tuple[Node, Channel],
) -> None:
    at, channel = node
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: len(at.reached) == 2)
    at.connections.end(is_settled=False)
    await at.connections.close()
    assert await outcomes(read, write) == [Unavailable, OutcomeUnknown]


async def test_all_answers_that_are_there_leave_first_however_many_bytes(node: tuple[Node, Channel]) -> None:
    at, channel = node
    futures = [channel.request(Put(0, f"k{number}", b"")) for number in range(50)]
    await until(lambda: len(at.reached) == len(futures))
    for _ in futures:
        at.answer(bytes(1 << 20))
    at.connections.end(is_settled=True)
    await at.connections.close()
    assert await outcomes(*futures) == [200] * len(futures)


async def test_a_router_that_reads_nothing_keeps_no_node_from_leaving_and_is_told_nothing_wrong(
    node: tuple[Node, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.transport.connections._CLOSE_S", 0.1)
    at, channel = node
    socket: Any = channel._link._socket
    socket._response.connection.transport.pause_reading()
    futures = [channel.request(Put(0, f"k{number}", b"")) for number in range(50)]
    await until(lambda: len(at.reached) == len(futures))
    for _ in futures:
        at.answer(bytes(1 << 20))
    at.connections.end(is_settled=True)
    async with asyncio.timeout(WAIT_S):
        await at.connections.close()
    socket._response.connection.transport.resume_reading()
    assert set(await outcomes(*futures)) <= {200, OutcomeUnknown}


async def test_a_connection_that_is_opened_when_the_node_has_ended_begins_nothing(node: tuple[Node, Channel]) -> None:
    """It was let in a moment before."""
    at, channel = node
    at.connections.end(is_settled=True)
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{channel.url}/channel") as late:
        await late.send_bytes(encode_frame([Put(1, "a", b"")]))
        await until(lambda: len(at.connections) == 2)
        await asyncio.sleep(0.05)
        await at.connections.close()
        async with asyncio.timeout(WAIT_S):
            message = await late.receive()
    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, SETTLED)
    assert at.reached == [], "it is told that nothing was executed"
