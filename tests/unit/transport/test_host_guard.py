"""Host and Origin of requests: a page of others, or a name that is not the router's, is refused."""

from __future__ import annotations

import pytest

from kvstore.errors import Foreign
from kvstore.transport.http.requests import HostGuard


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1:8080", "192.168.1.7", "[::1]:8080", "[::1]", "kv.lan:80"],
)
def test_names_of_this_router_and_addresses_are_let_in(host: str) -> None:
    guard = HostGuard(["kv.lan"])
    for _ in range(2):
        guard.check({"host": host})
        guard.check({"host": host, "origin": f"http://{host}"})


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
        "evil.example#127.0.0.1",
        "kv.lan.",
        "127.0.0.1:80:80x",
        "::1",
        "[::1].evil",
        "127.0.0.1, evil.example",
    ],
)
def test_names_of_others_are_refused_again_and_again(host: str) -> None:
    guard = HostGuard(["kv.lan"])
    for _ in range(2):
        with pytest.raises(Foreign):
            guard.check({"host": host})


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "http://localhost",
        "http://localhost:8081",
        "http://127.0.0.1:8080",
        "file://",
        "",
    ],
)
def test_pages_of_others_are_refused(origin: str) -> None:
    guard = HostGuard([])
    guard.check({"host": "localhost:8080"})
    with pytest.raises(Foreign):
        guard.check({"host": "localhost:8080", "origin": origin})


def test_the_routers_own_page_is_let_in() -> None:
    HostGuard([]).check({"host": "localhost:8080", "origin": "http://localhost:8080"})
    HostGuard(["kv.lan"]).check({"host": "kv.lan", "origin": "https://KV.lan"})


def test_the_memory_of_good_hosts_is_bounded() -> None:
    guard = HostGuard([])
    for number in range(3000):
        guard.check({"host": f"10.0.{number // 250}.{number % 250}"})
    assert len(guard._good) <= 1000
