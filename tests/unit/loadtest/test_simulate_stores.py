"""Stores under simulated faults: they hold, the same seed gives the same run, and planted faults are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvstore.storage.log import Log
from kvstore.store.cache import Cache
from kvstore.store.log_writer import LogWriter
from kvstore.store.pipeline import Pipeline
from kvstore.transactions.intents import State
from loadtest.simulate.__main__ import main
from loadtest.simulate.store_run import simulate

SEEDS = range(10)


def test_stores_keep_their_promises_under_faults() -> None:
    failed = {seed: result.verdict for seed in SEEDS if not (result := simulate(seed, 5.0)).ok}
    assert failed == {}


def run_command(hash_seed: str, *args: str) -> Any:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "loadtest.simulate", "--of", "store", "--json", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_seeds_give_the_same_events_in_processes_with_other_hashes() -> None:
    first, second = (run_command(hash_seed, "--seeds", "3", "--seconds", "5") for hash_seed in ("1", "2"))
    assert first["digest"] == second["digest"]
    assert (first["seeds"], first["failed"]) == (3, [])
    assert first["total"]["events"] == second["total"]["events"] > 1000


def skip_sync(log: Log) -> int:
    log.synced = log.last
    return log.last.number


def answer_at_once(pipeline: Pipeline, batch: Any, *args: Any) -> None:
    for sink, answer in batch.changes.answers:
        sink.send(answer)
    commit(pipeline, batch, *args)


def cache_late(cache: Cache, key: str, ticket: int, state: State | None) -> bool:
    if not finish(cache, key, ticket, state) and state is not None:
        cache.publish(key, state)
    return True


async def sync_nothing(writer: LogWriter) -> None:
    await writer._tables.environment.in_thread(lambda: None)


commit, finish = Pipeline._commit, Cache.finish
BUGS = {
    "the sync is skipped": (Log, "sync", skip_sync),
    "answers leave before the sync": (Pipeline, "_commit", answer_at_once),
    "batches are visible before they are durable": (LogWriter, "_sync_in_thread", sync_nothing),
    "a late reader fills the cache": (Cache, "finish", cache_late),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_fault_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    assert any(not simulate(seed, 20.0).ok for seed in range(30))


def test_a_failed_seed_is_shown_with_the_command_that_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Log, "sync", skip_sync)
    result = tmp_path / "result.json"
    args = ["--of", "store", "--seeds", "3", "--seed", "0", "--json", "--result", str(result)]
    ran = CliRunner().invoke(main, args)
    document = json.loads(ran.stdout.splitlines()[-1])
    assert ran.exit_code == 1
    assert document["failed"]
    again = f"python -m loadtest.simulate --seeds 1 --seed {document['failed'][0]} --seconds 20 --of store --log"
    assert again in ran.stderr
    assert "the last events:" in ran.stderr
    repeated = CliRunner().invoke(main, args)
    assert json.loads(repeated.stdout.splitlines()[-1])["digest"] == document["digest"]
    assert json.loads(result.read_text())["seeds"] == 6


def test_a_replay_logs_every_event() -> None:
    ran = CliRunner().invoke(main, ["--of", "store", "--seeds", "1", "--seed", "3", "--seconds", "0.5", "--log"])
    assert ran.exit_code == 0
    assert "s1 serves at" in ran.stdout
    assert ran.stdout.count("Store._guard") > 10
    assert "every promise held" in ran.stdout


@pytest.mark.parametrize("args", [["--seeds", "0"], ["--seconds", "-1"], ["--unknown"]])
def test_options_that_make_no_sense_are_refused(args: list[str]) -> None:
    assert CliRunner().invoke(main, args).exit_code == 2


def test_a_file_that_is_no_result_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("something else")
    ran = CliRunner().invoke(main, ["--seeds", "1", "--result", str(path)])
    assert ran.exit_code == 2
    assert "is no file of results" in ran.stderr
    assert path.read_text() == "something else"
