"""Who is held for dead, and since when: in seconds of a clock that the test sets."""

from __future__ import annotations

from kvstore.controller.failure_detector import FailureDetector

AFTER_S = 2.0


def test_a_node_that_was_never_heard_is_silent_from_the_start_of_the_process_on() -> None:
    detector = FailureDetector(AFTER_S, now=100.0)
    assert not detector.is_silent("s1", 101.9)
    assert detector.is_silent("s1", 102.0)
    assert detector.silent_for("s1", 105.0) == 5.0


def test_a_node_is_silent_so_long_after_it_was_heard_last() -> None:
    detector = FailureDetector(AFTER_S, now=100.0)
    detector.note("s1", 101.5)
    assert not detector.is_silent("s1", 103.4)
    assert detector.is_silent("s1", 103.5)
    assert detector.heard_at("s1") == 101.5


def test_what_a_process_did_not_hear_while_it_stood_still_was_no_silence() -> None:
    detector = FailureDetector(AFTER_S, now=100.0)
    detector.note("s1", 100.0)
    detector.turn(100.9)
    assert detector.is_silent("s1", 102.0), "it was awake"
    detector.turn(110.0)
    assert not detector.is_silent("s1", 111.9)
    assert detector.is_silent("s1", 112.0)


def test_a_node_that_is_not_kept_is_as_one_that_was_never_heard() -> None:
    detector = FailureDetector(AFTER_S, now=100.0)
    detector.note("s1", 103.0)
    detector.note("s2", 103.0)
    detector.keep({"s2"})
    assert detector.is_silent("s1", 103.5)
    assert not detector.is_silent("s2", 103.5)


def test_a_request_holds_once_its_node_was_heard_with_it_and_for_as_long_as_it_is_not_silent() -> None:
    detector = FailureDetector(AFTER_S, now=100.0)
    assert not detector.is_near("s1", 100.0, 100.5), "a node that was never heard asks for nothing"
    detector.note("s1", 101.0)
    assert detector.is_near("s1", 101.0, 102.9)
    assert not detector.is_near("s1", 101.0, 103.0)
    assert not detector.is_near("s1", 101.5, 102.0), "its last beat was no echo"
