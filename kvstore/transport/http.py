"""HTTP as all front doors of the system speak it: strict in, problem documents out, lean on the way.

Owns: decoding of paths and queries, the bound on connections, the check of Host and Origin, the response, and problem
documents for every error, those that aiohttp makes by itself included.
Promises: bytes that are not UTF-8, broken escapes, unknown or repeated parameters never pass for something else. A
request is begun once the client has taken the answers before it, but for a little, so that one that does not read costs
little memory (`transport.answers` has the sum).
Leaves to others: routes and their meaning (`router.app`), bodies (`transport.bodies`).

aiohttp's low-level `web.Server` is used with three of its extension points: the request handler class (errors, bound
on connections), the request factory and the response protocol (`prepare`, `write_eof`). `Response` writes its head
and body in one piece, which saves a third of the time that a request takes with `web.Response`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NamedTuple, cast
from urllib.parse import unquote_to_bytes

import msgspec
from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter
from aiohttp.http_exceptions import InvalidURLError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from kvstore.addresses import is_loopback
from kvstore.config import Limits
from kvstore.errors import (
    BadParameter,
    BadRequest,
    Foreign,
    HeadersTooLarge,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    UriTooLong,
)
from kvstore.transport.answers import SMALL_BYTES, AnswerAccount
from kvstore.transport.open_files import connections_that_fit

log = logging.getLogger(__name__)

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
BINARY = "application/octet-stream"

_HALF_CLOSED_POLL_S = 0.02
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
HEAD_BYTES_MAX = 131_072
_HEAD_TOO_LARGE = "The header as a whole is too large"
_JOINED_BYTES_MAX = 65_536  # of a body: to copy it costs less than a second write
_FEW_PARTS = 8  # are written one by one, more are joined
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_IP_LITERAL = re.compile(r"\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]+\]")
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_STATUS_LINES = {code: f"HTTP/1.1 {code} {phrase}\r\n" for code, phrase in _REASONS.items()}


# --- requests ---------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A request line and its header fields, decoded. `path` is raw; the names in `fields` are lower case."""

    method: str
    path: str
    query: str
    fields: dict[str, str]


def read_head(request: web.BaseRequest) -> Head:
    """Take the request apart. Raises BadRequest for a repeated field that may come but once."""
    path, _, query = request.raw_path.partition("?")
    if not path.startswith("/") and "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    fields: dict[str, str] = {}
    for raw_name, raw_value in request.raw_headers:
        name = raw_name.decode("ascii", "replace").lower()
        value = raw_value.decode("utf-8", "surrogateescape")
        if name in fields:
            if name in ("host", "content-length", "lock-token", "idempotency-key"):
                raise BadRequest(f"the header {name} is given more than once")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return Head(request.method, path, query, fields)


def decode_key(raw: str, bytes_max: int) -> str:
    """A key from its percent-encoded form, strictly. Raises KeyEmpty, KeyTooLong, KeyNotUtf8."""
    if raw.isascii() and "%" not in raw:
        key, size = raw, len(raw)
    else:
        encoded = raw.encode("utf-8", "surrogateescape")
        if _BROKEN_ESCAPE.search(encoded):
            raise KeyNotUtf8("the key holds a % that is not followed by two hexadecimal digits")
        decoded = unquote_to_bytes(encoded)
        size = len(decoded)
        try:
            key = decoded.decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            raise KeyNotUtf8(f"byte {error.start} of the key is not UTF-8") from None
    check_key_size(size, bytes_max)
    return key


def check_key(key: str, bytes_max: int) -> str:
    """A key that came as text (JSON). Raises KeyEmpty, KeyTooLong, KeyNotUtf8 (lone surrogates)."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise KeyNotUtf8("the key holds a lone surrogate, which is not Unicode text") from None
    check_key_size(size, bytes_max)
    return key


def check_key_size(size: int, bytes_max: int) -> None:
    """Raises KeyEmpty, KeyTooLong."""
    if not size:
        raise KeyEmpty()
    if size > bytes_max:
        raise KeyTooLong(f"the key has {size} bytes; the limit is {bytes_max}", key_bytes_max=bytes_max)


def decode_query(query: str, known: frozenset[str]) -> dict[str, str]:
    """The parameters of a query. Raises BadParameter for unknown or repeated ones and for what is not UTF-8."""
    parameters: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        raw_name, _, raw_value = item.partition("=")
        name, value = _decode_component(raw_name), _decode_component(raw_value)
        if name not in known:
            offered = f"known are: {', '.join(sorted(known))}" if known else "this call takes none"
            raise BadParameter(f"the query parameter {name!r} is unknown; {offered}", parameter=name)
        if name in parameters:
            raise BadParameter(f"the query parameter {name!r} is given more than once", parameter=name)
        parameters[name] = value
    return parameters


def _decode_component(raw: str) -> str:
    encoded = raw.replace("+", " ").encode("utf-8", "surrogateescape")
    if _BROKEN_ESCAPE.search(encoded):
        raise BadParameter(f"the query holds a broken escape in {raw!r}")
    try:
        return unquote_to_bytes(encoded).decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise BadParameter(f"the query holds bytes that are not UTF-8 in {raw!a}") from None


class HostGuard:
    """Refuses what a web page of somebody else could send: foreign Host (DNS rebinding) and foreign Origin."""

    def __init__(self, allowed_hosts: list[str]) -> None:
        self._names = {"localhost", *(name.lower() for name in allowed_hosts)}
        self._good: set[str] = set()

    def check(self, fields: dict[str, str]) -> None:
        """Raises Foreign and BadRequest."""
        host = fields.get("host", "")
        if host not in self._good:
            name = re.sub(r":\d+$", "", host).lower()
            if name and name not in self._names and not _IP_LITERAL.fullmatch(name):
                raise Foreign(f"Host {host!a} is not a name of this router")
            if len(self._good) < 1000:
                self._good.add(host)
        if "origin" in fields and fields["origin"].lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise Foreign(f"a page of {fields['origin']!a} may not call this router")


def client_has_left(request: web.BaseRequest) -> bool:
    """The client has closed the connection, or its side of it: the two look alike until something is sent."""
    transport = request.transport
    return transport is None or transport.is_closing() or getattr(request.protocol, "half_closed", False)


def warn_if_exposed(listen: str, what_can_be_done: str) -> None:
    """Say so in the log when `listen` (HOST:PORT) is more than this machine's own business."""
    if not is_loopback(listen):
        log.warning("whoever reaches %s can %s: there are no accounts yet", listen, what_can_be_done)


# --- responses --------------------------------------------------------------------------------------------------------


class Response:
    """A whole answer: a status, header lines that end in CRLF each, a body.

    Implements what aiohttp asks of a response (`prepare`, `write_eof`, `keep_alive`), without its header containers.
    `has_to_go`: something was written, so an error that says "nothing was done" may not take its place. `reserved`: the
    bytes that it has on the account, which writing gives back.
    """

    __slots__ = ("body", "content_type", "has_to_go", "head_only", "keep_alive", "lines", "reserved", "status")

    def __init__(
        self, status: int, body: bytes = b"", content_type: str = "", lines: str = "", *, head_only: bool = False
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
        """Write all of it."""
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
        protocol = cast(_Protocol, request.protocol)
        writer = cast(StreamWriter, request.writer)
        try:
            if len(body) < _JOINED_BYTES_MAX:
                await writer.write(head + body, drain=False)
            else:
                await writer.write(head, drain=False)
                await writer.write(body, drain=False)
            if protocol._paused:
                await protocol.answers.drain(protocol)
        finally:
            if self.reserved:
                protocol.answers.release(self.reserved)
                self.reserved = 0

    async def write_eof(self) -> None:
        """Nothing is left to do."""


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
        """One piece; `participants` is emptied, so that nothing is kept twice. Raises ConnectionResetError."""
        size = sum(map(len, parts))
        if size:
            before, after = (b"%x\r\n" % size, b"\r\n") if self._chunked else (b"", b"")
            await self._send([self._head + before, *parts, after], parts)

    async def end(self) -> None:
        """Write what marks the end. Raises ConnectionResetError."""
        await self._send([self._head + (b"0\r\n\r\n" if self._chunked else b"")], [])

    async def _send(self, data: list[bytes], parts: list[bytes]) -> None:
        protocol = cast(_Protocol, self._request.protocol)
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


# --- the server -------------------------------------------------------------------------------------------------------

Handler = Callable[[web.BaseRequest], Awaitable[Any]]


class _Protocol(RequestHandler):
    __slots__ = ("_head_bytes", "_last_body", "_seen_requests", "answers", "half_closed")

    def connection_made(self, transport: Any) -> None:
        self._last_body: StreamReader = EMPTY_PAYLOAD
        self.half_closed = False
        self._seen_requests = self._head_bytes = 0
        server = cast(Server, self._manager)
        self.answers = server.answers
        transport.set_write_buffer_limits(high=SMALL_BYTES)  # beyond, `_paused` is set until it is a quarter of that
        if len(server.connections) >= server.connections_max:
            transport.write(_REFUSED_CONNECTION)
            transport.close()
            self._force_close = True
            return
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        was_in_body = not self._last_body.is_eof()
        super().data_received(data)
        if self._messages:
            message, body = self._messages[-1]
            if type(message) is _ErrInfo:  # aiohttp would let the reader of the body before it wait for ever
                self._cut_body("the body is not chunked as HTTP asks")
            else:
                self._last_body = body
        if self._request_count != self._seen_requests:
            self._seen_requests, self._head_bytes = self._request_count, 0
        elif not was_in_body:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX and not self._close:
                self._refuse_head()

    def _refuse_head(self) -> None:
        """aiohttp bounds each header field and their number; the product would be megabytes for each connection."""
        self._messages.append((_ErrInfo(status=400, exc=ValueError(), message=_HEAD_TOO_LARGE), EMPTY_PAYLOAD))
        self._close = True  # nothing more is parsed, and nothing is answered after this
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own contract: True keeps our side open
        """A client that half-closes (`nc -N`) gets its answers; a body that it cut short is refused."""
        if self._is_idle():
            return False
        self.half_closed = True
        self._cut_body("the body ended early: nothing of it was stored")
        self._close_when_idle()
        return True

    def _cut_body(self, detail: str) -> None:
        if not self._last_body.is_eof():
            self._last_body.set_exception(BadRequest(detail))
            self._last_body.feed_eof()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Not for a body that was cut while aiohttp threw the rest of it away: its request was answered before."""
        if not isinstance(kw.get("exc_info"), BadRequest):
            super().log_exception(*args, **kw)

    def _is_idle(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _close_when_idle(self) -> None:
        if self._is_idle():
            self.force_close()
        elif self.transport is not None:
            self._loop.call_later(_HALF_CLOSED_POLL_S, self._close_when_idle)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """aiohttp's own errors (an unreadable request, an exception in a handler) as problem documents."""
        response = problem_response(_error_of(status, exc, message, self.max_line_size))
        response.keep_alive = False
        gone = isinstance(exc, ConnectionError) and self.transport is None  # nobody is left to be answered
        if status >= 500 and not gone:
            self.log_exception("a request failed: %s %s", request.method, ascii(request.raw_path), exc_info=exc)
        if request.writer.output_size > len(CONTINUE):
            raise ConnectionResetError("the answer had begun: all that is left is to break it off")
        return cast(web.StreamResponse, response)


def _error_of(status: int, exc: BaseException | None, message: str | None, line_bytes_max: int) -> KvError:
    text = (message or str(exc or "")).split("\n", 1)[0].rstrip(":")
    if status < 500:
        if isinstance(exc, LineTooLong):
            if exc.args[1] == line_bytes_max:
                return UriTooLong("the request line is too long", bytes_max=line_bytes_max)
            return HeadersTooLarge("a header is too long", bytes_max=exc.args[1])
        if text == _HEAD_TOO_LARGE:
            return HeadersTooLarge(f"the header is over {HEAD_BYTES_MAX} bytes", bytes_max=HEAD_BYTES_MAX)
        if text.startswith("Too many headers"):
            return HeadersTooLarge("there are too many header fields")
        if isinstance(exc, InvalidURLError):
            return BadRequest("the request line holds bytes that must be percent-encoded")
        return BadRequest(f"this is not HTTP as expected: {text}")
    return KvError("the router failed to handle this request; its log says why")


_REFUSED_CONNECTION = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
)
_refused = msgspec.json.encode(
    {
        "type": "/problems/unavailable",
        "code": "unavailable",
        "title": "Too many connections",
        "status": 503,
        "detail": "the router has as many connections as it takes",
        "next_step": "Use fewer connections and keep them open, or wait for retry_after_ms.",
        "retry_after_ms": 1000,
    }
)
_REFUSED_CONNECTION = _REFUSED_CONNECTION % (len(_refused), _refused)


class Server(web.Server):
    """A `web.Server` with our limits and our errors."""

    def __init__(self, handler: Handler, limits: Limits, answers: AnswerAccount | None = None) -> None:
        """`answers`: the account of the process, if its handler reserves room on it, too."""
        self.answers = answers or AnswerAccount(limits)
        super().__init__(
            cast(Any, handler),
            access_log=None,
            auto_decompress=False,
            handler_cancellation=False,
            keepalive_timeout=limits.keepalive_timeout_s,
            lingering_time=2.0,
            max_line_size=limits.request_line_bytes_max,
            # aiohttp's LineTooLong tells a request line from a header by nothing but the limit that was passed
            max_field_size=limits.header_bytes_max + (limits.header_bytes_max == limits.request_line_bytes_max),
        )
        self.connections_max = connections_that_fit(limits.connections_max)

    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


async def start_server(server: Server, host: str, port: int) -> web.ServerRunner:
    """Serve at the address until the runner's `cleanup`. Raises OSError when the port is taken."""
    runner = web.ServerRunner(server, shutdown_timeout=5.0)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1024).start()
    return runner
