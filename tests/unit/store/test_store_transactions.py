"""A store's part in transactions, on a real file: what is durable, who waits, what readers see."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvstore.model import Attempt, Condition, Read, TxnOp
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    ApplyIntents,
    Count,
    DecideCommit,
    Delete,
    Get,
    GetTxn,
    Outcome,
    Prepare,
    Put,
    ReadLock,
    Reads,
    ReadUnlock,
    ResolveTxn,
    Scan,
    Transact,
    Vote,
)
from kvstore.storage.engine import FeedQuery, RowKey
from kvstore.store.ops import DropDecisions
from kvstore.store.store import Store
from tests.unit.store.harness import PARTITIONS, Sink, StandingTime, opened
from tests.unit.waiting import until

FIRST = Attempt(100, 100, "router01")
SECOND = Attempt(200, 200, "router02")
THIRD = Attempt(300, 300, "router03")


def put(key: str, value: bytes = b"new") -> TxnOp:
    return TxnOp("put", key, value)


def prepare(*steps: TxnOp, attempt: Attempt = FIRST, anchor: str = "elsewhere", **more: Any) -> Prepare:
    return Prepare(1, anchor, attempt, more.pop("conditions", []), list(steps), [], **more)


def commit(
    *steps: TxnOp, attempt: Attempt = FIRST, vote: int = 7, conditions: list[Condition] | None = None
) -> DecideCommit:
    return DecideCommit(1, "anchor", attempt, conditions or [], list(steps), [], vote, True, None, None, ["other"])


async def tell(store: Store, op: Any, sink: Any = None) -> Any:
    sink = sink or Sink()
    store.write(op, sink)
    async with asyncio.timeout(60):
        while not sink.replies:
            await asyncio.sleep(0.002)
    return sink.replies[0]


def began(store: Store, op: Any) -> Sink:
    sink = Sink()
    if isinstance(op, Get):
        store.get(op, sink)
    else:
        store.write(op, sink)
    return sink


async def settle() -> None:
    """Whatever could be answered now has been."""
    await asyncio.sleep(0.05)


async def test_a_prepared_key_can_be_neither_read_nor_written_until_it_is_finished(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, Put(1, "k", b"old"))
        vote = await tell(store, prepare(put("k")))
        assert isinstance(vote, Vote)
        assert vote.holds
        read = began(store, Get(1, "k"))
        await settle()
        assert not read.replies
        await tell(store, ApplyIntents(1, FIRST, ["k"], vote.vote + 1, True, 0))
        assert await read.answer() == Answer(1, 200, vote.vote + 1, b"new")
        await tell(store, prepare(put("k"), attempt=SECOND))
        writes = [began(store, op) for op in (Put(2, "k", b"later"), Delete(3, "k"))]
        await settle()
        assert not any(sink.replies for sink in writes)
        await tell(store, Abort(1, SECOND, ["k"]))
        assert [(await sink.answer()).status for sink in writes] == [204, 204]


async def test_an_aborted_prepare_leaves_the_key_as_it_was_and_its_version_too(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        before = await tell(store, Put(1, "k", b"old"))
        await tell(store, prepare(put("k"), put("absent")))
        await tell(store, Abort(1, FIRST, ["k", "absent"]))
        assert await began(store, Get(1, "k")).answer() == Answer(1, 200, before.version, b"old")
        assert (await began(store, Get(1, "absent")).answer()).status == 404
        assert (await store.inspection.explain("absent"))["row"] == "absent"
        assert store.clock.keys == 1


async def test_intents_survive_a_restart_and_hold_their_keys(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, Put(1, "k", b"old"))
        vote = await tell(store, prepare(put("k"), put("absent")))
    async with opened(tmp_path) as store:
        (hold,) = store.undecided.old_holds()  # at once: it is not known whether its router is there
        assert (hold.attempt, sorted(hold.intents)) == (FIRST, ["absent", "k"])
        write = began(store, Put(2, "k", b"later"))
        read = began(store, Get(3, "absent"))
        await settle()
        assert not write.replies
        assert not read.replies
        await tell(store, ApplyIntents(1, FIRST, ["k", "absent"], vote.vote + 1, True, 0))
        assert (await write.answer()).version > vote.vote + 1
        assert await read.answer() == Answer(3, 200, vote.vote + 1, b"new")


async def test_a_decision_survives_a_restart_and_answers_a_repeated_commit(tmp_path: Path) -> None:
    op = commit(put("anchor"), TxnOp("get", "anchor"))
    async with opened(tmp_path) as store:
        first = await tell(store, op)
        assert (first.state, first.version, first.reads) == ("committed", 8, [Read(0, None)])
    async with opened(tmp_path) as store:
        again = await tell(store, op)
        assert (again.state, again.version, again.reads, again.decided_ms) == (
            "committed", 8, [Read(0, None)], first.decided_ms,
        )  # fmt: skip
        assert (await tell(store, GetTxn(1, 0, FIRST.name))).state == "committed"
        decision = await store.undecided.decision(FIRST)
        assert decision is not None
        assert decision.keys == ["other"]


async def test_a_dropped_decision_raises_the_floor_for_good(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, commit(put("anchor")))
        await tell(store, DropDecisions([FIRST]))
    async with opened(tmp_path) as store:
        assert store.clock.attempts_floor == FIRST.stamp
        assert (await tell(store, commit(put("anchor")))).state == "gone"
        assert (await tell(store, ResolveTxn(1, "anchor", FIRST))).state == "gone"
        assert (await tell(store, commit(put("anchor"), attempt=SECOND))).state == "committed"


async def test_decisions_go_together_and_one_that_is_not_kept_here_raises_no_floor(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, commit(put("anchor")))
        await tell(store, DropDecisions([FIRST, SECOND]))
        assert store.clock.attempts_floor == FIRST.stamp < SECOND.stamp
        assert store.inspection.snapshot().decisions == 0
        assert (await tell(store, commit(put("anchor"), attempt=SECOND))).state == "committed"


async def test_an_attempt_that_was_asked_about_is_never_committed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert (await tell(store, ResolveTxn(1, "anchor", FIRST))).state == "aborted"
    async with opened(tmp_path) as store:
        assert (await tell(store, commit(put("anchor")))).state == "aborted"
        assert (await began(store, Get(1, "anchor")).answer()).status == 404


async def test_a_commit_that_was_refused_is_refused_for_good(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, Acquire(1, "anchor", 10_000, 0, "another"))
        refused = await tell(store, commit(put("anchor")))
        assert refused.status == 423
        assert (await tell(store, commit(put("other")))).state == "aborted"  # a doubled message comes late


async def test_a_lease_does_not_change_while_its_guard_stands(tmp_path: Path) -> None:
    time = StandingTime()
    async with opened(tmp_path, time) as store:
        token = (await tell(store, Acquire(1, "lock", 100, 0, "me"))).version
        vote = await tell(store, prepare(put("k"), conditions=[Condition("lock", token=token)]))
        assert vote.holds
        waiter = began(store, Acquire(2, "lock", 10_000, 5_000, "next"))
        time.now_s += 0.3
        await asyncio.sleep(0.3)  # its ttl is over, but it is not
        assert not waiter.replies
        assert (await store.inspection.explain("lock"))["lock"] == {"owner": "me", "token": token, "ttl_left": 0.0}
        await tell(store, ApplyIntents(1, FIRST, ["k", "lock"], vote.vote + 1, True, 0))
        granted = await waiter.answer()
        assert (granted.status, granted.version > token) == (201, True)


async def test_a_listing_waits_for_intents_in_its_range_and_shows_what_they_become(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for key in ("a", "b", "c"):
            await tell(store, Put(1, key, b"old"))
        vote = await tell(store, prepare(put("b"), TxnOp("delete", "c"), put("d")))
        listing = asyncio.create_task(store.scans.scan(Scan(1, "", "", 10, True)))
        counting = asyncio.create_task(store.scans.count(Count(1, "")))
        sizes = asyncio.create_task(store.scans.scan(Scan(1, "", "", 10, True, value_bytes_max=2)))
        await settle()
        assert not listing.done()
        await tell(store, ApplyIntents(1, FIRST, ["b", "c", "d"], vote.vote + 1, True, 0))
        items = [(key, value) for key, _, value, _ in (await listing).items]
        assert items == [("a", b"old"), ("b", b"new"), ("d", b"new")]
        assert (await counting).count == 3
        page = await sizes
        assert ([item[2] for item in page.items], page.left_out) == ([None] * 3, {"a": 3, "b": 3, "d": 3})


async def test_reads_under_shared_locks_keep_writers_out_until_they_are_let_go(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, Put(1, "k", b"old"))
        reads = await tell(store, ReadLock(1, FIRST, ["k", "absent"]))
        assert isinstance(reads, Reads)
        assert [read.value for read in reads.reads] == [b"old", None]
        others = await tell(store, ReadLock(1, SECOND, ["k"]))
        write = began(store, Put(2, "k", b"new"))
        assert (await began(store, Get(3, "k")).answer()).value == b"old"  # plain reads wait for no lock
        assert (await tell(store, ReadUnlock(1, ["k"], others.lock))).status == 200
        await settle()
        assert not write.replies
        assert (await tell(store, ReadUnlock(1, ["k", "absent"], reads.lock))).status == 200
        assert (await write.answer()).status == 204
        assert (await tell(store, ReadUnlock(1, ["k", "absent"], reads.lock))).status == 409  # not twice


async def test_locks_of_an_earlier_opening_are_not_confirmed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        reads = await tell(store, ReadLock(1, FIRST, ["k"]))
    async with opened(tmp_path) as store:
        await tell(store, ReadLock(1, SECOND, ["k"]))
        assert (await tell(store, ReadUnlock(1, ["k"], reads.lock))).status == 409


async def test_locks_for_reads_end_with_their_connection(tmp_path: Path) -> None:
    async with opened(tmp_path, expiry_sweep_s=0.05) as store:
        sink = Sink()
        reads = await tell(store, ReadLock(1, FIRST, ["k"]), sink)
        write = began(store, Put(2, "k", b"new"))
        sink.closed = True
        assert (await write.answer()).status == 201
        assert (await tell(store, ReadUnlock(1, ["k"], reads.lock))).status == 409


async def test_no_client_waits_for_a_lock_longer_than_a_transaction_may_take(tmp_path: Path) -> None:
    async with opened(tmp_path, expiry_sweep_s=0.05, txn_timeout_s=0.3) as store:
        await tell(store, prepare(put("k")))
        refused = await began(store, Put(2, "k", b"new")).answer()
        assert (refused.status, (refused.problem or {})["code"]) == (409, "conflict")


async def test_a_younger_prepare_dies_and_an_older_one_waits(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, prepare(put("k"), attempt=SECOND))
        older = began(store, prepare(put("a"), put("k"), attempt=FIRST))
        younger = await tell(store, prepare(put("k"), attempt=THIRD))
        assert younger.status == 409
        await settle()
        assert not older.replies
        await tell(store, Abort(1, SECOND, ["k"]))
        await until(lambda: older.replies)
        assert isinstance(older.replies[0], Vote)


async def test_a_client_that_holds_nothing_may_wait_behind_any_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, prepare(put("k"), attempt=FIRST))
        younger = began(store, prepare(put("a"), put("k"), attempt=SECOND, first="k"))
        await settle()
        assert not younger.replies
        assert isinstance(await tell(store, prepare(put("a"), attempt=THIRD)), Vote)  # it has no "a"
        await tell(store, Abort(1, FIRST, ["k"]))
        await settle()
        assert not younger.replies  # now it holds "k", and waits for "a", which a younger one has
        await tell(store, Abort(1, THIRD, ["a"]))
        await until(lambda: younger.replies)
        assert isinstance(younger.replies[0], Vote)


async def test_who_stands_behind_one_that_holds_nothing_must_be_older_than_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, prepare(put("k"), attempt=FIRST))
        began(store, prepare(put("k"), attempt=SECOND, first="k"))
        assert (await tell(store, prepare(put("k"), attempt=THIRD))).status == 409


async def test_what_one_transaction_reads_is_bounded(tmp_path: Path) -> None:
    async with opened(tmp_path, txn_read_bytes_max=1000) as store:
        for key in ("a", "b", "anchor"):
            await tell(store, Put(1, key, b"x" * 600))
        gets = [TxnOp("get", "a"), TxnOp("get", "b")]
        for op in (
            Transact(1, "a", FIRST, [], gets, []),
            prepare(*gets, put("c")),
            ReadLock(1, FIRST, ["a", "b"]),
            commit(*gets, put("anchor")),
        ):
            refused = await tell(store, op)
            assert (refused.status, refused.problem["code"]) == (413, "read-too-large")
        assert store.undecided.old_holds() == []
        assert (await tell(store, Put(1, "a", b"not locked"))).status == 204
        assert isinstance(await tell(store, commit(put("anchor"))), Outcome)  # refused for good
        assert (await began(store, Get(1, "anchor")).answer()).value == b"x" * 600


async def test_a_damaged_row_refuses_the_prepare_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await tell(store, Put(1, "a", b"1"))
        await tell(store, Put(1, "b", b"2"))
        await store.applier.flush()
        store.tables.cache.clear()
        with closing(sqlite3.connect(store.path)) as connection, connection:
            connection.execute("UPDATE rows SET body = x'00' WHERE key = 'b'")
        refused = await tell(store, prepare(put("a"), put("b")))
        assert (refused.status, refused.problem["code"]) == (500, "data-corrupt")
        assert (await tell(store, Put(2, "a", b"free"))).status == 204


async def test_old_intents_are_counted_and_explained(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        vote = await tell(store, prepare(put("k")))
        assert list(store.inspection.in_doubt()) == [FIRST.name]
        assert store.inspection.snapshot().in_doubt == 1
        intent = (await store.inspection.explain("k"))["intent"]
        assert (intent["anchor"], intent["vote"], intent["txn"].endswith(FIRST.name)) == ("elsewhere", vote.vote, True)
        await store.applier.flush()
        page = await store.tables.engine.feed(FeedQuery(list(range(PARTITIONS)), 0, -1, 10, 1 << 20))
        assert page.rows[0][6] is not None


@pytest.mark.parametrize("order", [("finish", "prepare"), ("abort", "prepare")])
async def test_a_prepare_that_is_repeated_late_does_not_undo_what_was_written_since(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    async with opened(tmp_path) as store:
        op = prepare(put("k", b"once"))
        vote = await tell(store, op)
        version = vote.vote + 1
        if order[0] == "finish":
            await tell(store, ApplyIntents(1, FIRST, ["k"], version, True, 0))
        else:
            await tell(store, Abort(1, FIRST, ["k"]))
        await tell(store, Put(2, "k", b"since"))
        late = await tell(store, op)
        assert isinstance(late, Vote)
        if order[0] == "finish":  # a reader of the intent is told "committed at that version"
            await tell(store, ApplyIntents(1, FIRST, ["k"], version, True, 0))
        else:
            await tell(store, Abort(1, FIRST, ["k"]))
        assert (await began(store, Get(1, "k")).answer()).value == b"since"


async def test_a_get_is_answered_although_ever_more_transactions_stand_in_line(tmp_path: Path) -> None:
    """Each prepare that is let go on leaves its intent in the batch in which the one before it is finished."""

    def stand_in_line(number: int) -> tuple[Attempt, Sink]:
        attempt = Attempt(number, number, "router01")
        return attempt, began(store, prepare(put("k", b"%d" % number), attempt=attempt, first="k"))

    async with opened(tmp_path) as store:
        line = [stand_in_line(number) for number in range(1, 4)]
        await until(lambda: line[0][1].replies)
        reading = began(store, Get(2, "k"))
        await settle()
        assert reading.replies == []
        for number in range(4, 8):
            attempt, sink = line.pop(0)
            line.append(stand_in_line(number))
            await until(lambda sink=sink: sink.replies)
            (vote,) = sink.replies
            assert isinstance(vote, Vote)
            await tell(store, ApplyIntents(3, attempt, ["k"], vote.vote + 1, True, 0))
        assert (await reading.answer()).value == b"1"
        for attempt, _ in line:
            await tell(store, Abort(4, attempt, ["k"]))


async def test_a_read_whose_intent_is_gone_when_its_find_is_looked_at_is_answered(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        vote = await tell(store, prepare(put("k")))
    async with opened(tmp_path) as store:  # nothing is in the cache
        found_in_file, go_on = store.tables.engine.read, asyncio.Event()

        async def read_slowly(keys: list[RowKey]) -> Any:
            store.tables.engine.read = found_in_file  # what is read for the finish is not slow
            found = await found_in_file(keys)
            await go_on.wait()
            return found

        store.tables.engine.read = read_slowly  # type: ignore[method-assign]
        reading = began(store, Get(2, "k"))
        await settle()
        assert (await tell(store, ApplyIntents(3, FIRST, ["k"], vote.vote + 1, True, 0))).status == 200
        go_on.set()
        assert (await reading.answer()).value == b"new"
        assert store.reads._blocked_count == 0


async def test_a_key_that_is_due_under_a_dead_readers_lock_is_let_go_in_time(tmp_path: Path) -> None:
    """Its expiry waits for the lock, and what ends such waits must not wait for the expiry."""
    async with opened(tmp_path, expiry_sweep_s=0.05, txn_timeout_s=0.3, request_timeout_s=2.0) as store:
        await tell(store, Put(1, "k", b"v", 150))
        reader = began(store, ReadLock(2, FIRST, ["k"]))
        await until(lambda: reader.replies)
        await asyncio.sleep(0.2)  # the deadline
        reader.closed = True
        assert (await tell(store, Put(3, "k", b"w"))).status == 201
