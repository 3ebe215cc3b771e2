"""Operations that wait for locks: how they queue, give up, are cancelled, or have waited long enough.

Owns: the queue of each lock, as far as a batch changes it; what a waiter that gives up leaves behind.
Promises: pure but for the lock table, which only batches change. A commit that gives up is aborted for good.
Leaves to others: who goes on (`ready`), what is done then (`batch`), wait-die (`transactions.attempts`).
"""

from __future__ import annotations

from typing import Any

from kvstore.errors import Conflict, KvError
from kvstore.model import IdempotencyKey
from kvstore.protocol import Abort, Acquire, Answer, CancelWait, DecideCommit, Prepare, ReadLock
from kvstore.store.ops import EndLockWaits, Locks, Queued
from kvstore.store.outcomes import Outcomes
from kvstore.store.ready import Ready
from kvstore.store.refusals import queue_full, refusal
from kvstore.store.write_set import Sink, WriteSet
from kvstore.transactions.intents import PreparedTxn, PreparedTxns


class LockWaits:
    """`met`: the attempts that stood in the way of an operation of this batch."""

    def __init__(self, changes: WriteSet, locks: Locks, holds: PreparedTxns, ready: Ready, outcomes: Outcomes) -> None:
        self.met: set[PreparedTxn] = set()
        self._changes = changes
        self._locks = locks
        self._holds = holds
        self._ready = ready
        self._outcomes = outcomes

    def queue(self, key: str, queued: Queued) -> None:
        """Wait for a lock that is not free, without holding any; refused if the queue is full."""
        self.note_met(key)
        try:
            self._locks.lock(key, "exclusive", queued)
        except OverflowError:
            self._changes.answer(queued.sink, refusal(queued.op.id, queue_full(key)))

    def note_met(self, key: str) -> None:
        """The attempt that holds the key stands in the way."""
        hold = self._holds.on(key)
        if hold is not None:
            self.met.add(hold)

    def is_first(self, queued: Queued, key: str) -> bool:
        """The attempt asks for its very first lock."""
        op = queued.op
        return type(op) is Prepare and op.first == key and not queued.gathered and not self._holds.of(op.attempt)

    def is_prepared(self, op: Prepare | DecideCommit | ReadLock, key: str) -> bool:
        """The key carries an intent of this very attempt already."""
        hold = self._holds.on(key)
        return hold is not None and type(op) is Prepare and hold.attempt == op.attempt

    def conflict(self, op: Any, key: str) -> Conflict:
        """The error of an operation in whose way another transaction stands.

        `same_request`: what is ahead is the same request, not yet decided.
        """
        hold = self._holds.on(key)
        once = getattr(op, "once", None)
        once_key = once.key if isinstance(once, IdempotencyKey) else once
        same_request = hold is not None and once_key is not None and hold.once == once_key
        members = {"same_request": True} if same_request else {}
        return Conflict(f"another transaction works on key {key!r}.", retry_after_ms=50, key=key, **members)

    # --- giving up ----------------------------------------------------------------------------------------------------

    def release(self, queued: Queued) -> None:
        """Let go what it has."""
        for key, identity in queued.gathered.items():
            self._ready.unlock(key, identity)
        self._changes.undo.note_attribute(queued, "gathered")
        queued.gathered = {}

    def give_up(self, queued: Queued, error: KvError) -> None:
        """It is refused for good: also when the network repeats it."""
        if isinstance(queued.op, DecideCommit):
            self._outcomes.abort_for_good(queued.op.attempt, queued.op.key)
        self.release(queued)
        self._changes.answer(queued.sink, refusal(queued.op.id, error))

    def leave_queue(self, key: str, queued: Queued, error: KvError) -> None:
        """No-op if an earlier removal already granted the lock."""
        if not any(waiter is queued for waiter in self._locks.waiting(key)):
            return
        self._ready.leave(key, queued)
        self.give_up(queued, error)

    def cancel(self, abort: Abort) -> None:
        """Cancel the attempt's pending lock waits."""
        for key in abort.keys:
            for queued in self._locks.waiting(key):
                if isinstance(queued.op, Prepare | ReadLock) and queued.op.attempt == abort.attempt:
                    self.leave_queue(key, queued, Conflict("the attempt was aborted.", retry_after_ms=50))

    def leave(self, op: CancelWait, sink: Sink) -> None:
        """While a transaction is at work on the name, an acquire waits for its lock."""
        for queued in self._locks.waiting(op.key):
            if isinstance(queued.op, Acquire) and queued.op.id == op.acquire and queued.sink is sink:
                error = Conflict(f"the waiter for {op.key!r} has left.", retry_after_ms=100)
                self.leave_queue(op.key, queued, error)

    def end(self, op: EndLockWaits) -> Answer:
        """End the waits that took too long, and those of connections that are gone."""
        for key, queued in self._locks.all_waiting():
            since_s = op.since_s if isinstance(queued.op, Prepare | DecideCommit | ReadLock) else op.plain_since_s
            if queued.since_s <= since_s or queued.sink.closed:
                self.leave_queue(key, queued, self.conflict(queued.op, key))
        return Answer(op.id, 200)
