"""Answers: whole ones, streamed ones, and the problem documents of errors.

Owns: how status, header lines and body are written to a connection.
Promises: a whole answer leaves in one piece, which saves a third of the time that a request takes with
`web.Response`; a piece of a stream is written once the client has taken the ones before it.
Leaves to others: what is answered (`routes`), the bytes of all answers in sum (`transport.answers`).

Both classes implement what aiohttp asks of a response: `prepare`, `write_eof`, `keep_alive`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter

from kvstore.errors import KvError
from kvstore.transport.answers import LARGE_BYTES

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
BINARY = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"

_PIECE_BYTES = 256 * 1024
_FEW_PARTS = 8  # are written one by one, more are joined
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_STATUS_LINES = {code: f"HTTP/1.1 {code} {phrase}\r\n" for code, phrase in _REASONS.items()}


class Pieces:
    """A body whose pieces are written one after the other, and not joined."""

    __slots__ = ("_size", "pieces")

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self._size = sum(map(len, pieces))

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)


class Response:
    """A whole answer: a status, header lines that end in CRLF each, a body.

    Implements what aiohttp asks of a response (`prepare`, `write_eof`, `keep_alive`), without its header containers.
    `has_to_go`: something was written, so an error that says "nothing was done" may not take its place. `reserved`: the
    bytes that it has on the account, which writing gives back.
    """

    __slots__ = ("body", "content_type", "has_to_go", "head_only", "keep_alive", "lines", "reserved", "status")

    def __init__(
        self,
        status: int,
        body: bytes | Pieces = b"",
        content_type: str = "",
        lines: str = "",
        *,
        head_only: bool = False,
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.lines = lines
        self.head_only = head_only
        self.has_to_go = False
        self.keep_alive = True
        self.reserved = 0

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write all of it. Raises ConnectionResetError where the client has left, or does not take it in time."""
        keep = self.keep_alive and request.keep_alive
        if self.status >= 400 and (request.content.exception() is not None or not request.content.is_eof()):
            keep = False  # the refused body may never come: what follows on the connection could be taken for it
        self.keep_alive = keep
        lines = self.lines
        if self.content_type:
            lines += f"Content-Type: {self.content_type}\r\n"
        if not keep:
            lines += "Connection: close\r\n"
        elif request.version < HttpVersion11:
            lines += "Connection: keep-alive\r\n"
        if self.status not in (204, 304):
            lines += f"Content-Length: {len(self.body)}\r\n"
        head = f"{_STATUS_LINES[self.status]}{lines}{_date_line()}\r\n".encode("latin-1")
        body = b"" if self.head_only or self.status in (204, 304) else self.body
        protocol = cast(Any, request.protocol)
        writer = cast(StreamWriter, request.writer)
        try:
            if len(body) < LARGE_BYTES:
                await writer.write(head + bytes(body), drain=False)
            else:
                await writer.write(head, drain=False)
                await _write_in_pieces(writer, body, protocol)
            if protocol._paused:
                await protocol.answers.drain(protocol)
        finally:
            self.body = b""  # the connection keeps this answer until it has made the next one
            if self.reserved:
                protocol.answers.release(self.reserved)
                self.reserved = 0

    async def write_eof(self) -> None:
        """Nothing is left to do."""


async def _write_in_pieces(writer: StreamWriter, body: bytes | Pieces, protocol: Any) -> None:
    """Each once the client has taken the ones before, within the time that an answer has in all."""
    answers = protocol.answers
    deadline_s = answers.deadline_s()
    for piece in _pieces_of(body):
        async with answers.turns:
            await writer.write(piece, drain=False)
        if protocol._paused:
            await answers.drain(protocol, deadline_s)


def _pieces_of(body: bytes | Pieces) -> Iterator[memoryview]:
    """None is larger than `_PIECE_BYTES`."""
    for part in [body] if isinstance(body, bytes) else body.pieces:
        whole = memoryview(part)
        for at in range(0, len(part), _PIECE_BYTES):
            yield whole[at : at + _PIECE_BYTES]


class StreamedResponse:
    """An answer of unknown size, in pieces; each is written once the client has taken the ones before.

    Implements what aiohttp asks of a response. To HTTP/1.0 the end of the connection is the end of the body.
    """

    def __init__(self, request: web.BaseRequest, content_type: str, lines: str = "") -> None:
        """`lines`: further headers, each with its CRLF."""
        self.status = 200
        self._request = request
        self._chunked = request.version >= HttpVersion11
        self.keep_alive = self._chunked and bool(request.keep_alive)
        close = "" if self.keep_alive else "Connection: close\r\n"
        framing = "Transfer-Encoding: chunked\r\n" if self._chunked else ""
        lines = f"{_STATUS_LINES[200]}Content-Type: {content_type}\r\n{lines}{framing}{close}{_date_line()}\r\n"
        self._head = lines.encode("latin-1")

    async def write(self, parts: list[bytes]) -> None:
        """One piece; `parts` is emptied, so that nothing is kept twice. Raises ConnectionResetError."""
        size = sum(map(len, parts))
        if size:
            before, after = (b"%x\r\n" % size, b"\r\n") if self._chunked else (b"", b"")
            await self._send([self._head + before, *parts, after], parts)

    async def end(self) -> None:
        """Write what marks the end. Raises ConnectionResetError."""
        await self._send([self._head + (b"0\r\n\r\n" if self._chunked else b"")], [])

    async def _send(self, data: list[bytes], parts: list[bytes]) -> None:
        protocol = cast(Any, self._request.protocol)
        writer = cast(StreamWriter, self._request.writer)
        self._head = b""
        for one in data if len(data) < _FEW_PARTS else [b"".join(data)]:
            await writer.write(one, drain=False)
        data.clear()
        parts.clear()
        if protocol._paused:
            protocol.answers.streams_unread += 1
            try:
                await protocol.answers.drain(protocol)
            finally:
                protocol.answers.streams_unread -= 1

    async def prepare(self, request: web.BaseRequest) -> None:
        """It was sent while it was made."""

    async def write_eof(self) -> None:
        """Nothing is left to do."""


def json_response(status: int, document: Any, lines: str = "") -> Response:
    """A JSON answer that ends in a newline, for people with curl."""
    return Response(status, msgspec.json.encode(document) + b"\n", JSON, lines)


def problem_response(error: KvError, lines: str = "") -> Response:
    """The RFC 9457 problem document of the error; `Retry-After` (whole seconds, rounded up) where it says when."""
    retry_after_ms = error.members.get("retry_after_ms")
    if retry_after_ms is not None:
        lines += f"Retry-After: {max(1, -(-retry_after_ms // 1000))}\r\n"
    return Response(error.status, msgspec.json.encode(error.problem()) + b"\n", PROBLEM_JSON, lines)


_date_cache = (0, "")


def _date_line() -> str:
    global _date_cache
    now_s = int(time.time())
    if _date_cache[0] != now_s:
        _date_cache = (now_s, f"Date: {formatdate(now_s, usegmt=True)}\r\n")
    return _date_cache[1]
