"""loadtest.txn_rounds: every point gets its turn, a process is armed once, and the table tells what was found."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtest.armed_cluster import RUN
from loadtest.txn_faults import RANDOM, ROUTER_POINTS, SHARD_POINTS, SLOW, plan, victims
from loadtest.txn_report import Report, Verdict, table_of
from loadtest.txn_rounds import main

MEMBERS = ["controller-0", "router-0", "router-1", "shard-s1", "shard-s2", "shard-s3"]


def test_all_points_have_their_turn_before_any_has_a_second_one() -> None:
    points = {*ROUTER_POINTS, *SHARD_POINTS}
    names = [fault.name for fault in plan("failpoints", 2 * len(points), seed=1)]
    assert set(names[: len(points)]) == set(names[len(points) :]) == points
    mixed = plan("all", 3 * len(points), seed=1)
    assert {fault.name for fault in mixed[::3]} == {fault.point for fault in mixed[2::3]} == points
    assert {fault.name for fault in mixed[1::3]} <= set(RANDOM)
    assert {fault.name for fault in mixed[2::3]} == {fault.name for fault in plan("slow", 20, seed=1)} == set(SLOW)
    assert {fault.name for fault in plan("random", 200, seed=1)} == set(RANDOM)
    assert len(plan("all", 7, seed=1)) == 7


def test_the_seed_alone_decides_on_the_faults() -> None:
    assert plan("all", 50, seed=5) == plan("all", 50, seed=5) != plan("all", 50, seed=6)


def test_who_is_killed_fits_the_name_of_the_fault() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        assert set(victims("kill router", MEMBERS, rng)) <= {"router-0", "router-1"}
        assert len(victims("kill shard", MEMBERS, rng)) == 1
        assert 2 <= len(set(victims("kill several", MEMBERS, rng))) < 5
        assert victims("kill all", MEMBERS, rng) == MEMBERS


def test_a_process_is_started_with_the_file_of_its_failpoints_when_it_may_come_back(tmp_path: Path) -> None:
    armed, held = tmp_path / "shard-s1", tmp_path / "shard-s1.held"
    held.touch()
    command = ["/bin/sh", "-c", RUN, str(armed), "/bin/sh", "-c", 'echo "$KVSTORE_FAILPOINTS $1"', "-", "a b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]}) as started:
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(0.2)
        held.unlink()
        assert started.communicate(timeout=60)[0] == f"@{armed} a b\n"


def report(number: int, fault: str, **members: object) -> Report:
    return Report(number=number, fault=fault, **members)  # type: ignore[arg-type]


def test_the_table_has_a_line_for_each_fault_and_the_verdict_one_for_all() -> None:
    verdict = Verdict(seed=7, routers=2, txn_timeout_s=1.0)
    verdict.rounds = [
        report(1, "kill all", acknowledged=10, in_doubt_s=0.5),
        report(2, "ask-before-commit", acknowledged=3, unknown=2, reached=False),
        report(3, "kill all", acknowledged=5, in_doubt_s=1.25, audits=4, reads=9),
    ]
    lines = table_of(verdict).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["ask-before-commit", "1"], ["kill", "all"]]
    assert lines[2].split()[2:] == ["2", "2", "15", "0", "0", "0", "9", "1.25", "held"]
    assert verdict.ok
    assert "every promise held: 3 rounds" in str(verdict)
    assert "in doubt for at most 1.25 s (2 x txn_timeout_s is 2 s)" in str(verdict)


def test_a_violation_makes_the_verdict_and_so_does_a_load_that_did_nothing() -> None:
    verdict = Verdict(seed=7, routers=1, txn_timeout_s=1.0)
    assert not verdict.ok
    verdict.rounds = [report(1, "kill all", acknowledged=10, violations=["it is gone"])]
    verdict.violations = ["round 1: it is gone"]
    assert not verdict.ok
    assert table_of(verdict).splitlines()[1].endswith("WRONG")
    assert str(verdict).startswith("1 VIOLATIONS")


@pytest.mark.parametrize("name", ["decide", "kill", "prepare-after-commits"])
def test_a_fault_that_does_not_exist_is_refused(name: str) -> None:
    result = CliRunner().invoke(main, ["--fault", name])
    assert result.exit_code == 2
    assert f"there is no fault {name}" in result.output
