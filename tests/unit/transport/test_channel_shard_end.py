"""The shard's end of a channel: requests in order, answers in frames, and what is refused alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.model import Attempt
from kvstore.protocol import Answer, Delete, Get, GetTxn, Put, ReadLock, Request, decode_replies, encode_frame
from kvstore.transport.channel import Connection
from tests.unit.transport.far_end import MIB
from tests.unit.waiting import WAIT_S, until


class Door:
    """Serves `Connection`, as the shard's process does."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connections: list[Connection] = []
        self.handled: list[Request] = []
        self.handle: Callable[[Request, Connection], None] = lambda request, connection: connection.send(
            Answer(request.id, 200)
        )

    async def serve(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(compress=False, max_msg_size=self.limits.frame_read_bytes_max)
        await socket.prepare(request)
        connection = Connection(self.limits)
        self.connections.append(connection)
        await connection.serve(socket, self._on_request)
        return socket

    def _on_request(self, request: Request, connection: Connection) -> None:
        self.handled.append(request)
        self.handle(request, connection)


@pytest.fixture
async def door() -> AsyncIterator[tuple[Door, aiohttp.ClientWebSocketResponse]]:
    """The shard's end under test, and a bare WebSocket as its router."""
    small = {"frame_bytes_max": 10_000, "page_bytes_max": 1, "value_bytes_max": 1, "body_bytes_max": 1}
    door = Door(Limits(**small, txn_read_bytes_max=1, channel_bytes_max=MIB))
    app = web.Application()
    app.router.add_get("/channel", door.serve)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/channel"
        async with session.ws_connect(url, max_msg_size=0) as socket:
            yield door, socket
    await runner.cleanup()


async def test_each_request_of_a_frame_is_handled_in_order(door: Any) -> None:
    shard, socket = door
    await socket.send_bytes(encode_frame([Get(1, "a"), Put(2, "b", b""), Delete(3, "c")]))
    replies = decode_replies((await socket.receive(WAIT_S)).data)
    assert [reply.id for reply in replies] == [1, 2, 3]
    assert [type(request) for request in shard.handled] == [Get, Put, Delete]


async def test_answers_given_in_one_turn_of_the_loop_share_a_frame(door: Any) -> None:
    shard, socket = door
    shard.handle = lambda *_: None
    await socket.send_bytes(encode_frame([Get(number, "a") for number in range(50)]))
    await until(lambda: len(shard.handled) == 50)
    for number in (3, 1, 2):
        shard.connections[0].send(Answer(number, 200))
    assert [reply.id for reply in decode_replies((await socket.receive(WAIT_S)).data)] == [3, 1, 2]
    shard.connections[0].send(Answer(9, 200))
    assert [reply.id for reply in decode_replies((await socket.receive(WAIT_S)).data)] == [9]


async def test_a_shard_begins_nothing_while_many_answers_wait_for_a_router_that_does_not_read(door: Any) -> None:
    shard, socket = door
    shard.handle = lambda request, connection: connection.send(Answer(request.id, 200, 1, bytes(100_000)))
    transport = socket._response.connection.transport
    transport.pause_reading()
    for number in range(0, 1000, 10):
        await socket.send_bytes(encode_frame([Get(number + further, "a") for further in range(10)]))
    seen, same = -1, 0
    while same < 20:
        await asyncio.sleep(0.01)
        seen, same = len(shard.handled), same + 1 if len(shard.handled) == seen else 0
    assert seen < 500
    transport.resume_reading()
    answered = 0
    while answered < 1000:
        answered += len(decode_replies((await asyncio.wait_for(socket.receive(), WAIT_S)).data))


async def test_answers_too_large_for_one_frame_are_spread_over_several(door: Any) -> None:
    shard, socket = door
    shard.handle = lambda request, connection: connection.send(Answer(request.id, 200, 1, b"v" * 4000))
    await socket.send_bytes(encode_frame([Get(number, "a") for number in range(10)]))
    ids: list[int] = []
    frames = 0
    while len(ids) < 10:
        frames += 1
        ids += [reply.id for reply in decode_replies((await socket.receive(WAIT_S)).data)]
    assert ids == list(range(10))
    assert frames >= 4


async def test_a_connection_knows_that_its_router_has_gone_and_takes_answers_for_no_client(door: Any) -> None:
    shard, socket = door
    shard.handle = lambda *_: None
    await socket.send_bytes(encode_frame([Get(1, "a")]))
    await until(lambda: shard.handled)
    assert not shard.connections[0].closed
    await socket.close()
    await until(lambda: shard.connections[0].closed)
    shard.connections[0].send(Answer(1, 200))


async def test_a_router_that_vanished_without_a_word_is_noticed(door: Any) -> None:
    shard, socket = door
    await socket.send_bytes(encode_frame([Get(1, "a")]))
    await until(lambda: shard.handled)
    socket._response.connection.transport.abort()
    await until(lambda: shard.connections[0].closed)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91\x91\x01", b"\x91\x92\x01\xa1x"])
async def test_a_frame_that_is_none_ends_the_connection_and_nothing_of_it_is_handled(door: Any, frame: bytes) -> None:
    shard, socket = door
    await socket.send_bytes(frame)
    assert (await socket.receive(WAIT_S)).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert shard.handled == []
    assert shard.connections[0].closed


@pytest.mark.parametrize(
    "bad",
    [GetTxn(2, 10**9, "n"), Answer(2, 200), ReadLock(2, Attempt(1, 1, "r"), []), Put(2, "k", b"", -1)],
    ids=lambda message: type(message).__name__,
)
async def test_a_message_out_of_bounds_is_refused_alone(door: Any, bad: Any) -> None:
    shard, socket = door
    await socket.send_bytes(encode_frame([Get(1, "a"), bad, Get(3, "b")]))
    replies: dict[int, Any] = {}
    async with asyncio.timeout(WAIT_S):
        while len(replies) < 3:
            replies.update({reply.id: reply for reply in decode_replies((await socket.receive()).data)})
    assert {op_id: reply.status for op_id, reply in replies.items()} == {1: 200, 2: 400, 3: 200}
    assert [request.id for request in shard.handled] == [1, 3]


async def test_a_key_that_is_not_utf8_is_refused_alone(door: Any) -> None:
    shard, socket = door
    await socket.send_bytes(encode_frame([Get(1, "AAAA"), Get(2, "b")]).replace(b"AAAA", b"\xff\xfe\xfd\xfc"))
    await until(lambda: shard.handled)
    assert [request.id for request in shard.handled] == [2]


async def test_a_frame_that_is_larger_than_any_message_is_not_read(door: Any) -> None:
    shard, socket = door
    largest = shard.limits.frame_read_bytes_max
    await socket.send_bytes(encode_frame([Put(1, "k", b"x" * (largest // 2))]))
    await until(lambda: shard.handled)
    with contextlib.suppress(ConnectionError, aiohttp.ClientError):
        await socket.send_bytes(encode_frame([Put(2, "k", b"x" * largest)]))
    await until(lambda: shard.connections[0].closed)
    assert [request.id for request in shard.handled] == [1]


async def test_text_is_no_frame(door: Any) -> None:
    shard, socket = door
    await socket.send_str("hello")
    assert (await socket.receive(WAIT_S)).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert shard.handled == []
