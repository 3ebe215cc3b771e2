"""HTTP byte by byte, for what no client would send: requests of any form in, answers taken apart."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import parse_headers
from typing import BinaryIO

from tests.cluster.actions import Reply
from tests.cluster.clusters import Cluster

TIMEOUT_S = 15.0
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Wire:
    """A connection. Reading raises TimeoutError when nothing comes."""

    def __init__(self, connection: socket.socket, file: BinaryIO) -> None:
        self._connection = connection
        self._file = file

    def send(self, request: bytes) -> None:
        """Send all of it; a server that has closed by then may still have answered, so that is no error here."""
        try:
            self._connection.sendall(request)
        except ConnectionError:
            pass

    def end(self) -> None:
        """Nothing more is sent from here (half-closed); answers can still come."""
        self._connection.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """The connection breaks off, as when the client's machine is gone (RST)."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self._connection.close()

    def answer(self, *, to_head: bool = False) -> Reply:
        """The next answer, interim ones (100) included."""
        version, status, *_ = self._file.readline().decode("ascii").split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0")
        headers = {name.lower(): value for name, value in parse_headers(self._file).items()}
        return Reply(int(status), headers, self._body(int(status), headers, to_head))

    def _body(self, status: int, headers: dict[str, str], to_head: bool) -> bytes:
        if to_head or status in (100, 204, 304):
            return b""
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                assert self._file.readline() == b"\r\n"
            assert self._file.readline() == b"\r\n"
            return body
        return self._file.read(int(headers["content-length"]) if "content-length" in headers else -1)

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""


@contextmanager
def wire(cluster: Cluster) -> Iterator[Wire]:
    """A connection to the router until the block ends."""
    with (
        closing(socket.create_connection(("127.0.0.1", cluster.port), timeout=TIMEOUT_S)) as connection,
        connection.makefile("rb") as file,
    ):
        yield Wire(connection, file)


def request(method: bytes | str, target: bytes | str, *lines: bytes | str, body: bytes | None = None) -> bytes:
    """A request with `Host: localhost`, these header lines (without CRLF), and Content-Length if there is a body."""
    head = [b"%s %s HTTP/1.1" % (_bytes(method), _bytes(target)), b"Host: localhost", *map(_bytes, lines)]
    if body is not None:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + (body or b"")


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
