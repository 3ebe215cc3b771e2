"""The pure rules of transactions, each for itself: all small cases, or many drawn ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import (
    BadParameter,
    Conflict,
    DiskFull,
    KvError,
    Locked,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    WrongOwner,
    all_errors,
)
from kvstore.model import Attempt, Condition, IdempotencyKey, Preconditions, Read, TxnOp
from kvstore.protocol import Acquire, Answer, Delete, Get, Outcome, Put, Release, Vote
from kvstore.router.participants import Transaction
from kvstore.transactions.attempts import Stamps, may_wait
from kvstore.transactions.coordination import Prepared, Rejected, Retry, judge, judge_refusal
from kvstore.transactions.decisions import Decision, decode_decision, on_ask, on_commit
from kvstore.transactions.intents import Intent, applies, decode_intent
from tests.unit.transactions.serial import Cell, Done, Model, Txn, is_explained

AGES = st.tuples(st.integers(0, 5), st.sampled_from(["r1", "r2"]))
ATTEMPT = Attempt(5, 7, "0123abcd")
DECISIONS = [None, Decision("committed", ATTEMPT, "k", version=9), Decision("aborted", ATTEMPT, "k")]
VOTES = st.builds(
    Vote,
    st.just(0),
    st.integers(1, 1 << 53),
    st.booleans(),
    st.just([]),
    st.none() | st.just(Locked("then").problem()),
    st.none() | st.just(Locked("otherwise").problem()),
)

# --- attempts ---------------------------------------------------------------------------------------------------------


@given(AGES, st.lists(st.none() | AGES))
def test_who_may_wait_is_older_than_all_ahead_that_have_an_age(age: Any, ahead: list[Any]) -> None:
    assert may_wait(age, ahead) == all(other is None or age < other for other in ahead)


@given(AGES, AGES)
def test_of_two_that_wait_for_each_other_one_may_not(one: Any, other: Any) -> None:
    assert not (may_wait(one, [other]) and may_wait(other, [one]))


def test_a_retry_is_as_old_as_the_first_try_and_its_twin_is_not_older() -> None:
    stamps = Stamps("0123abcd")
    first = stamps.draw(100)
    retry = stamps.draw(200, first.start)
    assert retry.age == first.age
    assert not may_wait(retry.age, [first.age])


@given(st.lists(st.tuples(st.sampled_from(["see", "draw", "retry"]), st.integers(1, 1000)), max_size=30))
def test_stamps_rise_follow_the_clock_and_stay_above_every_floor(story: list[tuple[str, int]]) -> None:
    stamps = Stamps("0123abcd")
    drawn: list[Attempt] = []
    above = 0
    for kind, number in story:
        if kind == "see":
            stamps.see(number)
            above = max(above, number)
            continue
        start = drawn[0].start if kind == "retry" and drawn else 0
        attempt = stamps.draw(number, start)
        assert attempt.stamp > above
        assert attempt.stamp >= number
        assert attempt.start == (start or attempt.stamp)
        assert attempt.router == "0123abcd"
        above = attempt.stamp
        drawn.append(attempt)
    assert len({attempt.name for attempt in drawn}) == len(drawn)


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize(("stamp", "floor"), list(itertools.product(range(3), range(3))))
def test_what_is_decided_is_said_and_what_is_not_is_decided_above_the_floor_only(
    decision: Decision | None, stamp: int, floor: int
) -> None:
    commits, asks = on_commit(decision, stamp, floor), on_ask(decision, stamp, floor)
    if decision is not None:
        assert commits == asks == decision.outcome
    elif stamp <= floor:
        assert commits == asks == "gone"
    else:
        assert (commits, asks) == ("commit", "abort")


@given(st.integers(0, 5), st.integers(0, 5), st.lists(st.sampled_from(["commit", "ask", "drop"]), max_size=8))
def test_no_attempt_is_committed_and_aborted(stamp: int, floor: int, story: list[str]) -> None:
    """In whatever order commits, asks and droppings come, every answer that says what became of it says the same."""
    decision: Decision | None = None
    said: set[str] = set()
    for event in story:
        if event == "drop":
            if decision is not None:
                decision, floor = None, max(floor, stamp)
            continue
        what = on_commit(decision, stamp, floor) if event == "commit" else on_ask(decision, stamp, floor)
        if what in ("commit", "abort"):
            outcome: Any = "committed" if what == "commit" else "aborted"
            decision = Decision(outcome, ATTEMPT, "k")
            what = outcome
        said.add(what)
    assert not {"committed", "aborted"} <= said


def test_decisions_and_intents_survive_as_rows() -> None:
    decision = Decision("committed", ATTEMPT, "k", ["a", "b"], 9, True, 1234, [Read(3, b"\xff"), Read(0, None)])
    assert decode_decision(decision.encode()) == decision
    intent = Intent(ATTEMPT, "k", 8, 1234, TxnOp("put", "a", b"\xff", 50), TxnOp("delete", "a"), "K")
    assert decode_intent(intent.encode()) == intent
    assert (intent.step(True), intent.step(False)) == (intent.then, intent.otherwise)


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(0, 100), st.integers(1, 100))
def test_the_version_is_above_all_votes_and_below_those_of_late_duplicates(
    votes: list[int], clock: int, later: int
) -> None:
    version = max(*votes, clock) + 1
    assert all(applies(vote, version) for vote in votes)
    assert not applies(version + later, version)
    assert not applies(version, version)


# --- coordination -----------------------------------------------------------------------------------------------------


@given(st.lists(VOTES, min_size=1, max_size=4))
def test_votes_come_to_the_highest_all_conditions_and_the_first_lock_in_the_way(votes: list[Vote]) -> None:
    prepared = judge(votes)
    assert isinstance(prepared, Prepared)
    assert prepared.vote == max(vote.vote for vote in votes)
    assert prepared.holds == all(vote.holds for vote in votes)
    assert (prepared.locked_then is None) == all(vote.locked_then is None for vote in votes)
    assert (prepared.locked_otherwise is None) == all(vote.locked_otherwise is None for vote in votes)
    assert prepared.locked_then is None or prepared.locked_then["detail"] == "then"
    assert prepared.locked_otherwise is None or prepared.locked_otherwise["detail"] == "otherwise"


def _answered(error: KvError) -> Answer:
    return Answer(0, error.status, problem=error.problem())


@pytest.mark.parametrize("state", ["committed", "aborted", "gone", "pending"])
def test_an_attempt_that_was_not_committed_is_made_again(state: Any) -> None:
    assert judge_refusal(Outcome(0, state)) == Retry()


def test_a_kept_reply_is_the_answer() -> None:
    outcome = Outcome(0, "repeated", ATTEMPT.name, 9, True)
    assert judge_refusal(outcome) is outcome


@pytest.mark.parametrize("send", [_answered, lambda error: error])
def test_who_is_in_the_way_or_elsewhere_means_again(send: Any) -> None:
    assert judge_refusal(send(WrongOwner("moved", epoch=12))) == Retry(epoch=12)
    assert judge_refusal(send(Conflict("busy"))) == Retry()
    assert judge_refusal(send(Conflict("busy", key="k", same_request=True))) == Retry(key="k", same_request=True)


@pytest.mark.parametrize("error", [Locked("held"), DiskFull(), TooManyRequests("full"), Unavailable("down")])
@pytest.mark.parametrize("is_answer", [True, False])
def test_other_errors_are_told_as_they_are(error: KvError, is_answer: bool) -> None:
    verdict = judge_refusal(_answered(error) if is_answer else error)
    assert isinstance(verdict, Rejected)
    assert verdict.error.problem() == error.problem()


@pytest.mark.parametrize("kind", all_errors())
def test_no_refusal_of_a_prepare_is_an_unknown_outcome(kind: type[KvError]) -> None:
    """A store that may or may not have prepared has decided nothing."""
    verdict = judge_refusal(kind("what happened"))
    assert not isinstance(verdict, Outcome)
    if kind is OutcomeUnknown:
        assert isinstance(verdict, Rejected)
        assert isinstance(verdict.error, Unavailable)
        assert verdict.error.retryable
    elif kind not in (WrongOwner, Conflict):
        assert isinstance(verdict, Rejected)
        assert isinstance(verdict.error, kind)
    assert isinstance(judge_refusal(Answer(0, 500)), Rejected)


def test_an_answer_that_is_no_known_problem_is_an_error_of_the_store() -> None:
    verdict = judge_refusal(_answered(BadParameter("odd")))
    assert isinstance(verdict, Rejected)
    assert verdict.error.code == "bad-parameter"


# --- the naive model itself: it must say no ---------------------------------------------------------------------------


def _begin(**values: bytes) -> Model:
    return Model({key: Cell(value, number) for number, (key, value) in enumerate(values.items(), 1)}, {"L": 3}, {})


def _story(*done: tuple[Any, Any, set[int]]) -> dict[int, Done]:
    return {number: Done(op, answer, frozenset(after)) for number, (op, answer, after) in enumerate(done)}


def _ok(version: int, *reads: tuple[int, bytes | None], succeeded: bool = True) -> tuple[Any, ...]:
    return "done", succeeded, version, reads


PUT_1, PUT_2 = Put(0, "a", b"1"), Put(0, "a", b"2")
GET = Get(0, "a")
BOTH = Txn(Transaction([], [TxnOp("put", "a", b"t"), TxnOp("put", "b", b"t")], []))
ONCE = Txn(Transaction([], [TxnOp("put", "a", b"t")], []), IdempotencyKey("K", "digest"))
IF_A_IS_1 = Txn(Transaction([Condition("a", version=1)], [TxnOp("put", "b", b"t")], [TxnOp("get", "a")]))
IF_HELD = Txn(Transaction([Condition("L", token=3)], [TxnOp("put", "b", b"t")], []))


@pytest.mark.parametrize(
    ("story", "end", "explained"),
    [
        ([(PUT_1, _ok(1), set()), (PUT_2, _ok(2), {0})], Cell(b"2", 2), True),
        ([(PUT_1, _ok(1), set()), (PUT_2, _ok(2), {0})], Cell(b"1", 1), False),  # against real time
        ([(PUT_1, _ok(1), set()), (PUT_2, _ok(2), set())], Cell(b"1", 1), True),
        ([(PUT_1, _ok(1), set())], Cell(None), False),  # lost
        ([(PUT_1, None, set())], Cell(None), True),  # unknown
        ([(PUT_1, None, set())], Cell(b"1", 9), True),
        ([(PUT_1, _ok(1), set())], Cell(b"1", 2), False),  # another version than it was told
        ([(PUT_1, _ok(1), set()), (GET, _ok(0, (0, None)), {0})], Cell(b"1", 1), False),  # stale
        ([(PUT_1, None, set()), (GET, _ok(0, (5, b"1")), set()), (GET, _ok(0, (0, None)), {1})], Cell(b"1", 5), False),
        ([(BOTH, _ok(4), set())], Cell(b"t", 4), False),  # half: b is missing
        ([(ONCE, _ok(4), set()), (PUT_2, _ok(5), {0}), (ONCE, _ok(4), {1})], Cell(b"2", 5), True),
        ([(ONCE, _ok(4), set()), (PUT_2, _ok(5), {0}), (ONCE, _ok(6), {1})], Cell(b"t", 6), False),  # done twice
        ([(Put(0, "L", b"1"), _ok(4), set())], Cell(None), False),  # through another's lease
        ([(Acquire(0, "L", 1, 0, ""), _ok(4), set())], Cell(None), False),
        ([(Release(0, "L", 3), _ok(4), set()), (IF_HELD, _ok(0, succeeded=False), {0})], Cell(None), True),
        ([(Release(0, "L", 3), _ok(4), set()), (IF_HELD, _ok(5), {0})], Cell(None), False),
        ([(Delete(0, "a"), _ok(0, succeeded=False), set())], Cell(None), True),
        ([(Delete(0, "a"), _ok(3), set())], Cell(None), False),  # there was none
        (
            [(Put(0, "a", b"1", guard=Preconditions(absent=True)), _ok(1), set()), (PUT_2, _ok(2), set())],
            Cell(b"2", 2),
            True,
        ),
        (
            [(Put(0, "a", b"1", guard=Preconditions(absent=True)), _ok(3), set()), (PUT_2, _ok(2), {0})],
            Cell(b"1", 3),
            False,
        ),
    ],
)
def test_the_naive_model_tells_good_stories_from_bad_ones(story: Any, end: Cell, explained: bool) -> None:
    assert is_explained(_story(*story), _begin(), {"a": end, "b": Cell()}) == explained


def test_the_naive_model_compares_what_a_transaction_saw() -> None:
    begin = _begin(a=b"0")
    then_ran, else_ran = (IF_A_IS_1, _ok(5), set()), (IF_A_IS_1, _ok(0, (4, b"1"), succeeded=False), set())
    before = (PUT_1, _ok(4), set())
    assert is_explained(_story(before, then_ran), begin, {"a": Cell(b"1", 4), "b": Cell(b"t", 5)})
    assert is_explained(_story(before, else_ran), begin, {"a": Cell(b"1", 4), "b": Cell()})
    assert not is_explained(_story(else_ran), begin, {"a": Cell(b"0", 1), "b": Cell()})
    assert not is_explained(_story(before, (IF_A_IS_1, _ok(5), {0})), begin, {"a": Cell(b"1", 4), "b": Cell(b"t", 5)})
