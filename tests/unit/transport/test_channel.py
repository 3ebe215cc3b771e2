"""The channel over real WebSockets: frames, bounds, and what a lost connection means for whom."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.model import Attempt
from kvstore.protocol import (
    Answer,
    Delete,
    Get,
    GetTxn,
    Info,
    Put,
    ReadLock,
    Request,
    Scan,
    Stats,
    decode_replies,
    decode_requests,
    encode_frame,
)
from kvstore.transport.channel import Channel, Connection
from kvstore.transport.sessions import ADOPT, IS_STRANGER, ClusterSession
from tests.unit.waiting import WAIT_S, until

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


async def outcome(future: asyncio.Future[Any]) -> Any:
    """The reply, or the error instead of it."""
    try:
        return await asyncio.wait_for(asyncio.shield(future), WAIT_S)
    except KvError as error:
        return error


# --- frames -----------------------------------------------------------------------------------------------------------


async def test_what_is_asked_in_one_turn_of_the_loop_leaves_in_one_frame(far: Any, channel: Channel) -> None:
    futures = [channel.request(Get(0, f"key-{number}")) for number in range(100)]
    await until(lambda: len(far.requests) == 100)
    assert len(far.frames) == 1
    assert [request.key for request in far.frames[0]] == [f"key-{number}" for number in range(100)]
    assert not any(future.done() for future in futures)


async def test_what_is_asked_later_leaves_in_another_frame_without_waiting_for_answers(
    far: Any, channel: Channel
) -> None:
    channel.request(Get(0, "a"))
    await until(lambda: len(far.frames) == 1)
    channel.request(Get(0, "b"))
    await until(lambda: len(far.frames) == 2)


async def test_ids_are_unique_and_answers_find_their_askers_in_any_order(far: Any, channel: Channel) -> None:
    futures = [channel.request(Get(0, f"key-{number}")) for number in range(10)]
    await until(lambda: len(far.requests) == 10)
    ids = [request.id for request in far.requests]
    assert len(set(ids)) == 10
    for position in (7, 2, 9):
        await far.send(Answer(ids[position], 200, position, b"%d" % position))
    rest = [position for position in range(10) if position not in (7, 2, 9)]
    await far.send(*(Answer(ids[position], 200, position, b"%d" % position) for position in reversed(rest)))
    assert [(await future).version for future in futures] == list(range(10))


async def test_an_answer_comes_while_others_are_still_waited_for(far: Any, channel: Channel) -> None:
    slow, quick = channel.request(Put(0, "slow", b"")), channel.request(Get(0, "quick"))
    await until(lambda: len(far.requests) == 2)
    await far.send(Answer(far.requests[1].id, 404))
    assert (await quick).status == 404
    assert not slow.done()
    assert channel.ops_under_way == 1


async def test_a_frame_is_bounded_in_bytes(far: Any, connect: Any) -> None:
    channel = await connect(frame_bytes_max=10_000)
    for number in range(20):
        channel.request(Put(0, f"key-{number}", b"v" * 3000))
    await until(lambda: len(far.requests) == 20)
    assert [request.key for request in far.requests] == [f"key-{number}" for number in range(20)]
    assert max(sum(len(request.value) for request in frame) for frame in far.frames) <= 10_000 + 3000
    assert len(far.frames) >= 5


async def test_a_value_larger_than_a_frame_still_leaves(far: Any, connect: Any) -> None:
    channel = await connect(frame_bytes_max=1000)
    channel.request(Put(0, "a", b"v" * MIB))
    await until(lambda: far.requests)
    assert len(far.requests[0].value) == MIB


async def test_an_answer_that_is_not_waited_for_is_dropped(far: Any, channel: Channel) -> None:
    await far.send(Answer(4711, 200))
    future = channel.request(Get(0, "a"))
    await until(lambda: far.requests)
    await far.send(Answer(far.requests[0].id, 404))
    await far.send(Answer(far.requests[0].id, 200))
    assert (await future).status == 404
    assert channel.connected


async def test_all_that_a_value_can_hold_arrives_as_it_was_sent(far: Any, channel: Channel) -> None:
    value = bytes(range(256)) * 100
    future = channel.request(Put(0, "🔑/nul\0", value, 77))
    await until(lambda: far.requests)
    (put,) = far.requests
    assert (put.key, put.value, put.ttl_ms) == ("🔑/nul\0", value, 77)
    await far.send(Answer(put.id, 200, 2**53 - 1, value, 5, {"code": "x", "n": [1, None]}))
    answer = await future
    assert (answer.version, answer.value, answer.ttl_left_ms) == (2**53 - 1, value, 5)
    assert answer.problem == {"code": "x", "n": [1, None]}


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_past_its_bound_of_operations_it_refuses_at_once_and_goes_on_when_answers_came(
    far: Any, connect: Any
) -> None:
    channel = await connect(channel_ops_max=3)
    futures = [channel.request(Get(0, "a")) for _ in range(3)]
    with pytest.raises(TooManyRequests) as refused:
        channel.request(Get(0, "b"))
    assert refused.value.members["retry_after_ms"] > 0
    await until(lambda: len(far.requests) == 3)
    await far.send(Answer(far.requests[0].id, 404))
    await futures[0]
    channel.request(Get(0, "b"))


async def test_past_its_bound_of_bytes_it_refuses_at_once_and_gives_the_bytes_back(far: Any, connect: Any) -> None:
    channel = await connect(channel_bytes_max=10_000)
    future = channel.request(Put(0, "a", b"v" * 6000))
    with pytest.raises(TooManyRequests):
        channel.request(Put(0, "b", b"v" * 6000))
    channel.request(Put(0, "small", b"v"))
    await until(lambda: len(far.requests) == 2)
    await far.send(*(Answer(request.id, 201) for request in far.requests))
    await future
    assert (channel.bytes_under_way, channel.ops_under_way) == (0, 0)
    channel.request(Put(0, "b", b"v" * 6000))


async def test_a_get_counts_for_what_gets_brought_lately(far: Any, connect: Any) -> None:
    channel = await connect(channel_bytes_max=20_000)
    for number in range(30):
        future = channel.request(Get(0, "a"))
        await until(lambda count=number + 1: len(far.requests) == count)
        await far.send(Answer(far.requests[-1].id, 200, 1, bytes(6000)))
        await future
    futures = [channel.request(Get(0, "a")) for _ in range(3)]
    with pytest.raises(TooManyRequests):
        channel.request(Get(0, "a"))
    await until(lambda: len(far.requests) == 33)
    await far.send(*(Answer(request.id, 200, 1, b"") for request in far.requests[-3:]))
    await asyncio.gather(*futures)
    assert channel.bytes_under_way == 0


async def test_a_get_that_brings_small_values_only_does_not_count_for_large_ones_that_others_brought(
    far: Any, connect: Any
) -> None:
    channel = await connect(channel_bytes_max=20_000)
    for number in range(30):
        future = channel.request(Get(0, "large"))
        await until(lambda count=number + 1: len(far.requests) == count)
        await far.send(Answer(far.requests[-1].id, 200, 1, bytes(6000)))
        await future
    small = [channel.request(Get(0, "small", 1000)) for _ in range(10)]
    channel.request(Get(0, "large"))
    await until(lambda: len(far.requests) == 41)
    await far.send(*(Answer(request.id, 200, 1, bytes(800)) for request in far.requests[30:40]))
    await asyncio.gather(*small)
    before = channel.bytes_under_way
    channel.request(Get(0, "small", 1000))
    assert 400 < channel.bytes_under_way - before < 1000


async def test_a_page_of_values_counts_for_the_largest_page(connect: Any) -> None:
    channel = await connect(channel_bytes_max=10_000, page_bytes_max=6000)
    channel.request(Scan(0, "", "", 100, True))
    with pytest.raises(TooManyRequests):
        channel.request(Scan(0, "", "", 100, True))
    channel.request(Scan(0, "", "", 100, False))


# --- lost connections -------------------------------------------------------------------------------------------------


async def test_before_it_is_connected_it_refuses_as_unavailable(connect: Any, far: Any) -> None:
    channel = await connect(wait=False)
    with pytest.raises(Unavailable) as refused:
        channel.request(Get(0, "a"))
    assert refused.value.members["shard"] == "s1"
    assert refused.value.members["retry_after_ms"] > 0


async def test_when_the_connection_is_lost_reads_are_unavailable_and_writes_that_left_have_an_unknown_outcome(
    far: Any, channel: Channel
) -> None:
    requests = [Get(0, "a"), Put(0, "b", b""), Delete(0, "c"), Scan(0, "", "", 1), Stats(0)]
    futures = [channel.request(request) for request in requests]
    await until(lambda: len(far.requests) == 5)
    far.hang_up()
    kinds = [type(await outcome(future)) for future in futures]
    assert kinds == [Unavailable, OutcomeUnknown, OutcomeUnknown, Unavailable, Unavailable]
    assert (channel.ops_under_way, channel.bytes_under_way) == (0, 0)


async def test_writes_that_never_left_are_unavailable_and_do_not_leave_later(far: Any, connect: Any) -> None:
    far.reads = False
    channel = await connect(frame_bytes_max=MIB)
    futures = [channel.request(Put(0, f"key-{number:02}", b"v" * MIB)) for number in range(40)]
    await until(lambda: channel._link.under_way.sent_up_to > 1)
    await asyncio.sleep(0.05)
    far.reads = True
    far.hang_up()
    kinds = [type(await outcome(future)) for future in futures]
    left = kinds.count(OutcomeUnknown)
    assert 0 < left < 40
    assert kinds == [OutcomeUnknown] * left + [Unavailable] * (40 - left)
    await until(lambda: channel.connected)
    channel.request(Get(0, "after"))
    await until(lambda: far.requests)
    assert [request.key for request in far.requests] == ["after"]


async def test_it_connects_again_and_nothing_is_sent_twice(far: Any, channel: Channel) -> None:
    lost = channel.request(Put(0, "lost", b""))
    await until(lambda: far.requests)
    far.hang_up()
    await outcome(lost)
    await until(lambda: channel.connected and len(far.sockets) == 2)
    future = channel.request(Put(0, "again", b""))
    await until(lambda: len(far.requests) == 2)
    assert [request.key for request in far.requests] == ["lost", "again"]
    await far.send(Answer(far.requests[1].id, 201))
    assert (await future).status == 201


async def test_it_goes_on_trying_until_the_shard_is_there(far: Any) -> None:
    async with aiohttp.ClientSession() as session:
        port = int(far.url.rsplit(":", 1)[1])
        late = Channel("s1", "http://127.0.0.1:9", Limits(reconnect_wait_s_max=0.02), session)
        await asyncio.sleep(0.05)
        assert not late.connected
        late._link._dialer._url = f"http://127.0.0.1:{port}"
        await until(lambda: late.connected)
        await late.close()


async def test_it_says_which_shard_it_wants(far: Any, channel: Channel) -> None:
    assert far.queries[0].startswith("/channel?shard=s1")


async def test_each_hello_names_the_session_that_the_process_is_in_by_then(far: Any) -> None:
    cluster = ClusterSession("first")
    async with aiohttp.ClientSession() as session:
        channel = Channel("s1", far.url, Limits(reconnect_wait_s_max=0.02), session, "x", cluster)
        await until(lambda: channel.connected)
        cluster.enter("second")
        far.hang_up()
        await until(lambda: len(far.queries) > 1 and channel.connected)
        await channel.close()
    assert [query.rpartition("session=")[2] for query in far.queries] == ["first", "second"]


async def test_a_shard_of_another_cluster_is_left_alone_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    async def refuse(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        return web.Response(status=IS_STRANGER)

    app = web.Application()
    app.router.add_get("/channel", refuse)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        channel = Channel("s1", str(server.make_url("")).rstrip("/"), Limits(reconnect_wait_s_max=0.02), session)
        await until(lambda: len(asked) > 3)
        with pytest.raises(Unavailable):
            channel.request(Put(0, "a", b""))
        await channel.close()
    (record,) = caplog.records
    assert ADOPT in record.getMessage()


async def test_closing_it_ends_what_waits_and_closes_the_connection(far: Any, channel: Channel) -> None:
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: len(far.requests) == 2)
    await channel.close()
    assert isinstance(await outcome(read), Unavailable)
    assert isinstance(await outcome(write), OutcomeUnknown)
    await asyncio.wait_for(far.gone.wait(), WAIT_S)
    with pytest.raises(Unavailable):
        channel.request(Get(0, "a"))


async def test_a_frame_that_is_none_costs_the_connection_and_not_the_channel(far: Any, channel: Channel) -> None:
    future = channel.request(Put(0, "a", b""))
    await until(lambda: far.requests)
    await far.sockets[-1].send_bytes(b"\xc1 this is not msgpack")
    assert isinstance(await outcome(future), OutcomeUnknown)
    await until(lambda: channel.connected and len(far.sockets) == 2)
    channel.request(Get(0, "b"))
    await until(lambda: len(far.requests) == 2)


async def test_operations_that_fail_while_they_are_not_awaited_are_no_cause_for_complaint(
    far: Any, channel: Channel
) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for _ in range(3):
        channel.request(Put(0, "a", b""))
    await until(lambda: len(far.requests) == 3)
    far.hang_up()
    await until(lambda: not channel.ops_under_way)
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_caller_that_stops_waiting_disturbs_no_other(far: Any, channel: Channel) -> None:
    gone, kept = channel.request(Get(0, "gone")), channel.request(Get(0, "kept"))
    await until(lambda: len(far.requests) == 2)
    gone.cancel()
    await far.send(*(Answer(request.id, 404) for request in far.requests))
    assert (await kept).status == 404
    assert channel.ops_under_way == 0


# --- what the log says ------------------------------------------------------------------------------------------------


@contextmanager
def no_file_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_process_that_may_open_no_more_files_says_so_once_and_when_it_is_over(
    far: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore.transport.dialing")
    with no_file_left():
        channel = await connect(wait=False)
        await until(lambda: caplog.text)
        await asyncio.sleep(0.1)  # several tries more
        assert not channel.connected
    await until(lambda: channel.connected)
    lost, found = caplog.messages
    assert "Too many open files" in lost
    assert "raise the limit of open files" in lost
    assert found == f"shard s1 at {far.url} is reached again"


# --- time-outs --------------------------------------------------------------------------------------------------------


async def test_what_is_not_answered_in_time_is_unavailable_for_a_read_and_unknown_for_a_write(
    far: Any, connect: Any
) -> None:
    channel = await connect(request_timeout_s=0.2)
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: far.requests)
    far.answers_all = True
    for _ in range(3):
        await asyncio.sleep(0.05)
        await channel.request(Stats(0))
    assert isinstance(await outcome(read), Unavailable)
    assert isinstance(await outcome(write), OutcomeUnknown)
    assert channel.ops_under_way == 0


async def test_a_shard_that_says_nothing_at_all_loses_its_connection(far: Any, connect: Any) -> None:
    channel = await connect(request_timeout_s=0.2)
    assert isinstance(await outcome(channel.request(Put(0, "a", b""))), OutcomeUnknown)
    await until(lambda: len(far.sockets) == 2 and channel.connected)


async def test_a_shard_that_answers_others_in_time_keeps_its_connection(far: Any, connect: Any) -> None:
    channel = await connect(request_timeout_s=0.2)
    slow = channel.request(Get(0, "slow"))
    await until(lambda: far.requests)
    far.answers_all = True
    while not slow.done():
        await channel.request(Stats(0))
        await asyncio.sleep(0.02)
    assert isinstance(await outcome(slow), Unavailable)
    assert len(far.sockets) == 1
    assert channel.connected


async def test_what_came_while_this_process_stood_still_is_read_before_anything_is_timed_out(
    far: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = await connect(request_timeout_s=60)
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: len(far.requests) == 2)
    answers = (Answer(request.id, 200, value=bytes(MIB)) for request in far.requests)  # more than is read at once
    sending = asyncio.create_task(far.send(*answers))
    await asyncio.sleep(0)  # it lies in the socket
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: time.monotonic() + 100.0)
    assert (await outcome(read)).status == 200
    assert (await outcome(write)).status == 200
    assert len(far.sockets) == 1
    await sending


async def test_a_write_that_timed_out_before_it_left_does_not_leave_afterwards(far: Any, connect: Any) -> None:
    far.reads = False
    channel = await connect(frame_bytes_max=MIB, request_timeout_s=0.3)
    futures = [channel.request(Put(0, f"key-{number:02}", b"v" * MIB)) for number in range(40)]
    while not all(future.done() for future in futures):
        await far.send(Info(4711, 1, {}))  # it is alive and answers; it is slow to take in what is sent
        await asyncio.sleep(0.02)
    outcomes = [await outcome(future) for future in futures]
    unsent = {f"key-{number:02}" for number, error in enumerate(outcomes) if isinstance(error, Unavailable)}
    assert unsent
    assert len(far.sockets) == 1
    far.transports[0].resume_reading()
    last = channel.request(Get(0, "last"))
    await until(lambda: any(request.key == "last" for request in far.requests) or last.done())
    assert not unsent & {request.key for request in far.requests}, "its asker was told that nothing was done"


# --- the shard's end --------------------------------------------------------------------------------------------------


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


async def test_messages_that_count_little_and_are_large_leave_in_frames_that_the_far_end_reads(
    far: Any, connect: Any
) -> None:
    channel = await connect(frame_bytes_max=10_000)
    futures = [channel.request(Get(0, f"{number:03}" + "k" * 1000)) for number in range(100)]
    await until(lambda: len(far.requests) == len(futures))
    assert [request.key[:3] for request in far.requests] == [f"{number:03}" for number in range(100)]
    assert max(len(encode_frame(frame)) for frame in far.frames) <= 20_000


async def test_text_is_no_frame(door: Any) -> None:
    shard, socket = door
    await socket.send_str("hello")
    assert (await socket.receive(WAIT_S)).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert shard.handled == []


# --- strikes ----------------------------------------------------------------------------------------------------------


async def test_a_strike_is_named_before_what_is_asked_by_it_and_again_on_each_connection(
    far: Any, connect: Any
) -> None:
    channel = await connect()
    channel.request(Get(0, "before"))
    channel.name_strike(7)
    channel.name_strike(7)
    channel.request(Get(0, "after"))
    await until(lambda: len(far.requests) == 3)
    assert [getattr(each, "key", 0) or each.strike for each in far.requests] == ["before", 7, "after"]
    far.hang_up()
    await until(lambda: len(far.sockets) == 2 and channel.connected)
    channel.request(Get(0, "again"))
    await until(lambda: len(far.requests) == 5)
    assert [getattr(each, "key", 0) or each.strike for each in far.requests[3:]] == [7, "again"]
