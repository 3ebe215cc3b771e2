"""Medians, ratios and the table.

Owns: how many runs become one figure, and what is reached of what was aimed at.
Promises: a ratio is the median of the ratios within each round (both runs a few seconds apart, so the machine's slow
minutes cancel out), never a ratio of figures from different times. Pure but for `machine`.
Leaves to others: the runs (drive.py).
"""

from __future__ import annotations

import os
import platform
import timeit
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from loadtest.bench.drive import Run
from loadtest.bench.workloads import WORKLOADS

_PEERS = ("etcd", "bare")
_SEVERAL_IN_ONE = tuple(workload.name for workload in WORKLOADS.values() if workload.operations > 1)
_BAR_CHARACTERS = 60
REFERENCE_SHAPE = (4, 1)  # shards and routers of the cluster that the aims are for


class SystemFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one system is and costs when nothing is asked.
    Memory is the sum of PSS over all its processes; `shards` and `routers` are 0 for what is no cluster of ours."""

    system: str
    version: str
    shards: int = 0
    routers: int = 0
    ready_s: float
    idle_pss_mb: float
    loaded_pss_mb: float = 0.0


class Ratio(msgspec.Struct, frozen=True):
    """The median over the rounds, and the rounds' lowest and highest."""

    median: float
    low: float
    high: float


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table: the medians over all rounds of one system, workload and number of connections."""

    work: str
    connections: int
    system: str
    rounds: int
    per_s: float
    requests_per_s: float = 0.0
    p50_ms: float
    p99_ms: float
    cpu_us_per_op: float
    cpu_us_per_op_by_process: dict[str, float]
    batch_operations: float | None = None
    errors: int
    errors_by_kind: dict[str, int] = {}
    abort_rate: float | None = None
    refused_per_op: float = 0.0
    to: dict[str, Ratio]


def summarize(runs: Iterable[Run]) -> list[Cell]:
    """One cell per workload, connections and system, in the order of their first run (round 1)."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.work, run.connections, run.system), []).append(run)
    return [
        Cell(
            work=work,
            connections=connections,
            system=system,
            rounds=len(group),
            per_s=median(run.per_s for run in group),
            requests_per_s=median(run.requests / run.seconds for run in group),
            p50_ms=median(run.p50_ms for run in group),
            p99_ms=median(run.p99_ms for run in group),
            cpu_us_per_op=median(run.cpu_us_per_op for run in group),
            cpu_us_per_op_by_process=_median_by_process(group),
            batch_operations=median_of_known(run.batch_operations for run in group),
            errors=sum(run.failed for run in group),
            errors_by_kind=_add_up(run.errors for run in group),
            abort_rate=median_of_known(run.abort_rate for run in group),
            refused_per_op=median(run.refused / max(1, run.operations) for run in group),
            to={
                peer: found
                for peer in _PEERS
                if (found := ratio(group, groups.get((work, connections, peer), []), rate)) is not None
            },
        )
        for (work, connections, system), group in groups.items()
    ]


def _median_by_process(group: Sequence[Run]) -> dict[str, float]:
    names = sorted({name for run in group for name in run.cpu_us_per_op_by_process})
    return {name: median(run.cpu_us_per_op_by_process.get(name, 0.0) for run in group) for name in names}


def _add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def median_of_known(figures: Iterable[float | None]) -> float | None:
    """None if none of them is known."""
    known = [figure for figure in figures if figure is not None]
    return median(known) if known else None


def shapes(facts: Sequence[SystemFacts]) -> list[str]:
    """A line that tells what a cluster of ours consists of, if one is measured."""
    texts = [
        f"{fact.system}: {_count(fact.shards, 'shard')}, {_count(fact.routers, 'router')}"
        for fact in facts
        if fact.shards
    ]
    return ["; ".join(texts)] if texts else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quietness(runs: Sequence[Run]) -> str:
    """How much of the machine went elsewhere during the runs: a sentence to judge the figures by."""
    others, stolen = median(run.others_cpu for run in runs), median(run.stolen_cpu for run in runs)
    return f"during the runs other processes took {others:.0%} of the machine, other guests {stolen:.0%} (medians)"


def rate(run: Run) -> float:
    return run.per_s


def cpu_time(run: Run) -> float:
    return run.cpu_us_per_op


class OfRound(Protocol):
    """A run; `round` counts from 1."""

    @property
    def round(self) -> int: ...


Figures = TypeVar("Figures", bound=OfRound)


def ratio(mine: Sequence[Figures], peers: Sequence[Figures], figure: Callable[[Figures], float]) -> Ratio | None:
    """Of a figure, round by round; None when no round has both."""
    theirs = {run.round: figure(run) for run in peers if figure(run) > 0}
    ratios = [figure(run) / theirs[run.round] for run in mine if run.round in theirs]
    return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None


# --- what is aimed at ------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """`figure` is None when the runs do not tell (a system or workload was left out)."""

    text: str
    figure: float | None
    reached: bool | None


def subject(facts: Sequence[SystemFacts]) -> str:
    """The name of the cluster that the aims are for: one that is alone, or that of the reference shape."""
    clusters = {(fact.shards, fact.routers): fact.system for fact in facts if fact.shards}
    if len(clusters) == 1:
        return next(iter(clusters.values()))
    return clusters.get(REFERENCE_SHAPE, "kvstore")


def targets(cells: Sequence[Cell], facts: Sequence[SystemFacts]) -> list[Target]:
    """What this cluster is meant to reach, and whether these runs did."""
    found = {(cell.work, cell.connections): cell for cell in cells if cell.system == subject(facts)}
    etcd = {(cell.work, cell.connections): cell for cell in cells if cell.system == "etcd"}
    result = []
    for work, connections, peer, least in _RATE_TARGETS:
        cell = found.get((work, connections))
        reached = cell.to.get(peer) if cell is not None else None
        text = f"{work.upper()} at {connections} connections ≥ {least:g} × {peer}"
        result.append(at_least(text, reached.median if reached else None, least))
    for connections in (32, 128):
        mine, theirs = found.get(("put", connections)), etcd.get(("put", connections))
        share = mine.p99_ms / theirs.p99_ms if mine and theirs and theirs.p99_ms else None
        result.append(at_most(f"PUT at {connections} connections: p99 ≤ 1 × etcd's", share, 1.0))
    fact = next((fact for fact in facts if fact.system == subject(facts)), None)
    result.append(at_most("idle memory (PSS) ≤ 300 MB", fact.idle_pss_mb if fact else None, 300))
    result.append(at_most("ready in ≤ 3 s", fact.ready_s if fact else None, 3))
    return result


_RATE_TARGETS = (
    ("get", 32, "etcd", 3.0),
    ("get", 128, "etcd", 2.5),
    ("get", 32, "bare", 0.5),
    ("get", 128, "bare", 0.5),
    ("put", 32, "etcd", 1.3),
    ("put", 128, "etcd", 1.7),
    ("cas", 32, "etcd", 2.0),
    ("cas", 128, "etcd", 2.5),
    ("txn4", 32, "etcd", 0.9),
    ("txn4", 128, "etcd", 1.2),
    ("txn1", 32, "etcd", 1.5),
    ("txn1", 128, "etcd", 1.5),
)


def at_least(text: str, figure: float | None, least: float) -> Target:
    return Target(text, figure, None if figure is None else figure >= least)


def at_most(text: str, figure: float | None, most: float) -> Target:
    return Target(text, figure, None if figure is None else figure <= most)


# --- for people ------------------------------------------------------------------------------------------------------

LEFT = ("work", "system", "version", "of which")  # the columns that are flush left
MARKS = {True: "reached", False: "MISSED", None: "not measured"}


class Rows(NamedTuple):
    """A table: its titles, and its rows of as many texts."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(
    cells: Sequence[Cell],
    facts: Sequence[SystemFacts],
    header: Sequence[str],
    more: Sequence[str] = (),
    more_targets: Sequence[Target] = (),
) -> str:
    """The whole report as Markdown whose tables also line up on a terminal; `more` stands before the aims."""
    tables = [fact_table(facts), rate_table(cells)]
    drawn = [f"\n{chart(cells)}"] if any("etcd" in cell.to for cell in cells) else []
    parts = [*header, *(f"\n{table(*each, left=LEFT)}" for each in tables), *drawn, *(f"\n{each}" for each in more)]
    return "\n".join([*parts, *aims_told([*targets(cells, facts), *more_targets])])


def chart(cells: Sequence[Cell]) -> str:
    """Rates beside etcd's as bars: a block of Markdown, a line for each cell with a ratio.
    etcd itself is 1."""
    shown = [cell for cell in side_by_side(cells) if "etcd" in cell.to and cell.system != "bare"]
    labels = [f"{cell.work} {cell.connections:>4} {cell.system}" for cell in shown]
    width = max(map(len, labels))
    unit = _BAR_CHARACTERS / max(cell.to["etcd"].median for cell in shown)
    lines = [
        f"{label:<{width}} {'█' * max(1, round(ratio.median * unit))} {ratio.median:.2f}"
        for label, ratio in zip(labels, (cell.to["etcd"] for cell in shown), strict=True)
    ]
    return "\n".join(["Rates beside etcd's of the same round:\n\n```", *lines, "```"])


def aims_told(found: Sequence[Target]) -> list[str]:
    """A line for each."""
    lines = ["\nAims:"]
    for target in found:
        figure = "" if target.figure is None else f" ({target.figure:.2f})"
        lines.append(f"- {target.text}: {MARKS[target.reached]}{figure}")
    return lines


def rate_table(cells: Sequence[Cell]) -> Rows:
    """All figures of these cells, the systems of one workload and number of connections below each other."""
    columns: list[tuple[str, Callable[[Cell], str]]] = [
        ("work", lambda cell: cell.work),
        ("conn", lambda cell: str(cell.connections)),
        ("system", lambda cell: cell.system),
        ("ops/s", lambda cell: f"{cell.per_s:,.0f}"),
        ("p50 ms", lambda cell: f"{cell.p50_ms:.2f}"),
        ("p99 ms", lambda cell: f"{cell.p99_ms:.2f}"),
        ("CPU µs/op", lambda cell: f"{cell.cpu_us_per_op:.0f}"),
        ("of which", lambda cell: show_processes(cell.cpu_us_per_op_by_process)),
        ("× etcd (low–high)", lambda cell: show_ratio(cell.to.get("etcd"))),
        ("× bare", lambda cell: f"{cell.to['bare'].median:.2f}" if "bare" in cell.to else "–"),
        ("errors", _show_errors),
    ]
    if any(cell.work in _SEVERAL_IN_ONE for cell in cells):
        columns.insert(4, ("requests/s", lambda cell: f"{cell.requests_per_s:,.0f}"))
    if any(cell.abort_rate is not None for cell in cells):
        columns.append(("409/attempt", lambda cell: "–" if cell.abort_rate is None else f"{cell.abort_rate:.2%}"))
    if any(cell.refused_per_op for cell in cells):
        columns.append(("refused/op", lambda cell: f"{cell.refused_per_op:.2f}"))
    rows = [[show(cell) for _, show in columns] for cell in side_by_side(cells)]
    return Rows([title for title, _ in columns], rows)


def show_processes(cpu_us_by_process: Mapping[str, float]) -> str:
    """Those that matter, the largest first; empty when one process does it all."""
    shares = sorted(cpu_us_by_process.items(), key=lambda share: -share[1])
    least = 0.02 * sum(cpu_us_by_process.values())
    large = [f"{name} {cpu_us:.0f}" for name, cpu_us in shares if cpu_us >= least]
    return ", ".join(large) if len(large) > 1 else ""


def _show_errors(cell: Cell) -> str:
    kinds = ", ".join(f"{kind}: {count}" for kind, count in cell.errors_by_kind.items())
    return f"{cell.errors} ({kinds})" if kinds else str(cell.errors)


def side_by_side(cells: Sequence[Cell]) -> list[Cell]:
    """In the order of the first runs, but the systems always in the same order: the first row's."""
    works = list(dict.fromkeys(cell.work for cell in cells))
    systems = list(dict.fromkeys(cell.system for cell in cells))
    return sorted(cells, key=lambda cell: (works.index(cell.work), cell.connections, systems.index(cell.system)))


def show_ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def fact_table(facts: Sequence[SystemFacts]) -> Rows:
    titles = ["system", "version", "ready s", "idle MB", "MB after the runs"]
    rows = [
        [
            fact.system,
            fact.version,
            f"{fact.ready_s:.2f}",
            f"{fact.idle_pss_mb:.0f}",
            f"{fact.loaded_pss_mb:.0f}" if fact.loaded_pss_mb else "–",
        ]
        for fact in facts
    ]
    return Rows(titles, rows)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """Markdown that also lines up on a terminal; the columns of these titles are flush left."""
    widths = [max(len(line[column]) for line in [titles, *rows]) for column in range(len(titles))]

    def line(fields: Sequence[str]) -> str:
        padded = (
            field.ljust(width) if title in left else field.rjust(width)
            for title, field, width in zip(titles, fields, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if title in left else "-" * (width - 1) + ":" for title, width in zip(titles, widths, strict=True)
    ]
    return "\n".join([line(titles), line(rule), *(line(row) for row in rows)])


def machine(versions: Sequence[str], command: str) -> list[str]:
    """The header: when, on what, with what, and the command that was run."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0))
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {cores} cores · {model} · {platform.system()} {platform.release()}",
        f"{_python()} · {' · '.join(versions)}",
        f"`{command}`",
    ]


def _python() -> str:
    """Its version and a yardstick: builds of one version differ by a factor of two (profile-guided optimization)."""
    fastest_s = min(timeit.repeat("sum(range(1000))", number=1000, repeat=20)) / 1000
    return f"Python {platform.python_version()} (sum(range(1000)) takes it {fastest_s * 1e6:.1f} µs)"
