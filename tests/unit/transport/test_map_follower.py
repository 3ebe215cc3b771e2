"""Following the map: patient with a controller that is away, and never led astray by what is not one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.errors import ControllerBehind, ForeignData, Unavailable
from kvstore.placement.cluster_map import ClusterMap, at_home, map_of
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import EARLIER_HEADER, HEADER, PARAMETER, ClusterSession


def make_map(epoch: int) -> ClusterMap:
    members = [at_home("s1", "http://s1", "x")]
    return map_of(members, cluster_id="c", epoch=epoch, partitions=64, owners=[0] * 64)


class Controller:
    """Answers as the test says, the last answer again and again; remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[web.Response] = []
        self.asked: list[Any] = []
        self.enough = asyncio.Event()
        self.url = ""

    def will_answer(self, *answers: tuple[int, bytes]) -> None:
        self.answers = [web.Response(status=status, body=body) for status, body in answers]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json() if request.method == "POST" else request.query["after"])
        if len(self.answers) <= len(self.asked) - 1:
            self.enough.set()
            await asyncio.sleep(3600)
        return self.answers[len(self.asked) - 1]


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    controller = Controller()
    app = web.Application()
    app.router.add_get("/v1/map", controller.handle)
    app.router.add_post("/v1/members", controller.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    controller.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield controller
    await runner.cleanup()


@pytest.fixture
async def follower(controller: Controller) -> AsyncIterator[MapFollower]:
    async with aiohttp.ClientSession() as session:
        yield MapFollower(session, controller.url + "/", Limits(map_poll_s=5.0, reconnect_wait_s_max=0.05))


async def follow(follower: MapFollower, controller: Controller, epoch: int = 0) -> list[int]:
    """The epochs that were followed until the controller had given all its answers."""
    seen: list[int] = []
    following = asyncio.create_task(follower.follow(epoch, lambda cluster_map: seen.append(cluster_map.epoch)))
    waiting = asyncio.create_task(controller.enough.wait())
    await asyncio.wait({following, waiting}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert not following.done(), "it follows for ever"
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert waiting.done()
    return seen


def encoded(epoch: int) -> bytes:
    return msgspec.json.encode(make_map(epoch))


async def test_each_newer_map_is_followed_and_the_next_one_asked_for(
    follower: MapFollower, controller: Controller
) -> None:
    controller.will_answer((200, encoded(3)), (204, b""), (200, encoded(7)))
    assert await follow(follower, controller) == [3, 7]
    assert controller.asked == ["0", "3", "3", "7"]


async def test_a_restarted_process_asks_from_the_epoch_that_it_has(
    follower: MapFollower, controller: Controller
) -> None:
    controller.will_answer((204, b""))
    assert await follow(follower, controller, epoch=5) == []
    assert controller.asked == ["5", "5"]


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"Internal Server Error"),
        (503, msgspec.json.encode(Unavailable("starting").problem())),
        (404, b""),
        (502, b'"a proxy speaks"'),
        (500, b"[]"),
        (500, b"null"),
        (200, b""),
        (200, b"<html>"),
        (200, b"{}"),
        (200, b'{"epoch":"seven"}'),
        (200, b'{"epoch":7,"cluster_id":"\xff"}'),
    ],
)
async def test_whatever_answers_in_the_controllers_place_is_waited_out(
    follower: MapFollower, controller: Controller, answer: tuple[int, bytes]
) -> None:
    controller.will_answer(answer, (200, encoded(2)))
    assert await follow(follower, controller) == [2]


async def test_a_controller_that_is_away_is_said_once_and_its_return_once(
    follower: MapFollower, controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    controller.will_answer((204, b""), (500, b"x"), (500, b"x"), (500, b"x"), (200, encoded(2)), (204, b""))
    with caplog.at_level(logging.WARNING, logger="kvstore.transport.map_follower"):
        await follow(follower, controller)
    assert ["is away" in record.message for record in caplog.records] == [True, False]


async def test_a_controller_that_does_not_answer_in_time_is_said_to_be_away_for_that_reason(
    follower: MapFollower, controller: Controller, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_timeout", aiohttp.ClientTimeout(total=0.05))
    monkeypatch.setattr(follower, "_start_patience_s", 0.0)
    with caplog.at_level(logging.WARNING, logger="kvstore.transport.map_follower"):
        following = asyncio.create_task(follower.follow(0, lambda cluster_map: None))  # it hangs from the beginning
        async with asyncio.timeout(30):
            while not caplog.records:
                await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert "is away (no answer in time)" in caplog.records[0].message


@pytest.mark.parametrize(("patience_s", "lines"), [(3600.0, []), (0.0, ["is away", "is back"])])
async def test_a_controller_that_is_just_being_started_is_worth_a_line_only_if_that_takes_long(
    controller: Controller, caplog: pytest.LogCaptureFixture, patience_s: float, lines: list[str]
) -> None:
    controller.will_answer((500, b"x"), (500, b"x"), (200, encoded(2)), (204, b""))
    async with aiohttp.ClientSession() as session:
        limits = Limits(map_poll_s=5.0, reconnect_wait_s_max=0.05)
        follower = MapFollower(session, controller.url, limits, start_patience_s=patience_s)
        with caplog.at_level(logging.WARNING, logger="kvstore.transport.map_follower"):
            await follow(follower, controller)
    assert len(caplog.records) == len(lines)
    assert all(word in record.message for word, record in zip(lines, caplog.records, strict=True))


async def test_nothing_at_that_address_is_waited_out_too(controller: Controller) -> None:
    async with aiohttp.ClientSession() as session:
        follower = MapFollower(session, "http://127.0.0.1:9", Limits(reconnect_wait_s_max=0.05))
        following = asyncio.create_task(follower.follow(0, lambda _: None))
        announcing = asyncio.create_task(follower.announce("s1", "http://s1", "x", None, 1))
        await asyncio.wait({following, announcing}, timeout=0.1)
        assert not following.done()
        assert not announcing.done()
        for task in (following, announcing):
            task.cancel()
        await asyncio.gather(following, announcing, return_exceptions=True)


@pytest.mark.parametrize("status", [200, 202])
async def test_an_announcement_is_repeated_until_it_was_heard(
    follower: MapFollower, controller: Controller, status: int
) -> None:
    controller.will_answer((500, b""), (503, b"null"), (502, b"[1]"), (status, b"{}"))
    async with asyncio.timeout(60):
        await follower.announce("s1", "http://s1", "store", "cluster", 3, copy_id="copy")
    ids = {"id": "s1", "url": "http://s1", "store_id": "store", "cluster_id": "cluster", "copy_id": "copy"}
    assert controller.asked == [{**ids, "weight": 3}] * 4


async def test_who_wants_to_join_says_so(follower: MapFollower, controller: Controller) -> None:
    controller.will_answer((200, b"{}"))
    await follower.announce("s5", "http://s5", "store", None, 2, join=True)
    assert controller.asked[0]["join"] is True


async def test_a_shard_announces_itself_again_as_what_it_is_by_now_to_a_controller_that_lost_its_file(
    follower: MapFollower, controller: Controller
) -> None:
    lost = msgspec.json.encode(ControllerBehind("no map").problem())
    controller.will_answer((200, b"{}"), (503, lost), (503, lost), (200, b"{}"))
    await follower.announce("s1", "http://s1", "store", None, 1)
    following = asyncio.create_task(follower.follow(7, lambda _: None, "c"))
    async with asyncio.timeout(60):
        while sum("id" in each for each in controller.asked) < 2:
            await asyncio.sleep(0.005)
    following.cancel()
    again = [each for each in controller.asked if "id" in each][1]
    assert (again["cluster_id"], again["epoch"]) == ("c", 7)


async def test_a_refused_announcement_ends_in_the_reason(follower: MapFollower, controller: Controller) -> None:
    controller.will_answer((409, msgspec.json.encode(ForeignData("another store").problem())))
    with pytest.raises(ForeignData, match="another store"):
        await follower.announce("s1", "http://s1", "store", None, 1)


# --- sessions ---------------------------------------------------------------------------------------------------------


class Sessions:
    """A controller that says its session with every answer; `announced`: the epochs that were announced in each."""

    def __init__(self) -> None:
        self.id = "first"
        self.announced: dict[str, list[int]] = {}
        self.polled = asyncio.Event()
        self.fails = 0

    async def members(self, request: web.Request) -> web.Response:
        if self.fails:
            self.fails -= 1
            assert request.transport is not None
            request.transport.close()
        else:
            self.announced.setdefault(self.id, []).append((await request.json()).get("epoch", 0))
        return web.json_response({}, headers={HEADER: self.id})

    async def map(self, request: web.Request) -> web.Response:
        if request.query.get(PARAMETER, self.id) == self.id:
            self.polled.set()
            await asyncio.sleep(0.05)
        return web.Response(status=204, headers={HEADER: self.id})

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({}, headers={HEADER: self.id, EARLIER_HEADER: "before,earlier, , no id"})


@pytest.fixture
async def sessions() -> AsyncIterator[tuple[Sessions, MapFollower, ClusterSession]]:
    found, cluster, app = Sessions(), ClusterSession(), web.Application()
    app.router.add_post("/v1/members", found.members)
    app.router.add_get("/v1/map", found.map)
    app.router.add_get("/healthz", found.health)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        limits = Limits(map_poll_s=5.0, reconnect_wait_s_max=0.05)
        yield found, MapFollower(session, str(server.make_url("")), limits, cluster=cluster), cluster


async def test_a_shard_announces_itself_again_to_each_new_process_of_the_controller_and_only_then(
    sessions: tuple[Sessions, MapFollower, ClusterSession],
) -> None:
    controller, follower, cluster = sessions
    await follower.announce("s1", "http://s1", "x", "c", 1, epoch=3)
    assert cluster.id == "first"
    following = asyncio.create_task(follower.follow(7, lambda cluster_map: None, "c"))
    for _ in range(3):
        controller.polled.clear()
        await asyncio.wait_for(controller.polled.wait(), 30)
    controller.id, controller.fails = "second", 2
    async with asyncio.timeout(30):
        while "second" not in controller.announced:
            await asyncio.sleep(0.01)
        controller.polled.clear()
        await controller.polled.wait()
    following.cancel()
    assert controller.announced == {"first": [3], "second": [7]}
    assert cluster.id == "second"
    assert cluster.knows("first")


async def test_a_router_learns_the_session_and_announces_nothing(
    sessions: tuple[Sessions, MapFollower, ClusterSession],
) -> None:
    controller, follower, cluster = sessions
    following = asyncio.create_task(follower.follow(0, lambda cluster_map: None))
    async with asyncio.timeout(30):
        while not cluster.id:
            await asyncio.sleep(0.01)
    following.cancel()
    assert (cluster.id, controller.announced) == ("first", {})


async def test_the_session_can_be_asked_for(sessions: tuple[Sessions, MapFollower, ClusterSession]) -> None:
    _, follower, cluster = sessions
    assert await follower.ask_session()
    assert cluster.id == "first"
    known = [named for named in ("first", "before", "earlier", "", "no id", "second") if cluster.knows(named)]
    assert known == ["first", "before", "earlier"]
    async with aiohttp.ClientSession() as session:
        assert not await MapFollower(session, "http://127.0.0.1:9", Limits(), cluster=cluster).ask_session()
    assert cluster.id == "first"
