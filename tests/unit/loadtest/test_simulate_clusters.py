"""Clusters under simulated faults: they hold, the same seed gives the same run, planted bugs are found."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvstore.router.routing_table import RoutingTable
from kvstore.store.pipeline import Pipeline
from loadtest.simulate.__main__ import main
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.cluster_faults import NEMESES, USUAL
from loadtest.simulate.cluster_run import Cut, scheduled, simulate_cluster
from loadtest.simulate.plan import Plan
from loadtest.simulate.shrink import shrink

SECONDS = 8


def run_command(hash_seed: str, *args: str) -> dict[str, Any]:
    """The last line of the command, run with that seed of Python's hashes."""
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "loadtest.simulate", "--json", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("replicas", "seeds"), [(1, 2), (2, 2), (3, 1)])
def test_clusters_hold_under_faults_and_the_same_seeds_give_the_same_events_in_processes_with_other_hashes(
    replicas: int, seeds: int
) -> None:
    args = "--seeds", str(seeds), "--seconds", str(SECONDS), "--replicas", str(replicas)
    first, second = (run_command(hash_seed, *args) for hash_seed in ("1", "2"))
    assert first["digest"] == second["digest"]
    assert (first["seeds"], first["failed"]) == (seeds, [])
    assert first["total"]["calls"] > 500
    assert len(first["total"]["faults"]) > 2 * seeds + 2


@pytest.mark.parametrize("nemesis", NEMESES)
def test_a_cluster_holds_under_each_kind_of_fault_alone(nemesis: str) -> None:
    result = simulate_cluster(3, 6.0, nemeses=[nemesis], replicas=2)
    assert result.ok, result.verdict
    assert set(result.faults) <= {*NEMESES[nemesis], "killed at a failpoint"}


def test_what_is_taken_out_leaves_the_other_faults_as_they_were() -> None:
    count = scheduled(5, 8.0, USUAL)
    lines: list[str] = []
    simulate_cluster(5, 8.0, lines.append, cut=Cut(frozenset(range(1, count)), frozenset(range(2, 11))))
    whole: list[str] = []
    simulate_cluster(5, 8.0, whole.append)
    faults = [[line.split(" ", 1)[1] for line in log if " fault: " in line] for log in (lines, whole)]
    assert faults[0] == faults[1][:1]
    assert not any(" c2: " in line for line in lines)


def test_nothing_of_a_run_that_is_over_stays_in_memory() -> None:
    """So that thousands of seeds fit into one process."""

    def held() -> int:
        return sum(isinstance(each, Cluster) for each in gc.get_objects())

    gc.collect()
    before = held()
    for seed in (1, 2, 3):
        assert simulate_cluster(seed, 3.0, replicas=2).ok
    assert held() <= before + 1, "but for the last one, which goes when the next one begins"
    gc.collect()
    assert held() == before


def test_an_exception_in_a_process_is_a_finding_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: RoutingTable, *args: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(RoutingTable, "_take_over", fail)
    result = simulate_cluster(1, 2.0)
    assert result.verdict.startswith("error")
    assert "planted" in result.verdict
    assert "in fail" in result.verdict


def test_a_run_that_waits_for_ever_ends_with_that_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(pipeline: Pipeline, *args: object) -> None:
        """Nothing is written, and nothing answered."""

    monkeypatch.setattr(Pipeline, "write", swallow)
    result = simulate_cluster(1, 2.0)
    assert result.verdict.startswith("hang: the cluster was not formed, or its bank not opened")


def test_shrinking_keeps_only_what_the_failure_needs() -> None:
    tried: list[Cut] = []

    def fails(cut: Cut) -> bool:
        tried.append(cut)
        return not cut.faults & {3, 11} and 2 not in cut.clients

    cut = shrink(fails, faults=16, clients=4, runs_max=100)
    assert set(range(16)) - cut.faults == {3, 11}
    assert set(range(1, 5)) - cut.clients == {2}
    assert len(tried) < 60
    assert shrink(fails, faults=16, clients=4, runs_max=0) == Cut()


def test_a_planted_bug_is_found_and_shown_with_its_replay_and_a_smaller_one_that_fails_too(tmp_path: Path) -> None:
    args = ["--seeds", "4", "--seconds", "6", "--bug", "ignore-token"]
    ran = CliRunner().invoke(main, [*args, "--json", "--result", str(tmp_path / "result.json")])
    document = json.loads(ran.stdout.splitlines()[-1])
    assert ran.exit_code == 1
    assert json.loads((tmp_path / "result.json").read_text())["seeds"] == 4
    command = f"python -m loadtest.simulate --seeds 1 --seed {document['failed'][0]} --seconds 6"
    assert f"{command} --bug ignore-token --log" in ran.stderr
    _, _, told = ran.stderr.partition("it fails also like this:\n  python -m loadtest.simulate ")
    smaller = told.splitlines()[0].split()
    assert "--without-clients" in smaller
    again = CliRunner().invoke(main, [*smaller[:-1], "--json"])
    assert again.exit_code == 1
    assert json.loads(again.stdout.splitlines()[-1])["total"]["calls"] < document["total"]["calls"] / 4


def test_a_primary_returns_while_its_copy_writes_the_promise_of_a_higher_term() -> None:
    """Seen by what the copy grants it then, where it may."""
    ran = Plan("cluster", 6.0, ["early"], bug="grant-while-promising", replicas=2).run(0)
    assert "and what it has granted lasts" in ran.verdict


def test_copies_fall_out_of_a_shard_to_which_partitions_come() -> None:
    """Seen by the commit of such a move, where it does not wait for them."""
    ran = Plan("cluster", 6.0, ["thin"], bug="commit-without-copies", replicas=2).run(5)
    assert "has 0 copies in sync, and" in ran.verdict


def test_a_destination_of_a_move_that_does_not_write_down_that_all_has_come_is_found() -> None:
    ran = Plan("cluster", 6.0, bug="done-not-kept", replicas=2).run(0)
    assert "has not written down that all has come" in ran.verdict


def test_more_nodes_die_at_once_than_may_be_silent_while_one_is_given_up() -> None:
    ran = Plan("cluster", 10.0, ["many"], bug="give-up-too-many", replicas=2).run(3)
    assert "is given up, and 2 of 4 nodes are away" in ran.verdict


def test_partitions_are_to_move_while_more_nodes_are_dead_than_may_be_silent() -> None:
    ran = Plan("cluster", 10.0, ["many"], bug="move-too-many", replicas=2).run(0)
    assert "is committed, and 2 of 4 nodes are away" in ran.verdict


def test_what_a_controller_with_an_old_copy_of_its_record_does_is_seen() -> None:
    ran = Plan("cluster", 10.0, ["old-record"], bug="go-on-behind", replicas=2).run(0)
    assert "of which there is another one" in ran.verdict


def test_old_files_of_a_primary_and_all_its_copies_are_seen_to_be_served() -> None:
    ran = Plan("cluster", 10.0, ["all-older"], bug="told-not-compared", replicas=2).run(0)
    assert "and the controller was told of" in ran.verdict


def test_a_primary_asks_to_take_a_copy_out_and_dies_before_the_controller_can_do_that() -> None:
    ran = Plan("cluster", 12.0, ["ask"], bug="request-of-silent", replicas=2).run(1)
    assert "and its primary is away for" in ran.verdict


@pytest.mark.parametrize(
    "bug", ["acknowledge-before-sync", "answer-before-copies", "old-term-taken", "promise-not-durable"]
)
def test_a_rule_of_copies_that_is_taken_out_is_found_and_made_smaller_with_its_copies(bug: str) -> None:
    plan = Plan("cluster", 6.0, bug=bug, replicas=2)
    failed = next((ran for ran in map(plan.run, range(6)) if not ran.ok), None)
    assert failed is not None
    assert failed.verdict.startswith("violation")
    assert f"--replicas 2 --bug {bug} --log" in plan.command(failed.seed)
    if bug == "answer-before-copies":
        smaller = plan.smaller(failed)
        assert smaller.replicas == 2
        assert len(smaller.cut.clients) == 9
        assert not smaller.run(failed.seed).ok


@pytest.mark.parametrize(
    "args", [["--nemesis", "rain"], ["--without-faults", "a"], ["--bug", "unknown"], ["--of", "dust"]]
)
def test_options_of_a_cluster_that_make_no_sense_are_refused(args: list[str]) -> None:
    assert CliRunner().invoke(main, args).exit_code == 2
