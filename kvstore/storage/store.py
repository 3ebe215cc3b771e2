"""A store: one file, one ordered stream of batches, one version clock, one cache, and what is visible of them.

Owns: the queue of writes and their group commit; the queue of reads; the visible sequence; expiry and the trimming of
tombstones.
Promises:
  - A write is answered after the commit of its batch, and answers leave in batch order: one that changed nothing
    (404, 507, 421) waits for
    the batch that it saw, too.
  - Reads show visible changes only. A change becomes visible after its commit and before its answer leaves.
  - Ownership (the same arrival of the partition) is checked before and after every read and page, and inside every
    batch.
  - A commit that fails ends the process: nobody can know its outcome.
Leaves to others: the file (`sqlite`), the decisions (`batch`), which partitions are owned (`shard.service`), the
wire.

A store is an object, not a process: a process may serve more than one.

    write ─> queue ─┐ while one batch is at work the next one gathers
                    └─> batch: decide, COMMIT (its own thread) ─> visible: cache, sequence ─> answers, in order
    get ──> cache ──hit──────────────────────────────────────────> answer
              └──miss──> queue ─> reader thread, many keys a hop ─> checked, cached ─> answer

`arrivals` holds for each partition the number of its arrival in this store, 0 when it is not owned. A partition that
leaves and comes back has another number, so "the same arrival" means that nobody else had it in between.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from kvstore.config import Limits
from kvstore.errors import Conflict, DataCorrupt, KvError, TooManyRequests, from_problem
from kvstore.metrics import ShardStats
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Acquire,
    Answer,
    Attempt,
    Count,
    Fenced,
    Get,
    Message,
    MovedRow,
    Page,
    Pull,
    Reply,
    Rows,
    Scan,
    ScanLeases,
    message_bytes,
    txn_id,
)
from kvstore.storage.batch import Batch, EndLockWaits, Expire, Locks, Waiter, WriteOp, wrong_owner
from kvstore.storage.cache import ABSENT, Cache, Entry
from kvstore.storage.changes import Sink
from kvstore.storage.kept_decisions import KeptDecisions
from kvstore.storage.lease_timers import RETRY_S, LeaseTimers
from kvstore.storage.leases import EndWait, ExpireLease, refusal
from kvstore.storage.listings import Listings
from kvstore.storage.live import live_facts
from kvstore.storage.participant import EndReads
from kvstore.storage.rows import DECISION, VALUE, Row
from kvstore.storage.sqlite import Database, Found, Step, Work
from kvstore.transactions.decisions import Decision, decode_decision
from kvstore.transactions.intents import Hold, Holds, State
from kvstore.transactions.locks import LockTable

log = logging.getLogger(__name__)

_TRIM_ROWS_MAX = 500
_READ_KEYS_MAX = 256
_COUNT_KEYS_MAX = 20_000
_IN_DOUBT_MAX = 1000
_REMOVED_ROWS_MAX = 2000
_BUSY_SHARE = 8  # while others are at work a step of a move is so many times smaller
_LOAD_WINDOW_S = 0.1
_IDLE_OPS_PER_S = 20
_PAUSE_S = 0.002

T = TypeVar("T")


class Store:
    def __init__(
        self,
        database: Database,
        limits: Limits,
        on_fatal: Callable[[BaseException], NoReturn],
    ) -> None:
        self.database = database
        self.arrivals = [0] * database.identity.partitions
        self.epoch = 0
        self._fenced: Set[int] = frozenset()
        self._left: set[int] = set()
        self._litter: set[int] = set()
        self._litter_found = asyncio.Event()
        self.stats = ShardStats()
        self._limits = limits
        self._on_fatal = on_fatal
        self._cache = Cache(limits.cache_bytes_max)
        self._visible = database.clock.sequence
        self._locks: Locks = LockTable(secrets.token_hex(8), limits.lock_waiters_max)
        self._holds = Holds()
        self._blocked: dict[str, list[tuple[Get, Sink]]] = {}
        self._blocked_count = 0
        self._decisions = KeptDecisions(2 * limits.txn_timeout_s)
        self.recovery_due = asyncio.Event()
        self._lease_timers = LeaseTimers(self._locks, lambda name: self.tell(ExpireLease(name)))
        self._writes: deque[Waiter | _Alone] = deque()
        self._urgent: deque[_Alone] = deque()
        self._write_bytes = 0
        self._write_queued = asyncio.Event()
        self._reads: list[tuple[Get, Sink, int, int]] = []
        self._read_queued = asyncio.Event()
        self.handover = database.handover
        self._writes_done = 0
        self._load = time.monotonic(), 0, False  # when it was looked at last, what was done then, and if that was busy
        self._listings = Listings(self, limits)
        self._when_visible: list[tuple[int, Callable[[], None]]] = []
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(
        cls,
        path: Path,
        limits: Limits,
        shard_id: str,
        partitions: int,
        on_fatal: Callable[[BaseException], NoReturn],
    ) -> Store:
        """Open the file and answer for what its map says is owned. Raises ForeignData; DataCorrupt for a damaged lease,
        intent or decision."""
        store = cls(await Database.open(path, limits, shard_id, partitions), limits, on_fatal)
        try:
            await store._do_alone(store.handover.restore)
            store._scatter(await store._do_alone(store.handover.litter))
        except BaseException:
            await store.database.close()  # its threads would keep the process from ending
            raise
        for work in (
            store._commit_batches(),
            store._read_batches(),
            store._sweep(),
            store._trim(),
            store._end_waits_in_time(),
            store._tidy(),
        ):
            store._tasks.append(asyncio.create_task(store._guard(work)))
        return store

    async def close(self) -> None:
        """Commit and answer what is queued, then close the file."""
        self._closing = True
        self._write_queued.set()
        await self._tasks[0]
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lease_timers.close()
        await self.database.close()

    @property
    def cluster_map(self) -> ClusterMap | None:
        """The newest that is durable here; None before the first one."""
        return self.handover.cluster_map

    @property
    def strike(self) -> int:
        """The epoch of the last strike that is durable here."""
        return self.handover.openings.last

    # --- partitions come and go --------------------------------------------------------------------------------------

    async def adopt(self, cluster_map: ClusterMap) -> bool:
        """Answer for what the map says is owned, when that is durable; False if the map is not newer than the last."""
        before = self.handover.view
        is_newer = await self._alone(partial(self.handover.adopt, cluster_map), urgent=True)
        view = self.handover.view
        self.database.identity = self.database.identity._replace(cluster_id=cluster_map.cluster_id)
        self._scatter((before.owned | before.foreign) - view.owned - view.foreign)
        return is_newer

    async def fence(self, move: str) -> Fenced:
        """Answer for the partitions of that move no more. Raises Conflict."""
        return await self._alone(partial(self.handover.fence, move), urgent=True)

    async def clear(self, move: str) -> None:
        """Remove what lies here of the partitions that the move is to bring. Raises Conflict."""
        while await self._alone(partial(self.handover.clear, move, _REMOVED_ROWS_MAX)):  # noqa: ASYNC110 (no poll: work)
            await asyncio.sleep(self.pause_s(0.0))

    async def take(self, move: str, rows: Sequence[MovedRow]) -> int:
        """Rows that the move brings; how many bytes they are. Raises Conflict, DataCorrupt."""
        return await self._alone(partial(self.handover.take, move, rows))

    async def complete(self, move: str, fenced: Fenced, rows: Sequence[MovedRow]) -> None:
        """With these last rows the move has brought all: compare. Raises Conflict if it has not, DataCorrupt."""
        await self._alone(partial(self.handover.complete, move, fenced, rows), urgent=True)

    async def pull(self, pull: Pull) -> Rows:
        """Rows for another store. Raises Conflict for partitions that are not owned, DataCorrupt."""
        if not self.handover.view.owned.issuperset(pull.partitions):
            raise Conflict("this shard does not own these partitions", retry_after_ms=100)
        busy = self.busy
        bytes_max = self._limits.page_bytes_max // (_BUSY_SHARE if busy else 1)
        page = await self.database.pull(pull, bytes_max)
        page.busy = busy
        return page

    @property
    def busy(self) -> bool:
        """Others than moves are at work here: more than some operations a second, in the last fraction of one."""
        stats = self.stats
        done = stats.cache_hits + stats.cache_misses + self._writes_done
        since_s, done_before, busy = self._load
        now_s = time.monotonic()
        if now_s - since_s >= _LOAD_WINDOW_S:
            busy = done - done_before > _IDLE_OPS_PER_S * (now_s - since_s)
            self._load = now_s, done, busy
        return busy

    def pause_s(self, worked_s: float, *, busy: bool | None = None) -> float:
        """How long a move should leave the store alone, having worked for that long. `busy`: that others are at work,
        in this store or in another one that the move works with; by default, whether they are in this one."""
        if not (self.busy if busy is None else busy):
            return 0.0
        return max(worked_s, _PAUSE_S) * (1 / self._limits.move_busy_share - 1)

    def _scatter(self, partitions: Set[int]) -> None:
        """Rows of these may lie here that belong elsewhere."""
        self._litter |= partitions
        if self._litter:
            self._litter_found.set()

    async def _tidy(self) -> None:
        """Remove what is left of partitions that are elsewhere, when no move is under way here: those come first."""
        while True:
            await self._litter_found.wait()
            self._litter_found.clear()
            while (partitions := frozenset(self._litter)) and not self.handover.view.takes_part:
                started_s = time.monotonic()
                rows_max = _REMOVED_ROWS_MAX // _BUSY_SHARE if self.busy else _REMOVED_ROWS_MAX
                if await self._alone(partial(self.handover.trim, partitions, rows_max)) < rows_max:
                    self._litter -= partitions
                await asyncio.sleep(self.pause_s(time.monotonic() - started_s))

    async def _alone(self, step: Step[T], *, urgent: bool = False) -> T:
        """When its turn in the queue of writes comes, with nothing else at work. Raises what the step raises.

        `urgent`: next, before all that is queued, because nobody answers for some partition until it is done. What it
        passes by is done or bounced by what is true then.
        """
        alone = _Alone(step, asyncio.get_running_loop().create_future())
        (self._urgent if urgent else self._writes).append(alone)
        self._write_queued.set()
        return await alone.future  # type: ignore[no-any-return]

    async def _do_alone(self, step: Step[T]) -> T:
        batch, result = await self.database.commit_step(self._work([]), step)
        self._publish(batch)
        self._answer_for(list(batch.arrivals))
        for sink, answer in batch.answers:
            sink.send(answer)
        return result

    def _answer_for(self, arrivals: list[int]) -> None:
        """The partitions are these now. What the cache knows of one is wrong when that comes back, not before."""
        view = self.handover.view
        self.epoch, self._fenced = view.epoch, view.fenced
        before, self.arrivals = self.arrivals, arrivals
        came = {partition for partition, arrival in enumerate(arrivals) if arrival and not before[partition]}
        left = {partition for partition, arrival in enumerate(before) if arrival and not arrivals[partition]}
        if not came and not left:
            return
        if came & self._left:
            self._cache.clear()
            self._left.clear()
        self._left |= left
        self.recovery_due.set()
        blocked, self._blocked, self._blocked_count = self._blocked, {}, 0
        for op, sink in itertools.chain.from_iterable(blocked.values()):
            if not sink.closed:
                self.get(op, sink)

    # --- writes ------------------------------------------------------------------------------------------------------

    def write(self, op: WriteOp, sink: Sink) -> None:
        """Queue a write; its answer goes to `sink` when its batch is durable."""
        size = _size(op)
        if len(self._writes) >= self._limits.queue_ops_max or self._write_bytes + size > self._limits.queue_bytes_max:
            full = TooManyRequests("the shard's queue of writes is full", retry_after_ms=100)
            sink.send(refusal(op.id, full))
            return
        self._writes.append((op, sink))
        self._write_bytes += size
        self._write_queued.set()

    async def _commit_batches(self) -> None:
        while True:
            await self._write_queued.wait()
            if self._urgent:
                await self._settle_alone(self._urgent.popleft())
            elif waiters := self._take_batch():
                started = time.perf_counter()
                batch = await self.database.commit(self._work(waiters))
                self.stats.commit_s.observe(time.perf_counter() - started)
                self.stats.batch_ops.observe(len(waiters))
                self._publish(batch)
                for sink, answer in batch.answers:
                    sink.send(answer)
                self._writes_done += len(waiters)
                if self.database.checkpoint_is_due:
                    await self.database.checkpoint()
            elif self._writes and isinstance(alone := self._writes[0], _Alone):
                self._writes.popleft()
                await self._settle_alone(alone)
            elif self._closing:
                return

    async def _settle_alone(self, alone: _Alone) -> None:
        try:
            result = await self._do_alone(alone.step)
        except KvError as error:
            if not alone.future.done():
                alone.future.set_exception(error)
        else:
            _settle(alone.future, result)
        if self.database.checkpoint_is_due:
            await self.database.checkpoint()

    def _work(self, waiters: list[Waiter]) -> Work:
        now_ms, now_s = _now_ms(), time.monotonic()
        return Work(
            waiters,
            now_ms,
            now_s,
            self.arrivals,
            self.epoch,
            self._locks,
            self._holds,
            self._known,
            self._fenced,
            self.handover.openings,
        )

    def _take_batch(self) -> list[Waiter]:
        waiters: list[Waiter] = []
        size = 0
        while self._writes and len(waiters) < self._limits.batch_ops_max and size < self._limits.batch_bytes_max:
            queued = self._writes[0]
            if isinstance(queued, _Alone):
                return waiters
            op, sink = queued
            self._writes.popleft()
            op_size = _size(op)
            self._write_bytes -= op_size
            if not sink.closed:
                size += op_size
                waiters.append((op, sink))
        if not self._writes and not self._closing:
            self._write_queued.clear()
        return waiters

    def _known(self, key: str) -> State | None:
        """Called in the writer's thread: while a batch is decided all that is committed is visible, as the cache is."""
        entry = self._cache.peek(key)
        return State(entry.version, entry.expires_at_ms, entry.value) if entry is not None else None

    def _publish(self, batch: Batch) -> None:
        self.stats.expired += batch.expired
        self.stats.disk_full = batch.frees_only
        decided: list[Row] = []
        for row in batch.changed.values():
            if row.kind == VALUE:
                self._cache.publish(row.key, _entry(row))
                if row.key in self._blocked:
                    decided.append(row)
        for lease in batch.started:
            self._lease_timers.start(lease)
        for op, _ in batch.parked:
            asyncio.get_running_loop().call_later(op.wait_ms / 1000, self._end_wait, op)
        self._visible = batch.clock.sequence
        if self._when_visible:
            ready = [then for sequence, then in self._when_visible if sequence <= self._visible]
            self._when_visible = [wait for wait in self._when_visible if wait[0] > self._visible]
            for then in ready:
                then()
        self._note_transactions(batch)
        for row in decided:
            self._unblock(row)

    # --- leases ------------------------------------------------------------------------------------------------------

    def _end_wait(self, op: Acquire) -> None:
        """If the queue of writes is full, again soon: else the waiter would stay, and be granted a lease in vain."""

        def look(reply: Reply) -> None:
            if isinstance(reply, Answer) and reply.status == TooManyRequests.status and not self._closing:
                asyncio.get_running_loop().call_later(RETRY_S, self._end_wait, op)

        self.write(EndWait(op.key, op), _Then(look))

    # --- transactions ------------------------------------------------------------------------------------------------

    def _note_transactions(self, batch: Batch) -> None:
        self._decisions.note(batch.decided, batch.dropped)
        if batch.met and any(map(self._is_old, batch.met)):
            self.recovery_due.set()

    def _is_old(self, hold: Hold) -> bool:
        return hold.closed or time.monotonic() - hold.since_s > self._limits.txn_timeout_s

    def old_holds(self) -> list[Hold]:
        """Attempts whose intents are too old: somebody must ask what became of them. Owned partitions only."""
        return [hold for hold in self._holds.all() if self._is_old(hold) and self.owned_keys(hold)]

    def owned_keys(self, hold: Hold) -> list[str]:
        """Those of its keys here whose partition is owned."""
        partitions = len(self.arrivals)
        return [key for key in list(hold.intents) if self.arrivals[partition_of(key.encode(), partitions)]]

    def acknowledge(self, attempts: list[Attempt]) -> None:
        """The routers say that these are finished everywhere."""
        self._decisions.acknowledge(attempts)

    def old_decisions(self, finished_max: int) -> tuple[list[tuple[Attempt, int]], list[Attempt]]:
        """Of owned partitions: see `KeptDecisions.old`."""
        return self._decisions.old(self.arrivals, finished_max)

    async def decision(self, attempt: Attempt) -> Decision | None:
        """What was decided about the attempt, anchored here, while it is kept. Raises DataCorrupt."""
        row = await self.database.row(DECISION, attempt.name)
        return decode_decision(row.body) if row is not None and row.body is not None else None

    def tell(self, op: WriteOp) -> None:
        """Queue an operation of this process's own whose answer nobody needs."""
        self.write(op, _NOBODY)

    async def ask(self, op: WriteOp) -> Reply:
        """The answer to an operation of this process's own."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.write(op, _Then(partial(_settle, future)))
        return await future

    def read(self, key: str) -> asyncio.Future[Reply]:
        """The answer to a get on nobody's behalf."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.get(Get(0, key), _Then(partial(_settle, future)))
        return future

    def now_ms(self) -> int:
        """Unix time."""
        return _now_ms()

    def _block(self, op: Get, sink: Sink) -> None:
        """The read has met an intent: it is answered when that is gone."""
        if self._blocked_count >= self._limits.read_queue_ops_max:
            full = TooManyRequests("too many reads wait for transactions", retry_after_ms=100)
            sink.send(refusal(op.id, full))
            return
        self._blocked.setdefault(op.key, []).append((op, sink))
        self._blocked_count += 1
        hold = self._holds.on(op.key)
        if hold is not None and self._is_old(hold):
            self.recovery_due.set()

    def _unblock(self, row: Row) -> None:
        """The intent that readers of the key met is decided: as long as it stands nobody else changes the row.

        Another one may stand there already, of who was next in the queue. It is none of theirs: its vote has not left
        yet, so it cannot be decided before they are answered. (If they waited for that, too, and for the next one, they
        would wait for as long as the queue is not empty.)
        """
        waiting = self._blocked.pop(row.key, [])
        self._blocked_count -= len(waiting)
        entry = Entry(row.body, row.version, row.expires_at_ms)
        for op, sink in waiting:
            if sink.closed:
                continue
            if self.arrivals[row.partition]:
                self._answer_get(op, sink, entry)
            else:
                sink.send(self._wrong_owner(op.id, row.partition))

    # --- reads -------------------------------------------------------------------------------------------------------

    def get(self, op: Get, sink: Sink) -> None:
        """Answer from the cache now, or from the file soon."""
        partition = partition_of(op.key.encode(), len(self.arrivals))
        arrival = self.arrivals[partition]
        if not arrival:
            sink.send(self._wrong_owner(op.id, partition))
            return
        entry = self._cache.get(op.key)
        if entry is not None:
            self.stats.cache_hits += 1
            self._answer_get(op, sink, entry)
        elif len(self._reads) >= self._limits.read_queue_ops_max:
            full = TooManyRequests("the shard's queue of reads is full", retry_after_ms=100)
            sink.send(refusal(op.id, full))
        else:
            self.stats.cache_misses += 1
            self._reads.append((op, sink, partition, arrival))
            self._read_queued.set()

    def _answer_get(self, op: Get, sink: Sink, entry: Entry) -> None:
        value, version, expires_at_ms = entry.value, entry.version, entry.expires_at_ms
        if entry.has_intent:
            self._block(op, sink)
        elif value is None:
            sink.send(Answer(op.id, 404))
        elif not expires_at_ms:
            sink.send(Answer(op.id, 200, version, value))
        elif (left_ms := expires_at_ms - _now_ms()) > 0:
            sink.send(Answer(op.id, 200, version, value, left_ms))
        else:
            self.write(Expire(op.key), _Then(lambda reply: self._get_expired(op, sink, reply), sink))

    def _get_expired(self, op: Get, sink: Sink, reply: Reply) -> None:
        if isinstance(reply, Answer) and reply.problem is not None:
            sink.send(refusal(op.id, from_problem(reply.problem)))
        else:
            self.get(op, sink)

    async def _read_batches(self) -> None:
        while True:
            await self._read_queued.wait()
            queued, self._reads = self._reads[:_READ_KEYS_MAX], self._reads[_READ_KEYS_MAX:]
            reads = [read for read in queued if not read[1].closed]
            if not self._reads:
                self._read_queued.clear()
            tickets = [self._cache.begin(op.key) for op, _, _, _ in reads]
            found = await self.database.read([op.key for op, _, _, _ in reads])
            for read, ticket, result in zip(reads, tickets, found, strict=True):
                self._finish_read(*read, ticket, result)

    def _finish_read(
        self, op: Get, sink: Sink, partition: int, arrival: int, ticket: int, found: Found | DataCorrupt
    ) -> None:
        if self.arrivals[partition] != arrival:
            self._cache.finish(op.key, ticket, None)
            sink.send(self._wrong_owner(op.id, partition))
        elif isinstance(found, DataCorrupt):
            self._cache.finish(op.key, ticket, None)
            log.error("%s", found)
            sink.send(refusal(op.id, found))
        elif found.row is not None and found.row.sequence > self._visible:
            self._cache.finish(op.key, ticket, None)
            self._when_visible.append((found.row.sequence, lambda: self.get(op, sink)))
        else:
            row = found.row
            entry = ABSENT if row is None else _entry(row)
            is_newest = self._cache.finish(op.key, ticket, entry)
            if entry.has_intent and not is_newest:
                self.get(op, sink)  # that intent may be gone already, and nobody would say so again
            else:
                self._answer_get(op, sink, entry)

    def _wrong_owner(self, op_id: int, partition: int) -> Answer:
        return refusal(op_id, wrong_owner(partition, self.epoch, self._fenced))

    async def scan(self, op: Scan) -> Page:
        """A page of visible live values of owned partitions. Raises DataCorrupt, TooManyRequests."""
        return await self._listings.scan(op)

    async def leases(self, op: ScanLeases) -> Page:
        """A page of leases that stand, in order of their names: (name, token, owner, milliseconds left)."""
        return await self._listings.leases(op, self._locks)

    async def count(self, op: Count) -> Page:
        """How many visible live values whose key starts with the prefix there are. Raises DataCorrupt."""
        return await self._listings.count(op)

    async def until_visible(self, sequence: int) -> None:
        if sequence > self._visible:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._when_visible.append((sequence, partial(_settle, future)))
            await future

    # --- background work ---------------------------------------------------------------------------------------------

    async def expire(self, ops: list[Expire]) -> None:
        """Have these expiries made, and wait until they are visible. Raises TooManyRequests, KvError, DataCorrupt.

        A row whose partition has left is passed over: its new owner expires it.
        """
        loop = asyncio.get_running_loop()
        for start in range(0, len(ops), self._limits.expiry_ops_max):
            answers = []
            for op in ops[start : start + self._limits.expiry_ops_max]:
                future: asyncio.Future[Reply] = loop.create_future()
                answers.append(future)
                self.write(op, _Then(partial(_settle, future)))
            for answer in await asyncio.gather(*answers):
                if isinstance(answer, Answer) and answer.status in (TooManyRequests.status, KvError.status):
                    raise from_problem(answer.problem or {})

    async def _expire_due(self) -> None:
        count_max = self._limits.expiry_ops_max
        while len(due := await self.database.due(_now_ms(), self.arrivals, count_max)) == count_max:
            await self.expire(due)
        await self.expire(due)

    async def _sweep(self) -> None:
        """Expire what is due, at whatever rate that is."""
        while True:
            await asyncio.sleep(self._limits.expiry_sweep_s)
            try:
                await self._expire_due()
            except TooManyRequests as error:
                log.debug("the sweep goes on later: %s", error)
            except KvError as error:
                log.error("the sweep goes on later: %s", error)

    async def _trim(self) -> None:
        """Trim the tombstones that are old enough, at whatever rate they are made."""
        marks: deque[tuple[float, int]] = deque()
        while True:
            await asyncio.sleep(self._limits.expiry_sweep_s)
            now = time.monotonic()
            if not marks or now - marks[-1][0] >= 1.0:
                marks.append((now, self._visible))
            while marks and now - marks[0][0] >= self._limits.tombstone_kept_s:
                if await self.database.trim_tombstones(marks[0][1], _TRIM_ROWS_MAX) < _TRIM_ROWS_MAX:
                    marks.popleft()

    async def _end_waits_in_time(self) -> None:
        """Apart from the sweep, whose expiries may be among those who wait."""
        while True:
            await asyncio.sleep(self._limits.expiry_sweep_s)
            self._end_waits()

    def _end_waits(self) -> None:
        """Nobody waits for a lock, or reads under one, for longer than a transaction may take."""
        limits = self._limits
        now_s = time.monotonic()
        since_s = now_s - limits.txn_timeout_s
        if not self._locks.is_idle:
            plain_s = min(2 * limits.txn_timeout_s, 0.8 * limits.request_timeout_s)  # the router must hear of it
            self.tell(EndLockWaits(since_s, now_s - plain_s))
        readers = list(self._holds.readers.items())
        if over := [number for number, hold in readers if hold.since_s <= since_s or hold.sink.closed]:
            self.tell(EndReads(over))

    async def _guard(self, work: Any) -> None:
        """Run `work`; what it cannot survive nobody can: end the process."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._on_fatal(error)

    # --- for people --------------------------------------------------------------------------------------------------

    async def explain(self, key: str) -> dict[str, Any]:
        """The committed row of the key: kind of row, version, sequence, size, deadline; or that it is damaged.

        Raises WrongOwner.
        """
        partition = partition_of(key.encode(), len(self.arrivals))
        arrival = self.arrivals[partition]
        (found,) = await self.database.read([key])
        if not arrival or self.arrivals[partition] != arrival:
            raise wrong_owner(partition, self.epoch, self._fenced)
        if isinstance(found, KvError):
            return {"row": "damaged", "detail": found.detail}
        row = found.row
        lease = self._locks.lease(key)
        lock = None
        if lease is not None:
            left_s = round(lease.left_s(time.monotonic()), 3)
            lock = {"owner": lease.owner, "token": lease.token, "ttl_left": left_s}
        intent = self._explain_intent(key)
        if row is None or (row.body is None and not row.version):  # an intent was all that the key ever had
            return {"row": "absent", "lock": lock, "intent": intent}
        return {
            "lock": lock,
            "intent": intent,
            "row": "value" if row.body is not None else "tombstone",
            "version": row.version,
            "sequence": row.sequence,
            "bytes": len(row.body or b""),
            "expires_at_ms": row.expires_at_ms or None,
            "cached": self._cache.peek(key) is not None,
        }

    def _explain_intent(self, key: str) -> dict[str, Any] | None:
        hold = self._holds.on(key)
        if hold is None:
            return None
        partition = partition_of(hold.anchor.encode(), len(self.arrivals))
        return {
            "txn": txn_id(hold.attempt, partition),
            "anchor": hold.anchor,
            "age_s": round(time.monotonic() - hold.since_s, 3),
            "vote": hold.vote_on(key),
        }

    def in_doubt(self) -> dict[str, float]:
        """The attempts that hold keys here, at most 1,000, and for how many seconds each."""
        now_s = time.monotonic()
        return {hold.attempt.name: round(now_s - hold.since_s, 3) for hold in self._holds.all()[:_IN_DOUBT_MAX]}

    def live(self, live_max: int) -> dict[str, Any]:
        """The locks held and the attempts at work: see `live_facts`."""
        return live_facts(self._locks, self._holds, len(self.arrivals), live_max, time.monotonic())

    def snapshot(self) -> ShardStats:
        """The numbers as of now."""
        stats, clock = self.stats, self.database.clock
        stats.keys, stats.bytes = clock.keys, clock.bytes
        stats.file_bytes, stats.wal_bytes = self.database.file_bytes, self.database.wal_bytes
        stats.write_queue_ops, stats.read_queue_ops = len(self._writes), len(self._reads)
        stats.cache_keys = len(self._cache)
        holds = self._holds.all()
        stats.in_doubt = len(holds)
        stats.in_doubt_oldest_s = max((time.monotonic() - hold.since_s for hold in holds), default=0.0)
        stats.decisions = len(self._decisions)
        return stats


class _Alone(NamedTuple):
    """A step in the queue of writes: what comes before it is answered first, what comes behind finds it done."""

    step: Step[Any]
    future: asyncio.Future[Any]


class _Then:
    """A sink that calls a function; `behind` is the sink of the client on whose behalf it is, if any."""

    def __init__(self, function: Callable[[Reply], None], behind: Sink | None = None) -> None:
        self._function = function
        self._behind = behind

    def send(self, reply: Reply, /) -> None:
        self._function(reply)

    @property
    def closed(self) -> bool:
        return self._behind is not None and self._behind.closed


_NOBODY = _Then(lambda _: None)


def _size(op: WriteOp) -> int:
    return message_bytes(op) if isinstance(op, Message) else 64


def _entry(row: Row) -> Entry:
    return Entry(row.body, row.version, row.expires_at_ms, row.intent is not None)


def _settle(future: asyncio.Future[Any], result: Any = None) -> None:
    """Whoever waited may have given up meanwhile."""
    if not future.done():
        future.set_result(result)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
