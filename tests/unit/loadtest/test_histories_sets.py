"""loadtest.histories.sets: it finds every fault that it claims to find, and none in sets that are right."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.histories.history import Element, Members
from loadtest.histories.sets import Kind, check


def element(begin_s: float, end_s: float | None, action: Any, name: str = "x", **members: Any) -> Element:
    """Without an end the outcome is unknown."""
    members.setdefault("outcome", "unknown" if end_s is None else "done")
    return Element(client="c", begin_s=begin_s, end_s=end_s, set="s", element=name, action=action, **members)


def add(begin_s: float, end_s: float | None, name: str = "x", **members: Any) -> Element:
    return element(begin_s, end_s, "add", name, **members)


def remove(begin_s: float, end_s: float | None, name: str = "x", **members: Any) -> Element:
    return element(begin_s, end_s, "remove", name, **members)


def listing(begin_s: float, end_s: float, *elements: str, name: str = "s") -> Members:
    return Members(client="r", begin_s=begin_s, end_s=end_s, outcome="done", set=name, elements=list(elements))


def kinds(*history: Element | Members) -> set[str]:
    return {violation.kind for violation in check(history)}


# --- what is right is not blamed ---------------------------------------------------------------------------------


def test_nothing_is_wrong_with_no_history_and_with_one_after_the_other() -> None:
    assert kinds() == set()
    assert kinds(listing(0, 1), add(2, 3), listing(4, 5, "x"), remove(6, 7), listing(8, 9)) == set()


def test_a_listing_at_the_same_time_may_show_it_or_not() -> None:
    for shown in ([], ["x"]):
        assert kinds(add(0, 5), listing(4, 6, *shown)) == set()
        assert kinds(add(0, 1), remove(2, 5), listing(4, 6, *shown)) == set()
        assert kinds(add(0, 5), listing(5, 6, *shown), remove(9, 9)) == set()


def test_what_is_unknown_may_show_late_or_never() -> None:
    assert kinds(add(0, None), listing(1, 2), listing(3, 4, "x"), listing(5, 6, "x")) == set()
    assert kinds(add(0, None), listing(1, 2), listing(3, 4)) == set()
    assert kinds(add(0, 1), remove(2, None), listing(3, 4, "x"), listing(5, 6), listing(7, 8)) == set()
    assert kinds(add(0, 1), remove(2, None), listing(3, 4, "x"), listing(5, 6, "x")) == set()
    assert kinds(add(0, None), remove(2, None), listing(3, 4), listing(5, 6, "x"), listing(7, 8)) == set()


def test_a_removal_that_found_nothing_leaves_an_add_that_comes_later() -> None:
    assert kinds(add(0, None), remove(2, 3), listing(4, 5, "x")) == set()
    assert kinds(add(0, 9), remove(2, 3), listing(10, 11, "x")) == set()
    assert kinds(add(0, 9), remove(2, 3), listing(10, 11)) == set()


def test_what_was_refused_has_no_effect() -> None:
    assert kinds(add(0, 1, outcome="refused"), listing(2, 3)) == set()
    assert kinds(add(0, 1), remove(2, 3, outcome="refused"), listing(4, 5, "x")) == set()


def test_a_listing_that_was_not_answered_and_one_of_another_set_say_nothing() -> None:
    unknown = Members(client="r", begin_s=2, set="s")
    assert kinds(add(0, 1), unknown, listing(2, 3, name="other")) == set()


# --- what is wrong is found --------------------------------------------------------------------------------------


def test_an_acknowledged_add_that_is_missing_later_is_found() -> None:
    assert kinds(add(0, 1), listing(2, 3)) == {Kind.LOST}
    assert kinds(add(0, 1), listing(2, 3), remove(4, 5)) == {Kind.LOST}
    assert kinds(add(0, 1), remove(2, 3, outcome="refused"), listing(4, 5)) == {Kind.LOST}


def test_an_unknown_add_that_was_seen_must_stay() -> None:
    assert kinds(add(0, None), listing(1, 2, "x"), listing(3, 4)) == {Kind.LOST}
    assert kinds(add(0, None), listing(1, 2, "x"), listing(3, 4), remove(5, None)) == {Kind.LOST}


def test_an_element_that_outlived_its_removal_and_is_missing_later_is_found() -> None:
    assert Kind.LOST in kinds(add(0, 9), remove(2, 3), listing(10, 11, "x"), listing(12, 13))


def test_an_acknowledged_removal_that_shows_again_is_found() -> None:
    assert kinds(add(0, 1), remove(2, 3), listing(4, 5, "x")) == {Kind.RESURRECTED}
    assert kinds(add(0, None), listing(1, 2, "x"), remove(3, 4), listing(5, 6, "x")) == {Kind.RESURRECTED}


def test_an_unknown_removal_that_was_seen_and_shows_again_is_found() -> None:
    assert kinds(add(0, 1), remove(2, None), listing(3, 4), listing(5, 6, "x")) == {Kind.RESURRECTED}


def test_a_refused_add_that_shows_is_found() -> None:
    assert kinds(add(0, 1, outcome="refused"), listing(2, 3, "x")) == {Kind.REFUSED}


def test_an_element_that_no_client_added_is_found() -> None:
    assert kinds(listing(2, 3, "x")) == {Kind.FOREIGN}
    assert kinds(remove(0, 1), listing(2, 3, "x")) == {Kind.FOREIGN}


def test_an_element_that_is_listed_before_its_add_began_is_found() -> None:
    assert kinds(listing(0, 1, "x"), add(2, 3)) == {Kind.EARLY}
    assert kinds(listing(0, 1, "x"), add(2, None)) == {Kind.EARLY}


def test_an_element_that_is_listed_twice_is_found() -> None:
    assert kinds(add(0, 1), listing(2, 3, "x", "x")) == {Kind.TWICE}


def test_a_listing_that_does_not_ascend_is_found() -> None:
    assert kinds(add(0, 1, "a"), add(0, 1, "b"), listing(2, 3, "b", "a")) == {Kind.ORDER}
    assert kinds(add(0, 1, "ｚ"), add(0, 1, "😀"), listing(2, 3, "ｚ", "😀")) == set()  # as their bytes in UTF-8


def test_an_element_that_is_added_or_removed_twice_proves_nothing() -> None:
    for twice in (add, remove):
        with pytest.raises(ValueError, match="once"):
            check([twice(0, 1), twice(2, 3)])


# --- against every life that an element can have -----------------------------------------------------------------


def can_be(history: list[Element | Members]) -> bool:
    """One element: are there instants of its add and its removal that explain all listings? Tried are all of them.

    An acknowledged removal that comes before the add found nothing; it is then without effect.
    """
    step = 0.5
    instants = [place * step for place in range(-2, 60)]

    def times_of(action: str) -> list[float | None]:
        found: list[float | None] = []
        given = [op for op in history if isinstance(op, Element) and op.action == action]
        if not given or given[0].outcome != "done":
            found.append(None)
        if given and given[0].outcome != "refused":
            end_s = given[0].end_s
            found += [at_s for at_s in instants if at_s >= given[0].begin_s and (end_s is None or at_s <= end_s)]
        return found

    def explains(added_s: float | None, removed_s: float | None) -> bool:
        if added_s is not None and removed_s is not None and removed_s < added_s:
            removed_s = None
        for op in history:
            if isinstance(op, Members):
                there = [
                    added_s is not None and added_s <= at_s and not (removed_s is not None and removed_s <= at_s)
                    for at_s in instants
                    if op.begin_s - step / 2 <= at_s <= (op.end_s or 0) + step / 2
                ]
                if bool(op.elements) not in there:
                    return False
        return True

    return any(explains(added_s, removed_s) for added_s in times_of("add") for removed_s in times_of("remove"))


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_it_agrees_with_the_trial_of_all_lives_of_an_element(seed: int) -> None:
    draw = random.Random(seed)
    history: list[Element | Members] = []
    for make in (add, remove):
        begin_s = draw.randrange(0, 16)
        end_s = draw.choice((None, begin_s + draw.randrange(1, 12)))
        outcome = "unknown" if end_s is None else draw.choice(("done", "done", "refused"))
        history.append(make(begin_s, end_s, outcome=outcome))
    for _ in range(draw.randrange(1, 5)):
        begin_s = draw.randrange(0, 24)
        history.append(listing(begin_s, begin_s + draw.randrange(1, 6), *draw.choice(([], ["x"]))))
    if can_be(history):
        assert kinds(*history) == set()
    elif kinds(*history) == set():
        # only what needs two listings at the same time to contradict one another may stay unseen
        assert _has_overlap(history)


def _has_overlap(history: list[Element | Members]) -> bool:
    return any(
        one is not two and one.begin_s <= (two.end_s or 99) and two.begin_s <= (one.end_s or 99)
        for one in history
        for two in history
    )
