"""loadtest.histories.verdict and `python -m loadtest.histories`: each part of a history before its checker."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from loadtest.histories import registers
from loadtest.histories.__main__ import main
from loadtest.histories.bank import marker_text
from loadtest.histories.history import (
    Account,
    AnyOperation,
    Balances,
    Count,
    Element,
    Guarded,
    Lease,
    Lists,
    Markers,
    Members,
    Register,
    Transfer,
    write,
)
from loadtest.histories.verdict import Verdict, judge


def done(begin_s: float, client: str = "c") -> dict[str, Any]:
    return {"client": client, "begin_s": begin_s, "end_s": begin_s + 1, "outcome": "done"}


TRANSFER = Transfer(**done(2), source=0, target=1, amount=5, marker="m", source_version=1, target_version=1, version=3)
OPENED = {0: Account(10, 1), 1: Account(10, 1)}
CLOSED = {0: Account(5, 3), 1: Account(15, 3)}
PARTS: dict[str, list[AnyOperation]] = {
    "registers": [
        Register(**done(0), key="r", action="write", value="a"),
        Register(**done(2), key="r", action="read", value="a"),
    ],
    "lists": [Lists(**done(0), appends={"x": [1]}), Lists(**done(2), reads=[("x", [1])])],
    "bank": [
        Balances(**done(0, "opening"), accounts=OPENED, whole=True),
        TRANSFER,
        Balances(**done(4, "closing"), accounts=CLOSED, whole=True),
        Markers(**done(6, "closing"), markers={"m": marker_text(TRANSFER)}),
    ],
    "sets": [Element(**done(0), set="s", element="x", action="add"), Members(**done(2), set="s", elements=["x"])],
    "locks": [
        Lease(**done(0), lock="l", action="acquire", token=1, ttl_s=9.0),
        Guarded(**done(2), lock="l", token=1, key="g", value=1),
        Count(**done(4), key="g", action="read", value=1),
    ],
    "counters": [Count(**done(0), key="n", action="raise", value=1), Count(**done(2), key="n", action="read", value=1)],
}
ALL = [operation for part in PARTS.values() for operation in part]


def with_fault(name: str) -> list[AnyOperation]:
    """That part, with one thing wrong at its end."""
    part = copy.deepcopy(PARTS[name])
    match part[-1]:
        case Register() | Count() as last:
            last.value = None
        case Lists() as last:
            last.reads = [("x", [])]
        case Markers() as last:
            last.markers = {}
        case Members() as last:
            last.elements = []
    return part


def test_every_part_is_judged_by_its_own_checker() -> None:
    verdict = judge(ALL)
    assert [(check.name, check.operations) for check in verdict.checks] == [
        (name, len(part)) for name, part in PARTS.items()
    ]
    assert verdict.ok
    assert [check.violations for check in verdict.checks] == [[]] * 6


@pytest.mark.parametrize("name", PARTS)
def test_only_what_occurs_is_judged_and_what_is_wrong_with_it_is_told(name: str) -> None:
    verdict = judge(PARTS[name])
    assert [check.name for check in verdict.checks] == [name]
    assert verdict.ok
    wrong = judge([*with_fault(name), *(op for other, part in PARTS.items() if other != name for op in part)])
    assert not wrong.ok
    assert [check.name for check in wrong.checks if check.violations] == [name]
    assert all(check.note == "" for check in wrong.checks)


def test_nothing_is_judged_of_an_empty_history() -> None:
    assert judge([]) == Verdict([])


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_bank_without_its_opening_closing_or_markers_is_left_undecided(place: int) -> None:
    part = PARTS["bank"]
    (check,) = judge([*part[:place], *part[place + 1 :]]).checks
    assert check.violations == []
    assert check.note.startswith("this history proves nothing: the bank has no ")
    unanswered = copy.deepcopy(part)
    unanswered[place].outcome, unanswered[place].end_s = "unknown", None
    assert not judge(unanswered).ok


def test_a_bank_with_an_account_that_was_not_there_at_the_opening_is_left_undecided() -> None:
    opening = Balances(**done(0, "opening"), accounts={0: Account(10, 1)}, whole=True)
    (check,) = judge([opening, *PARTS["bank"][1:]]).checks
    assert "without account 1" in check.note


def test_a_history_that_proves_nothing_and_a_search_that_is_given_up_are_not_ok(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twice = [*PARTS["registers"], Register(**done(4), key="r", action="write", value="a")]
    (check,) = judge(twice).checks
    assert check.violations == []
    assert "written twice" in check.note
    assert not judge(twice).ok
    monkeypatch.setattr(registers, "_STEPS_IN_ALL", 0)
    given_up = judge(PARTS["registers"])
    assert "given up after 0 steps" in given_up.checks[0].note
    assert not given_up.ok


# --- the command line --------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


def test_the_command_says_what_is_right_and_what_is_not(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.ndjson", tmp_path / "wrong.ndjson"
    write(right, ALL)
    write(wrong, [*ALL, *with_fault("sets")[1:]])
    code, output = run(right)
    assert code == 0
    assert output.splitlines()[-1] == "right"
    assert [line.split()[:3] for line in output.splitlines()[2:-1]] == [
        [name, str(len(part)), "0"] for name, part in PARTS.items()
    ]
    code, output = run(right, wrong)
    assert code == 1
    assert "sets: lost: set s: the listing" in output
    assert output.splitlines()[-1] == "not right"


def test_what_is_undecided_is_told_and_is_not_right(tmp_path: Path) -> None:
    path = tmp_path / "history.ndjson"
    write(path, PARTS["bank"][1:])
    code, output = run(path)
    assert code == 1
    assert "undecided: this history proves nothing: the bank has no whole balances" in output


def test_json_is_one_line_for_each_history_and_reads_as_a_verdict(tmp_path: Path) -> None:
    paths = [tmp_path / "a.ndjson", tmp_path / "b.ndjson"]
    for path, part in zip(paths, ("sets", "locks"), strict=True):
        write(path, PARTS[part])
    code, output = run(*paths, "--json")
    verdicts = [msgspec.json.decode(line, type=Verdict) for line in output.splitlines()]
    assert code == 0
    assert [[check.name for check in verdict.checks] for verdict in verdicts] == [["sets"], ["locks"]]
    assert [msgspec.json.decode(line)["files"] for line in output.splitlines()] == [[str(path)] for path in paths]


def test_files_of_one_run_are_judged_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.ndjson", tmp_path / "b.ndjson"]
    for path, operation in zip(paths, PARTS["registers"], strict=True):
        write(path, [operation])
    assert run(*paths)[0] == 1  # the second one reads what it does not know
    assert run("--together", *paths)[0] == 0


def test_a_file_that_is_no_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.ndjson"
    path.write_text("no operation\n")
    code, output = run(path)
    assert code == 2
    assert "history.ndjson:1: not an operation" in output
    path.write_text("")
    assert run(path)[0] == 2
    assert run(tmp_path / "none.ndjson")[0] == 2
    assert run()[0] == 2
