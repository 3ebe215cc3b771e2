"""The link to a node: one WebSocket for all stores that are asked there, and what a lost connection means.

Owns: identities of operations, bounds, time-outs, which store the node takes the next message for.
Promises: see `channel`, whose other half this is. An operation reaches the store that its channel names, and no other:
the hello names one of them, and before a message for another one goes a message that says so (`ForStore`), on the
same connection and in the same order. Where one store is asked alone that costs nothing.
Leaves to others: what the operations mean (`shard.service`), which shard to ask (`router.service`), frames (`outbox`),
reaching the node (`dialing`), the fate of what is under way (`under_way`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.errors import TooManyRequests
from kvstore.message_sizes import message_bytes
from kvstore.protocol import WRITES, Acquire, ForStore, Get, Names, Request, Scan, decode_replies
from kvstore.transport.dialing import Dialer, Outage
from kvstore.transport.outbox import Outbox
from kvstore.transport.sessions import ClusterSession
from kvstore.transport.under_way import GET_BYTES, SETTLED, Addressee, Pending, UnderWay, page_bytes, unavailable

log = logging.getLogger(__name__)

_SWEEP_S = 0.25
_CLOSES = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED)


class NodeLink:
    """Connects when its first channel is there, and stays connected until the last one is gone."""

    def __init__(self, url: str, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession) -> None:
        self.url = url
        self.connected = False
        self.under_way = UnderWay()
        self._strike = 0
        self._limits = limits
        self._dialer = Dialer(url, limits, session, cluster)
        self._loop = asyncio.get_running_loop()
        self._channels: list[Addressee] = []
        self._addressed: Addressee | None = None  # whose store the node takes the next message for
        self._next_id = 0
        self._heard_s = 0.0
        self._outbox = Outbox(limits.frame_bytes_max)
        self._tasks: list[asyncio.Task[None]] = []
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def attach(self, channel: Addressee) -> None:
        """One more store is asked by this link. If it is not connected, it tries again at once."""
        self._channels.append(channel)
        self._dialer.hurry()
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._sweep())]

    def hurry(self) -> None:
        """There is news of the node: if it is not connected, it is tried again at once."""
        if not self.connected:
            self._dialer.hurry()

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
        self._end(self.under_way.of(channel), "is not asked any more")

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

    def request(self, channel: Addressee, request: Request, at_leisure: bool) -> asyncio.Future[Any]:
        """See `Channel.request`. Raises TooManyRequests; Unavailable while the node is not connected."""
        if not self.connected:
            raise unavailable(channel, "is not connected")
        kind, limits, loop = type(request), self._limits, self._loop
        under_way = self.under_way
        sent = size = message_bytes(request)
        is_bounded = isinstance(request, Get) and request.bytes_max > 0
        if kind is Get:
            size = GET_BYTES + (under_way.mean_bounded_bytes if is_bounded else under_way.mean_value_bytes)
        elif kind is Scan:
            size += page_bytes(request, limits)
        ops, bytes_after = under_way.ops, under_way.bytes + size
        if len(ops) >= limits.channel_ops_max or bytes_after > limits.channel_bytes_max:
            raise TooManyRequests(f"too many operations wait for shard {channel.shard_id}.", retry_after_ms=100)
        if channel is not self._addressed:
            self._address(channel)
        self._next_id = request.id = op_id = self._next_id + 1
        future = loop.create_future()
        wait_s = limits.request_timeout_s if kind is not Acquire else _waits_s(request) + limits.request_timeout_s
        ops[op_id] = Pending(future, kind in WRITES, size, loop.time() + wait_s, channel, is_bounded)
        under_way.bytes = bytes_after
        if at_leisure:
            self._outbox.put_at_leisure(request, sent)
        else:
            self._outbox.put(request, sent)
        return future

    async def flushed(self) -> None:
        """All that was asked for until now has left, or the connection has ended. For failpoints."""
        last = self._next_id
        while self.connected and self.under_way.sent_up_to < last:  # noqa: ASYNC110 (an event would cost on every frame)
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)

    async def _stay_connected(self) -> None:
        outage = Outage(self._channels[0].shard_id, self.url)
        while True:
            self._addressed = self._dialer.hello_for(self._channels)
            try:
                async with await self._dialer.connect(self._addressed) as socket:
                    outage.is_over()
                    await self._serve(socket)
            except msgspec.DecodeError as error:
                log.error("shard %s sent a frame that is none: %s", self._channels[0].shard_id, error)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                outage.goes_on(error, self._loop.time())
            await self._dialer.pause()

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._outbox = Outbox(self._limits.frame_bytes_max)
        self._heard_s = self._loop.time()
        if self._strike:
            self._put_strike()  # before anything else that leaves by this connection
        self.connected = True
        sender = asyncio.create_task(self._outbox.run(socket, self.under_way.note_sent))
        is_settled = False
        try:
            while (message := await socket.receive()).type is aiohttp.WSMsgType.BINARY:
                self._heard_s = self._loop.time()
                self.under_way.take(decode_replies(message.data))
            is_settled = message.type is aiohttp.WSMsgType.CLOSE and message.data == SETTLED
            if message.type not in _CLOSES:
                log.error("the connection to shard %s ends: %s", self._channels[0].shard_id, message.data)
        finally:
            self.connected = False
            self._socket = None
            sender.cancel()  # nothing more leaves
            # Before anything is awaited: the link may end just now.
            self.under_way.fail_all("closed the connection", is_settled=is_settled)
            await asyncio.gather(sender, return_exceptions=True)

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

    def _end(self, op_ids: list[int], what: str) -> None:
        """Who is told that nothing was done must not see it done later."""
        self.under_way.fail(op_ids, what)
        self._outbox.drop(set(op_ids))

    async def _time_out(self, now: float) -> None:
        timed_out = self.under_way.late(now)
        if timed_out:
            self._end(timed_out, "did not answer in time")
        silent_s = now - self._heard_s
        if timed_out and silent_s > self._limits.request_timeout_s and self._socket is not None:
            log.warning("shard %s has been silent for %.1f s: reconnecting", self._channels[0].shard_id, silent_s)
            _abort(self._socket)


def _waits_s(acquire: Any) -> float:
    """For how long its client waits for the lock."""
    return float(acquire.wait_ms / 1000)


def _abort(socket: aiohttp.ClientWebSocketResponse) -> None:
    """End a connection whose other end does not listen: without a closing handshake."""
    transport = socket._response.connection and socket._response.connection.transport
    if transport is not None:
        transport.abort()


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

    def hurry(self) -> None:
        """There is news of the nodes: those that are not connected are tried again at once."""
        for link in self._links.values():
            link.hurry()

    async def detach(self, channel: Addressee, link: NodeLink) -> None:
        """It does not any more, and ends with its last channel."""
        if link.has_only(channel) and self._links.get(link.url) is link:
            del self._links[link.url]  # before it ends, which takes a moment: who comes then gets another one
        await link.detach(channel)
