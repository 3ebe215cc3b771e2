"""Bad values in requests to a running cluster: refused as soon as that is known, and nothing is stored."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.actions import get, put
from tests.cluster.clusters import Cluster
from tests.cluster.refusals import VALUE_BYTES_MAX, accepted, assert_problem, listed, refused
from tests.cluster.wire import HEALTH, request, wire

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
