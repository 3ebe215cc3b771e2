"""What a router does with a newer map: the channels are in-process fakes, the rules are real."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest

from kvstore.protocol import Get, Stats
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import (
    FakeChannel,
    all_follow,
    halves,
    make_map,
    make_service,
    shards,
)

pytestmark = pytest.mark.usefixtures("fake_channels")


async def closed(channel: Any) -> None:
    async with asyncio.timeout(60):
        while not channel.closed:
            await asyncio.sleep(0.005)


@pytest.fixture
def no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.router.channels._LINGER_S", 0.01)


@pytest.mark.usefixtures("no_lingering")
async def test_a_newer_map_keeps_the_channels_to_those_who_stay(service: RouterService) -> None:
    before: Any = dict(service.table.channels)
    service.table.follow(make_map(2, lambda _: 0, "s1", "s3"))
    assert list(service.table.channels) == ["s1", "s3"]
    assert service.table.channels["s1"] is before["s1"]
    await closed(before["s2"])
    assert not before["s1"].closed


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_that_left_is_listened_to_until_all_that_was_asked_there_is_answered(
    service: RouterService,
) -> None:
    before: Any = service.table.channels["s2"]
    before.ops_under_way = 1
    service.table.follow(make_map(2, lambda _: 0, "s1"))
    await asyncio.sleep(0.1)
    assert not before.closed
    before.ops_under_way = 0
    await closed(before)


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_that_left_and_never_answers_is_not_listened_to_for_ever() -> None:
    service = make_service(request_timeout_s=0.05)
    all_follow(service, halves())
    before: Any = service.table.channels["s2"]
    before.ops_under_way = 1
    service.table.follow(make_map(2, lambda _: 0, "s1"))
    await closed(before)


async def test_closing_ends_the_channels_to_those_who_left_too(service: RouterService) -> None:
    before: Any = service.table.channels["s2"]
    service.table.follow(make_map(2, lambda _: 0, "s1"))
    await asyncio.sleep(0)
    await service.table.close()
    assert before.closed


async def test_a_map_by_which_a_new_member_owns_something_waits_until_that_is_connected(
    service: RouterService,
) -> None:
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.table.follow(make_map(2, lambda _: 2, "s1", "s2", "s3"))
    await asyncio.sleep(0.02)
    assert service.table.cluster_map is not None
    assert service.table.cluster_map.epoch == 1
    service.table.channels["s3"].connected = True
    async with asyncio.timeout(60):
        while service.table.cluster_map.epoch == 1:
            await asyncio.sleep(0.005)


async def test_of_several_maps_that_wait_the_newest_is_taken_over(service: RouterService) -> None:
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.table.follow(make_map(2, lambda _: 2, "s1", "s2", "s3"))
        service.table.follow(make_map(3, lambda _: 2, "s1", "s2", "s3"))
    await asyncio.sleep(0.02)
    assert service.table.cluster_map is not None
    assert service.table.cluster_map.epoch == 1
    service.table.channels["s3"].connected = True
    async with asyncio.timeout(60):
        while service.table.cluster_map.epoch != 3:
            await asyncio.sleep(0.005)


async def test_a_new_member_that_cannot_be_reached_is_not_waited_for_for_long(
    service: RouterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.router.routing_table._CONNECT_WAIT_S", 0.05)
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.table.follow(make_map(2, lambda _: 2, "s1", "s2", "s3"))
    assert service.table.cluster_map is not None
    async with asyncio.timeout(60):
        while service.table.cluster_map.epoch != 2:
            await asyncio.sleep(0.005)


async def test_a_member_that_owned_nothing_and_is_not_connected_yet_is_waited_for_once_it_owns_something(
    service: RouterService,
) -> None:
    """Else a small share, copied before the router has reached the new shard, would answer 503 for a moment."""
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.table.follow(make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
        service.table.follow(make_map(3, lambda _: 2, "s1", "s2", "s3"))
    assert service.table.cluster_map is not None
    await asyncio.sleep(0.02)
    assert service.table.cluster_map.epoch == 2
    service.table.channels["s3"].connected = True
    async with asyncio.timeout(60):
        while service.table.cluster_map.epoch != 3:
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_at_another_address_is_asked_at_the_old_one_until_the_new_one_is_connected(
    service: RouterService,
) -> None:
    before: Any = service.table.channels["s1"]
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        for epoch, url in ((2, "http://elsewhere"), (3, "http://still-elsewhere"), (4, "http://still-elsewhere")):
            service.table.follow(make_map(epoch, lambda _: 0, "s1", "s2", urls={"s1": url}))
    assert service.table.channels["s1"] is before
    (successor,) = service.table._opened._successors.values()
    successor.connected = True  # type: ignore[misc]
    async with asyncio.timeout(60):
        while service.table.channels["s1"] is before:
            await asyncio.sleep(0.005)
    assert service.table.channels["s1"] is successor
    assert successor.url == "http://still-elsewhere"
    await closed(before)


async def test_a_new_member_that_owns_nothing_yet_is_not_waited_for(service: RouterService) -> None:
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.table.follow(make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
    assert service.table.cluster_map is not None
    assert service.table.cluster_map.epoch == 2


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_with_another_address_gets_another_channel(service: RouterService) -> None:
    before: Any = service.table.channels["s1"]
    service.table.follow(make_map(2, lambda _: 0, "s1", "s2", urls={"s1": "http://elsewhere"}))
    assert service.table.channels["s1"].url == "http://elsewhere"
    await closed(before)
    assert (await service.ask(Get(0, "a"))).shard_id == "s1" if shards["s1"].owns("a") else True


async def test_closing_closes_all_channels(service: RouterService) -> None:
    channels: Any = list(service.table.channels.values())
    await service.table.close()
    assert all(channel.closed for channel in channels)


async def test_a_router_is_ready_once_every_shard_has_answered_and_stays_so(service: RouterService) -> None:
    channels: Any = service.table.channels
    for channel in channels.values():
        channel.answered = False
    assert "s1, s2" in (service.not_ready() or "")
    channels["s1"].answered = True
    assert "s2" in (service.not_ready() or "")
    channels["s2"].answered = True
    assert service.not_ready() is None
    channels["s1"].answered = False
    assert service.not_ready() is None, "one shard that is down does not make the router so"


async def test_without_a_map_a_router_is_not_ready() -> None:
    assert "map" in (make_service().not_ready() or "")


async def test_shards_are_greeted_until_each_has_answered(service: RouterService) -> None:
    for channel in service.table.channels.values():
        channel.answered = False
    service.table.channels["s2"].connected = False
    greeting = asyncio.create_task(service.greet())
    async with asyncio.timeout(60):
        while not service.table.channels["s1"].answered:
            await asyncio.sleep(0.005)
        service.table.channels["s2"].connected = True
        while service.not_ready():
            await asyncio.sleep(0.005)
    greeting.cancel()
    assert all(isinstance(request, Stats) for shard in shards.values() for request in shard.asked)
