"""Bad parameters, batches, routes, methods and headers: a clear answer, nothing stored, and the next request works."""

from __future__ import annotations

import pytest

from tests.cluster.actions import get
from tests.cluster.clusters import Cluster
from tests.cluster.refusals import BODY_BYTES_MAX, KEY, accepted, assert_problem, listed, refused
from tests.cluster.wire import HEALTH, request, wire

LONE_SURROGATE = "\\ud800"


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


# --- headers that a call does not heed --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ['If-Match: "1"', "If-None-Match: *", "Lock-Token: 1", "Idempotency-Key: k"])
def test_a_header_that_would_change_the_meaning_of_a_batch_is_refused(
    cluster: Cluster, prefix: str, field: str
) -> None:
    body = b'{"ops":[{"op":"put","key":"%s","value":"1"}]}' % (prefix + "k").encode()
    refused(cluster, request("POST", "/v1/batch", field, body=body), 400, "bad-parameter")
    assert get(cluster, prefix + "k").status == 404
