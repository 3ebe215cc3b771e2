"""Moves between two stores on real files: every row arrives, once, and no shard answers for what is under way."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Set
from contextlib import closing
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
from kvstore.storage.rows import checksum
from kvstore.store.ops import DropDecisions
from kvstore.store.partitions import View
from kvstore.store.store import Store
from tests.unit.shard.two_shards import PARTITIONS, Cluster, at, cluster_of_two

FIRST = Attempt(100, 100, "router01")
SECOND = Attempt(200, 200, "router02")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_of_two(tmp_path) as opened:
        yield opened


def rows(folder: Path, shard_id: str) -> dict[tuple[str, str], bytes | None]:
    with closing(sqlite3.connect(folder / f"{shard_id}.db")) as connection:
        return {(kind, key): body for kind, key, body in connection.execute("SELECT kind, key, body FROM rows")}


async def trimmed(folder: Path, shard_id: str, *keys: str) -> None:
    async with asyncio.timeout(60):
        while {key for _, key in rows(folder, shard_id)} & set(keys):
            await asyncio.sleep(0.01)


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


async def _ignore(_: Any) -> None:
    """Nothing more happens."""


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


# --- restarts, late messages, ways back -------------------------------------------------------------------------------


async def test_a_freeze_survives_a_restart_and_ends_with_a_map_without_its_move(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.restart("s1")
    assert await cluster.value("s1", "a") == 421
    assert await cluster.value("s1", "b") is None, "what is not fenced it answers for, with no controller there"
    cluster.void(move_id)
    await cluster.spread("s1")
    assert await cluster.value("s1", "a") == b"1"


async def test_a_destination_that_starts_again_between_the_last_pull_and_the_commit_has_all(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    lease = (await cluster.ask("s1", Acquire(2, "a", 60_000, 0, "me"))).version
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.restart("s2")
    await asyncio.sleep(0.1)  # it would trim what it takes for left behind
    cluster.commit(move_id)
    await cluster.spread()
    assert await cluster.value("s2", "a") == b"1"
    assert (await cluster.ask("s2", Renew(3, "a", lease))).status == 200


async def test_an_order_that_comes_once_more_to_a_destination_that_has_started_again_removes_nothing(cluster: Cluster):
    """The move is committed meanwhile, and the source has dropped the rows: nothing could bring them again."""
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.restart("s2")
    cluster.commit(move_id)
    await cluster.spread("s1")
    assert (await cluster.carry(move_id)).step == "done"
    with pytest.raises(Conflict, match="complete"):
        await cluster.stores["s2"].migration.clear(move_id)
    await cluster.spread()
    assert await cluster.value("s2", "a") == b"1"
    assert not cluster.stores["s2"].partitions.view.freezes, "what was noted ends with the move"


async def test_a_move_that_becomes_complete_while_a_newer_map_is_adopted_stays_complete(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    partitions = cluster.stores["s2"].partitions
    prepare = partitions._prepare

    async def complete_before(*args: Any) -> Any:
        assert (await cluster.carry(move_id)).step == "done"
        return await prepare(*args)

    monkeypatch.setattr(partitions, "_prepare", complete_before)
    cluster.plan("b")
    await cluster.spread("s2")
    assert partitions.is_complete(move_id)
    await cluster.restart("s2")
    assert cluster.stores["s2"].partitions.is_complete(move_id)


async def test_a_freeze_that_comes_when_its_move_is_given_up_is_refused(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    cluster.void(move_id)
    await cluster.spread()
    answer = await cluster.ask("s1", Freeze(2, move_id))
    assert (answer.status, answer.problem["code"]) == (409, "conflict")
    assert await cluster.value("s1", "a") == b"1"


async def test_a_move_that_is_given_up_leaves_no_trace(cluster: Cluster, tmp_path: Path):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.stores["s2"].applier.flush()
    assert rows(tmp_path, "s2") != {}
    cluster.void(move_id)
    await cluster.spread()
    await trimmed(tmp_path, "s2", "a")
    assert rows(tmp_path, "s2") == {}
    assert await cluster.value("s1", "a") == b"1"
    with pytest.raises(Conflict, match="does not stand"):
        await cluster.carry(move_id)
    assert cluster.stores["s2"].inspection.snapshot().keys == 0


async def test_rows_that_come_while_a_move_is_given_up_are_dropped_though_the_file_has_them_later(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    store = cluster.stores["s2"]
    page = await cluster.stores["s1"].migration.pull(Pull(0, [at("a")], 0, 0, 100))
    prepare, occupied = store.partitions._prepare, store.tables.engine.occupied

    async def take_after(*args: Any) -> Any:
        """The last moment at which the move stands: what comes now is not in the file when that is looked at."""
        prepared = await prepare(*args)
        await store.migration.take(move_id, page.rows)
        return prepared

    async def occupied_before() -> Set[int]:
        return await occupied() - {at("a")}

    monkeypatch.setattr(store.partitions, "_prepare", take_after)
    monkeypatch.setattr(store.tables.engine, "occupied", occupied_before)
    cluster.void(move_id)
    await cluster.spread()
    await store.applier.flush()
    await trimmed(tmp_path, "s2", "a")


async def test_there_and_back_again_before_the_drop(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    may_drop = asyncio.Event()
    partitions = cluster.stores["s1"].partitions
    drop = partitions._drop

    async def drop_late(orphaned: Set[int]) -> None:
        await may_drop.wait()
        await drop(orphaned)

    monkeypatch.setattr(partitions, "_drop", drop_late)
    for key in ("deleted there", "changed there", "kept"):
        await cluster.ask("s1", Put(1, key, b"old"))
        assert await cluster.value("s1", key) == b"old"  # in the cache of s1
    keys = ("deleted there", "changed there", "kept", "new there")
    await cluster.move(*keys)
    await cluster.ask("s2", Delete(2, "deleted there"))
    await cluster.ask("s2", Put(3, "changed there", b"new"))
    await cluster.ask("s2", Put(4, "new there", b"new"))
    await cluster.move(*keys, to="s1")
    may_drop.set()
    await asyncio.sleep(0.1)
    assert [await cluster.value("s1", key) for key in keys] == [None, b"new", b"old", b"new"]
    assert cluster.stores["s1"].inspection.snapshot().keys == 3
    await cluster.move(*keys)
    assert [await cluster.value("s2", key) for key in keys] == [None, b"new", b"old", b"new"]


async def test_a_drop_takes_nothing_that_is_owned_or_on_its_way_here(cluster: Cluster, tmp_path: Path):
    for key in ("owned", "coming", "left"):
        await cluster.ask("s1", Put(1, key, b"1"))
    await cluster.move("coming", "left")
    move_id = cluster.plan("coming", to="s1")
    await cluster.spread()
    await cluster.carry(move_id, "s1")
    store = cluster.stores["s1"]
    await store.partitions._drop(set(range(PARTITIONS)))
    await store.applier.flush()
    while await store.applier.clean_some():
        pass
    assert {key for _, key in rows(tmp_path, "s1")} == {"owned", "coming"}
    cluster.commit(move_id)
    await cluster.spread()
    assert await cluster.value("s1", "coming") == b"1"


async def test_two_moves_at_the_same_time(cluster: Cluster):
    keys = [f"key-{number}" for number in range(40)]
    for key in keys:
        await cluster.ask("s1", Put(1, key, key.encode()))
    half = PARTITIONS // 2
    moves = [cluster.plan(spare=range(half)), cluster.plan(spare=range(half, PARTITIONS))]
    await cluster.spread()
    assert [progress.step for progress in await asyncio.gather(*map(cluster.carry, moves))] == ["done", "done"]
    cluster.void(moves[0])
    cluster.commit(moves[1])
    await cluster.spread()
    for key in keys:
        mine, other = ("s1", "s2") if at(key) < half else ("s2", "s1")
        assert (await cluster.value(mine, key), await cluster.value(other, key)) == (key.encode(), 421)


async def test_a_copy_that_may_have_missed_a_deletion_is_void(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))

    async def delete_and_forget(request: Any) -> None:
        if not isinstance(request, Pull):
            return
        cluster.after_message = _ignore
        await cluster.ask("s1", Delete(2, "a"))
        store = cluster.stores["s1"]
        await store.applier.flush()
        assert await store.maintenance.trim_some(store.clock.sequence, 10)
        await store.applier.flush()
        assert await store.applier.clean_some() == 1

    cluster.after_message = delete_and_forget
    move_id = cluster.plan("a")
    await cluster.spread()
    progress = await cluster.carry(move_id)
    assert (progress.step, "begins again" in progress.detail) == ("failed", True)


async def test_a_copy_that_differs_is_not_taken(cluster: Cluster, tmp_path: Path):
    for key in ("a", "b"):
        await cluster.ask("s1", Put(1, key, b"1"))

    async def lose_a_row(request: Any) -> None:
        if isinstance(request, Pull) and request.after_row < 0:
            await cluster.stores["s2"].applier.flush()
            with closing(sqlite3.connect(tmp_path / "s2.db")) as connection, connection:
                connection.execute("DELETE FROM rows WHERE key = 'a'")

    cluster.before_message = lose_a_row
    move_id = cluster.plan("a", "b")
    await cluster.spread()
    progress = await cluster.carry(move_id)
    assert (progress.step, "differs" in progress.detail) == ("failed", True)


async def test_a_damaged_row_is_not_carried_on(cluster: Cluster, tmp_path: Path):
    await cluster.ask("s1", Put(1, "a", b"1"))
    await cluster.stores["s1"].applier.flush()
    with closing(sqlite3.connect(tmp_path / "s1.db")) as connection, connection:
        connection.execute("UPDATE rows SET body = x'00' WHERE key = 'a'")
    move_id = cluster.plan("a")
    await cluster.spread()
    progress = await cluster.carry(move_id)
    assert (progress.step, "'a'" in progress.detail) == ("failed", True)


async def test_a_source_whose_row_is_not_taken_finds_that_it_is_damaged_when_the_move_begins_again(
    cluster: Cluster, tmp_path: Path
):
    """Its own verification would find it within a day; until then the move would begin again and again."""
    await cluster.ask("s1", Put(1, "a", b"1"))
    await cluster.stores["s1"].applier.flush()
    with closing(sqlite3.connect(tmp_path / "s1.db")) as connection, connection:
        connection.execute("UPDATE rows SET body = x'00' WHERE key = 'a'")
    for _ in range(2):
        assert not cluster.stores["s1"].tables.verification.damage
        move_id = cluster.plan("a")
        await cluster.spread()
        assert (await cluster.carry(move_id)).step == "failed"
        cluster.void(move_id)
        await cluster.spread()
    assert "'a'" in cluster.stores["s1"].tables.verification.damage


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


async def test_a_map_that_is_older_changes_nothing(cluster: Cluster):
    old = cluster.map
    await cluster.move("a")
    view = cluster.stores["s1"].partitions.view
    assert not await cluster.stores["s1"].partitions.adopt(old)
    assert cluster.stores["s1"].partitions.view == view
    assert view != View()


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


async def test_what_comes_after_the_comparison_is_compared_again(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    fenced = await cluster.stores["s1"].partitions.freeze(move_id)
    store = cluster.stores["s2"]
    await store.migration.complete(move_id, fenced, [])
    other = next(key for key in map(str, range(10_000)) if at(key) == at("a"))
    row = ("value", other, at("a"), 1, 0, b"x", None, checksum("value", other, 1, 0, b"x"))
    await store.migration.take(move_id, [row])
    with pytest.raises(Conflict, match="differs"):
        await store.migration.complete(move_id, fenced, [])


# --- any order of changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_between_the_steps_the_shards_say_what_a_dictionary_would(tmp_path: Path, seed: int):
    """Random writes between any two messages of random moves, restarts, moves that are given up, and back again."""
    choose = random.Random(seed)
    keys = [f"key-{number}" for number in range(30)]
    model: dict[str, bytes] = {}
    versions: dict[str, int] = {}
    async with cluster_of_two(tmp_path, move_page_rows_max=5) as cluster:

        async def write(_: Any = None) -> None:
            for _ in range(choose.randrange(4)):
                key, value = choose.choice(keys), str(choose.random()).encode()
                request = choose.choice([Put(1, key, value), Delete(1, key), Put(1, key, value, 3_600_000)])
                answer = await cluster.ask(cluster.owner(key), request)
                if answer.status == 421:
                    continue  # fenced: no shard answers for it
                if isinstance(request, Put):
                    model[key] = value
                else:
                    assert (answer.status == 204) == (key in model)
                    model.pop(key, None)
                if answer.status != 404:
                    assert answer.version > versions.get(key, 0)
                    versions[key] = answer.version

        cluster.before_message = cluster.after_message = write
        for _ in range(6):
            await write()
            to = choose.choice(["s1", "s2"])
            owned = [p for p, owner in enumerate(cluster.map.owners) if owner != (0 if to == "s1" else 1)]
            if not owned:
                continue
            move_id = cluster.plan(to=to, spare=choose.sample(owned, choose.randint(1, len(owned))))
            await cluster.spread()
            progress = await cluster.carry(move_id, to)
            assert progress.step == "done", progress.detail
            if choose.random() < 0.3:
                await cluster.restart(choose.choice(["s1", "s2"]))
            if choose.random() < 0.7:
                cluster.commit(move_id)
            else:
                cluster.void(move_id)
            await cluster.spread(*choose.sample(["s1", "s2"], 2))
            found = {}
            for key in keys:
                answers = {shard_id: await cluster.value(shard_id, key) for shard_id in ("s1", "s2")}
                assert list(answers.values()).count(421) == 1, "one shard answers"
                found[key] = answers[cluster.owner(key)]
            assert {key: value for key, value in found.items() if value is not None} == model
            assert sum(store.inspection.snapshot().keys for store in cluster.stores.values()) == len(model)


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
