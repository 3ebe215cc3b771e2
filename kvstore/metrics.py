"""What the processes count, and its Prometheus exposition.

Owns: histograms cheap enough for the hot path, the numbers a shard reports, the names and help texts of all metrics.
Promises: an observation is one bisection and two additions, without a lock (each is made in the event loop's thread).
prometheus-client does the exposition; its own Histogram would cost some 3 microseconds an observation.
Leaves to others: when something is observed, and the HTTP route.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

LATENCY_BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0
)  # fmt: skip
SIZE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram(msgspec.Struct):
    """Counts per bucket; bucket i holds what is at most bounds[i], the last one the rest.

    `total`: the sum of all values, in the unit of the bounds.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Histogram:
        """One without values."""
        return cls(bounds, [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        """Count the value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(bound as text, cumulative count), as Prometheus wants them; the last bound is "+Inf"."""
        cumulative, running = [], 0
        for bound, count in zip((*(str(float(bound)) for bound in self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            cumulative.append((bound, float(running)))
        return cumulative


def _latencies() -> Histogram:
    return Histogram.of(LATENCY_BOUNDS_S)


def _sizes() -> Histogram:
    return Histogram.of(SIZE_BOUNDS)


class ShardStats(msgspec.Struct):
    """What a shard counts about itself since its start; sizes in bytes, times in seconds."""

    keys: int = 0
    bytes: int = 0
    file_bytes: int = 0
    wal_bytes: int = 0
    write_queue_ops: int = 0
    read_queue_ops: int = 0
    cache_keys: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    expired: int = 0
    disk_full: bool = False
    in_doubt: int = 0
    in_doubt_oldest_s: float = 0.0
    decisions: int = 0
    damaged_partitions: int = 0
    log_bytes: int = 0
    unapplied_rows: int = 0
    unapplied_bytes: int = 0
    inline_reads: int = 0
    operations: int = 0
    compared_rounds: int = 0
    copies_differed: int = 0
    lease_close: int = 0
    disputed_partitions: int = 0
    unproved_copies: int = 0
    sync_inline: bool = True
    batch_ops: Histogram = msgspec.field(default_factory=_sizes)
    commit_s: Histogram = msgspec.field(default_factory=_latencies)

    @property
    def done(self) -> int:
        """Operations of batches, and reads of a key."""
        return self.operations + self.cache_hits + self.cache_misses


_SHARD_GAUGES = {
    "keys": "Live keys",
    "bytes": "Bytes of live keys and values",
    "file_bytes": "Size of the database file",
    "wal_bytes": "Size of the write-ahead log of the database file",
    "write_queue_ops": "Writes that wait for their batch",
    "read_queue_ops": "Reads that wait for the reader thread",
    "cache_keys": "Keys in the cache",
    "disk_full": "1 while only what frees space is done",
    "in_doubt": "Transactions that hold keys and are not finished",
    "in_doubt_oldest_s": "Seconds since the oldest of them came",
    "decisions": "Decisions of transactions that are kept",
    "damaged_partitions": "Partitions in which a key that is not found may be a lost one",
    "disputed_partitions": "Partitions that are the same in all copies, and not at the primary, though all verify",
    "unproved_copies": "Copies in sync that did not tell for several comparisons what rows they have",
    "log_bytes": "Size of the log's segments",
    "unapplied_rows": "Rows that are committed in the log and not yet in the database file",
    "unapplied_bytes": "Bytes of these rows",
    "sync_inline": "1 while the disk is quick enough to sync on the event loop's thread",
}
_SHARD_COUNTERS = {
    "cache_hits": "Reads answered from the cache",
    "cache_misses": "Reads that went to the file",
    "expired": "Keys expired",
    "inline_reads": "Rows read from the file on the event loop's thread",
    "operations": "Operations decided in batches",
    "compared_rounds": "How often all partitions of the copies were compared with the primary's",
    "copies_differed": "Copies rebuilt because rows differed from the primary's, though both verify",
    "lease_close": "Grants of the primary's lease that came in the last quarter of its time, or later",
}
_SHARD_HISTOGRAMS = {
    "batch_ops": "Operations per batch",
    "commit_s": "Seconds from the start of a batch to its commit",
}


class StoreLabels(NamedTuple):
    """Whose numbers these are: the store of `shard` on `node`, which is its primary there, or a copy."""

    node: str
    shard: str
    role: Literal["primary", "copy"]


def shard_families(stats_of: dict[StoreLabels, ShardStats]) -> Iterator[Metric]:
    """The metric families of these stores, labelled `node`, `shard` and `role`."""
    for name, text in _SHARD_GAUGES.items():
        gauge = GaugeMetricFamily(f"kvstore_shard_{name}", text, labels=StoreLabels._fields)
        for store, stats in stats_of.items():
            gauge.add_metric(store, getattr(stats, name))
        yield gauge
    for name, text in _SHARD_COUNTERS.items():
        counter = CounterMetricFamily(f"kvstore_shard_{name}", text, labels=StoreLabels._fields)
        for store, stats in stats_of.items():
            counter.add_metric(store, getattr(stats, name))
        yield counter
    for name, text in _SHARD_HISTOGRAMS.items():
        family = HistogramMetricFamily(f"kvstore_shard_{name.removesuffix('_s')}", text, labels=StoreLabels._fields)
        for store, stats in stats_of.items():
            histogram: Histogram = getattr(stats, name)
            family.add_metric(store, histogram.buckets(), histogram.total)
        yield family


class MoveStats(msgspec.Struct):
    """What the controller counts about moves since its start."""

    partitions: int = 0
    keys: int = 0
    bytes: int = 0
    groups: int = 0
    voided: int = 0
    write_pause_s: Histogram = msgspec.field(default_factory=_latencies)


_MOVE_COUNTERS = {
    "partitions": ("kvstore_moved_partitions", "Partitions moved from shard to shard"),
    "keys": ("kvstore_moved_keys", "Rows moved with them"),
    "bytes": ("kvstore_moved_bytes", "Bytes of these rows"),
    "voided": ("kvstore_moves_voided", "Moves that were given up and begun again"),
}


class CopyStats(msgspec.Struct):
    """What the controller counts about copies since its start."""

    failovers: int = 0
    taken_out: int = 0
    damaged: int = 0
    rebuilt: int = 0
    last_failover_s: float = 0.0


def copy_families(
    stats: CopyStats, copies_by_state: dict[str, float], silent_nodes: int, rows_left: int, under_replicated: int
) -> Iterator[Metric]:
    """The metric families of copies, for the controller."""
    yield gauge_family("kvstore_copies", "Copies beside the primaries", copies_by_state, "state")
    text = "Shards with fewer copies in sync than are asked for"
    yield GaugeMetricFamily("kvstore_shards_under_replicated", text, value=under_replicated)
    text = "Rows that snapshots, which fill copies, have still to bring"
    yield GaugeMetricFamily("kvstore_snapshot_rows_left", text, value=rows_left)
    yield GaugeMetricFamily("kvstore_nodes_silent", "Nodes that are held for dead", value=silent_nodes)
    yield CounterMetricFamily("kvstore_failovers", "Copies that took over from a silent primary", value=stats.failovers)
    text = "Copies whose primary went on without them"
    yield CounterMetricFamily("kvstore_copies_taken_out", text, value=stats.taken_out)
    yield CounterMetricFamily("kvstore_copies_damaged", "Copies that nodes found damaged or lost", value=stats.damaged)
    text = "Damaged copies in whose place another one is in sync"
    yield CounterMetricFamily("kvstore_copies_rebuilt", text, value=stats.rebuilt)
    text = "Seconds from the last sign of the primary until another one served, at the last failover"
    yield GaugeMetricFamily("kvstore_failover_last_seconds", text, value=stats.last_failover_s)


def move_families(stats: MoveStats, moves_by_step: dict[str, float], epoch: int) -> Iterator[Metric]:
    """The metric families of moves, for the controller."""
    yield GaugeMetricFamily("kvstore_cluster_epoch", "Epoch of the cluster map", value=epoch)
    yield gauge_family("kvstore_moves", "Groups of partitions that are to move", moves_by_step, "step")
    for name, (family, text) in _MOVE_COUNTERS.items():
        yield CounterMetricFamily(family, text, value=getattr(stats, name))
    pauses = stats.write_pause_s
    yield HistogramMetricFamily(
        "kvstore_move_write_pause_seconds",
        "Seconds for which no shard answered for a group of partitions that moved",
        buckets=pauses.buckets(),
        sum_value=pauses.total,
    )


class RequestStats:
    """Requests per route, method and status, with their latency."""

    def __init__(self) -> None:
        self._histograms: dict[tuple[str, str, int], Histogram] = {}

    def observe(self, route: str, method: str, status: int, elapsed_s: float) -> None:
        """Count a request that took that many seconds."""
        key = (route, method, status)
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = Histogram.of(LATENCY_BOUNDS_S)
        histogram.observe(elapsed_s)

    def histograms(self) -> dict[tuple[str, str, int], Histogram]:
        """By route, method and status, as they are now; they go on counting."""
        return dict(self._histograms)

    def families(self) -> Iterator[Metric]:
        """The metric family of these requests."""
        labels = ["route", "method", "status"]
        family = HistogramMetricFamily(
            "kvstore_request_seconds", "Seconds from a request's arrival to its answer", labels=labels
        )
        for (route, method, status), histogram in self._histograms.items():
            family.add_metric([route, method, str(status)], histogram.buckets(), histogram.total)
        yield family


def exposition(*families: Iterable[Metric]) -> bytes:
    """The Prometheus text of these families."""

    class Now(Collector):
        def collect(self) -> Iterator[Metric]:
            for group in families:
                yield from group

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Now())
    return generate_latest(registry)


def gauge_family(name: str, text: str, values: dict[str, float], label: str) -> Metric:
    """One gauge with one label."""
    family: Any = GaugeMetricFamily(name, text, labels=[label])
    for label_value, value in values.items():
        family.add_metric([label_value], value)
    return family  # type: ignore[no-any-return]
