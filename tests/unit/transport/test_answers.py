"""The account of answers that clients have not taken: over real connections whose other end does not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, TooManyRequests
from kvstore.transport.answers import SMALL_BYTES, AnswerAccount, Room
from kvstore.transport.http.responses import BINARY, Response, StreamedResponse, problem_response
from kvstore.transport.http.server import HEAD_BYTES_MAX, Server, start_server

WAIT_S = 10.0
MIB = 1024 * 1024
GET = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Site:
    """A server whose paths name a kind of answer and its size; it counts the requests that it began."""

    def __init__(self, limits: Limits) -> None:
        self.account = AnswerAccount(limits)
        self.begun = 0
        self.written = 0
        self.port = 0
        self.last: Response | None = None
        self.server = Server(self._handle, limits, self.account)
        self._sockets: list[socket.socket] = []

    async def _handle(self, request: web.BaseRequest) -> Any:
        self.begun += 1
        _, kind, size = request.path.split("/")
        if kind == "stream":
            stream = StreamedResponse(request, BINARY)
            for _ in range(int(size)):
                await stream.write([bytes(SMALL_BYTES)])
                self.written += SMALL_BYTES
            await stream.end()
            return stream
        response = self.last = Response(200, bytes(int(size)), BINARY)
        try:
            await self.account.reserve(int(size))
        except KvError as error:
            return problem_response(error)
        response.reserved = int(size)
        return response

    async def connect(self, receive_bytes: int = 4096) -> socket.socket:
        """A client that reads nothing by itself."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        self._sockets.append(connection)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        return connection

    async def send(self, connection: socket.socket, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(connection, data)

    def buffered(self) -> int:
        """Bytes that the server keeps for its clients."""
        transports = [connection.transport for connection in self.server.connections]
        return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()


@pytest.fixture
async def make_site() -> AsyncIterator[Callable[..., Any]]:
    sites: list[tuple[Site, web.ServerRunner]] = []

    async def make(**limits: Any) -> Site:
        site = Site(Limits(**limits))
        runner = await start_server(site.server, "127.0.0.1", 0)
        site.port = runner.addresses[0][1]
        sites.append((site, runner))
        return site

    yield make
    for site, runner in sites:
        site.close()
        await runner.cleanup()
        assert site.account.under_way_bytes == 0, "what was reserved was given back"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def standing_still(measure: Callable[[], int]) -> int:
    """The number, once it has not changed for a while."""
    async with asyncio.timeout(WAIT_S):
        seen, same = measure(), 0
        while same < 20:
            await asyncio.sleep(0.01)
            now = measure()
            seen, same = now, same + 1 if now == seen else 0
        return seen


async def read_all(connection: socket.socket) -> int:
    """How many bytes come until the server closes."""
    size = 0
    async with asyncio.timeout(WAIT_S):
        try:
            while data := await asyncio.get_running_loop().sock_recv(connection, 65_536):
                size += len(data)
        except ConnectionError:
            pass
    return size


@pytest.mark.parametrize("size", [200, SMALL_BYTES - 1, 60_000])
async def test_requests_sent_ahead_wait_until_the_answers_before_them_are_taken(
    make_site: Callable[..., Any], size: int
) -> None:
    site = await make_site()
    connection = await site.connect()
    count = 30 * MIB // size  # beyond what the kernel keeps for both ends
    sending = asyncio.create_task(site.send(connection, GET % (b"value/%d" % size) * count))
    begun = await standing_still(lambda: site.begun)
    assert 0 < begun < count
    assert begun * size <= MIB // 2, "the system would keep several MiB: the work of thousands of small answers"
    assert site.buffered() <= 2 * SMALL_BYTES + size
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_an_answer_that_was_taken_is_not_kept_by_a_connection_that_stays_open(
    make_site: Callable[..., Any],
) -> None:
    site = await make_site()
    connection = await site.connect(receive_bytes=1_048_576)
    await site.send(connection, GET % b"value/1000000")
    size = 0
    while size < 1_000_000:
        size += len(await asyncio.get_running_loop().sock_recv(connection, 262_144))
    await until(lambda: site.account.under_way_bytes == 0)
    assert site.server.connections
    assert site.last.body == b""


async def test_a_stream_goes_on_only_as_far_as_its_client_reads_and_counts_as_unread(
    make_site: Callable[..., Any],
) -> None:
    site = await make_site()
    connection = await site.connect()
    await site.send(connection, GET % b"stream/10000")
    assert 0 < await standing_still(lambda: site.written) < 10_000 * SMALL_BYTES
    assert site.buffered() <= 3 * SMALL_BYTES
    assert site.account.streams_unread == 1
    connection.close()
    await until(lambda: site.account.streams_unread == 0)


@pytest.mark.parametrize("path", [b"value/60000000", b"stream/10000"])
async def test_a_client_that_takes_nothing_in_time_is_cut_off(make_site: Callable[..., Any], path: bytes) -> None:
    site = await make_site(transfer_timeout_s=0.3)
    connection = await site.connect()
    await site.send(connection, GET % path)
    await until(lambda: site.begun == 1 and not site.server.connections)
    assert await read_all(connection) < 60_000_000


async def test_a_client_that_takes_nothing_has_to_go_when_others_wait_for_room(make_site: Callable[..., Any]) -> None:
    site = await make_site(answer_bytes_in_flight_max=24 * MIB, answer_stall_s=0.3, answer_wait_s=WAIT_S)
    idle = await site.connect()
    await site.send(idle, GET % (b"value/%d" % (20 * MIB)))
    await until(lambda: site.account.under_way_bytes == 20 * MIB)
    await asyncio.sleep(0.6)
    assert len(site.server.connections) == 1, "while there is room it may take its time"
    other = await site.connect()
    await site.send(other, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % (b"value/%d" % (6 * MIB)))
    assert await read_all(other) > 6 * MIB


async def test_of_many_clients_that_take_nothing_few_are_cut_off_in_one_turn(make_site: Callable[..., Any]) -> None:
    """Else all that they held is freed, and given to all who wait, before anybody else has a turn."""
    site = await make_site(answer_bytes_in_flight_max=100 * MIB, answer_stall_s=0.3, answer_wait_s=WAIT_S)
    for _ in range(10):
        await site.send(await site.connect(), GET % (b"value/%d" % (8 * MIB)))
    await until(lambda: site.account.under_way_bytes == 80 * MIB and len(site.server.connections) == 10)
    waiting = asyncio.create_task(site.account.reserve(90 * MIB))
    lost, before = [], 10
    async with asyncio.timeout(WAIT_S):
        while not waiting.done():
            await asyncio.sleep(0)
            lost.append(before - len(site.server.connections))
            before -= lost[-1]
    site.account.release(90 * MIB)
    assert sum(lost) >= 8
    assert max(lost) <= 2


async def test_a_request_that_finds_no_room_in_time_is_429(make_site: Callable[..., Any]) -> None:
    site = await make_site(answer_bytes_in_flight_max=24 * MIB, answer_stall_s=60.0, answer_wait_s=0.1)
    idle = await site.connect()
    await site.send(idle, GET % (b"value/%d" % (20 * MIB)))
    await until(lambda: site.account.under_way_bytes == 20 * MIB)
    other = await site.connect()
    await site.send(other, GET % (b"value/%d" % (6 * MIB)))
    assert b" 429 " in await asyncio.wait_for(asyncio.get_running_loop().sock_recv(other, 100), WAIT_S)
    assert site.account.under_way_bytes == 20 * MIB


async def test_a_header_that_never_ends_is_refused(make_site: Callable[..., Any]) -> None:
    site = await make_site()
    connection = await site.connect(1_000_000)
    await site.send(connection, b"GET /value/1 HTTP/1.1\r\nHost: localhost\r\n")
    field = b"X-%d: " + b"v" * 10_000 + b"\r\n"
    for number in range(HEAD_BYTES_MAX // 10_000 + 2):
        await site.send(connection, field % number)
        await asyncio.sleep(0)
    answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1000), WAIT_S)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert site.begun == 0
    await until(lambda: not site.server.connections)


# --- the account alone ------------------------------------------------------------------------------------------------


async def test_those_who_wait_for_room_get_it_in_their_order_and_a_smaller_one_does_not_overtake() -> None:
    account = AnswerAccount(Limits(answer_bytes_in_flight_max=100 * 8 // 7 + 1))
    await account.reserve(80)
    order: list[int] = []

    async def one(size: int) -> None:
        await account.reserve(size)
        order.append(size)

    tasks = [asyncio.create_task(one(size)) for size in (60, 30)]
    await asyncio.sleep(0)
    assert not account.try_reserve(10), "others were there before"
    account.release(80)
    await asyncio.gather(*tasks)
    assert order == [60, 30]
    assert account.under_way_bytes == 90


async def test_single_values_do_not_wait_behind_pages() -> None:
    account = AnswerAccount(Limits(answer_bytes_in_flight_max=64_000))
    await account.reserve(56_000)
    assert not account.try_reserve(501), "what is left is kept for smaller ones"
    page = asyncio.create_task(account.reserve(8_000))
    await asyncio.sleep(0)
    for _ in range(16):
        assert account.try_reserve(500)
    assert not account.try_reserve(500)
    assert not page.done()
    account.release(64_000)
    await asyncio.wait_for(page, WAIT_S)


async def test_parts_of_a_large_answer_take_none_of_the_room_for_single_values_however_small_they_are() -> None:
    account = AnswerAccount(Limits(answer_bytes_in_flight_max=1024))
    async with asyncio.timeout(60), Room(account, is_parts=True) as batch:
        for _ in range(112):
            await batch.add(8)
        assert not batch.has_room(8)
        assert account.has_room(8)
        another = asyncio.create_task(Room(account, is_parts=True).add(8))
        await asyncio.sleep(0)
        assert account.try_reserve(8), "it does not wait behind that one"
        account.release(8)
        assert not another.done()
        batch.change(-8)
        await another


async def test_one_that_is_larger_than_the_bound_gets_room_alone() -> None:
    account = AnswerAccount(Limits(answer_bytes_in_flight_max=100, answer_wait_s=0.05))
    assert account.try_reserve(500)
    with pytest.raises(TooManyRequests):
        await account.reserve(1)
    account.release(500)
    assert account.under_way_bytes == 0


async def test_one_that_gives_up_waiting_leaves_the_line_to_those_behind_it() -> None:
    account = AnswerAccount(Limits(answer_bytes_in_flight_max=100, answer_wait_s=WAIT_S))
    await account.reserve(50)
    impatient = asyncio.create_task(account.reserve(80))
    patient = asyncio.create_task(account.reserve(30))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.wait_for(patient, WAIT_S)
    assert account.under_way_bytes == 80


async def test_a_room_gives_back_what_is_left_of_it_once() -> None:
    account = AnswerAccount(Limits())
    async with Room(account) as room:
        await room.add(100)
        room.change(50)
        room.change(-20)
        assert account.under_way_bytes == 130
    room.change(70)  # an answer that comes after its request has ended
    assert account.under_way_bytes == 0
