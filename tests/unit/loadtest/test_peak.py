"""The sums of a peak of load, from what Locust draws."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.peak import Phase, render, summarize


def report(p99_after_ms: float, failures: dict[str, int]) -> dict[str, Any]:
    """One point a second: 20 s with 50 users, 20 s with 1,000, 20 s with 50."""
    points = []
    for second in range(1, 61):
        peak = 20 < second <= 40
        p99_ms = 900 if peak else p99_after_ms if second > 40 else 100
        points.append(
            {
                "current_rps": ["", 3000 if peak else 1000],
                "current_fail_per_sec": ["", 0],
                "response_time_percentile_0.5": ["", 20],
                "response_time_percentile_0.99": ["", p99_ms],
            }
        )
    return {
        "history": points,
        "failures_statistics": [
            {"error": words, "occurrences": count} for words, count in failures.items() for _ in range(2)
        ],
        "requests_statistics": [{"name": "Aggregated", "num_requests": 80_000}],
    }


def phases() -> list[Phase]:
    return [Phase("before", 50, 20), Phase("peak", 1000, 20), Phase("after", 50, 20)]


def test_each_phase_shows_what_held_at_its_end() -> None:
    peak = summarize(report(120, {}), phases())
    assert [(phase.requests_per_s, phase.p99_ms) for phase in peak.phases] == [(1000, 100), (3000, 900), (1000, 120)]
    assert peak.complaints == []
    assert "| peak | 1,000 | 3,000 | 0 | 20 | 900 |" in render(peak)
    assert "80,000 requests; 0 failures" in render(peak)


def test_latency_that_does_not_fall_back_is_a_complaint() -> None:
    assert summarize(report(201, {}), phases()).complaints == [
        "p99 was 100 ms before the peak and is 201 ms after it, while others took 0% and 0% of the CPU"
    ]


@pytest.mark.parametrize(
    ("words", "complained"),
    [
        ("503 unavailable", False),
        ("429 too-many-requests", False),
        ("504 outcome-unknown", True),
        ("no answer: x", True),
    ],
)
def test_only_429_and_503_may_happen(words: str, complained: bool) -> None:
    peak = summarize(report(100, {words: 2}), phases())
    assert peak.failures == {words: 4}
    assert (peak.complaints != []) == complained
    assert f"4 × {words}" in render(peak)


def test_a_report_that_ended_early_is_summed_up_to_its_end() -> None:
    short = report(100, {})
    del short["history"][50:]
    assert summarize(short, phases()).phases[-1].p99_ms == 100
