"""One request of the client: sent once, repeated only where surely nothing was done, its failure named.

Owns: sessions, what a broken connection means, waiting before a repeat.
Promises: a write is sent once. What may have been done and what has not are never confused:

    nothing was sent (refused, no route, no such host)      Unavailable
    a read whose connection broke                           repeated, then Unavailable
    a write whose connection broke, or took too long        OutcomeUnknown, never repeated
    the answer "nothing was done" (409, 423, 429, 503)      repeated after the wait that it names
    every other problem document                            the class of `kvstore.errors` with that code

Leaves to others: which requests there are (`client`), what the answers say (`results`).

aiohttp by itself repeats PUT and DELETE once when a kept connection turns out to be dead, which may be after
the request was carried out; that is switched off here (`ClientSession._retry_connection`; a test watches).
"""

from __future__ import annotations

import asyncio
import io
import os
import random
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from kvstore.addresses import DEFAULT_URL
from kvstore.client.results import NO_ROUTER_NEXT_STEP, Answer, document_of
from kvstore.errors import KvError, Locked, OutcomeUnknown, Unavailable, from_problem

CONNECT_TIMEOUT_S = 5.0
RETRY_WAIT_S_MAX = 5.0
RETRY_WAIT_MS_UNNAMED = 100
# A body beyond this is announced first (Expect: 100-continue), so that a refusal arrives before it is sent,
# and handed over as a stream, as aiohttp asks for.
LARGE_BODY_BYTES = 1024 * 1024

_PROBLEM = "application/problem+json"
_UNREACHABLE_NEXT_STEP = "Start the cluster (kvstore up), or give the address of its router."


class Connection:
    """Connections to one router; `Client` documents the arguments."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 3,
        timeout_s: float = 30.0,
        connections_max: int = 100,
        retry_locked: bool = True,
        on_wait: Callable[[KvError, float], None] | None = None,
    ) -> None:
        self.url = base_url(url)
        self._retries = retries
        self._retry_locked = retry_locked
        self._on_wait = on_wait
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._connections_max = connections_max
        self._http: aiohttp.ClientSession | None = None
        # A client that waits for a lock keeps a connection busy: out of `connections_max`, its holder could find none
        # left.
        self._waiting: aiohttp.ClientSession | None = None
        # Every request has a connection of its own: the pooled ones may all be dead without a sign of it.
        self._fresh: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = self._session(self._connections_max)
        self._waiting = self._session(0)
        self._fresh = self._session(0, force_close=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _session(self, connections_max: int, *, force_close: bool = False) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections_max, force_close=force_close),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )
        session._retry_connection = False
        return session

    async def close(self) -> None:
        """Close all connections. The client cannot be used afterwards."""
        sessions = (self._http, self._waiting, self._fresh)
        self._http = self._waiting = self._fresh = None
        for session in sessions:
            if session is not None:
                await session.close()

    # --- one request ----------------------------------------------------------------------------------------

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        writes: bool = False,
        retries: int | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        session: aiohttp.ClientSession | None = None,
    ) -> Answer:
        """One call, repeated while the error names a wait; that it does only if nothing was done.

        `writes`: a broken connection leaves its outcome unknown. `wait_s`: how long the router may hold it, on top of
        `timeout_s`. `session`: other connections than the pooled ones. Returns an answer with a status below 300.
        Raises the KvError of any other; OutcomeUnknown, Unavailable; RuntimeError if the client is not open.
        """
        left = self._retries if retries is None else retries
        while True:
            try:
                answer = await self._send_once(method, path, body, writes, headers, wait_s, session)
                if answer.status < 300:
                    return answer
                raise self._error(answer, writes)
            except KvError as error:
                wait_ms = error.members.get("retry_after_ms")
                if not (error.retryable and left and isinstance(wait_ms, int | float)):
                    raise
                if wait_ms > RETRY_WAIT_S_MAX * 1000 or (isinstance(error, Locked) and not self._retry_locked):
                    raise
                failed = error
            left -= 1
            # Spread out: those who were turned away together should not come back together.
            wait_s = wait_ms / 1000 * random.uniform(1.0, 1.5)
            if self._on_wait is not None:
                self._on_wait(failed, wait_s)
            await asyncio.sleep(wait_s)

    async def _send_once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        writes: bool,
        headers: Mapping[str, str] | None,
        wait_s: float,
        session: aiohttp.ClientSession | None,
    ) -> Answer:
        session = session or (self._waiting if wait_s else self._http)
        if session is None:
            raise RuntimeError("the client is not open: use `async with Client(url) as kv:`")
        total_s = None if self._timeout.total is None else self._timeout.total + wait_s
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_TIMEOUT_S) if wait_s else self._timeout
        large = body is not None and len(body) > LARGE_BODY_BYTES
        try:
            async with session.request(
                method,
                URL(self.url + path, encoded=True),  # otherwise yarl would resolve `..` and re-quote the key
                data=io.BytesIO(body) if large and body else body,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                expect100=large,
            ) as response:
                return Answer(response.status, response.headers, await response.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unavailable(
                f"{self.url} cannot be reached: {_reason(error)}.", next_step=_UNREACHABLE_NEXT_STEP
            ) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            broken = f"The answer of {self.url} did not arrive: {_reason(error)}."
            if writes:
                raise OutcomeUnknown(broken) from error
            raise Unavailable(broken, retry_after_ms=RETRY_WAIT_MS_UNNAMED) from error

    def _error(self, answer: Answer, writes: bool) -> KvError:
        """The error of an answer that is no success. One that no router wrote (a proxy?) proves nothing."""
        if answer.headers.get("Content-Type", "").partition(";")[0].strip() == _PROBLEM:
            error = from_problem(document_of(answer))
            if error.retryable and "retry_after_ms" not in error.members:
                seconds = answer.headers.get("Retry-After", "")
                error.members["retry_after_ms"] = int(seconds) * 1000 if seconds.isdecimal() else RETRY_WAIT_MS_UNNAMED
            return error
        what = f"{self.url} answered {answer.status} without a problem document: that is no router of kvstore."
        if answer.status < 500:
            return KvError(what, next_step=NO_ROUTER_NEXT_STEP)
        return OutcomeUnknown(what) if writes else Unavailable(what, next_step=NO_ROUTER_NEXT_STEP)


def base_url(url: str) -> str:
    """`url` without trailing slash. Raises ValueError unless it is http(s), without query or fragment."""
    parsed = URL(url)
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError(f"{url!r} is no address: give one like {DEFAULT_URL}")
    if parsed.raw_query_string or parsed.raw_fragment:
        raise ValueError(f"{url!r} has a query or fragment: give only scheme, host and port")
    return str(parsed).rstrip("/")


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted ({error.certificate_error})"
    if isinstance(error, aiohttp.ClientSSLError):  # its errno is none of the system's
        return "what listens there does not speak TLS; a router is reached by http://"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error.strerror or error.os_error)
    if isinstance(error, TimeoutError):
        return "it took too long"
    return str(error) or type(error).__name__
