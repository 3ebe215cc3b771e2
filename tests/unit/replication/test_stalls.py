"""When a primary's own loop or disk stood still, and for how long within the time that a copy has owed an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.replication.stalls import Stalls

SLACK = 4


def test_a_sync_and_a_turn_of_the_loop_within_the_slack_are_no_stall() -> None:
    stalls = Stalls(SLACK)
    stalls.turns(0, 10)
    stalls.sync_begins(8)
    assert stalls.seconds(0, 12) == 0
    stalls.sync_ends(12)
    stalls.turns(14, 24)
    assert stalls.seconds(0, 14) == 0


def test_a_stall_counts_as_it_grows_and_stays_when_it_is_over() -> None:
    stalls = Stalls(SLACK)
    stalls.sync_begins(10)
    assert [stalls.seconds(0, now) for now in (14, 15, 100)] == [0, 1, 86]
    stalls.sync_ends(100)
    assert stalls.seconds(0, 200) == 86


def test_what_stood_still_before_a_copy_owed_anything_is_no_credit() -> None:
    stalls = Stalls(SLACK)
    stalls.sync_begins(0)
    stalls.sync_ends(100)
    assert [stalls.seconds(since, 200) for since in (90, 100, 150)] == [10, 0, 0]


def test_a_sync_on_the_loop_counts_once_though_the_loop_stands_still_with_it() -> None:
    stalls = Stalls(SLACK)
    stalls.turns(0, 10)
    stalls.sync_begins(8)
    stalls.sync_ends(108)
    stalls.turns(109, 119)
    assert stalls.seconds(0, 109) == 97, "from 12 to 109"


def test_a_disk_that_is_slow_at_every_sync_leaves_a_copy_its_time_only_later() -> None:
    """Else nothing would ever be late while such a disk is at work."""
    stalls = Stalls(SLACK)
    for now in range(0, 100_000, 10):
        stalls.sync_begins(now)
        stalls.sync_ends(now + 10)
    assert 100_000 - stalls.seconds(0, 100_000) >= 100_000 * SLACK / 10


def test_the_end_of_a_sync_whose_beginning_was_not_told_is_nothing() -> None:
    """It was under way when the first copy came."""
    stalls = Stalls(SLACK)
    stalls.sync_ends(100)
    assert stalls.seconds(0, 200) == 0


def test_the_disk_stands_still_while_none_of_the_syncs_on_the_node_that_were_under_way_returns() -> None:
    stalls = Stalls(SLACK)
    one, two, three = object(), object(), object()
    stalls.look(0, frozenset())
    stalls.look(10, frozenset({one}))
    assert stalls.seconds(0, 10) == 0
    stalls.look(20, frozenset({one, two}))
    assert stalls.seconds(0, 20) == 10
    stalls.look(30, frozenset({two, three}))
    stalls.look(40, frozenset())
    assert stalls.seconds(0, 40) == 10, "one has returned before 30, so the disk is at work"


def test_a_moment_in_which_the_own_sync_and_another_one_wait_counts_once() -> None:
    stalls, another = Stalls(SLACK), frozenset({object()})
    stalls.look(0, another)
    stalls.sync_begins(2)
    stalls.look(20, another)
    assert stalls.seconds(0, 20) == 20
    stalls.sync_ends(30)
    assert stalls.seconds(0, 30) == 30


STEPS = st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["begin", "end", "turn", "none"])), max_size=30)


@given(STEPS, st.integers(0, 200))
def test_it_is_the_number_of_moments_in_which_one_of_both_stood_still(steps: list[tuple[int, str]], since: int) -> None:
    stalls, now, syncs_since, turns_at = Stalls(SLACK), 0, None, None
    still: set[int] = set()
    for wait, what in steps:
        for began in (syncs_since, turns_at):
            if began is not None:
                still.update(range(began + SLACK, now + wait))
        now += wait
        expected = sum(since <= moment for moment in still)
        assert stalls.seconds(since, now) == pytest.approx(expected)
        match what:
            case "begin" if syncs_since is None:
                syncs_since = now
                stalls.sync_begins(now)
            case "end":
                syncs_since = None
                stalls.sync_ends(now)
            case "turn":
                turns_at = now + 10
                stalls.turns(now, turns_at)
        assert stalls.seconds(since, now) == pytest.approx(expected)
