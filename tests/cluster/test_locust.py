"""Locust as its users start it: the mix and every workload against a cluster of real processes, and the verdict.

Each run is a process of its own: importing locust replaces the sockets of the process that does so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loadtest.histories.history import AnyOperation, read
from loadtest.histories.verdict import judge
from tests.cluster.clusters import REPOSITORY, Cluster, running, write_config

YCSB = ["YcsbA", "YcsbB", "YcsbC", "YcsbD", "YcsbE", "YcsbF"]
JUDGED = {
    "Bank": "bank",
    "Counter": "counters",
    "CriticalSection": "locks",
    "Register": "registers",
    "Append": "lists",
    "Set": "sets",
    "Expiry": "registers",
}
AT_ONCE = 4


class Ended(NamedTuple):
    """A run of Locust: exit code, what it printed, what its report draws, where its files are."""

    code: int
    output: str
    report: dict[str, Any]
    folder: Path

    @property
    def names(self) -> set[str]:
        """What was counted."""
        return {entry["name"] for entry in self.report["requests_statistics"]} - {"Aggregated"}

    @property
    def failures(self) -> set[str]:
        return {entry["error"] for entry in self.report["failures_statistics"]}

    @property
    def history(self) -> list[AnyOperation]:
        return [operation for file in sorted(self.folder.glob("run.ndjson*")) for operation in read(file)]


def arguments(url: str, folder: Path, *more: str) -> list[str]:
    """A run of some seconds that leaves no key behind."""
    folder.mkdir()
    return [
        *(sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--host", url, "--headless"),
        *("--only-summary", "--prefix", f"locust-{folder.name}/", "--keys", "500", "--clear-end"),
        *("--history", str(folder / "run.ndjson"), "--html", str(folder / "report.html"), *more),
    ]


def finish(run: subprocess.Popen[str], folder: Path) -> Ended:
    try:
        output, _ = run.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    page = folder / "report.html"
    report: dict[str, Any] = {}
    if page.exists():
        report, _ = json.JSONDecoder().raw_decode(page.read_text().partition("templateArgs = ")[2])
    return Ended(run.returncode, output, report, folder)


def start(url: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments(url, folder, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    )


def locust(url: str, folder: Path, *more: str) -> Ended:
    return finish(start(url, folder, *more), folder)


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """One run of each class alone, some of them at the same time."""
    base = tmp_path_factory.mktemp("runs")
    names = [*YCSB, *JUDGED]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = pool.map(lambda name: locust(cluster.url, base / name, "-u", "8", "-t", "2s", name), names)
        return dict(zip(names, ended, strict=True))


@pytest.mark.parametrize("name", YCSB)
def test_a_workload_of_ycsb_runs_without_failures(runs: dict[str, Ended], name: str) -> None:
    ended = runs[name]
    assert (ended.code, ended.failures) == (0, set()), ended.output
    assert ended.names
    assert all(each.startswith(f"YCSB {name[-1]} ") for each in ended.names)


@pytest.mark.parametrize("name", JUDGED)
def test_the_history_of_a_workload_is_judged_right(runs: dict[str, Ended], name: str) -> None:
    ended = runs[name]
    assert (ended.code, ended.failures) == (0, set()), ended.output
    verdict = judge(ended.history)
    assert {check.name: check.violations for check in verdict.checks} == {JUDGED[name]: []}
    assert verdict.ok
    assert verdict.checks[0].operations > 20


def test_a_run_that_clears_at_its_end_leaves_no_key_behind(runs: dict[str, Ended], cluster: Cluster) -> None:
    assert runs
    command = [sys.executable, "-m", "kvstore", "list", "locust-", "--url", cluster.url]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout == ""


def test_without_a_choice_all_workloads_run_and_the_report_shows_them_over_time(
    cluster: Cluster, tmp_path: Path
) -> None:
    ended = locust(cluster.url, tmp_path / "mix", "-t", "4s")
    assert (ended.code, ended.failures) == (0, set()), ended.output
    assert {name.partition(" ")[0] for name in ended.names} == {
        "YCSB",
        "bank",
        "brief",
        "counter",
        "list",
        "lists",
        "lock",
        "register",
        "section",
        "set",
    }
    assert judge(ended.history).ok
    drawn = ended.report["history"]
    assert len(drawn) >= 3
    shown = {"current_rps", "response_time_percentile_0.5", "response_time_percentile_0.99"}
    assert shown <= drawn[-1].keys()


def test_several_processes_write_one_history_together(cluster: Cluster, tmp_path: Path) -> None:
    ended = locust(cluster.url, tmp_path / "two", "-u", "16", "-t", "3s", "--processes", "2", *JUDGED)
    assert (ended.code, ended.failures) == (0, set()), ended.output
    files = sorted(ended.folder.glob("run.ndjson*"))
    assert [file.name for file in files] == ["run.ndjson", "run.ndjson.0", "run.ndjson.1"]
    clients = [{operation.client for operation in read(file)} for file in files]
    assert clients[0] == {"opening", "closing"}
    assert {name.partition(".")[0] for name in clients[1]} == {"0"}
    assert {name.partition(".")[0] for name in clients[2]} == {"1"}
    verdict = judge(ended.history)
    assert {check.name for check in verdict.checks} == set(JUDGED.values())
    assert verdict.ok, verdict


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(write_config(tmp_path_factory.mktemp("own"), shards=2)) as cluster:
        yield cluster


def test_while_a_shard_is_killed_failures_are_counted_by_their_code_and_the_history_holds(
    own: Cluster, tmp_path: Path
) -> None:
    run = start(own.url, tmp_path / "killed", "-u", "30", "-t", "6s")
    assert run.stdout is not None
    while "All users spawned" not in (line := run.stdout.readline()):
        assert line, "Locust ended before it began"
    time.sleep(1)  # they have begun; the kill must come while they are at work
    os.kill(own.pid("shard-s1"), signal.SIGKILL)
    ended = finish(run, tmp_path / "killed")
    assert ended.code == 1  # Locust's own, for a run with failures
    assert ended.failures
    assert ended.failures <= {"503 unavailable", "504 outcome-unknown"}
    assert judge(ended.history).ok


def test_a_cluster_that_is_not_there_ends_the_run_with_a_sentence_and_exit_code_1(tmp_path: Path) -> None:
    ended = locust("http://127.0.0.1:1", tmp_path / "unbound", "-t", "2s")
    assert ended.code == 1
    assert "never sent: ConnectionRefusedError" in ended.output
    assert "kvstore up" in ended.output


def test_a_host_that_is_no_address_is_refused_with_an_example(tmp_path: Path) -> None:
    ended = locust("localhost:8080", tmp_path / "wrong", "-t", "2s")
    assert ended.code == 1
    assert "http://127.0.0.1:8080" in ended.output
