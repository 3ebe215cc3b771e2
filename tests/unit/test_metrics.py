"""Metrics: counted right, and read by a Prometheus parser as what they are."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kvstore.metrics import (
    LATENCY_BOUNDS_S,
    SIZE_BOUNDS,
    Histogram,
    RequestStats,
    ShardStats,
    StoreLabels,
    exposition,
    gauge_family,
    shard_families,
)

S1 = StoreLabels("s1", "s1", "primary")
S2 = StoreLabels("s7", "s2", "copy")


def parse(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@given(st.lists(st.floats(0, 20), max_size=30))
def test_a_histogram_counts_each_value_once_in_the_bucket_that_holds_it(values: list[float]) -> None:
    histogram = Histogram.of(LATENCY_BOUNDS_S)
    for value in values:
        histogram.observe(value)
    for bound, count in histogram.buckets():
        assert count == sum(value <= float(bound) for value in values)
    assert histogram.buckets()[-1] == ("+Inf", len(values))
    assert histogram.total == pytest.approx(sum(values))


def test_a_value_on_a_bound_belongs_to_it() -> None:
    histogram = Histogram.of(SIZE_BOUNDS)
    for value in (1, 2, 3, 1024, 1025):
        histogram.observe(value)
    buckets = dict(histogram.buckets())
    assert [buckets[bound] for bound in ("1.0", "2.0", "4.0", "1024.0", "+Inf")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bounds", [LATENCY_BOUNDS_S, SIZE_BOUNDS])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_what_a_shard_counts_survives_the_channel() -> None:
    stats = ShardStats(keys=5, bytes=7, disk_full=True)
    stats.batch_ops.observe(3)
    stats.commit_s.observe(0.004)
    travelled = msgspec.convert(msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.to_builtins(stats))), ShardStats)
    assert travelled == stats


def test_stats_of_two_shards_do_not_share_their_histograms() -> None:
    one, other = ShardStats(), ShardStats()
    one.commit_s.observe(1)
    assert sum(other.commit_s.counts) == 0


def test_the_metrics_of_shards_can_be_read_by_prometheus() -> None:
    one, other = ShardStats(keys=3, cache_hits=9, wal_bytes=4096), ShardStats(keys=4)
    one.batch_ops.observe(5)
    one.commit_s.observe(0.002)
    samples = parse(exposition(shard_families({S1: one, S2: other})))
    s1 = (("node", "s1"), ("role", "primary"), ("shard", "s1"))
    assert samples["kvstore_shard_keys", s1] == 3
    assert samples["kvstore_shard_keys", (("node", "s7"), ("role", "copy"), ("shard", "s2"))] == 4
    assert samples["kvstore_shard_cache_hits_total", s1] == 9
    assert samples["kvstore_shard_wal_bytes", s1] == 4096
    assert samples["kvstore_shard_batch_ops_count", s1] == 1
    assert samples["kvstore_shard_batch_ops_sum", s1] == 5
    assert samples["kvstore_shard_batch_ops_bucket", (("le", "8.0"), *s1)] == 1
    assert samples["kvstore_shard_batch_ops_bucket", (("le", "4.0"), *s1)] == 0


def test_every_number_of_a_shard_that_is_a_number_is_exposed() -> None:
    text = exposition(shard_families({S1: ShardStats()})).decode()
    hidden = {name for name in ShardStats.__struct_fields__ if f"kvstore_shard_{name.removesuffix('_s')}" not in text}
    assert hidden <= {"disk_full"}


def test_requests_are_counted_by_route_method_and_status() -> None:
    stats = RequestStats()
    for status, elapsed_s in ((200, 0.001), (200, 0.3), (404, 0.001)):
        stats.observe("/v1/kv/{key}", "GET", status, elapsed_s)
    samples = parse(exposition(stats.families()))
    ok = (("method", "GET"), ("route", "/v1/kv/{key}"), ("status", "200"))
    assert samples["kvstore_request_seconds_count", ok] == 2
    assert samples["kvstore_request_seconds_sum", ok] == pytest.approx(0.301)
    assert samples["kvstore_request_seconds_bucket", (("le", "0.001"), *ok)] == 1


def test_labels_with_quotes_and_line_ends_do_not_break_the_exposition() -> None:
    samples = parse(exposition([gauge_family("kvstore_up", "1 while up", {'s"1\n\\': 1.0}, "shard")]))
    assert samples == {("kvstore_up", (("shard", 's"1\n\\'),)): 1.0}


def test_groups_of_families_are_exposed_together_and_each_name_once() -> None:
    text = exposition(RequestStats().families(), shard_families({}), [gauge_family("kvstore_x", "x", {}, "y")]).decode()
    helps = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) == len(set(helps)) > 10
