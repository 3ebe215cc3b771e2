"""Where a process listens, and what others are told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from kvstore.addresses import address_text, advertised, advertised_host, is_any_address, on_this_host
from kvstore.config import ClusterConfig, ControllerConfig, Limits, RouterConfig, ShardConfig
from kvstore.controller import app as controller_app
from kvstore.environment import StopAsked
from kvstore.errors import ConfigError
from kvstore.router import serve as router_process
from kvstore.shard import app as shard_app
from loadtest.cluster.processes import free_ports

ALL = ["0.0.0.0", "::", "0", "0.0", "0:0:0:0:0:0:0:0", "::0.0.0.0"]


@pytest.mark.parametrize("host", ALL)
def test_all_addresses_are_known_in_every_form(host: str) -> None:
    assert is_any_address(host)
    with pytest.raises(ConfigError, match="--advertise HOST:PORT"):
        advertised_host(address_text(host, 9101), None)
    assert on_this_host(address_text(host, 9101)) == ("::1" if ":" in host else "127.0.0.1", 9101)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "kv.example", "0.0.0.1", "10.0.0.0", ""])
def test_one_address_is_not_all_of_them(host: str) -> None:
    assert not is_any_address(host)


@pytest.mark.parametrize(
    ("listen", "advertise", "told"),
    [
        ("10.0.0.7:9101", None, "10.0.0.7:9101"),
        ("10.0.0.7:0", None, "10.0.0.7:4711"),
        ("[fd00::7]:0", None, "[fd00::7]:4711"),
        ("0.0.0.0:9101", "kv7.example:80", "kv7.example:80"),
        ("[::]:0", "[fd00::7]:0", "[fd00::7]:4711"),
    ],
)
def test_what_is_told_is_the_advertised_address_with_the_port_that_is_listened_at(
    listen: str, advertise: str | None, told: str
) -> None:
    assert advertised(listen, advertise, 4711) == told


@pytest.mark.parametrize("advertise", ["0.0.0.0:9101", "[::]:9101"])
def test_all_addresses_cannot_be_advertised_either(advertise: str) -> None:
    with pytest.raises(ConfigError, match="--advertise"):
        advertised("127.0.0.1:9101", advertise, 9101)


# --- the processes ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(serve: Callable[[StopAsked], Coroutine[Any, Any, None]]) -> AsyncIterator[asyncio.Task[None]]:
    stop = StopAsked()
    task = asyncio.create_task(serve(stop))
    try:
        yield task
    finally:
        stop.ask_at_once()
        async with asyncio.timeout(60):
            await task


async def answer(session: aiohttp.ClientSession, url: str, task: asyncio.Task[None], host: str = "") -> int:
    """The status, as soon as there is one."""
    async with asyncio.timeout(60):
        while not task.done():
            try:
                async with session.get(url, headers={"Host": host} if host else {}) as response:
                    return response.status
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.02)
    await task
    raise AssertionError("it ended without a word")


def config(controller: str) -> ClusterConfig:
    return ClusterConfig(
        routers=[RouterConfig("0", "127.0.0.1:1")],
        controllers=[ControllerConfig("0", controller)],
        shards=[ShardConfig("s1", "127.0.0.1:2")],
        partitions=64,
        limits=Limits(map_poll_s=0.2),
    )


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6: sysctl net.ipv6.conf.lo.disable_ipv6=0")


@pytest.mark.parametrize(
    ("listen", "reached"),
    [
        pytest.param("[::1]", "[::1]", marks=ipv6),
        pytest.param("[::]", "[::1]", marks=ipv6),
        ("0.0.0.0", "127.0.0.1"),
    ],
)
async def test_a_controller_and_a_router_serve_at_any_address_and_know_their_advertised_name(
    tmp_path: Path, listen: str, reached: str
) -> None:
    controller_port, router_port = free_ports(2)
    settings = config(f"127.0.0.1:{controller_port}")

    def controller(stop: StopAsked) -> Coroutine[Any, Any, None]:
        return controller_app.serve(
            controller_id="0", listen=f"{listen}:{controller_port}", data_dir=tmp_path, config=settings, stop=stop,
            advertise="ctl.example:0",
        )  # fmt: skip

    def router(stop: StopAsked) -> Coroutine[Any, Any, None]:
        return router_process.serve(
            router_id="0", listen=f"{listen}:{router_port}", join=f"http://{reached}:{controller_port}",
            config=settings, stop=stop, advertise="kv.example:0",
        )  # fmt: skip

    async with aiohttp.ClientSession() as session, serving(controller) as one, serving(router) as other:
        for port, task, name in ((controller_port, one, "ctl.example"), (router_port, other, "KV.example:80")):
            url = f"http://{reached}:{port}/healthz"
            assert await answer(session, url, task) == 200
            assert await answer(session, url, task, name) == 200
            assert await answer(session, url, task, "other.example") == 403


async def test_a_shard_is_announced_where_it_is_reached_and_not_where_it_listens(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    settings = config(f"127.0.0.1:{port}")

    def controller(stop: StopAsked) -> Coroutine[Any, Any, None]:
        return controller_app.serve(
            controller_id="0", listen=f"127.0.0.1:{port}", data_dir=tmp_path, config=settings, stop=stop
        )

    def shard(stop: StopAsked) -> Coroutine[Any, Any, None]:
        return shard_app.serve(
            shard_id="s1", listen="0.0.0.0:0", advertise="127.0.0.1:0", join=f"http://127.0.0.1:{port}",
            data_dir=tmp_path, config=settings, stop=stop,
        )  # fmt: skip

    async with aiohttp.ClientSession() as session, serving(controller) as one, serving(shard) as other:
        assert await answer(session, f"http://127.0.0.1:{port}/healthz", one) == 200
        async with asyncio.timeout(60):
            while True:
                async with session.get(f"http://127.0.0.1:{port}/v1/map?after=0") as response:
                    if response.status == 200:
                        url = (await response.json())["nodes"][0]["url"]
                        break
                assert not other.done()
        assert urlsplit(url).port
        async with session.get(f"{url}/healthz") as response:
            assert (await response.json())["shard"] == "s1"


async def test_a_shard_that_cannot_say_where_it_is_reached_is_refused_before_it_opens_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--listen 0\.0\.0\.0:0 is no address"):
        await shard_app.serve(
            shard_id="s1", listen="0.0.0.0:0", join="http://127.0.0.1:1", data_dir=tmp_path,
            config=config("127.0.0.1:1"), stop=StopAsked(),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
