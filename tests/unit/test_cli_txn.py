"""kvstore txn: what is sent, what is shown, the exit code; transactions in status and explain."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import txn as txn_module
from kvstore.cli.commands import main
from kvstore.client import Client
from kvstore.errors import BadBody, Conflict, IdempotencyKeyReused, KvError, Locked, OutcomeUnknown, Unavailable

BODY = {
    "if": [{"key": "a", "version": 7}],
    "then": [
        {"op": "put", "key": "a", "value": "1"},
        {"op": "delete", "key": "bb"},
        {"op": "get", "key": "c"},
        {"op": "get", "key": "d"},
    ],
    "else": [{"op": "get", "key": "a"}],
}
THEN = {
    "id": "8-c-9",
    "succeeded": True,
    "version": 41,
    "results": [
        {"key": "a", "version": 41},
        {"key": "bb", "version": 41},
        {"key": "c", "value": "3", "version": 9},
        {"key": "d", "exists": False},
    ],
}
ELSE = {
    "id": "8-c-9",
    "succeeded": False,
    "version": None,
    "results": [{"key": "a", "value_base64": "/wA=", "version": 8}],
}


class Store:
    """What the client was asked for, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, str | None]] = []
        self.answer: dict[str, Any] | KvError = THEN
        self.in_doubt: dict[str, Any] = {"count": 0, "oldest_s": None}
        self.advice = ""
        self.intent: dict[str, Any] | None = None


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The calls of the client, without any network."""
    store = Store()

    async def txn_json(_: Client, body: bytes, *, idempotency_key: str | None = None) -> dict[str, Any]:
        store.asked.append((body, idempotency_key))
        if isinstance(store.answer, KvError):
            raise store.answer
        return store.answer

    async def cluster(_: Client) -> dict[str, Any]:
        shard = {"id": "s1", "url": "http://127.0.0.1:9101", "state": "up", "weight": 1, "partitions": 64, "keys": 1}
        document = {"cluster_id": "c", "epoch": 1, "replicas": 1, "shards": [shard], "in_doubt": store.in_doubt}
        return document | ({"advice": store.advice} if store.advice else {})

    async def explain(_: Client, key: str) -> dict[str, Any]:
        return {"key": key, "owner": "s1", "intent": store.intent}

    for call in (txn_json, cluster, explain):
        monkeypatch.setattr(Client, call.__name__, call)
    return store


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "transfer.json"
    path.write_text(json.dumps(BODY))
    return str(path)


def read(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The lines of standard output, and standard error."""
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_a_file_is_sent_byte_for_byte(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "strange.json"
    path.write_bytes(b' {"then" :[{"op":"get","key":"\xc3\xbc"}]}\r\n\xff')
    store.answer = BadBody()
    main(["txn", str(path)])
    assert store.asked == [(path.read_bytes(), None)]


def test_a_byte_order_mark_is_not_sent(store: Store, tmp_path: Path) -> None:
    body = json.dumps(BODY).encode()
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + body)
    assert main(["txn", str(tmp_path / "marked")]) == 0
    assert store.asked == [(body, None)]


def test_standard_input_is_sent_byte_for_byte(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(BODY).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(body)))
    assert main(["txn", "-", "--idempotency-key", "K"]) == 0
    assert store.asked == [(body, "K")]


def test_the_results_are_shown_as_a_table(store: Store, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["txn", file]) == 0
    assert read(capsys) == (
        [
            "`then` ran, version 41 (transaction 8-c-9)",
            "op      version  key  value",
            "put          41  a",
            "delete       41  bb",
            'get           9  c    "3"',
            "get      absent  d",
        ],
        "",
    )


def test_the_else_branch_is_shown_and_ends_with_1(store: Store, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    store.answer = ELSE
    assert main(["txn", file]) == 1
    out, err = read(capsys)
    assert out[0] == "a condition does not hold: `else` ran, nothing was written (transaction 8-c-9)"
    assert out[2:] == ['get           8  a    "\\xff\\x00"']
    assert err == ""


def test_an_else_branch_without_operations_is_one_line(
    store: Store, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store.answer = {**ELSE, "results": []}
    assert main(["txn", file]) == 1
    assert len(read(capsys)[0]) == 1


@pytest.mark.parametrize(("answer", "code"), [(THEN, 0), (ELSE, 1)])
def test_with_json_the_answer_is_one_line(
    store: Store, file: str, capsys: pytest.CaptureFixture[str], answer: dict[str, Any], code: int
) -> None:
    store.answer = answer
    assert main(["txn", file, "--json"]) == code
    out, err = read(capsys)
    assert [json.loads(line) for line in out] == [answer]
    assert err == ""


def test_what_is_stored_neither_steers_the_terminal_nor_fills_it(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["\x1b[2J", "two\nlines", "x" * 60, "x" * 61, "ü" * 500_000]
    keys = [f"{number}\n" for number in range(len(values))]
    path = tmp_path / "gets.json"
    path.write_text(json.dumps({"then": [{"op": "get", "key": key} for key in keys]}))
    results = [{"key": key, "value": value, "version": 1} for key, value in zip(keys, values, strict=True)]
    store.answer = {"id": "i\n", "succeeded": True, "version": None, "results": results}
    assert main(["txn", str(path)]) == 0
    out, _ = read(capsys)
    assert out[0] == "`then` ran, nothing was written (transaction i\\n)"
    assert [line.partition("n  ")[2] for line in out[2:]] == [
        '"\\x1b[2J"',
        '"two\\nlines"',
        f'"{"x" * 60}"',
        f'"{"x" * 60}"… (61 bytes)',
        f'"{"ü" * 60}"… (1,000,000 bytes)',
    ]
    assert [line.split()[2] for line in out[2:]] == [f"{number}\\n" for number in range(5)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Locked("leased", retry_after_ms=1), 1),
        (Conflict("busy", retry_after_ms=1), 1),
        (BadBody("no"), 2),
        (IdempotencyKeyReused(), 2),
        (Unavailable("down"), 2),
        (OutcomeUnknown("who knows", txn_id="8-c-9"), 2),
    ],
)
def test_an_error_is_one_line_and_says_by_the_exit_code_whether_the_store_decided(
    store: Store, file: str, capsys: pytest.CaptureFixture[str], error: KvError, code: int
) -> None:
    store.answer = error
    assert main(["txn", file]) == code
    out, err = read(capsys)
    assert out == []
    assert err.count("\n") == 1
    assert main(["txn", file, "--json"]) == code
    assert json.loads(capsys.readouterr().err)["code"] == error.code


@pytest.mark.parametrize(
    ("options", "members", "said"),
    [
        (["--idempotency-key", "K"], {"txn_id": "8-c-9"}, "Run it again with the same --idempotency-key"),
        ([], {"txn_id": "8-c-9"}, "GET http://127.0.0.1:8080/v1/txn/8-c-9 tells"),
        ([], {}, "Read the keys before you run it again"),
    ],
)
def test_of_an_unknown_outcome_it_says_how_to_find_out(
    store: Store,
    file: str,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    members: dict[str, Any],
    said: str,
) -> None:
    store.answer = OutcomeUnknown("who knows", **members)
    assert main(["txn", file, *options]) == 2
    assert said in capsys.readouterr().err
    assert main(["txn", file, "--json", *options]) == 2
    problem = json.loads(capsys.readouterr().err)
    assert problem["next_step"].startswith(said)
    assert problem.get("txn_id") == members.get("txn_id")


@pytest.mark.parametrize("key", ["", "k" * 256, "a\nb", "\udcff"])
def test_an_idempotency_key_that_cannot_be_sent_is_wrong_usage(
    store: Store, file: str, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert main(["txn", file, "--idempotency-key", key]) == 2
    assert "--idempotency-key" in capsys.readouterr().err
    assert store.asked == []


def test_a_file_that_cannot_be_read_ends_with_2(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["txn", str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    assert main(["txn", str(tmp_path)]) == 2
    assert store.asked == []


def test_a_file_beyond_all_limits_is_not_sent(
    store: Store, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(txn_module, "VALUE_BYTES_READ_MAX", 10)
    assert main(["txn", file]) == 1
    assert "more than 10 bytes" in capsys.readouterr().err
    assert store.asked == []


# --- status and explain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "oldest_s", "shown"),
    [
        (0, None, "no transaction in doubt"),
        (1, 0.25, "1 transaction in doubt, the oldest for 0.2 s"),
        (1234, 61.04, "1,234 transactions in doubt, the oldest for 61.0 s"),
        (2, None, "2 transactions in doubt"),
    ],
)
def test_status_shows_how_many_transactions_are_in_doubt_and_for_how_long(
    store: Store, capsys: pytest.CaptureFixture[str], count: int, oldest_s: float | None, shown: str
) -> None:
    store.in_doubt = {"count": count, "oldest_s": oldest_s}
    assert main(["status"]) == 0
    title = [line.strip() for line in read(capsys)[0][:2]]
    assert title == ["cluster c, epoch 1, replicas 1", shown]


def test_status_shows_the_advice_that_the_router_gives(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.advice = "All is well\x1b[31m."
    assert main(["status"]) == 0
    assert read(capsys)[0][2].strip() == "All is well\\x1b[31m."


def test_explain_shows_the_transaction_that_is_about_to_write_the_key(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "a"]) == 0
    assert read(capsys)[0][-1].split() == ["intent", "none"]
    store.intent = {"txn": "c-9", "anchor": "b", "age_s": 0.5, "vote": 40}
    assert main(["explain", "a"]) == 0
    assert [line.split() for line in read(capsys)[0][-5:]] == [
        ["intent"],
        ["txn", "c-9"],
        ["anchor", "b"],
        ["age_s", "0.5"],
        ["vote", "40"],
    ]
