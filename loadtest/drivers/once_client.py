"""The connection of a Locust user: every request is sent once, and its failure says whether it was sent.

Owns: one keep-alive connection, in the place of the pool of clients that locust.contrib.fasthttp asks for one.
Promises: a request goes out on one connection, once. NeverSent: no byte of it left. NoAnswer: it left, at least in
part, and no whole answer came; whether it was done is unknown. An answer is whole or is none.
Leaves to others: what to send and what it means (loadtest.workloads.calls).

geventhttpclient's own client sends a GET, PUT or DELETE again, up to eleven times, when the connection is closed
before an answer comes (HTTPClient.request); its pool asks select(2) whether a connection is alive, which takes every
one beyond file descriptor 1,023 for dead. Neither is used here, only its parser of responses.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from typing import Any

import gevent.socket
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
_BLOCK_BYTES = 65_536


class NeverSent(OSError):
    """The connection could not be made."""


class NoAnswer(OSError):
    """The request was sent, and the connection ended or the time was up before its answer was whole."""


class OnceClient:
    """Pool, client and connection in one, for one user, who asks for one thing after the other."""

    def __init__(self) -> None:
        self._socket: Any = None

    def get_client(self, url: Any) -> OnceClient:
        """As a pool: the client for that address."""
        self._host, self._port = url.host, url.port
        return self

    def request(
        self, method: str, uri: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> HTTPSocketPoolResponse:
        """As a client: the response, with its whole body. Raises NeverSent and NoAnswer."""
        lines = [f"{method} {uri} HTTP/1.1", f"Host: {self._host}:{self._port}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None or method in ("PUT", "POST"):
            lines.append(f"Content-Length: {len(body or b'')}")
        head = "\r\n".join([*lines, "", ""])
        try:
            connection = self._connection()
        except OSError as error:
            raise NeverSent(_words(error)) from error
        try:
            connection.sendall(head.encode("ascii") + (body or b""))
            pool: Any = self
            response = HTTPSocketPoolResponse(connection, pool, method=method, block_size=_BLOCK_BYTES)
            while not response.message_complete:
                data = connection.recv(_BLOCK_BYTES)
                if not data:
                    raise ConnectionResetError("it was closed within the answer")
                response.feed(data)
        except (OSError, HTTPParseError) as error:
            self.close()
            raise NoAnswer(_words(error)) from error
        except BaseException:  # the user was ended while it waited: the connection has an answer to come
            self.close()
            raise
        response._sent_request = head
        return response

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def return_socket(self, used: Any) -> None:
        """As a pool of connections: this one can be used again."""
        self._socket = used

    def release_socket(self, used: Any) -> None:
        """As a pool of connections: this one cannot."""
        used.close()
        if self._socket is used:
            self._socket = None

    def _connection(self) -> Any:
        """The one in use, unless the other side has closed it."""
        if self._socket is not None:
            self._socket.settimeout(0.0)
            try:
                self._socket.recv(1, socket.MSG_PEEK)  # the end of it, or bytes that were not asked for
                self.close()
            except BlockingIOError:
                self._socket.settimeout(REQUEST_TIMEOUT_S)
                return self._socket
            except OSError:
                self.close()
        family, address = _resolve(self._host, self._port)
        self._socket = gevent.socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(CONNECT_TIMEOUT_S)
            self._socket.connect(address)
            self._socket.settimeout(REQUEST_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        return self._socket


@functools.cache
def _resolve(host: str, port: int) -> tuple[int, Any]:
    """Family and address, asked for once in a process.
    gevent's resolver is a pool of threads, in which hundreds of new users wait for seconds while the users that are
    there keep the process busy."""
    family, _, _, _, address = gevent.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address


def _words(error: Exception) -> str:
    """The kind of it, without numbers: so that the same fault is always counted under the same words."""
    return "timed out" if isinstance(error, TimeoutError) else type(error).__name__
