"""Reads of single keys: from the cache, from rows that are not applied yet, or from the file.

Owns: the queue of reads, and reads that wait for a transaction.
Promises: a read shows visible changes only, and of a partition that was served, under the same generation, from before
the read until its answer. What a reader thread found enters the cache only if no change of that key became visible
since it set out. A read that meets an undecided intent waits; it never shows the old value after the commit was
answered.
Leaves to others: expiry as a change (`writes`), listings (`scans`).

    get ──> cache ──> unapplied rows ──hit──────────────────────> answer
              └──miss──> queue ─> reader thread, many keys a hop ─> checked, cached ─> answer
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from functools import partial

from kvstore import failpoints
from kvstore.errors import DataCorrupt, TooManyRequests, from_problem
from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Get, Reply
from kvstore.storage.rows import VALUE, Row
from kvstore.store.batch import Batch
from kvstore.store.cache import state_of
from kvstore.store.ops import Expire
from kvstore.store.pipeline import Pipeline, settle
from kvstore.store.refusals import no_lease, refusal, wrong_owner
from kvstore.store.served import Served
from kvstore.store.sinks import Then
from kvstore.store.tables import Tables
from kvstore.store.write_set import Sink
from kvstore.transactions.intents import ABSENT, PreparedTxn, State

log = logging.getLogger(__name__)

_READ_KEYS_MAX = 256


class Reads:
    """`recovery_due` is set when a read is blocked by an intent that is too old."""

    def __init__(self, tables: Tables, pipeline: Pipeline, recovery_due: asyncio.Event) -> None:
        self._tables = tables
        self._pipeline = pipeline
        self._recovery_due = recovery_due
        self._queue: list[tuple[Get, Sink, int, int]] = []
        self._queued = asyncio.Event()
        self._blocked: dict[str, list[tuple[Get, Sink]]] = {}
        self._blocked_count = 0

    def __len__(self) -> int:
        """How many reads wait for a reader thread."""
        return len(self._queue)

    def get(self, op: Get, sink: Sink) -> None:
        """Answer from memory now, or from the file soon. Raises nothing: errors are answers."""
        tables = self._tables
        generations = tables.served.generations
        partition = partition_of(op.key.encode(), len(generations))
        generation = generations[partition]
        if not generation and not _reads_frozen(tables.served, partition):
            sink.send(self._wrong_owner(op.id, partition))
            return
        state = self._in_memory(op.key)
        if state is not None:
            tables.stats.cache_hits += 1
            self._answer(op, sink, state)
        elif len(self._queue) >= tables.limits.read_queue_ops_max:
            full = TooManyRequests("The shard's queue of reads is full; wait and try again.", retry_after_ms=100)
            sink.send(refusal(op.id, full))
        else:
            tables.stats.cache_misses += 1
            self._queue.append((op, sink, partition, generation))
            self._queued.set()

    def read(self, key: str, bytes_max: int = 0) -> asyncio.Future[Reply]:
        """The answer to a get of the store's own."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.get(Get(0, key, bytes_max), Then(partial(settle, future)))
        return future

    def _in_memory(self, key: str) -> State | None:
        tables = self._tables
        state = tables.cache.get(key)
        if state is None and (row := tables.memtable.visible((VALUE, key))) is not None:
            state = state_of(row)
            tables.cache.publish(key, state)
        return state

    def _answer(self, op: Get, sink: Sink, state: State) -> None:
        value, version, expires_at_ms = state.body, state.version, state.expires_at_ms
        if self._tables.sender is not None and not self._tables.may_answer():
            sink.send(refusal(op.id, no_lease()))
        elif state.has_intent and not failpoints.planted("ignore-intent"):
            self._block(op, sink)
        elif value is None:
            sink.send(Answer(op.id, 404))
        elif 0 < op.bytes_max < len(value):
            sink.send(Answer(op.id, 200, version, left_out_bytes=len(value)))  # it is asked for again, and expires then
        elif not expires_at_ms:
            sink.send(Answer(op.id, 200, version, value))
        elif (left_ms := expires_at_ms - self._tables.environment.now_ms()) > 0:
            sink.send(Answer(op.id, 200, version, value, left_ms))
        elif failpoints.planted("expiry-by-reader"):
            sink.send(Answer(op.id, 404))
        else:
            self._pipeline.write(Expire(op.key), Then(lambda reply: self._expired(op, sink, reply), sink))

    def _expired(self, op: Get, sink: Sink, reply: Reply) -> None:
        if isinstance(reply, Answer) and reply.problem is not None:
            sink.send(refusal(op.id, from_problem(reply.problem)))
        else:
            self.get(op, sink)

    def _wrong_owner(self, op_id: int, partition: int) -> Answer:
        served = self._tables.served
        return refusal(op_id, wrong_owner(partition, served.epoch, served.frozen))

    # --- from the file ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read what is queued, many keys a hop, for ever. Raises DataCorrupt where the file cannot be read at all."""
        tables = self._tables
        while True:
            await self._queued.wait()
            queued, self._queue = self._queue[:_READ_KEYS_MAX], self._queue[_READ_KEYS_MAX:]
            if not self._queue:
                self._queued.clear()
            reads = [read for read in queued if not read[1].closed and not self._is_answered(*read)]
            tickets = [tables.cache.begin(op.key) for op, _, _, _ in reads]
            found = await tables.engine.read([(VALUE, op.key) for op, _, _, _ in reads])
            for read, ticket, result in zip(reads, tickets, found, strict=True):
                if result is None and not tables.verification.is_verified(read[2]):
                    self._missed(*read, ticket)
                else:
                    self._finish(*read, ticket, result)

    def _missed(self, op: Get, sink: Sink, partition: int, generation: int, ticket: int) -> None:
        """The file has no such row, by an index that is not verified yet, or damaged."""
        verification = self._tables.verification
        if (damage := verification.miss_in(partition)) is not None:
            self._finish(op, sink, partition, generation, ticket, damage)
            return
        self._tables.cache.finish(op.key, ticket, None)
        self._tables.stats.cache_misses -= 1  # it is asked again
        settled = self._tables.environment.spawn(verification.settle([partition]))
        settled.add_done_callback(lambda task: None if task.cancelled() or sink.closed else self.get(op, sink))

    def _is_answered(self, op: Get, sink: Sink, partition: int, generation: int) -> bool:
        """A change that became visible while the read was queued may not be in the file yet; memory has it."""
        state = self._in_memory(op.key)
        if state is None or self._tables.served.generations[partition] != generation:
            return False
        self._answer(op, sink, state)
        return True

    def _finish(
        self, op: Get, sink: Sink, partition: int, generation: int, ticket: int, found: Row | DataCorrupt | None
    ) -> None:
        cache = self._tables.cache
        if self._tables.served.generations[partition] != generation:
            cache.finish(op.key, ticket, None)
            sink.send(self._wrong_owner(op.id, partition))
        elif isinstance(found, DataCorrupt):
            self._tables.verification.found(found)
            cache.finish(op.key, ticket, None)
            log.error("%s", found)
            sink.send(refusal(op.id, found))
        else:
            state = ABSENT if found is None else state_of(found)
            is_newest = cache.finish(op.key, ticket, state)
            if state.has_intent and not is_newest and not failpoints.planted("ignore-intent"):
                self.get(op, sink)  # that intent may be gone already, and nothing would tell this read again
            else:
                self._answer(op, sink, state)

    # --- reads that wait for a transaction ----------------------------------------------------------------------------

    def _block(self, op: Get, sink: Sink) -> None:
        """The read has met an intent: it is answered when that is gone."""
        if self._blocked_count >= self._tables.limits.read_queue_ops_max:
            full = TooManyRequests("Too many reads wait for transactions; try again.", retry_after_ms=100)
            sink.send(refusal(op.id, full))
            return
        self._blocked.setdefault(op.key, []).append((op, sink))
        self._blocked_count += 1
        hold = self._tables.holds.on(op.key)
        if hold is not None and is_old(hold, self._tables):
            self._recovery_due.set()

    def publish(self, batch: Batch) -> None:
        """The changes of the batch are visible: reads that waited for them go on."""
        tables, blocked, changes = self._tables, self._blocked, batch.changes
        generations, states = tables.served.generations, changes.states
        rows = [row for name, row in changes.rows.items() if name[0] == VALUE and generations[row[2]]]
        tables.cache.publish_all([(row[1], states[VALUE, row[1]]) for row in rows])
        if blocked:
            for row in [row for row in rows if row.key in blocked]:
                self._unblock(row)

    def _unblock(self, row: Row) -> None:
        """The intent that readers of the key met is decided: as long as it stands nothing else changes the row.

        The next attempt's intent may stand there already. It is none of theirs: its vote has not left yet, so it cannot
        be decided before they are answered. (If they waited for that, too, and for the next one, they would wait for as
        long as the queue is not empty.)
        """
        waiting = self._blocked.pop(row.key, [])
        self._blocked_count -= len(waiting)
        state = State(row.version, row.expires_at_ms, row.body)
        for op, sink in waiting:
            if sink.closed:
                continue
            if self._tables.served.generations[row.partition]:
                self._answer(op, sink, state)
            else:
                sink.send(self._wrong_owner(op.id, row.partition))

    def serve(self, served: Served) -> bool:
        """Serve these partitions from now on; returns whether some came or went."""
        tables = self._tables
        before, tables.served = tables.served.generations, served
        came = {at for at, generation in enumerate(served.generations) if generation and not before[at]}
        left = {at for at, generation in enumerate(before) if generation and not served.generations[at]}
        tables.cache.leave(left)
        if came or left:
            self._ask_again()
        return bool(came or left)

    def _ask_again(self) -> None:
        blocked, self._blocked, self._blocked_count = self._blocked, {}, 0
        for op, sink in itertools.chain.from_iterable(blocked.values()):
            if not sink.closed:
                self.get(op, sink)


def is_old(hold: PreparedTxn, tables: Tables) -> bool:
    """Whether no router known to be there will decide the attempt soon."""
    age_s = tables.environment.monotonic_s() - hold.since_s
    return hold.closed or age_s > tables.limits.txn_timeout_s


def _reads_frozen(served: Served, partition: int) -> bool:
    """Whether a planted bug lets reads of a frozen partition pass."""
    return failpoints.planted("freeze-stops-only-writes") and partition in served.frozen
