"""What the code of a process takes for aiohttp's session and WebSockets, over the simulated network.

Owns: `SimulatedSession` (channels dialled, questions asked over HTTP), `SimulatedSocket` (either end of a channel).
Promises: the same methods, results and kinds of errors as the real ones have, as far as `kvstore` uses them. A GET may
be asked twice, as aiohttp does when a kept connection breaks. While the network `doubles`, messages of transactions
which promise to do no harm come again, seconds later: no channel of today does that to them.
Leaves to others: what answers (`servers`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec

from kvstore.protocol import Abort, ApplyIntents, DecideCommit, Prepare, ResolveTxn, decode_requests, encode_frame
from loadtest.simulate.loop import Process
from loadtest.simulate.network import End, Network

_CHANNEL = "/channel"
_TWICE_SHARE = 0.02
_IDEMPOTENT = (Prepare, DecideCommit, ApplyIntents, Abort, ResolveTxn)


class Question(NamedTuple):
    """A request over HTTP between processes of the cluster."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes


class Channel(NamedTuple):
    """A WebSocket is asked for at that path."""

    path: str
    query: dict[str, str]


class _Close(NamedTuple):
    """The message that ends a WebSocket."""

    code: int


class SimulatedSocket:
    """As `aiohttp.ClientWebSocketResponse` and `web.WebSocketResponse`."""

    def __init__(self, end: End, network: Network | None = None) -> None:
        """`network`: where it may happen that messages come twice."""
        self._end = end
        self._network = network
        transport = SimpleNamespace(abort=end.abort)
        self._response = SimpleNamespace(connection=SimpleNamespace(transport=transport))

    async def __aenter__(self) -> SimulatedSocket:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        await self.close()

    def __aiter__(self) -> SimulatedSocket:
        return self

    async def __anext__(self) -> aiohttp.WSMessage:
        message = await self.receive()
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise StopAsyncIteration
        return message

    async def receive(self) -> aiohttp.WSMessage:
        data = await self._end.receive()
        if isinstance(data, _Close):
            return aiohttp.WSMessage(aiohttp.WSMsgType.CLOSE, data.code, None)
        return aiohttp.WSMessage(aiohttp.WSMsgType.CLOSED if data is None else aiohttp.WSMsgType.BINARY, data, None)

    async def send_bytes(self, data: bytes) -> None:
        await self._end.send(data)
        if self._network is not None and self._network.doubles:
            self._network.send_again(self._end, _may_come_twice(data))

    async def close(self, *, code: int = aiohttp.WSCloseCode.OK, **_: Any) -> None:
        self._end.close(_Close(code) if code != aiohttp.WSCloseCode.OK else None)


class _Content:
    def __init__(self, body: bytes) -> None:
        self._body = body

    async def iter_any(self) -> AsyncIterator[bytes]:
        yield self._body


class _Answer:
    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        self.content_type = "application/json" if status < 400 else "application/problem+json"
        self.content = _Content(body)
        self._body = body

    async def read(self) -> bytes:
        return self._body

    async def json(self, **_: Any) -> Any:
        return msgspec.json.decode(self._body)


class _Asking:
    """The context of a request, as aiohttp has it."""

    def __init__(self, session: SimulatedSession, host: str, question: Question, timeout_s: float | None) -> None:
        self._session = session
        self._host = host
        self._question = question
        self._timeout_s = timeout_s

    async def __aenter__(self) -> _Answer:
        async with asyncio.timeout(self._timeout_s):
            return await self._session.ask(self._host, self._question)

    async def __aexit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        return None


class SimulatedSession:
    """That of the process, which runs on that host."""

    def __init__(self, network: Network, rng: random.Random, host: str, process: Process) -> None:
        self._network = network
        self._rng = rng
        self._host = host
        self._process = process

    async def ws_connect(self, url: str, **_: Any) -> SimulatedSocket:
        """Raises OSError, aiohttp.ClientError if it is refused."""
        parts = urlsplit(url)
        end = await self._connect(parts.netloc, Channel(parts.path, _query_of(parts.query)))
        if await end.receive() != b"welcome":
            raise aiohttp.ClientConnectionError(f"{url} is refused")
        return SimulatedSocket(end, self._network if parts.path == _CHANNEL else None)

    def get(self, url: str, *, params: Mapping[str, str] | None = None, timeout: Any = None, **_: Any) -> _Asking:
        parts = urlsplit(url)
        question = Question("GET", parts.path, {**_query_of(parts.query), **(params or {})}, b"")
        return _Asking(self, parts.netloc, question, _total(timeout))

    def post(self, url: str, *, json: Any = None, data: bytes = b"", timeout: Any = None, **_: Any) -> _Asking:
        parts = urlsplit(url)
        body = data or msgspec.json.encode(json)
        question = Question("POST", parts.path, _query_of(parts.query), body)
        return _Asking(self, parts.netloc, question, _total(timeout))

    async def ask(self, host: str, question: Question) -> _Answer:
        """Raises OSError, aiohttp.ClientError."""
        twice = question.method == "GET" and self._rng.random() < _TWICE_SHARE
        for _ in range(1 + twice):
            end = await self._connect(host, question)
            answer = await end.receive()
            end.close()
        if answer is None:
            raise aiohttp.ServerDisconnectedError
        return _Answer(*answer)

    async def _connect(self, host: str, greeting: Any) -> End:
        try:
            return await self._network.connect(self._process, self._host, host, greeting)
        except OSError as error:
            raise aiohttp.ClientOSError(0, str(error)) from None


def _may_come_twice(frame: bytes) -> bytes:
    """Those messages of the frame that must do no harm when they come again, at any time."""
    messages = [each for each in decode_requests(frame) if isinstance(each, _IDEMPOTENT)]
    return encode_frame(messages) if messages else b""


def _query_of(query: str) -> dict[str, str]:
    return dict(each.split("=", 1) for each in query.split("&")) if query else {}


def _total(timeout: Any) -> float | None:
    return timeout.total if timeout is not None else None
