"""A comparison as one web page: charts of ratios and of CPU time, tables, aims.

Owns: what stands where, and what is drawn.
Promises: the page is complete in itself; all texts are escaped; each chart's figures are in a table, too. Pure.
Leaves to others: the figures (report.py, scaling.py), drawing (loadtest/charts.py), style (loadtest/web_page.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadtest.bench import report, scaling
from loadtest.bench.report import Cell, Rows, SystemFacts, Target, show_processes, show_ratio
from loadtest.bench.scaling import Growth
from loadtest.bench.workloads import WORKLOADS
from loadtest.tools import charts, web_page
from loadtest.tools.charts import Bar, BarGroup
from loadtest.tools.web_page import bullets, document, text

_TITLE = "kvstore beside etcd and Redis"
_PEER, _NO_STORE = "etcd", "bare"


def render(
    cells: Sequence[Cell], facts: Sequence[SystemFacts], header: Sequence[str], growths: Sequence[Growth] = ()
) -> str:
    """The whole page."""
    parts = [f"<h1>{text(_TITLE)}</h1>", bullets([line.strip("`") for line in header])]
    for work in dict.fromkeys(cell.work for cell in cells):
        parts += _workload(work, [cell for cell in cells if cell.work == work])
    parts += _growth(growths) if growths else []
    parts += ["<h2>Aims</h2>", _aims([*report.targets(cells, facts), *scaling.targets(growths)])]
    parts += ["<h2>Systems</h2>", _table("Memory is the sum of PSS over all processes.", report.fact_table(facts))]
    return document(_TITLE, "\n".join(parts))


def _table(caption: str, shown: Rows) -> str:
    numbers = [title for title in shown.titles if title not in report.LEFT]
    return web_page.table(caption, shown.titles, shown.rows, numbers)


# --- workloads -------------------------------------------------------------------------------------------------------


def _workload(work: str, cells: Sequence[Cell]) -> list[str]:
    return [
        f"<h2>{text(work)}: {text(WORKLOADS[work].title)}</h2>",
        _ratio_chart(work, cells) if any(_PEER in cell.to for cell in cells) else _rate_chart(work, cells),
        _cpu_chart(work, cells),
        _table("", report.rate_table(cells)),
    ]


def _ratio_chart(work: str, cells: Sequence[Cell]) -> str:
    def bar(cell: Cell) -> Bar:
        found = cell.to[_PEER]
        return Bar(cell.system, found.median, f"{show_ratio(found)}, {cell.per_s:,.0f}/s")

    shown = [cell for cell in cells if _PEER in cell.to and cell.system != _NO_STORE]
    told = "Rates divided by etcd's of the same round: the median over the rounds (lowest–highest). More is better."
    return charts.bars(f"ratio-{work}", "Rate beside etcd", told, _by_connections(shown, bar), "× etcd's rate")


def _rate_chart(work: str, cells: Sequence[Cell]) -> str:
    def bar(cell: Cell) -> Bar:
        return Bar(cell.system, cell.per_s, f"{cell.per_s:,.0f}/s")

    told = "Operations per second; etcd was not measured. More is better."
    return charts.bars(f"rate-{work}", "Rate", told, _by_connections(cells, bar), "operations per s")


def _cpu_chart(work: str, cells: Sequence[Cell]) -> str:
    def bar(cell: Cell) -> Bar:
        of_which = show_processes(cell.cpu_us_per_op_by_process)
        return Bar(
            cell.system, cell.cpu_us_per_op, f"{cell.cpu_us_per_op:,.0f}" + (f": {of_which}" if of_which else "")
        )

    told = "CPU time of all processes of a system, user and kernel, without the load generator's. Less is better."
    groups = _by_connections(cells, bar)
    return charts.bars(f"cpu-{work}", "CPU time per operation", told, groups, "µs per operation")


def _by_connections(cells: Sequence[Cell], bar: Callable[[Cell], Bar]) -> list[BarGroup]:
    """The systems always in the same order."""
    ordered = report.side_by_side(cells)
    return [
        BarGroup(_connections(count), [bar(cell) for cell in ordered if cell.connections == count])
        for count in dict.fromkeys(cell.connections for cell in ordered)
    ]


def _connections(count: int) -> str:
    return "1 connection" if count == 1 else f"{count} connections"


# --- more shards -----------------------------------------------------------------------------------------------------


def _growth(growths: Sequence[Growth]) -> list[str]:
    parts = ["<h2>More shards</h2>", f"<p>{text(scaling.WHY)}</p>"]
    for work in dict.fromkeys(each.work for each in growths):
        parts += _growth_charts(work, [each for each in growths if each.work == work])
    caption = "× : beside the fewest shards with as many routers, in the same round: median (lowest–highest)."
    return [*parts, _table(caption, scaling.rows(growths)), bullets(scaling.explain(growths))]


def _growth_charts(work: str, growths: Sequence[Growth]) -> list[str]:
    def rates(each: Growth) -> Bar:
        return Bar(_shards(each), each.per_s.median, f"{show_ratio(each.per_s)}, {each.cell.per_s:,.0f}/s")

    def cpu(each: Growth) -> Bar:
        return Bar(_shards(each), each.cpu.median, f"{show_ratio(each.cpu)}, {each.cell.cpu_us_per_op:,.0f} µs")

    told = "Beside the fewest shards with as many routers, in the same round."
    least = f"Aim: at most {scaling.CPU_AIM:g} at {scaling.MANY} shards, beside {scaling.FEW}."
    return [
        charts.bars(
            f"shards-rate-{work}",
            f"{work}: rate by shards",
            told,
            _by_routers(growths, rates),
            "× the rate of the fewest",
        ),
        charts.bars(
            f"shards-cpu-{work}",
            f"{work}: CPU time per operation by shards",
            f"{told} {least}",
            _by_routers(growths, cpu),
            "× the CPU time of the fewest",
        ),
    ]


def _by_routers(growths: Sequence[Growth], bar: Callable[[Growth], Bar]) -> list[BarGroup]:
    places = dict.fromkeys((each.connections, each.routers) for each in growths)
    return [
        BarGroup(
            f"{_connections(connections)}, {routers} router{'s' * (routers > 1)}",
            [bar(each) for each in growths if (each.connections, each.routers) == (connections, routers)],
        )
        for connections, routers in places
    ]


def _shards(each: Growth) -> str:
    return "1 shard" if each.shards == 1 else f"{each.shards} shards"


# --- aims ------------------------------------------------------------------------------------------------------------


def _aims(targets: Sequence[Target]) -> str:
    rows = [
        [target.text, report.MARKS[target.reached], "–" if target.figure is None else f"{target.figure:.2f}"]
        for target in targets
    ]
    return web_page.table("", ["aim", "verdict", "measured"], rows, numbers=("measured",))
