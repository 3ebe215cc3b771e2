"""loadtest.compare: what more shards bring and cost."""

from __future__ import annotations

import pytest

from loadtest.bench import report
from loadtest.bench.drive import Run, mean_size
from loadtest.bench.report import SystemFacts, summarize
from loadtest.bench.scaling import growths, rows, sections, targets
from loadtest.bench.systems import Batches, read_batches


def facts(*shapes: tuple[int, int]) -> list[SystemFacts]:
    clusters = [fact(f"kvstore-{shards}s-{routers}r", shards, routers) for shards, routers in shapes]
    return [*clusters, fact("etcd")]


def fact(name: str, shards: int = 0, routers: int = 0) -> SystemFacts:
    return SystemFacts(system=name, version="1", shards=shards, routers=routers, ready_s=1.0, idle_pss_mb=9.0)


def run(
    system: str,
    per_s: float,
    cpu_us: float,
    *,
    number: int = 1,
    work: str = "put",
    connections: int = 32,
    parts: dict[str, float] | None = None,
    batch: float | None = None,
) -> Run:
    return Run(
        round=number,
        work=work,
        connections=connections,
        system=system,
        seconds=1.0,
        operations=int(per_s),
        requests=int(per_s),
        per_s=per_s,
        p50_ms=1.0,
        p99_ms=2.0,
        max_ms=3.0,
        errors={},
        cpu_us_per_op=cpu_us,
        cpu_us_per_op_by_process=parts or {},
        wrk_cpu_us_per_op=1.0,
        batch_operations=batch,
    )


RUNS = [
    run("kvstore-1s-1r", 1000, 300, parts={"router": 200.0, "shard": 100.0}, batch=20.0),
    run("kvstore-8s-1r", 800, 480, parts={"router": 210.0, "shard": 270.0}, batch=2.5),
    run("etcd", 900, 350),
]


# --- which is compared with which ------------------------------------------------------------------------------------


def test_the_fewest_shards_of_as_many_routers_are_the_measure() -> None:
    names = {(shards, routers): f"kvstore-{shards}s-{routers}r" for shards in (2, 4) for routers in (1, 2)}
    runs = [run(name, 100 * shards, 50 * shards * routers) for (shards, routers), name in names.items()]
    found = growths(runs, facts((4, 1), (2, 1), (4, 2), (2, 2)))
    assert [(each.routers, each.base_shards, each.shards) for each in found] == [
        (1, 2, 2), (1, 2, 4), (2, 2, 2), (2, 2, 4)
    ]  # fmt: skip
    assert [(each.per_s.median, each.cpu.median) for each in found] == [(1, 1), (2, 2), (1, 1), (2, 2)]


def test_one_number_of_shards_is_no_growth() -> None:
    for shapes in (((4, 1),), ((4, 1), (4, 2))):
        runs = [run(f"kvstore-{shards}s-{routers}r", 100, 100) for shards, routers in shapes]
        assert growths(runs, facts(*shapes)) == []
    assert sections([]) == targets([]) == []


def test_ratios_are_those_of_the_same_round() -> None:
    # the machine was slow in round 2 for both: the ratio of the medians would say 1.0, and no round ever did
    runs = [
        *(run("kvstore-1s-1r", per_s, 100, number=number) for number, per_s in enumerate([300, 30, 200], start=1)),
        *(run("kvstore-8s-1r", per_s, 150, number=number) for number, per_s in enumerate([600, 60, 200], start=1)),
    ]
    grown = growths(runs, facts((1, 1), (8, 1)))[1]
    assert (grown.per_s.median, grown.per_s.low, grown.per_s.high) == (2.0, 1.0, 2.0)
    assert grown.cpu.median == 1.5


def test_the_workloads_keep_their_order_and_what_was_not_run_is_left_out() -> None:
    runs = [run(f"kvstore-{shards}s-1r", 100, 100, work=work) for work in ("put", "get") for shards in (1, 2)]
    found = growths([*runs, run("kvstore-1s-1r", 100, 100, work="list")], facts((1, 1), (2, 1)))
    assert [(each.work, each.shards) for each in found] == [("put", 1), ("put", 2), ("get", 1), ("get", 2)]


# --- the aim ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpu_us", "reached"), [(150.0, True), (151.0, False)])
def test_the_aim_is_for_the_worst_of_8_shards_beside_1(cpu_us: float, reached: bool) -> None:
    runs = [
        run(f"kvstore-{shards}s-1r", 100, used_us, connections=connections)
        for connections, most_us in ((32, cpu_us), (128, 120.0))
        for shards, used_us in ((1, 100.0), (4, 900.0), (8, most_us))
    ]
    (target,) = targets(growths(runs, facts((1, 1), (4, 1), (8, 1))))
    assert target == ("PUT: CPU per operation at 8 shards ≤ 1.5 × that at 1", cpu_us / 100, reached)


def test_other_numbers_of_shards_do_not_tell() -> None:
    runs = [run(f"kvstore-{shards}s-1r", 100, 100) for shards in (2, 8)]
    (target,) = targets(growths(runs, facts((2, 1), (8, 1))))
    assert (target.figure, target.reached) == (None, None)


# --- what the report says --------------------------------------------------------------------------------------------


def test_what_does_not_write_has_no_batches_to_tell_of() -> None:
    runs = [run(f"kvstore-{shards}s-1r", 100, 100, work="get") for shards in (1, 8)]
    found = growths(runs, facts((1, 1), (8, 1)))
    assert [row[-1] for row in rows(found).rows] == ["–", "–"]


def test_the_report_has_the_table_and_the_aim_only_if_there_are_several_numbers_of_shards() -> None:
    shown = facts((1, 1), (8, 1))
    found = growths(RUNS, shown)
    text = report.render(summarize(RUNS), shown, [], sections(found), targets(found))
    (line,) = [line for line in text.splitlines() if line.startswith("| put ") and "| 8 |" in " ".join(line.split())]
    told = "| put | 32 | 1 | 8 | 800 | 0.80 (0.80–0.80) | 480 | 1.60 (1.60–1.60) | shard 270, router 210 | 2.5 |"
    assert " ".join(line.split()) == told
    assert "- PUT: CPU per operation at 8 shards ≤ 1.5 × that at 1: MISSED (1.60)" in text
    assert "shards ≤" not in report.render(summarize(RUNS), facts((1, 1)), [])


# --- the size of batches ---------------------------------------------------------------------------------------------


METRICS = """\
# HELP kvstore_shard_batch_ops Operations per batch
# TYPE kvstore_shard_batch_ops histogram
kvstore_shard_batch_ops_bucket{le="1.0",shard="s1"} 2.0
kvstore_shard_batch_ops_bucket{le="+Inf",shard="s1"} 5.0
kvstore_shard_batch_ops_count{shard="s1"} 5.0
kvstore_shard_batch_ops_sum{shard="s1"} 50.0
kvstore_shard_batch_ops_bucket{le="+Inf",shard="s2"} 3.0
kvstore_shard_batch_ops_count{shard="s2"} 3.0
kvstore_shard_batch_ops_sum{shard="s2"} 6.0
"""


def test_batches_of_all_shards_are_added_up() -> None:
    assert read_batches(METRICS) == Batches(committed=8.0, operations=56.0)
    with pytest.raises(RuntimeError, match="do not tell of batches"):
        read_batches("# TYPE other gauge\nother 1.0\n")


def test_the_mean_size_is_that_of_the_batches_between_two_looks() -> None:
    before = Batches(10.0, 100.0)
    assert mean_size(before, Batches(30.0, 150.0)) == 2.5
    assert mean_size(before, before) is None
    assert mean_size(None, None) is None
