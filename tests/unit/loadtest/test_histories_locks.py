"""loadtest.histories.locks: it finds every fault that it claims to find, and none in locks that are right."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.histories.history import Count, Guarded, Lease
from loadtest.histories.locks import Kind, check


def lease(begin_s: float, end_s: float | None, action: Any, token: int | None, **members: Any) -> Lease:
    """Without an end the outcome is unknown. It lasts for ten seconds."""
    members.setdefault("outcome", "unknown" if end_s is None else "done")
    members.setdefault("lock", "l")
    members.setdefault("ttl_s", 10.0)
    return Lease(client=f"c{token}", begin_s=begin_s, end_s=end_s, action=action, token=token, **members)


def acquire(begin_s: float, end_s: float | None, token: int | None, **members: Any) -> Lease:
    return lease(begin_s, end_s, "acquire", token, **members)


def renew(begin_s: float, end_s: float | None, token: int, **members: Any) -> Lease:
    return lease(begin_s, end_s, "renew", token, **members)


def release(begin_s: float, end_s: float | None, token: int, **members: Any) -> Lease:
    return lease(begin_s, end_s, "release", token, **members)


def write(begin_s: float, end_s: float | None, token: int, value: int, **members: Any) -> Guarded:
    members.setdefault("outcome", "unknown" if end_s is None else "done")
    return Guarded(
        client=f"c{token}", begin_s=begin_s, end_s=end_s, lock="l", token=token, key="k", value=value, **members
    )


def read(begin_s: float, end_s: float, value: int | None) -> Count:
    return Count(client="r", begin_s=begin_s, end_s=end_s, outcome="done", key="k", action="read", value=value)


def kinds(*history: Lease | Guarded | Count) -> set[str]:
    return {violation.kind for violation in check(history)}


ONE = acquire(0, 1, 1)


# --- what is right is not blamed ---------------------------------------------------------------------------------


def test_nothing_is_wrong_with_no_history_and_with_one_holder_after_the_other() -> None:
    assert kinds() == set()
    first = ONE, write(2, 3, 1, 1), renew(4, 5, 1), write(5, 6, 1, 2), release(7, 8, 1)
    assert kinds(*first, acquire(7.5, 9, 4), write(10, 11, 4, 3), read(12, 13, 3)) == set()


def test_a_lease_that_is_over_or_given_back_may_be_granted_again() -> None:
    assert kinds(ONE, acquire(2, 10, 2)) == set()
    assert kinds(ONE, release(2, None, 1), acquire(3, 4, 2)) == set()
    assert kinds(ONE, release(2, 9, 1), acquire(3, 4, 2)) == set()
    assert kinds(ONE, renew(5, 6, 1), acquire(8, 15, 2)) == set()


def test_a_grant_whose_answer_was_late_may_have_been_over_before_the_next_one() -> None:
    assert kinds(acquire(0, 20, 1), acquire(12, 13, 2), write(14, 15, 2, 1)) == set()
    assert kinds(acquire(0, 20, 1, ttl_s=1.0), acquire(5, 6, 2), write(14, 15, 2, 1)) == set()


def test_unknown_ones_prove_nothing_against_any_client() -> None:
    assert kinds(ONE, renew(2, None, 1), acquire(10, 11, 2)) == set()
    assert kinds(acquire(0, None, None), acquire(1, 2, 2), acquire(3, None, None)) == set()
    assert kinds(ONE, write(2, None, 1, 1), acquire(10, 11, 2), write(12, 13, 2, 1)) == set()
    assert kinds(ONE, write(2, None, 1, 1), acquire(10, 11, 2), write(12, 13, 2, 2)) == set()


def test_what_was_refused_is_right() -> None:
    late = write(20, 21, 1, 2, outcome="refused"), renew(20, 21, 1, outcome="refused")
    assert kinds(ONE, write(2, 3, 1, 1), acquire(12, 13, 2), *late, acquire(14, 15, None, outcome="refused")) == set()
    assert kinds(ONE, release(2, 3, 1, outcome="refused"), write(4, 5, 1, 1)) == set()


def test_locks_have_nothing_to_do_with_one_another() -> None:
    assert kinds(ONE, acquire(2, 3, 1, lock="other")) == set()


# --- holders -----------------------------------------------------------------------------------------------------


def test_two_holders_at_once_are_found() -> None:
    assert kinds(ONE, acquire(2, 3, 2)) == {Kind.TWO_HOLDERS}
    assert kinds(ONE, acquire(0, 3, 2)) == {Kind.TWO_HOLDERS}
    assert Kind.TWO_HOLDERS in kinds(ONE, acquire(2, 3, 2), release(4, 5, 1))


def test_a_renewed_lease_that_was_granted_to_another_one_is_found() -> None:
    assert kinds(ONE, renew(8, 9, 1), acquire(11, 12, 2)) == {Kind.TWO_HOLDERS}
    assert kinds(ONE, renew(8, 9, 1, ttl_s=0.0), acquire(11, 12, 2)) == {Kind.TWO_HOLDERS}


def test_a_grant_in_the_middle_of_a_hold_is_found_although_it_may_have_been_over_when_it_was_answered() -> None:
    assert kinds(ONE, acquire(2, 8, 2, ttl_s=1.0)) == {Kind.TWO_HOLDERS}


def test_a_lock_held_by_one_for_long_and_by_two_others_in_turn_is_found() -> None:
    history = ONE, acquire(2, 3, 2), release(4, 5, 2), acquire(6, 7, 3)
    details = [violation.detail for violation in check(history) if violation.kind == Kind.TWO_HOLDERS]
    assert len(details) == 2


def test_a_release_that_was_refused_gives_nothing_back() -> None:
    assert kinds(ONE, release(2, 3, 1, outcome="refused"), acquire(4, 5, 2)) == {Kind.TWO_HOLDERS}


# --- tokens ------------------------------------------------------------------------------------------------------


def test_tokens_that_do_not_rise_are_found() -> None:
    assert kinds(acquire(0, 1, 5), acquire(12, 13, 4)) == {Kind.TOKEN_BACK}
    assert kinds(acquire(0, 1, 3), release(2, 3, 3), acquire(2, 9, 4), renew(4, 5, 4), acquire(14, 16, 2)) == {
        Kind.TOKEN_BACK
    }


def test_a_token_that_is_granted_twice_is_found() -> None:
    assert Kind.TOKEN_TWICE in kinds(acquire(0, 15, 5), acquire(12, 13, 5))


def test_a_token_that_was_never_granted_is_found() -> None:
    assert kinds(ONE, release(2, 3, 1), write(2, 3, 7, 1)) == {Kind.FOREIGN_TOKEN}


def test_a_write_with_a_token_older_than_one_that_was_granted_is_found() -> None:
    assert kinds(ONE, acquire(12, 13, 2), write(14, 15, 1, 1)) == {Kind.STALE_TOKEN}
    assert kinds(ONE, acquire(12, 15, 2), write(14, 16, 1, 1)) == set()


def test_a_write_with_a_token_older_than_one_that_was_accepted_is_found() -> None:
    history = ONE, acquire(12, 19, 2), write(13, 14, 2, 1), write(15, 16, 1, 2)
    assert kinds(*history) == {Kind.STALE_TOKEN}


def test_a_renewal_and_a_release_with_an_older_token_are_found() -> None:
    for late in (renew(14, 15, 1), release(14, 15, 1)):
        assert Kind.STALE_TOKEN in kinds(ONE, acquire(12, 13, 2), late)


def test_whatever_is_accepted_after_the_release_is_found() -> None:
    for late in (write(4, 5, 1, 1), renew(4, 5, 1), release(4, 5, 1)):
        assert kinds(ONE, release(2, 3, 1), late) == {Kind.RELEASED}
    assert kinds(ONE, release(2, None, 1), write(4, 5, 1, 1)) == set()


# --- guarded values ----------------------------------------------------------------------------------------------


def test_a_guarded_value_that_was_acknowledged_twice_is_found() -> None:
    assert kinds(ONE, write(2, 9, 1, 1), write(2, 9, 1, 1)) == {Kind.LOST_UPDATE}


def test_a_guarded_write_over_a_newer_value_is_found() -> None:
    history = ONE, write(2, 3, 1, 1), write(4, 5, 1, 2), acquire(12, 13, 2)
    assert kinds(*history, write(14, None, 2, 1), write(15, 16, 2, 2)) == {Kind.LOST_UPDATE}
    assert kinds(ONE, write(2, None, 1, 1), write(4, 5, 1, 2), write(6, 7, 1, 1)) == {Kind.LOST_UPDATE}


def test_a_guarded_value_that_no_client_can_have_written_is_found() -> None:
    assert kinds(ONE, write(2, 3, 1, 1), write(4, 5, 1, 3)) == {Kind.SKIPPED}
    assert kinds(ONE, write(2, 3, 1, 1), write(4, None, 1, 3)) == {Kind.SKIPPED}
    assert kinds(ONE, write(2, 3, 1, 1, outcome="refused"), write(4, 5, 1, 2)) == {Kind.SKIPPED}
    assert kinds(ONE, write(2, 3, 1, 2), write(4, 5, 1, 1)) >= {Kind.SKIPPED}
    assert kinds(ONE, write(2, 3, 1, 1), read(4, 5, 2)) == {Kind.SKIPPED}


def test_a_read_with_less_than_was_written_is_found() -> None:
    for seen in (None, 1):
        assert kinds(ONE, write(2, 3, 1, 1), write(4, 5, 1, 2), read(6, 7, seen)) == {Kind.TOO_FEW}
    assert kinds(ONE, write(2, 3, 1, 1), write(4, 7, 1, 2), read(6, 8, 1)) == set()


# --- a lock that is right ----------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_a_simulated_lock_is_not_blamed(seed: int) -> None:
    """Grants one after the other, whose ends are drawn from releases and leases that ran out; answers come late."""
    draw = random.Random(seed)
    history: list[Lease | Guarded | Count] = []
    now_s, value, token = 0.0, 0, 0

    def around(make: Any, *arguments: Any, known: bool = True, **members: Any) -> None:
        begin_s, end_s = now_s - draw.random() * 3, now_s + draw.random() * 3
        history.append(make(begin_s, end_s if known else None, *arguments, **members))

    for _ in range(draw.randrange(1, 6)):
        token += draw.randrange(1, 3)
        granted_s = now_s
        if draw.random() < 0.2:  # granted, and never answered
            around(acquire, None, known=False)
            now_s += 10.5
            continue
        around(acquire, token)
        until_s = granted_s + 10
        while draw.random() < 0.6 and now_s + 2 < until_s:
            now_s += draw.random() * 2
            known = draw.random() < 0.8
            if draw.random() < 0.3:
                around(renew, token, known=known)
                until_s = now_s + 10
            else:
                history.append(write(now_s, now_s + 0.1 if known else None, token, value + 1))
                value += 1 if known else draw.randrange(2)
        stale = token
        if draw.random() < 0.5 and now_s < until_s:
            now_s += draw.random() * (until_s - now_s)
            around(release, token, known=draw.random() < 0.8)
        else:
            now_s = until_s + 0.5
        around(write, stale, value + 1, outcome="refused")
    draw.shuffle(history)
    assert kinds(*history, read(now_s + 50, now_s + 51, value)) == set()
