"""loadtest.histories.history: what was written is read again, and unknown outcomes stay open."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from loadtest.histories.history import (
    Account,
    AnyOperation,
    Balances,
    History,
    Lists,
    Transfer,
    read,
    write,
)

OPERATIONS: list[AnyOperation] = [
    Lists(client="a", begin_s=1.5, end_s=2.5, outcome="done", appends={"x": [1]}, reads=[("x", []), ("y", [3, 4])]),
    Lists(client="a", begin_s=3.0, appends={"x": [2]}),
    Transfer(
        client="b",
        begin_s=1.0,
        end_s=1.25,
        outcome="refused",
        source=1,
        target=2,
        amount=3,
        marker="m",
        source_version=7,
        target_version=8,
    ),
    Balances(client="c", begin_s=0.0, end_s=9.0, outcome="done", accounts={1: Account(5, 7), 20: Account(0, 9)}),
]


def test_operations_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "history.ndjson"
    history = History(path)
    for operation in OPERATIONS:
        history.add(operation)
    assert read(path) == OPERATIONS  # also while it is still being written
    history.close()
    write(path, OPERATIONS[:1])
    assert read(path) == OPERATIONS[:1]


def test_an_unknown_outcome_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "history.ndjson"
    write(path, OPERATIONS)
    documents = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    assert [document["end_s"] for document in documents] == [2.5, None, 1.25, 9.0]
    assert [document["call"] for document in documents] == ["lists", "lists", "transfer", "balances"]
    assert documents[1]["outcome"] == "unknown"


@pytest.mark.parametrize("wrong", [{"end_s": 2.0}, {"outcome": "done"}, {"end_s": 0.5, "outcome": "done"}])
def test_an_outcome_that_contradicts_its_end_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="end"):
        msgspec.convert({"call": "lists", "client": "a", "begin_s": 1.0, **wrong}, AnyOperation)


def test_a_line_that_was_cut_is_left_out_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.ndjson"
    write(path, OPERATIONS)
    path.write_bytes(path.read_bytes()[:-9])
    assert read(path) == OPERATIONS[:-1]
    for wrong in (b'{"call":"dance"}', b'{"call":"\xb3"}'):
        path.write_bytes(b'{"call":"lists","client":"a","begin_s":1}\n' + wrong + b"\n")
        with pytest.raises(ValueError, match=r"history\.ndjson:2: not an operation"):
            read(path)
