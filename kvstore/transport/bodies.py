"""Bodies of requests, received within a bound on all that are under way together.

Owns: which bodies are refused unread, how much memory bodies may take in sum, how long a client may take to send one.
Promises: a body over its limit is refused before it is buffered whole. A body counts for what has arrived of it and a
small step more, whatever it announces. A client that sends nothing for `body_stall_s`, or has not sent all of it within
`transfer_timeout_s`, is answered 408.
Leaves to others: what a body means.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http import HttpVersion11

from kvstore.config import Limits
from kvstore.errors import (
    BadRequest,
    BodyTooLarge,
    ContentEncodingRefused,
    ExpectationFailed,
    KvError,
    NotImplementedYet,
    RequestTimeout,
    TooManyRequests,
    ValueTooLarge,
)
from kvstore.transport.http.requests import Head
from kvstore.transport.http.server import CONTINUE

_STEP_BYTES = 16_384


class BodyReader:
    """Reads bodies. `receiving`: requests whose client is still sending; `under_way_bytes`: what these count for."""

    def __init__(self, limits: Limits) -> None:
        self._under_way_bytes_max = limits.body_bytes_in_flight_max
        self._transfer_timeout_s = limits.transfer_timeout_s
        self._stall_s = limits.body_stall_s
        self.under_way_bytes = 0
        self.receiving = 0

    async def read(
        self, request: web.BaseRequest, head: Head, bytes_max: int, too_large: type[ValueTooLarge | BodyTooLarge]
    ) -> bytes:
        """The whole body. Raises `too_large` before it is buffered whole, TooManyRequests, ContentEncodingRefused,
        BadRequest, NotImplementedYet, RequestTimeout and ExpectationFailed."""
        fields = head.fields
        if "content-encoding" in fields and fields["content-encoding"].lower() != "identity":
            raise ContentEncodingRefused(f"Content-Encoding: {fields['content-encoding']!a} is not taken.")
        if "content-range" in fields:
            raise BadRequest("Content-Range is not taken: a value is written whole.")
        if fields.get("transfer-encoding", "chunked").lower() != "chunked":  # the parser undoes chunks, nothing else
            raise NotImplementedYet(
                f"Transfer-Encoding: {fields['transfer-encoding']!a} is not taken; only chunked is."
            )
        announced = int(fields.get("content-length", 0))
        if announced > bytes_max:
            raise too_large(f"the body has {announced} bytes; the limit is {bytes_max}.", bytes_max=bytes_max)
        if "expect" in fields:
            await self._answer_expect(request, fields["expect"])
        if request.content.is_eof():
            body: bytes = request.content.read_nowait(-1)
            if len(body) > bytes_max:
                raise too_large(f"the body is over the limit of {bytes_max} bytes.", bytes_max=bytes_max)
            return body
        self.receiving += 1
        reservation = _Reservation(self, announced or bytes_max)
        try:
            return await self._receive(request, reservation, bytes_max, too_large)
        finally:
            self.receiving -= 1
            reservation.give_back()

    async def _receive(
        self, request: web.BaseRequest, reservation: _Reservation, bytes_max: int, too_large: type[KvError]
    ) -> bytes:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._transfer_timeout_s
        chunks: list[bytes] = []
        size = 0
        reservation.extend_to(0)
        try:
            async with asyncio.timeout_at(min(end_s, loop.time() + self._stall_s)) as timeout:
                async for chunk in request.content.iter_any():
                    size += len(chunk)
                    if size > bytes_max:
                        raise too_large(f"the body is over the limit of {bytes_max} bytes.", bytes_max=bytes_max)
                    reservation.extend_to(size)
                    chunks.append(chunk)
                    timeout.reschedule(min(end_s, loop.time() + self._stall_s))
        except TimeoutError:
            if loop.time() >= end_s:
                raise RequestTimeout(f"the body had not arrived after {self._transfer_timeout_s:g} s.") from None
            raise RequestTimeout(f"nothing more of the body arrived for {self._stall_s:g} s.") from None
        return b"".join(chunks)

    def reserve(self, size: int) -> None:
        """Count `size` bytes more as under way. Raises TooManyRequests."""
        if self.under_way_bytes + size > self._under_way_bytes_max:
            raise TooManyRequests("too many bodies are under way.", retry_after_ms=200)
        self.under_way_bytes += size

    async def _answer_expect(self, request: web.BaseRequest, expectation: str) -> None:
        if expectation.lower() != "100-continue":
            raise ExpectationFailed(f"Expect: {expectation!a} is unknown.")
        if request.version >= HttpVersion11:
            await request.writer.write(CONTINUE)


class _Reservation:
    """What one body counts for: what has arrived and a step more, but never more than it can have."""

    def __init__(self, bodies: BodyReader, bytes_max: int) -> None:
        self._bodies = bodies
        self._bytes_max = bytes_max
        self._bytes = 0

    def extend_to(self, arrived: int) -> None:
        """Raises TooManyRequests."""
        wanted = min(self._bytes_max, arrived + _STEP_BYTES)
        if wanted > self._bytes:
            self._bodies.reserve(wanted - self._bytes)
            self._bytes = wanted

    def give_back(self) -> None:
        self._bodies.under_way_bytes -= self._bytes
        self._bytes = 0
