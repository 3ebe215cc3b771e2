"""HTTP/1.1 as wrk sends it, and the same requests by aiohttp where answers matter.

Owns: the one form in which all systems are asked, by wrk as by the preloading.
Promises: every request is sent once; an answer is whole or an error (aiohttp's).
Leaves to others: what is asked (dialects.py, conditions.py).
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from loadtest.drivers.aio import session


class Request(NamedTuple):
    """`headers`: whole lines, `Name: text`."""

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


def compact(document: object) -> str:
    """JSON without blanks."""
    return json.dumps(document, separators=(",", ":"))


def post(target: str, document: object) -> Request:
    return Request("POST", target, compact(document).encode())


def base64_of(data: bytes | str) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode("ascii")


class Answer(NamedTuple):
    """Headers are found by their names in any case, if they come from `send`."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}

    @property
    def document(self) -> dict[str, Any]:
        """The body as JSON."""
        found: dict[str, Any] = json.loads(self.body or b"{}")
        return found


async def send(http: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    """One request. Raises aiohttp.ClientError, TimeoutError."""
    headers = {name: text.strip() for name, _, text in (line.partition(":") for line in request.headers)}
    async with http.request(
        request.method,
        URL(url + request.target, encoded=True),
        data=request.body or None,
        headers=headers,
        skip_auto_headers=("Accept-Encoding", "Content-Type", "User-Agent"),
    ) as response:
        return Answer(response.status, await response.read(), response.headers)


async def done(http: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    """As `send`. Raises RuntimeError when the answer is not 2xx."""
    answer = await send(http, url, request)
    if not 200 <= answer.status < 300:
        target = request.target.partition("?")[0]
        raise RuntimeError(f"{request.method} {target}: {answer.status} {answer.body[:300]!r}")
    return answer


async def ask(url: str, request: Request) -> Answer:
    """One request on a connection of its own. Raises as `send` does."""
    async with session() as http:
        return await send(http, url, request)


async def ask_done(url: str, request: Request) -> Answer:
    """As `ask`. Raises RuntimeError when the answer is not 2xx."""
    async with session() as http:
        return await done(http, url, request)


async def ask_all(url: str, requests: Iterable[Request], connections: int) -> None:
    """Every request once, over that many connections. Raises RuntimeError at the first answer that is not 2xx."""
    waiting = iter(requests)
    async with session() as http, asyncio.TaskGroup() as group:

        async def one_connection() -> None:
            for request in waiting:
                await done(http, url, request)

        for _ in range(connections):
            group.create_task(one_connection())


def write_replay(requests: Sequence[Request], url: str) -> bytes:
    """The content of replay.lua's FILE: the bytes of all requests, each preceded by its length."""
    rendered = (request.render(urlsplit(url).netloc) for request in requests)
    return b"".join(b"%d\n%b" % (len(data), data) for data in rendered)
