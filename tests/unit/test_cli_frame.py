"""What a person at a terminal is told about an error, and what a shell sees of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from kvstore.cli.asking import _WaitTold
from kvstore.cli.cluster import _title
from kvstore.cli.frame import EXIT_NO_DECISION, EXIT_STORE_SAID_NO, exit_code, report
from kvstore.cli.move_progress import move_progress
from kvstore.cli.progress import progress
from kvstore.errors import (
    BadTtl,
    KvError,
    Locked,
    NoSuchRoute,
    NotFound,
    PreconditionFailed,
    Unavailable,
    all_errors,
)


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind.status in (404, 412, 423) or kind is BadTtl])
def test_what_to_do_next_is_something_that_a_terminal_can_do(
    kind: type[KvError], capsys: pytest.CaptureFixture[str]
) -> None:
    report(kind("it is so"), as_json=False)
    told = capsys.readouterr().err
    assert told.startswith("kvstore: it is so. ")
    for word in ("ETag", "`detail`", "Lock-Token", "/v1/kv/KEY"):
        assert word not in told


def test_a_program_gets_the_problem_as_it_was_sent(capsys: pytest.CaptureFixture[str]) -> None:
    report(Locked("held", owner="me"), as_json=True)
    assert json.loads(capsys.readouterr().err) == Locked("held", owner="me").problem()


def test_an_error_that_brings_its_own_mend_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    report(PreconditionFailed("no", next_step="Ask again."), as_json=False)
    assert capsys.readouterr().err == "kvstore: no. Ask again.\n"


def test_an_address_that_is_no_routers_is_no_answer_about_a_key() -> None:
    assert exit_code(NotFound("no such key")) == EXIT_STORE_SAID_NO
    assert exit_code(NoSuchRoute("no such route")) == EXIT_NO_DECISION


def test_a_wait_is_told_once_and_only_if_it_takes_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    told = _WaitTold()
    told.note(Unavailable("shard s2 is not connected"), 0.9)
    assert capsys.readouterr().err == ""
    told.note(Unavailable("shard s2 is not connected"), 0.2)
    told.note(Unavailable("shard s2 is not connected"), 5.0)
    err = capsys.readouterr().err
    assert err == "kvstore: shard s2 is not connected. Trying again for a few seconds (Ctrl-C ends that).\n"


@pytest.mark.parametrize(
    "open_bar", [lambda: progress("import", 100, bar=True), lambda: move_progress("add", bar=True)]
)
def test_a_bar_is_taken_away_when_the_command_is_interrupted(
    open_bar: Callable[[], AbstractContextManager[object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), open_bar():
        raise KeyboardInterrupt
    interrupted = capsys.readouterr().err
    with open_bar():
        pass
    assert "\x1b[2K" in interrupted.rpartition("\n")[2]  # the last thing done is to clear the line of the bar
    assert "\x1b[2K" not in capsys.readouterr().err.rpartition("\n")[2]


def test_a_shard_that_is_being_started_is_shown() -> None:
    document = {"cluster_id": "c", "epoch": 3, "replicas": 1, "wanted": ["s6"], "ending": []}
    assert "s6 being started" in _title(document)
