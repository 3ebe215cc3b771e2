"""Connections between a primary and its copies: one WebSocket for each copy of each store.

Owns: the sockets, both ends.
Promises: a node is asked for a copy only by nodes of its own cluster's session. A frame is bounded.
Leaves to others: what is said (`replication.serving`, `replication.copy_link`), where nodes are (the map).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kvstore.replication import messages
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost, WireRefused
from kvstore.storage.segments import SEGMENT_BYTES
from kvstore.transport.http.server import accept_socket
from kvstore.transport.sessions import PARAMETER, ClusterSession
from kvstore.transport.versions import refused_by

_FRAME_BYTES_MAX = 2 * SEGMENT_BYTES  # the largest record, or a frame of several
_SILENCE_S = 30.0
_CLOSE_S = 1.0

_Socket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse


class SocketWire:
    """A `Wire` on a WebSocket."""

    def __init__(self, socket: _Socket, decode: Callable[[bytes], Any]) -> None:
        self._socket = socket
        self._decode = decode
        self._has_heard = True
        self._watch = self._look_again()

    def _look_again(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(_SILENCE_S, self._end_if_silent)

    def _end_if_silent(self) -> None:
        """One timer for all messages: each of them would pay for one of its own."""
        if self._has_heard:
            self._has_heard = False
            self._watch = self._look_again()
        else:
            self._begin_to_close()

    async def send(self, message: Any) -> None:
        """Send the message. Raises WireLost."""
        try:
            await self._socket.send_bytes(messages.encode(message))
        except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
            raise WireLost(str(error) or type(error).__name__) from error

    async def receive(self) -> Any:
        """The next message. Raises WireLost."""
        try:
            frame = await self._socket.receive()
        except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
            raise WireLost(str(error) or type(error).__name__) from error
        self._has_heard = True
        if frame.type is not aiohttp.WSMsgType.BINARY:
            raise WireLost("the connection is closed")
        try:
            return self._decode(frame.data)
        except msgspec.DecodeError as error:
            raise WireLost(f"what came is no message: {error}") from error

    async def close(self) -> None:
        """Returns at once: the other end may be one that does not answer any more."""
        self._watch.cancel()
        self._begin_to_close()

    def _begin_to_close(self) -> None:
        closing = asyncio.ensure_future(self._socket.close())
        _closing[closing] = None
        closing.add_done_callback(_note_closed)


_closing: dict[asyncio.Future[bool], None] = {}


def _note_closed(closing: asyncio.Future[bool]) -> None:
    del _closing[closing]
    if not closing.cancelled():
        closing.exception()  # a connection that is lost already


async def connect(http: aiohttp.ClientSession, cluster: ClusterSession, url: str, session: Session) -> Wire:
    """Connect to the node at that address. Raises WireLost; WireRefused if it speaks another protocol."""
    try:
        socket = await http.ws_connect(
            f"{url}/copies?store={session.store_id}&{PARAMETER}={cluster.id}",
            max_msg_size=_FRAME_BYTES_MAX,
            compress=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_S),
        )
    except aiohttp.WSServerHandshakeError as error:
        refused = refused_by(url, error.headers)
        raise WireRefused(refused.sentences) if refused is not None else WireLost(str(error)) from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise WireLost(str(error) or type(error).__name__) from error
    return SocketWire(socket, messages.decode_from_copy)


async def accept(request: web.BaseRequest) -> tuple[web.WebSocketResponse, Wire]:
    """The socket that answers the request, and the copy's end of it. Raises ConnectionError."""
    socket = await accept_socket(request, _FRAME_BYTES_MAX, _CLOSE_S)
    return socket, SocketWire(socket, messages.decode_from_primary)
