"""Writes: answered after the commit, in the order of the batches, and undone by nothing."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.model import Attempt, IdempotencyKey, TxnOp
from kvstore.protocol import Acquire, Put, Transact
from kvstore.store.batch import Batch
from kvstore.store.ops import Expire
from tests.unit.store.conftest import Opener
from tests.unit.waiting import until


def commits(harness: Any) -> int:
    """How many records were committed."""
    return sum(harness.store.tables.stats.commit_s.counts)


async def turns(harness: Any) -> None:
    """Let the pipeline decide all that is queued."""
    await until(lambda: not len(harness.store.pipeline))
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_put_creates_then_replaces_and_a_delete_removes(harness: Any) -> None:
    answers = [
        await harness.put("a", b"1"),
        await harness.put("a", b"2"),
        await harness.delete("a"),
        await harness.delete("a"),
    ]
    assert [answer.status for answer in answers] == [201, 204, 204, 404]
    assert [answer.version for answer in answers] == [1, 2, 3, 0]


async def test_soon_after_the_answer_another_connection_sees_the_row(harness: Any) -> None:
    await harness.put("a", b"1")
    await until(lambda: harness.sql_now("SELECT value, version FROM kv WHERE key = 'a'") == [(b"1", 1)])
    await harness.delete("a")
    await until(lambda: harness.sql_now("SELECT value, version FROM kv WHERE key = 'a'") == [])


async def test_when_the_answer_arrives_the_record_is_durable_in_the_log(harness: Any) -> None:
    last: list[tuple[int, int]] = []
    records = harness.store.tables.log
    for _ in range(3):
        await harness.put("a", b"1", on_answer=lambda: last.append((records.durable, records.last.number)))
    assert [durable for durable, _ in last] == [number for _, number in last]
    assert sorted({number for _, number in last}) == [number for _, number in last]


async def test_when_the_answer_arrives_every_read_shows_the_change(harness: Any) -> None:
    reads: list[Any] = []
    await harness.put("a", b"old")
    await harness.put("a", b"new", on_answer=lambda: reads.append(harness.get("a")))
    await harness.delete("a", on_answer=lambda: reads.append(harness.get("a")))
    assert all(read.done for read in reads)
    assert [(await read).status for read in reads] == [200, 404]
    assert (await reads[0]).value == b"new"


async def test_operations_that_arrive_while_a_batch_is_at_work_share_the_next_one(harness: Any) -> None:
    gate = harness.hold("commit")
    first = harness.put("first")
    await gate.arrived.wait()
    calls = [first, *(harness.put(f"key-{number}") for number in range(50))]
    gate.open()
    for call in calls:
        await call
    assert gate.calls == 2
    assert harness.store.tables.stats.batch_ops.counts[0] == 1


async def test_answers_leave_in_the_order_of_the_operations_refused_ones_included(harness: Any) -> None:
    move = await harness.plan("foreign")
    gate = harness.hold("commit")
    calls = [harness.put("first")]
    await gate.arrived.wait()
    fencing = asyncio.create_task(harness.store.partitions.freeze(move))
    await asyncio.sleep(0)
    calls += [
        harness.delete("absent"),
        harness.put("a"),
        harness.put("foreign"),
        harness.delete("a"),
        harness.delete("a"),
    ]
    assert not any(call.done for call in calls)
    gate.open()
    assert [(await call).status for call in calls] == [201, 404, 201, 421, 204, 404]
    assert harness.answered == calls
    await fencing


@pytest.mark.parametrize("answer", [404, 421])
async def test_an_answer_without_a_row_waits_for_the_batch_that_it_saw(harness: Any, answer: int) -> None:
    if answer == 421:
        await harness.leave("a")
    gate = harness.hold("commit", before=True)
    first = harness.put("first")
    await gate.arrived.wait()
    call = harness.delete("a")
    await turns(harness)
    assert not call.done
    gate.open()
    assert (await call).status == answer
    assert harness.answered == [first, call]


async def test_a_refusal_for_want_of_space_waits_for_the_batch_that_it_saw(harness: Any) -> None:
    await harness.put("a")
    await harness.reopen(disk_reserve_bytes=1 << 62)
    gate = harness.hold("commit", before=True)
    first = harness.delete("a")
    await gate.arrived.wait()
    call = harness.put("a")
    await turns(harness)
    assert not call.done
    gate.open()
    assert (await call).status == 507
    assert harness.answered[-2:] == [first, call]


async def test_several_operations_on_one_key_in_one_batch_are_done_in_their_order(harness: Any) -> None:
    gate = harness.hold("commit")
    harness.put("other")
    await gate.arrived.wait()
    calls = [harness.put("a", b"1"), harness.delete("a"), harness.put("a", b"2"), harness.put("a", b"3")]
    gate.open()
    answers = [await call for call in calls]
    assert gate.calls == 2
    assert [answer.status for answer in answers] == [201, 204, 201, 204]
    versions = [answer.version for answer in answers]
    assert versions == sorted(set(versions))
    assert (await harness.get("a")).value == b"3"
    assert await harness.sql("SELECT body, version FROM rows WHERE key = 'a'") == [(b"3", versions[-1])]


async def test_an_operation_whose_connection_ended_before_it_began_is_dropped(harness: Any) -> None:
    gate = harness.hold("commit")
    first = harness.put("first")
    await gate.arrived.wait()
    dropped, kept = harness.put("dropped"), harness.put("kept")
    dropped.closed = True
    gate.open()
    await first
    await kept
    assert not dropped.done
    assert (await harness.get("dropped")).status == 404


async def test_an_operation_that_had_begun_when_its_connection_ended_is_done(harness: Any) -> None:
    gate = harness.hold("commit")
    call = harness.put("begun")
    await gate.arrived.wait()
    call.closed = True
    gate.open()
    await call
    assert (await harness.get("begun")).status == 200


async def test_when_all_that_is_queued_was_dropped_the_store_goes_on(harness: Any) -> None:
    gate = harness.hold("commit")
    first = harness.put("first")
    await gate.arrived.wait()
    harness.put("dropped").closed = True
    gate.open()
    await first
    assert (await harness.put("next")).status == 201


async def test_ownership_is_looked_at_inside_the_batch(harness: Any) -> None:
    move = await harness.plan("queued")
    gate = harness.hold("commit")
    first = harness.put("first")
    await gate.arrived.wait()
    fencing = asyncio.create_task(harness.store.partitions.freeze(move))
    await asyncio.sleep(0)
    queued = harness.put("queued")
    gate.open()
    assert (await first).status == 201
    answer = await queued
    assert (answer.status, answer.problem["epoch"], answer.problem["fenced"]) == (421, 2, True)
    await fencing
    assert await harness.sql("SELECT * FROM rows WHERE key = 'queued'") == []


async def test_before_it_owns_anything_a_store_refuses_everything(harness: Any) -> None:
    await harness.own(everything=False)
    assert [(await call).status for call in (harness.put("a"), harness.delete("a"), harness.get("a"))] == [
        421,
        421,
        421,
    ]
    assert await harness.sql("SELECT * FROM rows") == []


@pytest.mark.parametrize("limits", [{"queue_ops_max": 3}, {"queue_bytes_max": 3 * (64 + 100)}])
async def test_past_its_bound_the_queue_refuses_at_once_and_takes_more_when_it_has_drained(
    open_harness: Opener, limits: dict[str, int]
) -> None:
    harness = await open_harness(**limits)
    gate = harness.hold("commit")
    calls = [harness.put("first", b"v" * 100)]
    await gate.arrived.wait()
    calls += [harness.put(f"key-{number}", b"v" * 100) for number in range(3)]
    refused = harness.put("refused", b"v" * 100)
    assert refused.done
    answer = await refused
    assert (answer.status, answer.problem["code"]) == (429, "too-many-requests")
    assert answer.problem["retry_after_ms"] > 0
    gate.open()
    assert [(await call).status for call in calls] == [201] * 4
    assert (await harness.put("refused")).status == 201


async def test_a_batch_is_bounded_in_operations(open_harness: Opener) -> None:
    harness = await open_harness(batch_ops_max=2)
    before = commits(harness)
    for call in [harness.put(f"key-{number}") for number in range(6)]:
        await call
    assert commits(harness) - before == 3


async def test_a_batch_is_bounded_in_bytes_but_takes_at_least_one_operation(open_harness: Opener) -> None:
    harness = await open_harness(batch_bytes_max=1000)
    before = commits(harness)
    for call in [harness.put(f"key-{number}", b"v" * 5000) for number in range(3)]:
        assert (await call).status == 201
    assert commits(harness) - before == 3


@pytest.mark.parametrize("inline", [True, False])
async def test_a_commit_that_fails_ends_the_process_and_answers_no_client(open_harness: Opener, inline: bool) -> None:
    harness = await open_harness(may_fail=True, sync_inline_ms_max=1000.0 if inline else 0.0)

    def fail() -> None:
        raise OSError("disk I/O error")

    harness.store.tables.log.sync = fail
    call = harness.put("a")
    await asyncio.wait(
        [harness.store._tasks["commit"], harness.store._tasks["sync"]], return_when=asyncio.FIRST_COMPLETED
    )
    assert [str(error) for error in harness.fatal] == ["disk I/O error"]
    assert not call.done


async def test_what_is_queued_when_the_store_closes_is_committed_and_answered(harness: Any) -> None:
    calls = [harness.put(f"key-{number}") for number in range(100)]
    await harness.close()
    assert all(call.done for call in calls)
    assert harness.sql_now("SELECT count(*) FROM kv") == [(100,)]


async def test_a_reopened_store_has_all_values_versions_and_counts(harness: Any) -> None:
    await harness.put("a", b"1")
    await harness.put("empty", b"")
    await harness.put("🔑/?&%", bytes(range(256)))
    await harness.put("nul\0inside", b"2", ttl_ms=3_600_000)
    await harness.delete("a")
    store_id, clock = harness.store.identity.store_id, harness.store.clock
    await harness.reopen()
    assert (harness.store.identity.store_id, harness.store.clock) == (store_id, clock)
    assert (await harness.get("a")).status == 404
    assert ((await harness.get("empty")).value, (await harness.get("empty")).version) == (b"", 2)
    assert (await harness.get("🔑/?&%")).value == bytes(range(256))
    assert 3_590_000 < (await harness.get("nul\0inside")).ttl_left_ms <= 3_600_000
    snapshot = harness.store.inspection.snapshot()
    assert (snapshot.keys, snapshot.bytes) == (3, 5 + len("🔑/?&%".encode()) + 256 + len("nul\0inside") + 1)


async def test_versions_go_on_rising_after_delete_trim_and_restart(harness: Any) -> None:
    await harness.put("a")
    await harness.flush()
    deleted = await harness.delete("a")
    assert await harness.sql("SELECT count(*) FROM rows") == [(1,)]
    assert await harness.trim(harness.store.clock.sequence, 100)
    assert await harness.sql("SELECT count(*) FROM rows") == [(0,)]
    await harness.reopen()
    assert (await harness.put("a")).version > deleted.version
    assert (await harness.put("b")).version > deleted.version


async def test_deleting_gives_the_counts_back(harness: Any) -> None:
    for number in range(10):
        await harness.put(f"key-{number}", b"v" * number)
        await harness.put(f"key-{number}", b"v" * 2 * number)
    for number in range(10):
        await harness.delete(f"key-{number}")
    assert (harness.store.inspection.snapshot().keys, harness.store.inspection.snapshot().bytes) == (0, 0)


async def test_on_a_full_disk_puts_are_refused_while_deletes_and_expiries_go_on_and_it_recovers(
    open_harness: Opener, tmp_path: Path
) -> None:
    harness = await open_harness()
    await harness.put("old")
    await harness.put("due", ttl_ms=1)
    await harness.reopen(disk_reserve_bytes=1 << 62)
    refused = await harness.put("new")
    assert (refused.status, refused.problem["code"]) == (507, "disk-full")
    assert (await harness.put("old", b"other")).status == 507
    assert (await harness.get("old")).value == b"value"
    assert harness.store.inspection.snapshot().disk_full
    assert (await harness.write(Expire("due"))).status == 410
    assert (await harness.delete("old")).status == 204
    await harness.reopen()
    assert (await harness.put("new")).status == 201
    assert not harness.store.inspection.snapshot().disk_full


async def test_on_a_full_disk_the_log_gives_back_what_the_file_has_though_nothing_is_applied_any_more(
    open_harness: Opener, tmp_path: Path
) -> None:
    harness = await open_harness(log_segment_bytes=1 << 16, wal_bytes_max=1 << 30)
    tables, path = harness.store.tables, harness.store.tables.engine.path

    def segments() -> int:
        return len(list(path.parent.glob(f"{path.stem}.log.0*")))

    while segments() < 5:
        await harness.put("key", b"v" * 5000)
    await harness.flush()
    tables.limits = msgspec.structs.replace(tables.limits, disk_reserve_bytes=1 << 62)
    while (await harness.put("small")).status != 507:  # looking at the disk is not done for every batch
        pass
    await until(lambda: segments() <= 3)  # the open one, and two that are made ahead
    assert (await harness.get("key")).value == b"v" * 5000


async def test_hundreds_of_clients_at_once_lose_nothing_and_get_different_versions(harness: Any) -> None:
    async def client(number: int) -> list[int]:
        versions = []
        for turn in range(5):
            versions.append((await harness.put(f"shared-{turn}", f"{number}".encode())).version)
            versions.append((await harness.put(f"own-{number}-{turn}", b"v")).version)
        return versions

    versions = [version for got in await asyncio.gather(*map(client, range(200))) for version in got]
    assert len(set(versions)) == len(versions) == 2000
    assert harness.store.inspection.snapshot().keys == 1005
    assert 0 < sum(harness.store.tables.stats.commit_s.counts) < 400, "commits are shared"
    newest = {turn: (await harness.get(f"shared-{turn}")).version for turn in range(5)}
    assert newest == dict(
        await harness.sql("SELECT CAST(substr(key, 8) AS INT), version FROM kv WHERE key LIKE 'shared-%'")
    )


async def test_a_batch_that_is_done_is_freed_without_the_garbage_collector(harness: Any) -> None:
    """Circles pile up until the collector comes, which then holds up every client for some tens of milliseconds."""
    gc.collect()
    gc.disable()
    try:
        for number in range(20):
            await harness.put(f"key-{number}", b"1")
        left = [each for each in gc.get_objects() if type(each) is Batch]
    finally:
        gc.enable()
    assert len(left) <= 2  # the last ones may still be at hand


# --- the order of operations on one key -------------------------------------------------------------------------------


async def test_an_acquire_does_not_overtake_a_write_of_that_name_whose_row_is_not_in_memory(harness: Any) -> None:
    await harness.put("k", b"old")
    await harness.flush()
    harness.forget_cache()
    gate = harness.hold("read")
    write, acquire = harness.put("k", b"new"), harness.write(Acquire(1, "k", 60_000, 0, "me"))
    await gate.arrived.wait()
    behind = harness.put("k", b"late")
    elsewhere = harness.write(Acquire(1, "another", 60_000, 0, "me"))
    assert (await elsewhere).status == 201, "other keys do not wait"
    gate.open()
    assert [(await call).status for call in (write, acquire, behind)] == [204, 201, 423]


async def test_a_write_does_not_overtake_one_of_the_same_key_that_waits_for_another_row(harness: Any) -> None:
    """The rows that they need are not the same: the first needs that of its Idempotency-Key, too."""
    await harness.put("k", b"old")
    gate = harness.hold("read")
    first = harness.write(Put(1, "k", b"first", 0, None, IdempotencyKey("once", "digest")))
    await gate.arrived.wait()
    second, third = harness.put("k", b"second"), harness.delete("k")
    await asyncio.sleep(0.05)
    assert not second.done
    gate.open()
    versions = [(await call).version for call in (first, second, third)]
    assert versions == sorted(versions)
    assert (await harness.get("k")).status == 404
    assert not len(harness.store.pipeline)


async def test_a_transaction_keeps_its_place_among_the_writes_of_its_keys(harness: Any) -> None:
    await harness.put("cached", b"old")
    gate = harness.hold("read")
    steps = [TxnOp("put", "cached", b"both"), TxnOp("put", "not cached", b"both")]
    both = harness.write(Transact(1, "cached", Attempt(100, 100, "router01", 4), [], steps, []))
    await gate.arrived.wait()
    after = harness.put("cached", b"after")
    gate.open()
    assert (await both).state == "committed"
    assert (await after).status == 204
    assert (await harness.get("cached")).value == b"after"
