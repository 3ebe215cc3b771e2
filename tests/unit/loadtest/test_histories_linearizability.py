"""loadtest.histories.linearizability: it finds an order exactly if there is one, for any sequential thing."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadtest.histories.linearizability import Entry, search

Queue = tuple[int, ...]
Call = tuple[str, int | None]  # ("push", 1), ("pop", 1), ("pop", None) of an empty queue, ("size", 3)


class FirstInFirstOut:
    """A queue of numbers."""

    initial: Queue = ()

    def step(self, state: Queue, operation: Call) -> Queue | None:
        name, number = operation
        if name == "push":
            assert number is not None
            return (*state, number)
        if name == "clear":
            return ()
        if name == "size":
            return state if len(state) == number else None
        if not state:
            return state if number is None else None
        return state[1:] if state[0] == number else None

    def is_pure(self, operation: Call) -> bool:
        return operation[0] == "size" or operation == ("pop", None)

    def fixes(self, operation: Call) -> bool:
        return operation[0] == "clear"

    def kind(self, operation: Call) -> Hashable:
        return operation


def entry(name: str, number: int | None, begin_s: float, end_s: float | None, rank: float = 0.0) -> Entry[Call]:
    return Entry((name, number), begin_s, end_s, rank)


def has_order(entries: Sequence[Entry[Call]]) -> bool:
    """By trying every permutation, with and without the optional ones."""

    def can_go_on(state: Queue, left: Sequence[Entry[Call]]) -> bool:
        first_end_s = min((one.end_s for one in left if one.end_s is not None), default=None)
        if first_end_s is None:
            return True
        for place, one in enumerate(left):
            after = FirstInFirstOut().step(state, one.operation)
            can_be_next = one.begin_s <= first_end_s and after is not None
            if can_be_next and can_go_on(after or (), [*left[:place], *left[place + 1 :]]):
                return True
        return False

    return can_go_on((), entries)


def is_linearizable(*entries: Entry[Call]) -> bool:
    outcome = search(FirstInFirstOut(), entries)
    assert outcome.decided
    assert (outcome.stuck is None) == has_order(entries)
    return outcome.stuck is None


def test_one_after_the_other_is_as_the_model_does_it() -> None:
    assert is_linearizable()
    pushes = entry("push", 1, 0, 1), entry("push", 2, 2, 3)
    assert is_linearizable(*pushes, entry("pop", 1, 4, 5), entry("pop", 2, 6, 7), entry("pop", None, 8, 9))
    assert not is_linearizable(*pushes, entry("pop", 2, 4, 5))
    assert not is_linearizable(*pushes, entry("pop", None, 4, 5))


def test_those_at_the_same_time_may_be_in_either_order_also_if_one_began_when_the_other_ended() -> None:
    for begin_s in (0, 1):
        pushes = entry("push", 1, 0, 1), entry("push", 2, begin_s, 2)
        assert is_linearizable(*pushes, entry("pop", 2, 3, 4))
        assert is_linearizable(*pushes, entry("pop", 1, 3, 4))
    assert not is_linearizable(entry("push", 1, 0, 1), entry("push", 2, 1.5, 2), entry("pop", 2, 3, 4))


def test_an_optional_one_is_done_at_any_time_after_its_begin_or_never_and_once() -> None:
    optional = entry("push", 1, 5, None)
    assert is_linearizable(optional, entry("size", 0, 6, 7), entry("size", 1, 8, 9))
    assert is_linearizable(optional, entry("size", 0, 6, 7), entry("size", 0, 8, 9))
    assert not is_linearizable(optional, entry("size", 1, 3, 4))
    assert not is_linearizable(optional, entry("size", 1, 6, 7), entry("size", 0, 8, 9))
    assert not is_linearizable(optional, entry("size", 2, 6, 7))
    assert is_linearizable(optional, optional, entry("size", 2, 6, 7))
    assert not is_linearizable(optional, entry("push", 1, 8, None), entry("size", 2, 6, 7))


def test_what_comes_behind_an_instant_at_which_all_orders_meet_is_judged_by_the_state_of_then() -> None:
    quiet = [entry("push", 1, 0, 1), entry("push", 2, 2, 3), entry("pop", 1, 4, 5)]
    assert is_linearizable(*quiet, entry("size", 1, 6, 7))
    assert not is_linearizable(*quiet, entry("size", 2, 6, 7))
    both = [entry("push", 1, 0, 3), entry("push", 2, 0, 3)]  # in either order: their state is open
    for first in (1, 2):
        assert is_linearizable(*both, entry("size", 2, 4, 5), entry("pop", first, 6, 7))
    cleared = [*both, entry("clear", None, 4, 5)]
    assert is_linearizable(*cleared, entry("push", 3, 6, 7), entry("pop", 3, 8, 9))
    assert not is_linearizable(*cleared, entry("pop", 1, 6, 7))


def test_what_is_shown_is_where_every_order_ends() -> None:
    history = [entry("push", 1, 0, 1), entry("push", 2, 2, 3), entry("pop", 2, 4, 6), entry("push", 3, 5, 9)]
    outcome = search(FirstInFirstOut(), [*history, entry("pop", 1, 7, 8)])
    assert outcome.decided
    assert outcome.stuck is not None
    assert outcome.stuck.until_s == 6
    assert outcome.stuck.left[0] == ("pop", 2)
    assert outcome.stuck.state[:2] == (1, 2)
    assert outcome.stuck.last[:2] == [("push", 1), ("push", 2)]
    assert outcome.stuck.placed == len(outcome.stuck.state)


def test_a_search_that_may_take_no_more_steps_says_that_it_does_not_know() -> None:
    hard = [entry("push", number, 0, 100) for number in range(12)] + [entry("size", 11, 101, 102)]
    given_up = search(FirstInFirstOut(), hard, steps_max=200)
    assert (given_up.decided, given_up.steps) == (False, 200)
    right = [entry("push", number, number, number + 0.5) for number in range(12)]
    assert search(FirstInFirstOut(), right, steps_max=12).stuck is None
    assert not search(FirstInFirstOut(), right, steps_max=11).decided


def test_a_set_of_operations_is_tried_once_only_in_each_state() -> None:
    """Twelve deletes of the same in any order would be half a billion orders; they are 4,096 sets."""
    hard = [entry("clear", None, 0, 100) for _ in range(12)] + [entry("size", 1, 101, 102)]
    outcome = search(FirstInFirstOut(), hard)
    assert outcome.decided
    assert outcome.stuck is not None
    assert outcome.steps < 13 * 4096


def test_optional_ones_of_a_kind_are_counted_only() -> None:
    hard = [entry("push", 1, 0, None) for _ in range(30)] + [entry("size", 31, 1, 2)]
    outcome = search(FirstInFirstOut(), hard)
    assert outcome.decided
    assert outcome.stuck is not None
    assert outcome.steps <= 30


def test_the_rank_says_what_is_tried_first() -> None:
    pushes = [entry("push", number, 0, 100, rank=12 - number) for number in range(12)]
    pops = [entry("pop", 11 - number, 101 + 2 * number, 102 + 2 * number) for number in range(12)]
    assert search(FirstInFirstOut(), pushes + pops, steps_max=24).stuck is None


def test_an_operation_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="before it begins"):
        search(FirstInFirstOut(), [entry("push", 1, 2, 1)])


@settings(max_examples=1000)
@given(seed=st.integers(0, 2**32), is_mutated=st.booleans(), length=st.integers(1, 8))
@example(seed=1, is_mutated=True, length=6)  # what is left to try differs in optional ones only
def test_it_agrees_with_the_trial_of_all_permutations(seed: int, is_mutated: bool, length: int) -> None:
    """Calls with random instants of effect, so that the history is right; then one answer or time is changed."""
    draw = random.Random(seed)
    state: Queue = ()
    entries: list[Entry[Call]] = []
    for number in range(length):
        effect_s = 2.0 * number
        begin_s, end_s = effect_s - draw.randrange(8), effect_s + draw.randrange(8)
        is_unknown = draw.random() < 0.25
        name = draw.choice(("push", "pop", "push", "size", "clear"))
        answer = {"push": draw.randrange(3), "pop": state[0] if state else None, "size": len(state), "clear": None}[
            name
        ]
        if not (is_unknown and draw.random() < 0.5):
            after = FirstInFirstOut().step(state, (name, answer))
            assert after is not None
            state = after
        entries.append(entry(name, answer, begin_s, None if is_unknown else end_s, rank=draw.choice((0, effect_s))))
    if not is_mutated:
        assert is_linearizable(*entries)
        return
    place = draw.randrange(length)
    (name, _), begin_s, end, rank = entries[place]
    if draw.random() < 0.5 and name != "clear":
        entries[place] = entry(name, draw.randrange(3), begin_s, end, rank)
    else:
        moved_s = draw.randrange(-8, 8)
        end = None if end is None else end + moved_s
        entries[place] = entry(name, entries[place].operation[1], begin_s + moved_s, end, rank)
    draw.shuffle(entries)
    is_linearizable(*entries)
