"""Rates and percentiles between two looks at the counts."""

from __future__ import annotations

import pytest

from kvstore.metrics import LATENCY_BOUNDS_S, RequestStats
from kvstore.router.rates import HISTORY_MAX, Rates, percentile_ms


def test_only_what_was_answered_between_two_looks_is_counted() -> None:
    stats, rates = RequestStats(), Rates()
    for _ in range(500):
        stats.observe("/v1/kv/{key}", "GET", 200, 0.001)
    rates.begin(stats.histograms(), 10.0)
    for _ in range(30):
        stats.observe("/v1/kv/{key}", "GET", 200, 0.001)
    stats.observe("/v1/kv/{key}", "PUT", 412, 0.001)
    stats.observe("/v1/kv/{key}", "PUT", 503, 0.001)
    stats.observe("/v1/txn", "POST", 429, 0.001)
    sample = rates.look(stats.histograms(), 12.0, 1)
    assert (sample["reads"], sample["writes"], sample["transactions"]) == (15.0, 1.0, 0.5)
    assert (sample["refused"], sample["errors"]) == (0.5, 1.0)
    assert rates.look(stats.histograms(), 13.0, 2)["reads"] == 0


def test_what_the_page_itself_asks_is_not_counted() -> None:
    stats, rates = RequestStats(), Rates()
    rates.begin(stats.histograms(), 0.0)
    for route in ("/v1/events", "/v1/cluster", "/page/{file}", "/", "/metrics", "unknown"):
        stats.observe(route, "GET", 200, 1.0)
    sample = rates.look(stats.histograms(), 1.0, 1)
    assert all(not number for name, number in sample.items() if name != "at_ms")


def test_a_percentile_lies_in_the_bucket_of_its_request() -> None:
    stats, rates = RequestStats(), Rates()
    rates.begin(stats.histograms(), 0.0)
    for number in range(100):
        stats.observe("/v1/kv/{key}", "GET", 200, 0.0004 if number < 98 else 0.15)
    sample = rates.look(stats.histograms(), 1.0, 1)
    assert 0 < sample["read_p50_ms"] <= 0.5
    assert 100 <= sample["read_p99_ms"] <= 200
    assert sample["write_p50_ms"] is None


@pytest.mark.parametrize("percent", [1, 50, 99, 100])
def test_beyond_the_last_bound_a_percentile_is_that_bound(percent: int) -> None:
    counts = [0] * len(LATENCY_BOUNDS_S) + [3]
    assert percentile_ms(counts, LATENCY_BOUNDS_S, percent) == 10_000


def test_the_history_is_bounded() -> None:
    rates = Rates()
    for second in range(HISTORY_MAX + 50):
        rates.look({}, float(second), second)
    assert len(rates.history) == HISTORY_MAX
    assert rates.history[-1]["at_ms"] == HISTORY_MAX + 49
