"""Nodes among processes of other versions: every hello names the number of the protocol, and refusals are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.controller.routes import MEMBER_ROUTES
from kvstore.environment import SYSTEM
from kvstore.errors import OtherProtocol
from kvstore.replication.session import Session
from kvstore.replication.wire import WireRefused
from kvstore.shard.beats import Beats
from kvstore.shard.copy_wires import connect
from kvstore.shard.residents import Residents
from kvstore.shard.routes import ROUTES
from kvstore.transport import versions
from kvstore.transport.sessions import ClusterSession
from kvstore.transport.versions import HEADER, PROTOCOL
from tests.unit.shard.test_node_failover import cluster_in
from tests.unit.store.conftest import make_map


async def test_every_process_names_its_protocol_in_every_hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str | None] = []

    def check(fields: Mapping[str, str], peer: str | None) -> None:
        named.append(fields.get(HEADER.lower()))

    monkeypatch.setattr(versions, "check_protocol", check)
    hellos = {route.path for route in (*ROUTES, *MEMBER_ROUTES) if route.is_hello}
    assert hellos == {"/channel", "/copies", "/v1/members", "/v1/nodes/{id}/beat"}
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await http.put(f"{cluster.url}/v1/kv/a", data="1")  # by a channel of the router
    assert len(named) > 10
    assert set(named) == {str(PROTOCOL)}


@pytest.fixture
async def other() -> AsyncIterator[str]:
    """The address of a process of a much later version."""

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=OtherProtocol.status, headers={HEADER: "9"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_a_primary_hears_why_a_node_of_another_version_takes_no_connection(other: str) -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(WireRefused, match=f"speaks protocol 9 and refuses this one, which speaks {PROTOCOL}: .*"):
            await connect(http, ClusterSession("here"), other, Session("store", 1, "start", "copy", 1))


async def test_a_node_whose_beats_are_refused_says_so_once(other: str, caplog: pytest.LogCaptureFixture) -> None:
    replicated = msgspec.structs.replace(make_map(1), replicas=2)  # its nodes beat
    stores = SimpleNamespace(cluster_map=replicated, by_shard=Residents())
    async with aiohttp.ClientSession() as http:
        beats = Beats("s1", cast(Any, stores), http, other, 0.1, SYSTEM)
        beating = asyncio.create_task(beats.run())
        async with asyncio.timeout(60):
            while not caplog.records:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
    (record,) = caplog.records
    assert "takes no beats of this node: The process at" in record.getMessage()
    assert record.getMessage().endswith(OtherProtocol.next_step)
