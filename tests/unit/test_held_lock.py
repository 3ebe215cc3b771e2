"""A held lock over a store that is a few lines long: renewing, losing, leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvstore.client import held_lock
from kvstore.client.held_lock import HeldLock
from kvstore.errors import KvError, Locked, LockLost, OutcomeUnknown, Unavailable

WAIT_S = 60.0


class Calls:
    """A lock service with one lock. `fail` is raised by the next calls of that kind, `hang` holds renewals."""

    def __init__(self) -> None:
        self.holder = 0
        self.tokens = 0
        self.keys: list[str | None] = []
        self.renewed = asyncio.Event()
        self.renewals = 0
        self.released: list[int] = []
        self.withdrawn: list[str] = []
        self.fail: dict[str, list[Callable[[], BaseException]]] = {"acquire": [], "renew": [], "release": []}
        self.hang = asyncio.Event()
        self.hang.set()
        self.only_old_connections_hang = False

    def _fail(self, kind: str) -> None:
        if self.fail[kind]:
            raise self.fail[kind].pop(0)()

    async def acquire(self, name: str, *, ttl: float, wait: float, owner: str, idempotency_key: str | None) -> int:
        repeated = idempotency_key in self.keys
        self.keys.append(idempotency_key)
        if self.holder and not repeated:
            raise Locked("held")
        if not repeated:
            self.tokens += 1
            self.holder = self.tokens
        self._fail("acquire")
        return self.holder

    async def renew(self, name: str, token: int, *, new_connection: bool = False) -> None:
        if not (new_connection and self.only_old_connections_hang):
            await self.hang.wait()
        self._fail("renew")
        if token != self.holder:
            raise LockLost("not yours")
        self.renewals += 1
        self.renewed.set()

    async def withdraw(self, name: str, idempotency_key: str) -> None:
        self.withdrawn.append(idempotency_key)
        if idempotency_key in self.keys:
            self.holder = 0

    async def release(self, name: str, token: int, *, new_connection: bool = False) -> None:
        self._fail("release")
        if token != self.holder:
            raise LockLost("not yours")
        self.released.append(token)
        self.holder = 0


@pytest.fixture
async def calls() -> Calls:
    return Calls()


def held(calls: Calls, ttl: float = 0.9, wait: float = 0.0) -> HeldLock:
    return HeldLock(calls, "name", ttl=ttl, wait=wait, owner="me", idempotency_key="key")


async def renewals(calls: Calls, count: int) -> None:
    while calls.renewals < count:
        calls.renewed.clear()
        await asyncio.wait_for(calls.renewed.wait(), WAIT_S)


async def test_the_lock_renews_itself_past_its_ttl_and_is_given_back(calls: Calls):
    async with held(calls) as lock:
        assert lock.token == 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        await renewals(calls, 5)
        assert loop.time() - began > 0.9
        assert not lock.lost
    assert calls.released == [1]
    seen = calls.renewals
    await asyncio.sleep(0.4)
    assert calls.renewals == seen


async def test_a_lock_that_another_client_holds_raises_locked_on_entering(calls: Calls):
    calls.holder = calls.tokens = 7
    with pytest.raises(Locked):
        async with held(calls):
            pytest.fail("the block ran")
    assert calls.released == []


async def test_the_block_is_cancelled_when_the_lease_is_lost(calls: Calls):
    reached = []

    async def block() -> None:
        async with held(calls) as lock:
            calls.holder = 2
            try:
                await asyncio.wait_for(asyncio.Event().wait(), WAIT_S)
            except asyncio.CancelledError:
                reached.append(lock.lost)
                raise

    with pytest.raises(LockLost, match="token 1"):
        await block()
    assert reached == [True]
    assert calls.released == []
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("kind", ["swallowed", "another error"])
async def test_a_block_that_does_not_let_the_cancellation_through_ends_in_lock_lost_and_leaves_no_mark(
    calls: Calls, kind: str
):
    async def block() -> None:
        async with held(calls):
            calls.holder = 2
            try:
                await asyncio.wait_for(asyncio.Event().wait(), WAIT_S)
            except asyncio.CancelledError:
                if kind == "another error":
                    raise ValueError("while cleaning up") from None

    with pytest.raises(LockLost):
        await block()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_store_that_does_not_answer_costs_the_lock_no_later_than_its_ttl(calls: Calls):
    loop = asyncio.get_running_loop()
    calls.hang.clear()
    began = loop.time()
    with pytest.raises(LockLost):
        async with held(calls, ttl=0.5):
            await asyncio.wait_for(asyncio.Event().wait(), WAIT_S)
    assert loop.time() - began > 0.4


async def test_a_renewal_that_is_lost_on_a_dead_connection_is_tried_again_on_a_new_one_in_time(calls: Calls):
    calls.hang.clear()
    calls.only_old_connections_hang = True
    async with held(calls, ttl=3.0) as lock:
        await renewals(calls, 1)
        assert not lock.lost
    assert calls.released == [1]


@pytest.mark.parametrize("error", [Unavailable, OutcomeUnknown, lambda: KvError("?")])
async def test_a_renewal_that_fails_is_tried_again_within_the_ttl(calls: Calls, error: Callable[[], BaseException]):
    calls.fail["renew"] = [error, error, error]
    async with held(calls, ttl=2.0) as lock:
        await renewals(calls, 1)
        assert not lock.lost
    assert calls.released == [1]


async def test_an_acquire_of_unknown_outcome_is_asked_again_with_the_same_key(calls: Calls):
    calls.fail["acquire"] = [OutcomeUnknown, OutcomeUnknown]
    async with held(calls, ttl=5) as lock:
        assert lock.token == 1
    assert calls.keys == ["key"] * 3
    assert calls.released == [1]


async def test_after_a_wait_in_the_queue_the_first_renewal_comes_at_once(calls: Calls):
    async with held(calls, ttl=3600, wait=5):
        await renewals(calls, 1)


async def test_an_error_of_the_block_goes_on_and_the_lock_is_given_back(calls: Calls):
    with pytest.raises(ZeroDivisionError):
        async with held(calls, ttl=30):
            _ = 1 / 0
    assert calls.released == [1]


async def test_an_error_of_the_block_is_not_covered_by_one_of_the_release(calls: Calls):
    calls.fail["release"] = [Unavailable]
    with pytest.raises(ZeroDivisionError):
        async with held(calls, ttl=30):
            _ = 1 / 0


async def test_a_block_that_is_cancelled_from_outside_gives_the_lock_back_and_stays_cancelled(calls: Calls):
    entered = asyncio.Event()

    async def block() -> None:
        async with held(calls, ttl=30):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert calls.released == [1]


async def test_a_time_limit_around_the_block_is_still_a_time_limit(calls: Calls):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), held(calls, ttl=30):
            await asyncio.Event().wait()
    assert calls.released == [1]


async def test_a_release_of_unknown_outcome_is_no_error(calls: Calls):
    calls.fail["release"] = [OutcomeUnknown]
    async with held(calls, ttl=30):
        pass


async def test_a_lease_that_was_over_at_the_end_of_the_block_is_told(calls: Calls):
    with pytest.raises(LockLost):
        async with held(calls, ttl=30):
            calls.holder = 9


# --- who stops to wait, and who waits for long ------------------------------------------------------------------------


async def test_an_acquire_that_is_cancelled_is_withdrawn_although_it_was_granted(calls: Calls) -> None:
    granted = asyncio.Event()

    class Slow(Calls):
        async def acquire(self, *args: str, **members: object) -> int:
            await super().acquire(*args, **members)  # type: ignore[arg-type]
            granted.set()
            await asyncio.Event().wait()  # the answer does not come
            return 0

    slow = Slow()
    task = asyncio.create_task(held(slow, wait=5).__aenter__())
    await granted.wait()
    assert slow.holder
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.withdrawn == ["key"]
    assert not slow.holder


async def test_an_acquire_whose_outcome_stays_unknown_is_withdrawn(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_lock, "_RETRY_S", 0.001)
    calls.fail["acquire"] = [lambda: OutcomeUnknown("broken")] * 5
    with pytest.raises(OutcomeUnknown):
        await held(calls).__aenter__()
    assert calls.withdrawn == ["key"]


async def test_a_withdrawal_that_fails_or_hangs_keeps_no_caller_waiting(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_lock, "_WITHDRAW_S", 0.01)
    hang = asyncio.Event()

    async def withdraw(*_: str) -> None:
        await hang.wait()
        raise Unavailable("away")

    monkeypatch.setattr(calls, "withdraw", withdraw)
    calls.fail["acquire"] = [lambda: asyncio.CancelledError()]
    with pytest.raises(asyncio.CancelledError):
        await held(calls).__aenter__()
    hang.set()
    await asyncio.sleep(0)


async def test_a_long_wait_goes_in_rounds_each_with_a_key_of_its_own(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_lock, "_RETRY_S", 0.001)
    monkeypatch.setattr(held_lock, "WAIT_ROUND_S", 0.02)
    waits: list[float] = []
    acquire = calls.acquire

    async def slow(name: str, *, wait: float, **members: object) -> int:
        waits.append(wait)
        await asyncio.sleep(wait)
        if len(waits) == 3:
            calls.holder = 0
        return await acquire(name, wait=wait, **members)  # type: ignore[arg-type]

    monkeypatch.setattr(calls, "acquire", slow)
    calls.holder = 77
    async with held(calls, wait=30.0) as lock:
        assert lock.token
    assert waits == [0.02] * 3
    assert len(set(calls.keys)) == 3
    assert calls.keys[0] == "key"
    assert calls.withdrawn == []


async def test_a_long_wait_ends_when_its_time_is_over(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_lock, "_RETRY_S", 0.001)
    monkeypatch.setattr(held_lock, "WAIT_ROUND_S", 0.02)
    calls.holder = 77
    with pytest.raises(Locked):
        await held(calls, wait=0.1).__aenter__()
    assert len(calls.keys) > 1
