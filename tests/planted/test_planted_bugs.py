"""Each bug that can be planted is found by a chaos run of two minutes and by simulation; each named point is met.

These take twenty minutes, so they are run by themselves: `pytest -n 0 tests/planted`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.failpoints import BUGS, OF_COPIES, POINTS
from loadtest.chaos.summary import RunSummary, decode
from loadtest.simulate.cluster_faults import USUAL
from loadtest.simulate.plan import Plan

pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).resolve().parents[2]
NEMESES = {
    "early-answer": "kill",
    "applied-before-durable": "disk",
    "late-cache-fill": "disk",
    "ignore-token": "kill",
    "ignore-intent": "kill",
    "freeze-stops-only-writes": "maps",
    "late-prepare-applied": "kill",
    "decision-dropped-early": "kill",
    "move-without-last-pull": "reshard",
}
ALONE = {"told-not-compared": ["all-older"], "go-on-behind": ["old-record"]}  # simulated


def run(out: Path, *options: str) -> tuple[int, str, RunSummary]:
    """Exit code, output and summary of a chaos run."""
    command = [sys.executable, "-m", "loadtest.chaos", "--out", str(out), "--seed", "1", *options]
    environment = {**os.environ, "KVSTORE_PLANT_BUGS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr, decode((out / "summary.json").read_bytes())


@pytest.mark.parametrize("bug", NEMESES)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path) -> None:
    code, output, summary = run(tmp_path / "out", "--minutes", "2", "--nemesis", NEMESES[bug], "--bug", bug)
    assert code == 1, output
    assert any(phase.violations or phase.complaints or phase.unfinished for phase in summary.phases)


@pytest.mark.parametrize("bug", BUGS)
def test_simulated_clusters_under_all_nemeses_or_its_own_find_each_planted_bug_within_60_seeds(bug: str) -> None:
    plan = Plan("cluster", 20.0, ALONE.get(bug, USUAL), bug=bug, replicas=2 if bug in OF_COPIES else 1)
    assert any(not plan.run(seed).ok for seed in range(60))


def test_only_the_bug_that_shows_for_milliseconds_is_left_to_simulation() -> None:
    assert set(BUGS) - set(NEMESES) - set(OF_COPIES) == {"expiry-by-reader"}


def test_every_named_point_of_the_code_is_met_and_every_promise_holds(tmp_path: Path) -> None:
    code, output, summary = run(tmp_path / "out", "--minutes", "3", "--nemesis", "sweep")
    assert code == 0, output
    assert summary.unmet == []
    assert set(summary.met) == {point for points in POINTS.values() for point in points}
