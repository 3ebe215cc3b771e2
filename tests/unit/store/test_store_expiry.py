"""Expiry is a change like any other: made once, by the owner, and waited for by all that meet it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.errors import TooManyRequests
from kvstore.protocol import Scan
from tests.unit.store.conftest import Machine, Opener


class WallClock:
    """The store's wall clock, in the test's hands."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.fixed_ms = 1_700_000_000_000

    def pass_s(self, seconds: float) -> None:
        assert self._machine.fixed_ms is not None
        self._machine.fixed_ms += int(seconds * 1000)


@pytest.fixture
def clock(machine: Machine) -> WallClock:
    return WallClock(machine)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_key_lives_until_its_deadline_and_says_how_long(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(4.999)
    answer = await harness.get("a")
    assert (answer.status, answer.ttl_left_ms) == (200, 1)


@pytest.mark.parametrize("cached", [True, False])
async def test_a_read_of_a_due_key_has_the_expiry_made_and_is_404(harness: Any, clock: WallClock, cached: bool) -> None:
    await harness.put("a", ttl_ms=5000)
    await harness.flush()
    clock.pass_s(5)
    if not cached:
        harness.forget_cache()
    assert (await harness.get("a")).status == 404
    assert await harness.sql("SELECT body, version FROM rows") == [(None, 2)]
    assert harness.store.inspection.snapshot().expired == 1
    assert harness.store.inspection.snapshot().keys == 0


async def test_a_read_of_a_due_key_waits_until_the_expiry_is_durable(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(5)
    gate = harness.hold("commit")
    reads = [harness.get("a"), harness.get("a")]
    await gate.arrived.wait()
    assert not any(read.done for read in reads)
    gate.open()
    assert [(await read).status for read in reads] == [404, 404]
    assert harness.store.inspection.snapshot().expired == 1


async def test_once_expired_a_key_stays_away_even_if_the_clock_steps_back(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(5)
    assert (await harness.get("a")).status == 404
    clock.pass_s(-3600)
    assert (await harness.get("a")).status == 404
    assert await harness.keys() == []


async def test_a_put_over_a_due_key_is_201_with_a_version_above_the_expiry(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(5)
    answer = await harness.put("a", b"new")
    assert (answer.status, answer.version) == (201, 3)


async def test_a_delete_of_a_due_key_is_404(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(5)
    assert (await harness.delete("a")).status == 404


async def test_a_put_without_ttl_makes_a_key_last(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    await harness.put("a", b"lasting")
    clock.pass_s(1e9)
    assert (await harness.get("a")).value == b"lasting"


async def test_a_deadline_survives_a_restart(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(3)
    await harness.reopen()
    assert (await harness.get("a")).ttl_left_ms == 2000
    clock.pass_s(2)
    assert (await harness.get("a")).status == 404


async def test_a_listing_leaves_due_keys_out_and_has_their_expiry_made(harness: Any, clock: WallClock) -> None:
    for number in range(6):
        await harness.put(f"key-{number}", ttl_ms=5000 if number % 2 else 0)
    await harness.flush()
    clock.pass_s(5)
    assert await harness.keys() == ["key-0", "key-2", "key-4"]
    assert await harness.sql("SELECT key FROM rows WHERE body IS NULL ORDER BY key") == [
        ("key-1",),
        ("key-3",),
        ("key-5",),
    ]


async def test_a_listing_goes_on_past_a_page_of_nothing_but_due_keys(harness: Any, clock: WallClock) -> None:
    for number in range(10):
        await harness.put(f"key-{number}", ttl_ms=5000 if number < 9 else 0)
    clock.pass_s(5)
    page = await harness.store.scans.scan(Scan(1, "", "", 3))
    assert (page.items, page.more, page.last) == ([], True, "key-2")
    assert await harness.count("") == 1


async def test_more_due_keys_than_the_queue_takes_at_once_are_expired_all_the_same(
    open_harness: Opener, clock: WallClock
) -> None:
    harness = await open_harness(queue_ops_max=20, expiry_ops_max=10)
    for number in range(50):
        await harness.put(f"key-{number:02}", ttl_ms=5000)
    await harness.flush()
    clock.pass_s(5)
    assert await harness.keys() == []
    assert await harness.sql("SELECT count(*) FROM rows WHERE body IS NULL") == [(50,)]


async def test_a_due_key_that_is_met_while_the_queue_is_full_is_answered_429(
    open_harness: Opener, clock: WallClock
) -> None:
    harness = await open_harness(queue_ops_max=1, undurable_batches_max=1)
    await harness.put("due", ttl_ms=5000)
    clock.pass_s(5)
    gate = harness.hold("commit", before=True)
    puts = [harness.put("first")]
    await gate.arrived.wait()
    puts.append(harness.put("second"))
    answer = await harness.get("due")
    assert (answer.status, answer.problem["code"]) == (429, "too-many-requests")
    with pytest.raises(TooManyRequests):
        await harness.store.scans.scan(Scan(1, "", "", 10))
    gate.open()
    for put in puts:
        await put
    assert (await harness.get("due")).status == 404


async def test_a_read_of_a_due_key_is_answered_421_when_its_partition_leaves_first(
    harness: Any, clock: WallClock
) -> None:
    await harness.put("a", ttl_ms=5000)
    move = await harness.plan("a")
    clock.pass_s(5)
    gate = harness.hold("commit")
    first = harness.put("first")
    await gate.arrived.wait()
    fencing = asyncio.create_task(harness.store.partitions.freeze(move))
    await asyncio.sleep(0)
    read = harness.get("a")
    gate.open()
    await first
    assert (await read).status == 421
    await fencing
    assert await harness.sql("SELECT body FROM rows WHERE key = 'a'") == [(b"value",)]


async def test_a_due_key_whose_reader_has_gone_is_left_to_the_next_one(harness: Any, clock: WallClock) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(5)
    gate = harness.hold("commit")
    first = harness.put("first")
    await gate.arrived.wait()
    gone = harness.get("a")
    gone.closed = True
    gate.open()
    await first
    assert (await harness.get("a")).status == 404
    assert not gone.done


async def test_a_listing_that_is_given_up_while_it_waits_for_an_expiry_does_no_harm(
    harness: Any, clock: WallClock
) -> None:
    await harness.put("a", ttl_ms=5000)
    clock.pass_s(5)
    gate = harness.hold("commit")
    listing = asyncio.create_task(harness.store.scans.scan(Scan(1, "", "", 10)))
    await gate.arrived.wait()
    listing.cancel()
    await asyncio.gather(listing, return_exceptions=True)
    gate.open()
    assert (await harness.put("b")).status == 201
    assert not harness.fatal


async def test_the_sweep_expires_by_itself(open_harness: Opener, clock: WallClock) -> None:
    harness = await open_harness(expiry_sweep_s=0.01)
    await harness.put("due", ttl_ms=5000)
    await harness.put("later", ttl_ms=50_000)
    await harness.flush()
    clock.pass_s(5)
    await until(lambda: harness.store.inspection.snapshot().expired == 1)
    assert await harness.sql("SELECT key, body IS NULL FROM rows ORDER BY key") == [("due", 1), ("later", 0)]


async def test_the_sweep_keeps_up_with_more_due_keys_than_one_round_takes(
    open_harness: Opener, clock: WallClock
) -> None:
    harness = await open_harness(expiry_sweep_s=0.5, expiry_ops_max=5)
    for number in range(100):
        await harness.put(f"key-{number}", ttl_ms=5000)
    clock.pass_s(5)
    rounds = harness.hold("due")
    rounds.open()
    await until(lambda: harness.store.inspection.snapshot().keys == 0)
    assert rounds.calls >= 20
    assert harness.store.inspection.snapshot().expired == 100


async def test_the_sweep_leaves_partitions_of_others_alone_and_is_not_held_up_by_them(
    open_harness: Opener, clock: WallClock
) -> None:
    harness = await open_harness(expiry_sweep_s=0.01, expiry_ops_max=3)
    for number in range(10):
        await harness.put(f"foreign-{number}", ttl_ms=1000)
    await harness.put("own", ttl_ms=2000)
    await harness.flush()
    await harness.leave(*(f"foreign-{number}" for number in range(10)))
    clock.pass_s(5)
    await until(lambda: harness.store.inspection.snapshot().expired == 1)
    assert await harness.sql("SELECT key FROM rows WHERE body IS NULL") == [("own",)]


@pytest.mark.parametrize("damage", ["partition = 5000", "partition = -1", "partition = 'text'", "key = x'ff'"])
async def test_a_damaged_row_does_not_keep_the_sweep_from_the_others(
    open_harness: Opener, clock: WallClock, damage: str
) -> None:
    harness = await open_harness(expiry_sweep_s=0.01)
    await harness.put("damaged", ttl_ms=1000)
    await harness.put("due", ttl_ms=2000)
    await harness.sql(f"UPDATE rows SET {damage} WHERE key = 'damaged'")
    clock.pass_s(5)
    await until(lambda: harness.store.inspection.snapshot().expired == 1)
    assert (await harness.get("due")).status == 404


async def test_a_sweep_that_cannot_read_what_is_due_leaves_the_store_at_work(
    open_harness: Opener, clock: WallClock
) -> None:
    harness = await open_harness(expiry_sweep_s=0.01)
    await harness.put("damaged", ttl_ms=1000)
    await harness.put("due", ttl_ms=2000)
    await harness.sql(
        "UPDATE rows SET key = CAST(x'ff' AS TEXT) WHERE key = 'damaged'"
    )  # no UTF-8: SQLite takes it, Python not
    rounds: list[bool] = []
    original = harness.store.tables.engine.due

    async def due(*args: Any) -> Any:
        rounds.append(True)
        return await original(*args)

    harness.store.tables.engine.due = due
    clock.pass_s(5)
    await until(lambda: len(rounds) >= 3)
    assert (await harness.get("due")).status == 404, "a read of a due key expires it all the same"


async def test_the_sweep_trims_tombstones_that_were_kept_long_enough_and_raises_the_floor(open_harness: Opener) -> None:
    harness = await open_harness(expiry_sweep_s=0.01, tombstone_kept_s=0.0)
    for number in range(5):
        await harness.put(f"key-{number}")
    await harness.flush()
    for number in range(5):
        await harness.delete(f"key-{number}")
    await harness.put("kept")
    await until(lambda: harness.sql_now("SELECT key FROM rows") == [("kept",)])
    assert await harness.sql("SELECT tombstones_floor FROM clock") == [(10,)]


async def test_tombstones_younger_than_that_stay(open_harness: Opener) -> None:
    harness = await open_harness(expiry_sweep_s=0.01, tombstone_kept_s=600.0)
    await harness.put("a")
    await harness.flush()
    await harness.delete("a")
    rounds = harness.hold("due")
    rounds.open()
    await until(lambda: rounds.calls > 3)
    assert await harness.sql("SELECT body FROM rows") == [(None,)]
