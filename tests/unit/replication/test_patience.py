"""How long a copy may owe an acknowledgement, and when one that fell out is tried again."""

from __future__ import annotations

from kvstore.replication import patience
from kvstore.replication.patience import Patience, Retry
from kvstore.replication.stalls import Stalls

NEVER = Stalls(0.05)


def test_a_copy_that_does_not_acknowledge_in_time_is_asked_to_be_taken_out() -> None:
    owing = patience.owes(Patience(), 10.0)
    assert not patience.is_over(owing, NEVER, 10.7, 0.8)
    assert patience.is_over(owing, NEVER, 10.8, 0.8)


def test_the_time_counts_from_the_first_that_is_owed() -> None:
    assert patience.owes(patience.owes(Patience(), 10.0), 10.5) == Patience(10.0)


def test_an_answer_takes_the_request_back() -> None:
    owing = patience.owes(Patience(), 10.0)
    assert not patience.is_over(patience.answered(owing, 11.0, owes_more=False), NEVER, 20.0, 0.8)
    assert not patience.is_over(patience.answered(owing, 11.0, owes_more=True), NEVER, 11.7, 0.8)
    assert patience.is_over(patience.answered(owing, 11.0, owes_more=True), NEVER, 11.8, 0.8)


def test_time_in_which_the_primarys_own_disk_stands_still_does_not_count_and_afterwards_the_copy_has_its_own() -> None:
    owing, stalls = patience.owes(Patience(), 10.0), Stalls(0.05)
    stalls.sync_begins(10.0)
    assert not any(patience.is_over(owing, stalls, now, 0.8) for now in (10.8, 12.0, 1000.0))
    stalls.sync_ends(12.0)
    assert not patience.is_over(owing, stalls, 12.7, 0.8)
    assert patience.is_over(owing, stalls, 12.8, 0.8)


def test_a_copy_that_is_late_on_its_own_is_late_though_the_disk_stands_still_now() -> None:
    owing, stalls = patience.owes(Patience(), 10.0), Stalls(0.05)
    stalls.sync_begins(10.9)
    assert patience.is_over(owing, stalls, 12.0, 0.8)


def test_a_copy_that_falls_out_again_and_again_is_tried_after_a_pause_that_doubles() -> None:
    retry, now, pauses = Retry(), 100.0, []
    for _ in range(6):
        retry = patience.fell_out(retry, now, 1.0, 10.0)
        assert not patience.may_join(retry, retry.not_before - 0.1)
        now = retry.not_before
        assert patience.may_join(retry, now)
        pauses.append(retry.pause_s)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_after_a_quiet_as_long_as_the_longest_pause_it_is_short_again() -> None:
    retry = Retry(not_before=100.0, pause_s=8.0)
    assert patience.fell_out(retry, 109.9, 1.0, 10.0).pause_s == 10.0
    assert patience.fell_out(retry, 110.0, 1.0, 10.0).pause_s == 1.0
