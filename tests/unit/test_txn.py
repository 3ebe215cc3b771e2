"""Transactions as the client names them: their JSON, their results, what may be sent twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.client import Client
from kvstore.client.results import Answer
from kvstore.config import Limits
from kvstore.errors import BadTtl, KeyNotUtf8, NotFound
from kvstore.model import Condition, TxnOp
from kvstore.operations import operation_members, value_members, value_of
from kvstore.router.routes.txn import TxnBody, parse_transaction
from kvstore.txn import (
    TxnItem,
    TxnResult,
    delete,
    get,
    if_exists,
    if_locked,
    if_version,
    put,
    result_of,
    transaction_members,
)

ANSWER = {
    "id": "8-c-9",
    "succeeded": True,
    "version": 41,
    "results": [
        {"key": "a", "version": 41},
        {"key": "b", "value": "ü", "version": 9},
        {"key": "c", "value_base64": "/wA=", "version": 8},
        {"key": "d", "exists": False},
    ],
}


def test_the_router_understands_what_was_meant() -> None:
    members = transaction_members(
        [put("a", "ü".encode()), put("b", b"\xff\x00", ttl=1.5), delete("c"), get("d")],
        [if_version("a", 7), if_exists("b"), if_exists("c", False), if_locked("leader", 12)],
        [get("a")],
    )
    transaction = parse_transaction(msgspec.json.decode(msgspec.json.encode(members), type=TxnBody), Limits())
    assert transaction.conditions == [
        Condition("a", version=7),
        Condition("b", exists=True),
        Condition("c", exists=False),
        Condition("leader", token=12),
    ]
    assert transaction.then == [
        TxnOp("put", "a", "ü".encode()),
        TxnOp("put", "b", b"\xff\x00", 1500),
        TxnOp("delete", "c"),
        TxnOp("get", "d"),
    ]
    assert transaction.otherwise == [TxnOp("get", "a")]


def test_a_result_has_an_item_per_operation() -> None:
    assert result_of(ANSWER) == TxnResult(
        "8-c-9",
        True,
        41,
        [TxnItem("a", 41), TxnItem("b", 9, "ü".encode()), TxnItem("c", 8, b"\xff\x00"), TxnItem("d")],
    )
    nothing = {"id": "8-c-9", "succeeded": False, "version": None, "results": []}
    assert result_of(nothing) == TxnResult("8-c-9", False, None, [])


@given(st.binary(max_size=40))
def test_any_bytes_survive(value: bytes) -> None:
    assert value_of(json.loads(json.dumps(value_members(value)))) == value


@pytest.mark.parametrize("ttl", [float("nan"), float("inf")])
def test_a_ttl_that_json_could_not_carry_is_refused(ttl: float) -> None:
    with pytest.raises(BadTtl):
        operation_members(put("a", b"", ttl=ttl))


def test_a_key_that_is_no_text_is_refused_wherever_it_stands() -> None:
    parts: list[tuple[Any, Any, Any]] = [
        ([put("\ud800", b"")], [], []),
        ([get("a")], [], [delete("\ud800")]),
        ([get("a")], [if_version("\ud800", 1)], []),
        ([get("a")], [if_exists("\ud800")], []),
        ([get("a")], [if_locked("\ud800", 1)], []),
    ]
    for then, conditions, otherwise in parts:
        with pytest.raises(KeyNotUtf8):
            transaction_members(then, conditions, otherwise)


def test_text_is_not_taken_for_a_value() -> None:
    with pytest.raises(TypeError, match="encode text first"):
        operation_members(put("a", "text"))  # type: ignore[arg-type]


class Asked:
    """The requests that the client makes, in place of a router."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[tuple[str, str, Any, bool, Mapping[str, str]]] = []
        self.answer: dict[str, Any] | Exception = ANSWER

        async def ask(
            _: Client,
            method: str,
            path: str,
            *,
            body: bytes | None = None,
            writes: bool = False,
            headers: Mapping[str, str] = {},
        ) -> Answer:
            self.requests.append((method, path, body and json.loads(body), writes, headers))
            if isinstance(self.answer, Exception):
                raise self.answer
            return Answer(200, {}, msgspec.json.encode(self.answer))

        monkeypatch.setattr(Client, "ask", ask)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


async def test_a_transaction_is_one_request(asked: Asked) -> None:
    result = await Client().txn([put("a", b"1")], conditions=[if_exists("a")], idempotency_key="K")
    assert result == result_of(ANSWER)
    (request,) = asked.requests
    body = {
        "if": [{"key": "a", "exists": True}],
        "then": [{"op": "put", "key": "a", "value": "1"}],
        "else": [],
    }
    assert request == ("POST", "/v1/txn", body, True, {"Idempotency-Key": "K"})


@pytest.mark.parametrize(
    ("then", "otherwise", "writes"),
    [([get("a")], [], False), ([get("a")], [get("b")], False), ([get("a")], [delete("b")], True)],
)
async def test_only_a_transaction_without_writes_may_be_sent_again(
    asked: Asked, then: Any, otherwise: Any, writes: bool
) -> None:
    await Client().txn(then, otherwise=otherwise)
    assert asked.requests[0][3] == writes


async def test_json_is_sent_as_it_is_and_counts_as_a_write(asked: Asked) -> None:
    assert await Client().txn_json(b'{"then":[{"op":"get","key":"a"}]}') == ANSWER
    assert asked.requests == [("POST", "/v1/txn", {"then": [{"op": "get", "key": "a"}]}, True, {})]


async def test_the_status_of_a_transaction_is_none_if_nothing_is_known(asked: Asked) -> None:
    asked.answer = {"status": "pending"}
    assert await Client().txn_status("8-c-9") == "pending"
    asked.answer = NotFound()
    assert await Client().txn_status("8-c-9") is None
    assert [path for _, path, *_ in asked.requests] == ["/v1/txn/8-c-9"] * 2


def test_a_version_that_nothing_has_means_that_there_must_be_nothing() -> None:
    assert if_version("a", None) == if_exists("a", False)
    assert if_version("a", 7) != if_exists("a")
