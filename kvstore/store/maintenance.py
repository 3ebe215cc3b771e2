"""What a store does by itself.
Expiry, the trimming of tombstones, the end of waits and leases that take too long.

Owns: the sweeps and their rates; the timers of leases and of waiters.
Promises: expiry is a change, made by an operation of its own, never by a look at a clock. No operation waits for a
lock, or reads under one, for longer than a transaction may take. A tombstone is kept for `tombstone_kept_s` at least.
Leaves to others: what an expiry changes (`batch`), removing trimmed tombstones (`applier`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial

from kvstore.errors import DataCorrupt, TooManyRequests, from_problem
from kvstore.protocol import Acquire, Answer, Reply
from kvstore.storage.engine import TryLater
from kvstore.store.applier import Applier
from kvstore.store.batch import Batch
from kvstore.store.lease_timers import RETRY_S, LeaseTimers
from kvstore.store.ops import EndLockWaits, EndReads, EndWait, Expire, ExpireLease
from kvstore.store.pipeline import Pipeline, settle
from kvstore.store.sinks import DISCARD, Then
from kvstore.store.tables import Tables

log = logging.getLogger(__name__)

_TRIM_ROWS_MAX = 500


class Maintenance:
    """The sweeps and timers of one store."""

    def __init__(self, tables: Tables, pipeline: Pipeline, applier: Applier) -> None:
        self._tables = tables
        self._pipeline = pipeline
        self._applier = applier
        self._lease_timers = LeaseTimers(
            tables.locks, tables.environment, lambda name: pipeline.write(ExpireLease(name), DISCARD)
        )

    def close(self) -> None:
        """Stop the timers."""
        self._lease_timers.close()

    def publish(self, batch: Batch) -> None:
        """The leases of the batch begin to run, and so do the waits for leases."""
        for lease in batch.leases.started:
            self._lease_timers.start(lease)
        for op, _ in batch.leases.parked:
            self._tables.environment.call_later(op.wait_ms / 1000, self._end_wait, op)

    def _end_wait(self, op: Acquire) -> None:
        """If the queue of writes is full, again soon.
        Else the waiter would stay, and be granted a lease in vain."""

        def look(reply: Reply) -> None:
            if isinstance(reply, Answer) and reply.status == TooManyRequests.status:
                self._tables.environment.call_later(RETRY_S, self._end_wait, op)

        self._pipeline.write(EndWait(op.key, op), Then(look))

    # --- expiry -------------------------------------------------------------------------------------------------------

    async def expire(self, ops: list[Expire]) -> None:
        """Have these expiries made, and wait until they are visible. Raises TooManyRequests, DataCorrupt, as a KvError.

        A row whose partition has left is passed over: its new owner expires it.
        """
        loop = asyncio.get_running_loop()
        for start in range(0, len(ops), self._tables.limits.expiry_ops_max):
            answers = []
            for op in ops[start : start + self._tables.limits.expiry_ops_max]:
                future: asyncio.Future[Reply] = loop.create_future()
                answers.append(future)
                self._pipeline.write(op, Then(partial(settle, future)))
            for answer in await asyncio.gather(*answers):
                if isinstance(answer, Answer) and answer.status in (TooManyRequests.status, DataCorrupt.status):
                    raise from_problem(answer.problem or {})

    async def _expire_due(self) -> None:
        tables = self._tables
        count_max = tables.limits.expiry_ops_max
        while found := await tables.engine.due(tables.environment.now_ms(), tables.served.generations, count_max):
            await self.expire([Expire(key, kind, partition) for kind, key, partition in found])
            await self._applier.flush()  # or what was just expired would be found again
            if len(found) < count_max:
                return

    async def sweep(self) -> None:
        """Expire what is due, at whatever rate that is, for ever."""
        while True:
            await self._tables.environment.sleep(self._tables.limits.expiry_sweep_s)
            try:
                await self._expire_due()
            except (TooManyRequests, TryLater) as error:
                log.debug("the sweep goes on later: %s", error)
            except DataCorrupt as error:
                log.error("%s", error)

    # --- tombstones ---------------------------------------------------------------------------------------------------

    async def trim(self) -> None:
        """Trim the tombstones that are old enough, at whatever rate they are made, for ever."""
        tables = self._tables
        marks: deque[tuple[float, int]] = deque()
        while True:
            await tables.environment.sleep(tables.limits.expiry_sweep_s)
            now_s = tables.environment.monotonic_s()
            if not marks or now_s - marks[-1][0] >= 1.0:
                marks.append((now_s, tables.visible.sequence))
            while marks and now_s - marks[0][0] >= tables.limits.tombstone_kept_s:
                if not await self.trim_some(marks[0][1], _TRIM_ROWS_MAX):
                    marks.popleft()

    async def trim_some(self, sequence: int, count_max: int) -> bool:
        """Trim up to `count_max` of the oldest tombstones up to that sequence; whether there were any."""
        found = await self._tables.engine.old_tombstones(sequence, count_max)
        if found:
            await self._pipeline.step(lambda batch: batch.changes.raise_floor(0, found))
        return bool(found)

    # --- waits --------------------------------------------------------------------------------------------------------

    async def end_waits(self) -> None:
        """End waits for locks, and read-only transactions, that take too long or whose client is gone, for ever.

        Apart from the sweep, whose expiries may be among those that wait.
        """
        while True:
            await self._tables.environment.sleep(self._tables.limits.expiry_sweep_s)
            self._end_waits()

    def _end_waits(self) -> None:
        tables, limits = self._tables, self._tables.limits
        now_s = tables.environment.monotonic_s()
        since_s = now_s - limits.txn_timeout_s
        if not tables.locks.is_idle:
            plain_s = min(2 * limits.txn_timeout_s, 0.8 * limits.request_timeout_s)  # the router must hear of it
            self._pipeline.write(EndLockWaits(since_s, now_s - plain_s), DISCARD)
        readers = list(tables.holds.readers.items())
        if over := [number for number, hold in readers if hold.is_over(since_s)]:
            self._pipeline.write(EndReads(over), DISCARD)
