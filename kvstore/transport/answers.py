"""The account of answers that are made and not taken by their clients yet.

Owns: the bound on their bytes in sum, the wait for room in it, and the end of connections that do not read.
Promises:
  - An answer of at least `SMALL_BYTES` is on the account before its bytes are handed to a connection, and until the
    connection has taken them. Connections hold at most twice that besides.
  - A request that finds no room waits, in order of arrival and for at most `answer_wait_s`; then it is 429. An eighth
    of the room is kept for answers of at most a 128th of it, which have a line of their own: single values do not wait
    behind pages, nor behind batches, which are many small ones in one.
  - A client that does not take what was written to it within `transfer_timeout_s` loses its connection. While others
    wait for room, so does one that took nothing at all for `answer_stall_s`.
Leaves to others: what an answer costs (`transport.http`, `router`), requests and connections (`transport.http`).

Why small answers are not on the account: each costs two additions at most, and the sum over all connections is bounded
by their number.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, NamedTuple

from kvstore.config import Limits
from kvstore.errors import TooManyRequests

SMALL_BYTES = 16_384
LARGE_BYTES = 65_536  # from here on in pieces, each in its turn
_WAITERS_MAX = 256
_LOOK_S = 0.2
_CUT_AT_ONCE = 2  # what each held is freed, and given to others, in the same turn of the event loop
_CUT_PAUSE_S = 0.01
_PAUSE_S_MIN = 0.001  # the event loop's timers know no less


class _Waiter(NamedTuple):
    size: int
    granted: asyncio.Future[None]


class _Line(NamedTuple):
    """Requests that wait, in their order, for the part of the bound that is open to them."""

    open_bytes: int
    waiters: deque[_Waiter]

    def fits(self, size: int, under_way_bytes: int) -> bool:
        """What is larger than that part fits alone."""
        return under_way_bytes + size <= self.open_bytes or not under_way_bytes


class _Reader:
    """A client that is waited for: how much it has still to take, and since when that number stands."""

    __slots__ = ("left", "protocol", "since_s")

    def __init__(self, protocol: Any, now_s: float) -> None:
        self.protocol = protocol
        self.left = protocol.transport.get_write_buffer_size()
        self.since_s = now_s

    def note(self, now_s: float) -> None:
        transport = self.protocol.transport
        left = 0 if transport is None else transport.get_write_buffer_size()
        if left < self.left:
            self.since_s = now_s
        self.left = left


def no_room() -> TooManyRequests:
    """The TooManyRequests of a request for which there was no room in time."""
    return TooManyRequests("too many large answers are under way; ask for less, or later.", retry_after_ms=500)


class Turns:
    """`async with turns:` runs one piece of heavy work at a time, in order of arrival.
    For half of the time at most.

    Without it, all that became ready at once would be done in one turn of the event loop, and everything else, whose
    way takes several turns, would wait for as much in each of them.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._began_s = 0.0
        self._owed_s = 0.0  # to all others

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        self._began_s = time.perf_counter()

    async def __aexit__(self, *_: object) -> None:
        self._owed_s += time.perf_counter() - self._began_s
        pause_s = self._owed_s if self._owed_s >= _PAUSE_S_MIN else 0.0
        self._owed_s -= pause_s
        try:
            await asyncio.sleep(pause_s)
        finally:
            self._lock.release()


class AnswerAccount:
    """A share of `answer_bytes_in_flight_max`, with a line of its own: who waits here delays none in another line."""

    def __init__(self, limits: Limits, share: float = 1.0) -> None:
        self.under_way_bytes = 0
        self.bytes_max = int(limits.answer_bytes_in_flight_max * share)
        self.turns = Turns()  # for making large answers
        self.streams_unread = 0  # requests whose answer has begun and waits for its reader
        self._wait_s = limits.answer_wait_s
        self._stall_s = limits.answer_stall_s
        self._transfer_timeout_s = limits.transfer_timeout_s
        self._small = _Line(self.bytes_max, deque())
        self._large = _Line(self.bytes_max - self.bytes_max // 8, deque())
        self._readers: set[_Reader] = set()
        self._look: asyncio.TimerHandle | None = None

    # --- room ---------------------------------------------------------------------------------------------------------

    def try_reserve(self, size: int, *, is_part: bool = False) -> bool:
        """Take `size` bytes if there is room and no earlier request waits for it; `is_part` of a large answer."""
        if not self.has_room(size, is_part=is_part):
            return False
        self.under_way_bytes += size
        return True

    def has_room(self, size: int, *, is_part: bool = False) -> bool:
        """Whether `try_reserve` would take `size` bytes now."""
        line = self._line_of(size, is_part)
        return not line.waiters and line.fits(size, self.under_way_bytes)

    def _line_of(self, size: int, is_part: bool) -> _Line:
        return self._small if size <= self.bytes_max >> 7 and not is_part else self._large

    @property
    def _is_waited_for(self) -> bool:
        return bool(self._small.waiters or self._large.waiters)

    async def reserve(self, size: int, *, is_part: bool = False) -> None:
        """Take `size` bytes as soon as there is room.

        Raises TooManyRequests (`no_room`) after `answer_wait_s`, or at once if too many wait. The caller gives them
        back by `release`.
        """
        if self.try_reserve(size, is_part=is_part):
            return
        waiters = self._line_of(size, is_part).waiters
        if len(waiters) >= _WAITERS_MAX:
            raise no_room()
        waiter = _Waiter(size, asyncio.get_running_loop().create_future())
        waiters.append(waiter)
        self._look_at_readers()
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter.granted
        except TimeoutError:
            self._withdraw(waiter, waiters)
            raise no_room() from None
        except BaseException:
            self._withdraw(waiter, waiters)
            raise

    def _withdraw(self, waiter: _Waiter, waiters: deque[_Waiter]) -> None:
        if waiter.granted.done() and not waiter.granted.cancelled():
            self.release(waiter.size)
        else:
            waiters.remove(waiter)
            self._grant()

    def charge(self, size: int) -> None:
        """Take `size` bytes, room or not."""
        self.under_way_bytes += size

    def release(self, size: int) -> None:
        """Give `size` bytes back."""
        self.under_way_bytes -= size
        if self._small.waiters or self._large.waiters:
            self._grant()

    def _grant(self) -> None:
        for line in (self._small, self._large):
            while line.waiters and line.fits(line.waiters[0].size, self.under_way_bytes):
                waiter = line.waiters.popleft()
                if not waiter.granted.done():
                    self.under_way_bytes += waiter.size
                    waiter.granted.set_result(None)

    # --- readers ------------------------------------------------------------------------------------------------------

    def deadline_s(self) -> float:
        """Until when a client has to take what is written to it now, by the clock of the event loop."""
        return asyncio.get_running_loop().time() + self._transfer_timeout_s

    async def drain(self, protocol: Any, deadline_s: float = 0.0) -> None:
        """Wait until the client has taken what was written to it, but for a little.

        `deadline_s`: by the clock of the event loop; 0: from now on as long as it may. `protocol`: aiohttp's, of the
        connection. Raises ConnectionResetError when it does not, and is cut off, or left.
        """
        transport = protocol.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        if not protocol.writing_paused:
            return
        reader = _Reader(protocol, asyncio.get_running_loop().time())
        self._readers.add(reader)
        if self._is_waited_for:
            self._look_at_readers()
        try:
            async with asyncio.timeout_at(deadline_s or self.deadline_s()):
                await protocol._drain_helper()
        except TimeoutError:
            transport.abort()
            raise ConnectionResetError("the client does not read its answer") from None
        finally:
            self._readers.discard(reader)
        if protocol.transport is None:
            raise ConnectionResetError("the client has left")

    def _look_at_readers(self, after_s: float = _LOOK_S) -> None:
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(after_s, self._cut_stalled)

    def _cut_stalled(self) -> None:
        """While requests wait for room: end the connections of clients that take nothing, a few at a time."""
        self._look = None
        if not self._is_waited_for:
            return
        now_s = asyncio.get_running_loop().time()
        stalled: list[_Reader] = []
        for reader in self._readers:
            reader.note(now_s)
            if now_s - reader.since_s >= self._stall_s and reader.protocol.transport is not None:
                stalled.append(reader)
        stalled.sort(key=lambda reader: reader.since_s)
        for reader in stalled[:_CUT_AT_ONCE]:
            reader.protocol.transport.abort()
            self._readers.discard(reader)
        self._look_at_readers(_CUT_PAUSE_S if len(stalled) > _CUT_AT_ONCE else _LOOK_S)


class Room:
    """What one request has on the account; `async with Room(account) as room:` gives back what is left of it."""

    def __init__(self, account: AnswerAccount, *, is_parts: bool = False) -> None:
        """`is_parts`: what is added are parts of an answer that may be large, however small they are."""
        self.account = account
        self._is_parts = is_parts
        self.bytes = 0
        self._closed = False
        self._was_refused = False

    async def __aenter__(self) -> Room:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def has_room(self, size: int) -> bool:
        """Whether `add` would take `size` bytes without waiting."""
        return self.account.has_room(size, is_part=self._is_parts)

    async def add(self, size: int) -> None:
        """Take more, and wait for it if need be, until that was in vain once. Raises TooManyRequests (`no_room`)."""
        if self._was_refused and not self.has_room(size):
            raise no_room()
        try:
            await self.account.reserve(size, is_part=self._is_parts)
        except TooManyRequests:
            self._was_refused = True
            raise
        self.bytes += size

    def change(self, by: int) -> None:
        """What was reserved turned out to be larger, or smaller, by so much."""
        if self._closed:
            return
        self.bytes += by
        if by > 0:
            self.account.charge(by)
        elif by < 0:
            self.account.release(-by)

    def take(self, size: int) -> None:
        """Reduce to `size` and leave that to the caller, who releases it on the account."""
        self.change(size - self.bytes)
        self.bytes = 0

    def close(self) -> None:
        """Give back all of it."""
        if not self._closed:
            self._closed = True
            left, self.bytes = self.bytes, 0
            if left:
                self.account.release(left)
