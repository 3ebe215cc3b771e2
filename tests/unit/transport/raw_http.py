"""A server whose handler shows what it was given, and clients that send it bytes as they are."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

from kvstore.transport.bodies import BodyReader

HOST = b"Host: localhost\r\n"
VALUE_BYTES_MAX = 1000
LINE_BYTES_MAX = 4000


class Got(NamedTuple):
    """An answer taken apart; names of `fields` in lower case."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.fields["content-type"] == "application/problem+json"
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        assert document["type"] == f"/problems/{document['code']}"
        assert document["next_step"]
        return document


class Wire:
    """A client that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    @property
    def was_answered(self) -> bool:
        return bool(self.reader._buffer)  # type: ignore[attr-defined]

    async def answer(self, *, head_only: bool = False) -> Got:
        async with asyncio.timeout(60):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
            fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            status = int(status_line.split(" ")[1])
            size = 0 if head_only or status in (100, 204, 304) else int(fields["content-length"])
            return Got(status, fields, await self.reader.readexactly(size))

    async def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        async with asyncio.timeout(60):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


class Site:
    """A server with a handler that shows what it was given."""

    def __init__(self, port: int, bodies: BodyReader, seen: list[str]) -> None:
        self.port = port
        self.bodies = bodies
        self.seen = seen
        self._wires: list[Wire] = []

    async def connect(self) -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self._wires.append(wire)
        return wire

    async def close(self) -> None:
        """Hang up on all that are still connected."""
        for wire in self._wires:
            wire.writer.transport.abort()
        await asyncio.gather(*(wire.writer.wait_closed() for wire in self._wires), return_exceptions=True)

    async def ask(self, data: bytes) -> Got:
        """The answer to these bytes on a connection of their own."""
        wire = await self.connect()
        wire.send(data)
        return await wire.answer()


def put(*fields: bytes) -> bytes:
    return b"PUT /a HTTP/1.1\r\n" + HOST + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
