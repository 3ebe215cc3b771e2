"""What more shards bring and cost: rates and CPU time per operation beside those of the fewest shards.

Owns: which clusters are compared with which, and the aim for them.
Promises: clusters of as many routers are compared, at the same workload and number of connections; a ratio is the
median of the ratios within each round (report.py). Pure.
Leaves to others: the runs (drive.py), other tables (report.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from loadtest.bench.drive import Run
from loadtest.bench.report import (
    LEFT,
    Cell,
    Ratio,
    Rows,
    SystemFacts,
    Target,
    at_most,
    cpu_time,
    rate,
    ratio,
    show_processes,
    show_ratio,
    summarize,
    table,
)

CPU_AIM = 1.5  # times the CPU time per operation of one shard, at MANY shards
FEW, MANY = 1, 8


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster of `base.shards` shards (the fewest) and one of `shards`, the rest being equal; at first both are one.

    `cell` and `base` have the medians over the rounds; `per_s` and `cpu` are ratios of the same rounds.
    """

    work: str
    connections: int
    routers: int
    shards: int
    base_shards: int
    cell: Cell
    base: Cell
    per_s: Ratio
    cpu: Ratio


def growths(runs: Sequence[Run], facts: Sequence[SystemFacts]) -> list[Growth]:
    """In the order of workloads, connections, routers, shards; empty unless there are several numbers of shards."""
    by_place: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        by_place.setdefault((run.work, run.connections, run.system), []).append(run)
    cells = {(cell.work, cell.connections, cell.system): cell for cell in summarize(runs)}
    works = list(dict.fromkeys(run.work for run in runs))
    found = []
    for base, grown in _pairs(facts):
        for work, connections in sorted({place[:2] for place in by_place}):
            here, there = (work, connections, grown.system), (work, connections, base.system)
            if here not in by_place or there not in by_place:
                continue
            per_s, cpu = (ratio(by_place[here], by_place[there], figure) for figure in (rate, cpu_time))
            if per_s is not None and cpu is not None:
                found.append(
                    Growth(
                        work=work,
                        connections=connections,
                        routers=grown.routers,
                        shards=grown.shards,
                        base_shards=base.shards,
                        cell=cells[here],
                        base=cells[there],
                        per_s=per_s,
                        cpu=cpu,
                    )
                )
    grown_places = {_place(each) for each in found if each.shards > each.base_shards}
    found = [each for each in found if _place(each) in grown_places]
    return sorted(found, key=lambda each: (works.index(each.work), each.connections, each.routers, each.shards))


def _place(each: Growth) -> tuple[str, int, int]:
    return each.work, each.connections, each.routers


def _pairs(facts: Sequence[SystemFacts]) -> list[tuple[SystemFacts, SystemFacts]]:
    """Each cluster behind the one with the fewest shards among those of as many routers, if there are others."""
    clusters = [fact for fact in facts if fact.shards]
    found = []
    for routers in sorted({fact.routers for fact in clusters}):
        alike = sorted((fact for fact in clusters if fact.routers == routers), key=lambda fact: fact.shards)
        found += [(alike[0], fact) for fact in alike] if len(alike) > 1 else []
    return found


def targets(found: Sequence[Growth]) -> list[Target]:
    """One for each workload: the highest ratio over all connections and routers. None if nothing has grown."""
    result = []
    for work in dict.fromkeys(each.work for each in found):
        ratios = [
            each.cpu.median for each in found if each.work == work and (each.base_shards, each.shards) == (FEW, MANY)
        ]
        text = f"{work.upper()}: CPU per operation at {MANY} shards ≤ {CPU_AIM:g} × that at {FEW}"
        result.append(at_most(text, max(ratios, default=None), CPU_AIM))
    return result


# --- for people ------------------------------------------------------------------------------------------------------


def sections(found: Sequence[Growth]) -> list[str]:
    """For the report as Markdown; none if nothing has grown."""
    if not found:
        return []
    return [f"More shards, beside the fewest with as many routers:\n\n{table(*rows(found), left=LEFT)}", WHY]


def rows(found: Sequence[Growth]) -> Rows:
    titles = ["work", "conn", "routers", "shards", "ops/s", "× (low–high)", "CPU µs/op", "CPU × (low–high)", "of which"]
    titles.append("ops/batch")
    return Rows(
        titles,
        [
            [
                each.work,
                str(each.connections),
                str(each.routers),
                str(each.shards),
                f"{each.cell.per_s:,.0f}",
                show_ratio(each.per_s),
                f"{each.cell.cpu_us_per_op:.0f}",
                show_ratio(each.cpu),
                show_processes(each.cell.cpu_us_per_op_by_process),
                _show_size(each.cell),
            ]
            for each in found
        ],
    )


def _show_size(cell: Cell) -> str:
    return "–" if cell.batch_operations is None else f"{cell.batch_operations:.1f}"


WHY = (
    "With more shards the same connections are spread over more stores: a batch (one commit and fsync) and a frame "
    "between router and shard hold fewer operations each, so that each operation pays a larger share of what a batch "
    "and a frame cost; a list asks every shard, each for its share of the page and some more. All processes share this "
    "machine's cores: more shards cannot be faster here than these allow."
)
