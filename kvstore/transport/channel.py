"""The channel between a router and a shard: one WebSocket, many operations to a frame, an answer to each as it is done.

Owns: identities of operations, batching into frames, bounds, reconnecting, and what a lost connection means.
Promises:
  - What is asked within three turns of the loop, or while the frame before is still being taken in by the socket,
    leaves in one frame. No timer is involved: frames fill by themselves under load and shrink when idle. What nobody
    waits for (the finishes of transactions) goes with the next frame, which comes at once under load, and after 2 ms
    else.
  - Every operation gets exactly one outcome: its answer, or an error that says whether it may have been executed.
    Nothing is ever sent twice.
  - Operations and bytes under way are bounded; past the bound `TooManyRequests`, at once. What a read may bring counts,
    too: a get for the mean of the values that gets brought lately, a page of values for the bytes that it may have.
  - A frame is bounded at both ends: one that is larger than any message can be is not read, and ends the connection.
  - A shard begins no request while its answers, of more than `channel_bytes_max`, wait for the router to take them.
  - A shard does not begin an operation whose connection has ended (`Connection.closed`).
Leaves to others: what the operations mean (`shard.service`), which shard to ask (`router.service`).

A lost connection means for an operation that never left: `Unavailable`, nothing was done. For a read that left: the
same. For a write that left: `OutcomeUnknown`. The same holds for one that was not answered within
`request_timeout_s`; a shard that let a request time out and has sent nothing at all in that time (it hangs, or the
network swallows frames) loses its connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.protocol import (
    WRITES,
    Acquire,
    Answer,
    Get,
    Names,
    Reply,
    Request,
    Scan,
    decode_replies,
    decode_requests,
    encode_frame,
    message_bytes,
)
from kvstore.transport.frames import decode_apart
from kvstore.transport.sessions import ADOPT, IS_STRANGER, PARAMETER, ClusterSession

log = logging.getLogger(__name__)

_SWEEP_S = 0.25
_GATHER_TURNS = 3  # of the loop before a frame is taken: what else it has in hand comes along, for fuller frames
_LEISURE_S = 0.002
_OUTAGE_TOLD_S = 5.0  # of a shard, in the log; shorter ones belong to every restart
_FEW = 16  # messages that are not worth counting the bytes of
_GET_BYTES = 64
_MEAN_SHIFT = 3  # each value counts for an eighth of the mean


class _Outbox:
    """Messages on their way out. `run` sends them, as many to a frame as have gathered, until cancelled."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._messages: list[Any] = []
        self._frame_bytes_max = frame_bytes_max
        self._wake: asyncio.Future[None] | None = None
        self._is_due = False
        self._has_timer = False
        self._ended = False
        self._taken: asyncio.Event | None = None

    async def room_for_more(self, bytes_max: int) -> None:
        """While more than `bytes_max` wait for the other end to take them: until it has taken some, or has left."""
        while len(self._messages) > _FEW and not self._ended and sum(map(message_bytes, self._messages)) > bytes_max:
            self._taken = asyncio.Event()
            await self._taken.wait()

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
        try:
            while True:
                await self._send_frame(socket, on_sent)
                self._note_taken()
        finally:
            self._ended = True
            self._note_taken()

    def _note_taken(self) -> None:
        if self._taken is not None:
            self._taken.set()
            self._taken = None

    async def _send_frame(self, socket: Any, on_sent: Callable[[list[Any]], None] | None) -> None:
        while not self._is_due:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
            self._wake = None
        for _ in range(_GATHER_TURNS):
            await asyncio.sleep(0)
        messages = self._take_frame()
        if messages:
            if on_sent is not None:
                on_sent(messages)
            for frame in self._frames(messages):
                await socket.send_bytes(frame)

    def _frames(self, messages: list[Any]) -> Iterator[bytes]:
        """One, as a rule; what counts little but is large (many long keys) goes in halves that the far end reads."""
        frame = encode_frame(messages)
        if len(frame) <= 2 * self._frame_bytes_max or len(messages) == 1:
            yield frame
        else:
            half = len(messages) // 2
            yield from self._frames(messages[:half])
            yield from self._frames(messages[half:])

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
        self._bytes_max = limits.channel_bytes_max

    def send(self, reply: Reply) -> None:
        if not self.closed:
            self._outbox.put(reply)

    async def serve(self, socket: web.WebSocketResponse, handle: Callable[[Request, Connection], None]) -> None:
        """Pass each request to `handle` until the router leaves."""
        sender = asyncio.create_task(self._outbox.run(socket))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    log.error("a router's connection ends: %s", message.data)  # too large a frame, for example
                    break
                for request in self._requests(message.data):
                    if isinstance(request, Names):
                        self.strike = request.strike
                    else:
                        handle(request, self)
                await self._outbox.room_for_more(self._bytes_max)
        except msgspec.DecodeError as error:
            log.error("a router sent a frame that is none: %s", error)
        finally:
            self.closed = True
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            await socket.close()

    def _requests(self, frame: bytes) -> list[Request]:
        """Those of the frame; what is none is refused by itself. Raises msgspec.DecodeError if all of it is none."""
        try:
            return decode_requests(frame)
        except msgspec.DecodeError as error:
            requests, refusals = decode_apart(frame)
            log.error("a router sent a message that is none: %s", error)
            for refusal in refusals:
                self.send(refusal)
            return requests


class _Pending(NamedTuple):
    future: asyncio.Future[Any]
    is_write: bool
    size: int
    deadline_s: float


class _Outage:
    """Says once in the log, and not at every try, that a shard cannot be reached, why, and when it can be again."""

    def __init__(self, shard_id: str, url: str) -> None:
        self._shard_id = shard_id
        self._url = url
        self._began_s: float | None = None
        self._told = ""

    def goes_on(self, error: Exception, now_s: float) -> None:
        self._began_s = now_s if self._began_s is None else self._began_s
        if getattr(error, "status", None) == IS_STRANGER:
            self._say_stranger()
            return
        reason = str(error) or type(error).__name__
        is_own_fault = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        if reason != self._told and (is_own_fault or now_s - self._began_s >= _OUTAGE_TOLD_S):
            self._told = reason
            mend = "; raise the limit of open files (ulimit -Hn, LimitNOFILE=)" if is_own_fault else ""
            log.warning("shard %s at %s cannot be reached: %s%s", self._shard_id, self._url, reason, mend)

    def _say_stranger(self) -> None:
        reason = "it belongs to another cluster"
        if reason != self._told:
            self._told = reason
            log.error(
                "shard %s at %s belongs to another cluster with the same ids, and is left alone: one of the two runs "
                "on a copy of a data directory; %s",
                self._shard_id,
                self._url,
                ADOPT,
            )

    def is_over(self) -> None:
        if self._told:
            log.info("shard %s at %s is reached again", self._shard_id, self._url)
        self._began_s, self._told = None, ""


class Channel:
    """The router's end: connects, stays connected, and brings each request its answer."""

    def __init__(
        self,
        shard_id: str,
        url: str,
        limits: Limits,
        session: aiohttp.ClientSession,
        store_id: str = "",
        cluster: ClusterSession | None = None,
    ) -> None:
        """`store_id`: the shard refuses the connection unless it serves that very file; empty: whichever it serves.

        `cluster`: it refuses it, too, unless it belongs to the session that this process is in.
        """
        self.shard_id = shard_id
        self.url = url
        self.store_id = store_id
        self.connected = False
        self.answered = False
        self.bytes_under_way = 0
        self._mean_value_bytes = 0
        self._strike = 0
        self._limits = limits
        self._session = session
        self._cluster = cluster or ClusterSession()
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
        limits = self._limits
        if type(request) is Get:
            size = _GET_BYTES + self._mean_value_bytes
        else:
            size = message_bytes(request)
            if type(request) is Scan and request.values:
                item_bytes_max = limits.value_bytes_max + limits.key_bytes_max
                size += min(request.limit * item_bytes_max, request.bytes_max or limits.page_bytes_max)
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
        outage = _Outage(self.shard_id, self.url)
        while True:
            try:
                async with await self._connect() as socket:
                    wait_s = 0.01
                    outage.is_over()
                    await self._serve(socket)
            except msgspec.DecodeError as error:
                log.error("shard %s sent a frame that is none: %s", self.shard_id, error)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                outage.goes_on(error, self._loop.time())
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self._limits.reconnect_wait_s_max)

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        async with asyncio.timeout(self._limits.request_timeout_s):
            return await self._session.ws_connect(
                f"{self.url}/channel?shard={self.shard_id}&store={self.store_id}&{PARAMETER}={self._cluster.id}",
                max_msg_size=self._limits.frame_read_bytes_max,
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
                    log.error("the connection to shard %s ends: %s", self.shard_id, message.data)
                    break
                self._heard_s = self._loop.time()
                self.answered = True
                for reply in decode_replies(message.data):
                    pending = self._pending.pop(reply.id, None)
                    if pending is not None:
                        self.bytes_under_way -= pending.size
                        if type(reply) is Answer and reply.value is not None:
                            self._mean_value_bytes += (len(reply.value) - self._mean_value_bytes) >> _MEAN_SHIFT
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
