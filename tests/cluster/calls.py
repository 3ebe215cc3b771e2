"""Many HTTP calls at once to a cluster of real processes: raw requests with any header, answers taken apart."""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from tests.cluster.actions import Reply

WAIT_S = 30.0
LARGE_BYTES = 1024 * 1024


class Calls:
    """A session with a router. Nothing is ever repeated."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> Reply:
        """Header lines may be repeated. Raises aiohttp.ClientError."""
        url = URL(self.url + path, encoded=True)
        data = io.BytesIO(body) if body and len(body) > LARGE_BYTES else body  # aiohttp asks for that
        async with self._http.request(method, url, data=data, headers=list(headers)) as response:
            lines = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, lines, await response.read())

    # --- keys

    async def put(self, key: str, value: bytes, **headers: Any) -> Reply:
        return await self.ask("PUT", f"/v1/kv/{quote(key)}", value, fields(headers))

    async def get(self, key: str, **headers: Any) -> Reply:
        return await self.ask("GET", f"/v1/kv/{quote(key)}", None, fields(headers))

    async def delete(self, key: str, **headers: Any) -> Reply:
        return await self.ask("DELETE", f"/v1/kv/{quote(key)}", None, fields(headers))

    # --- locks

    async def acquire(self, name: str, body: dict[str, Any] | None = None, **headers: Any) -> Reply:
        encoded = None if body is None else msgspec.json.encode(body)
        return await self.ask("POST", f"/v1/locks/{quote(name)}", encoded, fields(headers))

    async def granted(self, name: str, ttl: float = 60, **members: Any) -> int:
        """The token of a new lease."""
        reply = await self.acquire(name, {"ttl": ttl, **members})
        assert reply.status == 201, reply
        return int(reply.json["token"])

    async def renew(self, name: str, token: object = None, **headers: Any) -> Reply:
        return await self.ask("PUT", f"/v1/locks/{quote(name)}", None, fields({"lock_token": token, **headers}))

    async def release(self, name: str, token: object = None, **headers: Any) -> Reply:
        return await self.ask("DELETE", f"/v1/locks/{quote(name)}", None, fields({"lock_token": token, **headers}))

    async def inspect(self, name: str) -> Reply:
        return await self.ask("GET", f"/v1/locks/{quote(name)}")

    async def waiting(self, name: str) -> int:
        """How many wait for the lock; 0 if it is free."""
        reply = await self.inspect(name)
        return int(reply.json["waiting"]) if reply.status == 200 else 0

    async def until_waiting(self, name: str, count: int) -> None:
        await until(lambda: self._is_waiting(name, count), f"{count} wait for {name}")

    async def _is_waiting(self, name: str, count: int) -> bool:
        return await self.waiting(name) == count

    # --- transactions

    async def txn(self, body: object, **headers: Any) -> Reply:
        """`body` as JSON, or bytes as they are."""
        encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.ask("POST", "/v1/txn", encoded, fields(headers))

    async def owner(self, key: str) -> str:
        """The id of the shard that has the key."""
        reply = await self.ask("GET", f"/v1/explain/{quote(key)}")
        return str(reply.json["owner"])


def fields(headers: dict[str, Any]) -> list[tuple[str, str]]:
    """`if_match="*"` as a header line; None as none."""
    return [(name.replace("_", "-"), str(value)) for name, value in headers.items() if value is not None]


@asynccontextmanager
async def calling(url: str, connections_max: int = 200) -> AsyncIterator[Calls]:
    connector = aiohttp.TCPConnector(limit=connections_max)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=90)) as http:
        http._retry_connection = False
        yield Calls(url, http)


async def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> None:
    """Until the awaited condition is true."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # what is awaited happens in another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


def unique(prefix: str) -> str:
    """A key, a name or an Idempotency-Key that no other test uses."""
    return f"{prefix}/{uuid.uuid4()}"


def code(reply: Reply) -> tuple[int, str]:
    """Status and code of a problem document."""
    assert reply.headers["content-type"] == "application/problem+json", reply
    document = reply.json
    assert document["status"] == reply.status
    assert document["next_step"]
    return reply.status, document["code"]
