"""What a store promises about the time of a lease: its end, restarts, crashes, clocks."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from kvstore.errors import DataCorrupt
from kvstore.protocol import Answer, Get, GetLock, Put, Release, Renew, ScanLeases
from kvstore.store.log_writer import LogWriter
from kvstore.store.ops import ExpireLease
from kvstore.store.store import Store
from tests.unit.store.harness import Sink, StandingTime, TurnedTime, acquire, ask, asked, code, opened, token
from tests.unit.store.real_files import copy_files, threads
from tests.unit.waiting import until


@pytest.fixture
def turned() -> TurnedTime:
    return TurnedTime()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, asyncio.Event]]:
    """Syncs of the log stand still while one of these is not set: before the sync, or when it has returned."""
    events = {name: asyncio.Event() for name in ("before-sync", "after-sync")}
    for event in events.values():
        event.set()
    sync = LogWriter._sync_in_thread

    async def held(writer: LogWriter) -> None:
        await events["before-sync"].wait()
        await sync(writer)
        await events["after-sync"].wait()

    monkeypatch.setattr(LogWriter, "_sync_in_thread", held)
    yield events
    for event in events.values():
        event.set()


async def lease_rows(store: Store) -> list[tuple[str, int, bool]]:
    """What a person with `sqlite3` would see: name, version, whether it is a tombstone."""
    await store.applier.flush()
    with closing(sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)) as file:
        return file.execute("SELECT key, version, body IS NULL FROM rows WHERE kind = 'lease' ORDER BY key").fetchall()


async def test_a_lease_ends_by_itself_as_a_tombstone_in_the_file(tmp_path: Path):
    clock = StandingTime()
    async with opened(tmp_path, clock) as store:
        granted = (await ask(store, acquire("k", 0.2))).version
        assert await lease_rows(store) == [("k", granted, False)]
        clock.now_s += 0.3
        waiter = asked(store, acquire("k", 30, wait_s=20))
        assert (await waiter.answer()).status == 201
        await ask(store, Release(0, "k", waiter.replies[0].version))  # type: ignore[union-attr]
        ((name, version, deleted),) = await lease_rows(store)
        assert (name, deleted) == ("k", True)
        assert version > granted


async def test_a_waiter_has_the_lease_within_half_a_second_of_its_end(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, acquire("k", 0.3))
        began = time.monotonic()
        assert (await asked(store, acquire("k", wait_s=20)).answer()).status == 201
        assert 0.2 < time.monotonic() - began < 15  # well before it has waited for long enough


async def test_a_short_lease_after_a_long_one_ends_in_its_own_time(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, Release(0, "k", (await ask(store, acquire("k", 3600))).version))
        await ask(store, acquire("k", 0.2))
        assert (await asked(store, acquire("k", wait_s=20)).answer(15)).status == 201


async def test_a_lease_ends_although_the_queue_of_writes_was_full_when_it_was_due(tmp_path: Path, gate):
    async with opened(tmp_path, sync_inline_ms_max=0.0, queue_ops_max=3) as store:
        await ask(store, acquire("k", 0.2))
        waiter = asked(store, acquire("k", wait_s=20))
        await until(lambda: store.tables.locks.waiting_for_lease("k"))
        gate["before-sync"].clear()
        await ask_until_full(store)
        await asyncio.sleep(0.5)
        gate["before-sync"].set()
        assert (await waiter.answer()).status == 201


async def test_a_wait_ends_although_the_queue_of_writes_was_full_when_it_was_due(tmp_path: Path, gate):
    async with opened(tmp_path, sync_inline_ms_max=0.0, queue_ops_max=3) as store:
        await ask(store, acquire("k", 3600))
        waiter = asked(store, acquire("k", wait_s=0.2))
        await until(lambda: store.tables.locks.waiting_for_lease("k"))
        gate["before-sync"].clear()
        await ask_until_full(store)
        await asyncio.sleep(0.5)
        gate["before-sync"].set()
        answer = await waiter.answer()
        assert (answer.status, code(answer)) == (423, "locked")
        assert store.tables.locks.waiting_for_lease("k") == ()


async def ask_until_full(store: Store) -> None:
    """Batches are at work and cannot end; the queue behind them is full."""
    asked(store, Put(0, "other", b""))
    await until(lambda: not len(store.pipeline))
    while not (sink := asked(store, Put(0, "other", b""))).replies:
        pass
    assert sink.replies[0].status == 429  # type: ignore[union-attr]


async def test_no_answer_leaves_before_the_commit_and_no_lease_runs_before_it_is_visible(tmp_path: Path, gate):
    clock = StandingTime()
    async with opened(tmp_path, clock, sync_inline_ms_max=0.0) as store:
        for point in gate:
            gate[point].clear()
            sink = asked(store, acquire("k", 0.2))
            lost = asked(store, Release(0, "k", 10**9))
            await until(lambda: store.tables.locks.lease("k"))
            lease = store.tables.locks.lease("k")
            assert lease is not None
            clock.now_s += 0.4  # longer than the lease
            await asyncio.sleep(0.4)
            assert sink.replies == lost.replies == []
            assert lease.left_s(clock.now_s) == 0.2
            gate[point].set()
            granted = await sink.answer()
            assert (granted.status, (await lost.answer()).status) == (201, 412)
            assert (await ask(store, Renew(0, "k", granted.version))).status == 200
            await ask(store, Release(0, "k", granted.version))


async def test_a_renewal_that_is_not_visible_yet_keeps_the_lease_from_ending(tmp_path: Path, gate):
    clock = StandingTime()
    async with opened(tmp_path, clock, sync_inline_ms_max=0.0) as store:
        granted = (await ask(store, acquire("k", 0.5))).version
        gate["before-sync"].clear()
        asked(store, Put(0, "other", b""))  # for a renewal alone nothing is synced: it changes no row
        await until(lambda: not len(store.pipeline))
        lease = store.tables.locks.lease("k")
        assert lease is not None
        clock.now_s += 0.1
        renewed = asked(store, Renew(0, "k", granted))
        await until(lambda: lease.left_s(clock.now_s) == 0.5)  # it is decided, and stands still
        clock.now_s += 0.8
        await asyncio.sleep(0.8)
        assert store.tables.locks.lease("k") is lease
        assert lease.left_s(clock.now_s) == 0.5
        gate["before-sync"].set()
        assert (await renewed.answer()).status == 200
        assert (await ask(store, Put(0, "k", b"v", 0, token(granted)))).status == 201


async def test_steps_of_the_wall_clock_do_not_touch_a_lease(tmp_path: Path, turned: TurnedTime):
    async with opened(tmp_path, turned) as store:
        granted = (await ask(store, acquire("k", 60))).version
        for step_s in (1e6, -2e6):
            turned.wall_step_s += step_s
            await ask(store, ExpireLease("k"))
            assert (await ask(store, Renew(0, "k", granted))).status == 200
            document = msgspec.json.decode((await ask(store, GetLock(0, "k"))).value or b"")
            assert 30 < document["ttl_left"] <= 60


async def test_after_a_pause_longer_than_the_lease_the_late_write_of_its_holder_is_refused(
    tmp_path: Path, turned: TurnedTime
):
    """All that came in during the pause is there at once: the holder's write first, then the next holder's."""
    async with opened(tmp_path, turned) as store:
        paused = (await ask(store, acquire("k", 60))).version
        waiter = asked(store, acquire("k", 60, wait_s=60))
        await ask(store, GetLock(0, "k"))
        turned.monotonic_step_s += 61
        late = asked(store, Put(0, "k", b"late", 0, token(paused)))
        assert code(await late.answer()) == "lock-lost"
        granted = await waiter.answer()
        assert granted.version > paused
        assert (await ask(store, Put(0, "k", b"mine", 0, token(granted.version)))).status == 201
        assert code(await ask(store, Renew(0, "k", paused))) == "lock-lost"
        assert code(await ask(store, Release(0, "k", paused))) == "lock-lost"


async def test_a_lease_survives_a_restart_with_its_token_and_all_of_its_time(tmp_path: Path, turned: TurnedTime):
    async with opened(tmp_path, turned) as store:
        granted = (await ask(store, acquire("k", 60, owner="me"))).version
        identity = store.tables.locks.lease("k").identity  # type: ignore[union-attr]
        turned.monotonic_step_s += 50
    turned.monotonic_step_s += 1000
    async with opened(tmp_path, turned) as store:
        lease = store.tables.locks.lease("k")
        assert lease is not None
        assert lease.identity != identity
        document = msgspec.json.decode((await ask(store, GetLock(0, "k"))).value or b"")
        assert (document["token"], document["owner"]) == (granted, "me")
        assert document["ttl_left"] > 30
        turned.monotonic_step_s += 30
        assert (await ask(store, Put(0, "k", b"v", 0, token(granted)))).status == 201
        turned.monotonic_step_s += 31
        assert code(await ask(store, Put(0, "k", b"v", 0, token(granted)))) == "lock-lost"


async def test_a_lease_survives_a_crash_also_where_its_end_was_decided_but_not_committed(tmp_path: Path, gate):
    crashed = tmp_path / "crashed"
    async with opened(tmp_path, apply_delay_s=3600.0, sync_inline_ms_max=0.0) as store:
        granted = (await ask(store, acquire("k", 60))).version
        gate["before-sync"].clear()
        copy_files(tmp_path, crashed)  # what a loss of power leaves of what is appended, and not synced, below
        released = asked(store, Release(0, "k", granted))
        await until(lambda: store.tables.locks.lease("k") is None)
        assert released.replies == []
        gate["before-sync"].set()
        assert (await released.answer()).status == 204
    async with opened(crashed) as store:
        assert (await ask(store, Renew(0, "k", granted))).status == 200


async def test_a_lease_that_ended_before_the_crash_does_not_come_back(tmp_path: Path):
    crashed = tmp_path / "crashed"
    async with opened(tmp_path, apply_delay_s=3600.0) as store:
        released = (await ask(store, acquire("released", 60))).version
        await ask(store, Release(0, "released", released))
        expired = (await ask(store, acquire("expired", 0.1))).version
        await asked(store, acquire("expired", 60, wait_s=20)).answer()
        copy_files(tmp_path, crashed)
    async with opened(crashed) as store:
        assert code(await ask(store, Renew(0, "released", released))) == "lock-lost"
        assert code(await ask(store, Renew(0, "expired", expired))) == "lock-lost"
        assert (await ask(store, acquire("released"))).version > released


async def test_a_damaged_lease_keeps_the_store_from_opening_and_nothing_from_ending(tmp_path: Path):
    """Its holder would write as if it still did; and a process that cannot open its store must be able to end."""
    async with opened(tmp_path) as store:
        await ask(store, acquire("k", 60))
    with closing(sqlite3.connect(tmp_path / "store.db")) as file, file:
        file.execute("UPDATE rows SET version = version + 1 WHERE kind = 'lease'")
    before = threads()
    with pytest.raises(DataCorrupt, match="'k'"):
        async with opened(tmp_path):
            pytest.fail("it was opened")
    await until(lambda: threads() <= before)


async def test_a_restored_lease_ends_by_itself(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, acquire("k", 0.3))
    async with opened(tmp_path) as store:
        assert (await asked(store, acquire("k", wait_s=20)).answer()).status == 201


async def test_reads_of_a_leased_key_go_on(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, Put(0, "k", b"v"))
        await ask(store, acquire("k", 60))
        sink = Sink()
        store.get(Get(1, "k"), sink)
        assert (await sink.answer()).value == b"v"


async def test_the_leases_of_a_store_are_listed_by_name(tmp_path: Path):
    async with opened(tmp_path) as store:
        tokens = {name: (await ask(store, acquire(name, 60, owner=f"o-{name}"))).version for name in ("b", "a", "c/1")}
        await ask(store, Release(0, "b", tokens["b"]))
        page = await store.scans.leases(ScanLeases(0, "", "", 10))
        assert [item[:3] for item in page.items] == [("a", tokens["a"], b"o-a"), ("c/1", tokens["c/1"], b"o-c/1")]
        assert all(30_000 < left_ms <= 60_000 for *_, left_ms in page.items)
        first = await store.scans.leases(ScanLeases(0, "", "", 1))
        assert (first.more, first.last) == (True, "a")
        assert [item[0] for item in (await store.scans.leases(ScanLeases(0, "c", "", 10))).items] == ["c/1"]


async def test_a_hundred_waiters_are_served_in_order_of_arrival(tmp_path: Path):
    async with opened(tmp_path) as store:
        holder = (await ask(store, acquire("k", 60))).version
        waiters = [asked(store, acquire("k", 60, wait_s=60)) for _ in range(100)]
        for number, waiter in enumerate(waiters):
            await ask(store, Release(0, "k", holder))
            answer = await waiter.answer()
            assert answer.status == 201
            assert answer.version > holder
            assert all(later.replies == [] for later in waiters[number + 1 :])
            holder = answer.version


async def test_writes_and_leases_in_one_stream_keep_the_fence(tmp_path: Path):
    """Twenty who acquire, write and release, all at once: what each wrote while it held the lease is what it reads."""
    async with opened(tmp_path) as store:
        log: list[int] = []

        async def worker(number: int) -> None:
            granted = await asked(store, acquire("k", 30, wait_s=30)).answer()
            assert granted.status == 201
            shown = token(granted.version)
            answers: list[Answer] = [await ask(store, Put(0, "k", b"%d" % number, 0, shown)) for _ in range(2)]
            assert all(answer.status in (201, 204) for answer in answers)
            log.append(granted.version)
            await ask(store, Release(0, "k", granted.version))
            assert code(await ask(store, Put(0, "k", b"late", 0, shown))) == "lock-lost"

        await asyncio.gather(*map(worker, range(20)))
        assert log == sorted(set(log))
