"""Leases as rows: what one batch does with them."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.model import IdempotencyKey
from kvstore.protocol import Answer, CancelWait, Delete, GetLock, Put, Release, Renew
from kvstore.storage.rows import LEASE, VALUE
from kvstore.store.ops import Expire, ExpireLease
from tests.unit.store.harness import (
    PARTITIONS,
    Bench,
    Sink,
    acquire,
    code,
    token,
)


def test_a_release_and_the_next_grant_are_one_batch():
    bench = Bench()
    first = bench.acquire("k")
    assert bench.run(acquire("k", wait_s=5)) == []
    granted, released = bench.run(Release(0, "k", first))
    assert (granted.status, released.status) == (201, 204)
    assert granted.version > first
    assert bench.lease("k").token == granted.version


def test_an_expiry_and_the_next_grant_are_one_batch():
    bench = Bench()
    first = bench.acquire("k", 10)
    bench.run(acquire("k", wait_s=60))
    bench.now_s += 10
    granted, expired = bench.run(ExpireLease("k"))
    assert (granted.status, expired.status) == (201, 200)
    assert granted.version > first


def test_a_holders_put_does_not_stand_behind_those_who_wait_for_its_lease():
    bench = Bench()
    mine = bench.acquire("k")
    answers = bench.run(
        acquire("k", wait_s=60, op_id=1),
        acquire("k", wait_s=60, op_id=2),
        Put(3, "k", b"v", 0, token(mine)),
        Renew(4, "k", mine),
        Delete(5, "k", token(mine)),
        GetLock(6, "k"),
    )
    assert [(answer.id, answer.status) for answer in answers] == [(3, 201), (4, 200), (5, 204), (6, 200)]
    assert msgspec.json.decode(answers[-1].value or b"")["waiting"] == 2


def test_an_expiry_is_a_tombstone_among_the_rows_and_a_step_of_the_clock():
    bench = Bench()
    granted = bench.acquire("k", 10)
    bench.now_s += 10
    assert bench.lease("k").token == granted  # no reader has looked, so it stands
    bench.run(ExpireLease("k"))
    row = bench.rows.rows[LEASE, "k"]
    assert row.body is None
    assert row.version > granted
    assert row.version == bench.clock.version


def test_a_lease_that_was_renewed_in_time_does_not_end_at_its_old_deadline():
    bench = Bench()
    mine = bench.acquire("k", 10)
    bench.now_s += 9
    assert bench.one(Renew(1, "k", mine)).ttl_left_ms == 10_000
    bench.now_s += 9
    bench.run(ExpireLease("k"))
    assert bench.lease("k").token == mine


def test_what_meets_a_lease_past_its_deadline_ends_it_first():
    bench = Bench()
    for number, (late, status) in enumerate(
        [
            (lambda t: Renew(1, "k", t), 412),
            (lambda t: Release(1, "k", t), 412),
            (lambda t: Put(1, "k", b"late", 0, token(t)), 412),
            (lambda t: Delete(1, "k", token(t)), 412),
            (lambda t: GetLock(1, "k"), 404),
            (lambda t: Put(1, "k", b"free"), 201),
        ]
    ):
        mine = bench.acquire("k", 10)
        bench.now_s += 10
        answer = bench.one(late(mine))
        assert answer.status == status, number
        assert code(answer) == ("lock-lost" if status == 412 else "")
        assert bench.locks.lease("k") is None
    assert bench.value("k") == b"free"


def test_a_token_rises_through_release_expiry_delete_and_restart():
    bench = Bench()
    tokens = []
    for ending in ("release", "expire", "delete", "restart", "trim"):
        mine = bench.acquire("k", 10)
        tokens.append(mine)
        if ending == "expire":
            bench.now_s += 10
            bench.run(ExpireLease("k"))
        elif ending == "delete":
            bench.run(Put(1, "k", b"v", 0, token(mine)), Delete(2, "k", token(mine)), Release(3, "k", mine))
        elif ending == "restart":
            bench.open()
            assert bench.lease("k").token == mine
            bench.run(Release(1, "k", mine))
        else:
            bench.run(Release(1, "k", mine))
        if ending == "trim":
            bench.rows.rows.clear()  # the tombstone is gone, too: only the clock's row knows
    tokens.append(bench.acquire("k"))
    assert tokens == sorted(set(tokens))


def test_waiters_who_have_left_are_passed_over():
    bench = Bench()
    mine = bench.acquire("k")
    sinks = [Sink() for _ in range(4)]
    bench.run(*[(acquire("k", wait_s=60, op_id=number), sink) for number, sink in enumerate(sinks)])
    sinks[0].closed = sinks[1].closed = True
    answers = bench.run(Release(9, "k", mine))
    assert [(answer.id, answer.status) for answer in answers] == [(2, 201), (9, 204)]
    assert [op.id for op, _ in bench.locks.waiting_for_lease("k")] == [3]


def test_a_client_that_leaves_is_answered_and_only_by_its_own_connection():
    bench = Bench()
    bench.acquire("k")
    mine, other = Sink(), Sink()
    bench.run((acquire("k", wait_s=60, op_id=7), mine), (acquire("k", wait_s=60, op_id=7), other))
    bench.run((CancelWait(8, "k", 7), other))
    assert [reply.id for reply in other.replies] == [7, 8]
    assert mine.replies == []
    assert len(bench.locks.waiting_for_lease("k")) == 1


def once(key: str = "K") -> IdempotencyKey:
    return IdempotencyKey(key, "digest")


def test_a_grant_that_its_only_asker_has_not_taken_is_given_back_and_its_reply_forgotten():
    bench, asker = Bench(), Sink()
    asked = acquire("k", once=once())
    bench.run((asked, asker))
    token = bench.lease("k").token
    assert bench.one(Release(9, "k", token, None, asked.id)).status == 412  # of another connection
    answers = bench.run((Release(9, "k", token, None, asked.id), asker))
    assert [answer.status for answer in answers] == [204]
    assert bench.locks.lease("k") is None
    again = bench.one(acquire("k", once=once()))
    assert again.status == 201
    assert again.version > token


@pytest.mark.parametrize("how", ["waited, too", "came later"])
def test_a_grant_that_a_duplicate_was_told_of_is_not_given_back(how: str):
    bench, asker = Bench(), Sink()
    first = bench.acquire("k")
    asked = acquire("k", wait_s=5, once=once())
    bench.run((asked, asker))
    if how == "waited, too":
        bench.run(acquire("k", wait_s=5, once=once()))
    bench.run(Release(9, "k", first))
    if how == "came later":
        assert bench.one(acquire("k", wait_s=5, once=once())).status == 201
    token = bench.lease("k").token
    (answer,) = bench.run((Release(9, "k", token, None, asked.id), asker))
    assert answer.status == 412
    assert bench.lease("k").token == token


def test_what_is_withdrawn_leaves_the_queue_and_the_others_go_on():
    bench, leaves = Bench(), Sink()
    token = bench.acquire("k")
    bench.run((acquire("k", wait_s=5, once=once()), leaves), acquire("k", wait_s=5, once=once("other"), op_id=7))
    answers = bench.run(Release(1, "k", 0, withdraw="K"), Release(2, "k", token))
    assert [(answer.id, code(answer)) for answer in answers if answer.id != leaves.replies[0].id] == [
        (1, ""), (7, ""), (2, ""),
    ]  # fmt: skip
    assert [code(reply) for reply in leaves.replies if isinstance(reply, Answer)] == ["lock-lost"]


def test_what_was_granted_and_is_withdrawn_goes_to_the_next_and_a_late_duplicate_is_refused():
    bench = Bench()
    assert bench.one(acquire("k", once=once())).status == 201
    bench.run(acquire("k", wait_s=5, op_id=7))
    answers = bench.run(Release(1, "k", 0, withdraw="K"))
    assert [(answer.id, answer.status) for answer in answers] == [(7, 201), (1, 204)]
    assert code(bench.one(acquire("k", once=once()))) == "lock-lost"
    assert bench.one(Release(2, "k", 0, withdraw="K")).status == 204  # again
    assert bench.lease("k").token == answers[0].version


def test_an_acquire_that_comes_after_its_withdrawal_is_refused():
    bench = Bench()
    assert bench.one(Release(1, "k", 0, withdraw="K")).status == 204
    assert code(bench.one(acquire("k", once=once()))) == "lock-lost"
    assert bench.one(acquire("k", once=once("another"))).status == 201


def test_a_full_queue_refuses_the_next_waiter_with_429():
    bench = Bench(waiters_max=2)
    bench.acquire("k")
    answers = bench.run(*[acquire("k", wait_s=60, op_id=number) for number in (1, 2, 3)])
    assert [(answer.id, code(answer)) for answer in answers] == [(3, "too-many-requests")]


def test_on_a_full_disk_no_client_is_granted_anything_and_releases_go_on():
    bench = Bench()
    mine = bench.acquire("k")
    bench.run(acquire("k", wait_s=60, op_id=1), acquire("k", wait_s=60, op_id=2))
    bench.frees_only = True
    answers = bench.run(Release(3, "k", mine))
    assert [(answer.id, answer.status) for answer in answers] == [(1, 507), (2, 507), (3, 204)]
    assert bench.one(acquire("k")).status == 507
    assert bench.locks.lease("k") is None


def test_the_expiry_of_a_key_passes_through_a_lease():
    bench = Bench()
    bench.one(Put(1, "k", b"v", 1000))
    mine = bench.acquire("k", 60)
    bench.now_ms += 1000
    assert bench.one(Expire("k", VALUE)).status == 410
    assert bench.value("k") is None
    assert bench.lease("k").token == mine


def test_what_the_store_does_not_own_it_does_not_touch():
    bench = Bench()
    mine = bench.acquire("k", 10)
    bench.arrivals = [0] * PARTITIONS
    bench.now_s += 10
    asks = [ExpireLease("k"), Renew(0, "k", mine), Release(0, "k", mine), acquire("k"), GetLock(0, "k")]
    assert [answer.status for answer in bench.run(*asks)] == [421] * len(asks)
    assert bench.lease("k").token == mine


def test_a_put_without_a_token_names_the_holder_and_when_to_come_again():
    bench = Bench()
    bench.run(acquire("k", 30, owner="worker 7"))
    bench.now_s += 10
    problem = bench.one(Put(1, "k", b"v")).problem
    assert problem is not None
    assert (problem["code"], problem["owner"], problem["ttl_left"]) == ("locked", "worker 7", 20)
    assert problem["retry_after_ms"] > 0
