"""One WebSocket for all stores of a node: each message reaches the store that it is meant for, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.placement.cluster_map import at_home, first_map
from kvstore.protocol import Answer, ForStore, Get, Put, Request, encode_frame
from kvstore.router.channels import MemberChannels
from kvstore.transport.channel import Channel, Connection, Handle
from kvstore.transport.link import Links
from kvstore.transport.sessions import ClusterSession
from tests.unit.waiting import WAIT_S, until

LIMITS = Limits(reconnect_wait_s_max=0.02)
STORES = ("one", "two", "three")


class Node:
    """A node with three stores; it keeps what reached each, and answers with the number of the store."""

    def __init__(self) -> None:
        self.url = ""
        self.reached: list[tuple[str, Request]] = []
        self.sockets: list[web.WebSocketResponse] = []
        self.hellos: list[str] = []
        self.holds: set[str] = set()
        self.refused = 0
        self.is_starting = False

    def handle_of(self, store_id: str) -> Handle | None:
        if store_id not in STORES or self.is_starting:
            return None

        def handle(request: Request, connection: Connection) -> None:
            self.reached.append((store_id, request))
            if store_id not in self.holds:
                connection.send(Answer(request.id, 200, STORES.index(store_id)))

        return handle

    async def channel(self, request: web.Request) -> web.StreamResponse:
        handle = self.handle_of(request.query["store"])
        if handle is None:
            self.refused += 1
            raise web.HTTPNotFound
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        self.sockets.append(socket)
        self.hellos.append(request.query["store"])
        await Connection(LIMITS).serve(socket, handle, self.handle_of)
        return socket

    @property
    def keys(self) -> list[tuple[str, str]]:
        return [(store, request.key) for store, request in self.reached]  # type: ignore[union-attr]


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    found, app = Node(), web.Application()
    app.router.add_get("/channel", found.channel)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@pytest.fixture
async def channels(node: Node) -> AsyncIterator[dict[str, Channel]]:
    """To each of the node's stores, by one set of links; and to one that the node does not have."""
    async with aiohttp.ClientSession() as session:
        links = Links(LIMITS, session, ClusterSession())
        opened = {
            store: Channel(f"s-{store}", node.url, LIMITS, session, store, links=links) for store in (*STORES, "none")
        }
        await until(lambda: all(channel.connected for channel in opened.values()))
        yield opened
        for channel in opened.values():
            await channel.close()


async def test_all_stores_of_a_node_share_one_connection_and_each_gets_what_is_its_own(
    node: Node, channels: dict[str, Channel]
) -> None:
    wanted = [(STORES[number * 7 % 3], f"key-{number}") for number in range(200)]
    futures = [
        channels[store].request(Put(0, key, b"v"), at_leisure=number % 3 == 0)
        for number, (store, key) in enumerate(wanted)
    ]
    answers = await asyncio.gather(*futures)
    assert [answer.version for answer in answers] == [STORES.index(store) for store, _ in wanted]
    assert node.keys == wanted, "in the order in which they were asked"
    assert (len(node.sockets), node.hellos) == (1, ["three"])
    assert [channels[store].answered for store in STORES] == [True, True, True]


async def test_a_shard_that_was_at_the_address_before_does_not_keep_its_successor_from_being_reached(
    node: Node,
) -> None:
    async with aiohttp.ClientSession() as session:
        links = Links(LIMITS, session, ClusterSession())
        former = Channel("s-none", node.url, LIMITS, session, "none", links=links)
        await asyncio.sleep(0.05)  # it is refused, and goes on trying
        successor = Channel("s-one", node.url, LIMITS, session, "one", links=links)
        await until(lambda: successor.connected)
        assert (await successor.request(Get(0, "k"))).status == 200
        assert (await former.request(Get(0, "k"))).status == 503
        assert node.keys == [("one", "k")]
        await successor.close()
        await former.close()


async def test_a_newer_map_is_news_of_a_node_that_was_tried_in_vain(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its primary was started again there, and has a new term."""
    monkeypatch.setattr("kvstore.transport.dialing._FIRST_PAUSE_S", 1000.0)
    node.is_starting = True
    in_a_term = first_map("c", 64, [at_home("s1", node.url, "one")])
    async with aiohttp.ClientSession() as session:
        channels = MemberChannels(LIMITS, session, None)
        channels.open_for(in_a_term)
        await until(lambda: node.refused)
        await asyncio.sleep(0.05)  # it pauses
        node.is_starting = False
        channels.open_for(msgspec.structs.replace(in_a_term, epoch=2))
        await until(lambda: channels.by_shard["s1"].connected)
        await channels.close()


async def test_a_new_channel_to_an_address_that_was_tried_in_vain_is_not_kept_waiting(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.transport.dialing._FIRST_PAUSE_S", 1000.0)
    async with aiohttp.ClientSession() as session:
        links = Links(LIMITS, session, ClusterSession())
        former = Channel("s-none", node.url, LIMITS, session, "none", links=links)
        await until(lambda: node.refused)
        await asyncio.sleep(0.05)  # it pauses
        successor = Channel("s-one", node.url, LIMITS, session, "one", links=links)
        await until(lambda: successor.connected)
        await successor.close()
        await former.close()


async def test_a_store_that_is_asked_alone_is_not_named_in_any_message(
    node: Node, channels: dict[str, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    handle_of = node.handle_of
    monkeypatch.setattr(node, "handle_of", lambda store_id: named.append(store_id) or handle_of(store_id))
    await asyncio.gather(*(channels["one"].request(Get(0, "k")) for _ in range(20)))
    assert named == []
    await channels["two"].request(Get(0, "k"))
    await channels["two"].request(Get(0, "k"))
    await channels["one"].request(Get(0, "k"))
    assert [store for store, _ in node.keys[20:]] == ["two", "two", "one"]


async def test_a_store_that_is_not_served_there_is_unavailable_and_nothing_is_done(
    node: Node, channels: dict[str, Channel]
) -> None:
    asked = [channels[store].request(Put(0, "k", b"v")) for store in ("one", "none", "two")]
    answers = await asyncio.gather(*asked)
    assert [answer.status for answer in answers] == [200, 503, 200]
    assert answers[1].problem["code"] == "unavailable"
    assert node.keys == [("one", "k"), ("two", "k")]


async def test_after_a_reconnection_the_stores_are_named_again(node: Node, channels: dict[str, Channel]) -> None:
    await channels["two"].request(Get(0, "before"))
    await node.sockets[-1].close()
    await until(lambda: len(node.sockets) == 2 and channels["one"].connected)
    for store in ("two", "three", "one"):
        await channels[store].request(Get(0, "after"))
    assert node.keys == [("two", "before"), ("two", "after"), ("three", "after"), ("one", "after")]


async def test_the_last_channel_ends_the_connection_and_another_one_only_what_waits_for_its_own_store(
    node: Node, channels: dict[str, Channel]
) -> None:
    node.holds = {"three", "two"}
    waits = {store: channels[store].request(Put(0, "k", b"v")) for store in ("three", "two")}
    await until(lambda: len(node.reached) == 2)
    assert (channels["three"].ops_under_way, channels["two"].ops_under_way) == (1, 1)
    late = channels["three"].request(Get(0, "never leaves"))
    await channels["three"].close()
    with pytest.raises(OutcomeUnknown):
        await waits["three"]
    with pytest.raises(Unavailable):
        await late
    assert (channels["two"].connected, channels["two"].ops_under_way, waits["two"].done()) == (True, 1, False)
    assert (await channels["one"].request(Get(0, "k"))).status == 200
    assert node.keys == [("three", "k"), ("two", "k"), ("one", "k")]
    await node.sockets[-1].close()
    await until(lambda: len(node.sockets) == 2 and channels["one"].connected)
    assert node.hellos == ["three", "two"], "the newest of those that are left"
    for store in ("two", "one", "none"):
        await channels[store].close()
    await until(lambda: node.sockets[-1].closed)


async def test_what_waits_is_answered_also_if_the_last_channel_is_closed_just_when_the_connection_is_lost(
    node: Node,
) -> None:
    async with aiohttp.ClientSession() as session:
        channel = Channel("s-one", node.url, LIMITS, session, "one")
        await until(lambda: channel.connected)
        node.holds.add("one")
        waiting = channel.request(Put(0, "k", b"v"))
        await until(lambda: node.keys)
        losing = asyncio.create_task(node.sockets[0].close())
        async with asyncio.timeout(WAIT_S):
            while channel.connected:
                await asyncio.sleep(0)
        await channel.close()
        assert waiting.done()
        assert isinstance(waiting.exception(), OutcomeUnknown)
        assert channel.bytes_under_way == 0
        await losing


async def test_a_message_that_names_no_store_properly_ends_the_connection(node: Node) -> None:
    """Else what comes behind it would reach a store that it is not meant for."""
    async with aiohttp.ClientSession() as session:
        for broken in (ForStore(1, "x" * 65), [29, 1, 7], [28, 1, "x"]):
            async with session.ws_connect(f"{node.url}/channel?store=one") as socket:
                await socket.send_bytes(encode_frame([broken, Put(2, "k", b"v")]))
                answer = await socket.receive(WAIT_S)
                assert answer.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert node.reached == []
    assert msgspec.msgpack.decode(encode_frame([ForStore(1, "two")])) == [[29, 1, "two"]]
