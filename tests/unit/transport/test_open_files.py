"""A server that may open few files: clients beyond are answered, and it can still open what it needs itself."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys

import pytest

from kvstore.transport.open_files import KEPT_MAX, connections_that_fit

FILES = 64
SCRIPT = """
import asyncio, os, resource
from kvstore.config import Limits
from kvstore.transport.http.responses import Response
from kvstore.transport.http.server import Server, start_server

resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

async def handle(request):
    os.close(os.open("/dev/null", os.O_RDONLY))
    return Response(200, b"here")

async def main():
    server = Server(handle, Limits())
    runner = await start_server(server, "127.0.0.1", 0)
    print(runner.addresses[0][1], server.connections_max, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def status(client: socket.socket) -> bytes:
    client.settimeout(60)
    return client.recv(4096)[:12]


def test_clients_beyond_the_files_that_may_be_open_are_answered_and_not_reset() -> None:
    script = SCRIPT.replace("FILES", str(FILES))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        clients: list[socket.socket] = []
        try:
            assert process.stdout is not None
            port, taken = map(int, process.stdout.readline().split())
            assert taken == FILES // 2
            for _ in range(taken):
                client = socket.create_connection(("127.0.0.1", port))
                clients.append(client)
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert status(client) == b"HTTP/1.1 200"
            for _ in range(2 * FILES):
                with socket.create_connection(("127.0.0.1", port)) as refused:
                    assert status(refused) == b"HTTP/1.1 503"
        finally:
            for client in clients:
                client.close()
            process.kill()


@pytest.mark.parametrize(
    ("files", "fits"),
    [(resource.RLIM_INFINITY, 4096), (1_048_576, 4096), (4096 + KEPT_MAX, 4096), (1024, 1024 - KEPT_MAX), (100, 50)],
)
def test_a_part_of_the_files_is_kept_for_everything_else(
    files: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections_that_fit(4096) == fits
