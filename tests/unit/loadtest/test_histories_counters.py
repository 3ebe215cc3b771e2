"""loadtest.histories.counters: it finds every fault that it claims to find, and none in counters that are right."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.histories.counters import Kind, check
from loadtest.histories.history import Count


def count(begin_s: float, end_s: float | None, action: Any, value: int | None, **members: Any) -> Count:
    """Without an end the outcome is unknown."""
    members.setdefault("outcome", "unknown" if end_s is None else "done")
    members.setdefault("key", "k")
    return Count(client="c", begin_s=begin_s, end_s=end_s, action=action, value=value, **members)


def up(begin_s: float, end_s: float | None, value: int | None, **members: Any) -> Count:
    return count(begin_s, end_s, "raise", value, **members)


def read(begin_s: float, end_s: float | None, value: int | None, **members: Any) -> Count:
    return count(begin_s, end_s, "read", value, **members)


def kinds(*history: Count) -> set[str]:
    return {violation.kind for violation in check(history)}


# --- what is right is not blamed ---------------------------------------------------------------------------------


def test_nothing_is_wrong_with_no_history_and_with_one_after_the_other() -> None:
    assert kinds() == set()
    assert kinds(read(0, 1, None), up(2, 3, 1), read(4, 5, 1), up(6, 7, 2), read(8, 9, 2)) == set()
    assert kinds(up(0, 1, 1), up(0, 1, 1, key="other"), read(2, 3, None, key="third")) == set()


def test_a_read_at_the_same_time_may_show_it_or_not() -> None:
    for seen in (None, 0, 1):
        assert kinds(up(0, 5, 1), read(4, 6, seen)) == set()
        assert kinds(up(0, 5, 1), read(5, 6, seen)) == set()


def test_a_read_that_ended_when_a_raise_began_may_show_it() -> None:
    assert kinds(up(2, 3, 1), read(1, 2, 1)) == set()


def test_an_unknown_raise_counts_late_or_never() -> None:
    assert kinds(up(0, None, 1), read(1, 2, None), read(3, 4, 1)) == set()
    assert kinds(up(0, None, 1), read(1, 2, None), up(3, 4, 1), read(5, 6, 1)) == set()
    assert kinds(up(0, None, 1), up(3, 4, 2), read(5, 6, 2)) == set()
    assert kinds(up(0, None, None), read(1, 2, 1)) == set()


def test_a_refused_raise_and_a_read_without_answer_say_nothing() -> None:
    assert kinds(up(0, 1, 1), up(0, 1, 1, outcome="refused"), read(2, 3, 1), read(4, None, None)) == set()


# --- what is wrong is found --------------------------------------------------------------------------------------


def test_two_raises_to_one_value_are_found() -> None:
    assert kinds(up(0, 9, 1), up(0, 9, 1)) == {Kind.TWICE}


def test_a_read_with_less_than_was_acknowledged_is_found() -> None:
    assert Kind.TOO_FEW in kinds(up(0, 1, 1), up(2, 3, 2), read(4, 5, 1))
    assert Kind.TOO_FEW in kinds(up(0, 1, 1), read(4, 5, None))
    assert kinds(up(0, 1, None), up(0, 1, None), read(4, 5, 1)) == {Kind.TOO_FEW}


def test_a_read_with_more_than_had_begun_is_found() -> None:
    assert Kind.TOO_MANY in kinds(up(0, 1, 1), read(2, 3, 2))
    assert Kind.TOO_MANY in kinds(up(0, 1, 1), up(2, 3, 2, outcome="refused"), read(4, 5, 2))
    assert Kind.TOO_MANY in kinds(up(0, 1, 1), read(2, 3, 2), up(4, 5, 2))
    assert kinds(up(0, None, None), read(2, 3, 2)) == {Kind.TOO_MANY}


def test_a_repeat_that_counted_twice_is_found() -> None:
    """Sent twice with one Idempotency-Key, it raised twice: the next read shows a value too many."""
    assert kinds(up(0, 1, 1), up(2, 3, 3), up(4, 5, 4)) == {Kind.FROM_NOWHERE}
    assert kinds(up(0, 1, 1), up(0, None, 1), read(2, 3, 2)) == {Kind.FROM_NOWHERE}


def test_a_value_that_an_unknown_raise_found_and_no_client_made_is_found() -> None:
    assert kinds(up(0, 1, 1), up(2, None, 3)) == {Kind.FROM_NOWHERE}
    assert kinds(up(0, 1, 2), up(2, 3, 1)) >= {Kind.FROM_NOWHERE}


def test_reads_that_go_back_are_found() -> None:
    assert kinds(up(0, None, 1), read(1, 2, 1), read(3, 4, None)) == {Kind.BACK}
    assert kinds(up(0, None, 1), up(0, None, 2), up(0, None, 2), read(1, 2, 2), read(3, 4, 1)) == {Kind.BACK}


def test_a_raise_over_what_was_more_is_found() -> None:
    assert kinds(up(0, None, 1), up(0, None, 2), read(1, 2, 2), up(3, 4, 2)) == {Kind.BACK}
    assert Kind.BACK in kinds(up(0, 1, 2), up(2, 3, 1))


# --- a counter that is right, and the same with one fault --------------------------------------------------------


def some_history(draw: random.Random) -> list[Count]:
    state = 0
    history = []
    for number in range(draw.randrange(3, 12)):
        effect_s = 2.0 * number
        begin_s, end_s = effect_s - draw.randrange(10), effect_s + draw.randrange(10)
        if draw.random() < 0.4:
            history.append(read(begin_s, end_s, state or None))
            continue
        how = draw.random()
        if how < 0.6:
            state += 1
            history.append(up(begin_s, end_s, state))
        elif how < 0.8:
            history.append(up(begin_s, None, state + 1))
            state += draw.randrange(2)
        else:
            history.append(up(begin_s, end_s, draw.randrange(1, state + 2), outcome="refused"))
    draw.shuffle(history)
    return [*history, read(100, 101, state)]


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_a_counter_that_is_right_is_not_blamed_and_one_off_at_the_end_is(seed: int) -> None:
    *history, last = some_history(random.Random(seed))
    assert kinds(*history, last) == set()
    surely = max((op.value or 0 for op in history if op.outcome == "done"), default=0)
    maybe = max((op.value or 0 for op in history if op.outcome != "refused"), default=0)
    assert kinds(*history, read(100, 101, maybe + 1)) & {Kind.TOO_MANY, Kind.FROM_NOWHERE}
    if surely:
        assert kinds(*history, read(100, 101, surely - 1)) & {Kind.TOO_FEW, Kind.BACK}
