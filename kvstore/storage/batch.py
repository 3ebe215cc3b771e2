"""The rules of one batch: what each operation does to the rows, decided in order, without touching a file.

Owns: put, delete, compare-and-set, expiry, leases and idempotent replies as decisions on rows; the version clock and
the sequence; the count of keys and bytes.
Promises: pure but for `Committed`, the look-up of committed rows that it is given, and the store's lock table, which
only batches change. Operations see what earlier ones of the same batch did. One that is refused has changed nothing:
it rolls back alone, because nothing is written before all are decided. Every operation that changes something takes a
step of the version clock.
Leaves to others: the order of the operations, timers, sending answers (`store`), writing the rows and the commit
(`sqlite`).

What is checked here, in this order, and nowhere else: ownership; the lock; a kept reply for the same Idempotency-Key;
the fence (is the key's name leased, and does the write show the holder's token); the key's deadline; the conditions;
room on the disk. Since a batch is decided in one thread, one after the other, compare-and-set is: the key is locked,
compared, written and let go before the next operation is looked at. A hundred of them on one key share one commit.

A key or lease past its deadline is ended here, first, by whichever operation meets it, as a change of its own, so
that nobody ever decides it by looking at a clock. When a lease ends, the next waiter has it in the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from kvstore.errors import (
    DiskFull,
    IdempotencyKeyReused,
    KvError,
    Locked,
    LockLost,
    PreconditionFailed,
    TooManyRequests,
    WrongOwner,
)
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Acquire,
    Answer,
    Delete,
    Guard,
    Inspect,
    Leave,
    Once,
    Put,
    Release,
    Renew,
    Reply,
)
from kvstore.storage.rows import LEASE, REPLY, VALUE, Clock, Row
from kvstore.transactions.locks import Lease, LockTable


class Expire(msgspec.Struct):
    """The owner's own operation: make the expiry of a row a fact, if its deadline has passed."""

    key: str
    kind: str = VALUE
    partition: int = -1
    id: int = 0


class ExpireLease(msgspec.Struct):
    """The owner's own operation: end the lease on `key`, if its time has passed."""

    key: str
    id: int = 0


class EndWait(msgspec.Struct):
    """The owner's own operation: whoever asked with `acquire` has waited long enough."""

    key: str
    acquire: Acquire
    id: int = 0


WriteOp = Put | Delete | Acquire | Renew | Release | Leave | Inspect | Expire | ExpireLease | EndWait


class Sink(Protocol):
    """Whoever waits for an answer. When `closed`, an operation that has not begun is dropped."""

    @property
    def closed(self) -> bool: ...

    def send(self, reply: Reply, /) -> None: ...


Waiter = tuple[WriteOp, Sink]
Locks = LockTable[Waiter]


class Before(NamedTuple):
    """What a batch must know of a key's committed row; `size` is that of its body, a tombstone is not `live`."""

    version: int
    expires_at_ms: int
    size: int
    live: bool


class Committed(Protocol):
    """The committed rows."""

    def before(self, kind: str, key: str) -> Before | None: ...

    def body(self, kind: str, key: str) -> bytes | None: ...


class Context(NamedTuple):
    """What holds for the whole batch. `arrivals[p]` is 0 where the store does not own partition p (see `store`)."""

    now_ms: int
    now_s: float
    arrivals: Sequence[int]
    epoch: int
    frees_only: bool
    reply_kept_ms: int


class LeaseBody(msgspec.Struct):
    """The body of a lease's row."""

    owner: str
    ttl_ms: int


class Kept(msgspec.Struct):
    """The body of a reply's row: the answer that was given, and to which request. `owner` and `ttl_ms`: a renewal's."""

    digest: str
    status: int
    version: int
    problem: dict[str, Any] | None = None
    owner: str = ""
    ttl_ms: int = 0


_NOTHING = Before(0, 0, 0, False)
_DECIDED = frozenset({200, 201, 204, 404, 412})


class Batch:
    """One batch under decision. `changed` are the rows to write; `answers`, in order, who gets which."""

    def __init__(self, clock: Clock, context: Context, locks: Locks, committed: Committed) -> None:
        self.changed: dict[tuple[str, str], Row] = {}
        self.answers: list[tuple[Sink, Reply]] = []
        self.started: list[Lease] = []
        self.parked: list[tuple[Acquire, Sink]] = []
        self.expired = 0
        self.frees_only = context.frees_only
        self._context = context
        self._locks = locks
        self._committed = committed
        self._seen: dict[tuple[str, str], Before] = {}
        self._version, self._sequence, self._floor, self._keys, self._bytes = clock
        self._execute: dict[type, Callable[[Any, int, Sink], Answer | None]] = {
            Put: self._put,
            Delete: self._delete,
            Expire: self._expire,
            Acquire: self._acquire,
            Renew: self._renew,
            Release: self._release,
            Inspect: self._inspect,
            Leave: self._leave,
            ExpireLease: self._expire_lease,
            EndWait: self._end_wait,
        }

    @property
    def clock(self) -> Clock:
        return Clock(self._version, self._sequence, self._floor, self._keys, self._bytes)

    def decide(self, op: WriteOp, sink: Sink) -> None:
        """Do the operation: append its changes, if it has any, and its answer, unless it waits."""
        partition = partition_of(op.key.encode(), len(self._context.arrivals))
        if isinstance(op, Expire) and op.partition >= 0:
            partition = op.partition
        if not self._context.arrivals[partition]:
            wrong = WrongOwner(f"this shard does not own partition {partition}", epoch=self._context.epoch)
            self._answer(sink, refusal(op.id, wrong))
        elif self._locks.is_free(op.key):
            self._run(op, partition, sink)
        else:
            self._queue_for_lock(op, partition, sink)

    def _queue_for_lock(self, op: WriteOp, partition: int, sink: Sink) -> None:
        try:
            identity = self._locks.lock(op.key, "exclusive", (op, sink))
        except OverflowError:
            self._answer(sink, refusal(op.id, _queue_full(op.key)))
            return
        if identity is not None:
            self._run(op, partition, sink)
            self._locks.unlock(op.key, identity)

    def _run(self, op: WriteOp, partition: int, sink: Sink) -> None:
        once: Once | None = getattr(op, "once", None)
        reply: Answer | None = None
        try:
            reply = self._kept(op, once, partition) if once is not None else None
        except KvError as error:
            reply = refusal(op.id, error)
        if reply is None:
            try:
                reply = self._execute[type(op)](op, partition, sink)
            except KvError as error:
                reply = refusal(op.id, error)
            if reply is None:
                return
            if once is not None:
                self._keep(op, once, partition, reply)
        self._answer(sink, reply)

    def _answer(self, sink: Sink, reply: Reply) -> None:
        self.answers.append((sink, reply))

    # --- values -------------------------------------------------------------------------------------------------------

    def _put(self, op: Put, partition: int, sink: Sink) -> Answer:
        before = self._admit(op.key, op.guard, partition)
        self._need_room()
        expires_at_ms = self._context.now_ms + op.ttl_ms if op.ttl_ms else 0
        after = self._write(VALUE, op.key, partition, op.value, expires_at_ms)
        return Answer(op.id, 204 if before.live else 201, after.version)

    def _delete(self, op: Delete, partition: int, sink: Sink) -> Answer:
        before = self._admit(op.key, op.guard, partition)
        if not before.live:
            return Answer(op.id, 404)
        return Answer(op.id, 204, self._write(VALUE, op.key, partition, None, 0).version)

    def _expire(self, op: Expire, partition: int, sink: Sink) -> Answer:
        return Answer(op.id, 410 if self._expire_if_due(op.kind, op.key, partition) else 200)

    def _admit(self, key: str, guard: Guard | None, partition: int) -> Before:
        """The state of the key as the write finds it. Raises Locked, LockLost, PreconditionFailed."""
        lease = self._lease(key, partition)
        token = guard.token if guard is not None else None
        if lease is not None and token is None:
            raise self._locked(lease)
        if token is not None and (lease is None or lease.token != token):
            raise LockLost(f"the lock {key!r} is not held with token {token}")
        self._expire_if_due(VALUE, key, partition)
        before = self._before(VALUE, key)
        if guard is not None and not _condition_holds(guard, before):
            state = f"has version {before.version}" if before.live else "does not exist"
            members = {"version": before.version} if before.live else {}
            raise PreconditionFailed(f"key {key!r} {state}", **members)
        return before

    def _expire_if_due(self, kind: str, key: str, partition: int) -> bool:
        before = self._before(kind, key)
        due = before.live and 0 < before.expires_at_ms <= self._context.now_ms
        if due:
            self.expired += kind == VALUE
            self._write(kind, key, partition, None, 0)
        return due

    # --- leases -------------------------------------------------------------------------------------------------------

    def _acquire(self, op: Acquire, partition: int, sink: Sink) -> Answer | None:
        lease = self._lease(op.key, partition)
        if lease is None:
            return self._grant(op, partition)
        if not op.wait_ms:
            raise self._locked(lease)
        try:
            self._locks.queue_for_lease(op.key, (op, sink))
        except OverflowError:
            raise _queue_full(op.key) from None
        self.parked.append((op, sink))
        return None

    def _grant(self, op: Acquire, partition: int) -> Answer:
        self._need_room()
        body = msgspec.json.encode(LeaseBody(op.owner, op.ttl_ms))
        token = self._write(LEASE, op.key, partition, body, 0).version
        self.started.append(self._locks.grant(op.key, op.owner, token, op.ttl_ms / 1000))
        if op.once is not None:
            self._answer_duplicates(op.key, op.once, token)
        return Answer(op.id, 201, token)

    def _answer_duplicates(self, name: str, once: Once, token: int) -> None:
        """Who repeated the request while it waited gets the same answer."""
        for waiter in self._locks.waiting_for_lease(name):
            if isinstance(waiter[0], Acquire) and waiter[0].once == once:
                self._locks.leave_lease_queue(name, waiter)
                self._answer(waiter[1], Answer(waiter[0].id, 201, token))

    def _renew(self, op: Renew, partition: int, sink: Sink) -> Answer:
        return self._restart(self._held(op, partition), op.id, 200)

    def _release(self, op: Release, partition: int, sink: Sink) -> Answer:
        self._held(op, partition)
        self._end_lease(op.key, partition)
        return Answer(op.id, 204)

    def _restart(self, lease: Lease, op_id: int, status: int) -> Answer:
        """The lease's time begins anew when this batch is visible, and does not end before."""
        self._locks.suspend(lease)
        self.started.append(lease)
        return Answer(op_id, status, lease.token, value=lease.owner.encode(), ttl_left_ms=round(lease.ttl_s * 1000))

    def _held(self, op: Renew | Release, partition: int) -> Lease:
        lease = self._lease(op.key, partition)
        if lease is None or lease.token != op.token:
            raise LockLost(f"the lock {op.key!r} is not held with token {op.token}")
        return lease

    def _lease(self, name: str, partition: int) -> Lease | None:
        """Who holds the name, after the expiry that was due."""
        lease = self._locks.lease(name)
        if lease is not None and lease.deadline_s <= self._context.now_s:
            self._end_lease(name, partition)
            lease = self._locks.lease(name)
        return lease

    def _end_lease(self, name: str, partition: int) -> None:
        """The lease is over; the first waiter who is still there has the next one."""
        self._locks.end(name)
        self._write(LEASE, name, partition, None, 0)
        while self._locks.lease(name) is None and (waiter := self._locks.next_for_lease(name)) is not None:
            op, sink = waiter
            if not sink.closed and isinstance(op, Acquire):
                self._run(op, partition, sink)

    def _expire_lease(self, op: ExpireLease, partition: int, sink: Sink) -> Answer:
        self._lease(op.key, partition)
        return Answer(op.id, 200)

    def _end_wait(self, op: EndWait, partition: int, sink: Sink) -> Answer:
        lease = self._lease(op.key, partition)
        for waiter in self._locks.waiting_for_lease(op.key):
            if waiter[0] is op.acquire and lease is not None:
                self._locks.leave_lease_queue(op.key, waiter)
                self._answer(waiter[1], refusal(op.acquire.id, self._locked(lease)))
        return Answer(op.id, 200)

    def _leave(self, op: Leave, partition: int, sink: Sink) -> Answer:
        for waiter in self._locks.waiting_for_lease(op.key):
            if waiter[0].id == op.acquire and waiter[1] is sink:
                self._locks.leave_lease_queue(op.key, waiter)
                gone = Locked(f"the waiter for {op.key!r} has left the queue", retry_after_ms=100)
                self._answer(sink, refusal(op.acquire, gone))
        return Answer(op.id, 200)

    def _inspect(self, op: Inspect, partition: int, sink: Sink) -> Answer:
        lease = self._lease(op.key, partition)
        if lease is None:
            return Answer(op.id, 404)
        document = self._describe(lease) | {"token": lease.token}
        return Answer(op.id, 200, lease.token, msgspec.json.encode(document))

    def _describe(self, lease: Lease) -> dict[str, Any]:
        waiting = len(self._locks.waiting_for_lease(lease.name))
        left_s = round(lease.left_s(self._context.now_s), 3)
        return {"name": lease.name, "owner": lease.owner, "ttl_left": left_s, "waiting": waiting}

    def _locked(self, lease: Lease) -> Locked:
        left_ms = round(lease.left_s(self._context.now_s) * 1000)
        holder = f"by {lease.owner!r}" if lease.owner else "by somebody without a name"
        return Locked(
            f"the lock {lease.name!r} is held {holder} for another {left_ms / 1000:g} s at most",
            owner=lease.owner,
            ttl_left=left_ms / 1000,
            retry_after_ms=min(max(left_ms, 50), 1000),
        )

    # --- idempotency --------------------------------------------------------------------------------------------------

    def _kept(self, op: Any, once: Once, partition: int) -> Answer | None:
        """The answer of the first request with this Idempotency-Key, if there was one.

        Raises IdempotencyKeyReused, and LockLost for an acquire whose grant is over.
        """
        row_key = _reply_key(op, once)
        before = self._before(REPLY, row_key)
        if not before.live or before.expires_at_ms <= self._context.now_ms:
            return None
        row = self.changed.get((REPLY, row_key))
        body = row.body if row is not None else self._committed.body(REPLY, row_key)
        kept = msgspec.json.decode(body or b"", type=Kept)
        if kept.digest != once.digest:
            raise IdempotencyKeyReused(f"the Idempotency-Key {once.key!r} came with another request before")
        if isinstance(op, Acquire) and kept.status == 201:
            lease = self._lease(op.key, partition)
            if lease is None or lease.token != kept.version:
                raise LockLost(f"the grant with token {kept.version} that this key was answered with is over")
            return self._restart(lease, op.id, 201)
        return Answer(op.id, kept.status, kept.version, kept.owner.encode() or None, kept.ttl_ms, kept.problem)

    def _keep(self, op: Any, once: Once, partition: int, answer: Answer) -> None:
        if answer.status in _DECIDED:
            owner = (answer.value or b"").decode()
            kept = Kept(once.digest, answer.status, answer.version, answer.problem, owner, answer.ttl_left_ms)
            expires_at_ms = self._context.now_ms + self._context.reply_kept_ms
            self._write(REPLY, _reply_key(op, once), partition, msgspec.json.encode(kept), expires_at_ms)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _need_room(self) -> None:
        if self.frees_only:
            raise DiskFull()

    def _before(self, kind: str, key: str) -> Before:
        known = self._seen.get((kind, key))
        if known is None:
            known = self._seen[kind, key] = self._committed.before(kind, key) or _NOTHING
        return known

    def _write(self, kind: str, key: str, partition: int, body: bytes | None, expires_at_ms: int) -> Before:
        before = self._before(kind, key)
        self._version = max(self._version, before.version) + 1
        self._sequence += 1
        self.changed[kind, key] = Row(kind, key, partition, self._sequence, self._version, expires_at_ms, body)
        if kind == VALUE:
            key_size = len(key.encode())
            if before.live:
                self._keys -= 1
                self._bytes -= key_size + before.size
            if body is not None:
                self._keys += 1
                self._bytes += key_size + len(body)
        after = Before(self._version, expires_at_ms, len(body or b""), body is not None)
        self._seen[kind, key] = after
        return after


def refusal(op_id: int, error: KvError) -> Answer:
    """The answer of an operation that was not done, and why."""
    return Answer(op_id, error.status, problem=error.problem())


def _queue_full(name: str) -> TooManyRequests:
    return TooManyRequests(f"too many wait for {name!r}", retry_after_ms=500)


def _reply_key(op: Any, once: Once) -> str:
    """An Idempotency-Key belongs to its target: kind of request and key. It holds no line feed: no two share a row."""
    return f"{once.key}\n{type(op).__name__}\n{op.key}"


def _condition_holds(guard: Guard, before: Before) -> bool:
    """RFC 9110, 13.2.2: If-Match first, then If-None-Match; both must hold."""
    version = before.version if before.live else None
    return (
        not (guard.present and not before.live)
        and not (guard.absent and before.live)
        and (guard.versions is None or version in guard.versions)
        and (guard.not_versions is None or version not in guard.not_versions)
    )
