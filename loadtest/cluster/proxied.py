"""One connection through the proxy: two sockets, and what happens to the bytes between them.

Owns: passing bytes on, in order, and the ends of connections: half-closing, resets, and who must be told of them.
Promises: what is read and not yet written is bounded, because an end is not read while the other one takes no more.
A stream never has a hole: where a fault lost something of it, the connection ends before anything that came later
arrives (a network may delay or break a TCP connection, but never takes a piece out of one).
Leaves to others: which faults there are (`faults`), whom to connect with whom (`connections`).

Bytes that vanish in a cut are gone for good. TCP would send them again once the cut heals; here the connection is
reset then, as TCP does when its patience is over. For bytes that arrive late instead there are stalls and delays.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from random import Random
from typing import Protocol

import msgspec

from loadtest.cluster.faults import Faults, Route
from loadtest.cluster.late_chunks import LateChunks

_QUEUED_BYTES_MAX = 1024 * 1024
_WRITE_BUFFER_BYTES_MAX = 256 * 1024
_LINGER_NOT = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: close(2) sends a reset

_EOF = b""
_RESET = None


class Counts(msgspec.Struct):
    """What has come through the proxy, and what was done to it. `bytes_cut` are those that vanished."""

    connections: int = 0
    refused: int = 0
    bytes: int = 0
    bytes_cut: int = 0
    drops: int = 0
    resets: int = 0
    duplicates: int = 0


class Network(Protocol):
    """What an end must know."""

    faults: Faults
    counts: Counts
    random: Random

    def on_lost(self, end: End) -> None: ...


class End(asyncio.Protocol):
    """One socket of a connection; what comes from it goes to `other`. `on_data` sees all that comes; `on_open` is
    called before anything does."""

    other: End

    def __init__(
        self,
        network: Network,
        route: Route,
        on_data: Callable[[bytes], None] | None = None,
        on_open: Callable[[], None] | None = None,
    ) -> None:
        self.route = route
        self._on_data = on_data
        self._on_open = on_open
        self.transport: asyncio.Transport | None = None
        self.was_opened = False
        self.has_lost = False
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._is_over = False
        self._has_ended = False
        self._has_told_the_end = False
        self._is_full = False
        self._is_paused = False
        self.late = LateChunks()
        self._timer: asyncio.TimerHandle | None = None

    # --- the socket --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES_MAX)
        self.transport = transport
        self.was_opened = True
        if self._is_over:
            self.abort()
            return
        if self._on_open is not None:
            self._on_open()
        self.set_reading()

    def data_received(self, data: bytes) -> None:
        if self._on_data is not None:
            self._on_data(data)
        network = self._network
        network.counts.bytes += len(data)
        if network.faults.by_way or self.late or self.other.transport is None:
            self._send(data)
        else:
            self.other.write(data)

    def eof_received(self) -> bool:
        if self.other.was_opened:
            self._send(_EOF)
            self._has_ended = True
        else:
            self.reset()  # it has left before it was connected
        return True  # the other direction stays open

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if not self._is_over:
            self._send(_RESET)
        self._network.on_lost(self)

    def pause_writing(self) -> None:
        self.other._set_full(True)

    def resume_writing(self) -> None:
        self.other._set_full(False)

    # --- one direction -----------------------------------------------------------------------------------------------

    def _send(self, chunk: bytes | None) -> None:
        """Put it on the way to the other end, with whatever the network does to it."""
        network = self._network
        fault = network.faults.of(self.route) if network.faults.by_way else None
        due_s = 0.0
        if fault is not None:
            is_open = self.other.was_opened  # before that nothing is on its way: it is still with its sender
            if is_open and (fault.is_cut or (fault.is_stalled and chunk is _RESET)):
                network.counts.bytes_cut += len(chunk or b"")
                self.has_lost = True
                return
            if is_open and chunk and fault.drop_probability and network.random.random() < fault.drop_probability:
                network.counts.drops += 1
                self.reset()
                return
            if fault.delay_s or fault.jitter_s:
                due_s = self._loop.time() + fault.delay_s + network.random.random() * fault.jitter_s
        if not self.has_lost:  # else a hole would come before it
            self._enqueue(due_s, chunk)

    def _enqueue(self, due_s: float, chunk: bytes | None) -> None:
        if not due_s and not self.late and self.other.was_opened:
            self._deliver(chunk)
            return
        self.late.put(due_s, chunk)
        if self.other.was_opened:
            self._wake_when_due()
        self.set_reading()

    def deliver_due(self) -> None:
        """What is on its way and has come to its time."""
        self._timer = None
        for chunk in self.late.take_due(self._loop.time()):
            self._deliver(chunk)
        self._wake_when_due()
        self.set_reading()

    def _wake_when_due(self) -> None:
        if self._timer is None and (due_s := self.late.due_s) is not None:
            self._timer = self._loop.call_at(due_s, self.deliver_due)

    def _deliver(self, chunk: bytes | None) -> None:
        if chunk is _RESET:
            self.other.abort()
        elif chunk:
            self.other.write(chunk)
        else:
            self._has_told_the_end = True
            self.other.write_eof()
            if self.other._has_told_the_end:
                self.close()
                self.other.close()

    # --- the other direction -----------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Nothing, if the socket is gone."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def write_eof(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            with contextlib.suppress(OSError):  # it was reset by then, which is told next
                self.transport.write_eof()

    def close(self) -> None:
        """Once all that was written has left."""
        self._is_over = True
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """At once, with a reset."""
        self._is_over = True
        self.late.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.transport is not None:
            sock = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # it is closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            self.transport.abort()

    def reset(self) -> None:
        """Both ends hear of it."""
        self.abort()
        self.other.abort()

    # --- back-pressure -----------------------------------------------------------------------------------------------

    def _set_full(self, is_full: bool) -> None:
        self._is_full = is_full
        self.set_reading()

    def set_reading(self) -> None:
        """Read on, or not, as the other end and the network allow."""
        transport = self.transport
        if transport is None or self._is_over or self._has_ended or transport.is_closing():
            return
        fault = self._network.faults.of(self.route) if self._network.faults.by_way else None
        is_paused = self._is_full or self.late.bytes > _QUEUED_BYTES_MAX or bool(fault and fault.is_stalled)
        if is_paused != self._is_paused:
            self._is_paused = is_paused
            if is_paused:
                transport.pause_reading()
            else:
                transport.resume_reading()
