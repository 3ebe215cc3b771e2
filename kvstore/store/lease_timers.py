"""Timers of leases: who rings when a lease's time is over.

Owns: one timer a name, however often its lease is renewed.
Promises: a lease that stands is looked at when its time has passed, and again and again until it is ended; never ended
here.
Leaves to others: what a lease is and whether it is over (`transactions.locks`), its end as a change (`leases`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.environment import Environment
from kvstore.store.ops import Locks
from kvstore.transactions.locks import Lease

RETRY_S = 0.1  # after which the end of a lease is tried again, should the queue of writes be full


class LeaseTimers:
    """One timer for each name with a lease.

    `expire` is called with a name whose lease should have ended, again and again until it has.
    """

    def __init__(self, locks: Locks, environment: Environment, expire: Callable[[str], None]) -> None:
        self._locks = locks
        self._environment = environment
        self._expire = expire
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}

    def start(self, lease: Lease) -> None:
        """The grant or renewal is visible: from now on the lease's time runs."""
        now_s = self._environment.monotonic_s()
        self._locks.start(lease, now_s)
        at_s, timer = self._timers.get(lease.name, (0.0, None))
        if timer is not None and at_s > now_s + lease.ttl_s:
            timer.cancel()  # it was set for an earlier, longer lease on that name
            timer = None
        if timer is None:
            self._watch(lease.name, lease.ttl_s)

    def close(self) -> None:
        """Cancel all timers."""
        for _, timer in self._timers.values():
            timer.cancel()

    def _watch(self, name: str, delay_s: float) -> None:
        timer = self._environment.call_later(delay_s, self._ring, name)
        self._timers[name] = self._environment.monotonic_s() + delay_s, timer

    def _ring(self, name: str) -> None:
        """It looks when it rings, and sleeps on if it is early."""
        del self._timers[name]
        lease = self._locks.lease(name)
        if lease is not None:
            left_s = lease.left_s(self._environment.monotonic_s())
            if left_s <= 0:
                self._expire(name)
            self._watch(name, max(left_s, RETRY_S))
