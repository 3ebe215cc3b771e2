"""The controller over real HTTP: answers, long polls, refusals, and its orderly end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest

from kvstore.config import ClusterConfig, Limits, ShardConfig, default_config
from kvstore.controller.app import serve
from kvstore.controller.earlier_sessions import begin_session
from kvstore.errors import ConfigError, ForeignData
from kvstore.placement.cluster_map import ClusterMap
from kvstore.transport import versions
from kvstore.transport.sessions import EARLIER_HEADER, HEADER
from loadtest.cluster.processes import free_ports

CONFIG = msgspec.structs.replace(
    default_config(),
    partitions=64,
    replicas=1,
    shards=[ShardConfig("s1", "127.0.0.1:1"), ShardConfig("s2", "127.0.0.1:2")],
    allowed_hosts=["kv.example"],
)


class Controller(NamedTuple):
    url: str
    session: aiohttp.ClientSession
    stop: asyncio.Event
    serving: asyncio.Task[None]

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.request(method, self.url + path, **options) as answer:
            body = await answer.read()
            if answer.status >= 400:
                assert answer.content_type == "application/problem+json"
            return answer.status, msgspec.json.decode(body) if body else None

    async def announce(self, shard_id: str, **changes: object) -> tuple[int, Any]:
        body = {"id": shard_id, "url": f"http://{shard_id}:1", "store_id": shard_id, "cluster_id": None, "weight": 1}
        return await self.call("POST", "/v1/members", json={**body, **changes})

    async def form(self) -> ClusterMap:
        await self.announce("s1")
        _, formed = await self.announce("s2")
        return msgspec.convert(formed, ClusterMap)


def free_port() -> int:
    return free_ports(1)[0]


@asynccontextmanager
async def running(data_dir: Path, config: ClusterConfig = CONFIG) -> AsyncIterator[Controller]:
    stop, port = asyncio.Event(), free_port()
    listen = f"127.0.0.1:{port}"
    serving = asyncio.create_task(serve(controller_id="0", listen=listen, data_dir=data_dir, config=config, stop=stop))
    async with aiohttp.ClientSession() as session:
        controller = Controller(f"http://{listen}", session, stop, serving)
        try:
            await until_it_answers(controller)
            yield controller
        finally:
            stop.set()
            await serving


async def until_it_answers(controller: Controller) -> None:
    async with asyncio.timeout(20):
        while not controller.serving.done():
            try:
                await controller.call("GET", "/healthz")
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)
            else:
                return
        await controller.serving


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    async with running(tmp_path) as controller:
        yield controller


async def test_the_first_members_form_the_cluster(controller: Controller) -> None:
    assert await controller.announce("s1") == (202, {"waiting_for": ["s2"]})
    status, answer = await controller.announce("s2")
    formed = msgspec.convert(answer, ClusterMap)
    assert (status, formed.epoch, len(formed.owners)) == (200, 1, 64)
    assert await controller.call("GET", "/v1/map") == (200, answer)
    assert await controller.announce("s1", cluster_id=formed.cluster_id) == (200, answer)


async def test_a_long_poll_is_answered_by_the_change_it_waits_for(controller: Controller) -> None:
    for_the_first = asyncio.create_task(controller.call("GET", "/v1/map?after=0"))
    formed = await controller.form()
    status, answer = await for_the_first
    assert (status, msgspec.convert(answer, ClusterMap)) == (200, formed)
    for_the_next = [asyncio.create_task(controller.call("GET", "/v1/map?after=1")) for _ in range(5)]
    await controller.announce("s2", url="http://elsewhere:1")
    assert {(status, answer["epoch"]) for status, answer in await asyncio.gather(*for_the_next)} == {(200, 2)}


async def test_a_long_poll_without_a_change_ends_with_204(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, limits=Limits(map_poll_s=0.05))
    async with running(tmp_path, config) as controller:
        assert await controller.call("GET", "/v1/map?after=0") == (204, None)
        await controller.form()
        assert await controller.call("GET", "/v1/map?after=1") == (204, None)
        assert await controller.call("GET", "/v1/map?after=7") == (204, None)


async def test_stopping_ends_the_long_polls_at_once(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, limits=Limits(map_poll_s=3600.0))
    async with running(tmp_path, config) as controller:
        polls = [asyncio.create_task(controller.call("GET", "/v1/map")) for _ in range(3)]
        await controller.announce("s1")
        controller.stop.set()
        assert await asyncio.gather(*polls) == [(204, None)] * 3
        await controller.serving


async def test_the_map_survives_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as controller:
        formed = await controller.form()
    async with running(tmp_path) as controller:
        _, answer = await controller.call("GET", "/v1/map")
    assert msgspec.convert(answer, ClusterMap) == formed


async def test_a_foreign_or_empty_file_is_answered_409_foreign_data(controller: Controller) -> None:
    await controller.form()
    for changes in ({"store_id": "new"}, {"cluster_id": "another"}):
        status, problem = await controller.announce("s1", **changes)
        assert (status, problem["code"]) == (409, "foreign-data")


async def test_who_is_no_member_is_answered_409_conflict(controller: Controller) -> None:
    status, problem = await controller.announce("s9")
    assert (status, problem["code"], problem["retry_after_ms"]) == (409, "conflict", 1000)


@pytest.mark.parametrize(
    ("method", "path", "options", "expected"),
    [
        ("GET", "/v1/maps", {}, (404, "no-such-route")),
        ("GET", "/", {}, (404, "no-such-route")),
        ("PUT", "/v1/map", {}, (405, "method-not-allowed")),
        ("GET", "/v1/members", {}, (405, "method-not-allowed")),
        ("GET", "/v1/map?after=-1", {}, (400, "bad-parameter")),
        ("GET", "/v1/map?after=", {}, (400, "bad-parameter")),
        ("GET", "/v1/map?after=1&after=2", {}, (400, "bad-parameter")),
        ("GET", "/v1/map?before=1", {}, (400, "bad-parameter")),
        ("GET", "/healthz?x=1", {}, (400, "bad-parameter")),
        ("POST", "/v1/members", {"data": b""}, (400, "bad-body")),
        ("POST", "/v1/members", {"data": b"\xff"}, (400, "bad-body")),
        ("POST", "/v1/members", {"data": b'{"id":"s1"}'}, (400, "bad-body")),
        ("POST", "/v1/members", {"data": b'{"id":"s1","url":"http://x","store_id":1}'}, (400, "bad-body")),
        ("POST", "/v1/members", {"data": b'{"id":"s1","url":"http://x","store_id":"1","x":1}'}, (400, "bad-body")),
        ("POST", "/v1/members", {"data": b'{"id":"s1","url":"x","store_id":"1"}'}, (400, "bad-body")),
        ("POST", "/v1/members", {"data": b"x" * 100_000}, (413, "body-too-large")),
        ("GET", "/healthz", {"headers": {"Origin": "http://127.0.0.1"}}, (403, "foreign-origin")),
        ("GET", "/healthz", {"headers": {"Host": "evil.example"}}, (403, "foreign-origin")),
        ("GET", "/healthz", {"headers": {"Host": "127.0.0.1.evil.example:8090"}}, (403, "foreign-origin")),
        ("GET", "/nowhere", {"headers": {"Host": "evil.example"}}, (403, "foreign-origin")),
    ],
)
async def test_a_wrong_request_is_answered_with_a_problem_document(
    controller: Controller, method: str, path: str, options: dict[str, Any], expected: tuple[int, str]
) -> None:
    status, problem = await controller.call(method, path, **options)
    assert (status, problem["code"]) == expected
    assert problem["status"] == status
    assert problem["next_step"]


async def test_405_names_the_methods_in_allow(controller: Controller) -> None:
    async with controller.session.put(f"{controller.url}/v1/members") as answer:
        assert answer.headers["Allow"] == "POST"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8090", "kv.example", "KV.example:80"])
async def test_own_hosts_are_served(controller: Controller, host: str) -> None:
    assert await controller.call("GET", "/healthz", headers={"Host": host}) == (200, {"status": "ok"})


async def test_a_foreign_file_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "controller-0.db").write_bytes(b"no database" * 100)
    listen = f"127.0.0.1:{free_port()}"
    with pytest.raises(ForeignData):
        await serve(controller_id="0", listen=listen, data_dir=tmp_path, config=CONFIG, stop=asyncio.Event())


async def test_two_controllers_never_share_a_file(tmp_path: Path) -> None:
    async with running(tmp_path):
        listen = f"127.0.0.1:{free_port()}"
        with pytest.raises(ConfigError, match="open in another process"):
            await serve(controller_id="0", listen=listen, data_dir=tmp_path, config=CONFIG, stop=asyncio.Event())


async def test_a_taken_port_ends_the_start_and_closes_the_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match="in use"):
            await serve(controller_id="0", listen=listen, data_dir=tmp_path, config=CONFIG, stop=asyncio.Event())
    async with running(tmp_path) as controller:
        assert await controller.call("GET", "/healthz") == (200, {"status": "ok"})


async def test_a_controller_tells_the_sessions_of_its_last_processes(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    for _ in range(3):
        async with running(tmp_path) as controller, controller.session.get(f"{controller.url}/healthz") as answer:
            told.append((answer.headers[HEADER], answer.headers.get(EARLIER_HEADER, "")))
    (first, _), (second, _), _ = told
    assert [earlier for _, earlier in told] == ["", first, f"{first},{second}"]


def test_the_last_sixteen_sessions_are_kept_and_what_is_no_id_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "controller-0.sessions"
    path.write_bytes(b"\xff,a b,")
    assert [begin_session(path, f"{n}") for n in range(20)] == [
        [f"{earlier}" for earlier in range(max(0, n - 16), n)] for n in range(20)
    ]


def test_sessions_that_cannot_be_kept_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "controller-0.sessions").mkdir()
    assert begin_session(tmp_path / "controller-0.sessions", "a") == []
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("path", ["/v1/members", "/v1/nodes/s1/beat"])
async def test_a_hello_of_another_version_is_refused_before_its_body_is_looked_at(
    controller: Controller, path: str
) -> None:
    headers = {versions.HEADER: "7"}
    status, problem = await controller.call("POST", path, data=b"what a later version says", headers=headers)
    assert (status, problem["code"]) == (409, "other-protocol")
    assert f"speaks protocol {versions.PROTOCOL}" in problem["detail"]
    assert "'7'" in problem["detail"]
