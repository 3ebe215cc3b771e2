"""Operations on leases that only look, or leave a queue: they pass every lock.

Owns: what an inspection shows; how a waiter leaves the queue of a lease.
Promises: nothing of a lease changes while its name carries an intent: then these operations look only.
Leaves to others: grants and ends (`leases`), waiting for locks (`lock_waits`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore.errors import Locked
from kvstore.protocol import Answer, CancelWait, GetLock
from kvstore.store.leases import Leases
from kvstore.store.ops import EndWait
from kvstore.store.refusals import refusal
from kvstore.store.write_set import Sink, WriteSet
from kvstore.transactions.locks import Lease, LockTable


class LeaseQueues:
    """The operations on leases that look or leave, in one batch."""

    def __init__(self, changes: WriteSet, locks: LockTable[Any, Any], leases: Leases) -> None:
        self._changes = changes
        self._locks = locks
        self._leases = leases

    def _look(self, name: str, partition: int) -> Lease | None:
        return self._leases.on(name, partition) if self._locks.is_free(name) else self._locks.lease(name)

    def inspect(self, op: GetLock, partition: int, sink: Sink) -> Answer:
        """Who holds the name, as JSON, with the token as version; 404 if it is free."""
        lease = self._look(op.key, partition)
        if lease is None:
            return Answer(op.id, 404)
        waiting = len(self._locks.waiting_for_lease(lease.name))
        left_s = round(lease.left_s(self._changes.context.now_s), 3)
        document = {"name": lease.name, "owner": lease.owner, "ttl_left": left_s, "waiting": waiting}
        return Answer(op.id, 200, lease.token, msgspec.json.encode(document | {"token": lease.token}))

    def end_wait(self, op: EndWait, partition: int, sink: Sink) -> Answer:
        """The waiter has waited long enough."""
        lease = self._look(op.key, partition)
        for waiter in self._locks.waiting_for_lease(op.key):
            if waiter[0] is op.acquire and lease is not None:
                self._locks.leave_lease_queue(op.key, waiter)
                self._changes.answer(waiter[1], refusal(op.acquire.id, self._leases.locked(lease)))
        return Answer(op.id, 200)

    def leave(self, op: CancelWait, partition: int, sink: Sink) -> Answer:
        """The waiter that asked over this connection waits no longer: it is answered with Locked."""
        for waiter in self._locks.waiting_for_lease(op.key):
            if waiter[0].id == op.acquire and waiter[1] is sink:
                self._locks.leave_lease_queue(op.key, waiter)
                gone = Locked(f"the waiter for {op.key!r} has left the queue.", retry_after_ms=100)
                self._changes.answer(sink, refusal(op.acquire, gone))
        return Answer(op.id, 200)
