"""A store: one log, one file, one ordered stream of commits, one version clock, and what is visible of them.

Owns: the parts of one shard's state machine, put together, and their tasks.
Promises: those of its parts. A failure that leaves durability unknown ends the process (`on_fatal`).
Leaves to others: everything else; this is the façade.

    write ─> pipeline ─> batch (rules) ─> CommitRecord ─┬─> log.append, sync      durable
                                                        ├─> publish               visible, answered
                                                        └─> applier ─> engine     SQLite, later and in bulk
    get ───> reads: cache, unapplied rows, file         listings, counts ─> scans

A store is an object, not a process: a process may serve more than one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.placement.cluster_map import ClusterMap
from kvstore.protocol import Get, Reply
from kvstore.replication.promise import room_may_come
from kvstore.storage.engine import Identity
from kvstore.storage.rows import Clock
from kvstore.store.applier import Applier
from kvstore.store.batch import Batch
from kvstore.store.cache import Cache
from kvstore.store.decision_table import DecisionTable
from kvstore.store.inspection import Inspection
from kvstore.store.maintenance import Maintenance
from kvstore.store.migration import Migration
from kvstore.store.opening import Opened, ToldNumber, open_files, untold
from kvstore.store.ops import Locks, WriteOp
from kvstore.store.partitions import Partitions
from kvstore.store.pipeline import Pipeline, settle
from kvstore.store.reads import Reads, is_old
from kvstore.store.ready import Ready
from kvstore.store.replicas import Replicas, Replicating
from kvstore.store.scans import Scans
from kvstore.store.served import Served
from kvstore.store.sinks import DISCARD, Then
from kvstore.store.tables import OnFatal, Tables
from kvstore.store.undecided import Undecided
from kvstore.store.verification import Verification
from kvstore.store.write_set import Sink
from kvstore.transactions.locks import LockTable

_CLOSE_S = 1.0  # for copies to answer
_OF_FILE = ("apply", "clean", "log")


class Store:
    """`recovery_due` is set when an operation was blocked by an attempt that is too old. `opened`: its files."""

    def __init__(
        self,
        opened: Opened,
        limits: Limits,
        environment: Environment,
        on_fatal: OnFatal,
        replicating: Replicating | None = None,
    ) -> None:
        self.opened = opened
        engine, log, _, is_examined, _, clock_floor = opened
        clock, (_, _, shard_id, partitions) = engine.applied.clock, engine.identity
        is_older_copy = clock.version < clock_floor
        # Nothing was given from above the floor yet. The next record makes it durable, before anything is.
        clock = clock._replace(version=max(clock.version, clock_floor))
        locks: Locks = LockTable(environment.random_hex(8), limits.lock_waiters_max)
        self.tables = tables = Tables(
            environment,
            limits,
            engine,
            log,
            locks,
            Cache(limits.cache_bytes_max),
            DecisionTable(environment, 2 * limits.txn_timeout_s),
            clock,
            clock,
            Served([0] * partitions),
            Served([0] * partitions),
            Ready(locks),
            Verification(environment, limits, engine, partitions, is_examined),
        )
        self.recovery_due = asyncio.Event()
        self.applier = Applier(tables)
        self.pipeline = Pipeline(tables, self.applier, self._publish)
        self.replicas = Replicas(shard_id, tables, self.pipeline, self.applier, replicating)
        self.partitions = Partitions(shard_id, tables, self.pipeline, self.applier, self.replicas, is_older_copy)
        self.migration = Migration(tables, self.pipeline, self.applier, self.partitions)
        self.reads = Reads(tables, self.pipeline, self.recovery_due)
        self.maintenance = Maintenance(tables, self.pipeline, self.applier)
        self.scans = Scans(tables, self.reads, self.maintenance, self.applier)
        self.undecided = Undecided(tables)
        self.inspection = Inspection(tables, self.pipeline, self.reads, self.replicas.comparison)
        self._on_fatal = on_fatal
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @classmethod
    async def open(
        cls,
        path: Path,
        limits: Limits,
        shard_id: str,
        partitions: int,
        on_fatal: OnFatal,
        environment: Environment = SYSTEM,
        told: ToldNumber = untold,
        replicating: Replicating | None = None,
    ) -> Store:
        """Open the store and serve what its map says is owned.

        `partitions`: their number as long as the store is of no cluster; afterwards it keeps its own. `told`: see
        `open_files`.

        Raises ForeignData, StoreBehind; DataCorrupt for a damaged lease, intent or decision; LogDamaged; OSError.
        """
        opened = await open_files(path, shard_id, partitions, limits, environment, told)
        return await cls.serve(opened, limits, on_fatal, environment, replicating)

    @classmethod
    async def serve(
        cls,
        opened: Opened,
        limits: Limits,
        on_fatal: OnFatal,
        environment: Environment = SYSTEM,
        replicating: Replicating | None = None,
    ) -> Store:
        """As `open`, with an engine and a log that are open already and belong together; they are the store's now.

        Raises DataCorrupt, ForeignData.
        """
        store = cls(opened, limits, environment, on_fatal, replicating)
        store.begin()
        try:
            await store.partitions.restore()
        except BaseException:
            await store.close()
            raise
        return store

    def begin(self) -> None:
        """Start all work. Nothing is served before `partitions.restore`."""
        works = {
            "commit": self.pipeline.run(),
            "sync": self.pipeline.writer.run(),
            "fetch": self.pipeline.fetcher.run(),
            "apply": self.applier.run(),
            "clean": self.applier.clean(),
            "segments": self.applier.make_segments(),
            "log": self.applier.keep_log(),
            "read": self.reads.run(),
            "sweep": self.maintenance.sweep(),
            "trim": self.maintenance.trim(),
            "waits": self.maintenance.end_waits(),
            "verify": self.tables.verification.run(),
            "compare": self.replicas.comparison.run(),
            "orphans": self.partitions.drop_orphans(),
            "ship": self.replicas.run(),
        }
        self._tasks = {name: self.tables.environment.spawn(self._guard(work)) for name, work in works.items()}

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the work; a failure that it cannot survive ends the process."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._on_fatal(error)

    async def close(self, *, keeps_files: bool = False) -> None:
        """Commit and answer what is queued, apply everything, then close file and log.

        `keeps_files`: those of `opened` stay open, as they are, and are the caller's.

        What cannot be committed, because copies do not answer or another node has taken over, is given up.
        """
        self.pipeline.close()
        sender, commit = self.tables.sender, self._tasks["commit"]
        if sender is None:
            await commit
        elif not await self.tables.environment.wait_for(asyncio.shield(commit), _CLOSE_S if sender.serves else 0.0):
            commit.cancel()
            await asyncio.gather(commit, return_exceptions=True)
            await self.pipeline.abandon()
        if keeps_files:
            await self.pipeline.writer.has_stopped()
        await _end(self._tasks, self.applier)
        self.maintenance.close()
        self.tables.verification.close()
        if not keeps_files:
            await self.applier.close()
            await self.opened.close()

    # --- what the parts say -------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        """Whose rows these are."""
        return self.tables.engine.identity

    @property
    def copy_id(self) -> str:
        """Of all copies of this store, which one this is. One in memory has the id of the store."""
        copy_file = self.opened.copy_file
        return copy_file.identity.copy_id if copy_file is not None else self.identity.store_id

    async def promise(self, term: int) -> None:
        """Agree to serve that term, durably. Raises ForeignData for one below what was promised; NoRoom on a full disk.

        A disk that fails ends the process, whatever asked for the promise.
        """
        if self.opened.copy_file is not None:
            try:
                with room_may_come():
                    await self.tables.environment.in_thread(partial(self.opened.copy_file.promise, term))
            except OSError as error:
                self._on_fatal(error)

    @property
    def path(self) -> Path:
        """The file."""
        return self.tables.engine.path

    @property
    def cluster_map(self) -> ClusterMap | None:
        """The newest that was adopted; None before the first one."""
        return self.partitions.cluster_map

    @property
    def served(self) -> Served:
        """The partitions that are served, as reads see it."""
        return self.tables.served

    @property
    def strike(self) -> int:
        """The epoch of the last strike that is durable here."""
        return self.tables.openings.last

    @property
    def durable(self) -> int:
        """The number of the last durable record: on every disk that is waited for."""
        sender = self.tables.sender
        return self.tables.log.durable if sender is None else sender.shipping.committed

    @property
    def clock(self) -> Clock:
        """As of the newest visible batch."""
        return self.tables.visible

    # --- operations ---------------------------------------------------------------------------------------------------

    def get(self, op: Get, sink: Sink) -> None:
        """Read one key."""
        self.reads.get(op, sink)

    def write(self, op: WriteOp, sink: Sink) -> None:
        """Queue an operation that may change something."""
        self.pipeline.write(op, sink)

    def tell(self, op: WriteOp) -> None:
        """Queue an operation of this process's own whose answer no client needs."""
        self.pipeline.write(op, DISCARD)

    async def ask(self, op: WriteOp) -> Reply:
        """The answer to an operation of this process's own; an error is an Answer with a problem."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.pipeline.write(op, Then(partial(settle, future)))
        return await future

    def _publish(self, batch: Batch) -> None:
        """The batch is visible: what it changed in memory takes effect for readers and timers."""
        tables = self.tables
        tables.stats.expired += batch.changes.expired
        tables.stats.disk_full = batch.changes.context.frees_only
        tables.decisions.note(batch.outcomes.decided, batch.outcomes.dropped)
        self.maintenance.publish(batch)
        if (served := batch.served) is not None and self.reads.serve(served):
            self.recovery_due.set()
        self.reads.publish(batch)
        if batch.waits.met and any(is_old(hold, tables) for hold in batch.waits.met):
            self.recovery_due.set()


async def _end(tasks: dict[str, asyncio.Task[None]], applier: Applier) -> None:
    """End the tasks at once, before one of them hears that its step was given up.

    But what is under way in the file is waited for, since its thread cannot be ended.
    """
    of_file = [tasks[name] for name in _OF_FILE]
    for task in tasks.values():
        if task not in of_file:
            task.cancel()
    async with applier.turn:
        for task in of_file:
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
