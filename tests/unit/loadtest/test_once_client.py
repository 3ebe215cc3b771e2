"""The connection of Locust's users, against a server that ends connections: every request arrives once.

The client runs in a process of its own: importing locust replaces the sockets of the process that does so.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from loadtest.workloads.calls import NEVER_SENT, NO_ANSWER

ANSWERED = b'HTTP/1.1 204 No Content\r\nETag: "7"\r\n\r\n'
SCRIPT = """
import json, sys
from loadtest.drivers.gevent import drive, quiet
from loadtest.workloads.calls import Call

http, replies = quiet(sys.argv[1]), []

def steps():
    for method, path in json.loads(sys.argv[2]):
        body = b"x" if method in ("PUT", "POST") else None
        reply = yield Call("any", method, path, body)
        replies.append([reply.status, reply.error, reply.body.decode()])

drive(http, steps())
print(json.dumps(replies))
"""


class EndingServer:
    """Reads every request whole, notes its method and path, and answers or ends the connection as the path says."""

    def __init__(self) -> None:
        self.arrived: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while request := lines.readline():
                method, path, _ = request.decode().split()
                length = 0
                while (line := lines.readline()) != b"\r\n":
                    name, _, value = line.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                lines.read(length)
                self.arrived[f"{method} {path}"] += 1
                if not self._answer(connection, path):
                    return

    def _answer(self, connection: socket.socket, path: str) -> bool:
        """False to end the connection."""
        if path == "/reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if path == "/half":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal")
            return False
        if path == "/moved":
            connection.sendall(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /kept\r\nContent-Length: 0\r\n\r\n")
            return True
        if path.startswith("/kept"):
            connection.sendall(ANSWERED)
            return path != "/kept-once"
        return False


@pytest.fixture
def server() -> Iterator[EndingServer]:
    server = EndingServer()
    yield server
    server.close()


def replies_to(url: str, *asked: tuple[str, str]) -> list[tuple[int, str, str]]:
    """Status, error and body of the answers to these requests, one after the other, by one client."""
    command = [sys.executable, "-c", SCRIPT, url, json.dumps(asked)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return [tuple(reply) for reply in json.loads(run.stdout)]


def test_a_request_whose_connection_is_closed_before_the_answer_arrives_once_and_its_outcome_is_unknown(
    server: EndingServer,
) -> None:
    methods = ["PUT", "DELETE", "POST", "GET"]
    replies = replies_to(server.url, *[(method, f"/{kind}") for kind in ("closed", "reset") for method in methods])
    assert [status for status, _, _ in replies] == [NO_ANSWER] * 8
    assert all(error for _, error, _ in replies)
    assert server.arrived == {f"{method} /{kind}": 1 for kind in ("closed", "reset") for method in methods}


def test_a_write_on_a_connection_that_was_kept_and_ends_under_it_arrives_once(server: EndingServer) -> None:
    replies = replies_to(server.url, ("PUT", "/kept"), ("PUT", "/closed"), ("PUT", "/kept"), ("DELETE", "/reset"))
    assert [status for status, _, _ in replies] == [204, NO_ANSWER, 204, NO_ANSWER]
    assert server.arrived == {"PUT /kept": 2, "PUT /closed": 1, "DELETE /reset": 1}


def test_after_an_idle_connection_was_closed_the_next_request_takes_a_new_one(server: EndingServer) -> None:
    replies = replies_to(server.url, *[("PUT", "/kept-once")] * 3)
    # the end of the connection may come just after the next request was sent: then it is not known whether that has
    # arrived, and it is not repeated
    assert {status for status, _, _ in replies} <= {204, NO_ANSWER}
    assert replies[0][0] == 204
    assert [status for status, _, _ in replies].count(204) <= server.arrived["PUT /kept-once"] <= 3


def test_half_an_answer_is_no_answer(server: EndingServer) -> None:
    assert [status for status, _, _ in replies_to(server.url, ("PUT", "/half"))] == [NO_ANSWER]
    assert server.arrived == {"PUT /half": 1}


def test_a_redirect_is_an_answer_and_is_not_followed(server: EndingServer) -> None:
    assert [status for status, _, _ in replies_to(server.url, ("PUT", "/moved"))] == [307]
    assert server.arrived == {"PUT /moved": 1}


def test_a_request_that_finds_no_server_was_never_sent() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused, and no other process takes it
        replies = replies_to(f"http://127.0.0.1:{unused.getsockname()[1]}", ("PUT", "/kept"))
    assert replies == [(NEVER_SENT, "ConnectionRefusedError", "")]
