"""Reads: visible changes only, of owned partitions only, and a cache that is never behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvstore.errors import DataCorrupt
from kvstore.model import Attempt, Preconditions, TxnOp
from kvstore.placement import partition_set
from kvstore.protocol import Acquire, Count, Prepare, Put, ReadLock, Scan, ScanLeases
from kvstore.store import scans
from tests.unit.store.real_files import threads
from tests.unit.waiting import until

Opener = Callable[..., Awaitable[Any]]


async def test_a_hot_read_is_answered_at_once(harness: Any) -> None:
    await harness.put("a", b"1")
    call = harness.get("a")
    assert call.done
    answer = await call
    assert (answer.status, answer.version, answer.value, answer.ttl_left_ms) == (200, 1, b"1", 0)


async def test_a_value_that_is_larger_than_the_get_takes_is_not_brought_but_its_size_is(harness: Any) -> None:
    await harness.put("a", bytes(100))
    for cold in (False, True):
        if cold:
            await harness.flush()
            harness.forget_cache()
        left_out = await harness.get("a", 99)
        assert (left_out.status, left_out.version, left_out.value, left_out.left_out_bytes) == (200, 1, None, 100)
        assert (await harness.get("a", 100)).value == (await harness.get("a")).value == bytes(100)


async def test_a_cold_read_finds_what_is_in_the_file_and_keeps_it(harness: Any) -> None:
    await harness.put("a", b"1")
    await harness.reopen()
    assert (await harness.get("a")).value == b"1"
    assert (await harness.get("absent")).status == 404
    assert harness.get("a").done
    assert harness.get("absent").done
    assert (harness.store.tables.stats.cache_hits, harness.store.tables.stats.cache_misses) == (2, 2)


async def test_many_cold_reads_share_a_hop(harness: Any) -> None:
    for number in range(100):
        await harness.put(f"key-{number}", b"%d" % number)
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read")
    gate.open()
    calls = [harness.get(f"key-{number}") for number in range(100)]
    assert [(await call).value for call in calls] == [b"%d" % number for number in range(100)]
    assert gate.calls == 1


# --- between executed and visible -------------------------------------------------------------------------------------


async def test_between_executed_and_visible_a_cached_key_shows_its_old_value(harness: Any) -> None:
    await harness.put("a", b"old")
    gate = harness.hold("commit")
    put = harness.put("a", b"new")
    await gate.arrived.wait()
    assert harness.store.tables.log.durable == harness.store.tables.log.last.number, "it is executed, even durable"
    assert (await harness.get("a")).value == b"old"
    gate.open()
    await put
    assert (await harness.get("a")).value == b"new"


@pytest.mark.parametrize("change", ["replaced", "created", "deleted"])
async def test_between_executed_and_visible_a_read_from_the_file_shows_the_old_state(harness: Any, change: str) -> None:
    if change != "created":
        await harness.put("a", b"old")
        await harness.flush()
    gate = harness.hold("commit")
    write = harness.delete("a") if change == "deleted" else harness.put("a", b"new")
    await gate.arrived.wait()
    harness.forget_cache()
    answer = await harness.get("a")
    assert (answer.status, answer.value) == ((404, None) if change == "created" else (200, b"old"))
    gate.open()
    await write
    answer = await harness.get("a")
    assert (answer.status, answer.value) == ((404, None) if change == "deleted" else (200, b"new"))


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


# --- readers that come back late --------------------------------------------------------------------------------------


async def test_a_reader_that_is_late_does_not_hide_a_change_that_became_visible(harness: Any) -> None:
    await harness.put("a", b"old")
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read", once=True)
    read = harness.get("a")
    await gate.arrived.wait()
    await harness.put("a", b"new")
    gate.open()
    assert (await read).status == 200
    assert (await harness.get("a")).value == b"new"


async def test_a_reader_that_found_nothing_and_is_late_does_not_hide_a_new_key(harness: Any) -> None:
    gate = harness.hold("read", once=True)
    read = harness.get("a")
    await gate.arrived.wait()
    await harness.put("a", b"new")
    gate.open()
    await read
    assert (await harness.get("a")).value == b"new"


async def test_a_reader_that_is_late_does_not_bring_back_a_deleted_key(harness: Any) -> None:
    await harness.put("a", b"old")
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read", once=True)
    read = harness.get("a")
    await gate.arrived.wait()
    await harness.delete("a")
    await harness.trim(harness.store.clock.sequence, 10)
    gate.open()
    await read
    assert (await harness.get("a")).status == 404


@pytest.mark.parametrize("cache_bytes", [0, 1500, 1 << 20])
async def test_a_reader_never_sees_less_than_was_already_answered(open_harness: Opener, cache_bytes: int) -> None:
    harness = await open_harness(cache_bytes_max=cache_bytes, apply_delay_s=0.001)
    keys = [f"key-{number}" for number in range(6)]
    answered = dict.fromkeys(keys, 0)  # the highest version that a client was told of
    chance = random.Random(7)

    async def client() -> None:
        for _ in range(400):
            key = chance.choice(keys)
            floor, kind = answered[key], chance.random()
            if kind < 0.25:
                version = (await harness.put(key, chance.randbytes(chance.choice([1, 300])))).version
                assert version > floor
            elif kind < 0.35:
                version = (await harness.delete(key)).version or floor
                assert version >= floor
            else:
                answer = await harness.get(key)
                if answer.status == 404:
                    continue  # a deletion has a version too, but a read does not bring it
                version = answer.version
                assert version >= floor
            answered[key] = max(answered[key], version)

    await asyncio.gather(*(client() for _ in range(30)))
    assert harness.store.tables.stats.cache_misses > 100 or cache_bytes > 1500


# --- ownership --------------------------------------------------------------------------------------------------------


async def test_a_read_whose_partition_leaves_while_its_reader_is_away_is_answered_421(harness: Any) -> None:
    await harness.put("a")
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read")
    read = harness.get("a")
    await gate.arrived.wait()
    await harness.leave("a")
    gate.open()
    answer = await read
    assert (answer.status, answer.problem["epoch"]) == (421, 2)


async def test_a_read_whose_partition_left_and_came_back_is_answered_421_and_not_cached(harness: Any) -> None:
    await harness.put("a", b"old")
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read")
    read = harness.get("a")
    await gate.arrived.wait()
    await harness.leave("a")
    await harness.sql("UPDATE rows SET body = x'ff'")  # another client had the partition in between
    await harness.arrive("a")
    gate.open()
    assert (await read).status == 421
    assert harness.get("a").done is False


async def test_what_was_cached_of_a_partition_is_forgotten_when_it_leaves(harness: Any) -> None:
    await harness.put("a")
    await harness.get("absent")
    await harness.leave("a", "absent")
    await harness.sql("DELETE FROM rows")  # the owner in between deleted the key
    await harness.arrive("a", "absent")
    assert not harness.get("absent").done
    assert (await harness.get("a")).status == 404


async def test_what_is_decided_before_a_return_is_visible_sees_nothing_cached_before_the_partition_left(
    harness: Any,
) -> None:
    await harness.put("a", b"old")
    assert (await harness.get("a")).value == b"old"
    await harness.leave("a")
    await harness.sql("DELETE FROM rows")  # the owner in between deleted the key
    gate = harness.hold("commit", once=True)
    coming_back = asyncio.create_task(harness.arrive("a"))
    await gate.arrived.wait()  # the return is decided, and not visible yet
    reads = harness.write(ReadLock(7, Attempt(1, 1, "r"), ["a"]))
    await until(lambda: not len(harness.store.pipeline))
    gate.open()
    await coming_back
    assert (await reads).reads[0].value is None


async def test_a_cached_key_of_a_partition_that_left_is_answered_421(harness: Any) -> None:
    await harness.put("a")
    await harness.leave("a")
    assert (await harness.get("a")).status == 421


async def test_other_partitions_coming_and_going_do_not_disturb_a_read(harness: Any) -> None:
    await harness.put("a", b"1")
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read")
    read = harness.get("a")
    await gate.arrived.wait()
    await harness.leave("b")
    gate.open()
    assert (await read).value == b"1"


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


# --- bounds and damage ------------------------------------------------------------------------------------------------


async def test_past_its_bound_the_queue_of_reads_refuses_at_once(open_harness: Opener) -> None:
    harness = await open_harness(read_queue_ops_max=2)
    gate = harness.hold("read")
    calls = [harness.get("first")]
    await gate.arrived.wait()
    calls += [harness.get("second"), harness.get("third")]
    refused = harness.get("refused")
    assert refused.done
    answer = await refused
    assert (answer.status, answer.problem["code"]) == (429, "too-many-requests")
    gate.open()
    assert [(await call).status for call in calls] == [404] * 3


async def test_a_read_whose_connection_ended_before_its_reader_set_out_is_dropped(harness: Any) -> None:
    gate = harness.hold("read")
    first = harness.get("first")
    await gate.arrived.wait()
    dropped, kept = harness.get("dropped"), harness.get("kept")
    dropped.closed = True
    gate.open()
    await first
    await kept
    assert not dropped.done


async def test_a_damaged_row_is_answered_as_such_and_the_others_go_on(harness: Any) -> None:
    await harness.put("bad", b"value")
    await harness.put("good", b"value")
    harness.forget_cache()
    await harness.sql("UPDATE rows SET body = x'76616c7565ff' WHERE key = 'bad'")
    answer = await harness.get("bad")
    assert (answer.status, answer.problem["code"]) == (500, "data-corrupt")
    assert "bad" in answer.problem["detail"]
    assert (await harness.get("bad")).status == 500, "and not cached"
    assert (await harness.get("good")).status == 200
    assert (await harness.store.inspection.explain("bad"))["row"] == "damaged"
    with pytest.raises(DataCorrupt):
        await harness.store.scans.scan(Scan(1, "", "", 10, True))
    assert await harness.keys() == ["bad", "good"], "the names can still be listed"


DAMAGES = [
    "body = 'text instead of bytes'",
    "body = 7",
    "version = version + 1",
    "version = 'seven'",
    "expires_at_ms = 99999999999999",
    "expires_at_ms = 'soon'",
    "checksum = checksum + 1",
]


@pytest.mark.parametrize("damage", [*DAMAGES, "body = x'00'", "body = NULL", "version = 9223372036854775807"])
@pytest.mark.parametrize("by", ["put", "delete"])
async def test_a_damaged_row_is_mended_by_writing_it_again(harness: Any, damage: str, by: str) -> None:
    before = await harness.put("bad", b"value")
    harness.forget_cache()
    await harness.sql(f"UPDATE rows SET {damage} WHERE key = 'bad'")
    assert (await harness.get("bad")).status == 500
    mended = await (harness.put("bad", b"again") if by == "put" else harness.delete("bad"))
    assert mended.status == 204
    assert before.version < mended.version < 1000, "what the damaged row says of its version is not believed"
    harness.forget_cache()
    await harness.flush()
    found = await harness.get("bad")
    assert (found.status, found.value) == ((200, b"again") if by == "put" else (404, None))
    assert harness.store.clock.version == mended.version


async def test_a_write_with_a_condition_and_a_transaction_do_not_replace_a_damaged_row(harness: Any) -> None:
    granted = await harness.write(Acquire(1, "bad", 60_000, 0, "me"))
    await harness.write(Put(1, "bad", b"value", 0, Preconditions(token=granted.version)))
    await harness.flush()
    harness.forget_cache()
    await harness.sql("UPDATE rows SET body = x'00' WHERE key = 'bad'")
    for condition in ({"present": True}, {"absent": True}, {"versions": [2]}, {"not_versions": [7]}):
        answer = await harness.write(Put(1, "bad", b"again", 0, Preconditions(granted.version, **condition)))
        assert (answer.status, answer.problem["code"]) == (500, "data-corrupt")
    attempt = Attempt(100, 100, "router01", 4)
    prepared = await harness.write(Prepare(1, "elsewhere", attempt, [], [TxnOp("put", "bad", b"x")], []))
    assert (prepared.status, prepared.problem["code"]) == (500, "data-corrupt")
    assert (await harness.put("bad", b"again")).status == 423, "a lease protects a damaged row as any other"
    assert (await harness.get("bad")).status == 500
    assert (await harness.write(Put(1, "bad", b"again", 0, Preconditions(token=granted.version)))).status == 204
    assert (await harness.get("bad")).value == b"again"


async def test_a_damaged_row_that_a_refused_write_still_holds_in_memory_is_mended_by_the_next(harness: Any) -> None:
    await harness.put("bad", b"value")
    await harness.flush()
    harness.forget_cache()
    await harness.sql("UPDATE rows SET body = x'00' WHERE key = 'bad'")
    gate = harness.hold("commit", before=True)
    first = harness.put("other")
    await gate.arrived.wait()
    refused = harness.write(Put(1, "bad", b"no", 0, Preconditions(present=True)))
    await harness.decided()
    mending = harness.put("bad", b"again")
    later = harness.write(Put(1, "bad", b"later", 0, Preconditions(present=True)))
    assert not any(call.done for call in (first, refused, mending, later)), "answers leave in order"
    gate.open()
    assert [(await call).status for call in (first, refused, mending, later)] == [201, 500, 204, 204]
    assert (await harness.get("bad")).value == b"later"


@pytest.mark.parametrize("damage", DAMAGES)
async def test_whatever_was_done_to_a_row_by_hand_it_is_seen_and_the_store_survives(harness: Any, damage: str) -> None:
    await harness.put("bad", b"value")
    harness.forget_cache()
    await harness.sql(f"UPDATE rows SET {damage}")
    assert (await harness.get("bad")).status == 500
    with pytest.raises(DataCorrupt):
        await harness.store.scans.scan(Scan(1, "", "", 10, True))


async def test_a_destroyed_page_of_the_file_costs_the_keys_on_it_and_all_writes_but_no_other_read(harness: Any) -> None:
    for number in range(400):
        await harness.put(f"key-{number:03}", b"marker-%03d" % number + b"v" * 90)
    await harness.close()
    content = bytearray(harness.path.read_bytes())
    page = content.index(b"marker-200") // 4096 * 4096
    content[page : page + 8] = b"\xff" * 8
    harness.path.write_bytes(content)
    await harness.reopen_after_close()
    lost = await harness.get("key-200")
    assert (lost.status, lost.problem["code"]) == (500, "data-corrupt")
    assert (await harness.get("key-399")).status == 200
    with pytest.raises(DataCorrupt):
        await harness.store.scans.scan(Scan(1, "key-2", "", 10))
    with pytest.raises(DataCorrupt):
        await harness.store.tables.verification.writable()
    assert (await harness.put("zz")).problem["code"] == "data-corrupt"


async def test_a_store_that_cannot_be_opened_leaves_no_thread_behind_that_would_keep_the_process_alive(
    harness: Any,
) -> None:
    await harness.write(Acquire(1, "lock", 60_000, 0, "me"))
    await harness.sql("UPDATE rows SET body = x'00' WHERE kind = 'lease'")
    await harness.close()
    before = threads()
    with pytest.raises(DataCorrupt):
        await harness.reopen_after_close()
    for thread in threads() - before:
        thread.join(10)
        assert not thread.is_alive()


# --- listings ---------------------------------------------------------------------------------------------------------


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


# --- for people -------------------------------------------------------------------------------------------------------


async def test_explain_shows_what_is_stored_of_a_key(harness: Any) -> None:
    await harness.put("a", b"12345")
    shown = await harness.store.inspection.explain("a")
    assert shown == {
        "lock": None,
        "intent": None,
        "row": "value",
        "version": 1,
        "sequence": 1,
        "bytes": 5,
        "expires_at_ms": None,
        "cached": True,
    }
    await harness.delete("a")
    assert (await harness.store.inspection.explain("a"))["row"] == "tombstone"
    assert await harness.store.inspection.explain("never") == {"row": "absent", "lock": None, "intent": None}
