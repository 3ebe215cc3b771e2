"""The pipeline: queue, decide, commit, publish, answer. Every durable change of a store goes through here.

Owns: the queue of writes, the order of batches, the syncs of the log, and when changes become visible.
Promises:
  - An operation is answered after everything that its batch saw is durable, and answers leave in batch order: also one
    that changed nothing (404, 421, 507) waits for the batches before it.
  - Operations that name the same key are decided in the order in which they came.
  - A change becomes visible when its record is durable, and before its answer leaves.
  - Where the store has copies, durable means: on every disk that is waited for. A record leaves for the copies before
    the own sync begins. What no record carries is answered only while the lease is held.
  - A failed append or sync ends the process: its outcome is unknown, so nothing may be answered any more.
  - Where the disk is quick the sync runs on this thread: no hop, and what arrives during it makes the next batch
    fuller. Where it is not, it runs in a thread, and the next batch is decided at the same time on what was executed.
    While a record is on its way to copies, no other batch is decided, and what arrives makes the next one fuller.
Leaves to others: what an operation does (`batch`), how long a batch waits to become fuller (`gathering`), the log
(`storage.log`), the file (`applier`).

That many operations share one sync is group commit (DeWitt et al., "Implementation Techniques for Main Memory Database
Systems", 1984).

    write ─> at hand? ──> queue ─> decide ─> append ─> sync ─> publish ─> answers, in order
               └ no: fetched, many keys a hop ─┘          └ in a thread, if the disk is slow

A crash before a sync has returned means: no client was answered, and the record may or may not be found again. A crash
after it means: it is found again, and some were not told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from kvstore import failpoints
from kvstore.errors import KvError, OutcomeUnknown, ReadTooLarge, TooManyRequests
from kvstore.message_sizes import message_bytes
from kvstore.storage.engine import RowKey
from kvstore.storage.record import CommitRecord
from kvstore.storage.segments import Position
from kvstore.store.applier import Applier
from kvstore.store.batch import Batch
from kvstore.store.disk_room import DiskRoom
from kvstore.store.fetcher import Fetcher
from kvstore.store.gathering import Gathering
from kvstore.store.log_writer import LogWriter
from kvstore.store.lookup import Lookup, if_whole
from kvstore.store.ops import WriteOp
from kvstore.store.refusals import no_lease, refusal
from kvstore.store.sizes import record_bytes
from kvstore.store.tables import Tables
from kvstore.store.write_set import Context, Sink

log = logging.getLogger(__name__)

T = TypeVar("T")
Decide = Callable[[Batch], T]
OnVisible = Callable[[Batch], None]

_SMALL_BYTES = 1 << 20
_EARLY_S = 0.1
_STEP_BYTES = 2 << 20  # a map and freezes of the largest cluster


class _Step(NamedTuple):
    """A decision of the store's own, made alone: all that came before it is decided, what comes behind sees it.

    Its record has no more than `record_bytes`.
    """

    decide: Decide[Any]
    future: asyncio.Future[Any]
    record_bytes: int


_Entry = tuple[WriteOp, Sink, Sequence[RowKey], int]
"""An operation, where its answer goes, the rows that are pinned for it, and what it counts for as a message."""
_NONE: Sequence[RowKey] = ()


class _Decided(NamedTuple):
    """A batch that waits for `position` to be durable. `record` None: it changed nothing."""

    batch: Batch
    position: Position
    record: CommitRecord | None
    started_s: float
    pinned: list[RowKey]


class Pipeline:
    """`on_visible` is called with each batch when its changes are visible, before its answers leave."""

    def __init__(self, tables: Tables, applier: Applier, on_visible: OnVisible) -> None:
        self._tables = tables
        self._applier = applier
        self._on_visible = on_visible
        self._lookup = Lookup(tables)
        self._room = DiskRoom(tables)
        self.writer = LogWriter(tables, applier, self.settle_up_to)
        self._queue: deque[_Entry | _Step] = deque()
        self._urgent: deque[_Step] = deque()
        self._queued_bytes = 0
        self.fetcher = Fetcher(tables, self._enter)
        self._undurable: deque[_Decided] = deque()
        self._events = _Events()
        self._gathering = Gathering(tables.environment, self.__len__)

    def __len__(self) -> int:
        """How many operations wait to be decided."""
        return len(self._queue) + self.fetcher.waiting

    # --- entering -----------------------------------------------------------------------------------------------------

    def write(self, op: WriteOp, sink: Sink) -> None:
        """Queue an operation; its answer goes to `sink` when all that it saw is durable.

        Raises nothing: what is refused at the door, such as by a full queue, is answered at once.
        """
        tables, queue, fetcher = self._tables, self._queue, self.fetcher
        if (damage := tables.verification.file_damage) is not None:
            sink.send(refusal(op.id, damage))
            return
        if not tables.takes_writes():
            sink.send(refusal(op.id, no_lease()))
            return
        size, count, limits = message_bytes(op), len(queue) + fetcher.waiting, tables.limits
        queued_bytes = self._queued_bytes + size
        if count >= limits.queue_ops_max or queued_bytes > limits.queue_bytes_max:
            full = TooManyRequests("The shard's queue of writes is full; wait and try again.", retry_after_ms=100)
            sink.send(refusal(op.id, full))
            return
        if size > _SMALL_BYTES and record_bytes(op, size, tables.holds, _unknown) > tables.log.payload_bytes_max:
            large = ReadTooLarge("The operation does not fit into one record of the log; send less at a time.")
            sink.send(refusal(op.id, large))
            return
        self._queued_bytes = queued_bytes
        missing = self._lookup.missing(op)
        if missing or (fetcher.waiting and fetcher.has_before(op)):
            fetcher.add(op, sink, missing)
        else:
            queue.append((op, sink, _NONE, size))
            self._events.queued.set()
            self._gathering.note_queued(len(queue))

    async def step(self, decide: Decide[T], *, urgent: bool = False, record_bytes: int = _STEP_BYTES) -> T:
        """Decide alone, and return when that is durable and visible. Raises what `decide` raises, a KvError.

        `urgent`: before all that is queued, because no store serves some partition until it is done.
        """
        step = _Step(decide, asyncio.get_running_loop().create_future(), record_bytes)
        (self._urgent if urgent else self._queue).append(step)
        self._events.queued.set()
        if urgent:
            self._events.settled.set()
            self._gathering.stop()
        return await step.future  # type: ignore[no-any-return]

    def _enter(self, op: WriteOp, sink: Sink, keys: list[RowKey]) -> None:
        """Its rows are in memory, the fetched ones pinned."""
        self._queue.append((op, sink, keys, message_bytes(op)))
        self._events.queued.set()
        self._gathering.note_queued(len(self._queue))

    # --- deciding -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Decide and commit what is queued until `close`. Raises LogFailed, which ends the process."""
        events, has_room = self._events, self._applier.has_room
        while True:
            if not events.queued.is_set():
                await events.queued.wait()
            if not has_room.is_set():
                await has_room.wait()
            if self._undurable:
                await self._until_settled()
            if _waits_for_copies(self._tables) and len(self) and not self._urgent:
                await self._gathering.wait()
            if self._urgent:
                await self._wait_for_room(self._urgent[0].record_bytes)
                self._run_step(self._urgent.popleft())
            elif self._queue and isinstance(first := self._queue[0], _Step) and not self._tables.ready:
                await self._wait_for_room(first.record_bytes)
                self._queue.popleft()
                self._run_step(first)
            elif self._queue or self._tables.ready:
                await self._wait_for_room(self._next_record_bytes())
                self._run_batch()
            elif events.closing and not len(self):
                while self._undurable:
                    events.settled.clear()
                    await events.settled.wait()
                return
            else:
                events.queued.clear()
                continue
            if not (self._undurable and _waits_for_copies(self._tables)):  # else it waits until they are settled
                await asyncio.sleep(0)

    async def _until_settled(self) -> None:
        """Until another batch may be decided."""
        events, undurable_max = self._events, self._tables.limits.undurable_batches_max
        while len(self._undurable) >= (1 if _waits_for_copies(self._tables) and not self._urgent else undurable_max):
            events.settled.clear()
            await events.settled.wait()

    def _next_record_bytes(self) -> int:
        tables = self._tables
        op = tables.ready.first.queued.op if tables.ready else self._queue[0][0]
        return record_bytes(op, message_bytes(op), tables.holds, partial(if_whole, self._lookup.before))

    async def _wait_for_room(self, wanted: int) -> None:
        """The log must have room for what is decided next before that is decided, because then it must be appended."""
        tables = self._tables
        wanted = min(wanted, tables.log.payload_bytes_max)  # no segment has more, and all that is queued fits
        while tables.log.room(frees=self._room.frees_only or tables.log.full) < wanted:
            self._applier.room_wanted = wanted
            self._applier.segment_made.clear()
            self._applier.segment_wanted.set()
            await self._applier.segment_made.wait()
        self._applier.room_wanted = 0

    def close(self) -> None:
        """Let `run` end when everything is decided and durable."""
        self._events.closing = True
        self._events.queued.set()

    @property
    def is_idle(self) -> bool:
        """Whether all that came is decided, durable and answered; what waits for a lock is not counted."""
        return not (len(self) or self._undurable or self._urgent or self._tables.ready)

    async def abandon(self) -> None:
        """Answer what cannot become durable any more, as that: another node serves the store. `run` has ended.

        The sync that is under way is waited for, since the log is to be closed.
        """
        await self.writer.has_stopped()
        undurable, self._undurable = self._undurable, deque()
        queue, self._urgent, self._queue = [*self._urgent, *self._queue], deque(), deque()
        unknown = OutcomeUnknown("the shard has got another primary before this was on every copy.")
        for decided in undurable:
            error = unknown if decided.record is not None else no_lease()
            for then in decided.batch.extras.when_lost:
                then(error)
            for sink, answer in decided.batch.changes.answers:
                sink.send(refusal(answer.id, error))
        for entry in queue:
            if isinstance(entry, _Step):
                fail(entry.future, no_lease())
            else:
                entry[1].send(refusal(entry[0].id, no_lease()))

    def _batch(self) -> Batch:
        tables, environment, limits = self._tables, self._tables.environment, self._tables.limits
        context = Context(
            environment.now_ms(),
            environment.monotonic_s(),
            tables.executed.generations,
            tables.executed.epoch,
            self._room.frees_only,
            round(limits.idempotency_kept_s * 1000),
            limits.txn_read_bytes_max,
            tables.executed.frozen,
            environment.boot,
            tables.openings,
        )
        return Batch(tables.clock, context, tables.locks, tables.holds, self._lookup, tables.ready)

    def _run_batch(self) -> None:
        limits, started_s, holds = self._tables.limits, self._tables.environment.monotonic_s(), self._tables.holds
        batch, queue, count = self._batch(), self._queue, 0
        changes, pinned = batch.changes, list[RowKey]()
        batch.steps.append("batch")
        room = min(self._tables.log.room(frees=changes.context.frees_only), limits.batch_bytes_max)
        is_first = True
        before = partial(if_whole, changes.before)

        def fits(op: WriteOp, size: int) -> bool:
            """The first always does: `_wait_for_room` has seen to that."""
            nonlocal is_first
            if is_first:
                is_first = False
                return True
            return changes.bytes + record_bytes(op, size, holds, before) <= room

        batch.extras.may_begin = lambda op: fits(op, message_bytes(op))
        if self._tables.ready:
            batch.go_on()
        while queue and not self._tables.ready and count < limits.batch_ops_max:
            entry = queue[0]
            if isinstance(entry, _Step):
                break
            op, sink, keys, size = entry
            if not fits(op, size):
                break
            queue.popleft()
            self._queued_bytes -= size
            pinned += keys
            if not sink.closed:
                count += 1
                batch.decide(op, sink)
        self._gathering.note_decided(count)
        self._tables.stats.batch_ops.observe(count)
        self._tables.stats.operations += count
        self._commit(batch, started_s, pinned)

    def _run_step(self, step: _Step) -> None:
        started_s = self._tables.environment.monotonic_s()
        batch = self._batch()
        batch.extras.may_begin = lambda op: False  # what is ready goes on in the next batch
        try:
            result = step.decide(batch)
        except KvError as error:
            if not step.future.done():
                step.future.set_exception(error)
            return
        batch.extras.when_visible.append(lambda: settle(step.future, result))
        batch.extras.when_lost.append(partial(fail, step.future))
        self._gathering.note_decided(0)
        self._commit(batch, started_s, [])
        for then in batch.extras.when_appended:
            then(self.writer.position.number)

    # --- committing ---------------------------------------------------------------------------------------------------

    def _commit(self, batch: Batch, started_s: float, pinned: list[RowKey]) -> None:
        """Append the record; durable now, or when the sync that is asked for has returned."""
        tables = self._tables
        record = batch.record(tables.clock)
        if record is not None and failpoints.planted("early-answer"):
            self._answer_early(batch, record, pinned)
            return
        if _passes_points(batch, record):
            failpoints.hit_steps(batch.steps, "before")
        if record is not None:
            self.writer.append(record)
            tables.clock = record.clock
        if batch.served is not None:
            tables.executed = batch.served
            tables.cache.come_back(batch.served.generations)
        if record is not None and failpoints.planted("applied-before-durable"):
            self._applier.publish(record, batch.changes, self.writer.position)
        self._undurable.append(_Decided(batch, self.writer.position, record, started_s, pinned))
        if not self.writer.is_inline:
            if record is not None:
                tables.memtable.execute(batch.changes.rows)
            self.writer.sync_soon()
            return
        if self.writer.position.number > tables.log.durable:  # also when this batch itself has no record
            self.writer.sync_now()
        self.settle_up_to(tables.log.durable)

    def settle_up_to(self, durable: int) -> None:
        """Publish and answer the batches up to that number, in order, as far as the copies that count have them."""
        undurable = self._undurable
        if (sender := self._tables.sender) is not None:
            durable = min(durable, sender.shipping.committed) if sender.serves else 0
        if not undurable or undurable[0].position.number > durable:
            return
        while undurable and undurable[0].position.number <= durable:
            self._publish(undurable.popleft())
        if sender is not None and not undurable:
            self._gathering.begin(self._tables.limits.batch_ops_max)
        self._events.settled.set()

    def _publish(self, decided: _Decided) -> None:
        batch, position, record, started_s, pinned = decided
        tables = self._tables
        if _passes_points(batch, record):
            failpoints.hit_steps(batch.steps, "after")
        if record is not None:
            tables.visible = record.clock
            if not failpoints.planted("applied-before-durable"):
                self._applier.publish(record, batch.changes, position)
            commit_s = tables.environment.monotonic_s() - started_s
            tables.stats.commit_s.observe(commit_s)
            self._gathering.note_commit(commit_s)
        self._answer(batch, pinned, refuses=record is None and tables.sender is not None and not tables.may_answer())

    def _answer(self, batch: Batch, pinned: list[RowKey], *, refuses: bool = False) -> None:
        """`refuses`: the batch has only looked, at what may not be true any more."""
        self._on_visible(batch)
        for then in batch.extras.when_visible:
            then()
        for sink, answer in batch.changes.answers:
            if refuses:
                batch.reads.refuse(answer)
            sink.send(refusal(answer.id, no_lease()) if refuses else answer)
        self.fetcher.unpin(pinned)

    def _answer_early(self, batch: Batch, record: CommitRecord, pinned: list[RowKey]) -> None:
        """The planted bug of that name: the record is appended when the answers have long left."""
        tables = self._tables
        tables.clock = tables.visible = record.clock
        tables.memtable.execute(batch.changes.rows)
        if batch.served is not None:
            tables.executed = batch.served
            tables.cache.come_back(batch.served.generations)
        self._answer(batch, pinned)

        def append() -> None:
            tables.log.append(record.encode(), frees=True)
            tables.log.sync()
            self.writer.position = tables.log.last
            self._applier.publish(record, batch.changes, self.writer.position)
            self._applier.segment_wanted.set()

        tables.environment.call_later(_EARLY_S, append)


class _Events:
    """What the pipeline's tasks tell one another."""

    def __init__(self) -> None:
        self.queued = asyncio.Event()
        self.settled = asyncio.Event()
        self.closing = False


def _waits_for_copies(tables: Tables) -> bool:
    """Whether records go to copies one at a time.
    What comes while one is on its way makes the next one fuller, and so saves each of them a record."""
    return tables.sender is not None and tables.sender.shipping.waits


def _unknown(kind: str, key: str) -> None:
    return None


def settle(future: asyncio.Future[Any], result: Any = None) -> None:
    """Set the result, unless its waiter has left."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[Any], error: KvError) -> None:
    """Set the error, unless its waiter has left."""
    if not future.done():
        future.set_exception(error)


def _passes_points(batch: Batch, record: CommitRecord | None) -> bool:
    """Clients' operations that change nothing do not; a step of the store does, also where all was done before."""
    return record is not None or batch.steps[:1] != ["batch"]
