"""GET /v1/events over a real connection: snapshot, changes, going on, and who is cut off."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
import msgspec
import pytest

from kvstore.config import Limits, default_config
from kvstore.protocol import Stats
from kvstore.router import events
from kvstore.router.app import RouterApp
from kvstore.router.controller_client import Controller
from kvstore.router.events import Events
from kvstore.router.service import RouterService
from kvstore.transport.http.server import Server, start_server
from tests.unit.router.fake_shards import all_follow, all_on, shards

WAIT_S = 20.0


class FakeController:
    """Nothing moves; or it is away."""

    def __init__(self) -> None:
        self.is_away = False
        self.copies: dict[str, Any] | None = None
        self.asked = 0
        self.known: list[dict[str, Any]] = []

    async def moves(self, *, copies: bool = False) -> dict[str, Any] | None:
        self.asked += 1
        if self.is_away:
            return None
        told = {"epoch": 1, "moves": [], "wanted": [], "ending": [], "last": None}
        return told | ({"copies": self.copies} if copies and self.copies is not None else {})

    async def changes(self) -> list[dict[str, Any]] | None:
        return None if self.is_away else self.known


class Stream:
    """The events of one connection."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer
        self.last_id = ""

    async def next(self, *kinds: str) -> tuple[str, dict[str, Any]]:
        """The next event, of these kinds if any are named."""
        async with asyncio.timeout(WAIT_S):
            fields: dict[str, str] = {}
            async for raw in self.answer.content:
                name, _, value = raw.decode().rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                    continue
                self.last_id = fields["id"]
                if not kinds or fields["event"] in kinds:
                    return fields["event"], json.loads(fields["data"])
                fields = {}
        raise AssertionError("the stream has ended")


class Router(msgspec.Struct):
    app: RouterApp
    url: str
    server: Server
    controller: FakeController
    service: RouterService

    @property
    def events(self) -> Events:
        return self.app.events

    @asynccontextmanager
    async def listening(self, last_id: str = "") -> AsyncIterator[Stream]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/v1/events", headers=headers) as answer,
        ):
            assert answer.status == 200
            yield Stream(answer)

    async def until_no_client_listens(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.events.listeners:
                await asyncio.sleep(0.02)


@pytest.fixture
def limits() -> Limits:
    return Limits(events_listeners_max=2, events_write_timeout_s=0.3)


@pytest.fixture
async def router(service: RouterService, limits: Limits) -> AsyncIterator[Router]:
    config = msgspec.structs.replace(default_config(), limits=limits)
    controller = FakeController()
    app = RouterApp("0", service, config, cast(Controller, controller))
    server = Server(app.handle, limits)
    runner = await start_server(server, "127.0.0.1", 0)
    yield Router(app, f"http://127.0.0.1:{runner.addresses[0][1]}", server, controller, service)
    await app.events.close()
    await runner.cleanup()


async def test_a_snapshot_comes_first_then_changes(router: Router) -> None:
    async with router.listening() as stream:
        kind, snapshot = await stream.next()
        assert kind == "snapshot"
        assert snapshot["router"] == "0"
        assert [member["id"] for member in snapshot["map"]["members"]] == ["s1", "s2"]
        assert [shard["state"] for shard in snapshot["cluster"]["shards"]] == ["up", "up"]
        assert "demo" not in snapshot
        all_follow(router.service, all_on(2, "s1"))
        _, changed = await stream.next("map")
        assert (changed["epoch"], changed["owners"]) == (2, [[0, 64]])


async def test_the_headers_keep_proxies_and_caches_from_holding_events_back(router: Router) -> None:
    async with router.listening() as stream:
        headers = stream.answer.headers
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["Cache-Control"] == "no-cache"
        assert "Content-Encoding" not in headers


async def test_a_listener_that_comes_back_goes_on_and_one_of_another_start_begins_again(router: Router) -> None:
    async with router.listening() as stream, router.listening() as second:
        await stream.next("snapshot")
        await second.next("snapshot")
        last_id = stream.last_id
        stream.answer.close()
        all_follow(router.service, all_on(2, "s1"))
        await second.next("map")
        async with router.listening(last_id) as again:
            kind, _ = await again.next("snapshot", "map")
            assert kind == "map"
    await router.until_no_client_listens()
    for unknown in ("0123456789abcdef-1", "nonsense"):
        async with router.listening(unknown) as other:
            assert (await other.next())[0] == "snapshot"


async def test_nothing_is_looked_at_while_no_client_listens(router: Router) -> None:
    async with router.listening() as stream:
        await stream.next("snapshot")
        await stream.next("rates")
    await router.until_no_client_listens()
    asked, moves = len(shards["s1"].asked), router.controller.asked
    assert any(isinstance(request, Stats) for request in shards["s1"].asked)
    await asyncio.sleep(0.6)
    assert (len(shards["s1"].asked), router.controller.asked) == (asked, moves)


async def test_there_are_only_so_many_listeners_and_a_place_that_is_left_is_free(router: Router) -> None:
    async with aiohttp.ClientSession() as session:
        async with router.listening() as first, router.listening() as second:
            await first.next("snapshot")
            await second.next("snapshot")
            async with session.get(f"{router.url}/v1/events") as refused:
                assert refused.status == 429
                problem = await refused.json()
                assert (problem["code"], problem["retry_after_ms"]) == ("too-many-requests", 5000)
        await router.until_no_client_listens()
        async with router.listening() as third:
            await third.next("snapshot")


async def test_listeners_do_not_count_among_the_requests_under_way(service: RouterService) -> None:
    limits = Limits(requests_in_flight_max=1)
    config = msgspec.structs.replace(default_config(), limits=limits)
    app = RouterApp("0", service, config, cast(Controller, FakeController()))
    server = Server(app.handle, limits)
    runner = await start_server(server, "127.0.0.1", 0)
    router = Router(app, f"http://127.0.0.1:{runner.addresses[0][1]}", server, FakeController(), service)
    async with aiohttp.ClientSession() as session, router.listening() as first, router.listening() as second:
        await first.next("snapshot")
        await second.next("snapshot")
        async with session.get(f"{router.url}/v1/kv/0") as answer:
            assert answer.status == 404
    await app.events.close()
    await runner.cleanup()


async def test_head_is_answered_at_once_and_does_not_listen(router: Router) -> None:
    async with aiohttp.ClientSession() as session, session.head(f"{router.url}/v1/events") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
    assert router.events.listeners == 0


async def test_a_listener_that_does_not_read_is_cut_off(router: Router) -> None:
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", int(router.url.rpartition(":")[2])))
    deaf.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(WAIT_S):
        while not router.events.listeners:
            await asyncio.sleep(0.02)
        number = 0
        while router.events.listeners:  # each document is larger than what the kernel holds for one connection
            number += 1
            router.events.feed.offer("play", {"number": number, "says": "x" * 8_000_000})
            await asyncio.sleep(0.05)
        while router.server.connections:  # and what it has not read is not kept for it
            await asyncio.sleep(0.02)
    deaf.close()


async def test_when_nothing_is_said_for_long_a_comment_is(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_COMMENT_S", 0.05)
    async with router.listening() as stream:
        await stream.next("snapshot")
        async with asyncio.timeout(WAIT_S):
            while not (await stream.answer.content.readline()).startswith(b": "):
                pass
        assert await stream.answer.content.readline() == b"\n"


async def test_when_the_controller_is_away_that_is_said_and_events_go_on(router: Router) -> None:
    router.controller.is_away = True
    async with router.listening() as stream:
        while True:
            kind, document = await stream.next("snapshot", "cluster")
            cluster = document["cluster"] if kind == "snapshot" else document
            if "controller does not answer" in cluster["advice"]["sentence"]:
                break
        await stream.next("rates")


async def test_a_change_of_the_cluster_is_told_as_it_goes_on_and_when_it_has_ended(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = {"id": "6f1d", "kind": "add", "shard": "s3", "state": "running", "seconds": 0.5, "progress": 0.25}
    router.controller.known = [running]
    async with router.listening() as stream:
        kind, document = await stream.next("snapshot", "changes")
        while kind == "snapshot" and "changes" not in document:
            kind, document = await stream.next("changes")
        assert (document["changes"] if kind == "snapshot" else document) == {"items": [running]}
        monkeypatch.setattr(events, "_IDLE_CHANGES_S", 3600.0)  # while one runs, the controller is asked all the time
        router.controller.known = [{**running, "progress": 0.5}]
        assert (await stream.next("changes"))[1]["items"][0]["progress"] == 0.5
        router.controller.known = [{**running, "state": "done", "progress": 1.0}]
        assert (await stream.next("changes"))[1]["items"][0]["state"] == "done"


async def test_the_stream_ends_when_the_router_stops(router: Router) -> None:
    async with router.listening() as stream:
        await stream.next("snapshot")
        await router.events.close()
        async with asyncio.timeout(WAIT_S):
            while await stream.answer.content.readline():
                pass
    assert router.events.listeners == 0


async def test_what_the_controller_has_heard_of_copies_is_told_with_the_nodes(router: Router) -> None:
    copy = {"node": "s2", "state": "in-sync", "lag": 3}
    heard = {"silent": {}, "missing": {}, "unserved": [], "holds_still": False, "positions": {}, "failovers": []}
    router.controller.copies = heard | {"copies": {"s1": [copy]}}
    async with router.listening() as stream:
        _, snapshot = await stream.next("snapshot")
        assert [node["id"] for node in snapshot["cluster"]["nodes"]] == ["s1", "s2"]
        assert "copies" not in snapshot["moves"]
        cluster = snapshot["cluster"]
        while not cluster["shards"][0]["copies"]:
            _, cluster = await stream.next("cluster")
        assert cluster["shards"][0]["copies"] == [copy]
        router.controller.copies = heard | {"copies": {"s1": [copy]}, "silent": {"s2": 2.5}}
        while "Node s2 is silent" not in cluster["advice"]["sentence"]:
            _, cluster = await stream.next("cluster")
        assert [node["state"] for node in cluster["nodes"]] == ["up", "down"]
