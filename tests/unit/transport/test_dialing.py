"""When the log tells of a node that cannot be reached, and which store a hello names."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging

import pytest

from kvstore.config import Limits
from kvstore.transport.dialing import Dialer, Outage
from kvstore.transport.sessions import ClusterSession


@pytest.fixture(autouse=True)
def infos(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvstore.transport.dialing")


def test_an_outage_is_told_when_it_lasts_and_not_before_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("s1", "http://far")
    for now_s in (100.0, 104.9):
        outage.goes_on(OSError("refused"), now_s)
    assert caplog.messages == []
    for now_s in (105.0, 106.0):
        outage.goes_on(OSError("refused"), now_s)
    outage.is_over()
    assert caplog.messages == [
        "shard s1 at http://far cannot be reached: refused",
        "shard s1 at http://far is reached again",
    ]
    outage.goes_on(OSError("refused"), 107.0)
    assert len(caplog.messages) == 2, "that is another outage, which has just begun"


def test_a_short_outage_is_not_told_at_all(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("s1", "http://far")
    outage.goes_on(OSError("refused"), 100.0)
    outage.is_over()
    assert caplog.messages == []


def test_that_no_file_may_be_opened_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("s1", "http://far")
    for now_s in (100.0, 100.1):
        outage.goes_on(OSError(errno.EMFILE, "Too many open files"), now_s)
    (said,) = caplog.messages
    assert "raise the limit of open files" in said


class Impatient(asyncio.Timeout):
    """Over at once; `waits` has how long it should have been."""

    waits: list[float]

    def __init__(self, wait_s: float) -> None:
        self.waits.append(wait_s)
        super().__init__(asyncio.get_running_loop().time())


async def test_a_node_that_comes_back_is_tried_after_a_fifth_of_its_outage_at_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Impatient, "waits", [], raising=False)
    monkeypatch.setattr(asyncio, "timeout", Impatient)
    dialer = Dialer("http://far", Limits(reconnect_wait_s_max=1.0), None, ClusterSession())  # type: ignore[arg-type]
    for _ in range(30):
        await dialer.pause()
    ended_s = itertools.accumulate(Impatient.waits)
    assert all(wait_s <= 0.2 * outage_s + 0.01 for wait_s, outage_s in zip(Impatient.waits, ended_s, strict=True))
    assert (Impatient.waits[0], Impatient.waits[-1]) == (0.01, 1.0)
    assert sum(wait_s < 1.0 for wait_s in Impatient.waits) <= 21


class Store:
    answered = False

    def __init__(self, shard_id: str) -> None:
        self.shard_id = self.store_id = shard_id


async def test_after_each_failure_a_hello_names_another_store_and_after_news_the_newest() -> None:
    dialer = Dialer("http://far", Limits(reconnect_wait_s_max=0.001), None, ClusterSession())  # type: ignore[arg-type]
    stores = [Store("old"), Store("new")]
    named = []
    for _ in range(3):
        named.append(dialer.hello_for(stores).shard_id)
        await dialer.pause()
    dialer.hurry()
    await dialer.pause()
    named.append(dialer.hello_for(stores).shard_id)
    assert named == ["new", "old", "new", "new"]
