"""loadtest.histories.registers: it finds every fault that it claims to find, and none in a register that is right."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadtest.histories.history import Register
from loadtest.histories.registers import Kind, check
from tests.unit.loadtest.simulated_registers import Plan, simulate

VERSION_KINDS = {Kind.TWO_VALUES, Kind.TWO_VERSIONS, Kind.VERSION_USED, Kind.VERSION_BACK, Kind.WRONG_412}


def call(begin_s: float, end_s: float | None, action: Any, value: str | None = None, **members: Any) -> Register:
    """Without an end the outcome is unknown."""
    members.setdefault("outcome", "unknown" if end_s is None else "done")
    members.setdefault("key", "k")
    return Register(client="c", begin_s=begin_s, end_s=end_s, action=action, value=value, **members)


def write(begin_s: float, end_s: float | None, value: str, **members: Any) -> Register:
    return call(begin_s, end_s, "write", value, **members)


def read(begin_s: float, end_s: float | None, value: str | None, **members: Any) -> Register:
    return call(begin_s, end_s, "read", value, **members)


def delete(begin_s: float, end_s: float | None, **members: Any) -> Register:
    return call(begin_s, end_s, "delete", **members)


def swap(begin_s: float, end_s: float | None, expected: str | None, value: str, **members: Any) -> Register:
    return call(begin_s, end_s, "swap", value, expected=expected, **members)


def kinds(*history: Register) -> set[str]:
    found = check(history)
    assert not found.undecided
    return {violation.kind for violation in found.violations}


def is_right(*history: Register) -> bool:
    return kinds(*history) == set()


# --- what is right is not blamed ---------------------------------------------------------------------------------


def test_nothing_is_wrong_with_no_history_and_with_one_after_the_other() -> None:
    assert is_right()
    assert is_right(read(0, 1, None), write(2, 3, "a"), read(4, 5, "a"), delete(6, 7), read(8, 9, None))
    assert is_right(swap(0, 1, None, "a"), swap(2, 3, "a", "b"), swap(4, 5, "a", "c", met=False), read(6, 7, "b"))


def test_operations_at_the_same_time_may_be_in_either_order() -> None:
    for seen in (None, "a", "b"):
        assert is_right(write(0, 9, "a"), write(0, 9, "b"), read(5, 8, seen))
    assert is_right(write(0, 9, "a"), delete(0, 9), read(10, 11, None))
    assert is_right(write(0, 9, "a"), delete(0, 9), read(10, 11, "a"))


def test_keys_have_nothing_to_do_with_one_another() -> None:
    assert is_right(write(0, 1, "a"), read(2, 3, None, key="other"), write(4, 5, "b", key="other"), read(6, 7, "a"))


def test_what_is_unknown_is_done_at_any_time_after_its_begin_or_never() -> None:
    for unknown in (write(0, None, "a"), swap(0, None, None, "a")):
        assert is_right(unknown, read(1, 2, None), read(3, 4, None))
        assert is_right(unknown, read(1, 2, None), read(3, 4, "a"))
        assert is_right(unknown, read(1, 2, "a"), read(3, 4, "a"))
    assert is_right(write(0, None, "a"), write(1, 2, "b"), read(3, 4, "b"), read(5, 6, "a"))
    assert is_right(write(0, 1, "a"), delete(2, None), read(3, 4, "a"), read(5, 6, None))
    assert is_right(write(0, 1, "a"), read(2, None, None), read(3, 4, "a"))


def test_an_unknown_change_that_no_client_saw_can_be_why_a_swap_was_refused() -> None:
    refused = swap(4, 5, "a", "c", met=False)
    for unknown in (write(2, None, "b"), delete(2, None), swap(2, None, "a", "b")):
        assert is_right(write(0, 1, "a"), unknown, refused)
        assert is_right(write(0, 1, "a"), unknown, write(4, None, "x"), refused)
    assert is_right(write(0, None, "a"), swap(4, 5, None, "c", met=False))
    assert is_right(write(0, 1, "a"), delete(2, None), swap(4, 5, None, "b"), read(6, 7, "b"))


def test_an_unknown_delete_between_two_swaps_that_both_found_nothing_there_was_done() -> None:
    assert is_right(swap(0, 1, None, "a"), delete(0, None), swap(2, None, None, "b"), read(4, 5, "b"))
    assert not is_right(swap(0, 1, None, "a"), swap(2, None, None, "b"), read(4, 5, "b"))


def test_a_chain_of_unknown_swaps_whose_last_one_was_seen_was_done() -> None:
    chain = swap(0, None, None, "a"), swap(0, None, "a", "b"), swap(0, None, "b", "c")
    assert is_right(*chain, read(5, 6, "c"))
    assert not is_right(*chain, read(5, 6, "c"), read(7, 8, "b"))
    assert not is_right(*chain, read(5, 6, "c"), read(7, 8, None))


def test_what_was_refused_and_never_shows_is_right() -> None:
    assert is_right(write(0, 1, "a", outcome="refused"), read(2, 3, None), delete(4, 5, outcome="refused"))
    assert is_right(write(0, 1, "a"), delete(2, 3, outcome="refused"), read(4, 5, "a"))


# --- values ------------------------------------------------------------------------------------------------------


def test_a_value_that_no_client_wrote_to_this_key_is_found() -> None:
    assert kinds(read(0, 1, "a")) == {Kind.FOREIGN}
    assert kinds(write(0, 1, "a"), read(2, 3, "a", key="other")) == {Kind.FOREIGN}
    assert kinds(swap(0, 1, "a", "b")) == {Kind.FOREIGN}
    assert kinds(swap(0, None, "a", "b"), read(2, 3, "b")) == {Kind.FOREIGN}


def test_a_value_whose_write_was_refused_is_found() -> None:
    assert kinds(write(0, 1, "a", outcome="refused"), read(2, 3, "a")) == {Kind.REFUSED}
    assert kinds(write(0, 1, "a"), swap(2, 3, None, "b", met=False), read(4, 5, "b")) == {Kind.REFUSED}


def test_a_value_that_is_seen_before_its_write_begins_is_found() -> None:
    assert kinds(read(0, 1, "a"), write(2, 3, "a")) == {Kind.EARLY}
    assert kinds(read(0, 1, "a"), write(2, None, "a")) == {Kind.EARLY}


def test_two_swaps_that_were_done_on_one_value_are_found() -> None:
    assert kinds(write(0, 1, "a"), swap(2, 9, "a", "b"), swap(2, 9, "a", "c")) == {Kind.LOST_UPDATE}
    unknown = swap(2, None, "a", "c")
    assert kinds(write(0, 1, "a"), swap(2, 9, "a", "b"), unknown, read(10, 11, "c")) == {Kind.LOST_UPDATE}
    assert is_right(write(0, 1, "a"), swap(2, 9, "a", "b"), unknown, read(10, 11, "b"))


# --- orders ------------------------------------------------------------------------------------------------------


def test_an_acknowledged_write_that_a_later_read_does_not_show_is_found() -> None:
    assert kinds(write(0, 1, "a"), read(2, 3, None)) == {Kind.NOT_LINEARIZABLE}
    assert kinds(write(0, 1, "a"), write(2, 3, "b"), read(4, 5, "a")) == {Kind.NOT_LINEARIZABLE}
    assert kinds(write(0, 1, "a"), delete(2, 3), read(4, 5, "a")) == {Kind.NOT_LINEARIZABLE}
    assert kinds(write(0, 1, "a"), swap(2, 3, "a", "b"), read(4, 5, "a")) == {Kind.NOT_LINEARIZABLE}


def test_reads_that_go_back_are_found() -> None:
    for writes in ((write(0, 9, "a"), write(0, 9, "b")), (write(0, None, "a"), write(0, None, "b"))):
        assert kinds(*writes, read(1, 2, "a"), read(3, 4, "b"), read(5, 6, "a")) == {Kind.NOT_LINEARIZABLE}
    assert kinds(write(0, None, "a"), read(1, 2, "a"), read(3, 4, None)) == {Kind.NOT_LINEARIZABLE}


def test_an_absence_between_two_reads_of_a_value_is_found() -> None:
    assert kinds(write(0, 9, "a"), delete(0, 9), read(1, 2, "a"), read(3, 4, None), read(5, 6, "a")) == {
        Kind.NOT_LINEARIZABLE
    }


def test_a_swap_that_was_done_or_refused_against_what_was_there_is_found() -> None:
    assert kinds(write(0, 1, "a"), swap(2, 3, None, "b")) == {Kind.NOT_LINEARIZABLE}
    assert kinds(write(0, 1, "a"), swap(2, 3, "a", "b", met=False)) == {Kind.NOT_LINEARIZABLE}
    assert kinds(swap(0, 1, None, "a", met=False)) == {Kind.NOT_LINEARIZABLE}
    steady = write(0, 1, "a"), read(2, 3, "a"), swap(4, 5, "a", "b", met=False), read(6, 7, "a")
    assert kinds(*steady) == {Kind.NOT_LINEARIZABLE}


def test_an_unknown_change_is_done_once_only() -> None:
    assert kinds(write(0, 1, "a"), delete(2, None), read(3, 4, None), write(5, 6, "b"), read(7, 8, None)) == {
        Kind.NOT_LINEARIZABLE
    }
    twice = swap(2, 3, "a", "x", met=False), write(4, 5, "b"), swap(6, 7, "b", "y", met=False)
    assert kinds(write(0, 1, "a"), write(0, None, "c"), *twice) == {Kind.NOT_LINEARIZABLE}
    assert is_right(write(0, 1, "a"), write(0, None, "c"), write(0, None, "d"), *twice)


def test_the_text_shows_where_every_order_ends() -> None:
    history = write(0, 1, "a"), delete(2, 3), read(4, 5, None), swap(6, 7, None, "b", met=False), read(8, 9, None)
    (violation,) = check(history).violations
    assert "until 7.0000 there is an order of 3 operations" in violation.detail
    assert "then the read of absent [c, 4.0000 to 5.0000]; it leaves the key absent" in violation.detail
    assert violation.detail.endswith("can be next:\n    the swap from absent to 'b' (412) [c, 6.0000 to 7.0000]")


def test_a_value_that_was_held_and_what_contradicts_it_are_shown() -> None:
    (violation,) = check(
        [write(0, 1, "a"), read(2, 9, "b"), write(3, 4, "b"), read(5, 6, "a", said="stale")]
    ).violations
    assert "it held 'a' from the end of the write of 'a' [c, 0.0000 to 1.0000]" in violation.detail
    assert "to the begin of the read of 'a' [c, 5.0000 to 6.0000, told: stale]" in violation.detail
    assert violation.detail.endswith("and in between: the write of 'b' [c, 3.0000 to 4.0000]")


def test_a_search_that_is_given_up_is_named_and_accuses_no_client() -> None:
    hard = [delete(0, 200) for _ in range(14)] + [write(50, 100, "a"), read(120, 130, None)]
    hard.append(swap(140, 150, None, "b", met=False))
    found = check(hard, steps_max=50)
    assert found.violations == []
    assert len(found.undecided) == 1
    assert "key k: the search for an order of 17 operations was given up after 50 steps" in found.undecided[0]
    easy = write(0, 1, "c", key="easy"), read(2, 3, None, key="easy"), delete(4, 9, key="easy")
    assert [violation.kind for violation in check([*hard, *easy], steps_max=50).violations] == [Kind.NOT_LINEARIZABLE]


def test_a_value_that_is_written_twice_proves_nothing() -> None:
    with pytest.raises(ValueError, match="written twice"):
        check([write(0, 1, "a"), write(2, 3, "a", key="other")])
    with pytest.raises(ValueError, match="names no value"):
        check([call(0, 1, "write")])


# --- versions ----------------------------------------------------------------------------------------------------


def test_versions_that_rise_with_every_change_are_right() -> None:
    assert is_right(
        write(0, 1, "a", version=1),
        read(2, 3, "a", version=1),
        swap(4, 5, "x", "c", met=False, version=1),
        delete(6, 7, version=4),
        read(8, 9, None),
        swap(10, 11, None, "b", version=5),
        read(10, 11, None),
    )


def test_one_version_with_two_values_is_found() -> None:
    assert kinds(write(0, 9, "a", version=1), write(0, 9, "b", version=1)) == {Kind.TWO_VALUES, Kind.VERSION_USED}
    assert kinds(write(0, 9, "a"), write(0, 9, "b"), read(0, 9, "a", version=1), read(0, 9, "b", version=1)) == {
        Kind.TWO_VALUES
    }
    assert Kind.TWO_VALUES in kinds(write(0, 1, "a", version=1), delete(2, 3, version=1))


def test_one_value_with_two_versions_is_found() -> None:
    assert kinds(write(0, 1, "a", version=1), read(2, 3, "a", version=2)) == {Kind.TWO_VERSIONS}


def test_one_version_of_two_changes_is_found() -> None:
    assert kinds(delete(0, 9, version=3), delete(0, 9, version=3)) == {Kind.VERSION_USED}


def test_a_version_that_goes_back_in_time_is_found() -> None:
    assert kinds(write(0, 1, "a", version=2), write(2, 3, "b", version=1)) == {Kind.VERSION_BACK}
    assert kinds(write(0, 1, "a", version=2), delete(2, 3), write(4, 5, "b"), read(6, 7, "b", version=1)) == {
        Kind.VERSION_BACK
    }
    refused = swap(2, 3, "b", "c", met=False, version=1)
    assert kinds(write(0, 1, "a", version=2), refused) == {Kind.VERSION_BACK}
    assert Kind.VERSION_BACK in kinds(read(0, 1, None, version=2), write(2, 3, "a", version=2))
    assert is_right(write(0, 1, "a", version=2), write(1, 2, "b", version=1), read(3, 4, "a"))


def test_a_412_that_names_the_version_that_was_expected_is_found() -> None:
    history = write(0, 1, "a", version=1), delete(2, 9), swap(2, 9, "a", "b", met=False, version=1)
    assert kinds(*history) == {Kind.WRONG_412}


# --- the trial of all permutations -------------------------------------------------------------------------------


def has_order(history: Sequence[Register]) -> bool:
    """By trying all orders of what was done, with and without what is unknown."""

    def after(state: str | None, operation: Register) -> Iterator[str | None]:
        if operation.action == "read":
            if operation.outcome == "unknown" or operation.value == state:
                yield state
        elif operation.action == "swap" and not (operation.met and state == operation.expected):
            if not operation.met and state != operation.expected:
                yield state
        else:
            yield operation.value if operation.action != "delete" else None

    def can_go_on(state: str | None, left: Sequence[Register]) -> bool:
        first_end_s = min((one.end_s for one in left if one.end_s is not None), default=None)
        if first_end_s is None:
            return True
        return any(
            can_go_on(new, [*left[:place], *left[place + 1 :]])
            for place, one in enumerate(left)
            if one.begin_s <= first_end_s
            for new in after(state, one)
        )

    return can_go_on(None, [operation for operation in history if operation.outcome != "refused"])


def some_history(draw: random.Random, length: int) -> list[Register]:
    """A register that is right: each operation takes effect at an instant between its begin and its end."""
    state: str | None = None
    known: list[str | None] = [None]
    history = []
    for number in range(length):
        effect_s = 2.0 * number
        action = draw.choice(("read", "read", "write", "swap", "swap", "delete"))
        operation = call(effect_s - draw.randrange(10), effect_s + draw.randrange(10), action, outcome="done")
        if draw.random() < 0.25:
            operation.end_s, operation.outcome = None, "unknown"
        if action in ("write", "swap"):
            operation.value = f"v{number}"
        if action == "swap":
            operation.expected = draw.choice((*known, state))
        is_done = operation.outcome == "done" or draw.random() < 0.5
        if action == "read":
            operation.value = state if is_done else None
        elif action == "swap" and is_done and operation.expected != state:
            operation.met = operation.outcome == "unknown"
        elif is_done:
            state = operation.value
            known.append(state)
        history.append(operation)
    return history


def mutate(draw: random.Random, history: list[Register]) -> None:
    operation = draw.choice(history)
    values = [one.value for one in history] + [None]
    how = draw.randrange(4)
    if how == 0 and operation.action == "read":
        operation.value = draw.choice(values)
    elif how == 1 and operation.action == "swap":
        operation.expected = draw.choice(values)
    elif how == 2 and operation.action == "swap" and operation.outcome == "done":
        operation.met = not operation.met
    else:
        moved_s = draw.randrange(-10, 10)
        operation.begin_s += moved_s
        operation.end_s = None if operation.end_s is None else operation.end_s + moved_s
    draw.shuffle(history)


@settings(max_examples=1500)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 8), mutations=st.integers(0, 2))
@example(seed=0, length=8, mutations=0)
def test_it_agrees_with_the_trial_of_all_permutations(seed: int, length: int, mutations: int) -> None:
    draw = random.Random(seed)
    history = some_history(draw, length)
    for _ in range(mutations):
        mutate(draw, history)
    assert is_right(*history) == has_order(history)
    if not mutations:
        assert is_right(*history)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    keys=st.sampled_from((1, 3)),
    unknown=st.sampled_from((0.0, 0.1)),
    versions=st.booleans(),
)
def test_a_simulated_store_with_many_clients_is_right(seed: int, keys: int, unknown: float, versions: bool) -> None:
    plan = Plan(operations=300, keys=keys, clients=12, skew=0.99, unknown=unknown, versions=versions, seed=seed)
    assert is_right(*simulate(plan))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_an_old_version_in_a_long_history_is_found(seed: int) -> None:
    history = simulate(Plan(operations=400, keys=2, clients=8, seed=seed))
    told = [one for one in history if one.action == "read" and one.version is not None]
    last = max(told, key=lambda one: one.begin_s)
    older = [one for one in told if one.key == last.key and (one.version or 0) < (last.version or 0)]
    last.version = older[0].version
    assert kinds(*history) & VERSION_KINDS
