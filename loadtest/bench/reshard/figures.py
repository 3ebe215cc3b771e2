"""What a run of the growing benchmark tells, and what many runs come to.

Owns: percentiles of the foreground load, what moved against the least that had to, medians, ratios, aims, the table.
Promises: pure. A ratio is the median of the ratios within each round (both runs shortly one after the other).
Leaves to others: the runs (systems.py), the order of things (loadtest/reshard.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import msgspec

from kvstore.placement.cluster_map import ClusterMap
from loadtest.bench.report import Ratio, Target, aims_told, at_least, at_most, median_of_known, ratio, show_ratio, table

IDLE = "none"
KEYS_PER_S_RATIO_MIN = 2.0
P99_RATIO_MAX = 2.0
MOVED_RATIO_MAX = 1.05
PEAK_TO_MEAN_MAX = 1.02
WRITE_PAUSE_P99_MS_MAX = 200.0


class Sample(NamedTuple):
    """One foreground call: when it was due (monotonic), how long after that it was answered, and if it was well."""

    due_s: float
    latency_s: float
    ok: bool


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of the foreground load in one stretch of time."""

    calls: int
    failed: int
    per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """One change of three shards into four. `began_s`, `ended_s` (monotonic): from the joining to the last commit.

    `peak_to_mean`: of the keys of all shards after it. Where a system does not tell, a figure is None.
    """

    began_s: float
    ended_s: float
    keys_moved: int
    partitions_moved: int
    partitions_minimum: int
    peak_to_mean: float
    write_pause_ms_max: float | None = None
    write_pause_ms_p99: float | None = None
    groups: int | None = None

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    @property
    def keys_per_s(self) -> float:
        return self.keys_moved / self.seconds

    @property
    def moved_ratio(self) -> float:
        return self.partitions_moved / max(1, self.partitions_minimum)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One growth of one system under one load. `before`, `during`: None without a foreground load."""

    round: int
    system: str
    load: str
    growth: Growth
    before: Latency | None = None
    during: Latency | None = None

    @property
    def p99_ratio(self) -> float | None:
        if self.before is None or self.during is None or not self.before.p99_ms:
            return None
        return self.during.p99_ms / self.before.p99_ms


# --- one run ----------------------------------------------------------------------------------------------------------


def latency(samples: Iterable[Sample], began_s: float, ended_s: float) -> Latency | None:
    """Of the calls that were due in that time; None if there were none."""
    within = [sample for sample in samples if began_s <= sample.due_s < ended_s]
    if not within:
        return None
    times_ms = sorted(sample.latency_s * 1000 for sample in within)
    return Latency(
        calls=len(within),
        failed=sum(not sample.ok for sample in within),
        per_s=len(within) / (ended_s - began_s),
        p50_ms=percentile(times_ms, 0.5),
        p99_ms=percentile(times_ms, 0.99),
        max_ms=times_ms[-1],
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank: the smallest of the figures that at least that share of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def moved(before: ClusterMap, after: ClusterMap) -> int:
    """How many partitions have another owner."""
    owners = [[cluster_map.shards[owner].id for owner in cluster_map.owners] for cluster_map in (before, after)]
    return sum(then != now for then, now in zip(*owners, strict=True))


def least_to_move(before: ClusterMap, after: ClusterMap) -> int:
    """How many partitions must have another owner so that every member has its fair share, by weight, rounded down."""
    weights = sum(member.weight for member in after.shards)
    held = {member.id: len(before.owned_by(member.id)) for member in after.shards}
    fair = {member.id: after.partitions * member.weight // weights for member in after.shards}
    return sum(max(0, fair[shard_id] - held[shard_id]) for shard_id in fair)


def peak_to_mean(keys: Sequence[int]) -> float:
    return max(keys) * len(keys) / max(1, sum(keys))


# --- many runs --------------------------------------------------------------------------------------------------------


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """The medians over all rounds of one system under one load; `failed` and the pauses are those of the worst."""

    system: str
    load: str
    rounds: int
    keys_moved: float
    seconds: float
    keys_per_s: float
    to_redis: Ratio | None
    moved_ratio: float
    peak_to_mean: float
    write_pause_ms_p99: float | None
    write_pause_ms_max: float | None
    p50_before_ms: float | None
    p99_before_ms: float | None
    p50_during_ms: float | None
    p99_during_ms: float | None
    p99_ratio: float | None
    failed: int


def summarize(runs: Sequence[Run]) -> list[Cell]:
    """One cell for each load and system, in the order of their first runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.load, run.system), []).append(run)
    return [_cell(group, groups.get((load, "redis"), [])) for (load, _), group in groups.items()]


def _cell(group: Sequence[Run], redis: Sequence[Run]) -> Cell:
    growths = [run.growth for run in group]
    before = [run.before for run in group if run.before is not None]
    during = [run.during for run in group if run.during is not None]
    return Cell(
        system=group[0].system,
        load=group[0].load,
        rounds=len(group),
        keys_moved=median(growth.keys_moved for growth in growths),
        seconds=median(growth.seconds for growth in growths),
        keys_per_s=median(growth.keys_per_s for growth in growths),
        to_redis=ratio(group, redis, lambda run: run.growth.keys_per_s) if group[0].system != "redis" else None,
        moved_ratio=median(growth.moved_ratio for growth in growths),
        peak_to_mean=median(growth.peak_to_mean for growth in growths),
        write_pause_ms_p99=_most([growth.write_pause_ms_p99 for growth in growths]),
        write_pause_ms_max=_most([growth.write_pause_ms_max for growth in growths]),
        p50_before_ms=median_of_known([part.p50_ms for part in before]),
        p99_before_ms=median_of_known([part.p99_ms for part in before]),
        p50_during_ms=median_of_known([part.p50_ms for part in during]),
        p99_during_ms=median_of_known([part.p99_ms for part in during]),
        p99_ratio=median_of_known([run.p99_ratio for run in group]),
        failed=sum(part.failed for part in (*before, *during)),
    )


def _most(figures: Sequence[float | None]) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)


def aims(cells: Sequence[Cell]) -> list[Target]:
    """What this cluster aims at, and what it does."""
    ours = [cell for cell in cells if cell.system == "kvstore"]
    idle = [cell for cell in ours if cell.load == IDLE]
    loaded = [cell for cell in ours if cell.load != IDLE]
    beside = idle[0].to_redis.median if idle and idle[0].to_redis else None
    pauses = [cell.write_pause_ms_p99 for cell in ours]
    most = (
        ("p99 under load during the move, × before", _most([cell.p99_ratio for cell in loaded]), P99_RATIO_MAX),
        ("partitions moved, × the least", _most([cell.moved_ratio for cell in ours]), MOVED_RATIO_MAX),
        ("keys of the fullest shard, × the mean", _most([cell.peak_to_mean for cell in ours]), PEAK_TO_MEAN_MAX),
        ("write pause at p99, ms", _most(pauses), WRITE_PAUSE_P99_MS_MAX),
        ("failed calls", float(sum(cell.failed for cell in loaded)) if loaded else None, 0.0),
    )
    least = KEYS_PER_S_RATIO_MIN
    return [
        at_least(f"keys/s when idle, × Redis Cluster ≥ {least:g}", beside, least),
        *(at_most(f"{text} ≤ {bound:g}", figure, bound) for text, figure, bound in most),
    ]


# --- for people -------------------------------------------------------------------------------------------------------


def render(cells: Sequence[Cell], header: Sequence[str]) -> str:
    """The report as Markdown whose table also lines up on a terminal."""
    return "\n".join([*header, "", _table(cells), *aims_told(aims(cells))])


def _table(cells: Sequence[Cell]) -> str:
    titles = ["load", "system", "keys moved", "s", "keys/s", "× redis", "moved/least", "peak/mean", "pause p99/max ms"]
    titles += ["before p50/p99 ms", "during p50/p99 ms", "p99 ×", "failed"]
    return table(titles, [_row(cell) for cell in cells], left=("load", "system"))


def _row(cell: Cell) -> list[str]:
    return [
        cell.load,
        cell.system,
        f"{cell.keys_moved:,.0f}",
        f"{cell.seconds:.2f}",
        f"{cell.keys_per_s:,.0f}",
        show_ratio(cell.to_redis),
        f"{cell.moved_ratio:.3f}",
        f"{cell.peak_to_mean:.3f}",
        _pair(cell.write_pause_ms_p99, cell.write_pause_ms_max),
        _pair(cell.p50_before_ms, cell.p99_before_ms),
        _pair(cell.p50_during_ms, cell.p99_during_ms),
        "–" if cell.p99_ratio is None else f"{cell.p99_ratio:.2f}",
        str(cell.failed),
    ]


def _pair(first: float | None, second: float | None) -> str:
    return "–" if first is None or second is None else f"{first:.1f} / {second:.1f}"


def document(header: Sequence[str], cells: Sequence[Cell], runs: Sequence[Run]) -> dict[str, Any]:
    """All figures, for a program."""
    return {"header": header, "aims": [aim._asdict() for aim in aims(cells)], "cells": cells, "runs": runs}
