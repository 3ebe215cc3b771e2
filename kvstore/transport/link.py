"""The link to a node: one WebSocket for all stores that are asked there, and what a lost connection means.

Owns: identities of operations, bounds, connecting and reconnecting, the fate of what is under way.
Promises: see `channel`, whose other half this is. An operation reaches the store that its channel names, and no other:
the hello names one of them, and before a message for another one goes a message that says so (`ForStore`), on the
same connection and in the same order. Where one store is asked alone that costs nothing.
Leaves to others: what the operations mean (`shard.service`), which shard to ask (`router.service`), frames (`outbox`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import Any, Protocol

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.errors import KvError, OtherProtocol, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.message_sizes import message_bytes
from kvstore.protocol import WRITES, Acquire, Answer, ForStore, Get, Names, Request, Scan, decode_replies
from kvstore.transport.outbox import Outbox
from kvstore.transport.sessions import ADOPT, IS_STRANGER, PARAMETER, ClusterSession
from kvstore.transport.versions import refused_by

log = logging.getLogger(__name__)

_SWEEP_S = 0.25
_FIRST_PAUSE_S = 0.01
_OUTAGE_TOLD_S = 5.0  # of a shard, in the log; shorter ones belong to every restart
_GET_BYTES = 64
_MEAN_SHIFT = 3  # each value counts for an eighth of the mean


class Addressee(Protocol):
    """A channel, as its link sees it. `store_id` empty: whichever store the node serves under that shard's id."""

    shard_id: str
    store_id: str
    answered: bool


class _Pending(msgspec.Struct, frozen=True):
    future: asyncio.Future[Any]
    is_write: bool
    size: int
    deadline_s: float
    channel: Addressee


class _Outage:
    """Log lines on a shard that cannot be reached.
    One says that and why, another one that it can be reached again; none comes at every try."""

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
        if (refused := refused_by(self._url, getattr(error, "headers", None))) is not None:
            self._say_other_protocol(refused)
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

    def _say_other_protocol(self, refused: OtherProtocol) -> None:
        if refused.detail != self._told:
            self._told = refused.detail
            log.error("shard %s cannot be asked: %s", self._shard_id, refused.sentences)

    def is_over(self) -> None:
        if self._told:
            log.info("shard %s at %s is reached again", self._shard_id, self._url)
        self._began_s, self._told = None, ""


class NodeLink:
    """Connects when its first channel is there, and stays connected until the last one is gone."""

    def __init__(self, url: str, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession) -> None:
        self.url = url
        self.connected = False
        self.bytes_under_way = 0
        self._mean_value_bytes = 0
        self._strike = 0
        self._limits = limits
        self._session = session
        self._cluster = cluster
        self._loop = asyncio.get_running_loop()
        self._channels: list[Addressee] = []
        self._failures = 0  # in a row, to connect
        self._try_now = asyncio.Event()
        self._addressed: Addressee | None = None  # whose store the node takes the next message for
        self._pending: dict[int, _Pending] = {}
        self._sent_up_to = 0
        self._next_id = 0
        self._heard_s = 0.0
        self._outbox = Outbox(limits.frame_bytes_max)
        self._tasks: list[asyncio.Task[None]] = []
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def attach(self, channel: Addressee) -> None:
        """One more store is asked by this link. If it is not connected, it tries again at once."""
        self._channels.append(channel)
        self._try_now.set()
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._sweep())]

    async def detach(self, channel: Addressee) -> None:
        """That store is not asked any more; what waits for it gets an error. The last one ends the link."""
        if channel not in self._channels:
            return
        if self._channels == [channel]:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._channels.clear()
            return
        self._channels.remove(channel)
        theirs = [op_id for op_id, waiting in self._pending.items() if waiting.channel is channel]
        for op_id in theirs:
            waiting = self._take(op_id)
            self._fail(op_id, waiting, "is not asked any more")
        self._outbox.drop(set(theirs))

    def has_only(self, channel: Addressee) -> bool:
        """No other channel is asked by this link."""
        return self._channels == [channel]

    def name_strike(self, strike: int) -> None:
        """What is asked from now on is asked by a map whose last strike is that one."""
        if strike != self._strike:
            self._strike = strike
            if self.connected:
                self._put_strike()

    def _put_strike(self) -> None:
        self._next_id += 1
        self._outbox.put(Names(self._next_id, self._strike))

    def _address(self, channel: Addressee) -> None:
        self._next_id += 1
        self._outbox.put(ForStore(self._next_id, channel.store_id))
        self._addressed = channel

    def ops_under_way(self, channel: Addressee) -> int:
        """How many of that channel wait for their answers."""
        if len(self._channels) == 1:
            return len(self._pending)
        return sum(waiting.channel is channel for waiting in self._pending.values())

    def request(self, channel: Addressee, request: Request, at_leisure: bool) -> asyncio.Future[Any]:
        """See `Channel.request`."""
        if not self.connected:
            raise _unavailable(channel, "is not connected")
        kind, limits, pending = type(request), self._limits, self._pending
        sent = size = message_bytes(request)
        if kind is Get:
            size = _GET_BYTES + self._mean_value_bytes
        elif kind is Scan:
            size += self._page_bytes(request)
        under_way = self.bytes_under_way + size
        if len(pending) >= limits.channel_ops_max or under_way > limits.channel_bytes_max:
            raise TooManyRequests(f"too many operations wait for shard {channel.shard_id}", retry_after_ms=100)
        if channel is not self._addressed:
            self._address(channel)
        self._next_id = request.id = op_id = self._next_id + 1
        future = self._loop.create_future()
        wait_s = limits.request_timeout_s if kind is not Acquire else _waits_s(request) + limits.request_timeout_s
        pending[op_id] = _Pending(future, kind in WRITES, size, self._loop.time() + wait_s, channel)
        self.bytes_under_way = under_way
        if at_leisure:
            self._outbox.put_at_leisure(request, sent)
        else:
            self._outbox.put(request, sent)
        return future

    def _page_bytes(self, scan: Any) -> int:
        """What its answer may bring."""
        if not scan.values:
            return 0
        limits = self._limits
        item_bytes_max = (scan.value_bytes_max or limits.value_bytes_max) + limits.key_bytes_max
        return int(min(scan.limit * item_bytes_max, scan.bytes_max or limits.page_bytes_max))

    async def flushed(self) -> None:
        """All that was asked for until now has left, or the connection has ended. For failpoints."""
        last = self._next_id
        while self.connected and self._sent_up_to < last:  # noqa: ASYNC110 (an event would cost on every frame)
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)

    async def _stay_connected(self) -> None:
        wait_s = _FIRST_PAUSE_S
        outage = _Outage(self._channels[0].shard_id, self.url)
        while True:
            self._try_now.clear()
            try:
                async with await self._connect() as socket:
                    wait_s, self._failures = _FIRST_PAUSE_S, 0
                    outage.is_over()
                    await self._serve(socket)
            except msgspec.DecodeError as error:
                log.error("shard %s sent a frame that is none: %s", self._channels[0].shard_id, error)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                outage.goes_on(error, self._loop.time())
            self._failures += 1
            wait_s = await self._pause(wait_s)

    async def _pause(self, wait_s: float) -> float:
        """Wait before the next try to connect, unless there is news of the node.
        How long to wait after that one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._try_now.wait()
                self._failures = 0
                return _FIRST_PAUSE_S
        return min(wait_s * 2, self._limits.reconnect_wait_s_max)

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        # The newest first, and another one after each failure: a node refuses a hello for a store that it has not, such
        # as that of a shard which was at this address before it left.
        self._addressed = first = self._channels[-1 - self._failures % len(self._channels)]
        async with asyncio.timeout(self._limits.request_timeout_s):
            return await self._session.ws_connect(
                f"{self.url}/channel?shard={first.shard_id}&store={first.store_id}&{PARAMETER}={self._cluster.id}",
                max_msg_size=self._limits.frame_read_bytes_max,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
            )

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._outbox = Outbox(self._limits.frame_bytes_max)
        self._heard_s = self._loop.time()
        if self._strike:
            self._put_strike()  # before anything else that leaves by this connection
        self.connected = True
        sender = asyncio.create_task(self._outbox.run(socket, self._note_sent))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    log.error("the connection to shard %s ends: %s", self._channels[0].shard_id, message.data)
                    break
                self._heard_s = self._loop.time()
                for reply in decode_replies(message.data):
                    pending = self._pending.pop(reply.id, None)
                    if pending is not None:
                        self.bytes_under_way -= pending.size
                        pending.channel.answered = True
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

    def _take(self, op_id: int) -> _Pending:
        waiting = self._pending.pop(op_id)
        self.bytes_under_way -= waiting.size
        return waiting

    def _fail(self, op_id: int, waiting: _Pending, what: str) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(self._lost(op_id, waiting, what))
            waiting.future.exception()  # looked at once here, else asyncio complains of those that are never awaited

    def _lost(self, op_id: int, waiting: _Pending, what: str) -> KvError:
        if waiting.is_write and op_id <= self._sent_up_to:
            return OutcomeUnknown(f"shard {waiting.channel.shard_id} {what} before it answered")
        return _unavailable(waiting.channel, what)

    async def _sweep(self) -> None:
        """Time out what waits too long. After a pause of this process, read first what has come during it."""
        was_late = False
        while True:
            due_s = self._loop.time() + _SWEEP_S
            await asyncio.sleep(_SWEEP_S)
            now = self._loop.time()
            was_late = now > due_s + _SWEEP_S and not was_late
            if not was_late:
                await self._time_out(now)

    async def _time_out(self, now: float) -> None:
        timed_out = [item for item in self._pending.items() if item[1].deadline_s <= now]
        for op_id, _ in timed_out:
            self._fail(op_id, self._take(op_id), "did not answer in time")
        if timed_out:  # who was told that nothing was done must not see it done later
            self._outbox.drop({op_id for op_id, _ in timed_out})
        silent_s = now - self._heard_s
        if timed_out and silent_s > self._limits.request_timeout_s and self._socket is not None:
            log.warning("shard %s has been silent for %.1f s: reconnecting", self._channels[0].shard_id, silent_s)
            await self._abort(self._socket)

    async def _abort(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """End a connection whose other end does not listen: without a closing handshake."""
        transport = socket._response.connection and socket._response.connection.transport
        if transport is not None:
            transport.abort()


def _waits_s(acquire: Any) -> float:
    """For how long its client waits for the lock."""
    return float(acquire.wait_ms / 1000)


def _unavailable(channel: Addressee, what: str) -> Unavailable:
    return Unavailable(f"shard {channel.shard_id} {what}", shard=channel.shard_id, retry_after_ms=1000)


class Links:
    """The links of a process: all channels to one address share one."""

    def __init__(self, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession | None = None) -> None:
        self._limits = limits
        self._session = session
        self._cluster = cluster or ClusterSession()
        self._links: dict[str, NodeLink] = {}

    def attach(self, channel: Addressee, url: str) -> NodeLink:
        """The link to that address, which from now on serves this channel, too."""
        link = self._links.get(url)
        if link is None:
            link = self._links[url] = NodeLink(url, self._limits, self._session, self._cluster)
        link.attach(channel)
        return link

    async def detach(self, channel: Addressee, link: NodeLink) -> None:
        """It does not any more, and ends with its last channel."""
        if link.has_only(channel) and self._links.get(link.url) is link:
            del self._links[link.url]  # before it ends, which takes a moment: who comes then gets another one
        await link.detach(channel)
