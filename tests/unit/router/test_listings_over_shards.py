"""Listings over several shards: the channels are in-process fakes, the rules are real."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import DataCorrupt, Unavailable
from kvstore.placement import partition_set
from kvstore.protocol import Answer
from kvstore.router.listing import Listing
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import (
    PARTITIONS,
    all_follow,
    all_on,
    halves,
    make_map,
    make_service,
    shards,
)

pytestmark = pytest.mark.usefixtures("fake_channels")


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
    all_follow(service, make_map(1, lambda partition: partition % 3, "s1", "s2", "s3"))
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
    assert await service.all_shards.page("", "", 10, False) == Listing([], None)


async def test_a_listing_with_a_shard_down_is_an_error_not_a_gap(service: RouterService) -> None:
    service.table.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        await service.all_shards.page("", "", 10, False)
    with pytest.raises(Unavailable):
        await service.all_shards.count("")


@pytest.mark.parametrize("how", ["not connected", "lost"])
async def test_a_partial_listing_leaves_out_what_is_down_and_names_its_partitions(
    service: RouterService, how: str
) -> None:
    fill("s1", "s2")
    setattr(service.table.channels["s2"], "error" if how == "not connected" else "fails_with", Unavailable("away"))
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


async def test_a_partial_listing_does_not_wait_for_a_shard_that_hangs_nor_for_a_partition_without_an_owner() -> None:
    service = make_service(reroute_timeout_s=0.1)
    all_follow(service, halves())
    fill("s1", "s2")
    shards["s1"].fenced = {0}
    service.table.channels["s2"].is_silent = True  # type: ignore[attr-defined]
    odd = [partition for partition in range(PARTITIONS) if partition % 2]
    page = await service.all_shards.page("", "", 1000, False, partial=True)
    assert partition_set.listed(page.missing) == [0, *odd]
    assert [item[0] for item in page.items] == sorted(key for key in KEYS if shards["s1"].owns(key))


async def test_what_one_page_of_a_partial_listing_left_out_stays_named_when_the_shard_comes_back(
    service: RouterService,
) -> None:
    fill("s1", "s2")
    shards["s1"].page_rows_max = 10
    away: Any = service.table.channels["s2"]
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
    """All keys are in the files of these shards, whichever shard owns them."""
    for shard_id in shard_ids:
        shards[shard_id].data = dict.fromkeys(KEYS, b"1")


@both_calls
async def test_what_moved_after_one_was_asked_and_before_the_other_is_listed_once(
    service: RouterService, call: str
) -> None:
    fill("s1", "s2")
    newer = all_on(2, "s2")
    shards["s2"].before_answer.append(lambda: all_follow(service, newer))
    assert await listed(service, call) == len(KEYS)


@both_calls
async def test_what_moved_away_before_its_new_owner_was_asked_is_asked_for_again(
    service: RouterService, call: str
) -> None:
    fill("s1", "s2")
    shards["s1"].before_answer.append(lambda: setattr(shards["s1"], "map", all_on(2, "s2")))
    shards["s2"].before_answer += [lambda: None, lambda: all_follow(service, all_on(2, "s2"))]
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
    all_follow(service, halves())
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

    def a_third_takes_all() -> None:  # before any shard answers
        all_follow(service, make_map(2, lambda _: 2, "s1", "s2", "s3"))

    shards["s1"].before_answer.append(a_third_takes_all)
    assert await listed(service, call) == len(KEYS)


@both_calls
async def test_a_listing_waits_for_a_shard_that_is_behind(service: RouterService, call: str) -> None:
    fill("s1", "s2")
    all_follow(service, all_on(2, "s1"))
    service.table.follow(halves(3))
    shards["s1"].map = halves(3)
    listing = asyncio.create_task(listed(service, call))
    await asyncio.sleep(0.05)
    assert not listing.done()
    shards["s2"].map = halves(3)
    assert await listing == len(KEYS)


@both_calls
async def test_what_no_shard_ever_shows_makes_a_listing_unavailable(call: str) -> None:
    service = make_service(reroute_timeout_s=0.05)
    all_follow(service, halves())
    shards["s2"].fenced = {1}
    with pytest.raises(Unavailable):
        await listed(service, call)


@both_calls
async def test_a_member_that_is_down_and_owns_nothing_is_not_missed(service: RouterService, call: str) -> None:
    fill("s1", "s2")
    all_follow(service, make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
    for error in ("error", "fails_with"):
        setattr(service.table.channels["s3"], error, Unavailable("away"))
        assert await listed(service, call) == len(KEYS)


@both_calls
async def test_a_member_that_hangs_and_owns_nothing_is_not_waited_for(service: RouterService, call: str) -> None:
    fill("s1", "s2")
    all_follow(service, make_map(2, lambda partition: partition % 2, "s1", "s2", "s3"))
    service.table.channels["s3"].is_silent = True  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        assert await listed(service, call) == len(KEYS)


@both_calls
async def test_an_owner_whose_connection_is_lost_makes_a_listing_unavailable_at_once(
    service: RouterService, call: str
) -> None:
    service.table.channels["s2"].fails_with = Unavailable("lost")  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable, match="lost"):
            await listed(service, call)
