"""The copy's side of a session, and the comparison of two chains."""

from __future__ import annotations

import random

import pytest

from kvstore.replication import session
from kvstore.replication.session import Comparison, FellBehind, Following, Forked, Join, Session
from kvstore.storage.segments import Position

SESSION = Session("store", 5, "start", "copy", 3)
PROMISED = Following("store", "copy", promised=5)
BEGUN = session.begun(PROMISED, SESSION)
LAST = Position(7, 77, 4)


def test_a_hello_of_the_promised_term_is_told_the_position() -> None:
    assert session.on_hello(PROMISED, SESSION) == "tell"


def test_a_hello_of_a_higher_term_is_promised_first() -> None:
    assert session.on_hello(PROMISED, SESSION._replace(term=6)) == "promise"
    assert session.on_hello(session.promise(PROMISED, 6), SESSION._replace(term=6)) == "tell"


def test_a_hello_of_a_lower_term_is_told_that_its_sender_is_deposed() -> None:
    assert session.on_hello(PROMISED, SESSION._replace(term=4)) == "deposed"


@pytest.mark.parametrize("other", [{"store_id": "other"}, {"copy_id": "other"}])
def test_a_hello_to_another_store_or_copy_is_refused_whatever_its_term(other: dict[str, str]) -> None:
    for term in (4, 5, 6):
        assert session.on_hello(PROMISED, SESSION._replace(term=term, **other)) == "foreign"


def test_a_promise_ends_the_session_of_an_older_term_and_is_never_lowered() -> None:
    assert session.promise(BEGUN, 6) == Following("store", "copy", promised=6)
    assert session.promise(BEGUN, 5) == BEGUN
    assert session.promise(BEGUN, 4) == BEGUN


def test_a_position_is_told_only_once_the_end_of_the_log_is_synced() -> None:
    assert session.position_to_tell(LAST, LAST) == LAST
    assert session.position_to_tell(LAST, Position(6, 66, 4)) is None


def test_a_begin_counts_only_for_the_log_that_it_was_computed_from() -> None:
    assert session.begins(PROMISED, SESSION, LAST, LAST)
    assert not session.begins(PROMISED, SESSION, LAST, Position(8, 88, 5))
    assert not session.begins(session.promise(PROMISED, 6), SESSION, LAST, LAST)
    assert not session.begins(PROMISED, SESSION._replace(copy_id="other"), LAST, LAST)


def test_a_begin_of_a_session_that_has_begun_or_of_an_earlier_round_is_thrown_away() -> None:
    now = session.begun(PROMISED, SESSION._replace(round=2))
    assert not session.begins(now, SESSION._replace(round=2), LAST, LAST)
    assert not session.begins(now, SESSION._replace(round=1), LAST, LAST)
    assert session.begins(now, SESSION._replace(round=3), LAST, LAST)
    assert session.begins(now, SESSION._replace(start="other"), LAST, LAST)


def test_before_a_session_has_begun_nothing_is_taken_acknowledged_or_applied() -> None:
    assert not session.takes(PROMISED, SESSION, 8, 77, LAST)
    assert session.acknowledged(PROMISED, SESSION, 7) is None
    assert session.learn_committed(PROMISED, SESSION, 7, 7) == PROMISED
    assert not session.takes_snapshot(PROMISED, SESSION, Position(9, 99), LAST)


def test_the_next_record_of_the_chain_is_taken_and_no_other() -> None:
    assert session.takes(BEGUN, SESSION, 8, 77, LAST)
    assert not session.takes(BEGUN, SESSION, 9, 77, LAST)
    assert not session.takes(BEGUN, SESSION, 7, 77, LAST)
    assert not session.takes(BEGUN, SESSION, 8, 78, LAST)


@pytest.mark.parametrize(
    "other",
    [{"store_id": "x"}, {"term": 4}, {"term": 6}, {"start": "x"}, {"copy_id": "x"}, {"joined": 2}, {"round": 1}],
)
def test_what_names_another_session_is_thrown_away(other: dict[str, object]) -> None:
    named = SESSION._replace(**other)  # type: ignore[arg-type]
    assert not session.takes(BEGUN, named, 8, 77, LAST)
    assert session.acknowledged(BEGUN, named, 7) is None
    assert session.learn_committed(BEGUN, named, 7, 7) == BEGUN
    assert not session.takes_snapshot(BEGUN, named, Position(9, 99), LAST)


def test_what_is_synced_is_acknowledged() -> None:
    assert session.acknowledged(BEGUN, SESSION, 7) == 7


def test_the_committed_number_never_falls_and_never_passes_the_log() -> None:
    known = session.learn_committed(BEGUN, SESSION, 6, 7)
    assert session.may_apply(known) == 6
    assert session.may_apply(session.learn_committed(known, SESSION, 5, 7)) == 6
    assert session.may_apply(session.learn_committed(known, SESSION, 9, 7)) == 7


def test_a_new_session_knows_no_committed_number_of_the_one_before() -> None:
    known = session.learn_committed(BEGUN, SESSION, 6, 7)
    assert session.may_apply(session.begun(known, SESSION._replace(start="next"))) == 0


def test_a_snapshot_is_taken_only_where_it_is_ahead_of_the_log() -> None:
    assert session.takes_snapshot(BEGUN, SESSION, Position(8, 88), LAST)
    assert not session.takes_snapshot(BEGUN, SESSION, Position(7, 88), LAST)


# --- comparing


def _compare(ours: list[int], theirs: list[int], first: tuple[int, int] = (0, 0)) -> tuple[int | None, int]:
    """The common number of two logs, given as the checksums of number 0, 1, …, and the rounds that it took."""
    comparison, rounds = session.compare((first[0], len(ours) - 1), (first[1], len(theirs) - 1)), 0
    while not comparison.done:
        numbers = session.probes(comparison, 4)
        assert 0 < len(numbers) <= 4
        assert numbers == sorted(set(numbers))
        known = {number: ours[number] for number in numbers}, {number: theirs[number] for number in numbers}
        comparison, rounds = session.compared(comparison, *known), rounds + 1
    return comparison.agreed, rounds


def test_two_logs_agree_up_to_the_last_number_with_the_same_checksum() -> None:
    chance = random.Random(1)
    for _ in range(500):
        common, ours, theirs = (chance.randrange(40) for _ in range(3))
        shared = list(range(common + 1))
        one, other = shared + [1000 + i for i in range(ours)], shared + [2000 + i for i in range(theirs)]
        first = chance.randrange(len(one)), chance.randrange(len(other))
        expected = common if common >= max(first) else None
        assert _compare(one, other, first)[0] == expected


def test_logs_that_differ_at_their_end_alone_are_compared_in_few_rounds() -> None:
    ours = list(range(100_000))
    assert _compare(ours, ours) == (99_999, 1)
    assert _compare(ours, ours[:60_000]) == (59_999, 1)
    assert _compare(ours, [*ours[:50_000], *(-n for n in range(9))])[1] <= 9
    assert _compare(ours, [0, *(-n for n in range(1, 100_000))])[1] <= 9


def test_two_empty_logs_agree_at_the_beginning() -> None:
    assert session.compare((0, 0), (0, 0)) == Comparison(None, 0, 1)
    assert _compare([0], [0])[0] == 0


def test_logs_that_keep_no_common_number_agree_nowhere() -> None:
    comparison = session.compare((5, 9), (1, 3))
    assert comparison.done
    assert comparison.agreed is None


# --- joining


def test_a_copy_joins_with_the_records_behind_the_common_number() -> None:
    assert session.how_to_join(4, 6, 4, awaited=False, first_kept=5) == Join(4, snapshot=False)


@pytest.mark.parametrize(
    ("common", "applied", "first_kept"),
    [(4, 5, 1), (4, 0, 6), (None, 0, 1)],
    ids=["its file is beyond the common number", "the next record is no longer kept", "nothing is common"],
)
def test_a_copy_joins_by_a_snapshot_where_records_do_not_reach(
    common: int | None, applied: int, first_kept: int
) -> None:
    assert session.how_to_join(common, 6, applied, awaited=False, first_kept=first_kept) == Join(0, snapshot=True)


def test_of_a_copy_that_is_waited_for_nothing_is_cut_off() -> None:
    assert session.how_to_join(6, 6, 4, awaited=True, first_kept=1) == Join(6, snapshot=False)
    with pytest.raises(Forked):
        session.how_to_join(5, 6, 4, awaited=True, first_kept=1)


def test_a_copy_that_is_waited_for_gets_no_snapshot_because_that_would_empty_its_log() -> None:
    with pytest.raises(FellBehind):
        session.how_to_join(6, 6, 4, awaited=True, first_kept=8)
    with pytest.raises(FellBehind):
        session.how_to_join(None, 6, 4, awaited=True, first_kept=8)
