"""Charts as SVG: lines and areas over time, lanes of what lasted how long.

Owns: scales, ticks, and where everything is drawn.
Promises: the ticks of an axis of values enclose all values, and nothing is drawn outside its frame; labels of ticks do
not overlap; a chart of nothing says so. Every chart has a title and a description for who cannot see it,
a legend of text, and colours from variables of the page's style. Pure.
Leaves to others: the style (web_page.py), what is shown.

"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loadtest.tools.web_page import SERIES, text

WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 18, 26, 40
_LINES_HEIGHT = 250
_LANE_HEIGHT, _LANE_BAR = 34, 12
_CHARACTER_PX = 6.8  # a generous mean for the 12 px of a label
_TICKS = 5
_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
_TIME_TICKS_MAX = 12
_SMALLEST = 1e-9  # nothing that is smaller has an axis of its own
_SHORTEST_PX = 3.0  # what is over at once is still seen


class Series(NamedTuple):
    """One line: (time in seconds, value); None: there is no value, and the line has a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


class Band(NamedTuple):
    """A span of time, in seconds. `group`: in a chart of lanes, what shares a colour."""

    begin_s: float
    end_s: float
    label: str
    group: str = ""


class Mark(NamedTuple):
    at_s: float
    label: str


class Lane(NamedTuple):
    label: str
    bands: Sequence[Band]


class Chart(NamedTuple):
    """What all kinds have: a name unique within the page, and the times from 0 to `span_s`."""

    name: str
    title: str
    description: str
    span_s: float
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()


# --- scales ----------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """From values to pixels. `ticks` are values between `low` and `high`, in rising order."""

    low: float
    high: float
    low_px: float
    high_px: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Pixels; a value outside is drawn at the frame."""
        of: Callable[[float], float] = math.log10 if self.logarithmic else float
        within = min(max(value, self.low), self.high)
        share = (of(within) - of(self.low)) / (of(self.high) - of(self.low))
        return round(self.low_px + share * (self.high_px - self.low_px), 1)


def ticks(highest: float) -> list[float]:
    """Round values at equal distances, from 0 to at least `highest`; there are two or more.

    Raises ValueError when `highest` is below 0, or no finite number.
    """
    if not (math.isfinite(highest) and highest >= 0):
        raise ValueError(f"no axis goes from 0 to {highest}")
    highest = max(highest, _SMALLEST) if highest else 1.0
    power = math.floor(math.log10(highest / _TICKS))
    step = next(step for step in (factor * 10.0**power for factor in (1, 2, 5, 10, 20)) if highest / step <= _TICKS)
    # rounded: without the dust of binary fractions
    return [round(number * step, max(0, 1 - power)) for number in range(math.ceil(highest / step) + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times these where there is room, that enclose both values; two or more.

    Raises ValueError unless 0 < low <= high, both finite.
    """
    if not (math.isfinite(high) and 0 < low <= high):
        raise ValueError(f"no logarithmic axis goes from {low} to {high}")
    low, high = max(low, _SMALLEST), max(high, _SMALLEST)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    values = [factor * 10.0**power for power in range(first - 1, last + 2) for factor in factors]
    begin = max(number for number, value in enumerate(values) if value <= low)
    end = min(number for number, value in enumerate(values) if value >= high)
    return values[begin : max(end, begin + 1) + 1]


def time_ticks(span_s: float) -> list[float]:
    """Round times from 0 to at most `span_s`."""
    step = next((step for step in _TIME_STEPS_S if span_s / step <= _TIME_TICKS_MAX), _TIME_STEPS_S[-1])
    step *= max(1, math.ceil(span_s / step / _TIME_TICKS_MAX))
    return [float(number * step) for number in range(int(span_s // step) + 1)]


def show_time(time_s: float) -> str:
    """`1:05`, or `1:02:05` from an hour on."""
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show_number(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < 1e12 else f"{value:.3g}"


def _time_scale(span_s: float) -> Scale:
    span_s = max(span_s, 1.0)
    return Scale(0.0, span_s, _LEFT, WIDTH - _RIGHT, time_ticks(span_s))


def _value_scale(values: Sequence[float], logarithmic: bool, low_px: float, high_px: float) -> Scale:
    if logarithmic:
        found = logarithmic_ticks(min(values, default=1.0), max(values, default=10.0))
    else:
        found = ticks(max(values, default=0.0))
    return Scale(found[0], found[-1], low_px, high_px, found, logarithmic)


# --- lines -----------------------------------------------------------------------------------------------------------


def lines(chart: Chart, series: Sequence[Series], unit: str, logarithmic: bool = False) -> str:
    """Values, none below 0, over time. On a logarithmic axis a value of 0 is a gap."""
    series = [_drawable(each, logarithmic) for each in series]
    values = [value for each in series for _, value in each.points if value is not None]
    across = _time_scale(chart.span_s)
    down = _value_scale(values, logarithmic, _LINES_HEIGHT - _BOTTOM, _TOP)
    parts = _frame(chart, across, down, unit)
    for number, each in enumerate(series):
        parts += _line(each, number, across, down)
    legend = [(each.name, _sample_line(number)) for number, each in enumerate(series)]
    return _figure(chart, legend, _LINES_HEIGHT, parts, empty=not values)


def areas(chart: Chart, series: Sequence[Series], unit: str) -> str:
    """The same as areas that stand on one another, so that the upper edge is the sum.
    All series name the same times; where there is no value it counts as 0."""
    across = _time_scale(chart.span_s)
    edges = [[0.0] * len(series[0].points)] if series else []
    for each in series:
        values = (value or 0.0 for _, value in _drawable(each, logarithmic=False).points)
        edges.append([below + value for below, value in zip(edges[-1], values, strict=True)])
    down = _value_scale(edges[-1] if edges else [], False, _LINES_HEIGHT - _BOTTOM, _TOP)
    parts = _frame(chart, across, down, unit)
    for number, each in enumerate(series):
        upper, lower = (
            [f"{across.at(time_s):g},{down.at(value):g}" for (time_s, _), value in zip(each.points, edge, strict=True)]
            for edge in (edges[number + 1], edges[number])
        )
        outline = " ".join([*upper, *reversed(lower)])
        parts.append(f'<polygon class="area series-{number % SERIES}" points="{outline}"/>')
    legend = [(each.name, _sample_bar(number)) for number, each in enumerate(series)]
    return _figure(chart, legend, _LINES_HEIGHT, parts, empty=not any(edges))


def _frame(chart: Chart, across: Scale, down: Scale, unit: str) -> list[str]:
    """All that is drawn before the values are."""
    bottom = _LINES_HEIGHT - _BOTTOM
    parts = [_band(band, across, _TOP, bottom - _TOP) for band in chart.bands]
    for value in down.ticks:
        parts.append(_horizontal(down.at(value)))
        parts.append(_label(_LEFT - 8, down.at(value) + 4, show_number(value), "end"))
    parts.append(_label(_LEFT - 8, _TOP - 14, unit, "end"))
    return [*parts, *_time_axis(across, bottom), *_marks(chart.marks, across, bottom)]


def _drawable(series: Series, logarithmic: bool) -> Series:
    """The values that the axis has no place for are gaps."""

    def known(value: float | None) -> float | None:
        drawable = value is not None and math.isfinite(value) and (value > 0 or (value == 0 and not logarithmic))
        return value if drawable else None

    return Series(series.name, [(time_s, known(value)) for time_s, value in series.points])


def _line(series: Series, number: int, across: Scale, down: Scale) -> list[str]:
    """A path for each stretch without a gap; a dot where a value has no neighbour."""
    stretches: list[list[str]] = [[]]
    for time_s, value in series.points:
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append(f"{across.at(time_s):g},{down.at(value):g}")
    parts = []
    for stretch in stretches:
        if len(stretch) > 1:
            parts.append(f'<polyline class="line series-{number % SERIES}" points="{" ".join(stretch)}"/>')
        elif stretch:
            x, y = stretch[0].split(",")
            parts.append(f'<circle class="dot series-{number % SERIES}" cx="{x}" cy="{y}" r="2"/>')
    return parts


def _marks(marks: Sequence[Mark], across: Scale, bottom: float) -> list[str]:
    """Vertical lines; a label that would touch the one before it is left out."""
    parts, free_px = [], 0.0
    for mark in sorted(marks):
        x = across.at(mark.at_s)
        parts.append(
            f'<line class="mark" x1="{x:g}" x2="{x:g}" y1="{_TOP - 8}" y2="{bottom:g}">'
            f"<title>{text(mark.label)}</title></line>"
        )
        width = len(mark.label) * _CHARACTER_PX
        if x >= free_px and x + width <= WIDTH:
            parts.append(_label(x + 4, _TOP - 12, mark.label))
            free_px = x + width + 12
    return parts


# --- lanes -----------------------------------------------------------------------------------------------------------


def lanes(chart: Chart, rows: Sequence[Lane]) -> str:
    """What lasted from when to when, a lane below the other, over the same time axis as `lines`."""
    bottom = _TOP + _LANE_HEIGHT * max(1, len(rows))
    across = _time_scale(chart.span_s)
    groups = list(dict.fromkeys(band.group for lane in rows for band in lane.bands))
    parts = [*_time_axis(across, bottom), *_marks(chart.marks, across, bottom)]
    for number, lane in enumerate(rows):
        top = _TOP + _LANE_HEIGHT * number
        parts.append(_horizontal(top))
        parts.append(_label(_LEFT + 6, top + 13, lane.label, "strong"))
        for band in lane.bands:
            colour = f"bar series-{groups.index(band.group) % SERIES}"
            parts.append(_band(band, across, top + _LANE_HEIGHT - _LANE_BAR - 4, _LANE_BAR, colour))
    legend = [(group, _sample_bar(number)) for number, group in enumerate(groups) if group]
    return _figure(chart, legend, bottom + _BOTTOM, parts, empty=not rows)


# --- what they share -------------------------------------------------------------------------------------------------


def _figure(chart: Chart, legend: Sequence[tuple[str, str]], height: float, parts: Sequence[str], empty: bool) -> str:
    name, title, description = (text(each) for each in chart[:3])
    entries = "".join(f"<li>{sample}{text(label)}</li>" for label, sample in legend)
    names = f'<ul class="legend">{entries}</ul>' if len(legend) > 1 else ""
    nothing = [_label(WIDTH / 2, _TOP + 20, "nothing to show", "middle")] if empty else []
    drawing = "\n".join([*parts, *nothing])
    return (
        f'<figure id="{name}"><figcaption>{title}<span>{description}</span></figcaption>{names}'
        f'<div class="chart"><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">\n<title id="{name}-title">{title}</title>'
        f'<desc id="{name}-desc">{description}</desc>\n{drawing}\n</svg></div></figure>'
    )


def _sample_line(number: int) -> str:
    return (
        f'<svg viewBox="0 0 26 10" aria-hidden="true"><line class="line series-{number % SERIES}" x1="0" x2="26" '
        'y1="5" y2="5"/></svg>'
    )


def _sample_bar(number: int) -> str:
    return (
        f'<svg viewBox="0 0 26 10" aria-hidden="true"><rect class="bar series-{number % SERIES}" width="26" '
        'height="10"/></svg>'
    )


def _label(x: float, y: float, content: str, style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}">{text(content)}</text>'


def _horizontal(y: float) -> str:
    return f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:g}" y2="{y:g}"/>'


def _time_axis(across: Scale, bottom: float) -> list[str]:
    parts = [_horizontal(bottom)]
    for time_s in across.ticks:
        x = across.at(time_s)
        parts.append(f'<line class="rule" x1="{x:g}" x2="{x:g}" y1="{bottom:g}" y2="{bottom + 4:g}"/>')
        parts.append(_label(x, bottom + 18, show_time(time_s), "middle"))
    parts.append(
        _label((_LEFT + WIDTH - _RIGHT) / 2, bottom + 34, "time since the run began (minutes:seconds)", "middle")
    )
    return parts


def _band(band: Band, across: Scale, top: float, height: float, style: str = "band") -> str:
    """At least `_SHORTEST_PX` wide, and within the frame."""
    begin = across.at(band.begin_s)
    width = max(across.at(band.end_s) - begin, _SHORTEST_PX)
    begin = min(begin, across.high_px - width)
    return (
        f'<rect class="{style}" x="{begin:.1f}" y="{top:g}" width="{width:.1f}" height="{height:g}">'
        f"<title>{text(band.label)}</title></rect>"
    )
