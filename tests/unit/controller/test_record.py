"""What has come of moves: sums, percentiles, and when a change begins and ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.controller.record import Record, percentile
from kvstore.placement.cluster_map import Move

MOVES = [Move(id="a", source="s1", to="s2", partitions=[1, 2]), Move(id="b", source="s1", to="s3", partitions=[3])]


def test_a_change_begins_with_the_first_plan_and_ends_with_the_last_move() -> None:
    record = Record()
    record.note_standing([], [], 1.0)
    assert record.change is None
    record.note_standing([], MOVES, 2.0)
    first = record.change
    assert first is not None
    assert first.report(2.5)["seconds"] == 0.5
    assert record.note_commit(MOVES[0], 10, 1000, 2.98) is first
    record.note_answering(first, 2.98, 3.0)
    record.note_standing(MOVES, MOVES[1:], 3.0)
    record.note_standing(MOVES[1:], MOVES, 3.5)
    assert record.change is first
    record.note_commit(MOVES[1], 5, 500, 3.99)
    record.note_standing(MOVES, [], 4.0)
    assert first.report(4.01)["write_pause_ms_max"] == 20.0
    record.note_answering(first, 3.99, 4.02)
    assert first.report(99.0) == {
        "partitions": 3, "keys": 15, "bytes": 1500, "groups": 2, "seconds": 2.0,
        "write_pause_ms_max": 30.0, "write_pause_ms_p99": 30.0,
    }  # fmt: skip
    record.note_standing([], MOVES, 100.0)
    assert record.change is not first
    assert record.stats.keys == 15


def test_moves_that_stand_when_the_controller_starts_begin_a_change() -> None:
    record = Record()
    record.note_standing([], MOVES, 1.0)
    assert record.change is not None


@given(st.lists(st.floats(0, 10), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent * len(values) / 100
    assert sum(value < found for value in values) < percent * len(values) / 100


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_no_values_have_no_percentile(percent: int) -> None:
    assert percentile([], percent) == 0.0
