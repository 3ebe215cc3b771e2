"""What clients can do to a router that costs them little: the shapes that `loadtest.hostile` repeats.

Owns: each shape as bytes on raw connections; a process of its own that keeps so many of them open.
Promises: bounded in connections and in time; a connection that the router ends is reopened after a pause, and
counted. The process gives way to the cluster: hostile clients have machines of their own, and what their work takes
from a router on the same cores is none of its faults. How much that still is, `CONTROL` shows.
Leaves to others: the cluster, what is measured (`loadtest.hostile`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

BIG_KEYS = 64
BIG_BYTES = 1024 * 1024
MID_KEYS = 256
MID_BYTES = 60_000
_REOPEN_S = 0.25
_RECEIVE_BYTES = 16_384
_NICE = 10
_HOST = b"Host: localhost\r\n"


class Wire:
    """A connection to the router without anything that reads by itself."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def read(self) -> bytes:
        """Empty at the end."""
        return await asyncio.get_running_loop().sock_recv(self._socket, 262_144)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)


Behaviour = Callable[[Wire], Awaitable[None]]


def get(path: str) -> bytes:
    """A GET request."""
    return f"GET {path} HTTP/1.1\r\n".encode() + _HOST + b"\r\n"


def _batch() -> bytes:
    body = json.dumps({"ops": [{"op": "get", "key": f"big-{number}"} for number in range(BIG_KEYS)]}).encode()
    return b"POST /v1/batch HTTP/1.1\r\n" + _HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body


_LISTING = get("/v1/kv?prefix=big-&values=true&limit=10000")
_MID_LISTING = get("/v1/kv?prefix=mid-&values=true&limit=10000")
_PUT = b"PUT /v1/kv/hostile HTTP/1.1\r\n" + _HOST


async def _forever(wire: Wire, data: bytes, pause_s: float = 0.0) -> None:
    while True:
        await wire.send(data)
        await asyncio.sleep(pause_s)


async def _once_and_hold(wire: Wire, data: bytes) -> None:
    await wire.send(data)
    await asyncio.Event().wait()


async def _wait_for_end(wire: Wire, data: bytes) -> None:
    await wire.send(data)
    while await wire.read():
        pass


async def unread_values(wire: Wire) -> None:
    """Requests for values below 64 KiB, one after the other; no answer is read."""
    await _forever(wire, get("/v1/kv/mid") * 20)


async def unread_small_answers(wire: Wire) -> None:
    """The same for values of a few bytes."""
    await _forever(wire, get("/v1/kv/small-1") * 50)


async def unread_errors(wire: Wire) -> None:
    """The same for keys that do not exist."""
    await _forever(wire, get("/v1/kv/there-is-none") * 50)


async def unread_big_values(wire: Wire) -> None:
    """The same for values of 1 MiB."""
    await _forever(wire, get("/v1/kv/big-1") * 20)


async def unread_batches(wire: Wire) -> None:
    """A batch of gets of 1 MiB each; its stream is not read."""
    await _once_and_hold(wire, _batch())


async def unread_listings(wire: Wire) -> None:
    """Pages of values that are not read."""
    await _forever(wire, _LISTING * 4)


async def unread_mid_listings(wire: Wire) -> None:
    """The same of values just below 64 KiB, which shards send with their pages."""
    await _forever(wire, _MID_LISTING * 4)


async def listings(wire: Wire) -> None:
    """Pages of values, one after the other, that are read."""
    await wire.send(_LISTING)
    while data := await wire.read():
        if data.endswith(b"}\n"):
            await wire.send(_LISTING)


async def unsent_bodies(wire: Wire) -> None:
    """A body of 1 MiB is announced and does not come."""
    await _wait_for_end(wire, _PUT + b"Content-Length: 1048576\r\n\r\n")


async def unsent_chunks(wire: Wire) -> None:
    """A chunked body stops after five bytes."""
    await _wait_for_end(wire, _PUT + b"Transfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n")


async def slow_bodies(wire: Wire) -> None:
    """A body comes byte by byte."""
    await wire.send(_PUT + b"Content-Length: 1048576\r\n\r\n")
    await _forever(wire, b"x", 0.1)


async def half_bodies(wire: Wire) -> None:
    """Half of a body comes, then nothing."""
    await _wait_for_end(wire, _PUT + b"Content-Length: 1048576\r\n\r\n" + bytes(524_288))


async def slow_headers(wire: Wire) -> None:
    """A header comes byte by byte."""
    await wire.send(b"GET /v1/kv/small-1 HTTP/1.1\r\n" + _HOST + b"X-Slow: ")
    await _forever(wire, b"x", 0.1)


async def endless_headers(wire: Wire) -> None:
    """Header fields without end."""
    await wire.send(b"GET /v1/kv/small-1 HTTP/1.1\r\n" + _HOST)
    await _forever(wire, b"X-Long: " + b"v" * 8000 + b"\r\n", 0.01)


async def idle(wire: Wire) -> None:
    """Nothing is ever sent."""
    while await wire.read():
        pass


async def half_closed(wire: Wire) -> None:
    """Requests are sent, the sending side is closed, no answer is read."""
    await wire.send(get("/v1/kv/mid") * 20)
    wire.half_close()
    await asyncio.Event().wait()


async def busy(_wire: Wire) -> None:
    """A core is kept busy and nothing is sent, for comparison."""
    while True:
        pass


class Shape(NamedTuple):
    """A behaviour and how many connections repeat it at once."""

    behave: Behaviour
    connections: int

    @property
    def name(self) -> str:
        return self.behave.__name__.replace("_", "-")

    @property
    def words(self) -> str:
        return (self.behave.__doc__ or "").rstrip(".")


CONTROL = Shape(busy, 1)
SHAPES = [
    Shape(unread_values, 100),
    Shape(unread_small_answers, 100),
    Shape(unread_errors, 100),
    Shape(unread_big_values, 100),
    Shape(unread_batches, 110),
    Shape(unread_listings, 80),
    Shape(unread_mid_listings, 80),
    Shape(listings, 80),
    Shape(unsent_bodies, 1500),
    Shape(unsent_chunks, 1500),
    Shape(slow_bodies, 500),
    Shape(half_bodies, 200),
    Shape(slow_headers, 500),
    Shape(endless_headers, 100),
    Shape(idle, 2000),
    Shape(half_closed, 200),
]


class Hostile:
    """`with Hostile(shape, port):` a process that repeats the shape; `reopened` is how often it was cut off."""

    def __init__(self, shape: Shape, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._reopened: Any = context.Value("l", 0)
        arguments = (shape.behave, shape.connections, port, self._reopened)
        self._process = context.Process(target=_run, args=arguments, daemon=True)

    @property
    def reopened(self) -> int:
        return int(self._reopened.value)

    def __enter__(self) -> Hostile:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def _run(behave: Behaviour, connections: int, port: int, reopened: Any) -> None:
    async def one() -> None:
        while True:
            with contextlib.suppress(OSError), socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
                await behave(Wire(connection))
            reopened.value += 1
            await asyncio.sleep(_REOPEN_S)

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(connections)))

    _give_way()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(all_of_them())


def _give_way() -> None:
    """Leave the processor to the other processes; also if all of this was started with a priority (`chrt`)."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.nice(_NICE)
