"""Idempotency keys: the reply is a row of the batch that has the effect, and is looked for again in that very batch."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.model import IdempotencyKey, Preconditions
from kvstore.protocol import Answer, Delete, Put, Release, Renew
from kvstore.storage.rows import REPLY
from kvstore.store.ops import EndWait, Expire, WriteOp
from kvstore.store.store import Store
from tests.unit.store.harness import Bench, Sink, TurnedTime, acquire, ask, asked, code, opened, token
from tests.unit.store.real_files import copy_files
from tests.unit.waiting import until

K = IdempotencyKey("key", "digest")
OTHER = IdempotencyKey("key", "another digest")


def shown(answer: Answer) -> tuple[int, int, object, int, object]:
    """All of an answer but its id, an empty value being none."""
    return answer.status, answer.version, answer.value or None, answer.ttl_left_ms, answer.problem


def test_a_repeated_put_gives_the_first_answer_again_and_writes_nothing():
    bench = Bench()
    first = bench.one(Put(1, "k", b"v", 0, None, K))
    clock = bench.clock
    again = bench.one(Put(2, "k", b"v", 0, None, K))
    assert shown(again) == shown(first) == (201, first.version, None, 0, None)
    assert bench.clock == clock
    bench.one(Put(3, "k", b"another client's"))
    assert shown(bench.one(Put(4, "k", b"v", 0, None, K))) == shown(first)
    assert bench.value("k") == b"another client's"


def test_a_repeated_delete_gives_the_first_answer_again():
    bench = Bench()
    bench.one(Put(1, "k", b"v"))
    first = bench.one(Delete(2, "k", None, K))
    bench.one(Put(3, "k", b"new"))
    assert shown(bench.one(Delete(4, "k", None, K))) == shown(first)
    assert bench.value("k") == b"new"


def test_that_there_was_nothing_to_delete_is_an_answer_to_keep():
    bench = Bench()
    assert bench.one(Delete(1, "k", None, K)).status == 404
    bench.one(Put(2, "k", b"new"))
    assert bench.one(Delete(3, "k", None, K)).status == 404
    assert bench.value("k") == b"new"


def test_a_condition_that_failed_is_an_answer_to_keep():
    bench = Bench()
    first = bench.one(Put(1, "k", b"v", 0, Preconditions(versions=[7]), K))
    assert (first.status, code(first)) == (412, "precondition-failed")
    bench.clock = bench.clock._replace(version=6)
    bench.one(Put(2, "k", b"x"))
    again = bench.one(Put(3, "k", b"v", 0, Preconditions(versions=[7]), K))
    assert shown(again) == shown(first)


def test_duplicates_in_one_batch_have_one_effect():
    bench = Bench()
    answers = bench.run(*[Put(number, "k", b"v", 0, Preconditions(absent=True), K) for number in range(20)])
    assert {shown(answer) for answer in map(plain, answers)} == {(201, answers[0].version, None, 0, None)}
    assert [answer.id for answer in answers] == list(range(20))
    assert len(bench.replies()) == 1


def plain(answer: Answer) -> Answer:
    assert answer.problem is None
    return answer


def test_another_request_under_the_same_key_is_refused_and_does_not_take_its_place():
    bench = Bench()
    first = bench.one(Put(1, "k", b"v", 0, None, K))
    for _ in range(2):
        refused = bench.one(Put(2, "k", b"w", 0, None, OTHER))
        assert (refused.status, code(refused)) == (422, "idempotency-key-reused")
    assert shown(bench.one(Put(3, "k", b"v", 0, None, K))) == shown(first)
    assert bench.value("k") == b"v"


def test_a_key_belongs_to_method_and_key():
    bench = Bench()
    assert bench.one(Put(1, "a", b"v", 0, None, K)).status == 201
    assert bench.one(Put(2, "b", b"v", 0, None, K)).status == 201
    assert bench.one(Delete(3, "a", None, K)).status == 204
    assert bench.one(acquire("a", once=K)).status == 201


@pytest.mark.parametrize("ending", ["held", "full disk", "full queue"])
def test_an_answer_that_decided_nothing_is_not_kept(ending: str):
    bench = Bench(waiters_max=1)
    op: WriteOp = Put(1, "k", b"v", 0, None, K)
    holder = 0
    if ending == "full disk":
        bench.frees_only = True
    else:
        holder = bench.acquire("k")
    if ending == "full queue":
        op = acquire("k", wait_s=60, once=K)
        bench.run(acquire("k", wait_s=60, op_id=99))
    status = {"held": 423, "full disk": 507, "full queue": 429}[ending]
    assert bench.one(op).status == status
    assert bench.replies() == []
    bench.frees_only = False
    if holder:
        bench.run(Release(4, "k", holder))
    if ending == "full queue":
        bench.run(Release(6, "k", bench.lease("k").token))
    assert bench.one(op).status == 201


def test_a_kept_reply_counts_for_a_write_whose_lock_is_lost_since():
    bench = Bench()
    mine = bench.acquire("k")
    first = bench.one(Put(1, "k", b"v", 0, token(mine), K))
    bench.run(Release(2, "k", mine))
    assert shown(bench.one(Put(3, "k", b"v", 0, token(mine), K))) == shown(first)
    assert code(bench.one(Put(4, "k", b"v", 0, token(mine)))) == "lock-lost"


def test_a_write_that_was_refused_for_its_lost_lock_stays_refused():
    bench = Bench()
    mine = bench.acquire("k")
    bench.run(Release(1, "k", mine))
    for number in (2, 3):
        assert code(bench.one(Put(number, "k", b"v", 0, token(mine), K))) == "lock-lost"
    assert bench.value("k") is None


# --- locks ------------------------------------------------------------------------------------------------------------


def test_a_repeated_acquire_whose_grant_stands_renews_it():
    bench = Bench()
    first = bench.one(acquire("k", 10, once=K))
    bench.now_s += 8
    again = bench.one(acquire("k", 10, once=K))
    assert (again.status, again.version) == (201, first.version)
    assert bench.lease("k").deadline_s == bench.now_s + 10


@pytest.mark.parametrize("ending", ["released", "expired", "past its deadline", "another client's"])
def test_a_repeated_acquire_whose_grant_is_over_answers_lock_lost(ending: str):
    bench = Bench()
    first = bench.one(acquire("k", 10, once=K))
    if ending == "past its deadline":
        bench.now_s += 10
    else:
        bench.run(Release(1, "k", first.version))
    if ending == "another client's":
        bench.acquire("k")
    writes = None
    for _ in range(3):
        again = bench.one(acquire("k", 10, once=K))
        assert (again.status, code(again)) == (412, "lock-lost")
        assert writes is None or bench.clock.sequence == writes  # what is over is over: nothing more is written
        writes = bench.clock.sequence


def test_a_waiter_is_not_overtaken_by_a_repeated_acquire_of_a_lease_past_its_deadline():
    bench = Bench()
    bench.one(acquire("k", 10, once=K))
    bench.run(acquire("k", wait_s=60, op_id=1))
    bench.now_s += 10
    answers = bench.run(acquire("k", 10, once=K, op_id=2))
    assert [(answer.id, answer.status) for answer in answers] == [(1, 201), (2, 412)]


def test_a_duplicate_that_waits_in_the_queue_gets_the_first_ones_grant():
    bench = Bench()
    holder = bench.acquire("k")
    bench.run(
        acquire("k", wait_s=60, once=K, op_id=1),
        acquire("k", wait_s=60, op_id=2),
        acquire("k", wait_s=60, once=K, op_id=3),
        acquire("k", wait_s=60, once=OTHER, op_id=4),
    )
    answers = {answer.id: answer for answer in bench.run(Release(9, "k", holder))}
    assert answers.keys() == {1, 3, 9}
    assert answers[1].version == answers[3].version == bench.lease("k").token
    answers = {answer.id: answer for answer in bench.run(Release(9, "k", answers[1].version))}
    assert answers.keys() == {2, 9}
    answers = {answer.id: answer for answer in bench.run(Release(9, "k", answers[2].version))}
    assert code(answers[4]) == "idempotency-key-reused"
    assert bench.locks.lease("k") is None


def test_a_duplicate_gets_the_grant_of_one_whose_connection_is_gone():
    bench = Bench()
    holder = bench.acquire("k")
    gone = Sink()
    bench.run((acquire("k", wait_s=60, once=K, op_id=1), gone), acquire("k", wait_s=60, once=K, op_id=2))
    gone.closed = True
    assert [(answer.id, answer.status) for answer in bench.run(Release(9, "k", holder))] == [(2, 201), (9, 204)]


def test_a_wait_that_ended_in_vain_is_not_kept():
    bench = Bench()
    holder = bench.acquire("k")
    waiter = acquire("k", wait_s=1, once=K)
    bench.run(waiter)
    assert [answer.status for answer in bench.run(EndWait("k", waiter))] == [423, 200]
    bench.run(Release(1, "k", holder))
    assert bench.one(acquire("k", wait_s=1, once=K)).status == 201


def test_a_repeated_renewal_gives_the_first_answer_again_all_of_it():
    bench = Bench()
    mine = bench.one(acquire("k", 10, owner="me")).version
    first = bench.one(Renew(1, "k", mine, K))
    bench.now_s += 5
    assert shown(bench.one(Renew(2, "k", mine, K))) == shown(first) == (200, mine, b"me", 10_000, None)
    assert bench.lease("k").deadline_s == bench.now_s + 5  # not renewed a second time
    bench.run(Release(3, "k", mine))
    assert shown(bench.one(Renew(4, "k", mine, K))) == shown(first)


def test_a_repeated_release_gives_the_first_answer_again_and_ends_no_other_lease():
    bench = Bench()
    mine = bench.acquire("k")
    first = bench.one(Release(1, "k", mine, K))
    theirs = bench.acquire("k")
    assert shown(bench.one(Release(2, "k", mine, K))) == shown(first)
    assert bench.lease("k").token == theirs
    assert code(bench.one(Release(3, "k", mine))) == "lock-lost"


# --- how long ---------------------------------------------------------------------------------------------------------


def later(bench: Bench, ms: int) -> None:
    """By every clock."""
    bench.now_ms += ms
    bench.now_s += ms / 1000


def test_a_reply_is_kept_for_its_time_and_then_the_key_is_free_again():
    bench = Bench()
    first = bench.one(Put(1, "k", b"v", 0, None, K))
    later(bench, bench.kept_ms - 1)
    assert shown(bench.one(Put(2, "k", b"v", 0, None, K))) == shown(first)
    assert bench.one(Put(3, "k", b"w", 0, None, OTHER)).status == 422
    later(bench, 1)
    again = bench.one(Put(4, "k", b"w", 0, None, OTHER))
    assert (again.status, bench.value("k")) == (204, b"w")
    assert shown(bench.one(Put(5, "k", b"w", 0, None, OTHER))) == shown(again)


def test_a_reply_past_its_time_is_expired_in_the_partition_of_its_target():
    bench = Bench()
    bench.one(Put(1, "k", b"v", 0, None, K))
    (row,) = bench.replies()
    later(bench, bench.kept_ms - 1)
    assert bench.one(Expire(row.key, REPLY, row.partition)).status == 200
    later(bench, 1)
    assert bench.one(Expire(row.key, REPLY, row.partition)).status == 410
    assert bench.replies() == []
    assert bench.batch.changes.expired == 0  # no key of a client's
    assert bench.rows.rows[REPLY, row.key].partition == row.partition
    assert (bench.clock.keys, bench.clock.bytes) == (1, 2)


@pytest.mark.parametrize("step_s", [660, -86_400])
def test_a_step_of_the_wall_clock_neither_forgets_a_reply_nor_keeps_it_longer(step_s: int):
    bench = Bench()
    first = bench.one(Put(1, "k", b"v", 0, None, K))
    bench.now_ms += 1000 * step_s
    assert shown(bench.one(Put(2, "k", b"v", 0, None, K))) == shown(first)
    (row,) = bench.replies()
    assert bench.one(Expire(row.key, REPLY, row.partition)).status == 200  # as the sweep does
    later(bench, bench.kept_ms - 1)
    assert shown(bench.one(Put(3, "k", b"v", 0, None, K))) == shown(first)
    later(bench, 1)
    assert bench.one(Put(4, "k", b"w", 0, None, OTHER)).status == 204


def test_a_reply_that_a_step_made_due_has_a_later_deadline_so_that_the_sweep_ends():
    bench = Bench()
    bench.one(Put(1, "k", b"v", 0, None, K))
    later(bench, 1000)
    bench.now_ms += 660_000
    (row,) = bench.replies()
    bench.one(Expire(row.key, REPLY, row.partition))
    (row,) = bench.replies()
    assert row.expires_at_ms == bench.now_ms + bench.kept_ms - 1000
    later(bench, bench.kept_ms - 1000)
    assert bench.one(Expire(row.key, REPLY, row.partition)).status == 410


def test_after_a_boot_and_on_another_machine_the_wall_clock_counts(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    first = bench.one(Put(1, "k", b"v", 0, None, K))
    bench.boot = "another"
    bench.now_s = 3.0
    bench.now_ms += bench.kept_ms - 1
    assert shown(bench.one(Put(2, "k", b"v", 0, None, K))) == shown(first)
    bench.now_ms += 1
    assert bench.one(Put(3, "k", b"w", 0, None, OTHER)).status == 204


# --- a store ----------------------------------------------------------------------------------------------------------


async def applied_reply_rows(store: Store) -> list[tuple[str, bool]]:
    await store.applier.flush()
    return reply_rows(store.path)


def reply_rows(file: Path) -> list[tuple[str, bool]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT key, body IS NULL FROM rows WHERE kind = 'reply'").fetchall()


async def test_replies_survive_a_crash(tmp_path: Path):
    crashed = tmp_path / "crashed"
    async with opened(tmp_path, apply_delay_s=3600.0) as store:
        put = await ask(store, Put(1, "k", b"v", 0, None, K))
        granted = await ask(store, acquire("lock", 60, once=K))
        copy_files(tmp_path, crashed)
    async with opened(crashed) as store:
        assert shown(await ask(store, Put(2, "k", b"v", 0, None, K))) == shown(put)
        assert code(await ask(store, Put(3, "k", b"w", 0, None, OTHER))) == "idempotency-key-reused"
        assert (await ask(store, acquire("lock", 60, once=K))).version == granted.version


async def test_the_sweep_expires_replies_whose_time_is_over(tmp_path: Path):
    turned = TurnedTime()
    async with opened(tmp_path, turned, idempotency_kept_s=60, expiry_sweep_s=0.05) as store:
        await ask(store, Put(1, "k", b"v", 0, None, K))
        assert [deleted for _, deleted in await applied_reply_rows(store)] == [0]
        turned.wall_step_s = turned.monotonic_step_s = 61
        await until(lambda: [deleted for _, deleted in reply_rows(tmp_path / "store.db")] == [1])
        assert store.tables.stats.expired == 0


async def test_the_sweep_leaves_replies_alone_that_only_the_wall_clock_made_old(tmp_path: Path):
    turned = TurnedTime()
    async with opened(tmp_path, turned, idempotency_kept_s=600, expiry_sweep_s=0.05, expiry_ops_max=2) as store:
        for number in range(5):
            await ask(store, Put(1, f"k{number}", b"v", 0, None, K))
        await ask(store, Put(1, "goes", b"v", 60_000))
        turned.wall_step_s = 660
        await until(lambda: store.tables.stats.expired == 1)  # the sweep has been there, and has come to an end
        assert [deleted for _, deleted in await applied_reply_rows(store)] == [0] * 5
        for number in range(5):
            assert (await ask(store, Put(2, f"k{number}", b"v", 0, None, K))).status == 201


async def test_twenty_duplicates_at_once_have_one_effect(tmp_path: Path):
    async with opened(tmp_path) as store:
        sinks = [asked(store, Put(number, "k", b"v", 0, Preconditions(absent=True), K)) for number in range(20)]
        answers = [await sink.answer() for sink in sinks]
        assert {(answer.status, answer.version) for answer in answers} == {(201, answers[0].version)}
        assert len(await applied_reply_rows(store)) == 1
