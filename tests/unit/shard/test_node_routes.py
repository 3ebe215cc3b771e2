"""A node's calls stand on the server and the route table of all processes; its channels are WebSockets on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.shard.copy_wires import connect
from kvstore.shard.folder import FileFolder
from kvstore.shard.hellos import SessionFile
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node import Node
from kvstore.shard.routes import NodeRoutes, make_table
from kvstore.transport.http.requests import HostGuard
from kvstore.transport.http.routes import answer_call
from kvstore.transport.http.server import HEAD_BYTES_MAX, Server, accept_socket, start_server
from kvstore.transport.sessions import ClusterSession
from kvstore.transport.versions import HEADER, PROTOCOL

LIMITS = Limits()
SESSION = "0f3b2a917c5d4e68"


@asynccontextmanager
async def listening(handle: Any) -> AsyncIterator[str]:
    runner = await start_server(Server(handle, LIMITS), "127.0.0.1", 0)
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[str]:
    """The address of a node that knows no session but SESSION, and whose controller does not answer."""

    def on_fatal(error: BaseException) -> None:
        raise error

    async with AsyncExitStack() as at_the_end:
        http = await at_the_end.enter_async_context(aiohttp.ClientSession())
        folder, cluster = FileFolder(tmp_path, "s1", LIMITS), ClusterSession(SESSION)
        dial = partial(connect, http, cluster)
        around = Surroundings("s1", folder, LIMITS, http, cluster, "http://127.0.0.1:1", on_fatal, SYSTEM, dial)
        routes = NodeRoutes(await Node.open(around, 64, SessionFile(tmp_path, "s1"), at_the_end), LIMITS)
        table, guard = make_table(routes, "s1", LIMITS), HostGuard([], takes_pages=False)
        async with listening(partial(answer_call, table, guard)) as url:
            yield url
            await routes.close()


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("GET", "/v1/kv/a", {}, (404, "no-such-route")),
        ("PUT", "/v1/kv/a", {}, (404, "no-such-route")),
        ("POST", "/healthz", {}, (405, "method-not-allowed")),
        ("GET", "/map?x=1", {}, (400, "bad-parameter")),
        ("GET", f"/channel?shard=s1&session={SESSION}", {}, (400, "bad-request")),
        ("GET", f"/copies?store=x&session={SESSION}", {}, (400, "bad-request")),
        ("GET", "/channel?shard=s1", {"Origin": "http://127.0.0.1"}, (403, "foreign-origin")),
        ("GET", "/copies?store=x", {"Origin": "http://127.0.0.1"}, (403, "foreign-origin")),
        ("GET", "/channel?shard=s1", {"Host": "evil.example"}, (403, "foreign-origin")),
        ("GET", "/metrics", {"Host": "evil.example"}, (403, "foreign-origin")),
        ("GET", "/channel?shard=s1", {HEADER: "7"}, (409, "other-protocol")),
        ("GET", "/copies?no=such&parameter", {HEADER: "7"}, (409, "other-protocol")),
    ],
)
async def test_a_node_refuses_what_no_call_of_it_takes(
    node: str, method: str, path: str, headers: dict[str, str], expected: tuple[int, str]
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{node}{path}", headers=headers) as answer,
    ):
        problem = await answer.json(content_type="application/problem+json")
    assert (answer.status, problem["code"]) == expected
    assert answer.headers.get(HEADER) == (str(PROTOCOL) if expected[1] == "other-protocol" else None)
    if answer.status == 404:
        assert problem["detail"].startswith("this is shard s1, which answers routers only")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/channel?shard=s1&session={SESSION}", 101),
        (f"/channel?shard=s2&session={SESSION}", 404),
        (f"/channel?shard=s1&store=another&session={SESSION}", 409),
        ("/channel?shard=s1&session=another", 503),
        (f"/copies?store=x&session={SESSION}", 101),
        ("/copies?store=x&session=another", 503),
        ("/copies?store=x", 503),
    ],
)
async def test_a_socket_is_opened_only_for_a_process_that_the_node_admits(node: str, path: str, status: int) -> None:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.ws_connect(f"{node}{path}"):
                opened = 101
        except aiohttp.WSServerHandshakeError as refused:
            opened = refused.status
    assert opened == status


async def test_a_node_tells_what_it_is_and_has(node: str) -> None:
    async with aiohttp.ClientSession() as session:
        facts, newest = [await (await session.get(f"{node}{path}")).json() for path in ("/healthz", "/map")]
        metrics = await (await session.get(f"{node}/metrics")).text()
    assert (facts["status"], facts["shard"], facts["partitions"], newest["shard"]) == ("alive", "s1", 64, "s1")
    assert newest["store_id"] == facts["store_id"]
    assert "kvstore_" in metrics


async def test_the_bound_on_a_header_does_not_end_a_socket_that_carries_more() -> None:
    async def echo(request: Any) -> Any:
        socket = await accept_socket(request, 4 * HEAD_BYTES_MAX)
        async for message in socket:
            await socket.send_bytes(message.data)
        return socket

    async with (
        listening(echo) as url,
        aiohttp.ClientSession() as session,
        session.ws_connect(url, max_msg_size=0) as socket,
    ):
        for size in (1, HEAD_BYTES_MAX, 2 * HEAD_BYTES_MAX, 1):
            await socket.send_bytes(b"x" * size)
            assert len(await socket.receive_bytes(timeout=60)) == size


async def test_a_socket_whose_client_half_closes_ends() -> None:
    ended = asyncio.Event()

    async def serve(request: Any) -> Any:
        socket = await accept_socket(request, HEAD_BYTES_MAX)
        async for _ in socket:
            pass
        ended.set()
        return socket

    async with listening(serve) as url, aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        transport = socket.get_extra_info("socket")
        transport.shutdown(1)
        async with asyncio.timeout(60):
            await ended.wait()


async def test_a_router_that_has_left_when_its_channel_is_accepted_is_no_error(
    node: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def accept(*_: Any) -> Any:  # as aiohttp does, when a pause of this process lies before it
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr("kvstore.shard.routes.accept_socket", accept)
    async with aiohttp.ClientSession() as http, http.get(f"{node}/channel?shard=s1&session={SESSION}") as answer:
        assert answer.status == 503
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
