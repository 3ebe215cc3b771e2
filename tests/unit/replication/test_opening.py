"""Which store may be opened, and what has to be known before its term begins."""

from __future__ import annotations

import pytest

from kvstore.replication import opening
from kvstore.replication.configuration import Configuration, Primary, Replica, Request
from kvstore.replication.lease import Granted
from kvstore.replication.opening import Opening, Truth
from kvstore.replication.session import Forked
from kvstore.storage.segments import Position

OLD, OTHER, JOINING = (
    Replica("n1", "c1", "in-sync", 7),
    Replica("n3", "c3", "in-sync", 3),
    Replica("n4", "c4", "joining", 6),
)
CONFIG = Configuration("s1", "store", 7, 7, Primary("n2", "c2"), (OLD, OTHER, JOINING))
OPENING = Opening(CONFIG, "start", Position(10, 1010, 5))
NO_GRANT = Granted(0.0)


def _told(now: Opening, copy: Replica, number: int, term: int = 5) -> Opening:
    return opening.answered(now, opening.hello_to(now, copy), Position(number, 1000 + number, term))


def test_only_the_node_and_the_copy_that_the_map_names_open() -> None:
    assert opening.may_open(CONFIG, "n2", "c2", 5, NO_GRANT, 1.0) == "yes"
    assert opening.may_open(CONFIG, "n1", "c1", 5, NO_GRANT, 1.0) == "no"
    assert opening.may_open(CONFIG, "n2", "emptied", 0, NO_GRANT, 1.0) == "not-primary"


def test_a_store_opens_only_in_a_term_above_all_that_it_has_promised() -> None:
    assert opening.may_open(CONFIG, "n2", "c2", 7, NO_GRANT, 1.0) == "stale"
    assert opening.may_open(CONFIG, "n2", "c2", 8, NO_GRANT, 1.0) == "stale"


def test_a_copy_waits_for_the_end_of_its_own_grant() -> None:
    assert opening.may_open(CONFIG, "n2", "c2", 5, Granted(2.0), 1.0) == "wait"
    assert opening.may_open(CONFIG, "n2", "c2", 5, Granted(2.0), 2.0) == "yes"


def test_all_copies_in_sync_are_asked_the_old_primary_included() -> None:
    assert opening.asked(OPENING) == (OLD, OTHER)
    assert opening.asked(_told(OPENING, OLD, 10)) == (OTHER,)
    assert opening.truth(_told(OPENING, OLD, 10)) is None


def test_the_longest_log_is_the_truth() -> None:
    now = _told(_told(OPENING, OLD, 12), OTHER, 11)
    assert opening.truth(now) == Truth(Position(12, 1012, 5), "c1")
    assert not opening.may_begin_term(now)
    assert opening.may_begin_term(opening.fetched(now, Position(12, 1012, 5)))


def test_a_higher_term_is_longer_than_a_higher_number() -> None:
    now = _told(_told(OPENING, OLD, 12, term=4), OTHER, 11, term=6)
    assert opening.truth(now) == Truth(Position(11, 1011, 6), "c3")


def test_where_the_own_log_is_as_long_nothing_is_fetched() -> None:
    assert opening.may_begin_term(_told(_told(OPENING, OLD, 10), OTHER, 9))


def test_a_log_that_gets_shorter_by_fetching_ends_the_opening() -> None:
    with pytest.raises(Forked):
        opening.fetched(OPENING, Position(9, 1009, 5))


def test_a_copy_that_does_not_answer_is_waited_for_until_it_is_out_in_this_term() -> None:
    now = _told(OPENING, OTHER, 9)
    assert opening.request_out(now, OLD) == Request("out", "s1", 7, "c2", "c1", 7)
    out = CONFIG._replace(epoch=8, replicas=(OLD._replace(state="joining", joined=8), OTHER, JOINING))
    followed = opening.follow(now, out)
    assert followed is not None
    assert opening.may_begin_term(followed)


def test_what_a_copy_told_that_is_out_by_now_does_not_count() -> None:
    now = _told(_told(OPENING, OLD, 12), OTHER, 9)
    followed = opening.follow(now, CONFIG._replace(epoch=8, replicas=(OTHER, JOINING)))
    assert followed is not None
    assert opening.truth(followed) == Truth(Position(10, 1010, 5), None)


def test_answers_to_another_hello_are_thrown_away() -> None:
    hello = opening.hello_to(OPENING, OLD)
    for other in ({"term": 6}, {"start": "x"}, {"copy_id": "x"}, {"joined": 1}):
        assert opening.answered(OPENING, hello._replace(**other), Position(12, 0, 5)) == OPENING  # type: ignore[arg-type]


def test_a_joining_copy_is_not_asked_and_its_answer_does_not_count() -> None:
    assert opening.answered(OPENING, opening.hello_to(OPENING, JOINING), Position(99, 0, 6)) == OPENING


def test_another_term_ends_the_opening_and_an_older_map_changes_nothing() -> None:
    assert opening.follow(OPENING, CONFIG._replace(epoch=8, term=8)) is None
    assert opening.follow(OPENING, CONFIG._replace(epoch=6, term=6)) == OPENING


ALONE = Configuration("s1", "store", 4, 4, Primary("n2", "c2"))


def test_a_store_whose_own_log_names_no_copy_starts_without_the_controller() -> None:
    assert opening.starts_alone(ALONE, "n2", "c2", 4)


@pytest.mark.parametrize("state", ["joining", "in-sync"])
def test_a_store_whose_own_log_names_any_copy_does_not(state: str) -> None:
    named = ALONE._replace(replicas=(Replica("n3", "c3", state, 5),))  # type: ignore[arg-type]
    assert not opening.starts_alone(named, "n2", "c2", 4)


def test_a_store_without_a_map_or_of_another_primary_or_with_a_higher_promise_does_not_start_alone() -> None:
    assert not opening.starts_alone(None, "n2", "c2", 0)
    assert not opening.starts_alone(ALONE, "n2", "other", 4)
    assert not opening.starts_alone(ALONE, "n3", "c2", 4)
    assert not opening.starts_alone(ALONE, "n2", "c2", 5)
