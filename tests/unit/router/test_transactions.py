"""POST /v1/txn and GET /v1/txn/{id}: what a body means, what refuses it whole, and the form of the answers."""

from __future__ import annotations

import json
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.config import Limits
from kvstore.errors import BadBody, BadParameter, Conflict, KvError, Locked, NotFound
from kvstore.model import Condition, IdempotencyKey, Read, TxnOp
from kvstore.protocol import Outcome
from kvstore.router.coordinator import Coordinator
from kvstore.router.participants import Result, Transaction
from kvstore.router.routes.txn import TXN_ROUTES, TxnBody, TxnRoutes, encode_result, parse_transaction
from kvstore.transport.http.requests import Head
from kvstore.transport.http.responses import Response, problem_response
from tests.unit.router.calls import answer, decoded

LIMITS = Limits(key_bytes_max=10, value_bytes_max=100, ttl_s_max=1000)
VERSION_MAX = 2**53 - 1
GET = {"op": "get", "key": "g"}


def parse(**body: Any) -> Transaction:
    """`if_` and `else_` stand for the members that are words of Python."""
    return parse_raw(json.dumps({name.rstrip("_"): part for name, part in body.items()}).encode())


def parse_raw(body: bytes) -> Transaction:
    return parse_transaction(decoded(TxnBody, body), LIMITS)


# --- the body ---------------------------------------------------------------------------------------------------------


def test_conditions_and_branches_become_what_they_say() -> None:
    transaction = parse(
        if_=[{"key": "a", "version": 7}, {"key": "b/🔑", "exists": False}, {"lock": "leader", "token": 12}],
        then=[
            {"op": "put", "key": "a", "value": "ü"},
            {"op": "put", "key": "b", "value_base64": "/wA=", "ttl": 1.5},
            {"op": "delete", "key": "c"},
            {"op": "get", "key": "d"},
        ],
        else_=[{"op": "get", "key": "a"}],
    )
    assert transaction.conditions == [
        Condition("a", version=7),
        Condition("b/🔑", exists=False),
        Condition("leader", token=12),
    ]
    assert transaction.then == [
        TxnOp("put", "a", "ü".encode()),
        TxnOp("put", "b", b"\xff\x00", 1500),
        TxnOp("delete", "c"),
        TxnOp("get", "d"),
    ]
    assert transaction.otherwise == [TxnOp("get", "a")]


def test_conditions_and_the_else_branch_may_be_left_out_or_empty() -> None:
    assert parse(then=[GET]) == parse(then=[GET], if_=[], else_=[]) == Transaction([], [TxnOp("get", "g")], [])


def test_the_limits_themselves_are_taken() -> None:
    transaction = parse(
        if_=[
            {"key": "k" * 10, "version": 1},
            {"key": "k", "version": VERSION_MAX},
            {"lock": "l", "token": 0},
            {"lock": "l", "token": VERSION_MAX},
        ],
        then=[{"op": "put", "key": "ü" * 5, "value": "v" * 100, "ttl": 1000}],
    )
    assert [c.version or c.token for c in transaction.conditions] == [1, VERSION_MAX, 0, VERSION_MAX]
    assert transaction.then[0].ttl_ms == 1_000_000


@pytest.mark.parametrize("ttl", [0.0001, 0.001])
def test_a_ttl_is_rounded_up_so_that_it_never_means_for_ever(ttl: float) -> None:
    assert parse(then=[{"op": "put", "key": "a", "value": "", "ttl": ttl}]).then[0].ttl_ms == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b"{}",
        b'{"then":[]}',
        b'{"then":{}}',
        b'{"then":null}',
        b'{"if":[],"else":[{"op":"get","key":"a"}]}',
        b'{"then":[{"op":"get","key":"a"}],"if":null}',
        b'{"then":[{"op":"get","key":"a"}],"else":null}',
        b'{"then":[{"op":"get","key":"a"}],"esle":[]}',
        b'{"then":[{"op":"get","key":"a"}],"conditions":[]}',
        b'{"then":[{"op":"get","key":"a"}],"otherwise":[]}',
        b'{"ops":[{"op":"get","key":"a"}]}',
        b'{"then":[{"op":"get","key":"a"}]} and more',
        b'{"then":[{"op":"get","key":"a"},',
        b'\xef\xbb\xbf{"then":[{"op":"get","key":"a"}]}',
        b'{"then":[{"op":"get","key":"\xff"}]}',
        b'{"then":[{"op":"get","key":"\\ud800"}]}',
        b'{"if":[{"key":"\\ud800","version":1}],"then":[{"op":"get","key":"a"}]}',
        b'{"then":[' * 100_000,
        b'{"if":' * 100_000,
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_well_formed_is_refused(body: bytes) -> None:
    with pytest.raises(BadBody):
        parse_raw(body)


@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"key": "a"},
        {"version": 1},
        {"exists": True},
        {"lock": "a"},
        {"token": 1},
        {"key": "a", "token": 1},
        {"lock": "a", "version": 1},
        {"lock": "a", "exists": True},
        {"key": "a", "lock": "a", "token": 1},
        {"key": "a", "lock": "a", "version": 1},
        {"key": "a", "version": 1, "exists": True},
        {"key": "a", "version": 1, "token": 1},
        {"key": "a", "lock": "a", "version": 1, "exists": True, "token": 1},
        {"key": "a", "version": 0},
        {"key": "a", "version": -1},
        {"key": "a", "version": 2**53},
        {"key": "a", "version": 10**30},
        {"key": "a", "version": 1.5},
        {"key": "a", "version": "1"},
        {"key": "a", "version": '"1"'},
        {"key": "a", "version": True},
        {"key": "a", "version": None},
        {"key": "a", "version": [1, 2]},
        {"key": "a", "exists": "true"},
        {"key": "a", "exists": 1},
        {"key": "a", "exists": None},
        {"lock": "a", "token": -1},
        {"lock": "a", "token": 2**53},
        {"lock": "a", "token": "12"},
        {"lock": "a", "token": None},
        {"lock": 7, "token": 1},
        {"lock": None, "token": 1},
        {"key": 7, "version": 1},
        {"key": None, "version": 1},
        {"key": "a", "value": "1"},
        {"key": "a", "version": 1, "op": "get"},
        "a",
        ["a", 1],
        None,
    ],
    ids=str,
)
def test_a_condition_that_has_none_of_the_forms_refuses_all(condition: Any) -> None:
    with pytest.raises(BadBody):
        parse(if_=[{"key": "good", "exists": True}, condition], then=[GET])


@pytest.mark.parametrize("branch", ["then", "else_"])
@pytest.mark.parametrize(
    "op",
    [
        {"op": "put", "key": "a"},
        {"op": "put", "key": "a", "value": "x", "value_base64": "eA=="},
        {"op": "put", "key": "a", "value": None},
        {"op": "put", "key": "a", "value": 7},
        {"op": "put", "key": 7, "value": "x"},
        {"op": "put", "value": "x"},
        {"op": "put", "key": "a", "value": "x", "tll": 5},
        {"op": "put", "key": "a", "value": "x", "ttl": "5"},
        {"op": "put", "key": "a", "value": "x", "ttl": None},
        {"op": "put", "key": "a", "value": "x", "version": 7},
        {"op": "put", "key": "a", "value_base64": "eA"},
        {"op": "put", "key": "a", "value_base64": "é==="},
        {"op": "get", "key": "a", "value": "x"},
        {"op": "get", "key": "a", "version": 7},
        {"op": "delete", "key": "a", "ttl": 1},
        {"op": "swap", "key": "a"},
        {"op": "PUT", "key": "a", "value": "x"},
        {"key": "a"},
        {"op": "get"},
        "get a",
        None,
    ],
    ids=str,
)
def test_an_operation_that_is_not_well_formed_refuses_all(branch: str, op: Any) -> None:
    with pytest.raises(BadBody):
        parse(**{"then": [GET], branch: [GET, op]})


@pytest.mark.parametrize("branch", ["then", "else_"])
@pytest.mark.parametrize(
    ("op", "code"),
    [
        ({"op": "get", "key": ""}, "key-empty"),
        ({"op": "delete", "key": "k" * 11}, "key-too-long"),
        ({"op": "put", "key": "üüüüüü", "value": ""}, "key-too-long"),
        ({"op": "put", "key": "a", "value": "v" * 101}, "value-too-large"),
        ({"op": "put", "key": "a", "value": "ü" * 51}, "value-too-large"),
        ({"op": "put", "key": "a", "value": "x", "ttl": 0}, "bad-ttl"),
        ({"op": "put", "key": "a", "value": "x", "ttl": -1}, "bad-ttl"),
        ({"op": "put", "key": "a", "value": "x", "ttl": 1000.001}, "bad-ttl"),
        ({"op": "put", "key": "a", "value": "x", "ttl": 1e300}, "bad-ttl"),
    ],
    ids=str,
)
def test_an_operation_that_cannot_be_done_refuses_all_and_is_named(branch: str, op: Any, code: str) -> None:
    with pytest.raises(KvError) as caught:
        parse(**{"then": [GET], branch: [GET, GET, op]})
    assert caught.value.code == code
    assert caught.value.detail.startswith(f"operation 2 of `{branch.rstrip('_')}`: ")


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ({"key": "", "version": 1}, "key-empty"),
        ({"lock": "", "token": 1}, "key-empty"),
        ({"key": "k" * 11, "exists": True}, "key-too-long"),
        ({"lock": "ü" * 6, "token": 1}, "key-too-long"),
    ],
)
def test_a_condition_on_a_bad_key_refuses_all_and_is_named(condition: Any, code: str) -> None:
    with pytest.raises(KvError) as caught:
        parse(if_=[{"key": "a", "exists": True}, condition], then=[GET])
    assert caught.value.code == code
    assert caught.value.detail.startswith("condition 1 of `if`: ")


def test_the_error_keeps_the_limit_that_was_passed() -> None:
    with pytest.raises(KvError) as caught:
        parse(then=[{"op": "get", "key": "k" * 11}])
    assert caught.value.members == {"key_bytes_max": 10}


@pytest.mark.parametrize("branch", ["then", "else_"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"op": "put", "key": "a", "value": "1"}, {"op": "put", "key": "a", "value": "1"}),
        ({"op": "put", "key": "a", "value": "1"}, {"op": "delete", "key": "a"}),
        ({"op": "delete", "key": "a"}, {"op": "put", "key": "a", "value": "1"}),
        ({"op": "delete", "key": "a"}, {"op": "delete", "key": "a"}),
    ],
)
def test_a_key_written_twice_in_a_branch_is_refused_and_named(branch: str, first: Any, second: Any) -> None:
    with pytest.raises(BadBody, match=r"operation 2 of `(then|else)` writes the key 'a' a second time"):
        parse(**{"then": [GET], branch: [first, GET, second]})


def test_a_key_may_be_read_often_beside_its_write_and_written_by_both_branches() -> None:
    get, put = {"op": "get", "key": "a"}, {"op": "put", "key": "a", "value": "1"}
    transaction = parse(if_=[{"key": "a", "exists": True}] * 2, then=[get, put, get], else_=[put, get])
    assert [step.op for step in transaction.then] == ["get", "put", "get"]
    assert [step.op for step in transaction.otherwise] == ["put", "get"]


def test_keys_that_look_alike_are_different_keys() -> None:
    keys = ["é", "e\u0301", "E", "a", "a ", "a\x00"]
    parse(then=[{"op": "delete", "key": key} for key in keys])


def test_any_number_of_operations_is_taken() -> None:
    transaction = parse(then=[{"op": "put", "key": str(number), "value": "v"} for number in range(50_000)])
    assert len(transaction.then) == 50_000


# --- the answer -------------------------------------------------------------------------------------------------------


def test_results_follow_the_branch_that_ran_and_gets_take_the_reads_in_order() -> None:
    transaction = parse(
        then=[
            {"op": "get", "key": "a"},
            {"op": "put", "key": "a", "value": "1"},
            {"op": "get", "key": "b"},
            {"op": "delete", "key": "c"},
            {"op": "get", "key": "d"},
        ],
        else_=[{"op": "get", "key": "a"}, {"op": "put", "key": "b", "value": "2"}],
    )
    reads = [Read(3, b"\xff\x00"), Read(0, None), Read(5, b"")]
    assert json.loads(encode_result(transaction, Result("8-c-9", True, 41, reads))) == {
        "id": "8-c-9",
        "succeeded": True,
        "version": 41,
        "results": [
            {"key": "a", "value_base64": "/wA=", "version": 3},
            {"key": "a", "version": 41},
            {"key": "b", "exists": False},
            {"key": "c", "version": 41},
            {"key": "d", "value": "", "version": 5},
        ],
    }
    assert json.loads(encode_result(transaction, Result("8-c-9", False, 41, [Read(3, b"x")]))) == {
        "id": "8-c-9",
        "succeeded": False,
        "version": 41,
        "results": [{"key": "a", "value": "x", "version": 3}, {"key": "b", "version": 41}],
    }


def test_an_else_branch_that_is_left_out_has_no_results() -> None:
    document = json.loads(encode_result(parse(then=[GET]), Result("8-c-9", False, None, [])))
    assert document == {"id": "8-c-9", "succeeded": False, "version": None, "results": []}


@given(st.binary(max_size=40))
def test_any_bytes_survive_their_way_in_and_out(value: bytes) -> None:
    put, get = {"op": "put", "key": "a"}, {"op": "get", "key": "a"}
    (found,) = json.loads(encode_result(parse(then=[get]), Result("", True, None, [Read(1, value)])))["results"]
    members = {name: member for name, member in found.items() if name.startswith("value")}
    assert parse(then=[put | members]).then[0].value == value


# --- the routes -------------------------------------------------------------------------------------------------------


class Told:
    """A coordinator that notes what it is asked for, and answers or raises what it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    async def run(self, transaction: Transaction, once: IdempotencyKey | None) -> Result:
        self.asked.append((transaction, once))
        return cast(Result, self._answered())

    async def look(self, txn_id: str) -> Outcome | None:
        self.asked.append(txn_id)
        return cast("Outcome | None", self._answered())

    def _answered(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def run(told: Told, body: Any, query: str = "", **fields: str) -> Response:
    head = Head("POST", "/v1/txn", query, {name.replace("_", "-"): field for name, field in fields.items()})
    return await asked(told, head, msgspec.json.encode(body))


async def look(told: Told, raw_id: str, query: str = "") -> Response:
    head = Head("GET", f"/v1/txn/{raw_id}", query, {})
    return await asked(told, head)


async def asked(told: Told, head: Head, body: bytes = b"") -> Response:
    routes = TxnRoutes(cast(Coordinator, told), LIMITS)
    return cast(Response, await answer(routes, TXN_ROUTES, head, body, limits=LIMITS))


async def test_a_transaction_is_run_with_its_idempotency_key() -> None:
    told = Told(Result("8-c-9", True, None, [Read(0, None)]))
    response = await run(told, {"then": [GET]}, idempotency_key='"K"')
    ((transaction, once),) = told.asked
    assert transaction == Transaction([], [TxnOp("get", "g")], [])
    assert once.key == "K"
    assert (response.status, response.content_type) == (200, "application/json")
    assert json.loads(response.body)["results"] == [{"key": "g", "exists": False}]
    await run(told, {"then": [GET]})
    assert told.asked[1][1] is None


async def test_the_digest_of_the_request_tells_bodies_apart() -> None:
    told = Told(Result("8-c-9", True, None, [Read(0, None)]))
    for body in ({"then": [GET]}, {"then": [GET]}, {"then": [GET], "else": []}):
        await run(told, body, idempotency_key="K")
    first, again, other = (once.digest for _, once in told.asked)
    assert first == again != other


@pytest.mark.parametrize("field", ["if_match", "if_none_match", "lock_token"])
async def test_headers_that_speak_of_one_key_are_refused(field: str) -> None:
    told = Told(None)
    with pytest.raises(BadParameter, match=field.replace("_", "-")):
        await run(told, {"then": [GET]}, **{field: "1"})
    assert told.asked == []


async def test_unknown_parameters_are_refused() -> None:
    told = Told(None)
    with pytest.raises(BadParameter, match="colour"):
        await run(told, {"then": [GET]}, query="colour=red")
    with pytest.raises(BadParameter, match="colour"):
        await look(told, "8-c-9", query="colour=red")
    assert told.asked == []


async def test_a_bad_body_and_a_bad_idempotency_key_reach_no_shard() -> None:
    told = Told(None)
    with pytest.raises(BadBody):
        await run(told, {"then": []})
    with pytest.raises(BadParameter):
        await run(told, {"then": [GET]}, idempotency_key='""')
    assert told.asked == []


async def test_an_error_of_the_coordinator_is_the_answer() -> None:
    with pytest.raises(Conflict):
        await run(Told(Conflict("so be it", retry_after_ms=7)), {"then": [GET]})
    assert "Retry-After: 1\r\n" in problem_response(Conflict("so be it", retry_after_ms=7)).lines


async def test_who_meets_a_lock_is_told_how_its_holder_gets_through() -> None:
    with pytest.raises(Locked) as caught:
        await run(Told(Locked("leased", owner="me", retry_after_ms=7)), {"then": [GET]})
    problem = caught.value.problem()
    assert '{"lock":NAME,"token":N}' in problem["next_step"]
    assert (problem["owner"], problem["retry_after_ms"]) == ("me", 7)


@pytest.mark.parametrize(
    ("state", "ran", "said"),
    [
        ("committed", True, {"status": "committed", "succeeded": True}),
        ("committed", False, {"status": "committed", "succeeded": False}),
        ("aborted", False, {"status": "aborted"}),
        ("pending", False, {"status": "pending"}),
    ],
)
async def test_looking_a_transaction_up_says_its_state_and_which_branch_ran(
    state: Any, ran: bool, said: dict[str, Any]
) -> None:
    told = Told(Outcome(0, state, succeeded=ran))
    response = await look(told, "8-c%2D9")
    assert (response.status, json.loads(response.body)) == (200, said)
    assert told.asked == ["8-c-9"]


async def test_of_an_unknown_transaction_nothing_is_claimed() -> None:
    with pytest.raises(NotFound) as caught:
        await look(Told(None), "8-c-9")
    problem = caught.value.problem()
    assert "may have been committed" in problem["detail"]
    assert "Idempotency-Key" in problem["next_step"]


@pytest.mark.parametrize("raw_id", ["", "%", "%FF", "%zz", "8" * 300, "\udcff"])
async def test_what_can_be_no_id_is_a_bad_parameter(raw_id: str) -> None:
    told = Told("committed")
    with pytest.raises(BadParameter):
        await look(told, raw_id)
    assert told.asked == []
