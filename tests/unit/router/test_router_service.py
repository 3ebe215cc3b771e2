"""What a router does with its map and its shards: the channels are in-process fakes, the rules are real."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import DataCorrupt, KvError, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.metrics import StoreLabels
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap, Primary
from kvstore.placement.ring import key_hash, partition_of
from kvstore.protocol import Answer, Delete, Get, Put, Stats
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import (
    PARTITIONS,
    FakeChannel,
    all_on,
    everybody_follows,
    halves,
    key_of,
    make_map,
    make_service,
    shards,
)

pytestmark = pytest.mark.usefixtures("fake_channels")


# --- one key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_id", ["s1", "s2"])
async def test_a_request_goes_to_the_owner_of_its_key_and_to_nobody_else(service: RouterService, shard_id: str) -> None:
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
    service.follow(moved)
    routed = await asking
    assert (routed.answer.status, routed.shard_id) == (201, "s2")
    assert (len(shards["s1"].asked), len(shards["s2"].asked)) == (1, 1)


async def test_a_shard_that_is_behind_the_routers_map_is_asked_again_until_it_has_caught_up(
    service: RouterService,
) -> None:
    key = key_of("s1")
    service.follow(all_on(2, "s2"))
    asking = asyncio.create_task(service.ask(Put(0, key, b"1")))
    while len(shards["s2"].asked) < 2:
        await asyncio.sleep(0.005)
    shards["s2"].map = service.cluster_map
    assert (await asking).answer.status == 201
    assert list(shards["s2"].data) == [key]


async def test_a_key_that_nobody_owns_is_unavailable_in_the_end() -> None:
    service = make_service(reroute_timeout_s=0.05)
    service.follow(halves())
    with pytest.raises(Unavailable, match=r"shard s[12] does not answer for its keys now"):
        await service.ask(Put(0, "a", b"1"))


async def test_a_key_that_is_fenced_is_asked_for_with_the_next_map_and_not_before(service: RouterService) -> None:
    key = key_of("s1")
    shards["s1"].fenced = {partition_of(key.encode(), PARTITIONS)}
    asking = asyncio.create_task(service.ask(Put(0, key, b"1")))
    await asyncio.sleep(0.1)
    assert (len(shards["s1"].asked), asking.done()) == (1, False)
    everybody_follows(service, all_on(2, "s2"))
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
    service.follow(halves())
    key = key_of("s1")
    newer = all_on(2, "s2")
    shards["s1"].before_answer.append(lambda: everybody_follows(service, newer))
    async with asyncio.timeout(60):
        assert (await service.ask(Put(0, key, b"1"))).shard_id == "s2"


async def test_what_was_not_done_because_its_shard_left_is_asked_of_the_new_owner(service: RouterService) -> None:
    key = key_of("s1")
    channel: Any = service.channels["s1"]
    original = channel._settle

    def settle(future: Any, request: Any) -> None:
        everybody_follows(service, make_map(2, lambda _: 0, "s2"))
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
    everybody_follows(service, all_on(2, "s2"))
    assert (await asking).status == 200  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [Unavailable("away"), TooManyRequests("full")])
async def test_what_the_channel_refuses_is_passed_on(service: RouterService, error: KvError) -> None:
    service.channels["s1"].error = error  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        await service.ask(Get(0, key_of("s1")))


async def test_a_write_of_unknown_outcome_is_not_sent_again(service: RouterService) -> None:
    channel: Any = service.channels["s1"]
    channel.fails_with = OutcomeUnknown("lost")
    asked = mock.Mock(wraps=channel.request)
    channel.request = asked
    for request in (Put(0, key_of("s1"), b"1"), Delete(0, key_of("s1"))):
        with pytest.raises(OutcomeUnknown):
            await service.ask(request)
    assert asked.call_count == 2


# --- the map ----------------------------------------------------------------------------------------------------------


async def closed(channel: Any) -> None:
    async with asyncio.timeout(60):
        while not channel.closed:
            await asyncio.sleep(0.005)


@pytest.fixture
def no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.router.service._LINGER_S", 0.01)


@pytest.mark.usefixtures("no_lingering")
async def test_a_newer_map_keeps_the_channels_to_those_who_stay(service: RouterService) -> None:
    before: Any = dict(service.channels)
    service.follow(make_map(2, lambda _: 0, "s1", "s3"))
    assert list(service.channels) == ["s1", "s3"]
    assert service.channels["s1"] is before["s1"]
    await closed(before["s2"])
    assert not before["s1"].closed


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_that_left_is_listened_to_until_all_that_was_asked_there_is_answered(
    service: RouterService,
) -> None:
    before: Any = service.channels["s2"]
    before.ops_under_way = 1
    service.follow(make_map(2, lambda _: 0, "s1"))
    await asyncio.sleep(0.1)
    assert not before.closed
    before.ops_under_way = 0
    await closed(before)


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_that_left_and_never_answers_is_not_listened_to_for_ever() -> None:
    service = make_service(request_timeout_s=0.05)
    everybody_follows(service, halves())
    before: Any = service.channels["s2"]
    before.ops_under_way = 1
    service.follow(make_map(2, lambda _: 0, "s1"))
    await closed(before)


async def test_closing_ends_the_channels_to_those_who_left_too(service: RouterService) -> None:
    before: Any = service.channels["s2"]
    service.follow(make_map(2, lambda _: 0, "s1"))
    await asyncio.sleep(0)
    await service.close()
    assert before.closed


async def test_a_map_by_which_a_new_member_owns_something_waits_until_that_is_connected(
    service: RouterService,
) -> None:
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.follow(make_map(2, lambda _: 2, "s1", "s2", "s3"))
    await asyncio.sleep(0.02)
    assert service.cluster_map is not None
    assert service.cluster_map.epoch == 1
    service.channels["s3"].connected = True
    async with asyncio.timeout(60):
        while service.cluster_map.epoch == 1:
            await asyncio.sleep(0.005)


async def test_of_several_maps_that_wait_the_newest_is_taken_over(service: RouterService) -> None:
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.follow(make_map(2, lambda _: 2, "s1", "s2", "s3"))
        service.follow(make_map(3, lambda _: 2, "s1", "s2", "s3"))
    await asyncio.sleep(0.02)
    assert service.cluster_map is not None
    assert service.cluster_map.epoch == 1
    service.channels["s3"].connected = True
    async with asyncio.timeout(60):
        while service.cluster_map.epoch != 3:
            await asyncio.sleep(0.005)


async def test_a_new_member_that_cannot_be_reached_is_not_waited_for_for_long(
    service: RouterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.router.service._CONNECT_WAIT_S", 0.05)
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.follow(make_map(2, lambda _: 2, "s1", "s2", "s3"))
    assert service.cluster_map is not None
    async with asyncio.timeout(60):
        while service.cluster_map.epoch != 2:
            await asyncio.sleep(0.005)


async def test_a_member_that_owned_nothing_and_is_not_connected_yet_is_waited_for_once_it_owns_something(
    service: RouterService,
) -> None:
    """Else a small share, copied before the router has reached the new shard, would answer 503 for a moment."""
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.follow(make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
        service.follow(make_map(3, lambda _: 2, "s1", "s2", "s3"))
    assert service.cluster_map is not None
    await asyncio.sleep(0.02)
    assert service.cluster_map.epoch == 2
    service.channels["s3"].connected = True
    async with asyncio.timeout(60):
        while service.cluster_map.epoch != 3:
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_at_another_address_is_asked_at_the_old_one_until_the_new_one_is_connected(
    service: RouterService,
) -> None:
    before: Any = service.channels["s1"]
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        for epoch, url in ((2, "http://elsewhere"), (3, "http://still-elsewhere"), (4, "http://still-elsewhere")):
            service.follow(make_map(epoch, lambda _: 0, "s1", "s2", urls={"s1": url}))
    assert service.channels["s1"] is before
    (successor,) = service._successors.values()
    successor.connected = True  # type: ignore[misc]
    async with asyncio.timeout(60):
        while service.channels["s1"] is before:
            await asyncio.sleep(0.005)
    assert service.channels["s1"] is successor
    assert successor.url == "http://still-elsewhere"
    await closed(before)


async def test_a_new_member_that_owns_nothing_yet_is_not_waited_for(service: RouterService) -> None:
    with mock.patch.object(FakeChannel, "is_connected_at_first", False):
        service.follow(make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
    assert service.cluster_map is not None
    assert service.cluster_map.epoch == 2


@pytest.mark.usefixtures("no_lingering")
async def test_a_member_with_another_address_gets_another_channel(service: RouterService) -> None:
    before: Any = service.channels["s1"]
    service.follow(make_map(2, lambda _: 0, "s1", "s2", urls={"s1": "http://elsewhere"}))
    assert service.channels["s1"].url == "http://elsewhere"
    await closed(before)
    assert (await service.ask(Get(0, "a"))).shard_id == "s1" if shards["s1"].owns("a") else True


async def test_closing_closes_all_channels(service: RouterService) -> None:
    channels: Any = list(service.channels.values())
    await service.close()
    assert all(channel.closed for channel in channels)


async def test_a_router_is_ready_once_every_shard_has_answered_and_stays_so(service: RouterService) -> None:
    channels: Any = service.channels
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
    for channel in service.channels.values():
        channel.answered = False
    service.channels["s2"].connected = False
    greeting = asyncio.create_task(service.greet())
    async with asyncio.timeout(60):
        while not service.channels["s1"].answered:
            await asyncio.sleep(0.005)
        service.channels["s2"].connected = True
        while service.not_ready():
            await asyncio.sleep(0.005)
    greeting.cancel()
    assert all(isinstance(request, Stats) for shard in shards.values() for request in shard.asked)


# --- listings ---------------------------------------------------------------------------------------------------------

names = st.text("ab/ü🔑", min_size=1, max_size=4)


@settings(max_examples=150)
@given(
    keys=st.sets(names, max_size=25),
    ghosts=st.sets(names, max_size=8),
    strays=st.sets(names, max_size=8),
    page_rows=st.tuples(*[st.integers(1, 6)] * 3),
    limit=st.integers(1, 8),
    prefix=st.sampled_from(["", "a", "ab", "ü", "zz"]),
    values=st.booleans(),
)
async def test_pages_over_all_shards_are_the_sorted_keys_cut_at_the_limit(
    keys: set[str],
    ghosts: set[str],
    strays: set[str],
    page_rows: tuple[int, int, int],
    limit: int,
    prefix: str,
    values: bool,
) -> None:
    service = make_service()
    everybody_follows(service, make_map(1, lambda partition: partition % 3, "s1", "s2", "s3"))
    for (_, shard), rows in zip(sorted(shards.items()), page_rows, strict=True):
        shard.page_rows_max = rows
        shard.data = {key: key.encode() for key in keys - ghosts if shard.owns(key)}
        shard.data |= {key: b"left behind" for key in strays if not shard.owns(key)}
        shard.ghosts = {key for key in ghosts if shard.owns(key)}
    listed: list[Any] = []
    after = ""
    while True:
        page = await service.all_shards.page(prefix, after, limit, values)
        assert len(page.items) <= limit
        listed += page.items
        if page.last is None:
            break
        assert page.items, "a page without items is the last one"
        assert page.last > after
        after = page.last
    expected = sorted(key for key in keys - ghosts if key.startswith(prefix))
    assert [item[0] for item in listed] == expected
    assert [item[2] for item in listed] == [key.encode() if values else None for key in expected]
    assert await service.all_shards.count(prefix) == (len(expected), 0)


async def test_a_page_is_full_although_no_shard_is_asked_for_all_of_it(service: RouterService) -> None:
    names = sorted(f"many-{number}" for number in range(400))
    for shard in shards.values():
        shard.data = {name: b"v" for name in names if shard.owns(name)}
    page = await service.all_shards.page("many-", "", 200, False)
    assert [item[0] for item in page.items] == names[:200]
    assert page.last == names[199]
    asked: list[Any] = [request for shard in shards.values() for request in shard.asked]
    assert all(request.limit < 150 for request in asked)


async def test_a_page_is_full_although_one_shard_has_all_its_keys(service: RouterService) -> None:
    names = [name for name in (f"same-{number:04d}" for number in range(900)) if shards["s1"].owns(name)][:120]
    shards["s1"].data = dict.fromkeys(names, b"v")
    page = await service.all_shards.page("same-", "", 100, True)
    assert [item[0] for item in page.items] == names[:100]


async def test_a_page_of_large_values_may_be_short_and_goes_on(service: RouterService) -> None:
    names = [f"large-{number}" for number in range(8)]
    for shard in shards.values():
        shard.page_rows_max = 1
        shard.data = {name: bytes(3_000_000) for name in names if shard.owns(name)}
    page = await service.all_shards.page("large-", "", 8, True)
    assert [item[0] for item in page.items] == names[: len(page.items)]
    assert 1 <= len(page.items) < 8
    assert page.last == page.items[-1][0]


async def test_a_listing_of_nothing_ends_at_once(service: RouterService) -> None:
    assert await service.all_shards.page("", "", 10, False) == ([], None, 0)


async def test_a_listing_with_a_shard_down_is_an_error_not_a_gap(service: RouterService) -> None:
    service.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        await service.all_shards.page("", "", 10, False)
    with pytest.raises(Unavailable):
        await service.all_shards.count("")


@pytest.mark.parametrize("how", ["not connected", "lost"])
async def test_a_partial_listing_leaves_out_what_is_down_and_names_its_partitions(
    service: RouterService, how: str
) -> None:
    fill("s1", "s2")
    setattr(service.channels["s2"], "error" if how == "not connected" else "fails_with", Unavailable("away"))
    odd = [partition for partition in range(PARTITIONS) if partition % 2]
    expected = sorted(key for key in KEYS if shards["s1"].owns(key))
    page = await service.all_shards.page("", "", 1000, False, partial=True)
    assert [item[0] for item in page.items] == expected
    assert (page.last, partition_set.listed(page.missing)) == (None, odd)
    counted = await service.all_shards.count("", partial=True)
    assert (counted.keys, partition_set.listed(counted.missing)) == (len(expected), odd)


async def test_a_partial_listing_of_a_whole_cluster_misses_nothing(service: RouterService) -> None:
    fill("s1", "s2")
    page = await service.all_shards.page("", "", 1000, False, partial=True)
    assert (len(page.items), page.missing) == (len(KEYS), 0)
    assert await service.all_shards.count("", partial=True) == (len(KEYS), 0)


async def test_a_partial_listing_does_not_wait_for_a_shard_that_hangs_nor_for_a_partition_that_nobody_has() -> None:
    service = make_service(reroute_timeout_s=0.1)
    everybody_follows(service, halves())
    fill("s1", "s2")
    shards["s1"].fenced = {0}
    service.channels["s2"].is_silent = True  # type: ignore[attr-defined]
    odd = [partition for partition in range(PARTITIONS) if partition % 2]
    page = await service.all_shards.page("", "", 1000, False, partial=True)
    assert partition_set.listed(page.missing) == [0, *odd]
    assert [item[0] for item in page.items] == sorted(key for key in KEYS if shards["s1"].owns(key))


async def test_what_one_page_of_a_partial_listing_left_out_stays_named_when_the_shard_comes_back(
    service: RouterService,
) -> None:
    fill("s1", "s2")
    shards["s1"].page_rows_max = 10
    away: Any = service.channels["s2"]
    away.error = Unavailable("away")
    shards["s1"].before_answer += [lambda: None, lambda: setattr(away, "error", None)]
    page = await service.all_shards.page("", "", 1000, False, partial=True)
    assert partition_set.listed(page.missing) == [partition for partition in range(PARTITIONS) if partition % 2]
    assert any(shards["s2"].owns(item[0]) for item in page.items)


async def test_what_is_damaged_is_no_gap_of_a_partial_listing(service: RouterService) -> None:
    refusal = DataCorrupt("key 'x'").problem()
    with (
        mock.patch.object(shards["s2"], "_page", lambda scan: Answer(scan.id, 500, problem=refusal)),
        pytest.raises(DataCorrupt, match="key 'x'"),
    ):
        await service.all_shards.page("", "", 10, False, partial=True)


async def test_a_shards_refusal_of_a_listing_is_passed_on_as_what_it_is(service: RouterService) -> None:
    with (
        mock.patch.object(
            shards["s2"], "_page", lambda scan: Answer(scan.id, 500, problem=DataCorrupt("key 'x'").problem())
        ),
        pytest.raises(DataCorrupt, match="key 'x'"),
    ):
        await service.all_shards.page("", "", 10, False)


async def listed(service: RouterService, call: str) -> int:
    """How many keys there are, by a listing or by a count."""
    if call == "count":
        return (await service.all_shards.count("")).keys
    page = await service.all_shards.page("", "", 1000, False)
    assert page.last is None
    assert len({item[0] for item in page.items}) == len(page.items)
    return len(page.items)


both_calls = pytest.mark.parametrize("call", ["page", "count"])
KEYS = [f"key-{number}" for number in range(100)]


def fill(*shard_ids: str) -> None:
    """All keys are in the files of these shards, whoever owns them."""
    for shard_id in shard_ids:
        shards[shard_id].data = dict.fromkeys(KEYS, b"1")


@both_calls
async def test_what_moved_after_one_was_asked_and_before_the_other_is_listed_once(
    service: RouterService, call: str
) -> None:
    fill("s1", "s2")
    newer = all_on(2, "s2")
    shards["s2"].before_answer.append(lambda: everybody_follows(service, newer))
    assert await listed(service, call) == len(KEYS)


@both_calls
async def test_what_moved_away_before_its_new_owner_was_asked_is_asked_for_again(
    service: RouterService, call: str
) -> None:
    fill("s1", "s2")
    shards["s1"].before_answer.append(lambda: setattr(shards["s1"], "map", all_on(2, "s2")))
    shards["s2"].before_answer += [lambda: None, lambda: everybody_follows(service, all_on(2, "s2"))]
    assert await listed(service, call) == len(KEYS)
    again: Any = shards["s2"].asked[-1]
    assert partition_set.decode(again.wanted) == sum(1 << partition for partition in range(0, PARTITIONS, 2))


@both_calls
async def test_a_partition_that_is_fenced_is_waited_for_and_the_others_are_not_asked_for_again(
    service: RouterService, call: str
) -> None:
    fill("s1", "s2")
    shards["s1"].fenced = {0, 2}
    listing = asyncio.create_task(listed(service, call))
    while len(shards["s1"].asked) < 3:
        await asyncio.sleep(0.005)
    assert not listing.done()
    shards["s1"].fenced = set()
    assert await listing == len(KEYS)
    again: Any = shards["s1"].asked[-1]
    assert partition_set.decode(again.wanted) == 0b101


async def test_what_is_asked_for_again_is_asked_for_up_to_where_the_others_ended() -> None:
    service = make_service()
    everybody_follows(service, halves())
    fill("s1", "s2")
    shards["s2"].page_rows_max = 10
    shards["s1"].fenced = {0}
    shards["s1"].before_answer += [lambda: None, lambda: shards["s1"].fenced.clear()]
    page = await service.all_shards.page("", "", 10, False)
    again: Any = shards["s1"].asked[-1]
    assert again.until == page.last == sorted(KEYS)[9]
    assert [item[0] for item in page.items] == sorted(KEYS)[:10]


@both_calls
async def test_a_member_that_joined_while_the_others_were_asked_is_not_left_out(
    service: RouterService, call: str
) -> None:
    fill("s1", "s3")

    def a_third_takes_all() -> None:  # before anybody answers
        everybody_follows(service, make_map(2, lambda _: 2, "s1", "s2", "s3"))

    shards["s1"].before_answer.append(a_third_takes_all)
    assert await listed(service, call) == len(KEYS)


@both_calls
async def test_a_listing_waits_for_a_shard_that_is_behind(service: RouterService, call: str) -> None:
    fill("s1", "s2")
    everybody_follows(service, all_on(2, "s1"))
    service.follow(halves(3))
    shards["s1"].map = halves(3)
    listing = asyncio.create_task(listed(service, call))
    await asyncio.sleep(0.05)
    assert not listing.done()
    shards["s2"].map = halves(3)
    assert await listing == len(KEYS)


@both_calls
async def test_what_nobody_ever_shows_makes_a_listing_unavailable(call: str) -> None:
    service = make_service(reroute_timeout_s=0.05)
    everybody_follows(service, halves())
    shards["s2"].fenced = {1}
    with pytest.raises(Unavailable):
        await listed(service, call)


@both_calls
async def test_a_member_that_is_down_and_owns_nothing_is_not_missed(service: RouterService, call: str) -> None:
    fill("s1", "s2")
    everybody_follows(service, make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
    for error in ("error", "fails_with"):
        setattr(service.channels["s3"], error, Unavailable("away"))
        assert await listed(service, call) == len(KEYS)


@both_calls
async def test_a_member_that_hangs_and_owns_nothing_is_not_waited_for(service: RouterService, call: str) -> None:
    fill("s1", "s2")
    everybody_follows(service, make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
    service.channels["s3"].is_silent = True  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        assert await listed(service, call) == len(KEYS)


@both_calls
async def test_an_owner_whose_connection_is_lost_makes_a_listing_unavailable_at_once(
    service: RouterService, call: str
) -> None:
    service.channels["s2"].fails_with = Unavailable("lost")  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable, match="lost"):
            await listed(service, call)


# --- for people -------------------------------------------------------------------------------------------------------


async def test_the_cluster_is_described_with_a_silent_shard_as_down_and_its_last_known_numbers(
    service: RouterService,
) -> None:
    shards["s2"].data = {"a": b"1", "b": b"2"}
    views = ClusterViews(service)
    document = await views.cluster()
    assert (document["epoch"], document["partitions"], document["replicas"]) == (1, PARTITIONS, 1)
    assert [(s["id"], s["state"], s["keys"], s["partitions"]) for s in document["shards"]] == [
        ("s1", "up", 0, 32),
        ("s2", "up", 2, 32),
    ]
    service.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    document = await views.cluster()
    assert [(s["id"], s["state"], s["keys"]) for s in document["shards"]] == [("s1", "up", 0), ("s2", "down", 2)]


async def test_a_node_that_does_not_serve_its_store_now_is_described_as_down(
    service: RouterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Unavailable("this node does not serve shard s2 now")
    refused = Answer(0, refusal.status, problem=refusal.problem())

    def request(request: Any, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(refused)
        return future

    monkeypatch.setattr(service.channels["s2"], "request", request)
    document = await ClusterViews(service).cluster()
    assert [(s["id"], s["state"]) for s in document["shards"]] == [("s1", "up"), ("s2", "down")]


async def test_the_cluster_is_described_as_of_the_epoch_that_is_asked_for(service: RouterService) -> None:
    shards["s2"].data = {"a": b"1"}
    described = asyncio.create_task(ClusterViews(service).cluster(2))
    await asyncio.sleep(0.05)
    service.follow(all_on(2, "s2"))
    shards["s1"].map = all_on(2, "s2")
    await asyncio.sleep(0.05)
    assert not described.done()  # s2 has not followed yet, and counts what it had before
    shards["s2"].map, shards["s2"].data = all_on(2, "s2"), {"a": b"1", "b": b"2"}
    document = await described
    assert (document["epoch"], [s["partitions"] for s in document["shards"]]) == (2, [0, 64])
    assert document["shards"][1]["keys"] == 2
    async with asyncio.timeout(60):
        assert (await ClusterViews(service).cluster(3))["epoch"] == 2  # it did not come in time


async def test_a_shard_that_hangs_does_not_hang_the_description(service: RouterService) -> None:
    service.channels["s2"].is_silent = True  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        stats = await ClusterViews(service).shard_stats()
    assert stats["s1"] is not None
    assert stats["s2"] is None


def away_from_home(cluster_map: ClusterMap, node_id: str) -> ClusterMap:
    """The next map, in which the primary of s2 is on another node."""
    primary = Primary(node=node_id, copy_id="copy")
    promoted = msgspec.structs.replace(cluster_map.shards[1], primary=primary, term=cluster_map.epoch + 1)
    shards = [cluster_map.shards[0], promoted]
    return msgspec.structs.replace(cluster_map, epoch=cluster_map.epoch + 1, shards=shards)


async def test_a_shard_is_asked_and_shown_where_its_primary_is(service: RouterService) -> None:
    assert service.cluster_map is not None
    moved = away_from_home(service.cluster_map, "s1")
    shards["s1"].map = shards["s2"].map = moved
    service.follow(moved)
    await asyncio.sleep(0)
    assert [service.channels[shard].url for shard in ("s1", "s2")] == ["http://s1", "http://s1"]
    document = await ClusterViews(service).cluster()
    assert [(node["id"], node["url"], node["state"]) for node in document["nodes"]] == [
        ("s1", "http://s1", "up"), ("s2", "http://s2", "up"),
    ]  # fmt: skip
    shown = [(shard["id"], shard["primary"], shard["term"], shard["url"]) for shard in document["shards"]]
    assert shown == [("s1", "s1", 1, "http://s1"), ("s2", "s1", service.cluster_map.epoch, "http://s1")]
    explained = await ClusterViews(service).explain(key_of("s2"))
    assert (explained["owner"], explained["primary"], explained["owner_url"], explained["copies"]) == (
        "s2", "s1", "http://s1", [],
    )  # fmt: skip
    stats = await ClusterViews(service).shard_stats()
    assert set(ClusterViews(service).labelled(stats)) == {
        StoreLabels("s1", "s1", "primary"),
        StoreLabels("s1", "s2", "primary"),
    }


async def test_a_node_is_down_while_no_shard_of_its_own_answers(service: RouterService) -> None:
    service.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    states = {node["id"]: node["state"] for node in (await ClusterViews(service).cluster())["nodes"]}
    assert states == {"s1": "up", "s2": "down"}


async def test_explain_shows_the_way_of_a_key(service: RouterService) -> None:
    key = key_of("s2")
    shards["s2"].data = {key: b"1"}
    shown = await ClusterViews(service).explain(key)
    assert shown["hash"] == f"{key_hash(key.encode()):016x}"
    assert (shown["owner"], shown["owner_url"], shown["owner_state"]) == ("s2", "http://s2", "up")
    assert shown["partition"] == partition_of(key.encode(), PARTITIONS)
    assert sorted(shown["walk"]) == ["s1", "s2"]
    assert shown["row"] == "value"
    service.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    shown = await ClusterViews(service).explain(key)
    assert (shown["owner"], shown["owner_state"], shown["detail"]) == ("s2", "down", "away")


async def test_a_clock_that_runs_ahead_of_this_routers_is_told_once(
    service: RouterService, caplog: pytest.LogCaptureFixture
) -> None:
    now_us = time.time_ns() // 1000
    shards["s1"].attempts_floor = now_us - 10_000_000  # as it is while all clocks agree
    await ClusterViews(service).shard_stats()
    assert "clock" not in caplog.text
    shards["s2"].attempts_floor = now_us + 60_000_000
    await ClusterViews(service).shard_stats()
    await ClusterViews(service).shard_stats()
    assert service.floor == now_us + 60_000_000
    assert caplog.text.count("let all hosts keep the same time") == 1
