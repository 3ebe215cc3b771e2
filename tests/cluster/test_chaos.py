"""`python -m loadtest.chaos`: all nemeses are survived, a planted bug is found, and Ctrl-C leaves nothing behind.

The long version of the first two tests is the command itself, with more minutes; all bugs are planted in tests/planted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvstore.failpoints import POINTS
from loadtest.chaos.schedule import OF_COPIES, OF_ONE
from loadtest.chaos.summary import Fault, RunSummary, decode
from loadtest.cluster import processes
from loadtest.histories import history, verdict

pytestmark = pytest.mark.timeout(200)

REPOSITORY = Path(__file__).resolve().parents[2]


def start(out: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loadtest.chaos", "--out", str(out), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )


def summary_of(out: Path) -> RunSummary:
    return decode((out / "summary.json").read_bytes())


def test_every_promise_holds_in_a_short_chaos_of_all_nemeses(tmp_path: Path) -> None:
    with start(tmp_path / "out", "--minutes", "0.45", "--seed", "20", "--keep") as chaos:
        output, _ = chaos.communicate()
    assert chaos.returncode == 0, output
    assert " left, phase 1 of 1, " in output
    summary = summary_of(tmp_path / "out")
    assert summary.ok
    assert {fault.nemesis for fault in summary.faults} == set(OF_ONE)
    assert summary.totals.done > 1000
    checks = {check.name: check for phase in summary.phases for check in phase.checks}
    assert set(checks) == {"registers", "lists", "bank", "sets", "locks", "counters"}
    operations = history.read(tmp_path / "out" / "phase-1.ndjson")
    assert sum(check.operations for check in checks.values()) == len(operations)
    assert verdict.judge(operations).ok
    page = (tmp_path / "out" / "verdict.html").read_text(encoding="utf-8")
    assert "Passed" in page
    assert "--seed 20" in page


def was_done(fault: Fault) -> bool:
    """Whether anything came of it: the last good copy is left alone."""
    if fault.nemesis in (said := {"lose-disk": "files deleted", "rot": ", byte ", "promote": ": 202"}):
        return said[fault.nemesis] in fault.note
    return bool(fault.targets)


@pytest.mark.timeout(900)
def test_every_promise_holds_in_a_short_chaos_of_what_only_copies_survive(tmp_path: Path) -> None:
    """With this seed a copy rots and a disk is lost before all else. A busy machine gets more time for it."""
    done: set[str] = set()
    for minutes in ("0.5", "2.5"):
        options = ["--minutes", minutes, "--seed", "6217", "--replicas", "2", "--nemesis", ",".join(OF_COPIES)]
        with start(tmp_path / minutes, *options) as chaos:
            output, _ = chaos.communicate()
        assert chaos.returncode == 0, output
        summary = summary_of(tmp_path / minutes)
        assert summary.ok
        assert summary.replicas == 2
        assert summary.totals.done > 500
        assert {fault.nemesis for fault in summary.faults} == set(OF_COPIES)
        done |= {fault.nemesis for fault in summary.faults if was_done(fault)}
        if done == set(OF_COPIES):
            break
    assert done == set(OF_COPIES), summary.faults


@pytest.mark.timeout(400)
def test_a_sweep_lets_processes_die_at_many_points_of_a_commit_and_of_a_move(tmp_path: Path) -> None:
    """A busy machine gets more time for it."""
    for minutes in ("0.6", "2.5"):
        with start(tmp_path / minutes, "--minutes", minutes, "--seed", "4", "--nemesis", "sweep") as chaos:
            output, _ = chaos.communicate()
        assert chaos.returncode == 0, output
        summary = summary_of(tmp_path / minutes)
        assert sorted([*summary.met, *summary.unmet]) == sorted(point for points in POINTS.values() for point in points)
        if met_enough := len(summary.met) > 10 and all(set(points) & set(summary.met) for points in POINTS.values()):
            break
    assert met_enough, summary.met
    assert f"{len(summary.met)} of {len(summary.met) + len(summary.unmet)} points of the code were met" in output


def test_a_planted_bug_is_found_and_told_with_the_command_that_finds_it_again(tmp_path: Path) -> None:
    options = ["--minutes", "1", "--seed", "1", "--nemesis", "kill", "--bug", "ignore-token"]
    with start(tmp_path / "out", *options, environment={"KVSTORE_PLANT_BUGS": "1"}) as chaos:
        output, _ = chaos.communicate()
    assert chaos.returncode == 1, output
    summary = summary_of(tmp_path / "out")
    assert not summary.ok
    assert "locks" in {check.name for each in summary.phases for check in each.checks if check.violations}
    assert (tmp_path / "out" / f"phase-{summary.phases[-1].number}.ndjson").exists()
    assert "--seed 1 --nemesis kill --routers 2 --shards 4 --bug ignore-token" in output


def test_a_bug_is_planted_for_tests_only(tmp_path: Path) -> None:
    with start(tmp_path / "out", "--bug", "early-answer") as chaos:
        output, _ = chaos.communicate()
    assert chaos.returncode == 2
    assert "KVSTORE_PLANT_BUGS=1" in output
    assert not (tmp_path / "out").exists()


def test_ctrl_c_heals_and_stops_everything_and_judges_what_was_done_until_then(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(out, "--minutes", "2", "--seed", "3") as chaos:
        assert chaos.stdout is not None
        for line in chaos.stdout:
            if "load and faults" in line:
                break
        family = processes.tree(chaos.pid)
        assert len(family) >= 8  # the run itself, two routers, four shards, the controller
        time.sleep(4)  # in the middle of some fault
        family += processes.tree(chaos.pid)
        chaos.send_signal(signal.SIGINT)
        output = chaos.stdout.read()
    assert chaos.returncode == 130, output
    assert "interrupted" in output
    assert [process for process in set(family) if processes.is_running(process)] == []
    (phase,) = summary_of(out).phases
    assert {check.name for check in phase.checks} >= {"registers", "lists", "bank"}
    assert sum(phase.operations.values()) > 0
    assert phase.seconds < 60
    assert "Passed: " in output
    assert "--seed 3" in (out / "verdict.html").read_text(encoding="utf-8")
