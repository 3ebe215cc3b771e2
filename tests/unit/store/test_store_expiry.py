"""Expiry is a change like any other: made once, by the owner, and waited for by whoever meets it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvstore.errors import TooManyRequests
from kvstore.protocol import Scan
from tests.unit.store.conftest import Machine

Opener = Callable[..., Awaitable[Any]]


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


async def test_a_key_lives_until_its_deadline_and_says_how_long(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(4.999)
    answer = await rig.get("a")
    assert (answer.status, answer.ttl_left_ms) == (200, 1)


@pytest.mark.parametrize("cached", [True, False])
async def test_a_read_of_a_due_key_has_the_expiry_made_and_is_404(rig: Any, clock: WallClock, cached: bool) -> None:
    await rig.put("a", ttl_ms=5000)
    await rig.flush()
    clock.pass_s(5)
    if not cached:
        rig.forget_cache()
    assert (await rig.get("a")).status == 404
    assert await rig.sql("SELECT body, version FROM rows") == [(None, 2)]
    assert rig.store.inspection.snapshot().expired == 1
    assert rig.store.inspection.snapshot().keys == 0


async def test_a_read_of_a_due_key_waits_until_the_expiry_is_durable(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(5)
    gate = rig.hold("commit")
    reads = [rig.get("a"), rig.get("a")]
    await gate.arrived.wait()
    assert not any(read.done for read in reads)
    gate.open()
    assert [(await read).status for read in reads] == [404, 404]
    assert rig.store.inspection.snapshot().expired == 1


async def test_once_expired_a_key_stays_away_even_if_the_clock_steps_back(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(5)
    assert (await rig.get("a")).status == 404
    clock.pass_s(-3600)
    assert (await rig.get("a")).status == 404
    assert await rig.keys() == []


async def test_a_put_over_a_due_key_is_201_with_a_version_above_the_expiry(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(5)
    answer = await rig.put("a", b"new")
    assert (answer.status, answer.version) == (201, 3)


async def test_a_delete_of_a_due_key_is_404(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(5)
    assert (await rig.delete("a")).status == 404


async def test_a_put_without_ttl_makes_a_key_last(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    await rig.put("a", b"lasting")
    clock.pass_s(1e9)
    assert (await rig.get("a")).value == b"lasting"


async def test_a_deadline_survives_a_restart(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(3)
    await rig.reopen()
    assert (await rig.get("a")).ttl_left_ms == 2000
    clock.pass_s(2)
    assert (await rig.get("a")).status == 404


async def test_a_listing_leaves_due_keys_out_and_has_their_expiry_made(rig: Any, clock: WallClock) -> None:
    for number in range(6):
        await rig.put(f"key-{number}", ttl_ms=5000 if number % 2 else 0)
    await rig.flush()
    clock.pass_s(5)
    assert await rig.keys() == ["key-0", "key-2", "key-4"]
    assert await rig.sql("SELECT key FROM rows WHERE body IS NULL ORDER BY key") == [("key-1",), ("key-3",), ("key-5",)]


async def test_a_listing_goes_on_past_a_page_of_nothing_but_due_keys(rig: Any, clock: WallClock) -> None:
    for number in range(10):
        await rig.put(f"key-{number}", ttl_ms=5000 if number < 9 else 0)
    clock.pass_s(5)
    page = await rig.store.scans.scan(Scan(1, "", "", 3))
    assert (page.items, page.more, page.last) == ([], True, "key-2")
    assert await rig.count("") == 1


async def test_more_due_keys_than_the_queue_takes_at_once_are_expired_all_the_same(
    open_rig: Opener, clock: WallClock
) -> None:
    rig = await open_rig(queue_ops_max=20, expiry_ops_max=10)
    for number in range(50):
        await rig.put(f"key-{number:02}", ttl_ms=5000)
    await rig.flush()
    clock.pass_s(5)
    assert await rig.keys() == []
    assert await rig.sql("SELECT count(*) FROM rows WHERE body IS NULL") == [(50,)]


async def test_a_due_key_that_is_met_while_the_queue_is_full_is_answered_429(
    open_rig: Opener, clock: WallClock
) -> None:
    rig = await open_rig(queue_ops_max=1, undurable_batches_max=1)
    await rig.put("due", ttl_ms=5000)
    clock.pass_s(5)
    gate = rig.hold("commit", before=True)
    puts = [rig.put("first")]
    await gate.arrived.wait()
    puts.append(rig.put("second"))
    answer = await rig.get("due")
    assert (answer.status, answer.problem["code"]) == (429, "too-many-requests")
    with pytest.raises(TooManyRequests):
        await rig.store.scans.scan(Scan(1, "", "", 10))
    gate.open()
    for put in puts:
        await put
    assert (await rig.get("due")).status == 404


async def test_a_read_of_a_due_key_is_answered_421_when_its_partition_leaves_first(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    move = await rig.plan("a")
    clock.pass_s(5)
    gate = rig.hold("commit")
    first = rig.put("first")
    await gate.arrived.wait()
    fencing = asyncio.create_task(rig.store.partitions.freeze(move))
    await asyncio.sleep(0)
    read = rig.get("a")
    gate.open()
    await first
    assert (await read).status == 421
    await fencing
    assert await rig.sql("SELECT body FROM rows WHERE key = 'a'") == [(b"value",)]


async def test_a_due_key_whose_reader_has_gone_is_left_to_the_next_one(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(5)
    gate = rig.hold("commit")
    first = rig.put("first")
    await gate.arrived.wait()
    gone = rig.get("a")
    gone.closed = True
    gate.open()
    await first
    assert (await rig.get("a")).status == 404
    assert not gone.done


async def test_a_listing_that_is_given_up_while_it_waits_for_an_expiry_does_no_harm(rig: Any, clock: WallClock) -> None:
    await rig.put("a", ttl_ms=5000)
    clock.pass_s(5)
    gate = rig.hold("commit")
    listing = asyncio.create_task(rig.store.scans.scan(Scan(1, "", "", 10)))
    await gate.arrived.wait()
    listing.cancel()
    await asyncio.gather(listing, return_exceptions=True)
    gate.open()
    assert (await rig.put("b")).status == 201
    assert not rig.fatal


async def test_the_sweep_expires_by_itself(open_rig: Opener, clock: WallClock) -> None:
    rig = await open_rig(expiry_sweep_s=0.01)
    await rig.put("due", ttl_ms=5000)
    await rig.put("later", ttl_ms=50_000)
    await rig.flush()
    clock.pass_s(5)
    await until(lambda: rig.store.inspection.snapshot().expired == 1)
    assert await rig.sql("SELECT key, body IS NULL FROM rows ORDER BY key") == [("due", 1), ("later", 0)]


async def test_the_sweep_keeps_up_with_more_due_keys_than_one_round_takes(open_rig: Opener, clock: WallClock) -> None:
    rig = await open_rig(expiry_sweep_s=0.5, expiry_ops_max=5)
    for number in range(100):
        await rig.put(f"key-{number}", ttl_ms=5000)
    clock.pass_s(5)
    rounds = rig.hold("due")
    rounds.open()
    await until(lambda: rig.store.inspection.snapshot().keys == 0)
    assert rounds.calls >= 20
    assert rig.store.inspection.snapshot().expired == 100


async def test_the_sweep_leaves_partitions_of_others_alone_and_is_not_held_up_by_them(
    open_rig: Opener, clock: WallClock
) -> None:
    rig = await open_rig(expiry_sweep_s=0.01, expiry_ops_max=3)
    for number in range(10):
        await rig.put(f"foreign-{number}", ttl_ms=1000)
    await rig.put("own", ttl_ms=2000)
    await rig.flush()
    await rig.leave(*(f"foreign-{number}" for number in range(10)))
    clock.pass_s(5)
    await until(lambda: rig.store.inspection.snapshot().expired == 1)
    assert await rig.sql("SELECT key FROM rows WHERE body IS NULL") == [("own",)]


@pytest.mark.parametrize("damage", ["partition = 5000", "partition = -1", "partition = 'text'", "key = x'ff'"])
async def test_a_damaged_row_does_not_keep_the_sweep_from_the_others(
    open_rig: Opener, clock: WallClock, damage: str
) -> None:
    rig = await open_rig(expiry_sweep_s=0.01)
    await rig.put("damaged", ttl_ms=1000)
    await rig.put("due", ttl_ms=2000)
    await rig.sql(f"UPDATE rows SET {damage} WHERE key = 'damaged'")
    clock.pass_s(5)
    await until(lambda: rig.store.inspection.snapshot().expired == 1)
    assert (await rig.get("due")).status == 404


async def test_a_sweep_that_cannot_read_what_is_due_leaves_the_store_at_work(
    open_rig: Opener, clock: WallClock
) -> None:
    rig = await open_rig(expiry_sweep_s=0.01)
    await rig.put("damaged", ttl_ms=1000)
    await rig.put("due", ttl_ms=2000)
    await rig.sql(
        "UPDATE rows SET key = CAST(x'ff' AS TEXT) WHERE key = 'damaged'"
    )  # no UTF-8: SQLite takes it, Python not
    rounds: list[bool] = []
    original = rig.store.tables.engine.due

    async def due(*args: Any) -> Any:
        rounds.append(True)
        return await original(*args)

    rig.store.tables.engine.due = due
    clock.pass_s(5)
    await until(lambda: len(rounds) >= 3)
    assert (await rig.get("due")).status == 404, "whoever meets a due key has it expired all the same"


async def test_the_sweep_trims_tombstones_that_were_kept_long_enough_and_raises_the_floor(open_rig: Opener) -> None:
    rig = await open_rig(expiry_sweep_s=0.01, tombstone_kept_s=0.0)
    for number in range(5):
        await rig.put(f"key-{number}")
    await rig.flush()
    for number in range(5):
        await rig.delete(f"key-{number}")
    await rig.put("kept")
    await until(lambda: rig.sql_now("SELECT key FROM rows") == [("kept",)])
    assert await rig.sql("SELECT tombstones_floor FROM clock") == [(10,)]


async def test_tombstones_younger_than_that_stay(open_rig: Opener) -> None:
    rig = await open_rig(expiry_sweep_s=0.01, tombstone_kept_s=600.0)
    await rig.put("a")
    await rig.flush()
    await rig.delete("a")
    rounds = rig.hold("due")
    rounds.open()
    await until(lambda: rounds.calls > 3)
    assert await rig.sql("SELECT body FROM rows") == [(None,)]
