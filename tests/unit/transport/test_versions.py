"""Processes of versions that do not follow each other: refused with both numbers, and told of once at both ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.errors import OtherProtocol, Unavailable
from kvstore.protocol import Put
from kvstore.transport import versions
from kvstore.transport.channel import Channel
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.versions import FIELDS, HEADER, PROTOCOL, check_protocol

LIMITS = Limits(reconnect_wait_s_max=0.02)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_said", {})


def test_a_process_speaks_with_those_of_its_own_version_and_the_ones_beside_it() -> None:
    for number in (PROTOCOL - 1, PROTOCOL, PROTOCOL + 1):
        check_protocol({HEADER.lower(): str(number)}, "10.0.0.2")
    check_protocol({}, "10.0.0.2")  # of a release before the first number
    check_protocol({name.lower(): number for name, number in FIELDS.items()}, "10.0.0.2")


@pytest.mark.parametrize("named", [str(PROTOCOL + 2), "-1", "", "1.0", "one", "1, 1", "9" * 400, "\u0661"])
def test_a_process_of_any_other_version_is_refused_with_both_numbers_and_told_of_once(
    named: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with pytest.raises(OtherProtocol) as refused:
            check_protocol({HEADER.lower(): named}, "10.0.0.2")
    assert f"speaks protocol {PROTOCOL} and" in refused.value.detail
    assert f"the one at 10.0.0.2 speaks {named[:20]!a}" in refused.value.detail
    (record,) = caplog.records
    assert record.getMessage() == f"{refused.value.detail} {OtherProtocol.next_step}"


def test_the_log_is_not_filled_with_numbers_that_are_made_up(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(PROTOCOL + 2, PROTOCOL + 100):
        with pytest.raises(OtherProtocol):
            check_protocol({HEADER.lower(): str(number)}, None)
    assert len(caplog.records) < 20


class Stranger:
    """A process of a much later version. `takes`: after so many refusals it is one of this version."""

    def __init__(self) -> None:
        self.named: list[str | None] = []
        self.takes: int | None = None
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.named.append(request.headers.get(HEADER))
        if self.takes is not None and len(self.named) > self.takes:
            return web.json_response({})
        problem = OtherProtocol("This process speaks protocol 9.").problem()
        return web.json_response(problem, status=OtherProtocol.status, headers={HEADER: "9"})


@pytest.fixture
async def stranger() -> AsyncIterator[Stranger]:
    found, app = Stranger(), web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    async with TestServer(app) as server:
        found.url = str(server.make_url("")).rstrip("/")
        yield found


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def said(caplog: pytest.LogCaptureFixture, url: str) -> list[str]:
    """The errors that tell of both versions."""
    words = f"The process at {url} speaks protocol 9 and refuses this one, which speaks {PROTOCOL}"
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    return [line for line in lines if words in line and line.endswith(OtherProtocol.next_step)]


async def test_who_is_refused_a_channel_says_so_once_and_sends_nothing(
    stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiohttp.ClientSession(headers=FIELDS) as session:
        channel = Channel("s1", stranger.url, LIMITS, session)
        await until(lambda: len(stranger.named) > 3)
        with pytest.raises(Unavailable):
            channel.request(Put(0, "a", b""))
        await channel.close()
    assert set(stranger.named) == {str(PROTOCOL)}
    assert len(said(caplog, stranger.url)) == 1


async def test_a_node_whose_announcement_is_refused_says_so_once_and_goes_on_when_the_controller_is_another_version(
    stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    stranger.takes = 3
    async with aiohttp.ClientSession(headers=FIELDS) as session, asyncio.timeout(60):
        await MapFollower(session, stranger.url, LIMITS).announce("s1", "http://s1", "store", None, 1)
    assert stranger.named == [str(PROTOCOL)] * 4
    assert len(said(caplog, stranger.url)) == 1
