"""Stories of transactions, told in every way they can go: see `explorer`.

Two of the cases that every implementation must survive are not here, because they lie below batches: a GET between
executed and visible, and a reader thread that fills the cache late (tests/unit/store/test_store_reads.py).
"""

from __future__ import annotations

import pytest

from kvstore.model import Attempt, IdempotencyKey
from kvstore.protocol import Abort, Answer, ApplyIntents, DecideCommit, Prepare, Reply, Vote
from kvstore.store.ops import WriteOp
from tests.unit.transactions.cluster import Scenario
from tests.unit.transactions.explorer import explore
from tests.unit.transactions.scenarios import SCENARIOS, TWO, txn
from tests.unit.transactions.world import Sink, Store, at

IN_PAIRS = [
    "two transactions over two keys in opposite order",
    "plain writes and reads beside a transaction",
    "several wait for a lock when their time is over",
    "a reading transaction beside plain writes",
    "a router that tries again over three stores",
    "the same request twice",
    "each deletes what the other one needs",
    "compare-and-set beside a transaction",
    "a transaction of one store beside one of two",
    "a guard's lock is released and granted",
    "a holder's put behind those who wait for its lease",
]
FIRST = Attempt(10, 10, "router01")
SECOND = Attempt(20, 20, "router02")


@pytest.mark.parametrize("name", SCENARIOS)
def test_however_it_goes_some_order_of_the_operations_explains_it(name: str) -> None:
    explore(SCENARIOS[name])


@pytest.mark.parametrize("name", IN_PAIRS)
def test_operations_do_the_same_in_one_batch_as_in_several(name: str) -> None:
    scenario = SCENARIOS[name]
    explore(Scenario(scenario.owners, scenario.clients, scenario.values, scenario.leases, may_wait=True), pairs=True)


def test_a_key_that_moved_to_a_store_that_already_takes_part_is_prepared_there_too() -> None:
    giver, taker = Store("s1", ["b"]), Store("s2", ["c"])
    assert isinstance(_ask(taker, _prepare("c")), Vote)
    rows, _ = giver.give_away("b")
    taker.take_in("b", rows, giver.clock)
    assert isinstance(_ask(taker, _prepare("b")), Vote)
    (held,) = taker.held()
    assert held.keys == ("b", "c")
    _ask(taker, ApplyIntents(0, FIRST, ["b"], 9, True, 0))
    (held,) = taker.held()
    assert held.keys == ("c",)


def test_an_intent_that_moved_is_finished_where_it_is_and_nowhere_else() -> None:
    giver, taker = Store("s1", ["b"]), Store("s2", ["c"])
    _ask(giver, _prepare("b"))
    rows, _ = giver.give_away("b")
    taker.take_in("b", rows, giver.clock)
    refused = _ask(giver, ApplyIntents(0, FIRST, ["b"], 9, True, 0))
    assert isinstance(refused, Answer)
    assert refused.status == 421
    assert _ask(taker, ApplyIntents(0, FIRST, ["b"], 9, True, 0)) == Answer(0, 200)
    state = taker.state("value", "b")
    assert state is not None
    assert (state.version, state.body) == (9, b"1")


def test_an_abort_cancels_a_prepare_that_still_waits() -> None:
    store = Store("s1", ["b"])
    _ask(store, _prepare("b", attempt=SECOND))
    assert store.run((_prepare("b"), Sink(("waits",)))) == []
    answers = dict(store.run((Abort(0, FIRST, ["b"]), Sink(("aborts",)))))
    assert isinstance(answers["waits",], Answer)
    assert answers["waits",].status == 409
    _ask(store, Abort(0, SECOND, ["b"]))
    assert store.held() == []


@pytest.mark.parametrize("kind", ["prepare", "commit"])
@pytest.mark.parametrize(("once", "same"), [("K", True), ("other", False), (None, False)])
def test_who_meets_the_intent_of_the_same_request_is_told_so(kind: str, once: str | None, same: bool) -> None:
    store = Store("s1", ["b"])
    _ask(store, _prepare("b", once="K"))
    if kind == "prepare":
        refused = _ask(store, _prepare("b", attempt=SECOND, once=once))
    else:
        key = IdempotencyKey(once, "digest") if once else None
        refused = _ask(
            store, DecideCommit(0, "b", SECOND, [], txn("b").transaction.then, [], 1, True, None, None, [], key)
        )
    assert isinstance(refused, Answer)
    assert refused.problem is not None
    assert refused.problem["code"] == "conflict"
    assert refused.problem.get("same_request", False) == same


def test_a_commit_that_no_owner_has_refused_may_still_arrive_where_its_key_comes_back_to() -> None:
    explore(Scenario(TWO, [[txn("a b", value=b"1")]], budget={"double": 1, "move": 2}, attempts=1))


def test_the_keys_of_the_scenarios_lie_in_different_partitions() -> None:
    for scenario in SCENARIOS.values():
        assert len({at(key) for key in scenario.owners}) == len(scenario.owners)


def _prepare(key: str, *, attempt: Attempt = FIRST, once: str | None = None) -> Prepare:
    return Prepare(0, "elsewhere", attempt, [], txn(key, value=b"1").transaction.then, [], once)


def _ask(store: Store, op: WriteOp) -> Reply:
    ((_, reply),) = store.run((op, Sink(None)))
    return reply
