"""Moves between two stores on real files: every row arrives, once, and no shard answers for what is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.errors import Conflict
from kvstore.model import Attempt, IdempotencyKey, TxnOp
from kvstore.protocol import (
    Acquire,
    ApplyIntents,
    DecideCommit,
    Delete,
    Freeze,
    Get,
    Prepare,
    Pull,
    Put,
    ReadLock,
    ReadUnlock,
    Release,
    Renew,
    ResolveTxn,
    Scan,
    Vote,
)
from kvstore.storage.engine import RowKey
from kvstore.store.ops import DropDecisions
from kvstore.store.store import Store
from tests.unit.shard.two_shards import PARTITIONS, Cluster, at, cluster_of_two, trimmed

FIRST = Attempt(100, 100, "router01")
SECOND = Attempt(200, 200, "router02")


# --- what arrives -----------------------------------------------------------------------------------------------------


async def test_values_go_with_their_versions_and_deadlines_and_the_clock_goes_on(cluster: Cluster, tmp_path: Path):
    first = await cluster.ask("s1", Put(1, "a", b"1"))
    await cluster.ask("s1", Put(2, "b", b"2", 60_000))
    await cluster.ask("s1", Put(3, "stays", b"3"))
    await cluster.move("a", "b")
    there = await cluster.ask("s2", Get(4, "a"))
    assert (there.status, there.version, there.value) == (200, first.version, b"1")
    assert 0 < (await cluster.ask("s2", Get(5, "b"))).ttl_left_ms <= 60_000
    assert (await cluster.ask("s2", Put(6, "a", b"new"))).version > 3
    assert await cluster.value("s1", "a") == 421
    assert await cluster.value("s1", "stays") == b"3"
    await trimmed(tmp_path, "s1", "a", "b")
    assert (cluster.stores["s1"].inspection.snapshot().keys, cluster.stores["s2"].inspection.snapshot().keys) == (1, 2)


async def test_a_version_is_not_given_twice_although_the_key_was_deleted_before_the_move(cluster: Cluster):
    for number in range(5):
        await cluster.ask("s1", Put(number, "a", b"x"))
    gone = await cluster.ask("s1", Delete(9, "a"))
    await cluster.move("a")
    assert (await cluster.ask("s2", Put(10, "a", b"again"))).version > gone.version


async def test_a_lease_goes_with_its_token_has_its_full_time_and_the_next_token_is_higher(cluster: Cluster):
    token = (await cluster.ask("s1", Acquire(1, "name", 60_000, 0, "me"))).version
    await cluster.move("name")
    assert (await cluster.ask("s2", Put(2, "name", b"x"))).status == 423
    renewed = await cluster.ask("s2", Renew(3, "name", token))
    assert (renewed.status, renewed.version) == (200, token)
    assert (await cluster.ask("s2", Release(4, "name", token))).status == 204
    assert (await cluster.ask("s2", Acquire(5, "name", 1000, 0, "you"))).version > token


async def test_a_lease_that_came_ends_by_itself(cluster: Cluster):
    await cluster.ask("s1", Acquire(1, "name", 300, 0, "me"))
    await cluster.move("name")
    assert (await cluster.ask("s2", Acquire(2, "name", 1000, 5000, "you"))).status == 201


async def test_a_kept_reply_goes_along(cluster: Cluster):
    put = Put(1, "a", b"1", 0, None, IdempotencyKey("key", "digest"))
    first = await cluster.ask("s1", put)
    await cluster.move("a")
    again = await cluster.ask("s2", put)
    assert (again.status, again.version) == (201, first.version)


async def test_intents_and_decisions_go_along_and_the_transaction_is_finished_where_they_are(cluster: Cluster):
    await cluster.ask("s1", Put(1, "b", b"old"))
    prepare = Prepare(2, "a", FIRST, [], [TxnOp("put", "b", b"new")], [])
    vote = await cluster.ask("s1", prepare)
    commit = DecideCommit(3, "a", FIRST, [], [TxnOp("put", "a", b"new")], [], vote.vote, True, None, None, ["b"])
    assert at("a") != at("b")
    await cluster.move("b")
    decided = await cluster.ask("s1", commit)
    assert decided.state == "committed"
    await cluster.move("a")
    assert (await cluster.ask("s2", ResolveTxn(4, "a", FIRST))).state == "committed"
    read = cluster.begin("s2", Get(5, "b"))
    await asyncio.sleep(0.05)
    assert not read.replies, "it waits for the intent that came along"
    await cluster.ask("s2", ApplyIntents(6, FIRST, ["b"], decided.version, True, decided.decided_ms))
    assert (await read.reply()).value == b"new"


async def test_an_attempt_below_the_sources_floor_is_gone_at_the_destination(cluster: Cluster):
    asked = await cluster.ask("s1", ResolveTxn(1, "a", SECOND))
    assert asked.state == "aborted"
    await cluster.stores["s1"].ask(DropDecisions([SECOND]))
    await cluster.move("a")
    late = DecideCommit(2, "a", SECOND, [], [TxnOp("put", "a", b"x")], [], 1, True, None, None, ["b"])
    assert (await cluster.ask("s2", late)).state == "gone"
    assert await cluster.value("s2", "a") is None


# --- while it is under way --------------------------------------------------------------------------------------------


async def test_what_changes_during_the_copy_and_the_tail_arrives(cluster: Cluster):
    token = (await cluster.ask("s1", Acquire(1, "leased", 60_000, 0, "me"))).version
    for key in ("deleted", "changed", "held", "late"):
        await cluster.ask("s1", Put(2, key, b"old"))
    vote: Vote = await cluster.ask("s1", Prepare(3, "elsewhere", FIRST, [], [TxnOp("put", "held", b"new")], []))
    after_the_copy = [
        Delete(4, "deleted"),
        Put(5, "changed", b"new"),
        ApplyIntents(6, FIRST, ["held"], vote.vote + 1, True, 1),
    ]
    after_the_tail = [Put(7, "new", b"new"), Release(8, "leased", token), Put(9, "late", b"new")]
    to_come = [after_the_copy, after_the_tail]

    async def change(request: Any) -> None:
        if isinstance(request, Pull) and to_come:
            for step in to_come.pop(0):
                assert (await cluster.ask("s1", step)).status in (200, 201, 204)

    cluster.after_message = change
    keys = ("deleted", "changed", "new", "leased", "held", "late")
    await cluster.move(*keys)
    assert to_come == []
    values = {key: await cluster.value("s2", key) for key in keys}
    assert values == {"deleted": None, "leased": None} | dict.fromkeys(("changed", "new", "held", "late"), b"new")
    assert (await cluster.ask("s2", Acquire(10, "leased", 1000, 0, "you"))).version > token


async def test_at_the_freeze_all_but_what_changed_last_is_applied_and_added_up_at_both_ends(tmp_path: Path):
    """So the time in which no shard answers does not grow with the size of the move."""
    keys = [f"key-{number}" for number in range(200)]
    left: list[object] = []
    async with cluster_of_two(tmp_path, apply_delay_s=30.0) as cluster:

        async def look(message: Any) -> None:
            if isinstance(message, Freeze):
                for store in cluster.stores.values():
                    unapplied = store.applier.visible - store.tables.engine.applied.position.number
                    left.append((unapplied, _not_added_up(store, set(map(at, keys)))))

        for key in keys:
            await cluster.ask("s1", Put(1, key, b"value"))
        cluster.before_message = look
        await cluster.move(*keys)
        assert left == [(0, set()), (0, set())]


def _not_added_up(store: Store, partitions: Set[int]) -> Set[int]:
    """Those of which the next digest would have to read all rows again."""
    engine: Any = store.tables.engine
    digests = engine._writer.digests
    known = {partition: sequence for partition, (sequence, _) in digests._known.items()}
    return {each for each in partitions if known.get(each, -1) < digests.changed[each]}


async def test_from_the_freeze_to_the_commit_no_shard_answers_reads_and_the_release_of_read_locks_included(
    cluster: Cluster,
):
    await cluster.ask("s1", Put(1, "a", b"1"))
    reads = await cluster.ask("s1", ReadLock(2, FIRST, ["a"]))
    move_id = cluster.plan("a")
    await cluster.spread()
    await cluster.carry(move_id)
    for shard_id in ("s1", "s2"):
        for request in (Get(3, "a"), Put(4, "a", b"2"), Delete(5, "a"), Acquire(6, "a", 1000, 0, "")):
            answer = await cluster.ask(shard_id, request)
            assert answer.status == 421
            assert answer.problem.get("fenced", False) == (shard_id == "s1")
        assert (await cluster.ask(shard_id, Scan(7, "", "", 10))).items == []
    assert (await cluster.ask("s1", ReadUnlock(8, ["a"], reads.lock))).status == 409
    cluster.commit(move_id)
    await cluster.spread("s2")  # the source has not heard of it
    assert await cluster.value("s2", "a") == b"1"
    assert await cluster.value("s1", "a") == 421


async def test_a_freeze_bounces_all_that_wait_and_nothing_of_it_is_done(cluster: Cluster):
    await cluster.ask("s1", Acquire(1, "leased", 60_000, 0, "me"))
    await cluster.ask("s1", Prepare(2, "elsewhere", FIRST, [], [TxnOp("put", "held", b"x")], []))
    waiting = [
        cluster.begin("s1", Acquire(3, "leased", 1000, 30_000, "you")),
        cluster.begin("s1", Put(4, "held", b"mine")),
        cluster.begin("s1", Get(5, "held")),
        cluster.begin("s1", Prepare(6, "elsewhere", Attempt(50, 50, "router03"), [], [TxnOp("put", "held", b"y")], [])),
    ]
    commit = DecideCommit(
        7, "held", Attempt(40, 40, "r"), [], [TxnOp("put", "held", b"z")], [], 1, True, None, None, ["b"]
    )
    waiting.append(cluster.begin("s1", commit))
    await asyncio.sleep(0.1)
    assert not any(sink.replies for sink in waiting)
    await cluster.move("leased", "held")
    assert [(await sink.reply()).status for sink in waiting] == [421] * 5
    assert (await cluster.ask("s2", Acquire(8, "leased", 1000, 0, "you"))).status == 423
    asked = await cluster.ask("s2", ResolveTxn(9, "held", Attempt(40, 40, "r")))
    assert asked.state == "aborted", "bounced without a word on what becomes of it: the ask decides"


async def test_who_has_a_lock_in_what_goes_and_waits_for_one_that_stays_is_bounced_and_has_it_no_more(cluster: Cluster):
    assert at("goes") != at("stays")
    young = Attempt(500, 500, "router03")
    await cluster.ask("s1", Prepare(1, "elsewhere", young, [], [TxnOp("put", "stays", b"x")], []))
    both = [TxnOp("put", "goes", b"y"), TxnOp("put", "stays", b"y")]
    waiting = cluster.begin("s1", Prepare(2, "elsewhere", FIRST, [], both, []))
    await asyncio.sleep(0.05)
    assert not waiting.replies
    move_id = cluster.plan("goes")
    await cluster.spread()
    await cluster.carry(move_id)
    assert (await waiting.reply()).status == 421
    cluster.void(move_id)
    await cluster.spread()
    assert (await cluster.ask("s1", Put(3, "goes", b"free"))).status == 201


async def test_who_waits_for_a_key_that_stays_goes_on_when_a_reader_of_both_has_lost_its_locks(cluster: Cluster):
    assert at("goes") != at("stays")
    reads = await cluster.ask("s1", ReadLock(1, FIRST, ["goes", "stays"]))
    put = cluster.begin("s1", Put(2, "stays", b"1"))
    await asyncio.sleep(0.05)
    assert not put.replies
    await cluster.move("goes")
    assert (await put.reply()).status == 201
    assert (await cluster.ask("s1", ReadUnlock(3, ["stays"], reads.lock))).status == 409


async def test_a_read_that_waits_for_its_thread_while_the_partition_goes_is_answered_421(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    store = cluster.stores["s1"]
    await store.applier.flush()
    store.tables.cache.clear()
    read, may_go_on, original = asyncio.Event(), asyncio.Event(), store.tables.engine.read

    async def slow(keys: list[RowKey]) -> Any:
        found = await original(keys)
        read.set()
        await may_go_on.wait()
        return found

    store.tables.engine.read = slow  # type: ignore[method-assign]
    got = cluster.begin("s1", Get(2, "a"))
    await read.wait()
    await cluster.move("a")
    may_go_on.set()
    assert (await got.reply()).status == 421


# --- pages and owners -------------------------------------------------------------------------------------------------


async def test_pages_are_bounded_by_rows_and_by_bytes_and_none_is_lost(tmp_path: Path):
    async with cluster_of_two(tmp_path, move_page_rows_max=7, page_bytes_max=200) as cluster:
        pages: list[Pull] = []

        async def count(request: Any) -> None:
            if isinstance(request, Pull):
                pages.append(request)

        cluster.before_message = count
        keys = [f"key-{number}" for number in range(100)]
        for key in keys:
            await cluster.ask("s1", Put(1, key, key.encode() * 3))
        await cluster.move(spare=range(PARTITIONS))
        assert len(pages) > 30
        assert [await cluster.value("s2", key) for key in keys] == [key.encode() * 3 for key in keys]
        assert cluster.stores["s2"].inspection.snapshot().keys == 100


async def test_a_decision_that_was_dropped_elsewhere_is_not_remembered_here(cluster: Cluster):
    assert (await cluster.ask("s1", ResolveTxn(1, "a", SECOND))).state == "aborted"
    await cluster.move("a")
    await cluster.stores["s2"].ask(DropDecisions([SECOND]))
    await cluster.move("a", to="s1")
    assert (await cluster.ask("s1", ResolveTxn(2, "a", SECOND))).state == "gone"
    assert cluster.stores["s1"].inspection.snapshot().decisions == 0


async def test_rows_are_given_to_others_by_their_owner_only(cluster: Cluster):
    answer = await cluster.ask("s2", Pull(1, [at("a")], 0, 0, 10))
    assert (answer.status, answer.problem["code"]) == (409, "conflict")


# --- room on the disk -------------------------------------------------------------------------------------------------


async def test_a_move_waits_for_room_and_says_how_much_before_anything_is_copied(cluster: Cluster):
    value = b"v" * 100_000
    await cluster.ask("s1", Put(1, "a", value))
    pulled: list[Pull] = []

    async def note(request: Any) -> None:
        if isinstance(request, Pull):
            pulled.append(request)

    cluster.before_message = note
    tables = cluster.stores["s2"].tables
    plenty, tables.limits = tables.limits, msgspec.structs.replace(tables.limits, disk_reserve_bytes=1 << 60)
    move_id = cluster.plan("a", spare=range(PARTITIONS))
    await cluster.spread()
    carried = asyncio.create_task(cluster.carry(move_id))
    async with asyncio.timeout(60):
        while not (detail := (await cluster.progress(move_id)).detail):
            await asyncio.sleep(0.005)
    assert "waits for room on s2: 0.2 MB needed, 0.0 MB free" in detail
    assert not pulled
    tables.limits = plenty
    assert (await carried).step == "done"
    cluster.commit(move_id)
    await cluster.spread()
    assert await cluster.value("s2", "a") == value


async def test_a_move_that_waits_for_room_ends_when_it_stands_no_more(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"v"))
    tables = cluster.stores["s2"].tables
    tables.limits = msgspec.structs.replace(tables.limits, disk_reserve_bytes=1 << 60)
    move_id = cluster.plan("a")
    await cluster.spread()
    await cluster.progress(move_id)
    cluster.void(move_id)
    await cluster.spread()
    with pytest.raises(Conflict):
        await cluster.progress(move_id)
    assert await cluster.value("s1", "a") == b"v"
