"""What a router does with one key: the channels are in-process fakes, the rules are real."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest

from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.placement.ring import partition_of
from kvstore.protocol import Delete, Get, Put
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import (
    PARTITIONS,
    all_follow,
    all_on,
    halves,
    key_of,
    make_map,
    make_service,
    shards,
)

pytestmark = pytest.mark.usefixtures("fake_channels")


@pytest.mark.parametrize("shard_id", ["s1", "s2"])
async def test_a_request_goes_to_the_owner_of_its_key_and_to_no_other(service: RouterService, shard_id: str) -> None:
    key = key_of(shard_id)
    routed = await service.ask(Put(0, key, b"1"))
    assert (routed.answer.status, routed.shard_id) == (201, shard_id)
    assert routed.partition == partition_of(key.encode(), PARTITIONS)
    assert [len(shard.asked) for shard in shards.values()].count(1) == 1


async def test_without_a_map_everything_is_unavailable() -> None:
    service = make_service()
    for call in (
        service.ask(Get(0, "a")),
        service.all_shards.page("", "", 10, False),
        service.all_shards.count(""),
        ClusterViews(service).cluster(),
        ClusterViews(service).explain("a"),
    ):
        with pytest.raises(Unavailable) as refused:
            await call
        assert refused.value.members["retry_after_ms"] > 0


async def test_a_key_that_moved_is_asked_for_where_the_newer_map_says(service: RouterService) -> None:
    key = key_of("s1")
    moved = all_on(2, "s2")
    shards["s1"].map = shards["s2"].map = moved
    asking = asyncio.create_task(service.ask(Put(0, key, b"1")))
    while not shards["s1"].asked:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert not asking.done(), "the map that the answer names is waited for"
    service.table.follow(moved)
    routed = await asking
    assert (routed.answer.status, routed.shard_id) == (201, "s2")
    assert (len(shards["s1"].asked), len(shards["s2"].asked)) == (1, 1)


async def test_a_shard_that_is_behind_the_routers_map_is_asked_again_until_it_has_caught_up(
    service: RouterService,
) -> None:
    key = key_of("s1")
    service.table.follow(all_on(2, "s2"))
    asking = asyncio.create_task(service.ask(Put(0, key, b"1")))
    while len(shards["s2"].asked) < 2:
        await asyncio.sleep(0.005)
    shards["s2"].map = service.table.cluster_map
    assert (await asking).answer.status == 201
    assert list(shards["s2"].data) == [key]


async def test_a_key_without_an_owner_is_unavailable_in_the_end() -> None:
    service = make_service(reroute_timeout_s=0.05)
    service.table.follow(halves())
    with pytest.raises(Unavailable, match=r"shard s[12] does not answer for its keys now"):
        await service.ask(Put(0, "a", b"1"))


async def test_a_key_that_is_fenced_is_asked_for_with_the_next_map_and_not_before(service: RouterService) -> None:
    key = key_of("s1")
    shards["s1"].fenced = {partition_of(key.encode(), PARTITIONS)}
    asking = asyncio.create_task(service.ask(Put(0, key, b"1")))
    await asyncio.sleep(0.1)
    assert (len(shards["s1"].asked), asking.done()) == (1, False)
    all_follow(service, all_on(2, "s2"))
    routed = await asking
    assert (routed.answer.status, routed.shard_id) == (201, "s2")
    assert (len(shards["s1"].asked), len(shards["s2"].asked)) == (1, 1)


async def test_a_fence_that_goes_without_a_newer_map_is_noticed(service: RouterService) -> None:
    key = key_of("s1")
    shards["s1"].fenced = {partition_of(key.encode(), PARTITIONS)}
    asking = asyncio.create_task(service.ask(Put(0, key, b"1")))
    await asyncio.sleep(0.05)
    shards["s1"].fenced = set()
    async with asyncio.timeout(60):
        assert (await asking).answer.status == 201


async def test_a_map_that_was_there_before_the_refusal_is_not_waited_for() -> None:
    service = make_service(reroute_timeout_s=600.0)
    service.table.follow(halves())
    key = key_of("s1")
    newer = all_on(2, "s2")
    shards["s1"].before_answer.append(lambda: all_follow(service, newer))
    async with asyncio.timeout(60):
        assert (await service.ask(Put(0, key, b"1"))).shard_id == "s2"


async def test_what_was_not_done_because_its_shard_left_is_asked_of_the_new_owner(service: RouterService) -> None:
    key = key_of("s1")
    channel: Any = service.table.channels["s1"]
    original = channel._settle

    def settle(future: Any, request: Any) -> None:
        all_follow(service, make_map(2, lambda _: 0, "s2"))
        original(future, request)

    channel.fails_with, channel._settle = Unavailable("closed the connection"), settle
    assert (await service.ask(Put(0, key, b"1"))).shard_id == "s2"
    assert (await service.ask_owner(partition_of(key.encode(), PARTITIONS), Get(0, key))).status == 200  # type: ignore[union-attr]


async def test_whatever_is_asked_of_a_partitions_owner_follows_it(service: RouterService) -> None:
    key = key_of("s1")
    shards["s1"].data = shards["s2"].data = {key: b"1"}
    partition = partition_of(key.encode(), PARTITIONS)
    shards["s1"].fenced = {partition}
    asking = asyncio.create_task(service.ask_owner(partition, Get(0, key)))
    await asyncio.sleep(0.05)
    assert not asking.done()
    all_follow(service, all_on(2, "s2"))
    assert (await asking).status == 200  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [Unavailable("away"), TooManyRequests("full")])
async def test_what_the_channel_refuses_is_passed_on(service: RouterService, error: KvError) -> None:
    service.table.channels["s1"].error = error  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        await service.ask(Get(0, key_of("s1")))


async def test_a_write_of_unknown_outcome_is_not_sent_again(service: RouterService) -> None:
    channel: Any = service.table.channels["s1"]
    channel.fails_with = OutcomeUnknown("lost")
    asked = mock.Mock(wraps=channel.request)
    channel.request = asked
    for request in (Put(0, key_of("s1"), b"1"), Delete(0, key_of("s1"))):
        with pytest.raises(OutcomeUnknown):
            await service.ask(request)
    assert asked.call_count == 2
