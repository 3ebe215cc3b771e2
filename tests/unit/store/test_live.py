"""What a store shows of its work: bounded, whatever clients have sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.model import Attempt
from kvstore.store.live import live_facts
from kvstore.transactions.intents import Intent, PreparedKey, PreparedTxns, State
from kvstore.transactions.locks import Identity, LockTable


def test_locks_are_listed_with_their_waiters_in_order_and_the_time_that_is_left() -> None:
    locks: LockTable[Any, Any] = LockTable("o", 100)
    lease = locks.grant("a", "<script>", 7, 10.0)
    locks.start(lease, 100.0)
    for owner in ("first", "second"):
        locks.queue_for_lease("a", (SimpleNamespace(owner=owner), None))
    facts = live_facts(locks, PreparedTxns(), 64, 50, 104.0)
    assert facts["leases"] == [
        {"name": "a", "owner": "<script>", "token": 7, "ttl": 10.0, "ttl_left": 6.0, "waiting": 2,
         "waiters": ["first", "second"]}
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "listed"), [(-(2**70), 0), (-1, 0), (0, 0), (7, 7), (2**70, 1000)])
def test_whatever_is_asked_for_the_answer_is_bounded(asked: int, listed: int) -> None:
    locks: LockTable[Any, Any] = LockTable("o", 100)
    for number in range(1200):
        locks.grant(str(number), "", number, 10.0)
    facts = live_facts(locks, PreparedTxns(), 64, asked, 0.0)
    assert (len(facts["leases"]), facts["leases_count"]) == (listed, 1200)


def test_no_more_is_listed_than_was_asked_for_and_all_is_counted() -> None:
    locks: LockTable[Any, Any] = LockTable("o", 1000)
    for number in range(200):
        locks.grant(str(number), "", number, 10.0)
    for number in range(500):
        locks.queue_for_lease("0", (SimpleNamespace(owner=str(number)), None))
    holds = PreparedTxns()
    for number in range(30):
        attempt = Attempt(number, number, "r")
        for key in range(20):
            intent = Intent(attempt, "anchor", 1, 0)
            holds.add(f"{number}/{key}", PreparedKey(Identity("o", number), intent, State(0, 0, None)), 5.0, None)
    facts = live_facts(locks, holds, 64, 10, 7.5)
    assert (len(facts["leases"]), facts["leases_count"]) == (10, 200)
    assert (len(facts["leases"][0]["waiters"]), facts["leases"][0]["waiting"]) == (8, 500)
    assert (len(facts["attempts"]), facts["attempts_count"], facts["intents"]) == (10, 30, 600)
    first = facts["attempts"][0]
    assert (len(first["keys"]), first["keys_count"], first["age_s"], first["abandoned"]) == (8, 20, 2.5, True)
