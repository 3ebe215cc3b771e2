"""loadtest.compare with processes: a cluster of two routers is asked through both, and tells of its batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loadtest.bench.data import make_data
from loadtest.bench.drive import Plan, Run
from loadtest.bench.http1 import Request, ask
from loadtest.bench.systems import KvstoreSystem, Shape
from loadtest.bench.workloads import WORKLOADS


async def puts_and_batches(url: str) -> tuple[int, int]:
    """How many of each that router has answered."""
    metrics = (await ask(url, Request("GET", "/metrics"))).body.decode().splitlines()
    counts = {"PUT": 0, "POST": 0}
    for line in metrics:
        for method in counts:
            if line.startswith("kvstore_request_seconds_count{") and f'method="{method}"' in line:
                counts[method] += int(float(line.rpartition(" ")[2]))
    return counts["PUT"], counts["POST"]


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
async def test_a_cluster_of_two_routers_is_asked_through_both_and_its_batches_are_counted(tmp_path: Path) -> None:
    system = KvstoreSystem(Shape(2, 2), "kvstore-2s-2r")
    plan = Plan([system], [WORKLOADS[name] for name in ("put", "batch100", "txn1")], make_data(300, 1, 1), tmp_path)
    try:
        await system.start(tmp_path / "cluster")
        await plan.prepare(system)  # checks that keys lie where they are reckoned to, in two shards
        before = [await puts_and_batches(url) for url in system.urls]
        runs: dict[str, Run] = {run.work: run async for run in plan.run(plan.steps(1, [4]), 1)}
        after = [await puts_and_batches(url) for url in system.urls]
    finally:
        await system.stop()
    assert len(system.urls) == 2
    assert set(runs) == {"put", "batch100", "txn1"}
    assert not any(run.errors for run in runs.values())
    for then, now in zip(before, after, strict=True):
        assert all(later > earlier for earlier, later in zip(then, now, strict=True))
    assert (runs["put"].batch_operations or 0) >= 1
    assert (runs["batch100"].batch_operations or 0) > 4
    assert runs["batch100"].operations == 100 * runs["batch100"].requests
