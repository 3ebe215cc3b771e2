"""A shard announces itself from another address: the process at the last one is asked before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.controller.membership import Announcement, ClusterState
from kvstore.controller.shards import ShardClients
from kvstore.controller.twins import Twins
from kvstore.errors import Conflict
from kvstore.placement.cluster_map import at_home, first_map
from kvstore.transport.sessions import ADOPT, ClusterSession

ELSEWHERE = "http://127.0.0.1:1"


class Last:
    """What answers at the member's address."""

    def __init__(self) -> None:
        self.asked_in: list[str] = []
        self.says: dict[str, Any] = {"shard": "s1", "store_id": "x", "session": "ours"}
        self.url = ""

    async def healthz(self, request: web.Request) -> web.Response:
        self.asked_in.append(request.query["session"])
        return web.json_response(self.says)

    def state(self) -> ClusterState:
        member = at_home("s1", self.url, "x")
        return ClusterState(map=first_map("c", 64, [member]))


@pytest.fixture
async def last() -> AsyncIterator[Last]:
    found, app = Last(), web.Application()
    app.router.add_get("/healthz", found.healthz)
    async with TestServer(app) as server:
        found.url = str(server.make_url("")).rstrip("/")
        yield found


@pytest.fixture
async def twins() -> AsyncIterator[Twins]:
    async with aiohttp.ClientSession() as session:
        yield Twins(ShardClients(Limits(), session, ClusterSession("ours")))


def announced(url: str = ELSEWHERE, store_id: str = "x") -> Announcement:
    return Announcement(id="s1", url=url, store_id=store_id)


async def test_a_second_process_with_a_copy_of_one_file_waits_until_the_first_has_ended(
    last: Last, twins: Twins
) -> None:
    with pytest.raises(Conflict, match="is a copy"):
        await twins.check(last.state(), announced())
    gone = first_map("c", 64, [at_home("s1", ELSEWHERE, "x")])
    await twins.check(ClusterState(map=gone), announced("http://127.0.0.1:2"))


async def test_another_cluster_at_the_last_address_hears_of_this_one_and_is_told_of_once(
    last: Last, twins: Twins, caplog: pytest.LogCaptureFixture
) -> None:
    last.says["session"] = "theirs"
    await twins.check(last.state(), announced())
    await twins.check(last.state(), announced())
    assert last.asked_in == ["ours"] * 2
    (record,) = caplog.records
    assert last.url in record.getMessage()
    assert ADOPT in record.getMessage()


@pytest.mark.parametrize("says", [{"store_id": "y"}, {"shard": None}])
async def test_another_shard_or_program_at_the_last_address_is_in_nobodys_way(
    last: Last, twins: Twins, says: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    last.says |= says
    await twins.check(last.state(), announced())
    assert caplog.records == []


async def test_a_shard_at_its_own_address_or_with_another_file_asks_nothing(last: Last, twins: Twins) -> None:
    await twins.check(last.state(), announced(last.url))
    await twins.check(last.state(), announced(store_id="y"))
    await twins.check(ClusterState(), announced())
    assert last.asked_in == []
