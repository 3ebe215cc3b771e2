"""The rules of one batch: which operation is done when.

Owns: ownership and the lock queue, through which every operation enters; what goes on when a lock is let go; what
leaves and arrives with a partition.
Promises: pure but for the look-up of committed rows, the lock table and the table of held keys, which only batches
change. One operation that is refused has changed nothing: it rolls back alone, because nothing is written before all
are decided. One that fails by a fault of this program does so, too: what it did to rows, locks, leases and holds is
taken back, it is answered with 500, and the batch goes on. A commit that fails so is aborted for good, as each that is
refused; only where that fails as well the error leaves the batch: then nothing can be said that stays true.
Leaves to others: plain writes (`writes`), leases (`leases`), transactions (`participant`), kept replies
(`idempotency`), waiting (`lock_waits`), the clock and the rows (`write_set`), timers, answers and the commit
(`pipeline`).

What is checked, in this order, and nowhere else: ownership; the lock; a kept reply for the same Idempotency-Key; then
what the operation itself must pass. Since a batch is decided in one thread, one operation after the other,
compare-and-set is: the key is locked, compared, written and let go before the next operation is looked at. A hundred of
them on one key share one commit.

When a lock is let go, the next in its queue goes on in the same batch: it sees what was executed, and its answer leaves
after the commit. How operations wait: a plain one in one queue, holding nothing. A transaction in this store alone in
the queue of its first key that is not free, holding nothing; it looks at all its keys again when that is. A prepare or
a read-only transaction takes its keys one by one and keeps them, so it has an age (wait-die).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

from kvstore import failpoints
from kvstore.errors import KvError
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    ApplyIntents,
    CancelWait,
    DecideCommit,
    Delete,
    GetLock,
    GetTxn,
    Outcome,
    Prepare,
    Put,
    ReadLock,
    ReadUnlock,
    Release,
    Renew,
    Reply,
    ResolveTxn,
    Transact,
)
from kvstore.storage.engine import Freezes
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import LEASE, Clock, Row
from kvstore.store.idempotency import Idempotency
from kvstore.store.lease_queues import LeaseQueues
from kvstore.store.leases import Leases
from kvstore.store.lock_waits import LockWaits
from kvstore.store.ops import (
    DropDecisions,
    EndLockWaits,
    EndReads,
    EndWait,
    Expire,
    ExpireLease,
    Locks,
    Queued,
    WriteOp,
    named_keys,
)
from kvstore.store.outcomes import Outcomes
from kvstore.store.ownership import Ownership
from kvstore.store.participant import Participant
from kvstore.store.read_locks import ReadLocks
from kvstore.store.ready import Ready
from kvstore.store.refusals import failure, queue_full, refusal
from kvstore.store.served import Served
from kvstore.store.txn_steps import TxnSteps
from kvstore.store.write_set import Committed, Context, Sink, WriteSet
from kvstore.store.writes import Writes
from kvstore.transactions.intents import PreparedTxns
from kvstore.transactions.locks import Died, Identity

_PASSES_LOCKS = frozenset({GetLock, CancelWait, EndWait})
_GATHERS = frozenset({Prepare, DecideCommit, ReadLock})
_WAITS_FOR_LOCKS = _GATHERS | {Transact}


class Extras:
    """What a batch commits beside rows and clock (see `storage.record`), and what is to be called when it is visible.

    `may_begin`: whether an operation that is ready may go on in it.
    """

    def __init__(self) -> None:
        self.when_visible: list[Callable[[], None]] = []
        self.when_appended: list[Callable[[int], None]] = []  # of a step: with the number of its record
        self.when_lost: list[Callable[[KvError], None]] = []  # of a step: it will not become durable here
        self.may_begin: Callable[[Any], bool] = lambda op: True
        self.cluster_map: bytes | None = None
        self.freezes: Freezes | None = None
        self.dropped: list[int] = []


class Batch:
    """One batch under decision. `changes` are its rows, clock and answers; `steps`, the names of the steps in it."""

    def __init__(
        self,
        clock: Clock,
        context: Context,
        locks: Locks,
        holds: PreparedTxns,
        committed: Committed,
        ready: Ready | None = None,
    ) -> None:
        holds.undo = undo = locks.undo
        self.changes = changes = WriteSet(clock, context, committed, undo)
        self.ownership = Ownership(context)
        self.extras = Extras()
        self.steps: list[str] = []
        self._locks = locks
        self._ready = ready = Ready(locks) if ready is None else ready
        idempotency = Idempotency(changes)
        self.leases = leases = Leases(changes, locks, idempotency)
        self._lease_queues = LeaseQueues(changes, locks, leases)
        steps = TxnSteps(changes, locks, leases)
        self.outcomes = Outcomes(changes, holds, steps, idempotency)
        self.part = Participant(changes, holds, steps, self.outcomes, ready)
        self.reads = ReadLocks(changes, locks, holds, steps, ready)
        self.waits = LockWaits(changes, locks, holds, ready, self.outcomes)
        self._writes = Writes(changes, leases, idempotency)
        self._idempotency = idempotency

    @property
    def served(self) -> Served | None:
        """What is served after this batch, if that changed."""
        ownership = self.ownership
        return Served(list(ownership.generations), ownership.epoch, ownership.frozen) if ownership.changed else None

    def record(self, before: Clock) -> CommitRecord | None:
        """What it commits; None if it changed nothing since `before`, the clock at its beginning."""
        rows, clock, extras = list(self.changes.rows.values()), self.changes.clock, self.extras
        if (
            not rows
            and clock == before
            and extras.cluster_map is None
            and extras.freezes is None
            and not extras.dropped
        ):
            return None
        if extras.dropped:  # a change that leaves no row: what is known of the partition as of the last one is old
            clock = clock._replace(sequence=clock.sequence + 1)
        return CommitRecord(clock, rows, extras.cluster_map, extras.freezes, extras.dropped)

    def decide(self, op: WriteOp, sink: Sink) -> None:
        """Do the operation, and what it lets go on: append changes, if any, and answers, unless they wait.

        Raises sqlite3.Error, OSError and MemoryError, after which what is committed cannot be relied on; of all other
        failures the client is told.
        """
        savepoint, steps = self.changes.savepoint(), len(self.steps)
        try:
            if type(op) in _PLAIN:
                self._enter(op, sink)
            else:
                self._enter_transaction(op, sink)
        except Exception as error:
            self.changes.back_to(savepoint)
            del self.steps[steps:]
            self._fail(op, sink, error)
        if self._ready.granted:
            self.go_on()
        self._locks.undo.clear()

    def go_on(self) -> None:
        """Let all go on that have the lock for which they waited, up to one that may not begin."""
        ready, may_begin = self._ready, self.extras.may_begin
        while ready and may_begin(ready.first.queued.op):
            key, identity, queued = ready.next()
            savepoint = self.changes.savepoint()
            try:
                self._go_on(key, identity, queued)
            except Exception as error:
                self.changes.back_to(savepoint)
                ready.unlock(key, identity)
                self.waits.release(queued)
                self._fail(queued.op, queued.sink, error)

    def _fail(self, op: Any, sink: Sink, error: Exception) -> None:
        """All that it did is undone.
        Of a commit no client may find out later that it was done after all."""
        reply: Reply = failure(op, error)
        if isinstance(op, DecideCommit):
            if self.outcomes.is_decided(op.attempt):  # but how cannot be read
                reply = Outcome(op.id, "gone", op.attempt.name, floor=self.changes.floor)
            else:
                self.outcomes.abort_for_good(op.attempt, op.key)
        self.changes.answer(sink, reply)

    # --- partitions come and go ---------------------------------------------------------------------------------------

    def depart(self, partitions: Set[int], epoch: int, frozen: Set[int]) -> None:
        """Stop serving these partitions. What waits there is bounced, unexecuted: a commit without a tombstone, because
        it may be done where they go. Locks, intents and leases of theirs are forgotten; a read-only transaction that
        has locks there has none any more."""
        ownership = self.ownership
        ownership.depart(partitions, epoch, frozen)
        if not partitions:
            return
        for key, queued in self._locks.all_waiting():
            foreign = ownership.foreign(queued.op, queued.keys)
            if foreign is not None and any(waiter is queued for waiter in self._locks.waiting(key)):
                self._ready.leave(key, queued)
                self.waits.release(queued)
                self.changes.answer(queued.sink, ownership.refuse(queued.op, foreign))
        self._forget(partitions)
        for name in [lease.name for lease in self._locks.leases() if ownership.partition_of(lease.name) in partitions]:
            for op, sink in self._locks.forget_lease(name):
                self.changes.answer(sink, ownership.refuse(op, ownership.partition_of(name)))
        self.go_on()
        self._locks.undo.clear()

    def _forget(self, partitions: Set[int]) -> None:
        def is_theirs(key: str) -> bool:
            return self.ownership.partition_of(key) in partitions

        self.part.forget(is_theirs)
        self.reads.forget(is_theirs)
        self.outcomes.forget(partitions)

    def arrive(self, partitions: Set[int], rows: Iterable[Row]) -> None:
        """Serve these from now on; `rows` are their leases, decisions and keys with intents.

        A lease has its full time again: late is safe, early is not.
        """
        self.ownership.arrive(partitions)
        for row in rows:
            if row.kind == LEASE:
                self.leases.restore(row)
            elif row.intent is not None:
                self.part.restore(row, self._locks.hold)
            else:
                self.outcomes.restore(row)
        self._locks.undo.clear()

    # --- entering -----------------------------------------------------------------------------------------------------

    def _enter(self, op: Any, sink: Sink) -> None:
        ownership = self.ownership
        partition = ownership.partition(op)
        if not ownership.generations[partition]:
            self.changes.answer(sink, ownership.refuse(op, partition))
        elif self._locks.is_free(op.key) or type(op) in _PASSES_LOCKS:
            self._run(op, partition, sink)
        else:
            self.waits.queue(op.key, Queued(op, sink, self.changes.context.now_s, [op.key]))

    def _enter_transaction(self, op: Any, sink: Sink) -> None:
        kind, keys = type(op), named_keys(op)
        foreign = self.ownership.foreign(op, keys)
        if foreign is not None:
            lost = kind is ReadUnlock
            self.changes.answer(sink, Answer(op.id, 409) if lost else self.ownership.refuse(op, foreign))
            return
        if kind is Prepare and (reopened := self.ownership.reopened(op, keys)) is not None:
            self.changes.answer(sink, self.ownership.refuse(op, reopened))
            return
        if (step := _STEPS.get(kind)) is not None:
            self.steps.append(step)
        if kind not in _WAITS_FOR_LOCKS:
            self.changes.answer(sink, self._at_once(op))
            return
        queued = Queued(op, sink, self.changes.context.now_s, keys)
        if kind is Transact:
            self._try_transact(queued)
        elif kind is DecideCommit:
            self._decide_commit(queued)
        else:
            if kind is Prepare and op.first:
                keys.sort(key=lambda key: key != op.first)
            self._gather(queued)

    def _decide_commit(self, queued: Queued) -> None:
        """What is decided already waits for no lock."""
        is_new = not self.outcomes.is_decided(queued.op.attempt)
        if is_new and all(map(self._locks.is_free, queued.keys)):
            self._finish_gathering(queued)  # it is over before anything else can ask for them
        elif (settled := self.outcomes.settled(queued.op)) is not None:
            self.changes.answer(queued.sink, settled)
        else:
            self._gather(queued)

    def _at_once(self, op: Any) -> Reply:
        """What waits for no lock, because its attempt has them, or because it needs none."""
        rule = _AT_ONCE.get(type(op))
        if rule is None:
            raise TypeError(f"no operation of a batch: {type(op).__name__}")
        return rule(self, op)

    def _abort(self, op: Abort) -> Reply:
        self.waits.cancel(op)
        return self.part.abort(op)

    # --- going on -----------------------------------------------------------------------------------------------------

    def _go_on(self, key: str, identity: Identity, queued: Queued) -> None:
        """It has the lock that it waited for."""
        op, sink = queued.op, queued.sink
        foreign = self.ownership.foreign(op, queued.keys)
        if sink.closed or foreign is not None:
            if foreign is not None:
                self.changes.answer(sink, self.ownership.refuse(op, foreign))
            self._ready.unlock(key, identity)
            self.waits.release(queued)
        elif type(op) in _GATHERS:
            self._locks.undo.note_item(queued.gathered, key)
            queued.gathered[key] = identity
            self._gather(queued)
        elif type(op) is Transact:
            self._try_transact(queued, key)
            self._ready.unlock(key, identity)
        else:
            self._run(op, self.ownership.partition(op), sink)
            self._ready.unlock(key, identity)

    def _try_transact(self, queued: Queued, held: str | None = None) -> None:
        """Do it if all its keys are free, one of which it may hold.
        Else wait for the first that is not."""
        op = queued.op
        blind = failpoints.planted("ignore-intent") and all(step.op == "get" for step in (*op.then, *op.otherwise))
        for key in queued.keys:
            if key != held and not blind and not self._locks.is_free(key):
                self.waits.queue(key, queued)
                return
        try:
            reply: Reply = self.part.transact(op)
        except KvError as error:
            reply = refusal(op.id, error)
        self.changes.answer(queued.sink, reply)

    def _gather(self, queued: Queued) -> None:
        """Take the locks that are missing, in their order.
        Wait, or die, at the first that is not to be had."""
        op, waits = queued.op, self.waits
        mode: Any = "shared" if type(op) is ReadLock else "exclusive"
        for key in queued.keys:
            if key in queued.gathered or waits.is_prepared(op, key):
                continue
            try:
                is_first = waits.is_first(queued, key)
                identity = self._locks.lock(key, mode, queued, op.attempt.age, holds_nothing=is_first)
            except Died:
                waits.note_met(key)
                waits.give_up(queued, waits.conflict(op, key))
                return
            except OverflowError:
                waits.give_up(queued, queue_full(key))
                return
            if identity is None:
                waits.note_met(key)
                return
            self._locks.undo.note_item(queued.gathered, key)
            queued.gathered[key] = identity
        self._finish_gathering(queued)

    def _finish_gathering(self, queued: Queued) -> None:
        try:
            self.changes.answer(queued.sink, self._with_locks(queued))
        except KvError as error:
            self.waits.give_up(queued, error)

    def _with_locks(self, queued: Queued) -> Reply:
        """It has all its locks. Those of a prepare and of reads stay."""
        kind = type(queued.op)
        if kind is Prepare:
            return self.part.prepare(queued.op, queued.gathered, queued.sink)
        if kind is ReadLock:
            return self.reads.read(queued.op, queued.gathered, queued.sink)
        outcome = self.part.commit(queued.op)
        if queued.gathered:
            self.waits.release(queued)
        return outcome

    def _run(self, op: Any, partition: int, sink: Sink) -> None:
        """A plain operation whose lock is free, or its own."""
        kind = type(op)
        rule = _PLAIN[kind]
        if kind in _REPEATABLE and op.once is not None:
            reply = self._idempotency.run(op, partition, lambda: rule(self, op, partition, sink), self.leases.repeated)
        else:
            if kind is CancelWait:
                self.waits.leave(op, sink)
            try:
                reply = rule(self, op, partition, sink)
            except KvError as error:
                reply = refusal(op.id, error)
        if reply is not None:
            self.changes.answer(sink, reply)


PlainRule = Callable[[Batch, Any, int, Sink], Answer | None]


def _of_leases(rule: Callable[[Leases, Any, int, Sink], Answer | None]) -> PlainRule:
    return lambda batch, op, partition, sink: rule(batch.leases, op, partition, sink)


def _of_queues(rule: Callable[[LeaseQueues, Any, int, Sink], Answer]) -> PlainRule:
    return lambda batch, op, partition, sink: rule(batch._lease_queues, op, partition, sink)


def _of_writes(rule: Callable[[Writes, Any, int, Sink], Answer]) -> PlainRule:
    return lambda batch, op, partition, sink: rule(batch._writes, op, partition, sink)


_PLAIN: dict[type, PlainRule] = {
    Put: _of_writes(Writes.put),
    Delete: _of_writes(Writes.delete),
    Expire: _of_writes(Writes.expire),
    Acquire: _of_leases(Leases.acquire),
    Renew: _of_leases(Leases.renew),
    Release: _of_leases(Leases.release),
    GetLock: _of_queues(LeaseQueues.inspect),
    CancelWait: _of_queues(LeaseQueues.leave),
    ExpireLease: _of_leases(Leases.expire),
    EndWait: _of_queues(LeaseQueues.end_wait),
}
_REPEATABLE = frozenset({Put, Delete, Acquire, Renew, Release})
_AT_ONCE: dict[type, Callable[[Batch, Any], Reply]] = {
    ApplyIntents: lambda batch, op: batch.part.finish(op),
    Abort: Batch._abort,
    ResolveTxn: lambda batch, op: batch.outcomes.ask(op),
    GetTxn: lambda batch, op: batch.outcomes.look(op),
    ReadUnlock: lambda batch, op: batch.reads.unlock(op),
    DropDecisions: lambda batch, op: batch.outcomes.drop(op),
    EndReads: lambda batch, op: batch.reads.end(op),
    EndLockWaits: lambda batch, op: batch.waits.end(op),
}
_STEPS: dict[type, str] = {
    Transact: "transact",
    Prepare: "prepare",
    DecideCommit: "decide",
    ApplyIntents: "finish",
    Abort: "abort",
    ResolveTxn: "ask",
    DropDecisions: "forget",
}
