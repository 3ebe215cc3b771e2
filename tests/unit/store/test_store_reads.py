"""Reads of keys: visible changes only, of owned partitions only, and a cache that is never behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from kvstore.model import Attempt
from kvstore.protocol import ReadLock
from tests.unit.store.conftest import Opener
from tests.unit.waiting import until


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


# --- bounds -----------------------------------------------------------------------------------------------------------


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
