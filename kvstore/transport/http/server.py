"""The HTTP server of every process: lean on the way, with bounds and problem documents for what aiohttp does alone.

Owns: the bound on connections and on the bytes of a header; problem documents for aiohttp's own errors.
Promises: a request is begun once the client has taken the answers before it, but for a little, so that one that does
not read costs little memory (`transport.answers` has the sum), and little work.
Leaves to others: what is served (`routes`), the form of requests and answers (`requests`, `responses`).

aiohttp's low-level `web.Server` is used with three of its extension points: the request handler class (errors, bound
on connections), the request factory and the response protocol (`prepare`, `write_eof`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import InvalidURLError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from kvstore.addresses import is_loopback
from kvstore.config import Limits
from kvstore.errors import BadRequest, HeadersTooLarge, KvError, UriTooLong
from kvstore.transport.answers import SMALL_BYTES, AnswerAccount
from kvstore.transport.http.responses import problem_response
from kvstore.transport.open_files import connections_that_fit

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 131_072
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_HALF_CLOSED_POLL_S = 0.02
_UNSENT_BYTES = 2 * SMALL_BYTES
_UNBOUND = (1 << 31) - 1
_HEAD_TOO_LARGE = "The header as a whole is too large"

Handler = Callable[[web.BaseRequest], Awaitable[Any]]


class _InlineRequests:
    """The event loop as a connection sees it.
    What is to run as a task of its own is awaited as it is.

    Before Python 3.12, aiohttp makes a task of each request and awaits it at once, which takes two more turns of the
    loop. It does so that no request sees the context variables of the one before it, and there are none here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.create_future = loop.create_future
        self.time = loop.time
        self.call_at, self.call_later = loop.call_at, loop.call_later

    def create_task(self, request: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        return request


class _Protocol(RequestHandler):
    __slots__ = ("_head_bytes", "_last_body", "_seen_requests", "answers", "half_closed")

    def connection_made(self, transport: Any) -> None:
        self._last_body: StreamReader = EMPTY_PAYLOAD
        self.half_closed = False
        self._seen_requests = self._head_bytes = 0
        server = cast(Server, self._manager)
        self.answers = server.answers
        transport.set_write_buffer_limits(high=SMALL_BYTES)  # beyond, `_paused` is set until it is a quarter of that
        _bound_unsent(transport, _UNSENT_BYTES)
        if len(server.connections) >= server.connections_max:
            transport.write(_REFUSED_CONNECTION)
            transport.close()
            self._force_close = True
            return
        super().connection_made(transport)
        self._loop = cast(asyncio.AbstractEventLoop, _InlineRequests(self._loop))  # from now on there are only requests

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp calls this for each body that is taken, and parses again: only what has paused has anything left."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def data_received(self, data: bytes) -> None:
        if self._payload_parser is not None:  # a WebSocket: no request follows on this connection
            super().data_received(data)
            return
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

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own contract: True keeps this side open
        """A client that half-closes (`nc -N`) gets its answers; a body that it cut short is refused."""
        if self._payload_parser is not None or self._is_idle():
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
        gone = isinstance(exc, ConnectionError) and self.transport is None  # no client is left to be answered
        if status >= 500 and not gone:
            self.log_exception("a request failed: %s %s", request.method, ascii(request.raw_path), exc_info=exc)
        if request.writer.output_size > len(CONTINUE):
            raise ConnectionResetError("the answer had begun: all that is left is to break it off")
        return cast(web.StreamResponse, response)


def _bound_unsent(transport: Any, size: int) -> None:
    """How much the system keeps for a client that does not read, which else is megabytes: as many small answers."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, AttributeError):  # another system has no such bound
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)


def _error_of(status: int, exc: BaseException | None, message: str | None, line_bytes_max: int) -> KvError:
    text = (message or str(exc or "")).split("\n", 1)[0].rstrip(":")
    if status < 500:
        if isinstance(exc, LineTooLong):
            if exc.args[1] == line_bytes_max:
                return UriTooLong("the request line is too long.", bytes_max=line_bytes_max)
            return HeadersTooLarge("a header is too long.", bytes_max=exc.args[1])
        if text == _HEAD_TOO_LARGE:
            return HeadersTooLarge(f"the header is over {HEAD_BYTES_MAX} bytes.", bytes_max=HEAD_BYTES_MAX)
        if text.startswith("Too many headers"):
            return HeadersTooLarge("there are too many header fields.")
        if isinstance(exc, InvalidURLError):
            return BadRequest("the request line holds bytes that must be percent-encoded.")
        return BadRequest(f"this is not HTTP as expected: {text}.")
    return KvError("the process failed to handle this request; its log says why.")


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
        "detail": "the process has as many connections as it takes.",
        "next_step": "Use fewer connections and keep them open, or wait for retry_after_ms.",
        "retry_after_ms": 1000,
    }
)
_REFUSED_CONNECTION = _REFUSED_CONNECTION % (len(_refused), _refused)


class Server(web.Server):
    """A `web.Server` with the limits and errors of this project."""

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


async def accept_socket(
    request: web.BaseRequest, frame_bytes_max: int, close_timeout_s: float = 10.0
) -> web.WebSocketResponse:
    """Make the connection of the request a WebSocket, whose writer waits by asyncio's bounds, not by ours.

    Raises BadRequest if that is not what the client asks for, ConnectionError if it has left.
    """
    socket = web.WebSocketResponse(compress=False, max_msg_size=frame_bytes_max, timeout=close_timeout_s)
    if request.transport is not None:
        request.transport.set_write_buffer_limits()
        _bound_unsent(request.transport, _UNBOUND)
    try:
        await socket.prepare(request)
    except web.HTTPException:
        raise BadRequest("this call opens a WebSocket: the request must ask for one as RFC 6455 says.") from None
    return socket


async def start_server(server: Server, host: str, port: int, shutdown_timeout_s: float = 5.0) -> web.ServerRunner:
    """Serve at the address until the runner's `cleanup`. Raises OSError when the port is taken."""
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_timeout_s)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


async def stop_listening(runner: web.ServerRunner) -> None:
    """Take no more connections; those that are open go on until the runner's `cleanup`."""
    for site in list(runner.sites):
        await site.stop()


def warn_if_exposed(listen: str, what_can_be_done: str) -> None:
    """Say so in the log when `listen` (HOST:PORT) is more than this machine's own business. Raises ConfigError."""
    if not is_loopback(listen):
        log.warning("every process that reaches %s can %s: there are no accounts yet", listen, what_can_be_done)
