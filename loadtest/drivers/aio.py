"""Drives workloads with asyncio: the routers as one client sees them, each request sent once.

Owns: the session, sending a call, running the steps of a workload, what was answered that no router may answer.
Promises: a write is sent once: aiohttp's silent repeat is off (see `session`). Whatever the other side does becomes a
reply.
Leaves to others: what a client asks for (`loadtest.workloads`), what an answer means (`loadtest.workloads.answers`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import aiohttp
from yarl import URL

from loadtest.histories.history import now_s
from loadtest.workloads.answers import NEVER_SENT, NO_ANSWER, NOTHING, Reply
from loadtest.workloads.calls import Call, Pause, Steps, complaint

REQUEST_TIMEOUT_S = 30.0
_ANY = frozenset(range(1000))

Result = TypeVar("Result")
Watch = Callable[[Call, Reply], None]


def session(timeout_s: float = REQUEST_TIMEOUT_S) -> aiohttp.ClientSession:
    """One that sends every request once."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    http = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
    http._retry_connection = False
    return http


class Wire:
    """The routers, as one client sees them: each request goes to any of them.

    `watch` is told of every call and its reply. `was_duplicated` says whether the network delivered the request with
    that Idempotency-Key twice: then a refusal is that of one delivery, and its outcome is unknown. `counts`: replies by
    status; `complaints`: sentences on answers that no router may give.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        seed: int,
        watch: Watch | None = None,
        was_duplicated: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self.urls = urls
        self.rng = random.Random(seed)
        self.counts: Counter[int] = Counter()
        self.complaints: list[str] = []
        self._http = http
        self._watch = watch
        self._was_duplicated = was_duplicated

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request of which any answer may come."""
        return await self.send(Call(f"{method} {path}", method, path, body, headers or {}, _ANY))

    async def send(self, call: Call) -> Reply:
        """One request, sent once. Never raises for what the other side does."""
        reply = await self._send(call)
        self.counts[reply.status] += 1
        if (sentence := complaint(call, reply)) is not None:
            self.complaints.append(sentence)
        if self._watch is not None:
            self._watch(call, reply)
        key = call.headers.get("Idempotency-Key")
        if key is not None and reply.outcome == "refused" and self._was_duplicated(key):
            return reply._replace(status=NO_ANSWER, error=f"one of two deliveries was answered {reply.said}")
        return reply

    async def _send(self, call: Call) -> Reply:
        url = URL(self.rng.choice(self.urls) + call.path, encoded=True)
        begin_s = now_s()
        try:
            async with self._http.request(call.method, url, data=call.body, headers=call.headers) as response:
                body = await response.read()
                tag = response.headers.get("ETag", "").strip('"')
                version = int(tag) if tag.isdecimal() else None
                location = response.headers.get("Location", "")
                return Reply(response.status, body, version, "", begin_s, now_s(), location)
        except aiohttp.ClientConnectorError as error:
            return Reply(NEVER_SENT, error=type(error).__name__, begin_s=begin_s, end_s=now_s())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Reply(NO_ANSWER, error=type(error).__name__, begin_s=begin_s, end_s=now_s())


async def drive(wire: Wire, steps: Steps[Result]) -> Result:
    """Send what these steps ask for, to their end."""
    reply = NOTHING
    try:
        asked = next(steps)
        while True:
            if isinstance(asked, Pause):
                await asyncio.sleep(asked.seconds)
                reply = NOTHING
            else:
                reply = await wire.send(asked)
            asked = steps.send(reply)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
