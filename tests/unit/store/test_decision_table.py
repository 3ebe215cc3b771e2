"""Which kept decisions may go, and which must still be seen to."""

from __future__ import annotations

from kvstore.environment import SYSTEM
from kvstore.model import Attempt
from kvstore.store.decision_table import DecisionTable


def attempts(count: int, router: str) -> list[Attempt]:
    return [Attempt(number, number, router) for number in range(count)]


def kept(*committed: Attempt) -> DecisionTable:
    decisions = DecisionTable(SYSTEM, -1.0)  # all of them are old at once
    decisions.note([(attempt, 0, True) for attempt in committed], [])
    return decisions


def test_what_is_never_acknowledged_does_not_keep_others_from_going() -> None:
    stuck, done = attempts(3000, "router01"), attempts(50, "router02")
    decisions = kept(*stuck, *done)
    decisions.acknowledge(done)
    finished, unfinished = decisions.old([1], 2000)
    assert finished == done
    assert unfinished == stuck


def test_no_more_may_go_at_a_time_than_were_asked_for() -> None:
    done = attempts(30, "router01")
    decisions = kept(*done)
    decisions.acknowledge(done)
    assert decisions.old([1], 20) == (done[:20], [])


def test_those_of_partitions_that_are_elsewhere_are_left_alone() -> None:
    assert kept(*attempts(3, "router01")).old([0], 20) == ([], [])


def test_an_aborted_attempt_has_no_store_to_wait_for() -> None:
    decisions = DecisionTable(SYSTEM, -1.0)
    (attempt,) = attempts(1, "router01")
    decisions.note([(attempt, 0, False)], [])
    assert decisions.old([1], 20) == ([attempt], [])


def test_a_young_one_stays() -> None:
    decisions = DecisionTable(SYSTEM, 60.0)
    decisions.note([(attempt, 0, False) for attempt in attempts(2, "router01")], [])
    assert decisions.old([1], 20) == ([], [])
