"""What a person at a terminal is told about an error, and what a shell sees of it."""

from __future__ import annotations

import json

import pytest

from kvstore.cli.cluster import _title
from kvstore.cli.frame import EXIT_NO_DECISION, EXIT_STORE_SAID_NO, exit_code, report
from kvstore.errors import BadTtl, KvError, Locked, NoSuchRoute, NotFound, PreconditionFailed, all_errors


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
    report(PreconditionFailed("no", next_step="Ask somebody."), as_json=False)
    assert capsys.readouterr().err == "kvstore: no. Ask somebody.\n"


def test_an_address_that_is_no_routers_is_no_answer_about_a_key() -> None:
    assert exit_code(NotFound("no such key")) == EXIT_STORE_SAID_NO
    assert exit_code(NoSuchRoute("no such route")) == EXIT_NO_DECISION


def test_a_shard_that_is_being_started_is_shown() -> None:
    document = {"cluster_id": "c", "epoch": 3, "replicas": 1, "wanted": ["s6"], "ending": []}
    assert "s6 being started" in _title(document)
