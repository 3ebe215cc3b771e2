"""Listings and counts: what is visible and owned all the time, in order, in bounded pages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvstore.placement import partition_set
from kvstore.protocol import Acquire, Count, Scan, ScanLeases
from kvstore.store import scans
from tests.unit.store.conftest import Opener


async def test_a_listing_shows_what_is_visible_and_nothing_that_is_only_executed(harness: Any) -> None:
    await harness.put("a", b"old")
    gate = harness.hold("commit")
    puts = [harness.put("a", b"new"), harness.put("b", b"new")]
    await gate.arrived.wait()
    page = await harness.store.scans.scan(Scan(1, "", "", 10, True))
    assert [item[:3] for item in page.items] == [("a", 1, b"old")]
    assert await harness.count("") == 1
    gate.open()
    for put in puts:
        await put
    page = await harness.store.scans.scan(Scan(1, "", "", 10, True))
    assert [item[:3] for item in page.items] == [("a", 2, b"new"), ("b", 3, b"new")]


# --- what is not owned all the time -----------------------------------------------------------------------------------


async def held_back(harness: Any, work: Awaitable[Any], change: Callable[[], None]) -> tuple[Any, int]:
    """The result of a listing or count whose first page was read, but not looked at yet, before the change; and how
    many pages it read."""
    gate = harness.hold("scan")
    task = asyncio.ensure_future(work)
    await gate.arrived.wait()
    await change()
    gate.open()
    result = await task
    harness.store.tables.engine.scan = gate._method
    return result, gate.calls


async def test_a_listing_leaves_out_what_was_not_owned_all_the_time_and_says_so(harness: Any) -> None:
    for key in ("a", "b", "c"):
        await harness.put(key)
    page, calls = await held_back(harness, harness.store.scans.scan(Scan(1, "", "", 10)), lambda: harness.leave("a"))
    assert ([item[0] for item in page.items], page.more, page.last) == (["b", "c"], False, "c")
    assert page.owned == harness.all_but("a")
    assert calls == 1, "it is not made again"


async def test_what_left_and_came_back_while_a_page_was_read_is_left_out(harness: Any) -> None:
    for key in ("a", "b"):
        await harness.put(key)

    async def there_and_back() -> None:
        await harness.leave("a")
        await harness.arrive("a")

    page, _ = await held_back(harness, harness.store.scans.scan(Scan(1, "", "", 10)), there_and_back)
    assert ([item[0] for item in page.items], page.owned) == (["b"], harness.all_but("a"))
    page = await harness.store.scans.scan(Scan(1, "", "", 10))
    assert ([item[0] for item in page.items], page.owned) == (["a", "b"], harness.all_but())


async def test_what_arrives_while_a_page_is_read_is_left_out(harness: Any) -> None:
    for key in ("a", "b"):
        await harness.put(key)
    await harness.leave("a")
    page, _ = await held_back(harness, harness.store.scans.scan(Scan(1, "", "", 10)), lambda: harness.arrive("a"))
    assert ([item[0] for item in page.items], page.owned) == (["b"], harness.all_but("a"))


async def test_what_leaves_while_a_listing_waits_for_the_expiries_that_it_met_is_left_out(harness: Any) -> None:
    await harness.put("a", ttl_ms=1)
    await harness.put("b")
    await harness.put("c")
    await asyncio.sleep(0.01)
    move = await harness.plan("b")
    gate, scan = harness.hold("commit"), harness.hold("scan")
    harness.put("first")
    await gate.arrived.wait()
    fencing = asyncio.create_task(harness.store.partitions.freeze(move))
    listing = asyncio.create_task(harness.store.scans.scan(Scan(1, "", "", 10)))
    await scan.arrived.wait()
    scan.open()
    await asyncio.sleep(0)  # its expiry is in the queue behind the fence
    gate.open()
    page = await listing
    await fencing
    assert ([item[0] for item in page.items], page.owned) == (["c"], harness.all_but("b"))


async def test_a_newer_map_that_changes_nothing_here_takes_nothing_from_a_listing(harness: Any) -> None:
    await harness.put("a")
    page, calls = await held_back(
        harness, harness.store.scans.scan(Scan(1, "", "", 10)), lambda: harness.own(everything=True)
    )
    assert ([item[0] for item in page.items], page.owned, calls) == (["a"], harness.all_but(), 1)


async def test_a_listing_shows_only_what_is_wanted_and_owned_and_not_beyond_its_end(harness: Any) -> None:
    keys = ["a", "b", "c", "d"]
    for key in keys:
        await harness.put(key)
    await harness.leave("d")
    for wanted, last, shown in ((("a", "c"), "", ["a", "c"]), (("b", "d"), "", ["b"]), (keys, "b", ["a", "b"])):
        page = await harness.store.scans.scan(Scan(1, "", "", 10, wanted=harness.partitions(*wanted), until=last))
        assert [item[0] for item in page.items] == shown
        assert page.owned == harness.partitions(*(key for key in wanted if key != "d"))


async def test_where_nothing_that_is_wanted_is_owned_the_file_is_not_looked_at(harness: Any) -> None:
    await harness.put("a")
    await harness.leave("a")
    gate = harness.hold("scan")
    gate.open()
    page = await harness.store.scans.scan(Scan(1, "", "k", 10, wanted=harness.partitions("a")))
    assert (partition_set.decode(page.owned), page.more, page.last, page.items) == (0, False, "k", [])
    counted = await harness.store.scans.count(Count(1, "", harness.partitions("a")))
    assert (partition_set.decode(counted.owned), counted.count) == (0, 0)
    assert gate.calls == 0


async def test_leases_of_what_was_not_owned_all_the_time_are_left_out(harness: Any) -> None:
    for name in ("a", "b", "c"):
        await harness.write(Acquire(1, name, 60_000, 0, "me"))
    page, _ = await held_back(
        harness, harness.store.scans.leases(ScanLeases(1, "", "", 10)), lambda: harness.leave("a")
    )
    assert ([item[0] for item in page.items], page.owned) == (["b", "c"], harness.all_but("a"))
    page = await harness.store.scans.leases(ScanLeases(1, "", "", 10, harness.partitions("a", "b")))
    assert ([item[0] for item in page.items], page.owned) == (["b"], harness.partitions("b"))


# --- pages and counts -------------------------------------------------------------------------------------------------


async def test_a_listing_is_in_byte_order_and_goes_on_where_it_ended(harness: Any) -> None:
    names = ["b", "a", "ab", "🔑", "ü", "Z", "a\0b", "~", "b/1", "b/2"]
    for name in names:
        await harness.put(name)
    expected = sorted(names, key=str.encode)
    listed: list[str] = []
    after, more = "", True
    while more:
        page = await harness.store.scans.scan(Scan(1, "", after, 3))
        assert len(page.items) <= 3
        listed += [item[0] for item in page.items]
        after, more = page.last, page.more
    assert listed == expected
    assert await harness.keys("b") == ["b", "b/1", "b/2"]
    assert await harness.keys("b", after="b/1") == ["b/2"]
    assert await harness.keys("c") == []
    assert await harness.keys("b", after="a") == ["b", "b/1", "b/2"]
    assert await harness.keys("b", after="c") == []


async def test_a_listing_without_values_brings_none_and_one_with_values_brings_them(harness: Any) -> None:
    await harness.put("a", b"", ttl_ms=60_000)
    page = await harness.store.scans.scan(Scan(9, "", "", 10))
    assert (page.id, page.items[0][:3]) == (9, ("a", 1, None))
    assert 0 < page.items[0][3] <= 60_000
    assert (await harness.store.scans.scan(Scan(9, "", "", 10, True))).items[0][2] == b""


async def test_a_page_is_bounded_in_bytes_and_holds_at_least_one_item(open_harness: Opener) -> None:
    harness = await open_harness(page_bytes_max=2500)
    for number in range(6):
        await harness.put(f"key-{number}", b"v" * 1000)
    pages = []
    after, more = "", True
    while more:
        page = await harness.store.scans.scan(Scan(1, "", after, 100, True))
        pages.append(len(page.items))
        after, more = page.last, page.more
    assert sum(pages) == 6
    assert max(pages) == 3


async def test_of_values_above_a_bound_a_page_brings_the_sizes_and_counts_them_as_that_bound(harness: Any) -> None:
    sizes = {"a": 100, "b": 101, "c": 0, "d": 5000, "e": 100}
    for name, size in sizes.items():
        await harness.put(name, bytes(size))
    page = await harness.store.scans.scan(Scan(1, "", "", 10, True, value_bytes_max=100))
    assert [(key, None if value is None else len(value)) for key, _, value, _ in page.items] == [
        ("a", 100), ("b", None), ("c", 0), ("d", None), ("e", 100),
    ]  # fmt: skip
    assert page.left_out == {"b": 101, "d": 5000}
    page = await harness.store.scans.scan(Scan(1, "", "", 10, True, bytes_max=4 * 140, value_bytes_max=100))
    assert [item[0] for item in page.items] == list(sizes), "the value of 5000 bytes does not end the page"
    assert not (await harness.store.scans.scan(Scan(1, "", "", 10, value_bytes_max=100))).left_out


async def test_counting_counts_live_owned_keys_with_the_prefix(harness: Any) -> None:
    for name in ("a1", "a2", "a3", "b1"):
        await harness.put(name)
    await harness.delete("a3")
    assert [await harness.count(prefix) for prefix in ("", "a", "b", "c")] == [3, 2, 1, 0]
    await harness.leave("a1")
    assert await harness.count("a") == 1


async def test_a_count_is_of_the_partitions_that_it_names(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "_COUNT_KEYS_MAX", 2)  # several pages
    keys = [f"key-{number}" for number in range(9)]
    for key in keys:
        await harness.put(key)
    counted = await harness.store.scans.count(Count(1, "", harness.partitions(*keys[:4])))
    in_wanted = [key for key in keys if harness.partitions(key, *keys[:4]) == harness.partitions(*keys[:4])]
    assert (counted.count, counted.owned) == (len(in_wanted), harness.partitions(*keys[:4]))
    counted, calls = await held_back(harness, harness.store.scans.count(Count(1, "")), lambda: harness.leave("key-8"))
    others = [key for key in keys if harness.partitions(key) != harness.partitions("key-8")]
    assert (counted.count, counted.owned) == (len(others), harness.all_but("key-8"))
    assert calls >= 4, "no page is read a second time, and none is left out"
