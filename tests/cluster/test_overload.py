"""More clients than the router can serve, and slow ones: 429 or 503, never a collapse, and memory stays bounded."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.cluster.actions import Reply, ask, get, put, wait_until
from tests.cluster.clusters import Cluster, running, write_config

pytestmark = pytest.mark.timeout(120)

MIB = 1024 * 1024
CONNECTIONS_MAX = 40
REQUESTS_MAX = 8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A router that takes few connections and fewer requests at a time."""
    limits = {
        "connections_max": CONNECTIONS_MAX,
        "requests_in_flight_max": REQUESTS_MAX,
        "body_bytes_max": 4 * MIB,
        "body_bytes_in_flight_max": 4 * MIB,
        "keepalive_timeout_s": 2.0,
    }
    with running(write_config(tmp_path_factory.mktemp("small"), shards=2, limits=limits)) as cluster:
        yield cluster


class RawConnection:
    """A client that tells an answer from a broken connection: what arrived is read even if sending failed."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""
        self.open = True

    async def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Raises ConnectionError (EOFError for an orderly end) if there was no whole answer."""
        loop = asyncio.get_running_loop()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        try:
            await loop.sock_sendall(self._socket, head + body)
        except ConnectionError:
            self.open = False
        while b"\r\n\r\n" not in self._rest:
            await self._read()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, size = int(status_line.split()[1]), int(headers.get("content-length", 0))
        while len(self._rest) < size:
            await self._read()
        answer, self._rest = self._rest[:size], self._rest[size:]
        if headers.get("connection") == "close":
            self.open = False
        return Reply(status, headers, answer)

    async def _read(self) -> None:
        received = await asyncio.get_running_loop().sock_recv(self._socket, 65_536)
        if not received:
            raise EOFError
        self._rest += received


@asynccontextmanager
async def connected(cluster: Cluster) -> AsyncIterator[RawConnection]:
    with socket.socket() as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", cluster.port))
        yield RawConnection(connection)


@asynccontextmanager
async def admitted(cluster: Cluster) -> AsyncIterator[RawConnection]:
    """A connection that the router keeps, as soon as it has noticed that earlier ones are closed."""
    while True:
        async with connected(cluster) as connection:
            if (await connection.ask("GET", "/healthz")).status == 200:
                yield connection
                return
        await asyncio.sleep(0.05)


def memory_bytes(pid: int) -> int:
    """Resident memory now, from /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory")


async def client(cluster: Cluster, number: int, counts: Counter[int]) -> None:
    """Put, get, list, batch: each answer is a success, or says when to try again."""
    body = os.urandom(15_000)
    async with connected(cluster) as connection:
        for round_ in range(3):
            key = f"/v1/kv/many-{number}-{round_}"
            batch = b'{"ops":[{"op":"put","key":"many-batch-%d","value":"x"}]}' % number
            for method, path, sent in (
                ("PUT", key, body),
                ("GET", key, b""),
                ("GET", "/v1/kv?prefix=many-1&values=true", b""),
                ("POST", "/v1/batch", batch),
            ):
                reply = await connection.ask(method, path, sent)
                counts[reply.status] += 1
                assert reply.status in (200, 201, 204, 429, 503) or (method, reply.status) == ("GET", 404), reply
                if reply.status in (429, 503):
                    assert int(reply.headers["retry-after"]) >= 1
                    assert reply.json["status"] == reply.status
                    assert reply.json["retry_after_ms"] > 0
                if not connection.open:
                    return


async def test_ten_times_more_connections_than_it_takes_get_answers_or_429_or_503_and_nothing_else(
    small: Cluster,
) -> None:
    router = small.pid("router-0")
    counts: Counter[int] = Counter()
    await client(small, 0, counts)
    before = memory_bytes(router)
    counts.clear()
    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(10 * CONNECTIONS_MAX):
            group.create_task(client(small, number, counts))
    assert counts[503] > 0
    assert counts[200] > 0
    assert counts[201] > 0
    grown = memory_bytes(router) - before
    assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB more than before"

    wait_until(lambda: put(small, "afterwards", b"1").status in (201, 204), "it serves as before")
    assert get(small, "afterwards").body == b"1"
    for _ in range(20):
        assert get(small, "afterwards").status == 200
    assert small.pid("router-0") == router


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/kv/at-once", b"x" * 2000),
        ("GET", "/v1/kv?prefix=at-once&values=true", b""),
        ("POST", "/v1/batch", b'{"ops":[{"op":"put","key":"at-once","value":"x"}]}'),
    ],
)
async def test_more_requests_at_a_time_than_it_takes_get_429(
    small: Cluster, method: str, path: str, body: bytes
) -> None:
    counts: Counter[int] = Counter()
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(admitted(small)) for _ in range(CONNECTIONS_MAX - 4)]
        for _ in range(20):
            for reply in await asyncio.gather(*(connection.ask(method, path, body) for connection in connections)):
                counts[reply.status] += 1
                if reply.status == 429:
                    assert (reply.json["code"], reply.headers["retry-after"]) == ("too-many-requests", "1")
                else:
                    assert reply.status in (200, 201, 204), reply
    assert counts[429] > 0
    assert counts.total() > counts[429]


def test_clients_that_never_finish_their_request_stop_no_other_client_and_are_dropped(small: Cluster) -> None:
    heads = [
        b"",
        b"GET /v1",
        b"GET /v1/kv/a HTTP/1.1\r\nHost: local",
        b"PUT /v1/kv/a HTTP/1.1\r\nHost: localhost\r\nX-",
    ]
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", small.port))) for _ in range(24)]
        for number, connection in enumerate(slow):
            connection.sendall(heads[number % len(heads)])
        for number in range(10):
            assert put(small, f"beside-{number}", b"1").status in (201, 204)
        for connection in slow:
            connection.settimeout(30)
            assert connection.recv(1) == b""  # after keepalive_timeout_s


def test_clients_that_trickle_their_bodies_stop_no_other_client(small: Cluster) -> None:
    head = b"PUT /v1/kv/trickle-%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600000\r\n\r\n"
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", small.port))) for _ in range(4)]
        for number, connection in enumerate(slow):
            connection.sendall(head % number)
        until = time.monotonic() + 1.5
        number = 0
        while time.monotonic() < until:
            for connection in slow:
                connection.sendall(b"x")
            number += 1
            assert put(small, f"beside-{number}", b"y" * 100_000).status in (201, 204)
            assert get(small, f"beside-{number}").status == 200
        assert ask(small.url, "GET", "/v1/kv?prefix=trickle-&count=true").json == {"count": 0}
    # Those who left in the middle have written nothing, and have given back what they had reserved.
    wait_until(lambda: put(small, "large", b"z" * 900_000).status in (201, 204), "there is room for a large body")
    assert ask(small.url, "GET", "/v1/kv?prefix=trickle-&count=true").json == {"count": 0}
