"""loadtest.reshard: figures from runs, and the pace of the foreground load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore.placement.cluster_map import ClusterMap, at_home, map_of
from loadtest.bench.reshard.figures import (
    Growth,
    Latency,
    Run,
    Sample,
    aims,
    latency,
    least_to_move,
    moved,
    peak_to_mean,
    percentile,
    render,
    summarize,
)
from loadtest.bench.reshard.foreground import Foreground
from loadtest.reshard import LOADS


def growth(keys_per_s: float, **more: Any) -> Growth:
    fields: dict[str, Any] = {"partitions_moved": 1024, "partitions_minimum": 1024, "peak_to_mean": 1.01} | more
    return Growth(began_s=10.0, ended_s=12.0, keys_moved=round(2 * keys_per_s), **fields)


def stretch(p99_ms: float, failed: int = 0) -> Latency:
    return Latency(calls=100, failed=failed, per_s=50.0, p50_ms=p99_ms / 10, p99_ms=p99_ms, max_ms=p99_ms)


def run(system: str, keys_per_s: float, *, number: int = 1, load: str = "none", **more: Any) -> Run:
    parts = {name: more.pop(name) for name in ("before", "during") if name in more}
    return Run(round=number, system=system, load=load, growth=growth(keys_per_s, **more), **parts)


def figure_of(runs: list[Run], text: str) -> tuple[float | None, bool | None]:
    (aim,) = (aim for aim in aims(summarize(runs)) if aim.text.startswith(text))
    return aim.figure, aim.reached


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_percentile_is_the_smallest_figure_that_so_many_do_not_exceed() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7.0], 0.99) == percentile([7.0], 0.5) == 7.0
    assert percentile([1.0, 2.0], 0.5) == 1.0


def test_a_latency_is_of_the_calls_that_were_due_in_that_time() -> None:
    samples = [Sample(due_s, 0.001 * due_s, ok=due_s != 12) for due_s in range(20)]
    found = latency(samples, 10, 15)
    assert found == Latency(calls=5, failed=1, per_s=1.0, p50_ms=12.0, p99_ms=14.0, max_ms=14.0)
    assert latency(samples, 100, 200) is None


def cluster_map(owners: list[int], *weights: int) -> ClusterMap:
    members = [at_home(f"s{n}", "", "", weight=weight) for n, weight in enumerate(weights)]
    return map_of(members, cluster_id="c", epoch=1, partitions=len(owners), owners=owners)


def test_what_moved_and_what_had_to() -> None:
    before = cluster_map([0] * 32 + [1] * 32, 1, 1)
    best = cluster_map([0] * 22 + [2] * 20 + [1] * 22, 1, 1, 1)
    worse = cluster_map([1] * 5 + [0] * 22 + [2] * 20 + [1] * 17, 1, 1, 1)
    assert (moved(before, best), least_to_move(before, best)) == (20, 21)
    assert moved(before, worse) == 25
    assert least_to_move(before, before) == 0
    assert least_to_move(before, cluster_map([0] * 64, 1, 1, 2)) == 32


def test_a_member_that_came_in_front_of_others_does_not_make_all_partitions_seem_moved() -> None:
    before = cluster_map([0] * 64, 1)
    after = map_of(
        [at_home("new", "", ""), at_home("s0", "", "", weight=1)],
        cluster_id="c",
        epoch=2,
        partitions=64,
        owners=[1] * 60 + [0] * 4,
    )
    assert moved(before, after) == 4


def test_the_fullest_shard_is_measured_by_the_mean() -> None:
    assert peak_to_mean([100, 100]) == 1.0
    assert peak_to_mean([150, 100, 50]) == 1.5
    assert peak_to_mean([0, 0]) == 0.0


# --- many runs --------------------------------------------------------------------------------------------------------


def test_each_figure_is_the_median_over_the_rounds_but_the_pause_the_worst() -> None:
    runs = [
        run("kvstore", per_s, number=number, write_pause_ms_p99=per_s / 10, write_pause_ms_max=per_s / 5)
        for number, per_s in enumerate([100, 900, 200], start=1)
    ]
    (cell,) = summarize(runs)
    assert (cell.rounds, cell.keys_per_s, cell.keys_moved, cell.seconds) == (3, 200, 400, 2.0)
    assert (cell.write_pause_ms_p99, cell.write_pause_ms_max) == (90, 180)


def test_a_ratio_compares_runs_of_the_same_round_and_load_only() -> None:
    runs = [
        *(run("kvstore", per_s, number=number) for number, per_s in enumerate([300, 30, 200], start=1)),
        *(run("redis", per_s, number=number) for number, per_s in enumerate([100, 10, 100], start=1)),
        run("redis", 1, load="mixed"),
    ]
    cells = summarize(runs)
    assert cells[0].to_redis is not None
    assert (cells[0].to_redis.median, cells[0].to_redis.low, cells[0].to_redis.high) == (3.0, 2.0, 3.0)
    assert cells[1].to_redis is None
    assert figure_of(runs, "keys/s") == (3.0, True)


def test_what_is_not_measured_is_neither_reached_nor_missed() -> None:
    runs = [run("kvstore", 100)]
    for text in ("keys/s", "p99", "write pause", "failed"):
        assert figure_of(runs, text) == (None, None)
    assert figure_of(runs, "partitions moved") == (1.0, True)


@pytest.mark.parametrize(
    ("text", "more", "figure"),
    [
        ("partitions moved", {"partitions_moved": 1100}, 1100 / 1024),
        ("keys of the fullest", {"peak_to_mean": 1.03}, 1.03),
        ("write pause", {"write_pause_ms_p99": 201.0, "write_pause_ms_max": 300.0}, 201.0),
    ],
)
def test_what_is_beyond_its_bound_is_missed(text: str, more: dict[str, Any], figure: float) -> None:
    assert figure_of([run("kvstore", 100, **more)], text) == (pytest.approx(figure), False)


def test_the_load_during_the_growth_is_measured_by_the_load_before_and_every_failed_call_is_told() -> None:
    runs = [
        run("kvstore", 100, number=number, load="mixed", before=stretch(10), during=stretch(p99_ms, failed=failed))
        for number, (p99_ms, failed) in enumerate([(15, 0), (18, 1), (90, 2)], start=1)
    ]
    assert figure_of(runs, "p99") == (1.8, True)
    assert figure_of(runs, "failed") == (3.0, False)


def test_the_report_names_every_system_and_load_and_says_what_was_reached() -> None:
    runs = [run("kvstore", 5000), run("redis", 1000), run("kvstore", 100, load="mixed", before=stretch(3))]
    text = render(summarize(runs), ["when and where"])
    assert text.startswith("when and where\n")
    assert "| none  | kvstore |" in text
    assert "5.00 (5.00–5.00)" in text
    assert "- keys/s when idle, × Redis Cluster ≥ 2: reached (5.00)" in text
    assert "- p99 under load during the move, × before ≤ 2: not measured" in text


# --- the foreground load ----------------------------------------------------------------------------------------------


class SlowOnce:
    """Answers at once, but for one pause."""

    def __init__(self, pause_s: float) -> None:
        self.calls = 0
        self.closed = False
        self._pause_s = pause_s

    async def get(self, key: str) -> bool:
        self.calls += 1
        if self.calls == 10:
            await asyncio.sleep(self._pause_s)
        return True

    async def put(self, key: str, value: bytes) -> bool:
        raise OSError("gone")

    async def close(self) -> None:
        self.closed = True


async def test_what_a_pause_holds_back_is_in_the_figures() -> None:
    caller = SlowOnce(0.3)
    load = Foreground([caller], ["a", "b"], 200.0, LOADS["get"], seed=1)
    load.start()
    async with asyncio.timeout(60):
        while len(load.samples) < 80:
            await asyncio.sleep(0.01)
    await load.stop()
    assert caller.closed
    late = [sample for sample in load.samples if sample.latency_s > 0.1]
    assert len(late) > 20, "not only the call that was slow, but all that were due during it"
    assert load.errors == []


async def test_a_call_that_fails_is_counted_and_the_next_one_is_made() -> None:
    load = Foreground([SlowOnce(0)], ["a"], 1000.0, LOADS["put"], seed=1)
    load.start()
    async with asyncio.timeout(60):
        while len(load.samples) < 5:
            await asyncio.sleep(0.01)
    await load.stop()
    assert not any(sample.ok for sample in load.samples)
    assert len(load.errors) == len(load.samples)
