"""HTTP/1.1 as bytes: requests written out whole, and answers read back.

Owns: the one form in which all systems are asked, by wrk as by the preloading.
Promises: an answer that it cannot read is an error, never a guess.
Leaves to others: what is asked (dialects.py).

Not a client for general use: no redirects, no TLS, no trailers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit


class Request(NamedTuple):
    method: str
    target: str
    body: bytes = b""
    headers: tuple[str, ...] = ()

    def render(self, host: str) -> bytes:
        """The bytes on the wire, for a server at `host` (host:port)."""
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {host}", *self.headers]
        if self.body or self.method in ("PUT", "POST"):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("ascii") + self.body


class Answer(NamedTuple):
    """Names of headers are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer. Raises asyncio.IncompleteReadError when the connection ends, ValueError for an unknown form."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split()[1])
    fields = (line.partition(":") for line in head[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    if (coding := headers.get("transfer-encoding")) is not None:
        if coding.lower() != "chunked":
            raise ValueError(f"the answer is coded in a way that is not known here: {coding}")
        return Answer(status, await _read_chunks(reader), headers)
    length = 0 if status in (204, 304) else int(headers.get("content-length", 0))
    return Answer(status, await reader.readexactly(length), headers)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """RFC 9112, 7.1. Raises ValueError for trailers."""
    parts = []
    while length := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        part = await reader.readexactly(length + 2)
        if not part.endswith(b"\r\n"):
            raise ValueError("a chunk is longer than it says")
        parts.append(part[:-2])
    if (end := await reader.readuntil(b"\r\n")) != b"\r\n":
        raise ValueError(f"the answer has a trailer: {end[:100]!r}")
    return b"".join(parts)


async def ask(url: str, request: Request) -> Answer:
    """One request on a connection of its own. Raises OSError when no client listens."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request.render(parts.netloc))
        return await read_answer(reader)
    finally:
        writer.close()


async def ask_all(url: str, requests: Iterable[Request], connections: int) -> None:
    """Every request once, over that many connections. Raises RuntimeError at the first answer that is not 2xx."""
    parts = urlsplit(url)
    waiting = iter(requests)

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            for request in waiting:
                writer.write(request.render(parts.netloc))
                answer = await read_answer(reader)
                if not 200 <= answer.status < 300:
                    raise RuntimeError(f"{request.method} {request.target}: {answer.status} {answer.body[:300]!r}")
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one_connection())


def write_replay(requests: Sequence[Request], url: str) -> bytes:
    """The content of replay.lua's FILE: the bytes of all requests, each preceded by its length."""
    rendered = (request.render(urlsplit(url).netloc) for request in requests)
    return b"".join(b"%d\n%b" % (len(data), data) for data in rendered)
