"""Charts: axes enclose what is shown, nothing leaves its frame, and everything is well-formed."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.tools import charts
from loadtest.tools.charts import Band, Chart, Lane, Mark, Scale, Series
from loadtest.tools.web_page import text

SVG = "{http://www.w3.org/2000/svg}"

amounts = st.floats(min_value=0, max_value=1e15)
names = st.text(max_size=20)
times = st.floats(min_value=0, max_value=100_000)
spans = st.floats(min_value=0, max_value=100_000)


@st.composite
def any_series(draw: st.DrawFn) -> Series:
    at = sorted(draw(st.lists(times, max_size=8)))
    return Series(draw(names), [(time_s, draw(st.none() | amounts)) for time_s in at])


@st.composite
def any_bands(draw: st.DrawFn) -> list[Band]:
    pairs = draw(st.lists(st.tuples(times, times), max_size=4))
    return [Band(min(pair), max(pair), draw(names), draw(st.sampled_from(["kill", "pause", ""]))) for pair in pairs]


def drawing(figure: str) -> ElementTree.Element:
    """The chart itself. It raises ParseError when the figure is not well-formed."""
    found = ElementTree.fromstring(figure).find(f"div/{SVG}svg")
    assert found is not None
    return found


def assert_within_frame(svg: ElementTree.Element) -> None:
    """Nothing is drawn beyond the edges of the chart."""
    _, _, width, height = (float(number) for number in svg.attrib["viewBox"].split())
    places: list[tuple[float, float]] = []
    for element in svg.iter():
        at = {
            name: float(element.attrib[name]) for name in ("x", "y", "x1", "y1", "x2", "y2") if name in element.attrib
        }
        right = at.get("x", 0.0) + float(element.attrib.get("width", 0))
        places += [
            (at.get("x", 0.0), at.get("y", 0.0)),
            (right, at.get("y", 0.0) + float(element.attrib.get("height", 0))),
        ]
        places += [(at.get("x1", 0.0), at.get("y1", 0.0)), (at.get("x2", 0.0), at.get("y2", 0.0))]
        pairs = element.attrib.get("points", "").split()
        places += [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]
    assert all(0 <= x <= width + 0.11 and 0 <= y <= height + 0.11 for x, y in places), (width, height, places)


# --- axes ------------------------------------------------------------------------------------------------------------


@given(amounts)
def test_the_ticks_of_an_axis_enclose_all_values_and_are_few(highest: float):
    found = charts.ticks(highest)
    assert found[0] == 0
    assert found[-1] >= highest
    assert 2 <= len(found) <= 7
    assert all(low < high for low, high in pairwise(found))


@given(amounts.filter(lambda amount: amount > 1e-6))
def test_no_axis_is_more_than_four_times_as_long_as_its_values(highest: float):
    assert charts.ticks(highest)[-1] <= 4 * highest


def test_ticks_are_round_numbers():
    assert charts.ticks(7) == [0, 2, 4, 6, 8]
    assert charts.ticks(1_850) == [0, 500, 1000, 1500, 2000]
    assert charts.ticks(0.3) == [0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("highest", [-1.0, math.nan, math.inf])
def test_what_is_no_amount_has_no_axis(highest: float):
    with pytest.raises(ValueError, match="no axis"):
        charts.ticks(highest)


@given(st.floats(1e-6, 1e12), st.floats(1e-6, 1e12))
def test_the_ticks_of_a_logarithmic_axis_enclose_all_values(one: float, other: float):
    found = charts.logarithmic_ticks(min(one, other), max(one, other))
    assert found[0] <= min(one, other)
    assert found[-1] >= max(one, other)
    assert len(found) >= 2
    assert all(low < high for low, high in pairwise(found))


def test_a_logarithmic_axis_goes_by_powers_of_ten_or_finer_when_it_is_short():
    assert charts.logarithmic_ticks(3, 9_000) == [1, 10, 100, 1000, 10_000]
    assert charts.logarithmic_ticks(3, 40) == [2, 5, 10, 20, 50]
    assert charts.logarithmic_ticks(10, 10) == [10, 20]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf)])
def test_a_logarithmic_axis_has_no_place_for_nothing(low: float, high: float):
    with pytest.raises(ValueError, match="no logarithmic axis"):
        charts.logarithmic_ticks(low, high)


@given(spans)
def test_the_labels_of_a_time_axis_do_not_touch(span_s: float):
    svg = drawing(charts.lines(Chart("chart", "", "", span_s), [], "ms"))
    labels = [element for element in svg.iter(f"{SVG}text") if re.fullmatch(r"[\d:]+:\d\d", element.text or "")]
    assert labels
    edges = [(float(label.attrib["x"]), len(label.text or "") * 3.5) for label in labels]
    assert all(x + half < next_x - next_half for (x, half), (next_x, next_half) in pairwise(edges))


@given(st.lists(amounts, min_size=1), st.booleans())
def test_a_higher_value_is_never_drawn_lower(values: list[float], logarithmic: bool):
    found = charts.logarithmic_ticks(1e-3, 1e15) if logarithmic else charts.ticks(max(values))
    scale = Scale(found[0], found[-1], 200.0, 20.0, found, logarithmic)
    drawn = [scale.at(value) for value in sorted(values)]
    assert drawn == sorted(drawn, reverse=True)
    assert all(20 <= pixel <= 200 for pixel in drawn)


def test_times_are_shown_as_minutes_and_hours():
    assert [charts.show_time(time_s) for time_s in (0, 65, 3_725)] == ["0:00", "1:05", "1:02:05"]


# --- drawings --------------------------------------------------------------------------------------------------------


@given(st.lists(any_series(), max_size=10), any_bands(), names, spans, st.booleans())
def test_lines_stay_within_their_frame(
    series: list[Series], bands: list[Band], title: str, span_s: float, logarithmic: bool
):
    marks = [Mark(band.begin_s, band.label) for band in bands]
    chart = Chart("chart", title, title, span_s, bands, marks)
    figure = charts.lines(chart, series, "ms", logarithmic)
    assert_within_frame(drawing(figure))


@given(st.lists(st.lists(st.none() | amounts, min_size=4, max_size=4), max_size=10), any_bands(), spans)
def test_areas_stay_within_their_frame(rows: list[list[float | None]], bands: list[Band], span_s: float):
    series = [Series(f"row {number}", list(enumerate(row))) for number, row in enumerate(rows)]
    assert_within_frame(drawing(charts.areas(Chart("chart", "title", "told", span_s, bands), series, "per s")))


@given(st.lists(st.builds(Lane, names, any_bands()), max_size=5), spans)
def test_lanes_stay_within_their_frame(rows: list[Lane], span_s: float):
    assert_within_frame(drawing(charts.lanes(Chart("chart", "title", "told", span_s), rows)))


def test_areas_stand_on_one_another():
    series = [Series("below", [(0, 1.0), (10, 1.0)]), Series("above", [(0, 3.0), (10, None)])]
    svg = drawing(charts.areas(Chart("chart", "", "", 10), series, "per s"))
    below, above = (polygon.attrib["points"].split() for polygon in svg.iter(f"{SVG}polygon"))
    assert below[:2] == list(reversed(above[2:]))
    assert above[1] == below[1]  # what has no value adds nothing


def test_a_value_that_is_missing_is_a_gap_and_one_by_itself_a_dot():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 2.0), (4, None), (5, 2.0), (6, 2.0)]
    svg = drawing(charts.lines(Chart("chart", "", "", 6), [Series("p50", points)], "ms"))
    assert len(list(svg.iter(f"{SVG}polyline"))) == 2
    assert len(list(svg.iter(f"{SVG}circle"))) == 1


def test_what_was_over_at_once_is_still_seen():
    svg = drawing(charts.lanes(Chart("chart", "", "", 1_800), [Lane("kill", [Band(1_800, 1_800, "kill -9", "kill")])]))
    (kill,) = svg.iter(f"{SVG}rect")
    assert float(kill.attrib["width"]) >= 3
    assert kill.findtext(f"{SVG}title") == "kill -9"


def test_labels_of_marks_that_would_overlap_are_left_out():
    marks = [Mark(number, f"phase {number}") for number in range(100)]
    svg = drawing(charts.lines(Chart("chart", "", "", 100, marks=marks), [], "ms"))
    shown = [label for label in svg.iter(f"{SVG}text") if (label.text or "").startswith("phase")]
    edges = [(float(label.attrib["x"]), float(label.attrib["x"]) + 7 * len(label.text or "")) for label in shown]
    assert 1 < len(shown) < 100
    assert all(end < begin for (_, end), (begin, _) in pairwise(edges))


@pytest.mark.parametrize(
    "figure",
    [
        charts.lines(Chart("chart", "title", "told", 0), [], "ms"),
        charts.lines(Chart("chart", "title", "told", 0), [Series("p50", [(0, None)])], "ms"),
        charts.areas(Chart("chart", "title", "told", 0), [], "ms"),
        charts.lanes(Chart("chart", "title", "told", 0), []),
    ],
)
def test_a_chart_of_nothing_says_so(figure: str):
    assert "nothing to show" in "".join(drawing(figure).itertext())


def test_a_chart_tells_its_title_and_what_it_shows_to_those_who_cannot_see_it():
    svg = drawing(charts.lines(Chart("speed", "Operations", "Each second.", 60), [], "per s"))
    parts = {element.attrib["id"]: element.text for element in svg.iter() if "id" in element.attrib}
    assert svg.attrib["role"] == "img"
    assert [parts[name] for name in svg.attrib["aria-labelledby"].split()] == ["Operations", "Each second."]


@given(st.text())
def test_no_text_becomes_markup(content: str):
    element = ElementTree.fromstring(f'<p title="{text(content)}">{text(content)}</p>')
    assert len(element) == 0
    kept = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", content)
    assert (element.text or "") == re.sub("\r\n?", "\n", kept)
