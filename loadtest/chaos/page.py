"""The verdict on a chaos run as one web page.

Owns: what stands where, and the one sentence on top.
Promises: the page is complete in itself; all texts that come from the run are escaped; a run that did not pass says why
in the first sentence, and every violation in full below. Pure.
Leaves to others: the figures (summary.py), drawing (loadtest/charts.py), style (loadtest/web_page.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

from loadtest.chaos.summary import Fault, Phase, Point, RunSummary
from loadtest.histories.verdict import Check
from loadtest.tools import charts
from loadtest.tools.charts import Band, Chart, Lane, Mark, Series, show_time
from loadtest.tools.web_page import bullets, document, table, text

_POINTS_MAX = 300  # more of them would be less than 3 pixels apart
_FAULTS_SHOWN = 30

Rates = Callable[[Point], dict[str, float]]


def render(run: RunSummary) -> str:
    """The whole page."""
    parts = [
        _top(run),
        "<h2>Run it again</h2>",
        f"<pre>{text(run.command)}</pre>",
        *_kept(run),
        "<h2>Over time</h2>",
        _timeline(run),
        _rates(run),
        "<h2>Phases</h2>",
        _phases(run.phases),
        *_findings(run.phases),
        "<h2>Faults</h2>",
        _faults(run.faults),
        "<h2>Machine</h2>",
        bullets(run.machine),
    ]
    return document(f"Chaos, seed {run.seed}: {'passed' if run.ok else 'not passed'}", "\n".join(parts))


def sentence(run: RunSummary) -> str:
    """The verdict in one sentence, as plain text."""
    bad = [phase for phase in run.phases if not phase.ok]
    if run.ok:
        return f"Passed: {_extent(run)}, nothing violated."
    violated = [
        f"{check.name} in phase {phase.number} ({len(check.violations)} {_s(check.violations, 'violation')})"
        for phase in bad
        for check in phase.checks
        if check.violations
    ]
    if violated:
        return f"Violated: {', '.join(violated)}."
    complaints = [f"{complaint.rstrip('.')} (phase {phase.number})" for phase in bad for complaint in phase.complaints]
    if complaints:
        return f"Failed: {'; '.join(complaints)}."
    unfinished = [f"{each.rstrip('.')} (phase {phase.number})" for phase in bad for each in phase.unfinished]
    if unfinished:
        return f"Ended early, and nothing was violated until then ({_extent(run)}): {'; '.join(unfinished)}."
    undecided = [f"{check.name} in phase {phase.number}" for phase in bad for check in phase.checks if check.note]
    if undecided:
        return f"Undecided: {', '.join(undecided)}: no violation was found, and not all could be judged."
    return "No verdict: the run was over before all of it could be judged."


def _extent(run: RunSummary) -> str:
    return (
        f"{run.totals.operations:,} operations in {len(run.phases)} {_s(run.phases, 'phase')} under "
        f"{len(run.faults):,} {_s(run.faults, 'fault')}"
    )


def _top(run: RunSummary) -> str:
    done = f"{run.totals.done:,} done, {run.totals.refused:,} refused, {run.totals.unknown:,} with an unknown outcome"
    cluster = f"{run.shards} {_plural(run.shards, 'shard')}, {run.routers} {_plural(run.routers, 'router')}"
    copies = f", {run.replicas} copies of every key" if run.replicas > 1 else ""
    facts = [
        f"{run.began_at}, {run.seconds / 60:.1f} minutes, seed {run.seed}, {cluster}{copies}",
        f"nemeses: {', '.join(run.nemeses) or 'none'}; operations: {done}",
    ]
    planted = [f"planted bug: {run.bug}"] if run.bug else []
    below = "".join(f"<p>{text(line)}</p>" for line in [*facts, *planted])
    return f'<div class="verdict {"passed" if run.ok else "failed"}"><h1>{text(sentence(run))}</h1>{below}</div>'


def _kept(run: RunSummary) -> list[str]:
    return [f"<p>Data, logs and histories are kept in <code>{text(run.kept)}</code>.</p>"] if run.kept else []


# --- over time -------------------------------------------------------------------------------------------------------


def _timeline(run: RunSummary) -> str:
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in run.faults:
        kinds.setdefault((fault.nemesis, fault.kind), []).append(fault)
    rows = [
        Lane(
            f"{nemesis}: {kind}" if kind != nemesis else kind,
            [Band(fault.at_s, fault.at_s + fault.for_s, _describe(fault), nemesis) for fault in faults],
        )
        for (nemesis, kind), faults in sorted(kinds.items(), key=lambda item: _place(run.nemeses, item[0][0]))
    ]
    told = "From when to when each fault lasted. Dashed lines: where a phase begins, with new keys and no fault left."
    return charts.lanes(Chart("faults-over-time", "Faults", told, run.seconds, marks=_marks(run)), rows)


def _place(nemeses: Sequence[str], nemesis: str) -> int:
    """In the order in which the command names them."""
    return nemeses.index(nemesis) if nemesis in nemeses else len(nemeses)


def _describe(fault: Fault) -> str:
    when = f"{show_time(fault.at_s)}–{show_time(fault.at_s + fault.for_s)}" if fault.for_s else show_time(fault.at_s)
    note = f" ({fault.note})" if fault.note else ""
    return f"{when} {fault.nemesis} {fault.kind} {', '.join(fault.targets)}{note}"


def _marks(run: RunSummary) -> list[Mark]:
    return [Mark(phase.began_s, f"phase {phase.number}") for phase in run.phases]


def _rates(run: RunSummary) -> str:
    points, width_s = thin(run.points)
    every = f"Means of {width_s} s." if width_s > 1 else "Each second."
    shaded = "Shaded: while a fault lasted."
    spans = merged((fault.at_s, fault.at_s + fault.for_s) for fault in run.faults)
    bands = [Band(begin_s, end_s, "a fault lasted") for begin_s, end_s in spans]
    marks = _marks(run)
    done = _by_name(points, lambda point: point.per_s)
    failed = _by_name(points, lambda point: point.failed_per_s)
    latency = [
        Series("p50", [(point.at_s, point.p50_ms) for point in points]),
        Series("p99", [(point.at_s, point.p99_ms) for point in points]),
    ]
    slowest = f"Of all answers in {width_s} s: the median, and the highest p99 of a second." if width_s > 1 else every

    def chart(name: str, title: str, description: str) -> Chart:
        return Chart(name, title, description, run.seconds, bands, marks)

    sums = f"{every} The upper edge is the sum. {shaded}"
    below = f"{slowest} {shaded} Logarithmic axis."
    parts = [
        charts.areas(chart("throughput", "Operations done, by workload", sums), done, "per s"),
        charts.lines(chart("latency", "Latency of all answers", below), latency, "ms", logarithmic=True),
        charts.areas(chart("refusals", "Refusals, by problem code", sums), failed, "per s"),
    ]
    return "\n".join(parts)


def _by_name(points: Sequence[Point], rates: Rates) -> list[Series]:
    """A line for each name that occurs; it is at 0 in a second that does not name it."""
    names = sorted({name for point in points for name in rates(point)})
    return [Series(name, [(point.at_s, rates(point).get(name, 0.0)) for point in points]) for name in names]


def thin(points: Sequence[Point]) -> tuple[list[Point], int]:
    """At most `_POINTS_MAX` points, and how many of the given ones each stands for.
    The mean of their rates, the median of their p50 and the highest p99. Its time is that of the first."""
    count = -(-len(points) // _POINTS_MAX) or 1
    return [_one_for(points[begin : begin + count]) for begin in range(0, len(points), count)], count


def _one_for(points: Sequence[Point]) -> Point:
    def means(rates: Rates) -> dict[str, float]:
        names = sorted({name for point in points for name in rates(point)})
        return {name: fmean(rates(point).get(name, 0.0) for point in points) for name in names}

    typical = [point.p50_ms for point in points if point.p50_ms is not None]
    slow = [point.p99_ms for point in points if point.p99_ms is not None]
    return Point(
        at_s=points[0].at_s,
        per_s=means(lambda point: point.per_s),
        failed_per_s=means(lambda point: point.failed_per_s),
        p50_ms=median(typical) if typical else None,
        p99_ms=max(slow, default=None),
    )


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times, as spans that do not overlap, in their order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


# --- tables and findings ---------------------------------------------------------------------------------------------


def _phases(phases: Sequence[Phase]) -> str:
    names = list(dict.fromkeys(check.name for phase in phases for check in phase.checks))
    rows = []
    for phase in phases:
        checks = {check.name: check for check in phase.checks}
        rows.append(
            [
                str(phase.number),
                _verdict(phase),
                show_time(phase.began_s),
                f"{phase.seconds:.0f}",
                f"{sum(phase.operations.values()):,}",
                *(_show_check(checks[name]) if name in checks else "–" for name in names),
            ]
        )
    caption = "Of each check: the operations judged, the seconds that it took, and what it found unless all held."
    titles = ["phase", "verdict", "began", "seconds", "operations", *names]
    return table(caption, titles, rows, numbers=("phase", "began", "seconds", "operations"))


def _verdict(phase: Phase) -> str:
    if phase.ok or phase.violations:
        return "passed" if phase.ok else "violated"
    return "ended early" if phase.unfinished and not phase.complaints else "not passed"


def _show_check(check: Check) -> str:
    found = f": {len(check.violations)} {_s(check.violations, 'violation')}" if check.violations else ""
    undecided = ": undecided" if check.note and not found else ""
    return f"{check.operations:,} · {check.seconds:.1f}\N{NO-BREAK SPACE}s{found or undecided}"


def _findings(phases: Sequence[Phase]) -> list[str]:
    """What was wrong, in full."""
    parts = []
    for phase in (phase for phase in phases if not phase.ok):
        parts.append(f"<h2>Phase {phase.number}: what was found</h2>")
        parts += [f"<pre>{text(sentence)}</pre>" for sentence in [*phase.complaints, *phase.unfinished]]
        for check in phase.checks:
            parts += [f"<p>{text(check.name)}</p>"] if check.violations or check.note else []
            parts += [f"<pre>{text(violation)}</pre>" for violation in check.violations]
            parts += [f"<pre>not concluded: {text(check.note)}</pre>"] if check.note else []
    return parts


def _faults(faults: Sequence[Fault]) -> str:
    titles = ["at", "for s", "nemesis", "kind", "targets", "note"]
    rows = [
        [
            show_time(fault.at_s),
            f"{fault.for_s:.1f}" if fault.for_s else "–",
            fault.nemesis,
            fault.kind,
            ", ".join(fault.targets),
            fault.note,
        ]
        for fault in faults
    ]
    shown = table("", titles, rows, numbers=("at", "for s"))
    if len(faults) <= _FAULTS_SHOWN:
        return shown
    return f"<details><summary>{len(faults):,} faults</summary>{shown}</details>"


def _s(things: Sequence[object], noun: str) -> str:
    return _plural(len(things), noun)


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
