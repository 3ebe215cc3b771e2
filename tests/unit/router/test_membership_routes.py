"""Changes of the cluster on their way through the router: what the controller answers is answered, or why it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from kvstore.config import Limits, default_config
from kvstore.errors import ChangeRefused, KvError, Unavailable
from kvstore.placement.cluster_map import Move, at_home, first_map
from kvstore.router.app import RouterApp
from kvstore.router.controller_client import Controller
from kvstore.router.service import RouterService
from kvstore.transport.http.server import Server, start_server
from loadtest.cluster.processes import free_ports

MOVES: dict[str, Any] = {"epoch": 7, "moves": [], "wanted": ["s5"], "ending": ["s2"], "last": None}
MAP = first_map("c", 64, [at_home(name, "http://h:1", name) for name in ("s1", "s2")])


class FakeController:
    """Notes what it is asked, and answers what it is told to: a document, an error, bytes, or nothing at all."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.answer: Any = {"id": "s5", "state": "joining", "epoch": 7}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.raw_path, await request.read()))
        answer = self.answer
        if isinstance(answer, KvError):
            body = answer.problem()
            return web.json_response(body, status=answer.status, content_type="application/problem+json")
        if isinstance(answer, bytes):
            return web.Response(body=answer, content_type="application/json")
        if isinstance(answer, str):
            return web.Response(text=answer)
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(0)
        return web.json_response(answer, status=200 if request.method == "GET" else 202)


@pytest.fixture
def fake() -> FakeController:
    return FakeController()


@pytest.fixture
async def controller(fake: FakeController) -> AsyncIterator[Controller]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", fake.handle)
    async with TestServer(application) as server, aiohttp.ClientSession() as session:
        yield Controller(session, str(server.make_url("")), Limits(request_timeout_s=0.5))


@pytest.fixture
async def router(controller: Controller) -> AsyncIterator[str]:
    """The address of a router that has no map, and needs none here."""
    app = RouterApp(
        "0", RouterService(default_config().limits, cast(aiohttp.ClientSession, None)), default_config(), controller
    )
    (port,) = free_ports(1)
    runner = await start_server(Server(app.handle, Limits()), "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    await runner.cleanup()


async def ask(method: str, url: str, body: bytes | None = None) -> tuple[int, dict[str, Any], str | None]:
    async with aiohttp.ClientSession() as session, session.request(method, url, data=body) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers.get("Retry-After")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/shards", b'{"id":"s5"}'),
        ("POST", "/v1/shards?plan=true", b'{"id":"s5"}'),
        ("PATCH", "/v1/shards/s5", b'{"weight":2}'),
        ("DELETE", "/v1/shards/s5?plan=true", b""),
        ("POST", "/v1/moves", b""),
        ("DELETE", "/v1/moves", b""),
        ("GET", "/v1/moves", b""),
    ],
)
async def test_a_request_reaches_the_controller_as_it_is(
    router: str, fake: FakeController, method: str, path: str, body: bytes
) -> None:
    status, document, _ = await ask(method, router + path, body)
    assert (status, document) == (200 if method == "GET" else 202, fake.answer)
    assert fake.asked == [(method, path, body)]


async def test_a_parameter_that_says_no_is_as_none(router: str, fake: FakeController) -> None:
    await ask("POST", f"{router}/v1/moves?plan=false")
    assert fake.asked == [("POST", "/v1/moves", b"")]


async def test_a_refusal_is_passed_on_with_all_its_members(router: str, fake: FakeController) -> None:
    fake.answer = ChangeRefused("s1 is the last one", next_step="Add another.", shard="s1")
    assert await ask("DELETE", f"{router}/v1/shards/s1") == (409, fake.answer.problem(), None)


async def test_a_refusal_that_names_a_wait_names_it_in_the_header_too(router: str, fake: FakeController) -> None:
    fake.answer = Unavailable("not formed", retry_after_ms=1200)
    assert await ask("POST", f"{router}/v1/moves") == (503, fake.answer.problem(), "2")
    fake.answer = Unavailable("not formed")
    assert await ask("POST", f"{router}/v1/moves") == (503, fake.answer.problem() | {"retry_after_ms": 1000}, "1")


@pytest.mark.parametrize(
    ("method", "path", "body", "told"),
    [
        ("DELETE", "/v1/shards/s1/s2", b"", "is no id of a shard"),
        ("DELETE", "/v1/shards/%2E%2E", b"", "is no id of a shard"),
        ("DELETE", "/v1/shards/", b"", "is no id of a shard"),
        ("PATCH", "/v1/shards/s1?weight=2", b"", "'weight' is unknown"),
        ("DELETE", "/v1/moves?plan=true", b"", "'plan' is unknown"),
        ("DELETE", "/v1/shards/s1", b"{}", "takes no body"),
        ("POST", "/v1/shards", b" " * 5000, "4096"),
    ],
)
async def test_what_is_wrong_on_its_face_does_not_reach_the_controller(
    router: str, fake: FakeController, method: str, path: str, body: bytes, told: str
) -> None:
    async with aiohttp.ClientSession() as session:
        url = URL(router + path, encoded=True)
        async with session.request(method, url, data=body) as answer:
            assert answer.status in (400, 413)
            assert told in (await answer.json(content_type=None))["detail"]
    assert fake.asked == []


@pytest.mark.parametrize("answer", [b"[1]", b"{", b"\xff", "hello", None])
async def test_an_answer_that_no_controller_gives_is_no_decision(
    router: str, fake: FakeController, answer: bytes | str | None
) -> None:
    fake.answer = answer
    status, document, _ = await ask("POST", f"{router}/v1/moves")
    assert (status, document["code"]) == (504, "outcome-unknown")
    assert "GET /v1/cluster shows" in document["next_step"]
    assert (await ask("GET", f"{router}/v1/moves"))[0] == 503
    assert len(fake.asked) == 2  # never sent again


async def test_a_controller_that_is_away_did_nothing() -> None:
    (port,) = free_ports(1)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(Unavailable, match="does not answer"):
            await Controller(session, f"http://127.0.0.1:{port}", Limits()).ask("POST", "/v1/moves", None)


async def test_the_cluster_is_described_by_the_controller_and_without_it_by_the_map(
    controller: Controller, fake: FakeController
) -> None:
    fake.answer = MOVES
    told = {"epoch": 7, "moves": [], "wanted": ["s5"], "ending": ["s2"], "last_change": None}
    assert await controller.described(MAP) == told
    fake.answer = Unavailable("the store is busy")
    move = Move(id="m", source="s1", to="s2", partitions=[1, 2, 3])
    unknown = await controller.described(msgspec.structs.replace(MAP, moves=[move]))
    assert (unknown["wanted"], unknown["ending"], unknown["last_change"]) == (None, None, None)
    (shown,) = unknown["moves"]
    assert (shown["from"], shown["to"], shown["partitions"], shown["step"]) == ("s1", "s2", 3, "unknown")
    assert (await controller.described(None))["moves"] == []
