"""Messages on their way into a WebSocket: gathered into frames that fill by themselves under load.

Owns: the order of messages, when a frame leaves and how large it is.
Promises: messages leave in the order in which they were put. No timer is involved but for what can wait.
Leaves to others: what is under way and what its loss means (`link`), what is to stop until then (`channel`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from kvstore.message_sizes import message_bytes
from kvstore.protocol import encode_frame

_GATHER_TURNS = 3  # of the loop before a frame is taken: what else it has in hand comes along, for fuller frames
_LEISURE_S = 0.002
_FEW = 16  # messages, for which the other end is not waited for


class Outbox:
    """Messages on their way out. `run` sends them, as many to a frame as have gathered, until cancelled."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._messages: list[Any] = []
        self._bytes = 0  # what they count for
        self._frame_bytes_max = frame_bytes_max
        self._wake: asyncio.Future[None] | None = None
        self._is_due = False
        self._is_sending = False
        self._has_timer = False
        self._ended = False
        self._taken: asyncio.Event | None = None

    async def room_for_more(self, bytes_max: int) -> None:
        """Wait while more than `bytes_max` wait for the other end to take them.

        Until it has taken some, or has left.
        """
        while len(self._messages) > _FEW and not self._ended and self._bytes > bytes_max:
            await self._until_taken()

    async def flushed(self) -> bool:
        """Wait until all that was put has been handed to the socket. False if that has ended before."""
        while (self._messages or self._is_sending) and not self._ended:
            await self._until_taken()
        return not self._messages and not self._is_sending

    async def _until_taken(self) -> None:
        self._taken = self._taken or asyncio.Event()
        await self._taken.wait()

    def put(self, message: Any, size: int | None = None) -> None:
        """Put the message behind those that wait. `size`: what it counts for, where that is known."""
        self._messages.append(message)
        self._bytes += message_bytes(message) if size is None else size
        self._set_out()

    def put_at_leisure(self, message: Any, size: int) -> None:
        """It leaves with the next message that is put, at the latest after `_LEISURE_S`."""
        self._messages.append(message)
        self._bytes += size
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
        self._bytes = sum(map(message_bytes, self._messages))

    async def run(self, socket: Any, on_sent: Callable[[list[Any]], None] | None = None) -> None:
        """Send what is put, until cancelled; `on_sent` is called with the messages of each frame before it leaves.

        Raises what the socket raises once it has ended.
        """
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
            self._is_sending = True
            for frame in self._frames(messages):
                await socket.send_bytes(frame)
            self._is_sending = False

    def _frames(self, messages: list[Any]) -> Iterator[bytes]:
        """The frames of these messages: one, as a rule.
        What counts little but is large (many long keys) goes in halves that the far end reads."""
        frame = encode_frame(messages)
        if len(frame) <= 2 * self._frame_bytes_max or len(messages) == 1:
            yield frame
        else:
            half = len(messages) // 2
            yield from self._frames(messages[:half])
            yield from self._frames(messages[half:])

    def _take_frame(self) -> list[Any]:
        if self._bytes < self._frame_bytes_max:
            messages, self._messages, self._bytes, self._is_due = self._messages, [], 0, False
            return messages
        size = 0
        for count, message in enumerate(self._messages, start=1):
            size += message_bytes(message)
            if size >= self._frame_bytes_max:
                messages, self._messages = self._messages[:count], self._messages[count:]
                self._bytes -= size
                return messages
        messages, self._messages, self._bytes, self._is_due = self._messages, [], 0, False
        return messages
