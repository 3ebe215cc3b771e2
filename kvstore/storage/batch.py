"""The rules of one batch: which operation is done when, and what a plain one does to the rows.

Owns: ownership and the lock queue, through which every operation enters; put, delete, compare-and-set and expiry as
decisions on rows.
Promises: pure but for the look-up of committed rows, the lock table and the table of held keys, which only batches
change. One operation that is refused has changed nothing: it rolls back alone, because nothing is written before all
are decided. One that fails by a fault of this program does so, too: what it did to rows, locks, leases and holds is
taken back, it is answered with 500, and the batch goes on. A commit that fails so is aborted for good, as each that is
refused; only where that fails as well the error leaves the batch: then nothing can be said that stays true.
Leaves to others: leases (`leases`), transactions (`participant`), kept replies (`replies`), the clock and the rows
(`changes`), timers and sending answers (`store`), writing the rows and the commit (`sqlite`).

What is checked here, in this order, and nowhere else: ownership; the lock; a kept reply for the same Idempotency-Key;
the fence (is the key's name leased, and does the write show the holder's token); the key's deadline; the conditions;
room on the disk. Since a batch is decided in one thread, one after the other, compare-and-set is: the key is locked,
compared, written and let go before the next operation is looked at. A hundred of them on one key share one commit.

When a lock is let go, who is next in its queue goes on in the same batch: it sees what was executed, and its answer
leaves after the commit. How they wait: a plain operation in one queue, holding nothing. A transaction in this store
alone in the queue of its first key that is not free, holding nothing; it looks at all its keys again when that is. A
prepare or a read-only transaction takes its keys one by one and keeps them, so it has an age (wait-die).
"""

from __future__ import annotations

import itertools
import logging
import sqlite3
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple

import msgspec

from kvstore.errors import Conflict, KvError, LockLost, PreconditionFailed, WrongOwner
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    Ask,
    Commit,
    Delete,
    Finish,
    Guard,
    Inspect,
    Leave,
    Look,
    Once,
    Outcome,
    Prepare,
    Put,
    ReadLock,
    ReadUnlock,
    Release,
    Renew,
    Reply,
    Transact,
)
from kvstore.storage.changes import Before, Changes, Committed, Context, Sink
from kvstore.storage.leases import EndWait, ExpireLease, Leases, queue_full, refusal
from kvstore.storage.participant import DropDecisions, EndReads, Participant, keys_of
from kvstore.storage.replies import Kept, Replies, row_key
from kvstore.storage.rows import LEASE, REPLY, VALUE, Clock, Row
from kvstore.transactions.intents import Hold, Holds
from kvstore.transactions.locks import Died, Identity, Lease, LockTable

log = logging.getLogger(__name__)


class Expire(msgspec.Struct):
    """The owner's own operation: make the expiry of a row a fact, if its deadline has passed."""

    key: str
    kind: str = VALUE
    partition: int = -1
    id: int = 0


class EndLockWaits(msgspec.Struct):
    """The owner's own operation: who has waited for a lock since before `since_s`, or is gone, waits no longer.

    `plain_since_s` is for those without an age, who outwait a dead router's intents.
    """

    since_s: float
    plain_since_s: float
    id: int = 0


PlainOp = Put | Delete | Acquire | Renew | Release | Leave | Inspect | Expire | ExpireLease | EndWait
TransactionOp = Transact | Prepare | Commit | Finish | Abort | Ask | Look | ReadLock | ReadUnlock
WriteOp = PlainOp | TransactionOp | DropDecisions | EndReads | EndLockWaits
Waiter = tuple[WriteOp, Sink]


class Queued:
    """An operation in the queue of a lock; `gathered` are the locks that it has meanwhile."""

    __slots__ = ("gathered", "keys", "op", "since_s", "sink")

    def __init__(self, op: Any, sink: Sink, since_s: float, keys: list[str]) -> None:
        self.op = op
        self.sink = sink
        self.since_s = since_s
        self.keys = keys
        self.gathered: dict[str, Identity] = {}


Locks = LockTable[Queued, Waiter]


class _Granted(NamedTuple):
    key: str
    identity: Identity
    queued: Queued


_arrival_numbers = itertools.count(1)  # of partitions, in any store of this process: none comes twice
_DECIDED = frozenset({200, 201, 204, 404, 412})
_FAULTS_TOLD_MAX = 1000
_faults_told: set[tuple[type, str]] = set()  # with their traceback; the same one may come again and again
_PASSES_LOCKS = frozenset({Inspect, Leave, EndWait})


class Batch:
    """One batch under decision. `changed` are the rows to write; `answers`, in order, who gets which; `steps`, the
    names of the steps of transactions in it; `met`, the attempts that stood in somebody's way."""

    def __init__(self, clock: Clock, context: Context, locks: Locks, holds: Holds, committed: Committed) -> None:
        self._context = context
        self._undo = holds.undo = undo = locks.undo
        self.changes = self._changes = changes = Changes(clock, context, committed, undo)
        self._locks = locks
        self._holds = holds
        self._granted: deque[_Granted] = deque()
        # The parts know the batch weakly. As a circle, every batch with all its rows would stay until the garbage
        # collector comes, which then has thousands of objects to free and holds up everybody for that long.
        batch = weakref.proxy(self)
        self._replies = replies = Replies(changes)
        self._leases = leases = Leases(
            changes, locks, replies, lambda op, partition, sink: batch._run_waiter(op, partition, sink)
        )
        self._part = part = Participant(
            changes, locks, holds, leases, replies, lambda key, identity: batch._unlock(key, identity)
        )
        self.steps: list[str] = []
        self.changed: dict[tuple[str, str], Row] = changes.rows
        self.answers: list[tuple[Sink, Reply]] = changes.answers
        self.started: list[Lease] = leases.started
        self.parked: list[tuple[Acquire, Sink]] = leases.parked
        self.met: set[Hold] = set()
        self.decided = part.decided
        self.dropped = part.dropped
        self.frees_only = context.frees_only

    @property
    def clock(self) -> Clock:
        return self._changes.clock

    @property
    def expired(self) -> int:
        return self._changes.expired

    @property
    def arrivals(self) -> Sequence[int]:
        """By partition, after this batch."""
        return self._context.arrivals

    def decide(self, op: WriteOp, sink: Sink) -> None:
        """Do the operation: append its changes, if it has any, and its answer, unless it waits."""
        savepoint = self._changes.savepoint()
        try:
            if type(op) in _PLAIN:
                self._enter(op, sink)
            else:
                self._enter_transaction(op, sink)
        except Exception as error:
            self._changes.back_to(savepoint)
            self._fail(op, sink, error)
        self._let_go_on()
        self._undo.clear()

    def _let_go_on(self) -> None:
        while self._granted:
            granted = self._granted.popleft()
            savepoint = self._changes.savepoint()
            try:
                self._go_on(*granted)
            except Exception as error:
                self._changes.back_to(savepoint)
                key, identity, queued = granted
                self._unlock(key, identity)
                self._release(queued)
                self._fail(queued.op, queued.sink, error)

    def _run_waiter(self, op: Acquire, partition: int, sink: Sink) -> None:
        """Within another operation, which must not fail with it."""
        savepoint = self._changes.savepoint()
        try:
            self._run(op, partition, sink)
        except Exception as error:
            self._changes.back_to(savepoint)
            self._fail(op, sink, error)

    def _fail(self, op: Any, sink: Sink, error: Exception) -> None:
        """All that it did is undone. Of a commit nobody may find out later that it was done after all.

        Raises the error if it is one of the file or of memory: then what is committed cannot be relied on.
        """
        if isinstance(error, sqlite3.Error | OSError | MemoryError):
            raise error
        reply: Reply = refusal(op.id, error) if isinstance(error, KvError) else failure(op, error)
        if isinstance(op, Commit):
            if op.attempt in self._holds.decided:  # but how cannot be read
                reply = Outcome(op.id, "gone", op.attempt.name, floor=self._changes.floor)
            else:
                self._part.abort_for_good(op.attempt, op.key)
        self._changes.answer(sink, reply)

    def _grant(self, granted: list[tuple[Identity, Queued]], key: str) -> None:
        self._undo.note_length(self._granted)
        self._granted.extend(_Granted(key, *next_one) for next_one in granted)

    # --- partitions come and go ---------------------------------------------------------------------------------------

    def depart(self, partitions: Set[int], epoch: int, fenced: Set[int]) -> None:
        """These are not answered for any more. Whoever waits there is bounced, unexecuted: a commit without a
        tombstone, because it may be done where they go. Locks, intents and leases of theirs are forgotten; a read-only
        transaction that has locks there has none any more."""
        arrivals = [0 if partition in partitions else arrival for partition, arrival in enumerate(self.arrivals)]
        self._context = self._changes.context = self._context._replace(arrivals=arrivals, epoch=epoch, fenced=fenced)
        if not partitions:
            return
        for key, queued in self._locks.all_waiting():
            foreign = self._foreign(queued.op, queued.keys)
            if foreign is not None and any(waiter is queued for waiter in self._locks.waiting(key)):
                self._grant(self._locks.leave(key, queued), key)
                self._release(queued)
                self._changes.answer(queued.sink, self._wrong_owner(queued.op, foreign))
        self._part.forget(lambda key: self._partition_of(key) in partitions, partitions)
        for name in [lease.name for lease in self._locks.leases() if self._partition_of(lease.name) in partitions]:
            for op, sink in self._locks.forget_lease(name):
                self._changes.answer(sink, self._wrong_owner(op, self._partition_of(name)))
        self._let_go_on()
        self._undo.clear()

    def arrive(self, partitions: Set[int], rows: Iterable[Row]) -> None:
        """These are answered for from now on; `rows` are their leases, decisions and keys with intents. A lease has its
        full time again: late is safe, early is not."""
        arrivals = list(self.arrivals)
        for partition in partitions:
            arrivals[partition] = next(_arrival_numbers)
        self._context = self._changes.context = self._context._replace(arrivals=arrivals)
        for row in rows:
            if row.kind == LEASE:
                self._leases.restore(row)
            else:
                self._part.restore(row)
        self._undo.clear()

    # --- entering -----------------------------------------------------------------------------------------------------

    def _enter(self, op: Any, sink: Sink) -> None:
        partition = self._partition(op)
        if not self._context.arrivals[partition]:
            self._changes.answer(sink, self._wrong_owner(op, partition))
        elif self._locks.is_free(op.key) or type(op) in _PASSES_LOCKS:
            self._run(op, partition, sink)
        else:
            self._queue(op.key, Queued(op, sink, self._context.now_s, [op.key]))

    def _enter_transaction(self, op: Any, sink: Sink) -> None:
        keys = keys_of(op) if isinstance(op, Transact | Prepare | Commit) else _named(op)
        foreign = self._foreign(op, keys)
        if foreign is not None:
            lost = isinstance(op, ReadUnlock)
            self._changes.answer(sink, Answer(op.id, 409) if lost else self._wrong_owner(op, foreign))
            return
        if isinstance(op, Prepare) and (reopened := self._reopened(op, keys)) is not None:
            self._changes.answer(sink, self._wrong_owner(op, reopened))
            return
        step = _STEPS.get(type(op))
        if step is not None:
            self._undo.note_length(self.steps)
            self.steps.append(step)
        queued = Queued(op, sink, self._context.now_s, keys)
        if isinstance(op, Prepare) and op.first:
            keys.sort(key=lambda key: key != op.first)
        if isinstance(op, Transact):
            self._try_transact(queued)
        elif isinstance(op, Commit) and (settled := self._part.settled(op)) is not None:
            self._changes.answer(sink, settled)
        elif isinstance(op, Prepare | Commit | ReadLock):
            self._gather(queued)
        else:
            if isinstance(op, Abort):
                self._cancel(op)
            self._changes.answer(sink, self._at_once(op))

    def _reopened(self, op: Prepare, keys: list[str]) -> int | None:
        """A partition of its keys that was lost and opened anew since the attempt began."""
        partitions = map(self._partition_of, keys)
        return self._context.openings.reopened_among(op.attempt.epoch, partitions)

    def _at_once(self, op: Any) -> Reply:
        """What waits for no lock, because its attempt has them, or because it needs none."""
        match op:
            case Finish():
                return self._part.finish(op)
            case Abort():
                return self._part.abort(op)
            case Ask():
                return self._part.ask(op)
            case Look():
                return self._part.look(op)
            case ReadUnlock():
                return self._part.unlock_reads(op)
            case DropDecisions():
                return self._part.drop_decisions(op)
            case EndReads():
                return self._part.end_reads(op)
            case EndLockWaits():
                return self._end_lock_waits(op)
        raise TypeError(f"no operation of a batch: {type(op).__name__}")

    def _partition(self, op: Any) -> int:
        if isinstance(op, Expire) and op.partition >= 0:
            return op.partition
        return self._partition_of(op.key)

    def _partition_of(self, key: str) -> int:
        return partition_of(key.encode(), len(self._context.arrivals))

    def _foreign(self, op: Any, keys: list[str]) -> int | None:
        """A partition of the operation that this store does not own."""
        if type(op) in _PLAIN:
            named: Iterable[int] = [self._partition(op)]
        elif isinstance(op, Look | DropDecisions):
            named = [op.partition] if op.partition >= 0 else []
        else:
            named = map(self._partition_of, keys)
        return next((partition for partition in named if not self._context.arrivals[partition]), None)

    def _wrong_owner(self, op: Any, partition: int) -> Answer:
        return refusal(op.id, wrong_owner(partition, self._context.epoch, self._context.fenced))

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _queue(self, key: str, queued: Queued) -> bool:
        """Wait for a lock that is not free, without holding any; False if the queue is full."""
        self._note_met(key)
        try:
            self._locks.lock(key, "exclusive", queued)
        except OverflowError:
            self._changes.answer(queued.sink, refusal(queued.op.id, queue_full(key)))
            return False
        return True

    def _note_met(self, key: str) -> None:
        hold = self._holds.on(key)
        if hold is not None:
            self.met.add(hold)

    def _unlock(self, key: str, identity: Identity) -> None:
        self._grant(self._locks.unlock(key, identity), key)

    def _release(self, queued: Queued) -> None:
        for key, identity in queued.gathered.items():
            self._unlock(key, identity)
        self._undo.note_attribute(queued, "gathered")
        queued.gathered = {}

    def _go_on(self, key: str, identity: Identity, queued: Queued) -> None:
        """It has the lock that it waited for."""
        op, sink = queued.op, queued.sink
        foreign = self._foreign(op, queued.keys)
        if sink.closed or foreign is not None:
            if foreign is not None:
                self._changes.answer(sink, self._wrong_owner(op, foreign))
            self._unlock(key, identity)
            self._release(queued)
        elif isinstance(op, Prepare | Commit | ReadLock):
            self._undo.note_item(queued.gathered, key)
            queued.gathered[key] = identity
            self._gather(queued)
        elif isinstance(op, Transact):
            self._try_transact(queued, key)
            self._unlock(key, identity)
        else:
            self._run(op, self._partition(op), sink)
            self._unlock(key, identity)

    def _try_transact(self, queued: Queued, held: str | None = None) -> None:
        """Do it if all its keys are free, one of which it may hold; else wait for the first that is not."""
        op = queued.op
        for key in queued.keys:
            if key != held and not self._locks.is_free(key):
                self._queue(key, queued)
                return
        try:
            reply: Reply = self._part.transact(op)
        except KvError as error:
            reply = refusal(op.id, error)
        self._changes.answer(queued.sink, reply)

    def _gather(self, queued: Queued) -> None:
        """Take the locks that are missing, in their order; wait, or die, at the first that is not to be had."""
        op = queued.op
        mode: Any = "shared" if isinstance(op, ReadLock) else "exclusive"
        for key in queued.keys:
            if key in queued.gathered or self._is_prepared(op, key):
                continue
            try:
                is_first = self._is_first(queued, key)
                identity = self._locks.lock(key, mode, queued, op.attempt.age, holds_nothing=is_first)
            except Died:
                self._note_met(key)
                self._give_up(queued, self._conflict(op, key))
                return
            except OverflowError:
                self._give_up(queued, queue_full(key))
                return
            if identity is None:
                self._note_met(key)
                return
            self._undo.note_item(queued.gathered, key)
            queued.gathered[key] = identity
        try:
            self._changes.answer(queued.sink, self._with_locks(queued))
        except KvError as error:
            self._give_up(queued, error)

    def _with_locks(self, queued: Queued) -> Reply:
        """It has all its locks. Those of a prepare and of reads stay."""
        if isinstance(queued.op, Prepare):
            return self._part.prepare(queued.op, queued.gathered, queued.sink)
        if isinstance(queued.op, ReadLock):
            return self._part.read(queued.op, queued.gathered, queued.sink)
        outcome = self._part.commit(queued.op)
        self._release(queued)
        return outcome

    def _is_first(self, queued: Queued, key: str) -> bool:
        """The attempt asks for its very first lock."""
        op = queued.op
        return isinstance(op, Prepare) and op.first == key and not queued.gathered and not self._holds.of(op.attempt)

    def _is_prepared(self, op: Prepare | Commit | ReadLock, key: str) -> bool:
        """The key carries an intent of this very attempt already."""
        hold = self._holds.on(key)
        return hold is not None and isinstance(op, Prepare) and hold.attempt == op.attempt

    def _give_up(self, queued: Queued, error: KvError) -> None:
        """It is refused for good: also when the network repeats it."""
        if isinstance(queued.op, Commit):
            self._part.abort_for_good(queued.op.attempt, queued.op.key)
        self._release(queued)
        self._changes.answer(queued.sink, refusal(queued.op.id, error))

    def _conflict(self, op: Any, key: str) -> Conflict:
        """`same_request`: whoever is ahead is the same request, not yet decided."""
        hold = self._holds.on(key)
        once = getattr(op, "once", None)
        once_key = once.key if isinstance(once, Once) else once
        same_request = hold is not None and once_key is not None and hold.once == once_key
        members = {"same_request": True} if same_request else {}
        return Conflict(f"another transaction works on key {key!r}", retry_after_ms=50, key=key, **members)

    def _cancel(self, abort: Abort) -> None:
        """What of the attempt still waits for a lock waits no longer."""
        for key in abort.keys:
            for queued in self._locks.waiting(key):
                if isinstance(queued.op, Prepare | ReadLock) and queued.op.attempt == abort.attempt:
                    self._leave_queue(key, queued, Conflict("the attempt was aborted", retry_after_ms=50))

    def _leave_queue(self, key: str, queued: Queued, error: KvError) -> None:
        """Unless it has the lock meanwhile, because somebody whom we sent away before it let that go."""
        if not any(waiter is queued for waiter in self._locks.waiting(key)):
            return
        self._grant(self._locks.leave(key, queued), key)
        self._give_up(queued, error)

    def _end_lock_waits(self, op: EndLockWaits) -> Answer:
        for key, queued in self._locks.all_waiting():
            since_s = op.since_s if isinstance(queued.op, Prepare | Commit | ReadLock) else op.plain_since_s
            if queued.since_s <= since_s or queued.sink.closed:
                self._leave_queue(key, queued, self._conflict(queued.op, key))
        return Answer(op.id, 200)

    # --- plain operations ---------------------------------------------------------------------------------------------

    def _run(self, op: Any, partition: int, sink: Sink) -> None:
        once: Once | None = getattr(op, "once", None)
        try:
            reply = self._kept(op, once, partition) if once is not None else None
            if reply is None:
                reply = self._execute(op, once, partition, sink)
        except KvError as error:
            reply = refusal(op.id, error)
        if reply is not None:
            self._changes.answer(sink, reply)

    def _execute(self, op: Any, once: Once | None, partition: int, sink: Sink) -> Answer | None:
        try:
            reply = _PLAIN[type(op)](self, op, partition, sink)
        except KvError as error:
            reply = refusal(op.id, error)
        if reply is not None and once is not None and reply.status in _DECIDED:
            owner = (reply.value or b"").decode()
            kept = Kept(once.digest, reply.status, reply.version, reply.problem, owner, reply.ttl_left_ms)
            self._replies.keep(row_key(type(op).__name__, op.key, once), partition, kept)
        return reply

    def _kept(self, op: Any, once: Once, partition: int) -> Answer | None:
        """The answer of the first request with this Idempotency-Key, if there was one.

        Raises IdempotencyKeyReused, and LockLost for an acquire whose grant is over.
        """
        kept = self._replies.find(row_key(type(op).__name__, op.key, once), once)
        if kept is None:
            return None
        if isinstance(op, Acquire) and kept.status == 201:
            lease = self._leases.on(op.key, partition)
            if lease is None or lease.token != kept.version:
                raise LockLost(f"the grant with token {kept.version} that this key was answered with is over")
            return self._leases.restart(lease, op.id, 201)
        return Answer(op.id, kept.status, kept.version, kept.owner.encode() or None, kept.ttl_ms, kept.problem)

    def _put(self, op: Put, partition: int, sink: Sink) -> Answer:
        before = self._admit(op.key, op.guard, partition)
        self._changes.need_room()
        expires_at_ms = self._context.now_ms + op.ttl_ms if op.ttl_ms else 0
        after = self._changes.write(VALUE, op.key, partition, op.value, expires_at_ms)
        return Answer(op.id, 204 if before.live else 201, after.version)

    def _delete(self, op: Delete, partition: int, sink: Sink) -> Answer:
        before = self._admit(op.key, op.guard, partition)
        if not before.live:
            return Answer(op.id, 404)
        return Answer(op.id, 204, self._changes.write(VALUE, op.key, partition, None).version)

    def _admit(self, key: str, guard: Guard | None, partition: int) -> Before:
        """The state of the key as the write finds it. Raises Locked, LockLost, PreconditionFailed."""
        self._leases.fence(key, guard.token if guard is not None else None, partition)
        self._changes.expire_if_due(VALUE, key, partition)
        before = self._changes.before(VALUE, key)
        if guard is not None and not _condition_holds(guard, before):
            state = f"has version {before.version}" if before.live else "does not exist"
            members = {"version": before.version} if before.live else {}
            raise PreconditionFailed(f"key {key!r} {state}", **members)
        return before

    def _expire(self, op: Expire, partition: int, sink: Sink) -> Answer:
        if op.kind == REPLY:
            gone = self._replies.expire_if_due(op.key, partition)
        else:
            gone = self._changes.expire_if_due(op.kind, op.key, partition)
        return Answer(op.id, 410 if gone else 200)

    def _leave(self, op: Leave, partition: int, sink: Sink) -> Answer:
        """Who asked for a lease waits in its queue, or, while a transaction is at work on the name, for the lock."""
        for queued in self._locks.waiting(op.key):
            if isinstance(queued.op, Acquire) and queued.op.id == op.acquire and queued.sink is sink:
                self._leave_queue(op.key, queued, Conflict(f"the waiter for {op.key!r} has left", retry_after_ms=100))
        return self._leases.leave(op, partition, sink)


PlainRule = Callable[[Batch, Any, int, Sink], Answer | None]


def _of_leases(rule: Callable[[Leases, Any, int, Sink], Answer | None]) -> PlainRule:
    return lambda batch, op, partition, sink: rule(batch._leases, op, partition, sink)


_PLAIN: dict[type, PlainRule] = {
    Put: Batch._put,
    Delete: Batch._delete,
    Expire: Batch._expire,
    Acquire: _of_leases(Leases.acquire),
    Renew: _of_leases(Leases.renew),
    Release: _of_leases(Leases.release),
    Inspect: _of_leases(Leases.inspect),
    Leave: Batch._leave,
    ExpireLease: _of_leases(Leases.expire),
    EndWait: _of_leases(Leases.end_wait),
}
_STEPS: dict[type, str] = {
    Transact: "transact",
    Prepare: "prepare",
    Commit: "decide",
    Finish: "finish",
    Abort: "abort",
    Ask: "ask",
    DropDecisions: "forget",
}


def failure(op: Any, error: Exception) -> Answer:
    """The answer to an operation that failed by a fault of this program; says in the log which."""
    what = f"an operation failed: {type(op).__name__}"
    fault = (type(op), repr(error)[:200])
    if fault in _faults_told:
        log.error("%s: %r, as before", what, error)
    else:
        if len(_faults_told) < _FAULTS_TOLD_MAX:
            _faults_told.add(fault)
        log.error(what, exc_info=error)
    return refusal(op.id, KvError("the shard failed to do this operation and has undone it; its log says why"))


def wrong_owner(partition: int, epoch: int, fenced: Set[int]) -> WrongOwner:
    """`fenced`: only a map with a higher epoch than this one changes that."""
    members = {"fenced": True} if partition in fenced else {}
    return WrongOwner(f"this shard does not answer for partition {partition}", epoch=epoch, **members)


def _named(op: Any) -> list[str]:
    """The keys that must be owned."""
    if isinstance(op, Ask):
        return [op.key]
    return op.keys if isinstance(op, Finish | Abort | ReadLock | ReadUnlock) else []


def _condition_holds(guard: Guard, before: Before) -> bool:
    """RFC 9110, 13.2.2: If-Match first, then If-None-Match; both must hold."""
    version = before.version if before.live else None
    return (
        not (guard.present and not before.live)
        and not (guard.absent and before.live)
        and (guard.versions is None or version in guard.versions)
        and (guard.not_versions is None or version not in guard.not_versions)
    )
