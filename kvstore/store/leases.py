"""Leases in a batch: grant, renewal, release and expiry as changes of rows, with the fencing token.

Owns: the operations on leases, the form of a lease's row, the fence that other writes must pass.
Promises: a lease past its deadline is ended by whichever operation meets it, as a change of its own; when one ends,
the next waiter who is still there has the next one in the same batch. Nothing of a lease changes while its name
carries an intent: the operations that change it wait for that name's lock, and those that only look change nothing.
Leaves to others: the table of leases and its queues (`transactions.locks`), timers (`lease_timers`), kept replies
(`idempotency`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore import failpoints
from kvstore.errors import Locked, LockLost
from kvstore.model import IdempotencyKey
from kvstore.protocol import Acquire, Answer, Release, Renew
from kvstore.storage.rows import LEASE, Row
from kvstore.store.idempotency import Idempotency, IdempotencyRecord, row_key
from kvstore.store.ops import ExpireLease
from kvstore.store.refusals import failure, queue_full, refusal
from kvstore.store.write_set import Sink, WriteSet
from kvstore.transactions.locks import Lease, LockTable


class LeaseBody(msgspec.Struct):
    """The body of a lease's row."""

    owner: str
    ttl_ms: int


class Leases:
    """The leases, as one batch changes them.

    `started`: leases whose time runs from when the batch is visible. `parked`: who began to wait in it.
    """

    def __init__(self, changes: WriteSet, locks: LockTable[Any, Any], idempotency: Idempotency) -> None:
        self.started: list[Lease] = []
        self.parked: list[tuple[Acquire, Sink]] = []
        self._changes = changes
        self._locks = locks
        self._idempotency = idempotency

    # --- for all who write --------------------------------------------------------------------------------------------

    def on(self, name: str, partition: int) -> Lease | None:
        """The lease on the name, after the expiry that was due; None without one.

        The name's lock must be free or the caller's.
        """
        lease = self._locks.lease(name)
        if lease is not None and lease.deadline_s <= self._changes.context.now_s:
            self._end(name, partition)
            lease = self._locks.lease(name)
        return lease

    def fence(self, name: str, token: int | None, partition: int) -> None:
        """Let a write of the name pass, or refuse it: the check of the fencing token.

        Raises Locked if the name is leased and the write shows no token, LockLost if `token` is not that of the lease.
        """
        lease = self.on(name, partition)
        if failpoints.planted("ignore-token"):
            return
        if lease is not None and token is None:
            raise self.locked(lease)
        if token is not None and (lease is None or lease.token != token):
            raise _lost(name, token)

    def locked(self, lease: Lease) -> Locked:
        """The error of a client that does not hold it."""
        left_ms = round(lease.left_s(self._changes.context.now_s) * 1000)
        holder = f"by {lease.owner!r}" if lease.owner else "by a client without a name"
        return Locked(
            f"the lock {lease.name!r} is held {holder} for another {left_ms / 1000:g} s at most.",
            owner=lease.owner,
            ttl_left=left_ms / 1000,
            retry_after_ms=min(max(left_ms, 50), 1000),
        )

    def restore(self, row: Row) -> None:
        """A lease that was granted elsewhere, or before the store was opened."""
        body = msgspec.json.decode(row.body or b"", type=LeaseBody)
        self._start(self._locks.grant(row.key, body.owner, row.version, body.ttl_ms / 1000))

    def _start(self, lease: Lease) -> None:
        self._changes.undo.note_length(self.started)
        self.started.append(lease)

    # --- the operations -----------------------------------------------------------------------------------------------

    def acquire(self, op: Acquire, partition: int, sink: Sink) -> Answer | None:
        """Grant the lease and answer 201 with its token; None where the client waits for it.

        Raises Locked if the name is leased and `wait_ms` is 0, TooManyRequests if too many wait, DiskFull.
        """
        lease = self.on(op.key, partition)
        if lease is None:
            return self._grant(op, partition, sink)
        if not op.wait_ms:
            raise self.locked(lease)
        try:
            self._locks.queue_for_lease(op.key, (op, sink))
        except OverflowError:
            raise queue_full(op.key) from None
        self._changes.undo.note_length(self.parked)
        self.parked.append((op, sink))
        return None

    def _grant(self, op: Acquire, partition: int, sink: Sink) -> Answer:
        self._changes.need_room()
        body = msgspec.json.encode(LeaseBody(op.owner, op.ttl_ms))
        token = self._changes.write(LEASE, op.key, partition, body)
        lease = self._locks.grant(op.key, op.owner, token, op.ttl_ms / 1000)
        lease.granted_to = op, sink
        self._start(lease)
        if op.once is not None:
            self._answer_duplicates(lease, op.once)
        return Answer(op.id, 201, token)

    def _answer_duplicates(self, lease: Lease, once: IdempotencyKey) -> None:
        """Who repeated the request while it waited gets the same answer."""
        for waiter in self._locks.waiting_for_lease(lease.name):
            if isinstance(waiter[0], Acquire) and waiter[0].once == once:
                lease.granted_to = None
                self._locks.leave_lease_queue(lease.name, waiter)
                self._changes.answer(waiter[1], Answer(waiter[0].id, 201, lease.token))

    def renew(self, op: Renew, partition: int, sink: Sink) -> Answer:
        """Begin the lease's time again. Raises LockLost if the token is not the holder's."""
        return self.restart(self._held(op, partition), op.id, 200)

    def release(self, op: Release, partition: int, sink: Sink) -> Answer:
        """End the lease, or what an acquire may yet come to: see `protocol.Release`.

        Raises LockLost if the token is not the holder's, or the grant was told to another client than that one.
        """
        if op.withdraw is not None:
            return self._withdraw(op, op.withdraw, partition)
        lease = self._held(op, partition)
        if op.acquire:
            acquire, asker = lease.granted_to or (None, None)
            if acquire is None or asker is not sink or acquire.id != op.acquire:
                raise _lost(op.key, op.token)
            if acquire.once is not None:
                self._idempotency.forget(row_key("Acquire", op.key, acquire.once), partition)
        self._end(op.key, partition)
        return Answer(op.id, 204)

    def _withdraw(self, op: Release, key: str, partition: int) -> Answer:
        """The client no longer wants what was asked for with that Idempotency-Key: who waits leaves, what was granted
        ends, and what comes late is refused."""
        over = LockLost(f"the acquire of {op.key!r} with this Idempotency-Key was withdrawn.")
        for waiter in self._locks.waiting_for_lease(op.key):
            once = waiter[0].once
            if once is not None and once.key == key:
                self._locks.leave_lease_queue(op.key, waiter)
                self._changes.answer(waiter[1], refusal(waiter[0].id, over))
        reply = row_key("Acquire", op.key, IdempotencyKey(key, ""))
        lease = self.on(op.key, partition)
        if lease is not None and lease.token == self._idempotency.granted(reply):
            self._end(op.key, partition)
        self._idempotency.keep(reply, partition, IdempotencyRecord("", over.status, 0, over.problem()))
        return Answer(op.id, 204)

    def restart(self, lease: Lease, op_id: int, status: int) -> Answer:
        """The lease's time begins again when this batch is visible, and does not end before."""
        self._locks.suspend(lease)
        self._changes.undo.note_attribute(lease, "granted_to")
        lease.granted_to = None
        self._start(lease)
        return Answer(op_id, status, lease.token, value=lease.owner.encode(), ttl_left_ms=round(lease.ttl_s * 1000))

    def _held(self, op: Renew | Release, partition: int) -> Lease:
        lease = self.on(op.key, partition)
        if lease is None or lease.token != op.token:
            raise _lost(op.key, op.token)
        return lease

    def _end(self, name: str, partition: int) -> None:
        """The lease is over; the first waiter who is still there has the next one."""
        self._locks.end(name)
        self._changes.write(LEASE, name, partition, None)
        while self._locks.lease(name) is None and (waiter := self._locks.next_for_lease(name)) is not None:
            op, sink = waiter
            if not sink.closed and isinstance(op, Acquire):
                self._go_on(op, partition, sink)

    def _go_on(self, op: Acquire, partition: int, sink: Sink) -> None:
        """The waiter asks again, within another operation, which must not fail with it."""
        savepoint = self._changes.savepoint()
        try:
            reply = self._idempotency.run(op, partition, lambda: self.acquire(op, partition, sink), self.repeated)
        except Exception as error:
            self._changes.back_to(savepoint)
            reply = failure(op, error)
        if reply is not None:
            self._changes.answer(sink, reply)

    def repeated(self, op: Any, kept: IdempotencyRecord, partition: int) -> Answer:
        """The answer to a request that was answered before. Raises LockLost for an acquire whose grant is over."""
        if isinstance(op, Acquire) and kept.status == 201:
            lease = self.on(op.key, partition)
            if lease is None or lease.token != kept.version:
                raise LockLost(f"The grant with token {kept.version} that this key was answered with is over.")
            return self.restart(lease, op.id, 201)
        return Answer(op.id, kept.status, kept.version, kept.owner.encode() or None, kept.ttl_ms, kept.problem)

    def expire(self, op: ExpireLease, partition: int, sink: Sink) -> Answer:
        """End the lease if its time has passed; answers 200 in any case."""
        self.on(op.key, partition)
        return Answer(op.id, 200)


def _lost(name: str, token: int) -> LockLost:
    return LockLost(f"the lock {name!r} is not held with token {token}.")
