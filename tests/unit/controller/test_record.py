"""What has come of moves: sums, percentiles, and the pauses of each change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.controller.changes import Pauses
from kvstore.controller.record import Record, percentile
from kvstore.placement.cluster_map import Move

FIRST = Move(id="a", source="s1", to="s2", partitions=[1, 2], change="c1")
SECOND = Move(id="b", source="s1", to="s3", partitions=[3], change="c2")


def test_a_pause_lasts_until_clients_are_answered_and_belongs_to_the_change_of_its_move() -> None:
    record = Record()
    record.note_commit(FIRST, 10, 1000, 2.98)
    record.note_commit(SECOND, 5, 500, 3.99)
    assert record.is_open("c1")
    assert record.pauses("c1", 4.0) == Pauses(1020.0, 1020.0)
    record.note_answering(FIRST, 2.98, 3.0)
    assert not record.is_open("c1")
    assert record.pauses("c1", 99.0) == Pauses(20.0, 20.0)
    assert record.pauses("c1", 99.0, [98.0]) == Pauses(1000.0, 1000.0), "one that is not committed counts, too"
    assert record.is_open("c2")
    assert (record.stats.partitions, record.stats.keys, record.stats.bytes, record.stats.groups) == (3, 15, 1500, 2)


def test_pauses_that_are_kept_elsewhere_are_forgotten_also_while_one_lasts() -> None:
    record = Record()
    record.note_commit(FIRST, 10, 1000, 2.98)
    record.forget("c1")
    record.note_answering(FIRST, 2.98, 3.0)
    assert record.known() == []
    assert record.pauses("c1", 99.0) == Pauses()


@given(st.lists(st.floats(0, 10), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent * len(values) / 100
    assert sum(value < found for value in values) < percent * len(values) / 100


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_no_values_have_no_percentile(percent: int) -> None:
    assert percentile([], percent) == 0.0
