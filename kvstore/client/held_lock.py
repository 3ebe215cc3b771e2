"""A lock held for the length of a block of code: `async with kv.lock("name") as lock`.

Owns: acquiring with an Idempotency-Key, in rounds where the wait is long, giving back what comes too late, renewing in
the background, cancelling the block when the lease is lost, releasing.
Promises: while the block runs uncancelled, the lease has not ended as far as this process can know: its time is
counted from before the request that granted or renewed it was sent, so the client gives up no later than the store
does. (After a wait in the queue it is counted from the answer until the first renewal, which comes at once.)
Who stops to wait (is cancelled, or hears nothing) withdraws what it has asked for: no grant is left without a holder.
Leaves to others: the calls themselves (`client`). Work that was cut off may still be on its way to somewhere: show
`lock.token` with every write, and the store refuses what comes too late.
"""

from __future__ import annotations

import asyncio
import uuid
from types import TracebackType
from typing import Protocol, Self

from kvstore.errors import KvError, Locked, LockLost, OutcomeUnknown

WAIT_ROUND_S = 60.0  # the longest wait that a router takes, if it is not configured otherwise
_RENEWALS_PER_TTL = 3
_WITHDRAW_S = 2.0
_TRIES = 5
_RETRY_S = 0.2
_TRIES_IN_TIME_LEFT = 3


class LockCalls(Protocol):
    """The calls of a client that holding a lock takes."""

    async def acquire(self, name: str, *, ttl: float, wait: float, owner: str, idempotency_key: str | None) -> int:
        """See `Client.acquire`."""

    async def renew(self, name: str, token: int, *, new_connection: bool = False) -> None:
        """See `Client.renew`."""

    async def release(self, name: str, token: int, *, new_connection: bool = False) -> None:
        """See `Client.release`."""

    async def withdraw(self, name: str, idempotency_key: str) -> None:
        """See `Client.withdraw`."""


async def acquire_in_rounds(
    calls: LockCalls, name: str, *, ttl: float, wait: float, owner: str, idempotency_key: str, tries: int = _TRIES
) -> tuple[int, float]:
    """The token, and when it was asked for in the end, by the event loop's clock, in seconds.

    A wait of more than `WAIT_ROUND_S` goes in rounds. Each round has an Idempotency-Key of its own, the first one the
    given; the place in the queue is not kept from one to the next. Raises Locked, OutcomeUnknown, what else the last
    round raises; ValueError if `tries` is below 1.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + wait
    round_s = min(wait, WAIT_ROUND_S)
    while True:
        try:
            return await _acquire_once(calls, name, ttl, round_s, owner, idempotency_key, tries)
        except Locked:
            if wait <= WAIT_ROUND_S or until_s <= loop.time():
                raise
        except (asyncio.CancelledError, OutcomeUnknown):
            await _withdraw(calls, name, idempotency_key)
            raise
        await asyncio.sleep(_RETRY_S)
        round_s = min(max(0.0, until_s - loop.time()), WAIT_ROUND_S)
        idempotency_key = str(uuid.uuid4())


async def _acquire_once(
    calls: LockCalls, name: str, ttl: float, wait: float, owner: str, idempotency_key: str, tries: int
) -> tuple[int, float]:
    """An unknown outcome is settled by asking again with the same key: a grant that was made is answered again."""
    for number in range(1, tries + 1):
        asked_s = asyncio.get_running_loop().time()
        try:
            token = await calls.acquire(name, ttl=ttl, wait=wait, owner=owner, idempotency_key=idempotency_key)
        except OutcomeUnknown:
            if number == tries:
                raise
            await asyncio.sleep(_RETRY_S * number)
        else:
            return token, asked_s
    raise ValueError("tries is at least 1")


async def _withdraw(calls: LockCalls, name: str, idempotency_key: str) -> None:
    """Best effort, and not for long: what cannot be given back now ends with its ttl."""
    task = asyncio.create_task(calls.withdraw(name, idempotency_key))
    _withdrawals.add(task)  # a second cancellation leaves it to itself
    task.add_done_callback(_forget_withdrawal)
    await asyncio.wait({task}, timeout=_WITHDRAW_S)


_withdrawals: set[asyncio.Task[None]] = set()


def _forget_withdrawal(task: asyncio.Task[None]) -> None:
    _withdrawals.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, else asyncio complains


class HeldLock:
    """Use with `async with`, once. `token` is the fencing token; `lost` tells whether the lease is known to have ended.

    Entering raises Locked when the lock was not released within `wait` seconds; a wait of more than 60 s begins again
    every 60 s, at the end of the queue. Leaving raises LockLost when the lease
    ended before the block did; the block was cancelled then.
    """

    def __init__(
        self, calls: LockCalls, name: str, *, ttl: float, wait: float, owner: str, idempotency_key: str
    ) -> None:
        self.name = name
        self.token = 0
        self.lost = False
        self._calls = calls
        self._ttl_s = ttl
        self._wait_s = wait
        self._owner = owner
        self._idempotency_key = idempotency_key
        self._deadline_s = 0.0
        self._block: asyncio.Task[object] | None = None
        self._renewer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._acquire()
        self._block = asyncio.current_task()
        self._renewer = asyncio.create_task(self._keep())
        return self

    async def _acquire(self) -> None:
        self.token, asked_s = await acquire_in_rounds(
            self._calls,
            self.name,
            ttl=self._ttl_s,
            wait=self._wait_s,
            owner=self._owner,
            idempotency_key=self._idempotency_key,
        )
        # Waiting in the queue is not part of the lease. How long the answer took after the grant is unknown
        # then, so the first renewal comes at once.
        self._deadline_s = (asked_s if not self._wait_s else asyncio.get_running_loop().time()) + self._ttl_s

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = 0.0 if self._wait_s else self._ttl_s / _RENEWALS_PER_TTL
        again = False
        while True:
            await asyncio.sleep(min(pause_s, max(0.0, self._deadline_s - loop.time())))
            asked_s = loop.time()
            try:
                async with asyncio.timeout(max(self._deadline_s - asked_s, 0.0) / _TRIES_IN_TIME_LEFT):
                    await self._calls.renew(self.name, self.token, new_connection=again)
                again = False
                self._deadline_s = asked_s + self._ttl_s
                pause_s = self._ttl_s / _RENEWALS_PER_TTL
            except LockLost:
                break
            except (KvError, TimeoutError):
                again = True
                if loop.time() >= self._deadline_s:
                    break
                pause_s = min(_RETRY_S, self._ttl_s / 10)
        self.lost = True
        if self._block is not None:
            self._block.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.gather(self._renewer, return_exceptions=True)
        if self.lost:
            if self._block is not None:
                self._block.uncancel()  # also if the block kept the cancellation to itself: it was ours
            raise LockLost(f"the lease on {self.name!r} with token {self.token} ended before the block did.") from error
        await self._release(quietly=kind is not None)

    async def _release(self, *, quietly: bool) -> None:
        try:
            await self._calls.release(self.name, self.token)
        except OutcomeUnknown:
            pass  # released, or it ends by itself within its ttl
        except KvError:
            if not quietly:
                raise
