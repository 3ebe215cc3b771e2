"""Bad input to a running cluster: a clear answer, nothing stored, and the next request works."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.cluster.actions import Reply, get, put
from tests.cluster.clusters import Cluster
from tests.cluster.wire import HEALTH, Wire, request, wire

VALUE_BYTES_MAX = 1024 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
KEY = "/v1/kv/bad/key"
LONE_SURROGATE = "\\ud800"
_numbers = itertools.count()


@pytest.fixture
def prefix() -> str:
    """A part of the key space of the test's own."""
    return f"bad-{next(_numbers)}/"


def assert_problem(answer: Reply, status: int, code: str) -> Any:
    """The document of a problem with that status and code, which says what happened and what to do."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json
    assert document["status"] == status
    assert document["code"] == code, document
    assert document["type"] == f"/problems/{code}"
    for member in ("title", "detail", "next_step"):
        assert isinstance(document[member], str)
        assert document[member].strip(": \n")
    return document


def assert_usable(cluster: Cluster, connection: Wire, answer: Reply) -> None:
    """The connection serves the next request, or the answer said that it closes; then another one does."""
    if answer.headers.get("connection") != "close":
        connection.send(HEALTH)
        assert connection.answer().status == 200
        return
    with wire(cluster) as another:
        another.send(HEALTH)
        assert another.answer().status == 200


def refused(cluster: Cluster, sent: bytes, status: int, code: str) -> Reply:
    """The answer, a problem as given, after which the next request works."""
    with wire(cluster) as connection:
        connection.send(sent)
        answer = connection.answer()
        assert_problem(answer, status, code)
        assert_usable(cluster, connection, answer)
    return answer


def accepted(cluster: Cluster, sent: bytes, *statuses: int) -> Reply:
    with wire(cluster) as connection:
        connection.send(sent)
        answer = connection.answer()
        assert answer.status in statuses, answer
        assert_usable(cluster, connection, answer)
    return answer


def listed(cluster: Cluster, prefix: str) -> list[str]:
    """The keys that begin with it."""
    answer = accepted(cluster, request("GET", f"/v1/kv?prefix={quote(prefix, safe='')}"), 200)
    return [item["key"] for item in answer.json["items"]]


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "EXPLAIN"])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("", "key-empty"),
        ("k" * 1025, "key-too-long"),
        ("%6B" * 1025, "key-too-long"),
        ("%C3%A9" * 513, "key-too-long"),
        ("a%FFb", "key-not-utf8"),
        ("%C3", "key-not-utf8"),
        ("%ED%A0%80", "key-not-utf8"),
        ("%C0%AF", "key-not-utf8"),
        ("%F4%90%80%80", "key-not-utf8"),
        ("a%zz", "key-not-utf8"),
        ("%", "key-not-utf8"),
        ("100%", "key-not-utf8"),
        ("%4", "key-not-utf8"),
        ("%+1", "key-not-utf8"),
    ],
)  # fmt: skip
def test_a_key_that_is_empty_or_too_long_or_not_utf8_is_refused(
    cluster: Cluster, method: str, raw: str, code: str
) -> None:
    if method == "EXPLAIN":
        refused(cluster, request("GET", f"/v1/explain/{raw}"), 400, code)
    else:
        refused(cluster, request(method, f"/v1/kv/{raw}", body=b"x" if method == "PUT" else None), 400, code)


def test_a_key_too_long_says_the_limit(cluster: Cluster) -> None:
    answer = refused(cluster, request("GET", "/v1/kv/" + "k" * 1025), 400, "key-too-long")
    assert answer.json["key_bytes_max"] == 1024


@pytest.mark.parametrize("character", ["k", "é", "日", "😀"])
def test_a_key_of_1024_bytes_is_taken_however_it_is_encoded(cluster: Cluster, character: str) -> None:
    key = (character * 1024)[: 1024 // len(character.encode())]
    key += "k" * (1024 - len(key.encode()))
    encoded = "".join(f"%{byte:02x}" for byte in key.encode())
    accepted(cluster, request("PUT", f"/v1/kv/{encoded}", body=b"long"), 201, 204)
    assert accepted(cluster, request("GET", f"/v1/kv/{quote(key)}"), 200).body == b"long"
    assert key in listed(cluster, key)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("a/b", "a/b"),
        ("a%2Fb", "a/b"),
        ("/", "/"),
        ("//", "//"),
        ("a//b/", "a//b/"),
        ("a%3Fttl=1", "a?ttl=1"),
        ("a%23b", "a#b"),
        ("a%20b", "a b"),
        ("a+b", "a+b"),
        ("a%2Bb", "a+b"),
        ("%20", " "),
        (".", "."),
        ("..", ".."),
        ("../x", "../x"),
        ("a/../../b", "a/../../b"),
        ("./a/.", "./a/."),
        ("%2e%2e/x", "../x"),
        ("%F0%9F%98%80", "😀"),
        ("%00", "\0"),
        ("a%00b", "a\0b"),
        ("%0D%0AX-Evil:%201", "\r\nX-Evil: 1"),
        ("%25", "%"),
        ("%2541", "%41"),
        ("%EF%BF%BE", "\ufffe"),
        ("e%CC%81", "e\u0301"),
        ("%C3%A9", "é"),
        ("%c3%a9", "é"),
        ("a;b=c,d@e:f!$&'()*~", "a;b=c,d@e:f!$&'()*~"),
        ('"<>\\^`{|}', '"<>\\^`{|}'),
    ],
)  # fmt: skip
def test_a_key_of_odd_characters_is_stored_as_itself_and_listed(
    cluster: Cluster, prefix: str, raw: str, name: str
) -> None:
    key = prefix + name
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}{raw}", body=key.encode()), 201)
    assert listed(cluster, prefix) == [key]
    for target in (f"{prefix}{raw}", quote(key, safe=""), "".join(f"%{byte:02x}" for byte in key.encode())):
        assert accepted(cluster, request("GET", f"/v1/kv/{target}"), 200).body == key.encode()
        assert accepted(cluster, request("GET", f"/v1/explain/{target}"), 200).json["key"] == key
    body = json.dumps({"ops": [{"op": "get", "key": key}]}).encode()
    assert accepted(cluster, request("POST", "/v1/batch", body=body), 200).json["results"][0]["value"] == key
    accepted(cluster, request("DELETE", f"/v1/kv/{prefix}{raw}"), 204)
    assert listed(cluster, prefix) == []


def test_an_encoded_letter_is_the_letter_and_upper_and_lower_case_differ(cluster: Cluster, prefix: str) -> None:
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}A", body=b"1"), 201)
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}%41", body=b"2"), 204)
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}a", body=b"3"), 201)
    assert listed(cluster, prefix) == [prefix + "A", prefix + "a"]
    assert accepted(cluster, request("GET", f"/v1/kv/{prefix}A"), 200).body == b"2"


@pytest.mark.parametrize("target", ["/v1/kv/é", "/v1/kv?prefix=é", b"/v1/kv/\xff", b"/v1/kv/\x7f", b"/v1/kv/a\0b"])
def test_bytes_that_are_not_percent_encoded_are_refused_with_that_advice(cluster: Cluster, target: str | bytes) -> None:
    answer = refused(cluster, request("GET", target), 400, "bad-request")
    assert "percent-encoded" in answer.json["detail"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt-get install curl")
def test_curl_reaches_keys_with_dots_and_spaces_when_they_are_encoded(cluster: Cluster, prefix: str) -> None:
    url = f"{cluster.url}/v1/kv/{prefix}"
    for target, name in (("..%2Fa", "../a"), ("a%20b", "a b"), ("é", "é")):
        subprocess.run(["curl", "-sfS", "-X", "PUT", "--data-binary", name, url + target], check=True)
        assert get(cluster, prefix + name).body == name.encode()


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_value_over_the_limit_is_refused_before_it_is_sent(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        connection.send(request("PUT", f"/v1/kv/{prefix}k", f"Content-Length: {VALUE_BYTES_MAX + 1}"))
        answer = connection.answer()
        assert assert_problem(answer, 413, "value-too-large")["bytes_max"] == VALUE_BYTES_MAX
        assert answer.headers["connection"] == "close"
    assert listed(cluster, prefix) == []


def test_a_value_over_the_limit_is_refused_when_it_is_sent_nonetheless(cluster: Cluster, prefix: str) -> None:
    refused(cluster, request("PUT", f"/v1/kv/{prefix}k", body=b"x" * (VALUE_BYTES_MAX + 1)), 413, "value-too-large")
    assert listed(cluster, prefix) == []


def test_a_value_in_chunks_is_refused_as_soon_as_it_is_over_the_limit(cluster: Cluster, prefix: str) -> None:
    chunk = b"10000\r\n%s\r\n" % (b"x" * 0x10000)
    with wire(cluster) as connection:
        connection.send(request("PUT", f"/v1/kv/{prefix}k", "Transfer-Encoding: chunked"))
        for _ in range(VALUE_BYTES_MAX // 0x10000):
            connection.send(chunk)
        connection.send(b"1\r\nx\r\n")  # and no end: the answer must not wait for it
        assert_problem(connection.answer(), 413, "value-too-large")
    assert listed(cluster, prefix) == []


def test_a_value_of_just_the_limit_in_chunks_is_taken(cluster: Cluster, prefix: str) -> None:
    chunk = b"10000\r\n%s\r\n" % (b"x" * 0x10000)
    sent = request("PUT", f"/v1/kv/{prefix}k", "Transfer-Encoding: chunked")
    accepted(cluster, sent + chunk * (VALUE_BYTES_MAX // 0x10000) + b"0\r\n\r\n", 201)
    assert get(cluster, prefix + "k").body == b"x" * VALUE_BYTES_MAX


@pytest.mark.parametrize("field", ["Content-Length: 20", "Transfer-Encoding: chunked"])
def test_a_body_that_ends_early_stores_nothing(cluster: Cluster, prefix: str, field: str) -> None:
    with wire(cluster) as connection:
        connection.send(request("PUT", f"/v1/kv/{prefix}k", field) + b"3\r\nabc\r\n")
        connection.end()
        answer = connection.answer()
        assert_problem(answer, 400, "bad-request")
        assert answer.headers["connection"] == "close"
        assert connection.rest() == b""
    assert listed(cluster, prefix) == []
    assert put(cluster, prefix + "k", b"whole").status == 201
    assert "a request failed" not in cluster.log


@pytest.mark.parametrize(
    ("field", "status", "code"),
    [
        ("Content-Encoding: gzip", 415, "content-encoding-refused"),
        ("Content-Encoding: br, gzip", 415, "content-encoding-refused"),
        (b"Content-Encoding: \xff", 415, "content-encoding-refused"),
        ("Content-Range: bytes 0-2/9", 400, "bad-request"),
        ("Expect: the-unexpected", 417, "expectation-failed"),
        (b"Expect: \xff", 417, "expectation-failed"),
    ],
)
def test_a_value_that_is_not_meant_as_sent_is_refused(
    cluster: Cluster, prefix: str, field: str | bytes, status: int, code: str
) -> None:
    refused(cluster, request("PUT", f"/v1/kv/{prefix}k", field, body=b"abc"), status, code)
    assert listed(cluster, prefix) == []
    body = json.dumps({"ops": [{"op": "put", "key": prefix + "k", "value": ""}]}).encode()
    refused(cluster, request("POST", "/v1/batch", field, body=body), status, code)
    assert listed(cluster, prefix) == []


def test_a_content_encoding_that_changes_nothing_is_taken(cluster: Cluster, prefix: str) -> None:
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}k", "Content-Encoding: identity", body=b"abc"), 201)


def test_a_transfer_coding_other_than_chunked_is_refused_and_not_stored_as_it_came(
    cluster: Cluster, prefix: str
) -> None:
    sent = request("PUT", f"/v1/kv/{prefix}k", "Transfer-Encoding: gzip, chunked") + b"3\r\nabc\r\n0\r\n\r\n"
    refused(cluster, sent, 501, "not-implemented")
    assert listed(cluster, prefix) == []


def test_a_refused_body_is_never_taken_for_a_request(cluster: Cluster, prefix: str) -> None:
    smuggled = request("PUT", f"/v1/kv/{prefix}smuggled", body=b"x")
    with wire(cluster) as connection:
        connection.send(request("PUT", f"/v1/kv/{prefix}k?ttl=0", body=smuggled) + HEALTH)
        assert_problem(connection.answer(), 400, "bad-ttl")
        assert connection.answer().json["status"] == "alive"
    assert listed(cluster, prefix) == []


def test_a_client_that_vanishes_while_it_sends_stores_nothing(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        connection.send(request("PUT", f"/v1/kv/{prefix}k", "Expect: 100-continue", "Content-Length: 9"))
        assert connection.answer().status == 100
        connection.send(b"abc")
        connection.reset()
    assert listed(cluster, prefix) == []
    assert put(cluster, prefix + "k", b"whole").status == 201
    assert "a request failed" not in cluster.log


def test_a_broken_chunk_that_comes_late_is_answered_and_not_waited_for(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        fields = ("Expect: 100-continue", "Transfer-Encoding: chunked")
        connection.send(request("PUT", f"/v1/kv/{prefix}k", *fields))
        assert connection.answer().status == 100
        connection.send(b"zz\r\n")
        answer = connection.answer()
        assert_problem(answer, 400, "bad-request")
        assert answer.headers["connection"] == "close"
        assert connection.rest() == b""
    assert listed(cluster, prefix) == []


# --- Expect: 100-continue ---------------------------------------------------------------------------------------------


def test_a_client_that_waits_for_100_continue_gets_it_at_once(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        connection.send(request("PUT", f"/v1/kv/{prefix}k", "Expect: 100-continue", "Content-Length: 3"))
        assert connection.answer().status == 100
        connection.send(b"abc")
        assert connection.answer().status == 201
        connection.send(HEALTH)
        assert connection.answer().status == 200
    assert get(cluster, prefix + "k").body == b"abc"


@pytest.mark.parametrize(
    ("target", "length", "status", "code"),
    [
        ("k", VALUE_BYTES_MAX + 1, 413, "value-too-large"),
        ("k?ttl=never", 3, 400, "bad-ttl"),
        ("%FF", 3, 400, "key-not-utf8"),
    ],
)
def test_a_client_that_waits_for_100_continue_is_refused_at_once_when_it_must_be(
    cluster: Cluster, prefix: str, target: str, length: int, status: int, code: str
) -> None:
    with wire(cluster) as connection:
        fields = ("Expect: 100-continue", f"Content-Length: {length}")
        connection.send(request("PUT", f"/v1/kv/{prefix}{target}", *fields))
        answer = connection.answer()
        assert_problem(answer, status, code)
        assert answer.headers["connection"] == "close"  # or the next request could pass for the body
    assert listed(cluster, prefix) == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt-get install curl")
@pytest.mark.parametrize(
    ("size", "status"), [(VALUE_BYTES_MAX, "201"), (VALUE_BYTES_MAX + 1, "413"), (8 * VALUE_BYTES_MAX, "413")]
)
@pytest.mark.parametrize("source", ["-", "value"])
def test_curl_puts_large_values_and_learns_that_one_is_too_large(
    cluster: Cluster, prefix: str, tmp_path: Path, source: str, size: int, status: str
) -> None:
    (tmp_path / "value").write_bytes(b"x" * size)
    done = subprocess.run(
        ["curl", "-sS", "-T", source, "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-o", "/dev/null",
         "-w", "%{http_code}", f"{cluster.url}/v1/kv/{prefix}k"],
        input=b"x" * size, capture_output=True, timeout=30, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.decode() == status, done.stderr
    assert listed(cluster, prefix) == ([prefix + "k"] if status == "201" else [])


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ttl",
    ["", "0", "0.0", "-1", "-0", "NaN", "nan", "inf", "-inf", "Infinity", "1e", "1e9", "0x10", "soon", "1,5", "1_0",
     "1s", "%20", "+1", "%2B1", "1%20", "315360000.001", "315360001", "9" * 20, "9" * 400, ".", "1.2.3", "%D9%A3",
     "0." + "0" * 30 + "1"],
)  # fmt: skip
def test_a_ttl_that_is_no_time_to_live_is_refused(cluster: Cluster, prefix: str, ttl: str) -> None:
    answer = refused(cluster, request("PUT", f"/v1/kv/{prefix}k?ttl={ttl}", body=b"x"), 400, "bad-ttl")
    assert answer.json["ttl_s_max"] == 315_360_000
    assert listed(cluster, prefix) == []


@pytest.mark.parametrize("ttl", ["0", "-1", "-0.5", "315360001", "1e300", "0.0"])
def test_a_ttl_in_a_batch_that_is_no_time_to_live_fails_that_operation_alone(
    cluster: Cluster, prefix: str, ttl: str
) -> None:
    ops = (f'{{"op":"put","key":"{prefix}1","value":"","ttl":{ttl}}}', f'{{"op":"put","key":"{prefix}2","value":""}}')
    body = f'{{"ops":[{",".join(ops)}]}}'.encode()
    results = accepted(cluster, request("POST", "/v1/batch", body=body), 200).json["results"]
    assert (results[0]["status"], results[0]["code"], results[1]["status"]) == (400, "bad-ttl", 201)
    assert listed(cluster, prefix) == [prefix + "2"]


@pytest.mark.parametrize(
    "cursor",
    ["", "x", "!!", "a2V5%FF", "%00", "null", "bm90", "aw", "a_9_", "%C3%A9", "a2V5=", "a2V5a2V5a2V5a", "k", "1",
     "a" * 3001],
)  # fmt: skip
def test_a_cursor_that_was_not_given_out_is_refused(cluster: Cluster, cursor: str) -> None:
    code = "bad-parameter" if "%FF" in cursor else "bad-cursor"
    refused(cluster, request("GET", f"/v1/kv?after={cursor}"), 400, code)


@pytest.mark.parametrize(
    "query",
    [
        *(f"limit={limit}" for limit in ("0", "10001", "-1", "abc", "", "1.0", "1e1", "%2B1", "%D9%A3", "9" * 40)),
        *(f"values={value}" for value in ("", "1", "yes", "TRUE")),
        "count=1", "count", "count=true&limit=5", "count=true&after=a2V5", "count=true&values=true",
        "perfix=a", "Prefix=a", "prefix=a&prefix=a", "limit=1&limit=2", "%70refix=a&prefix=b", "=", "=a", "a", "ttl=1",
        "prefix=%FF", "prefix=%zz", "prefix=%", "%FF=1", "prefix=%ED%A0%80",
    ],
)  # fmt: skip
def test_a_listing_with_a_wrong_parameter_is_refused(cluster: Cluster, query: str) -> None:
    refused(cluster, request("GET", f"/v1/kv?{query}"), 400, "bad-parameter")


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("PUT", f"{KEY}?tll=1"), ("PUT", f"{KEY}?ttl=1&ttl=1"), ("PUT", f"{KEY}?ttl=1&ttl=2"), ("GET", f"{KEY}?ttl=1"),
        ("PUT", f"{KEY}?prefix=a"), ("PUT", f"{KEY}?ttl=%zz"), ("GET", f"{KEY}?x"), ("DELETE", f"{KEY}?ttl=1"),
        ("POST", "/v1/batch?atomic=true"), ("GET", "/v1/explain/k?verbose=1"),
        *(("GET", f"{route}?x=1") for route in ("/", "/healthz", "/readyz", "/metrics")),
        ("GET", "/openapi.json?x=1"), ("GET", "/v1/cluster?x=1"),
    ],
)  # fmt: skip
def test_an_unknown_or_repeated_parameter_is_refused_by_every_call(cluster: Cluster, method: str, target: str) -> None:
    body = b'{"ops":[{"op":"get","key":"a"}]}' if method in ("PUT", "POST") else None
    refused(cluster, request(method, target, body=body), 400, "bad-parameter")
    assert get(cluster, "bad/key").status == 404


def test_an_empty_query_is_none(cluster: Cluster) -> None:
    accepted(cluster, request("GET", "/healthz?"), 200)
    accepted(cluster, request("GET", "/v1/kv?&limit=1&"), 200)


# --- bodies of batches ------------------------------------------------------------------------------------------------


def put_op(rest: str) -> str:
    return '{"op":"put","key":"bad/batch"' + rest + "}"


@pytest.mark.parametrize(
    "op",
    [
        '{"op":"put","key":"k","value":"x","valeu":"y"}', '{"op":"get","key":"k","value":"x"}',
        '{"op":"get","key":"k","ttl":1}', '{"op":"delete","key":"k","version":1}', '{"op":"get"}', '{"key":"k"}',
        '{"op":"GET","key":"k"}', '{"op":"increment","key":"k"}', '{"op":null,"key":"k"}', '{"op":1,"key":"k"}',
        '{"op":"get","key":1}', '{"op":"get","key":null}', '{"op":"get","key":["k"]}', '{"op":"put","value":"x"}', "{}",
        "[]", "null", '"get"', "1", "true",
        put_op(""), put_op(',"value":"x","value_base64":"eA=="'), put_op(',"value":1'), put_op(',"value":null'),
        put_op(',"value":["x"]'), put_op(',"value":{}'), put_op(',"value_base64":"x"'), put_op(',"value_base64":"eA"'),
        put_op(',"value_base64":"e A="'), put_op(',"value_base64":"é"'), put_op(',"value_base64":"_-8="'),
        put_op(',"value_base64":null'), put_op(',"value":"","ttl":"1"'), put_op(',"value":"","ttl":null'),
        put_op(',"value":"","ttl":true'), put_op(',"value":"","ttl":NaN'), put_op(',"value":"","ttl":Infinity'),
        put_op(',"value":"","ttl":1e999'), put_op(',"value":"","ttl":' + "9" * 400),
        put_op(f',"value":"{LONE_SURROGATE}"'), put_op(f',"value":"{LONE_SURROGATE}x"'), put_op(',"value":"\\udc00"'),
        f'{{"op":"get","key":"{LONE_SURROGATE}"}}', f'{{"op":"delete","key":"a{LONE_SURROGATE}b"}}',
        put_op(',"value":"\n"'), put_op(',"value":"\\x"'), put_op(",'value':'x'"),
    ],
)  # fmt: skip
def test_a_batch_with_an_operation_that_is_not_well_formed_is_refused_whole(
    cluster: Cluster, prefix: str, op: str
) -> None:
    body = f'{{"ops":[{{"op":"put","key":"{prefix}k","value":"x"}},{op}]}}'.encode()
    refused(cluster, request("POST", "/v1/batch", body=body), 400, "bad-body")
    assert listed(cluster, prefix) == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"{}", b"[]", b"null", b"1", b'"ops"', b'{"ops":[]}', b'{"ops":{}}', b'{"ops":null}',
        b'{"ops":"get"}',
        b'{"ops":[{"op":"get","key":"a"}],"atomic":true}', b'{"Ops":[{"op":"get","key":"a"}]}',
        b'{"ops":[{"op":"get","key":"a"},]}', b'{"ops":[{"op":"get","key":"a"}]} {}',
        b'{"ops":[{"op":"get","key":"a"}]', b"ops=get", b'\xef\xbb\xbf{"ops":[{"op":"get","key":"a"}]}',
        b"\xff\xfe", '{"ops":[]}'.encode("utf-16"),
        b'{"ops":[{"op":"get","key":"\xff"}]}', b'{"ops":[{"op":"get","key":"\xed\xa0\x80"}]}',
        b'{"ops":[{"op":"put","key":"a","value":"\xc3"}]}', b"\0" * 100,
        b"[" * 200_000, b'{"ops":' * 200_000, b'{"ops":' + b"[" * 200_000, b'{"ops":[{"key":' + b"[" * 200_000,
        b'{"ops":[{"key":' + b'{"a":' * 200_000,
    ],
    ids=lambda body: ascii(body[:40]),
)  # fmt: skip
def test_a_batch_that_is_no_batch_is_refused(cluster: Cluster, body: bytes) -> None:
    refused(cluster, request("POST", "/v1/batch", body=body), 400, "bad-body")


def test_a_batch_over_the_limit_is_refused_before_it_is_sent(cluster: Cluster) -> None:
    with wire(cluster) as connection:
        connection.send(request("POST", "/v1/batch", f"Content-Length: {BODY_BYTES_MAX + 1}"))
        answer = connection.answer()
        assert assert_problem(answer, 413, "body-too-large")["bytes_max"] == BODY_BYTES_MAX
        assert answer.headers["connection"] == "close"


def test_a_batch_over_the_limit_in_chunks_is_refused_on_the_way(cluster: Cluster, prefix: str) -> None:
    start = f'{{"ops":[{{"op":"put","key":"{prefix}k","value":"'.encode()
    with wire(cluster) as connection:
        connection.send(request("POST", "/v1/batch", "Transfer-Encoding: chunked"))
        connection.send(b"%x\r\n%s\r\n" % (len(start), start))
        for _ in range(BODY_BYTES_MAX // 0x100000):
            connection.send(b"100000\r\n%s\r\n" % (b"x" * 0x100000))
        assert_problem(connection.answer(), 413, "body-too-large")
    assert listed(cluster, prefix) == []


def test_a_batch_of_just_the_limit_is_taken(cluster: Cluster, prefix: str) -> None:
    body = f'{{"ops":[{{"op":"put","key":"{prefix}k","value":"x"}}]}}'.encode()
    accepted(cluster, request("POST", "/v1/batch", body=body + b" " * (BODY_BYTES_MAX - len(body))), 200)
    assert listed(cluster, prefix) == [prefix + "k"]


# --- routes and methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["/v2/kv/a", "/v1", "/v1/", "/v1/kv2", "/V1/kv", "//v1/kv", "/v1/batch/", "/favicon.ico", "/healthz/",
     "/v1/explain", "/%2e%2e/etc/passwd", "/" + "x" * 5000],
)  # fmt: skip
def test_a_route_that_does_not_exist_is_a_problem_of_its_own(cluster: Cluster, target: str) -> None:
    refused(cluster, request("GET", target), 404, "no-such-route")
    refused(cluster, request("PUT", target, body=b"x"), 404, "no-such-route")


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        *((method, KEY, "GET, HEAD, PUT, DELETE") for method in ("POST", "PATCH", "OPTIONS", "TRACE")),
        *((method, "/v1/kv", "GET, HEAD") for method in ("PUT", "POST", "DELETE")),
        *((method, "/v1/batch", "POST") for method in ("GET", "PUT", "DELETE")),
        *(("POST", route, "GET, HEAD") for route in ("/", "/healthz", "/readyz", "/metrics")),
        ("PUT", "/v1/cluster", "GET, HEAD, PATCH"), ("DELETE", "/v1/explain/k", "GET, HEAD"),
    ],
)  # fmt: skip
def test_a_method_that_a_route_does_not_take_is_answered_with_those_it_takes(
    cluster: Cluster, method: str, target: str, allow: str
) -> None:
    answer = refused(cluster, request(method, target, body=b"x"), 405, "method-not-allowed")
    assert sorted(answer.headers["allow"].split(", ")) == sorted(allow.split(", "))
    assert sorted(answer.json["allow"]) == sorted(allow.split(", "))


@pytest.mark.parametrize(("target", "status"), [("/v1/batch", 405), ("/nothing", 404), ("/v1/kv/", 400)])
def test_a_refused_head_has_no_body(cluster: Cluster, target: str, status: int) -> None:
    with wire(cluster) as connection:
        connection.send(request("HEAD", target) + HEALTH)
        answer = connection.answer(to_head=True)
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
        assert connection.answer().json["status"] == "alive"


# --- HTTP itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (request("GET", "/v1/kv/" + "k" * 20_000), 414, "uri-too-long"),
        (request("GET", "/v1/kv?prefix=" + "k" * 200_000), 414, "uri-too-long"),
        (request("GET", "/", "Cookie: " + "c" * 20_000), 431, "headers-too-large"),
        (request("GET", "/", "X" * 20_000 + ": 1"), 431, "headers-too-large"),
        (request("GET", "/", "Referer: /status line, url" + "c" * 20_000), 431, "headers-too-large"),
        (request("GET", "/", *(f"X-{n}: 1" for n in range(1000))), 431, "headers-too-large"),
        (b"hello\r\n\r\n", 400, "bad-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 100, 400, "bad-request"),
        (b"\x00" * 100, 400, "bad-request"),
        (b"GET\r\n\r\n", 400, "bad-request"),
        (b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n", 400, "bad-request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad-request"),
        (b"FETCH /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/kv/a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "bad-request"),
        (b"GET healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "bad-request"),
        (request("GET", "/", "No colon"), 400, "bad-request"),
        (request("GET", "/", "Space : 1"), 400, "bad-request"),
        (request("GET", "/", "X: 1\r\n folded: 2"), 400, "bad-request"),
        (request("GET", "/", "X: a\0b"), 400, "bad-request"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "bad-request"),
        (request("GET", "/healthz", "Host: localhost"), 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: 1x") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: -1") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: +1") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length:") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: 99999999999999999999999") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: 1", "Content-Length: 1") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: 1", "Content-Length: 2") + b"x", 400, "bad-request"),
        (request("PUT", KEY, "Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400, "bad-request"),
        (request("PUT", KEY, "Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n", 400, "bad-request"),
        (request("PUT", KEY, "Transfer-Encoding: chunked") + b"zz\r\nx\r\n", 400, "bad-request"),
        (request("PUT", KEY, "Transfer-Encoding: chunked") + b"-1\r\nx\r\n", 400, "bad-request"),
        (request("PUT", KEY, "Transfer-Encoding: chunked") + b"1\r\nxyz\r\n0\r\n\r\n", 400, "bad-request"),
    ],
    ids=lambda value: ascii(value[-60:]) if isinstance(value, bytes) else str(value),
)
def test_what_is_not_http_is_refused_with_a_problem_and_the_connection_closed(
    cluster: Cluster, sent: bytes, status: int, code: str
) -> None:
    answer = refused(cluster, sent, status, code)
    assert answer.headers["connection"] == "close"
    assert get(cluster, "bad/key").status == 404


# --- foreign pages ----------------------------------------------------------------------------------------------------


def of_host(host: str, *lines: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"PUT {KEY} HTTP/{version}", f"Host: {host}", "Content-Length: 1", *lines, "", "x"]).encode()


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example:80", "evil@localhost",
     "localhost:80:80", "localhost:port", "LOCALHOST\u0130", "[::1", "1.2.3.4.5"],
)  # fmt: skip
def test_a_request_for_a_foreign_host_is_refused(cluster: Cluster, host: str) -> None:
    refused(cluster, of_host(host), 403, "foreign-origin")
    refused(cluster, of_host(host, version="1.0"), 403, "foreign-origin")
    assert get(cluster, "bad/key").status == 404


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "localhost:9999", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080"]
)
def test_a_request_for_this_machine_by_any_of_its_names_is_served(cluster: Cluster, host: str) -> None:
    accepted(cluster, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), 200)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "NULL", "", "http://localhost:1", "localhost:8080", "https://127.0.0.1",
     "http://localhost:8080, http://evil.example"],
)  # fmt: skip
def test_a_request_of_a_foreign_page_is_refused(cluster: Cluster, origin: str) -> None:
    refused(cluster, of_host("localhost:8080", f"Origin: {origin}"), 403, "foreign-origin")
    for method in ("GET", "OPTIONS"):
        sent = f"{method} {KEY} HTTP/1.1\r\nHost: localhost:8080\r\nOrigin: {origin}\r\n\r\n"
        refused(cluster, sent.encode(), 403, "foreign-origin")
    two = ("Origin: http://localhost:8080", f"Origin: {origin}")
    refused(cluster, of_host("localhost:8080", *two), 403, "foreign-origin")
    assert get(cluster, "bad/key").status == 404


@pytest.mark.parametrize(
    ("host", "origin"),
    [("localhost:8080", "http://localhost:8080"), ("127.0.0.1:8080", "http://127.0.0.1:8080"),
     ("LOCALHOST", "http://localhost"), ("localhost", "https://localhost")],
)  # fmt: skip
def test_a_request_of_the_routers_own_page_is_served(cluster: Cluster, host: str, origin: str) -> None:
    accepted(cluster, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n\r\n".encode(), 200)


# --- headers that a call does not heed --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ['If-Match: "1"', "If-None-Match: *", "Lock-Token: 1", "Idempotency-Key: k"])
def test_a_header_that_would_change_the_meaning_of_a_batch_is_refused(
    cluster: Cluster, prefix: str, field: str
) -> None:
    body = b'{"ops":[{"op":"put","key":"%s","value":"1"}]}' % (prefix + "k").encode()
    refused(cluster, request("POST", "/v1/batch", field, body=body), 400, "bad-parameter")
    assert get(cluster, prefix + "k").status == 404
