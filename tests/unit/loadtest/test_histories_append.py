"""loadtest.histories.append: it finds every anomaly that it claims to find, and none in serial histories."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.histories.append import Kind, check
from loadtest.histories.cycles import strongly_connected
from loadtest.histories.findings import Violation
from loadtest.histories.history import Lists, Outcome


def txn(
    begin_s: float,
    end_s: float | None,
    *reads: tuple[str, list[int]],
    outcome: Outcome | None = None,
    client: str = "c",
    **appends: int | list[int],
) -> Lists:
    """`x=1` appends 1 to x. Without an end the outcome is unknown."""
    return Lists(
        client=client,
        begin_s=begin_s,
        end_s=end_s,
        outcome=outcome or ("unknown" if end_s is None else "done"),
        reads=list(reads),
        appends={key: values if isinstance(values, list) else [values] for key, values in appends.items()},
    )


def kinds(*history: Lists) -> set[str]:
    return {anomaly.kind for anomaly in check(history)}


# --- what is right is not blamed ---------------------------------------------------------------------------------


def test_nothing_is_wrong_with_no_history_and_with_one_after_the_other() -> None:
    assert check([]) == []
    assert kinds(txn(0, 1, ("x", []), x=1), txn(2, 3, ("x", [1]), x=2), txn(4, 5, ("x", [1, 2]), ("y", []))) == set()


def test_transactions_at_the_same_time_may_be_in_either_order() -> None:
    for seen in ([], [1], [2, 3], [1, 2, 3], [2, 3, 1]):
        assert kinds(txn(0, 9, x=1), txn(0, 9, x=[2, 3]), txn(5, 8, ("x", seen))) == set()
    assert kinds(txn(0, 9, x=1), txn(0, 9, ("x", []), y=2), txn(0, 9, ("y", [2]), ("x", []))) == set()


def test_what_is_unknown_may_have_happened_or_not_or_happens_late() -> None:
    unknown = txn(0, None, x=1)
    assert kinds(unknown, txn(5, 6, ("x", []))) == set()
    assert kinds(unknown, txn(5, 6, ("x", [1]))) == set()
    assert kinds(unknown, txn(5, 6, ("x", [])), txn(7, 8, ("x", [1]))) == set()
    assert kinds(unknown, txn(5, 6, x=2), txn(7, 8, ("x", [2, 1]))) == set()


def test_what_was_refused_and_never_shows_is_right() -> None:
    assert kinds(txn(0, 1, x=1, outcome="refused"), txn(2, 3, x=2), txn(4, 5, ("x", [2]))) == set()


def test_a_read_shows_the_state_before_the_appends_of_its_own_transaction() -> None:
    assert kinds(txn(0, 1, ("x", []), x=[1, 2]), txn(2, 3, ("x", [1, 2]), ("x", [1, 2]), x=3)) == set()


# --- lists by themselves -----------------------------------------------------------------------------------------


def test_a_value_that_no_client_appended_is_found() -> None:
    assert kinds(txn(0, 1, x=1), txn(2, 3, ("x", [1, 7]))) == {Kind.FOREIGN}
    assert kinds(txn(0, 1, y=7), txn(2, 3, ("x", [7]))) == {Kind.FOREIGN}


def test_a_value_of_a_refused_transaction_is_found() -> None:
    assert Kind.ABORTED_READ in kinds(txn(0, 1, x=1, outcome="refused"), txn(2, 3, ("x", [1])))
    later = txn(2, 3, ("x", [1, 2]))
    assert Kind.ABORTED_READ in kinds(txn(0, 1, x=1, outcome="refused"), txn(0, 1, x=2), later)


def test_a_part_of_what_a_transaction_appended_is_found() -> None:
    assert Kind.INTERMEDIATE_READ in kinds(txn(0, 9, x=[1, 2]), txn(5, 6, ("x", [1])))
    assert Kind.INTERMEDIATE_READ in kinds(txn(0, 9, x=[1, 2]), txn(5, 6, ("x", [1])), txn(10, 11, ("x", [1, 2])))


def test_two_reads_of_one_transaction_that_differ_are_found() -> None:
    assert Kind.INTERNAL in kinds(txn(0, 9, x=1), txn(5, 6, ("x", []), ("x", [1])))


def test_a_value_that_is_there_twice_is_found() -> None:
    assert Kind.DUPLICATE in kinds(txn(0, 1, x=1), txn(2, 3, x=2), txn(4, 5, ("x", [1, 2, 1])))


def test_reads_of_which_neither_is_the_beginning_of_the_other_are_found() -> None:
    writes = txn(0, 9, x=1), txn(0, 9, x=2)
    assert kinds(*writes, txn(10, 11, ("x", [1, 2])), txn(10, 11, ("x", [2, 1]))) >= {Kind.INCOMPATIBLE}
    assert kinds(*writes, txn(10, 11, ("x", [1])), txn(10, 11, ("x", [2]))) >= {Kind.INCOMPATIBLE}


def test_an_acknowledged_append_that_never_shows_is_found() -> None:
    assert Kind.LOST in kinds(txn(0, 1, x=1), txn(2, 3, ("x", [])))
    assert Kind.LOST in kinds(txn(0, 1, x=1), txn(2, 3, x=2), txn(4, 5, ("x", [2])))
    assert kinds(txn(0, 3, x=1), txn(2, 5, ("x", []))) == set()  # the read may have been first


# --- cycles ------------------------------------------------------------------------------------------------------


def test_g0_two_transactions_that_overwrote_one_another_are_found() -> None:
    orders = ("x", [1, 2]), ("y", [2, 1])
    assert kinds(txn(0, 9, x=1, y=1), txn(0, 9, x=2, y=2), txn(10, 11, *orders)) == {"G0"}


def test_g1c_two_transactions_that_read_one_another_are_found() -> None:
    assert kinds(txn(0, 9, ("y", [2]), x=1), txn(0, 9, ("x", [1]), y=2)) == {"G1c"}


def test_g_single_half_a_transaction_that_was_seen_is_found() -> None:
    assert kinds(txn(0, 9, x=1, y=1), txn(0, 9, ("x", [1]), ("y", []))) == {"G-single"}
    later = txn(10, 11, ("y", [1]))  # the version order of y comes from this one
    assert kinds(txn(0, 9, x=1, y=1), txn(0, 9, ("x", [1]), ("y", [])), later) == {"G-single"}


def test_g_single_a_lost_update_is_found() -> None:
    """Both read nothing and appended; the second has overlooked the first."""
    assert kinds(txn(0, 9, ("x", []), x=1), txn(0, 9, ("x", []), x=2), txn(10, 11, ("x", [1, 2]))) == {"G-single"}


def test_g2_write_skew_is_found() -> None:
    assert kinds(txn(0, 9, ("y", []), x=1), txn(0, 9, ("x", []), y=2), txn(10, 11, ("x", [1]), ("y", [2]))) == {"G2"}


def test_g2_two_reads_that_saw_two_writes_in_different_orders_are_found() -> None:
    long_fork = txn(0, 9, ("x", [1]), ("y", [])), txn(0, 9, ("x", []), ("y", [2]))
    assert kinds(txn(0, 9, x=1), txn(0, 9, y=2), *long_fork) == {"G2"}


def test_g0_realtime_an_append_behind_a_later_one_is_found() -> None:
    assert kinds(txn(0, 1, x=1), txn(2, 3, x=2), txn(4, 5, ("x", [2, 1]))) == {"G0-realtime"}


def test_g1c_realtime_a_read_of_the_future_is_found() -> None:
    assert kinds(txn(0, 1, ("x", [1])), txn(2, 3, x=1)) == {"G1c-realtime"}


def test_g_single_realtime_a_stale_read_is_found() -> None:
    assert kinds(txn(0, 1, x=1), txn(2, 3, ("x", [])), txn(4, 5, ("x", [1]))) == {"G-single-realtime"}


def test_g_single_realtime_a_value_that_was_there_and_is_gone_is_found() -> None:
    unknown = txn(0, None, x=1)
    assert kinds(unknown, txn(1, 2, ("x", [1])), txn(3, 4, ("x", []))) == {"G-single-realtime"}


def test_g2_realtime_write_skew_around_a_read_that_began_after_one_of_the_writes_is_found() -> None:
    skewed = txn(0, 9, ("y", []), x=1), txn(1, 2, y=2)
    assert kinds(*skewed, txn(5, 6, ("x", []))) == {"G2-realtime"}
    assert kinds(*skewed, txn(1, 6, ("x", []))) == set()


def test_transactions_that_touch_in_time_are_not_in_order() -> None:
    assert kinds(txn(0, 1, x=1), txn(1, 3, ("x", [])), txn(4, 5, ("x", [1]))) == set()


def test_an_unknown_transaction_comes_before_nothing_but_after_what_ended_before_it_began() -> None:
    assert kinds(txn(0, 1, ("x", [1])), txn(2, None, x=1)) == {"G1c-realtime"}
    assert kinds(txn(0, None, x=1), txn(2, 3, ("x", [])), txn(4, 5, ("x", [1]))) == set()


def test_the_gravest_name_is_given_and_independent_knots_are_told_apart() -> None:
    g0 = [txn(0, 9, x=1, y=1), txn(0, 9, x=2, y=2), txn(10, 11, ("x", [1, 2]), ("y", [2, 1]))]
    skew = [txn(0, 9, ("b", []), a=3), txn(0, 9, ("a", []), b=4), txn(10, 11, ("a", [3]), ("b", [4]))]
    assert kinds(*g0, *skew) == {"G0", "G2"}


# --- what it tells -----------------------------------------------------------------------------------------------


def test_the_witness_names_the_transactions_the_edges_and_what_they_did() -> None:
    (found,) = check([txn(0, 9, x=1, y=1, client="anna"), txn(0, 9, ("x", [1]), ("y", []), client="ben")])
    for text in ("G-single", "rw-> T0", "wr-> T1", "T1 [ben, 0.0000 to 9.0000]: read x [1], read y []", "[1] to y"):
        assert text in str(found)


def test_one_fault_in_many_reads_is_told_a_few_times_only() -> None:
    reads = [txn(2 + 2 * n, 3 + 2 * n, ("x", [7])) for n in range(50)]
    assert 1 <= len(check([txn(0, 1, x=1), *reads])) < 10


def test_a_history_that_appends_a_value_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="once only"):
        check([txn(0, 1, x=1), txn(2, 3, x=1)])
    with pytest.raises(ValueError, match="once only"):
        check([txn(0, 1, x=[1, 1])])


# --- histories that a serial store made --------------------------------------------------------------------------


def serial_history(seed: int, length: int, keys: int = 3, clients: int = 5) -> list[Lists]:
    """What clients of a strictly serializable store may see: every operation takes effect at one instant between its
    begin and its end; unknown ones at some instant after their begin, or never."""
    rng = random.Random(seed)
    names = [f"k{number}" for number in range(keys)]
    free_at = [0.0] * clients
    plan: list[tuple[float, float, float | None, Outcome, int]] = []
    for _ in range(length):
        client = rng.randrange(clients)
        begin_s = free_at[client] + rng.random()
        end_s = begin_s + rng.random() * 2
        effect_s = rng.uniform(begin_s, end_s)
        outcome: Outcome = rng.choices(("done", "refused", "unknown"), (8, 1, 1))[0]
        if outcome == "unknown":
            effect_s = begin_s + rng.random() * 20
        free_at[client] = end_s
        plan.append((effect_s, begin_s, None if outcome == "unknown" else end_s, outcome, client))
    state: dict[str, list[int]] = {name: [] for name in names}
    history = []
    for number, (_, begin_s, ended_s, outcome, client) in enumerate(sorted(plan)):
        reads = [(name, list(state[name])) for name in rng.choices(names, k=rng.randint(0, 3))]
        chosen = rng.sample(names, k=rng.randint(0, 2))
        appends = {name: [number * 10 + place for place in range(rng.randint(1, 2))] for name in chosen}
        if outcome == "done" or (outcome == "unknown" and rng.random() < 0.5):
            for name, values in appends.items():
                state[name] = state[name] + values
        seen = reads if outcome == "done" else []
        history.append(txn(begin_s, ended_s, *seen, outcome=outcome, client=f"c{client}", **appends))
    return history


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 60))
def test_a_history_of_a_strictly_serializable_store_is_never_blamed(seed: int, length: int) -> None:
    assert check(serial_history(seed, length)) == []


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_a_value_dropped_from_all_reads_of_such_a_history_is_found(seed: int) -> None:
    history = serial_history(seed, 60)
    acknowledged = {
        (key, values[0]): operation.end_s
        for operation in history
        if operation.outcome == "done" and operation.end_s is not None
        for key, values in operation.appends.items()
    }
    last = {key: operation.begin_s for operation in history for key, _ in operation.reads}
    for operation in history:
        for key, _ in operation.reads:
            last[key] = max(last[key], operation.begin_s)
    lost = next((kv for kv, end_s in acknowledged.items() if last.get(kv[0], 0.0) > end_s), None)
    if lost is None:
        return
    for operation in history:
        operation.reads = [
            (key, [value for value in values if (key, value) != lost]) for key, values in operation.reads
        ]
    assert Kind.LOST in {anomaly.kind for anomaly in check(history)}


def test_a_long_history_is_checked_in_seconds() -> None:
    assert check(serial_history(1, 5_000, keys=30, clients=20)) == []


# --- Tarjan ------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(edges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_components_are_those_that_reach_one_another(edges: list[tuple[int, int]]) -> None:
    reach = [[a == b for b in range(10)] for a in range(10)]
    for a, b in edges:
        reach[a][b] = True
    for via in range(10):
        for a in range(10):
            for b in range(10):
                reach[a][b] |= reach[a][via] and reach[via][b]
    expected = {frozenset(b for b in range(10) if reach[a][b] and reach[b][a]) for a in range(10)}
    found = strongly_connected([[b for a, b in edges if a == node] for node in range(10)])
    assert {frozenset(component) for component in found} == expected
    assert sum(map(len, found)) == 10


def test_a_chain_of_a_hundred_thousand_does_not_overflow_the_stack() -> None:
    assert len(strongly_connected([[node + 1] for node in range(99_999)] + [[]])) == 100_000


def test_an_anomaly_reads_as_a_sentence() -> None:
    assert str(Violation(Kind.LOST, "it is gone")) == "lost append: it is gone"
