"""The page of a chaos run: its verdict, its charts, and that nothing of the run becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos import page
from loadtest.chaos.summary import Fault, Phase, Point, RunSummary, Totals, decode, encode
from loadtest.histories.verdict import Check

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</pre><script>alert('x')</script> & \"quoted\" \x00"


def phase(number: int, *checks: Check, complaints: tuple[str, ...] = (), unfinished: tuple[str, ...] = ()) -> Phase:
    done = {"bank": 400, "register": 600}
    return Phase(number, 60.0 * (number - 1), 60.0, done, list(checks), list(complaints), list(unfinished))


def run(*phases: Phase, ok: bool = True, **more: object) -> RunSummary:
    summary = RunSummary(
        command="python -m loadtest.chaos --minutes 2 --seed 7",
        seed=7,
        began_at="2026-01-02T03:04:05+00:00",
        seconds=120.0,
        ok=ok,
        nemeses=["kill", "pause"],
        shards=4,
        routers=2,
        faults=[Fault(3.0, 0.0, "kill", "kill -9", ["s1"]), Fault(8.0, 12.0, "pause", "SIGSTOP", ["router 0"], "late")],
        points=[Point(float(at_s), {"bank": 200.0}, {"timeout": 1.0}, 2.0, 30.0) for at_s in range(120)],
        phases=list(phases),
        totals=Totals(done=1_900, refused=90, unknown=10),
        machine=["2 cores"],
    )
    return msgspec.structs.replace(summary, **more)


def parsed(summary: RunSummary) -> ElementTree.Element:
    """The page as a tree; ParseError when it is not well-formed."""
    return ElementTree.fromstring(page.render(summary))


def words(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def heading(summary: RunSummary) -> str:
    return words(next(parsed(summary).iter("h1")))


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_a_run_that_passed_says_how_much_was_checked():
    summary = run(phase(1, Check("bank", 400, [], 0.5)), phase(2, Check("bank", 400, [], 0.5)))
    assert heading(summary) == "Passed: 2,000 operations in 2 phases under 2 faults, nothing violated."


def test_a_violation_is_named_on_top_and_stands_in_full_below():
    violation = "account 3 of 200\n  was read as 180"
    summary = run(phase(1), phase(2, Check("bank", 400, [violation], 0.5)), ok=False)
    assert heading(summary) == "Violated: bank in phase 2 (1 violation)."
    assert violation in [words(element) for element in parsed(summary).iter("pre")]


def test_a_complaint_is_the_reason_when_no_check_is():
    summary = run(phase(1, complaints=("shard s2 did not come back within 60 s.",)), ok=False)
    assert heading(summary) == "Failed: shard s2 did not come back within 60 s (phase 1)."


def test_a_phase_that_did_not_come_to_its_end_is_told_apart_from_one_in_which_something_is_wrong():
    late = phase(2, Check("bank", 400, [], 0.5, "the bank has no closing"), unfinished=("copies are not in sync",))
    summary = run(phase(1), late, ok=False)
    assert heading(summary) == (
        "Ended early, and nothing was violated until then (2,000 operations in 2 phases under 2 faults): "
        "copies are not in sync (phase 2)."
    )
    assert "ended early" in [words(cell) for cell in parsed(summary).iter("td")]
    assert "copies are not in sync" in [words(element) for element in parsed(summary).iter("pre")]
    violated = run(phase(1, Check("sets", 400, ["x"], 0.5), unfinished=("copies are not in sync",)), ok=False)
    assert heading(violated) == "Violated: sets in phase 1 (1 violation)."


def test_a_check_that_gave_up_leaves_the_run_undecided():
    summary = run(phase(1, Check("registers", 9_000, [], 60.0, "key r-4: given up after 60 s")), ok=False)
    assert heading(summary).startswith("Undecided: registers in phase 1")
    assert "not concluded: key r-4: given up after 60 s" in words(parsed(summary))


def test_a_run_without_a_verdict_has_not_passed():
    assert heading(run(ok=False)) == "No verdict: the run was over before all of it could be judged."


@pytest.mark.parametrize(
    ("judged", "ok"),
    [
        (phase(1, Check("bank", 400, [], 0.5)), True),
        (phase(1, Check("bank", 400, ["x"], 0.5)), False),
        (phase(1, Check("bank", 400, [], 0.5, "given up")), False),
        (phase(1, complaints=("it did not recover",)), False),
        (phase(1, unfinished=("it did not recover in time",)), False),
    ],
)
def test_a_phase_passes_when_nothing_is_violated_undecided_or_complained_of(judged: Phase, ok: bool):
    assert judged.ok is ok


def test_the_page_tells_how_to_run_it_again_and_where_everything_is_kept():
    summary = run(phase(1), ok=False, kept="/somewhere/chaos-7", bug="early-answer")
    assert summary.command in [words(element) for element in parsed(summary).iter("pre")]
    assert "/somewhere/chaos-7" in words(parsed(summary))
    assert "planted bug: early-answer" in words(parsed(summary))


# --- over time -------------------------------------------------------------------------------------------------------


def test_every_fault_has_its_place_in_the_timeline_and_in_the_list():
    tree = parsed(run(phase(1)))
    (timeline,) = (figure for figure in tree.iter("figure") if figure.get("id") == "faults-over-time")
    told = {element.text for bar in timeline.iter(f"{SVG}rect") for element in bar.iter(f"{SVG}title")}
    assert {"0:03 kill kill -9 s1", "0:08–0:20 pause SIGSTOP router 0 (late)"} <= told
    rows = [[words(cell) for cell in row] for row in tree.iter("tr")]
    assert ["0:08", "12.0", "pause", "SIGSTOP", "router 0", "late"] in rows


def test_many_faults_are_folded_away():
    faults = [Fault(float(at_s), 0.0, "kill", "kill -9", ["s1"]) for at_s in range(100)]
    (folded,) = parsed(run(phase(1), faults=faults)).iter("details")
    assert words(folded).startswith("100 faults")


points = st.lists(
    st.builds(
        Point,
        st.floats(0, 3_600),
        st.dictionaries(st.sampled_from(["bank", "register"]), st.floats(0, 1e6)),
        st.dictionaries(st.text(max_size=5), st.floats(0, 1e6)),
        st.none() | st.floats(0, 1e5),
        st.none() | st.floats(0, 1e5),
    ),
    max_size=40,
)


@given(points, st.integers(1, 12))
def test_thinned_points_are_few_and_keep_the_slowest_answer(given_points: list[Point], most: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_POINTS_MAX", most)
        thinned, count = page.thin(given_points)
    assert len(thinned) <= most
    assert len(thinned) == -(-len(given_points) // count)
    for which in ("p50_ms", "p99_ms"):
        before, after = ([getattr(each, which) for each in some] for some in (given_points, thinned))
        assert any(value is not None for value in before) == any(value is not None for value in after)
    slowest = max((point.p99_ms for point in given_points if point.p99_ms is not None), default=None)
    assert max((point.p99_ms for point in thinned if point.p99_ms is not None), default=None) == slowest


def test_thinned_rates_are_means_over_all_seconds_also_those_in_which_nothing_was_done():
    given_points = [Point(float(at_s), {"bank": 10.0} if at_s % 2 else {}, {}) for at_s in range(600)]
    thinned, count = page.thin(given_points)
    assert count == 2
    assert {point.per_s["bank"] for point in thinned} == {5.0}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))))
def test_merged_spans_cover_the_same_times_and_do_not_overlap(spans: list[tuple[int, int]]):
    found = page.merged(spans)

    def covered(of: list[tuple[int, int]] | list[tuple[float, float]]) -> set[float]:
        return {half / 2 for begin, end in of for half in range(int(2 * begin), int(2 * end) + 1)}

    assert covered(found) == covered(spans)
    assert all(end < begin for (_, end), (begin, _) in pairwise(found))


# --- the file --------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """As a browser reads it: all tags, and what they would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "style")]


def test_nothing_that_the_run_brought_becomes_markup():
    hostile = Phase(1, 0.0, 60.0, {HOSTILE: 1}, [Check(HOSTILE, 1, [HOSTILE], 0.0, HOSTILE)], [HOSTILE])
    fault = Fault(1.0, 1.0, HOSTILE, HOSTILE, [HOSTILE], HOSTILE)
    point = Point(0.0, {HOSTILE: 1.0}, {HOSTILE: 1.0}, 1.0, 1.0)
    texts = dict.fromkeys(("command", "began_at", "bug", "kept"), HOSTILE)
    summary = run(hostile, ok=False, faults=[fault], points=[point], nemeses=[HOSTILE], machine=[HOSTILE], **texts)
    tags = Tags()
    tags.feed(page.render(summary))
    tags.close()
    assert "script" not in tags.seen
    assert "\x00" not in page.render(summary)
    assert HOSTILE.replace("\x00", "\ufffd") in words(parsed(summary))


def test_the_page_fetches_nothing():
    content = page.render(run(phase(1, Check("bank", 400, [], 0.5))))
    tags = Tags()
    tags.feed(content)
    assert tags.fetched == []
    assert "@import" not in content
    assert "url(" not in content


def test_a_run_in_which_nothing_happened_has_a_page():
    assert parsed(run(ok=False, faults=[], points=[], seconds=0.0, nemeses=[], machine=[])) is not None


def test_a_summary_is_read_back_as_it_was_written():
    summary = run(phase(1, Check("bank", 400, ["x"], 0.5)), ok=False)
    assert decode(encode(summary)) == summary
