"""What is not HTTP, or comes from a foreign page or for a foreign host: refused by a running cluster."""

from __future__ import annotations

import pytest

from tests.cluster.actions import get
from tests.cluster.clusters import Cluster
from tests.cluster.refusals import KEY, accepted, refused
from tests.cluster.wire import request

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
