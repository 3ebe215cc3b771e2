"""The channel between a router and a shard: one WebSocket, many operations to a frame, an answer to each as it is done.

Owns: identities of operations, batching into frames, bounds, reconnecting, and what a lost connection means.
Promises:
  - What is asked within three turns of the loop, or while the frame before is still being taken in by the socket,
    leaves in one frame. No timer is involved: frames fill by themselves under load and shrink when idle. What nobody
    waits for (the finishes of transactions) goes with the next frame, which comes at once under load, and after 2 ms
    else.
  - Every operation gets exactly one outcome: its answer, or an error that says whether it may have been executed.
    Nothing is ever sent twice.
  - Operations and bytes under way are bounded; past the bound `TooManyRequests`, at once.
  - A shard does not begin an operation whose connection has ended (`Connection.closed`).
Leaves to others: what the operations mean (`shard.service`), which shard to ask (`router.service`).

A lost connection means for an operation that never left: `Unavailable`, nothing was done. For a read that left: the
same. For a write that left: `OutcomeUnknown`. The same holds for one that was not answered within
`request_timeout_s`; a shard that let a request time out and has sent nothing at all in that time (it hangs, or the
network swallows frames) loses its connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.protocol import (
    WRITES,
    Acquire,
    Names,
    Reply,
    Request,
    decode_replies,
    decode_requests,
    encode_frame,
    message_bytes,
)

log = logging.getLogger(__name__)

_SWEEP_S = 0.25
_GATHER_TURNS = 3  # of the loop before a frame is taken: what else it has in hand comes along, for fuller frames
_LEISURE_S = 0.002


class _Outbox:
    """Messages on their way out. `run` sends them, as many to a frame as have gathered, until cancelled."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._messages: list[Any] = []
        self._frame_bytes_max = frame_bytes_max
        self._wake: asyncio.Future[None] | None = None
        self._is_due = False
        self._has_timer = False

    def put(self, message: Any) -> None:
        self._messages.append(message)
        self._set_out()

    def put_at_leisure(self, message: Any) -> None:
        """It leaves with the next message that is put, at the latest after `_LEISURE_S`."""
        self._messages.append(message)
        if not self._has_timer:
            self._has_timer = True
            asyncio.get_running_loop().call_later(_LEISURE_S, self._on_timer)

    def _on_timer(self) -> None:
        self._has_timer = False
        if self._messages:
            self._set_out()

    def _set_out(self) -> None:
        self._is_due = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def drop(self, ids: set[int]) -> None:
        """Take back messages that have not left."""
        self._messages = [message for message in self._messages if message.id not in ids]

    async def run(self, socket: Any, on_sent: Callable[[list[Any]], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._is_due:
                self._wake = loop.create_future()
                await self._wake
                self._wake = None
            for _ in range(_GATHER_TURNS):
                await asyncio.sleep(0)
            messages = self._take_frame()
            if not messages:
                continue
            if on_sent is not None:
                on_sent(messages)
            await socket.send_bytes(encode_frame(messages))

    def _take_frame(self) -> list[Any]:
        size = 0
        for count, message in enumerate(self._messages, start=1):
            size += message_bytes(message)
            if size >= self._frame_bytes_max:
                messages, self._messages = self._messages[:count], self._messages[count:]
                return messages
        messages, self._messages, self._is_due = self._messages, [], False
        return messages


class Connection:
    """The shard's end. `send` queues an answer; `closed` turns True when the router is gone."""

    def __init__(self, limits: Limits) -> None:
        self.closed = False
        self.strike = 0  # the last one that the other end follows
        self._outbox = _Outbox(limits.frame_bytes_max)

    def send(self, reply: Reply) -> None:
        if not self.closed:
            self._outbox.put(reply)

    async def serve(self, socket: web.WebSocketResponse, handle: Callable[[Request, Connection], None]) -> None:
        """Pass each request to `handle` until the router leaves."""
        sender = asyncio.create_task(self._outbox.run(socket))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                for request in decode_requests(message.data):
                    if isinstance(request, Names):
                        self.strike = request.strike
                    else:
                        handle(request, self)
        except msgspec.DecodeError as error:
            log.error("a router sent a frame that is none: %s", error)
        finally:
            self.closed = True
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            await socket.close()


class _Pending(NamedTuple):
    future: asyncio.Future[Any]
    is_write: bool
    size: int
    deadline_s: float


class Channel:
    """The router's end: connects, stays connected, and brings each request its answer."""

    def __init__(
        self, shard_id: str, url: str, limits: Limits, session: aiohttp.ClientSession, store_id: str = ""
    ) -> None:
        """`store_id`: the shard refuses the connection unless it serves that very file; empty: whichever it serves."""
        self.shard_id = shard_id
        self.url = url
        self.store_id = store_id
        self.connected = False
        self.answered = False
        self.bytes_under_way = 0
        self._strike = 0
        self._limits = limits
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, _Pending] = {}
        self._sent_up_to = 0
        self._next_id = 0
        self._heard_s = 0.0
        self._outbox = _Outbox(limits.frame_bytes_max)
        self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._sweep())]
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def name_strike(self, strike: int) -> None:
        """What is asked from now on is asked by a map whose last strike is that one."""
        if strike != self._strike:
            self._strike = strike
            if self.connected:
                self._put_strike()

    def _put_strike(self) -> None:
        self._next_id += 1
        self._outbox.put(Names(self._next_id, self._strike))

    @property
    def ops_under_way(self) -> int:
        return len(self._pending)

    async def close(self) -> None:
        """End the connection; whoever still waits gets an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def request(self, request: Request, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        """Send it, `at_leisure` with the next frame that leaves; the future brings the Reply. Its `id` is set here.

        Raises TooManyRequests and Unavailable at once; the future raises Unavailable or OutcomeUnknown.
        """
        if not self.connected:
            raise self._unavailable("is not connected")
        size = message_bytes(request)
        limits = self._limits
        if len(self._pending) >= limits.channel_ops_max or self.bytes_under_way + size > limits.channel_bytes_max:
            raise TooManyRequests(f"too many operations wait for shard {self.shard_id}", retry_after_ms=100)
        self._next_id += 1
        request.id = self._next_id
        future = self._loop.create_future()
        wait_s = request.wait_ms / 1000 if isinstance(request, Acquire) else 0.0
        deadline_s = self._loop.time() + wait_s + limits.request_timeout_s
        self._pending[request.id] = _Pending(future, isinstance(request, WRITES), size, deadline_s)
        self.bytes_under_way += size
        if at_leisure:
            self._outbox.put_at_leisure(request)
        else:
            self._outbox.put(request)
        return future

    async def flushed(self) -> None:
        """All that was asked for until now has left, or the connection has ended. For failpoints."""
        last = self._next_id
        while self.connected and self._sent_up_to < last:  # noqa: ASYNC110 (an event would cost on every frame)
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)

    async def _stay_connected(self) -> None:
        wait_s = 0.01
        while True:
            try:
                async with await self._connect() as socket:
                    wait_s = 0.01
                    await self._serve(socket)
            except msgspec.DecodeError as error:
                log.error("shard %s sent a frame that is none: %s", self.shard_id, error)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.debug("shard %s cannot be reached: %s", self.shard_id, error)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self._limits.reconnect_wait_s_max)

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        async with asyncio.timeout(self._limits.request_timeout_s):
            return await self._session.ws_connect(
                f"{self.url}/channel?shard={self.shard_id}&store={self.store_id}",
                max_msg_size=0,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
            )

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._outbox = _Outbox(self._limits.frame_bytes_max)
        self._heard_s = self._loop.time()
        if self._strike:
            self._put_strike()  # before anything else that leaves by this connection
        self.connected = True
        sender = asyncio.create_task(self._outbox.run(socket, self._note_sent))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                self._heard_s = self._loop.time()
                self.answered = True
                for reply in decode_replies(message.data):
                    pending = self._pending.pop(reply.id, None)
                    if pending is not None:
                        self.bytes_under_way -= pending.size
                        if not pending.future.done():
                            pending.future.set_result(reply)
        finally:
            self.connected = False
            self._socket = None
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            self._fail_pending()

    def _note_sent(self, messages: list[Any]) -> None:
        self._sent_up_to = messages[-1].id

    def _fail_pending(self) -> None:
        pending, self._pending, self.bytes_under_way = self._pending, {}, 0
        for op_id, waiting in pending.items():
            self._fail(op_id, waiting, "closed the connection")

    def _fail(self, op_id: int, waiting: _Pending, what: str) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(self._lost(op_id, waiting, what))
            waiting.future.exception()  # looked at once here, else asyncio complains of those that nobody awaits

    def _lost(self, op_id: int, waiting: _Pending, what: str) -> KvError:
        if waiting.is_write and op_id <= self._sent_up_to:
            return OutcomeUnknown(f"shard {self.shard_id} {what} before it answered")
        return self._unavailable(what)

    def _unavailable(self, what: str) -> Unavailable:
        return Unavailable(f"shard {self.shard_id} {what}", shard=self.shard_id, retry_after_ms=1000)

    async def _sweep(self) -> None:
        """Time out what waits too long."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self._loop.time()
            timed_out = [item for item in self._pending.items() if item[1].deadline_s <= now]
            for op_id, waiting in timed_out:
                del self._pending[op_id]
                self.bytes_under_way -= waiting.size
                self._fail(op_id, waiting, "did not answer in time")
            if timed_out:  # who was told that nothing was done must not see it done later
                self._outbox.drop({op_id for op_id, _ in timed_out})
            silent_s = now - self._heard_s
            if timed_out and silent_s > self._limits.request_timeout_s and self._socket is not None:
                log.warning("shard %s has been silent for %.1f s: reconnecting", self.shard_id, silent_s)
                await self._abort(self._socket)

    async def _abort(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """End a connection whose other end does not listen: without a closing handshake."""
        transport = socket._response.connection and socket._response.connection.transport
        if transport is not None:
            transport.abort()
