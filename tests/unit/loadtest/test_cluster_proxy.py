"""The proxy between processes: real sockets on both sides of it, and everything that can be done to them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from random import Random

import pytest

from loadtest.cluster.duplicates import RequestFinder
from loadtest.cluster.proxy import CONNECTED, Proxy

WAIT_S = 20.0
DEAF_BYTES = 40_000_000  # more than all buffers of a connection that is not read


class Stream:
    """One end of a connection as a process sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self, count: int) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readexactly(count)

    async def rest(self) -> bytes:
        """All until the other side ends. Raises ConnectionResetError if it does so by a reset."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    async def is_reset(self) -> bool:
        try:
            await self.rest()
        except ConnectionResetError:
            return True
        return False

    def reset(self) -> None:
        """End it as a process that is killed with bytes unread does."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class Scene:
    """The process `a` connects to `b`, which listens at `address`; `took` are b's ends of the connections."""

    def __init__(self, proxy: Proxy, server: asyncio.Server, took: asyncio.Queue[Stream], address: str) -> None:
        self.proxy = proxy
        self.server = server
        self.took = took
        self.address = address
        self.streams: list[Stream] = []

    async def greet(self, source: str = "a", address: str = "") -> Stream:
        """The greeting is said; it is not answered yet."""
        host, _, port = self.proxy.address.rpartition(":")
        stream = Stream(*await asyncio.open_connection(host, int(port)))
        self.streams.append(stream)
        stream.writer.write(f"{source} {address or self.address}\n".encode())
        return stream

    async def connect(self, source: str = "a") -> tuple[Stream, Stream]:
        """Both ends of a new connection."""
        near = await self.greet(source)
        assert await near.read(1) == CONNECTED
        return near, await self.accepted()

    async def accepted(self) -> Stream:
        async with asyncio.timeout(WAIT_S):
            far = await self.took.get()
        self.streams.append(far)
        return far

    async def until(self, condition: Callable[[], object], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not within {WAIT_S:g} s: {what}") from None

    async def until_quiet(self) -> None:
        """Nothing more comes through the proxy."""
        before = -1
        while before != self.proxy.counts.bytes:
            before = self.proxy.counts.bytes
            await asyncio.sleep(0.05)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    took: asyncio.Queue[Stream] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        took.put_nowait(Stream(reader, writer))

    proxy = Proxy(seed=7)
    await proxy.start()
    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1024)
    host, port = server.sockets[0].getsockname()
    proxy.faults.names[f"{host}:{port}"] = "b"
    played = Scene(proxy, server, took, f"{host}:{port}")
    try:
        yield played
    finally:
        await proxy.stop()
        while not took.empty():
            played.streams.append(took.get_nowait())
        for stream in played.streams:
            await stream.close()
        server.close()
        await server.wait_closed()
    assert len(proxy.connections.near) == 0


# --- without faults --------------------------------------------------------------------------------------------------


async def test_bytes_pass_both_ways_as_they_are(scene: Scene) -> None:
    near, far = await scene.connect()
    sent = Random(1).randbytes(3_000_000)
    near.writer.write(sent)
    assert await far.read(len(sent)) == sent
    far.writer.write(sent)
    assert await near.read(len(sent)) == sent
    assert scene.proxy.counts.bytes == 2 * len(sent)


async def test_a_side_that_has_said_all_still_hears_the_other(scene: Scene) -> None:
    near, far = await scene.connect()
    near.writer.write(b"a question")
    near.writer.write_eof()
    assert await far.rest() == b"a question"
    far.writer.write(b"an answer")
    await far.close()
    assert await near.rest() == b"an answer"
    await scene.until(lambda: len(scene.proxy.connections.near) == 0, "the connection is over on both sides")


async def test_what_is_written_before_a_close_arrives_before_it(scene: Scene) -> None:
    near, far = await scene.connect()
    sent = Random(2).randbytes(2_000_000)
    far.writer.write(sent)
    closing = asyncio.create_task(far.close())
    assert await near.rest() == sent
    await closing


@pytest.mark.parametrize("by", ["near", "far"])
async def test_a_reset_is_passed_on_as_a_reset(scene: Scene, by: str) -> None:
    near, far = await scene.connect()
    one, other = (near, far) if by == "near" else (far, near)
    one.reset()
    assert await other.is_reset()
    await scene.until(lambda: len(scene.proxy.connections.near) == 0, "the connection is over on both sides")


async def test_a_destination_that_refuses_looks_like_one(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unbound:
        port = unbound.getsockname()[1]
    near = await scene.greet(address=f"127.0.0.1:{port}")
    assert await near.is_reset()
    assert scene.proxy.counts.refused == 1


@pytest.mark.parametrize("said", [b"too many words here\n", b"x" * 10_000, b"a nowhere\n", b"a 127.0.0.1:99999\n"])
async def test_a_greeting_that_is_none_ends_the_connection(scene: Scene, said: bytes) -> None:
    host, _, port = scene.proxy.address.rpartition(":")
    near = Stream(*await asyncio.open_connection(host, int(port)))
    scene.streams.append(near)
    near.writer.write(said)
    with contextlib.suppress(ConnectionResetError):
        assert await near.rest() == b""


async def test_a_greeting_may_come_in_pieces_with_more_behind_it(scene: Scene) -> None:
    host, _, port = scene.proxy.address.rpartition(":")
    near = Stream(*await asyncio.open_connection(host, int(port)))
    scene.streams.append(near)
    for piece in (b"a 127.", b"0.0.1:", scene.address.rpartition(":")[2].encode() + b"\nhel"):
        near.writer.write(piece)
        await asyncio.sleep(0.02)
    near.writer.write(b"lo")
    far = await scene.accepted()
    assert await far.read(5) == b"hello"


async def test_who_does_not_read_is_not_sent_ever_more(scene: Scene) -> None:
    near, far = await scene.connect()
    sent = Random(3).randbytes(DEAF_BYTES)
    far.reader._transport.pause_reading()  # type: ignore[attr-defined]
    near.writer.write(sent)
    await scene.until_quiet()
    assert 0 < scene.proxy.counts.bytes < DEAF_BYTES - 10_000_000
    far.reader._transport.resume_reading()  # type: ignore[attr-defined]
    assert await far.read(len(sent)) == sent


async def test_thousands_of_connections_leave_nothing_behind(scene: Scene) -> None:
    async def one(number: int) -> None:
        near, far = await scene.connect()
        near.writer.write(b"x" * number)
        if number % 3 == 0:
            near.reset()
        elif number % 3 == 1:
            far.reset()
        else:
            await near.close()
            assert len(await far.rest()) == number
            await far.close()

    for first in range(0, 2_000, 50):
        await asyncio.gather(*(one(number) for number in range(first, first + 50)))
        scene.streams.clear()
    await scene.until(lambda: len(scene.proxy.connections.near) == 0, "all connections are over")
    assert scene.proxy.counts.connections == 2_000
    assert scene.proxy.connections._connecting == {}


async def test_nothing_stays_open_when_the_links_stop(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.cut("a", "b")
    waiting = await scene.greet()
    await scene.until(lambda: len(scene.proxy.connections.near) == 2, "the second one is being made")
    await scene.proxy.stop()
    for stream in (near, far, waiting):
        assert await stream.is_reset()


# --- cut -------------------------------------------------------------------------------------------------------------


async def test_a_link_cut_one_way_swallows_that_way_only(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.cut("a", "b")
    near.writer.write(b"unheard")
    far.writer.write(b"heard")
    assert await near.read(5) == b"heard"
    await scene.until(lambda: scene.proxy.counts.bytes_cut == len(b"unheard"), "it has vanished")
    assert not far.reader.at_eof()
    assert far.reader._buffer == b""  # type: ignore[attr-defined]


async def test_answers_can_be_cut_while_questions_arrive(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.cut("b", "a")
    near.writer.write(b"heard")
    assert await far.read(5) == b"heard"
    far.writer.write(b"unheard")
    await scene.until(lambda: scene.proxy.counts.bytes_cut == len(b"unheard"), "it has vanished")
    assert near.reader._buffer == b""  # type: ignore[attr-defined]


async def test_a_cut_is_between_two_processes_whichever_connected(scene: Scene) -> None:
    near, far = await scene.connect("c")
    scene.proxy.cut("a", "b")
    near.writer.write(b"from another client")
    assert await far.read(19) == b"from another client"


async def test_a_healed_link_ends_connections_that_lost_something_and_no_others(scene: Scene) -> None:
    lossy, lossy_far = await scene.connect()
    idle, idle_far = await scene.connect()
    scene.proxy.cut("a", "b")
    lossy.writer.write(b"lost")
    await scene.until(lambda: scene.proxy.counts.bytes_cut == 4, "it has vanished")
    scene.proxy.heal("a", "b")
    lossy.writer.write(b"this would come without what was before it")
    assert await lossy.is_reset()
    assert await lossy_far.is_reset()
    idle.writer.write(b"all is well")
    assert await idle_far.read(11) == b"all is well"


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_the_end_of_a_process_is_not_heard_through_a_cut_but_when_it_heals(scene: Scene, end: str) -> None:
    near, far = await scene.connect()
    scene.proxy.cut("a", "b")
    if end == "close":
        await near.close()
    else:
        near.reset()
    await scene.until_quiet()
    far.writer.write(b"is any one there?")
    await scene.until_quiet()
    assert not far.reader.at_eof()
    assert len(scene.proxy.connections.near) == 1
    scene.proxy.heal("a", "b")
    assert await far.is_reset()


@pytest.mark.parametrize(("source", "destination"), [("a", "b"), ("b", "a")])
async def test_no_connection_is_made_while_either_way_is_cut(scene: Scene, source: str, destination: str) -> None:
    scene.proxy.cut(source, destination)
    near = await scene.greet()
    await scene.until(lambda: len(scene.proxy.connections.near) == 1, "it waits")
    await scene.until_quiet()
    assert scene.took.empty()
    assert near.reader._buffer == b""  # type: ignore[attr-defined]
    scene.proxy.heal(source, destination)
    assert await near.read(1) == CONNECTED
    far = await scene.accepted()
    near.writer.write(b"late")
    assert await far.read(4) == b"late"


async def test_who_gives_up_waiting_for_a_cut_link_never_connects(scene: Scene) -> None:
    scene.proxy.cut("a", "b")
    near = await scene.greet()
    await scene.until(lambda: len(scene.proxy.connections.near) == 1, "it waits")
    await near.close()
    await scene.until(lambda: len(scene.proxy.connections.near) == 0, "it has been given up")
    scene.proxy.heal_all()
    await scene.connect()
    assert scene.took.empty()


async def test_a_process_that_is_named_later_is_cut_by_its_name(scene: Scene) -> None:
    del scene.proxy.faults.names[scene.address]
    near, _ = await scene.connect()
    scene.proxy.cut("a", "b")
    scene.proxy.faults.names[scene.address] = "b"
    near.writer.write(b"unheard")
    await scene.until(lambda: scene.proxy.counts.bytes_cut == 7, "it has vanished")


# --- stalled, slow, lossy, reset -------------------------------------------------------------------------------------


async def test_a_stalled_link_delivers_everything_when_it_is_healed(scene: Scene) -> None:
    near, far = await scene.connect()
    near.writer.write(b"before, ")
    assert await far.read(8) == b"before, "
    scene.proxy.stall("a", "b")
    near.writer.write(b"during, ")
    far.writer.write(b"heard")
    assert await near.read(5) == b"heard"
    await scene.until_quiet()
    assert far.reader._buffer == b""  # type: ignore[attr-defined]
    scene.proxy.heal("a", "b")
    near.writer.write(b"after")
    await near.close()
    assert await far.rest() == b"during, after"


async def test_a_stalled_link_takes_in_no_more_than_buffers_hold(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.stall("a", "b")
    sent = Random(4).randbytes(DEAF_BYTES)
    near.writer.write(sent)
    await scene.until_quiet()
    assert scene.proxy.counts.bytes < 1_000_000
    scene.proxy.heal_all()
    assert await far.read(len(sent)) == sent


async def test_a_slow_link_delivers_later_and_in_order(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.delay("a", "b", 80, 60)
    clock = asyncio.get_running_loop()
    began_s = clock.time()
    near.writer.write(b"first ")
    assert await far.read(6) == b"first "
    assert clock.time() - began_s >= 0.08
    for number in range(100):
        near.writer.write(b"%d " % number)
        await asyncio.sleep(0.001)
    near.writer.write_eof()
    assert await far.rest() == b"".join(b"%d " % number for number in range(100))


async def test_what_is_on_its_way_over_a_slow_link_comes_before_what_follows_its_healing(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.delay("a", "b", 200)
    near.writer.write(b"slow, ")
    await scene.until(lambda: scene.proxy.counts.bytes == 6, "it is on its way")
    scene.proxy.heal("a", "b")
    near.writer.write(b"fast")
    assert await far.read(10) == b"slow, fast"


async def test_a_slow_link_holds_no_more_than_it_may(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.delay("a", "b", 300)
    sent = Random(5).randbytes(6_000_000)
    near.writer.write(sent)
    held = 0

    async def watch() -> None:
        nonlocal held
        while True:
            held = max(held, *(end.late.bytes for end in scene.proxy.connections.near))
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    assert await far.read(len(sent)) == sent
    watching.cancel()
    assert 0 < held <= 1024 * 1024 + 256 * 1024  # of the one read that passed the bound


async def test_a_lossy_link_loses_the_connection_with_what_it_loses(scene: Scene) -> None:
    near, far = await scene.connect()
    scene.proxy.drop("a", "b", 1.0)
    far.writer.write(b"this way is well")
    assert await near.read(16) == b"this way is well"
    near.writer.write(b"lost")
    assert await near.is_reset()
    assert await far.is_reset()
    assert scene.proxy.counts.drops == 1


async def test_a_reset_ends_all_connections_of_two_processes_and_no_others(scene: Scene) -> None:
    near, far = await scene.connect()
    other, other_far = await scene.connect("c")
    assert scene.proxy.reset("b", "a") == 1
    assert await near.is_reset()
    assert await far.is_reset()
    other.writer.write(b"well")
    assert await other_far.read(4) == b"well"


# --- all at once -----------------------------------------------------------------------------------------------------


def _numbers(count: int) -> bytes:
    return b"".join(b"%08d" % number for number in range(count))


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_is_done_to_a_link_a_stream_has_no_hole(scene: Scene, seed: int) -> None:
    random = Random(seed)
    proxy, sent = scene.proxy, _numbers(40_000)

    async def talk(stream: Stream) -> None:
        with contextlib.suppress(ConnectionError):
            for begin in range(0, len(sent), 4_000):
                stream.writer.write(sent[begin : begin + 4_000])
                await stream.writer.drain()
                await asyncio.sleep(0.001)
            stream.writer.write_eof()

    async def listen(stream: Stream) -> tuple[bytes, bool]:
        heard = bytearray()
        try:
            while piece := await stream.reader.read(65_536):
                heard += piece
        except ConnectionError:
            return bytes(heard), False
        return bytes(heard), True

    async def disturb() -> None:
        while True:
            ways = random.sample(["a", "b"], 2)
            match random.randrange(7):
                case 0:
                    proxy.cut(*ways)
                case 1:
                    proxy.stall(*ways)
                case 2:
                    proxy.delay(*ways, 20, 20)
                case 3:
                    proxy.drop(*ways, 0.01)
                case 4 | 5:
                    proxy.heal(*ways)
                case 6:
                    proxy.heal_all()
            await asyncio.sleep(random.random() * 0.02)

    async with asyncio.timeout(WAIT_S):
        pairs = [await scene.connect() for _ in range(6)]
        disturbing = asyncio.create_task(disturb())
        streams = [stream for pair in pairs for stream in pair]
        listening = [asyncio.create_task(listen(stream)) for stream in streams]
        talking = [asyncio.create_task(talk(stream)) for stream in streams]
        await asyncio.sleep(0.4)
        disturbing.cancel()
        proxy.heal_all()
        heard = await asyncio.gather(*listening)
        await asyncio.gather(*talking)
    for said, is_whole in heard:
        assert sent.startswith(said)
        assert not is_whole or said == sent
    await scene.until(lambda: len(proxy.connections.near) == 0, "all connections are over")


# --- clients ---------------------------------------------------------------------------------------------------------


QUESTION = b"PUT /v1/kv/k HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k-1\r\nContent-Length: 5\r\n\r\nvalue"


async def client(scene: Scene) -> Stream:
    """Connected to b by a link from clients."""
    host, _, port = (await scene.proxy.open_for_clients(scene.address)).removeprefix("http://").rpartition(":")
    stream = Stream(*await asyncio.open_connection(host, int(port)))
    scene.streams.append(stream)
    return stream


async def test_a_client_reaches_a_router_without_a_greeting(scene: Scene) -> None:
    near = await client(scene)
    near.writer.write(QUESTION)
    far = await scene.accepted()
    assert await far.read(len(QUESTION)) == QUESTION
    far.writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    await far.close()
    assert await near.rest() == b"HTTP/1.1 204 No Content\r\n\r\n"


async def test_a_client_cut_off_from_the_start_is_heard_late_if_it_waits(scene: Scene) -> None:
    scene.proxy.cut("clients", "b")
    near = await client(scene)
    near.writer.write(QUESTION)
    await scene.until_quiet()
    assert scene.took.empty()
    scene.proxy.heal("clients", "b")
    far = await scene.accepted()
    assert await far.read(len(QUESTION)) == QUESTION


async def test_a_client_cut_off_from_the_start_that_leaves_is_never_heard(scene: Scene) -> None:
    scene.proxy.cut("b", "clients")
    near = await client(scene)
    near.writer.write(QUESTION)
    await near.close()
    await scene.until(lambda: scene.proxy.counts.bytes and not len(scene.proxy.connections.near), "it has left")
    scene.proxy.heal_all()
    await scene.connect()
    assert scene.took.empty()


async def test_a_request_with_an_idempotency_key_arrives_twice_and_is_answered_once(scene: Scene) -> None:
    scene.proxy.duplicate(1.0)
    near = await client(scene)
    near.writer.write(QUESTION)
    first = await scene.accepted()
    assert await first.read(len(QUESTION)) == QUESTION
    first.writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
    second = await scene.accepted()
    head = await second.read(len(QUESTION) + len(b"\r\nConnection: close"))
    assert head == QUESTION.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    second.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await second.close()
    await first.close()
    assert await near.rest() == b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
    assert scene.proxy.counts.duplicates == 1
    assert scene.proxy.was_duplicated("k-1")
    assert not scene.proxy.was_duplicated("k-2")


async def test_a_request_without_a_key_arrives_once(scene: Scene) -> None:
    scene.proxy.duplicate(1.0)
    near = await client(scene)
    near.writer.write(QUESTION.replace(b"Idempotency-Key", b"X-Some-Other-Key"))
    near.writer.write(QUESTION)
    first = await scene.accepted()
    await scene.accepted()
    await first.read(2 * len(QUESTION) + 1)
    assert scene.proxy.counts.duplicates == 1


def test_requests_are_found_in_pieces_of_any_size_and_nothing_behind_what_is_no_http() -> None:
    found: list[bytes] = []
    chunked = b"POST /v1/txn HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k-2\r\nTransfer-Encoding: chunked\r\n\r\n"
    finder = RequestFinder(lambda key: True, found.append)
    for byte in QUESTION + chunked + b"3\r\nabc\r\n0\r\n\r\n" + QUESTION + b"\x16\x03 no HTTP\r\n\r\n" + QUESTION:
        finder.feed(bytes([byte]))
    closing = QUESTION.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert [found[0], found[2]] == [closing, closing]
    assert found[1].startswith(chunked[:-2])
    assert len(found) == 3
