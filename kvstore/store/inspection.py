"""What a store tells people: one key explained, attempts in doubt, the numbers of now.

Owns: documents for `explain`, statistics and metrics.
Promises: looks only, and shows visible state.
Leaves to others: how it is shown (router, CLI).
"""

from __future__ import annotations

from typing import Any

from kvstore.errors import DataCorrupt
from kvstore.metrics import ShardStats
from kvstore.model import txn_id
from kvstore.placement.ring import partition_of
from kvstore.storage.rows import VALUE, Row
from kvstore.store.comparison import Comparison
from kvstore.store.live import live_facts
from kvstore.store.pipeline import Pipeline
from kvstore.store.reads import Reads
from kvstore.store.refusals import wrong_owner
from kvstore.store.tables import Tables

_IN_DOUBT_MAX = 1000


class Inspection:
    """What a store tells of itself; every call only looks."""

    def __init__(self, tables: Tables, pipeline: Pipeline, reads: Reads, comparison: Comparison) -> None:
        self._tables = tables
        self._pipeline = pipeline
        self._reads = reads
        self._comparison = comparison

    async def explain(self, key: str) -> dict[str, Any]:
        """The visible row of the key: kind of row, version, sequence, size, deadline; or that it is damaged.

        `expires_at_ms` is Unix time. Raises WrongOwner where the partition is not served, or came or went meanwhile.
        """
        tables = self._tables
        partition = partition_of(key.encode(), len(tables.served.generations))
        generation = tables.served.generations[partition]
        row: Row | DataCorrupt | None = tables.memtable.visible((VALUE, key))
        if row is None:
            (row,) = await tables.engine.read([(VALUE, key)])
        if not generation or tables.served.generations[partition] != generation:
            raise wrong_owner(partition, tables.served.epoch, tables.served.frozen)
        if isinstance(row, DataCorrupt):
            return {"row": "damaged", "detail": row.detail}
        if row is None and (damage := tables.verification.miss_in(partition)) is not None:
            return {"row": "damaged", "detail": damage.detail}
        found = {"lock": self._lock(key), "intent": self._intent(key)}
        if row is None or (row.body is None and not row.version):  # an intent was all that the key ever had
            return {"row": "absent", **found}
        return {
            **found,
            "row": "value" if row.body is not None else "tombstone",
            "version": row.version,
            "sequence": row.sequence,
            "bytes": len(row.body or b""),
            "expires_at_ms": row.expires_at_ms or None,
            "cached": tables.cache.peek(key) is not None,
        }

    def _lock(self, key: str) -> dict[str, Any] | None:
        lease = self._tables.locks.lease(key)
        if lease is None:
            return None
        left_s = round(lease.left_s(self._tables.environment.monotonic_s()), 3)
        return {"owner": lease.owner, "token": lease.token, "ttl_left": left_s}

    def _intent(self, key: str) -> dict[str, Any] | None:
        hold = self._tables.holds.on(key)
        if hold is None:
            return None
        partition = partition_of(hold.anchor.encode(), len(self._tables.served.generations))
        return {
            "txn": txn_id(hold.attempt, partition),
            "anchor": hold.anchor,
            "age_s": round(self._tables.environment.monotonic_s() - hold.since_s, 3),
            "vote": hold.vote_on(key),
        }

    def in_doubt(self) -> dict[str, float]:
        """The attempts that hold keys here, at most 1,000, and for how many seconds each."""
        now_s = self._tables.environment.monotonic_s()
        return {hold.attempt.name: round(now_s - hold.since_s, 3) for hold in self._tables.holds.all()[:_IN_DOUBT_MAX]}

    def live(self, live_max: int) -> dict[str, Any]:
        """The locks held and the attempts at work: see `live.live_facts`."""
        tables = self._tables
        partitions = len(tables.served.generations)
        return live_facts(tables.locks, tables.holds, partitions, live_max, tables.environment.monotonic_s())

    def snapshot(self) -> ShardStats:
        """The numbers as of now."""
        tables = self._tables
        stats, engine, memtable = tables.stats, tables.engine, tables.memtable
        stats.keys, stats.bytes = tables.visible.keys, tables.visible.bytes
        sizes = engine.sizes
        stats.file_bytes, stats.wal_bytes, stats.log_bytes = sizes.file, sizes.wal, tables.log.bytes
        stats.unapplied_rows, stats.unapplied_bytes = len(memtable), memtable.bytes
        stats.write_queue_ops, stats.read_queue_ops = len(self._pipeline), len(self._reads)
        stats.sync_inline = self._pipeline.writer.pace.is_inline
        stats.cache_keys = len(tables.cache)
        holds = tables.holds.all()
        now_s = tables.environment.monotonic_s()
        stats.in_doubt = len(holds)
        stats.in_doubt_oldest_s = max((now_s - hold.since_s for hold in holds), default=0.0)
        stats.decisions = len(tables.decisions)
        stats.damaged_partitions = len(tables.verification.damaged)
        stats.disputed_partitions = len(self._comparison.disputed)
        stats.unproved_copies = len(self._comparison.unproved)
        if tables.sender is not None:
            stats.lease_close = tables.sender.lease.close
        return stats
