"""Transactions that are too large or not well-formed: refused whole, and nothing is written."""

from __future__ import annotations

import pytest

from tests.cluster.calls import Calls, code, unique
from tests.cluster.transactions import MIB, assert_absent, delete, done, get, put, version_of

pytestmark = pytest.mark.timeout(90)


# --- sizes ------------------------------------------------------------------------------------------------------------


async def test_twenty_thousand_operations_are_one_transaction(calls: Calls):
    prefix = unique("txn-many")
    keys = [f"{prefix}/{number}" for number in range(20_000)]
    answer = await done(calls, *map(put, keys))
    assert [result["key"] for result in answer["results"]] == keys
    assert {result["version"] for result in answer["results"]} == {answer["version"]}
    assert (await calls.ask("GET", f"/v1/kv?prefix={prefix}&count=true")).json == {"count": len(keys)}
    guards = [{"key": key, "version": answer["version"]} for key in keys]
    reply = await calls.txn({"if": guards, "then": list(map(delete, keys)), "else": [get(keys[0])]})
    assert (reply.status, reply.json["succeeded"]) == (200, True)
    assert (await calls.ask("GET", f"/v1/kv?prefix={prefix}&count=true")).json == {"count": 0}


async def test_values_of_the_largest_size_are_taken_and_given(calls: Calls, keys: list[str]):
    await done(calls, *(put(key, "v" * MIB) for key in keys))
    answer = await done(calls, *map(get, keys))
    assert [len(result["value"]) for result in answer["results"]] == [MIB] * len(keys)
    await done(calls, *map(delete, keys))


async def test_a_body_of_the_largest_size_is_taken_and_one_byte_more_is_413(calls: Calls, keys: list[str]):
    body = b'{"then":[{"op":"put","key":"%s","value":"v"}]}' % keys[0].encode()
    body += b" " * (16 * MIB - len(body))
    reply = await calls.txn(body)
    assert reply.status == 200
    assert code(await calls.txn(body + b" ")) == (413, "body-too-large")
    assert await version_of(calls, keys[0]) == reply.json["version"]


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    (b"", 400, "bad-body"),
    (b"nonsense", 400, "bad-body"),
    (b"[]", 400, "bad-body"),
    (b"null", 400, "bad-body"),
    (b"{}", 400, "bad-body"),
    (b'{"then":[GOOD],', 400, "bad-body"),
    (b'{"then":[GOOD]}{}', 400, "bad-body"),
    (b"[" * 100_000, 400, "bad-body"),
    (b'{"then":[]}', 400, "bad-body"),
    (b'{"then":null}', 400, "bad-body"),
    (b'{"else":[GOOD]}', 400, "bad-body"),
    (b'{"then":[GOOD],"esle":[]}', 400, "bad-body"),
    (b'{"then":[GOOD],"if":null}', 400, "bad-body"),
    (b'{"then":[GOOD],"else":null}', 400, "bad-body"),
    (b'{"ops":[GOOD]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"cas","key":"k"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","value_base64":"MQ=="}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value_base64":"MQ"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":1}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","tll":1}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":"1"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"get"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"get","key":7}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"get","key":"\xff"}]}', 400, "bad-body"),
    (b'{"then":[GOOD],"else":[{"op":"delete","key":"k","ttl":1}]}', 400, "bad-body"),
    (b'{"then":[GOOD,GOOD]}', 400, "bad-body"),
    (b'{"then":[GOOD],"else":[{"op":"delete","key":"k"},{"op":"put","key":"k","value":""}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":0}]}', 400, "bad-ttl"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":-1}]}', 400, "bad-ttl"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":315360001}]}', 400, "bad-ttl"),
    (b'{"then":[GOOD,{"op":"get","key":""}]}', 400, "key-empty"),
    (b'{"then":[GOOD,{"op":"get","key":"%s"}]}' % (b"k" * 1025), 400, "key-too-long"),
    (b'{"then":[GOOD],"else":[{"op":"delete","key":"%s"}]}' % ("ä" * 513).encode(), 400, "key-too-long"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"%s"}]}' % (b"v" * (MIB + 1)), 413, "value-too-large"),
    (b'{"then":[GOOD],"else":[{"op":"put","key":"k","value":"%s"}]}' % (b"v" * (MIB + 1)), 413, "value-too-large"),
    (b'{"if":[{"key":"","exists":false}],"then":[GOOD]}', 400, "key-empty"),
    (b'{"if":[{"lock":"%s","token":1}],"then":[GOOD]}' % (b"k" * 1025), 400, "key-too-long"),
    (b'{"if":[{}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k"}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":0}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":9007199254740992}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":"1"}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":1,"exists":true}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","exists":1}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","token":1}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"lock":"k"}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"lock":"k","token":-1}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","value":"1"}],"then":[GOOD]}', 400, "bad-body"),
]


@pytest.mark.parametrize(("body", "status", "named"), BAD, ids=lambda part: str(part)[:60])
async def test_a_bad_body_is_refused_whole_and_nothing_is_written(calls: Calls, body: bytes, status: int, named: str):
    key = unique("txn-bad")
    body = body.replace(b"GOOD", b'{"op":"put","key":"%s","value":"good"}' % key.encode())
    assert code(await calls.txn(body)) == (status, named)
    await assert_absent(calls, [key])


async def test_a_key_written_twice_is_named(calls: Calls, keys: list[str]):
    reply = await calls.txn({"then": [put(keys[0]), put(keys[1]), delete(keys[0])]})
    assert code(reply) == (400, "bad-body")
    assert repr(keys[0]) in reply.json["detail"]


@pytest.mark.parametrize(
    "header", [{"if_match": "*"}, {"if_none_match": "*"}, {"lock_token": "1"}, {"idempotency_key": '""'}]
)
async def test_headers_that_are_not_heeded_are_refused(calls: Calls, header: dict[str, str]):
    key = unique("txn-bad")
    assert code(await calls.txn({"then": [put(key)]}, **header)) == (400, "bad-parameter")
    await assert_absent(calls, [key])


async def test_unknown_and_repeated_parameters_are_refused(calls: Calls):
    key = unique("txn-bad")
    body = b'{"then":[{"op":"put","key":"%s","value":""}]}' % key.encode()
    assert code(await calls.ask("POST", "/v1/txn?ttl=5", body)) == (400, "bad-parameter")
    assert code(await calls.ask("GET", "/v1/txn/1-2-3?wait=1")) == (400, "bad-parameter")
    lines = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert (await calls.ask("POST", "/v1/txn", body, lines)).status == 400
    await assert_absent(calls, [key])


async def test_any_content_type_is_taken_but_no_content_encoding(calls: Calls):
    key = unique("txn-type")
    body = b'{"then":[{"op":"put","key":"%s","value":""}]}' % key.encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=latin-1"):
        assert (await calls.ask("POST", "/v1/txn", body, [("Content-Type", kind)])).status == 200
    reply = await calls.ask("POST", "/v1/txn", body, [("Content-Encoding", "gzip")])
    assert code(reply) == (415, "content-encoding-refused")


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        *(("/v1/txn", method, {"POST"}) for method in ("GET", "PUT", "DELETE", "PATCH")),
        *(("/v1/txn/1-2-3", method, {"GET", "HEAD"}) for method in ("POST", "PUT", "DELETE")),
    ],
)
async def test_another_method_is_405(calls: Calls, path: str, method: str, allowed: set[str]):
    reply = await calls.ask(method, path, b"{}")
    assert code(reply) == (405, "method-not-allowed")
    assert set(reply.headers["allow"].split(", ")) == allowed
