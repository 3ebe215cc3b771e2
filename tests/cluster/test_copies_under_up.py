"""Copies under `kvstore up`: what a person sees who starts a cluster with them, and takes its nodes down one by one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.client import Client
from kvstore.errors import KvError
from tests.cluster.clusters import REPOSITORY, Cluster, running, write_config

WAIT_S = 60.0


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, dict[str, Any]]]:
    """A cluster with two copies of every key, and its GET /v1/cluster in the moment in which it was ready."""
    folder = tmp_path_factory.mktemp("copied")
    with running(write_config(folder, shards=3, partitions=64, replicas=2)) as cluster:
        yield cluster, document(cluster)


def document(cluster: Cluster) -> dict[str, Any]:
    with urllib.request.urlopen(f"{cluster.url}/v1/cluster", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def kvstore(cluster: Cluster, *arguments: str) -> str:
    command = [sys.executable, "-m", "kvstore", *arguments, "--url", cluster.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ready_is_said_once_every_copy_is_in_sync(copied: tuple[Cluster, dict[str, Any]]) -> None:
    _, at_ready = copied
    assert [[copy["state"] for copy in shard["copies"]] for shard in at_ready["shards"]] == [["in-sync"]] * 3
    assert (at_ready["under_replicated"], at_ready["failovers"]) == ([], [])
    assert at_ready["advice"].startswith("All is well")


def test_status_and_the_list_show_where_the_copies_are(copied: tuple[Cluster, dict[str, Any]]) -> None:
    cluster, at_ready = copied
    (copy,) = at_ready["shards"][0]["copies"]
    assert f"{copy['node']} in sync" in kvstore(cluster, "status")
    assert f"primary on s1\tcopies: {copy['node']} in sync" in kvstore(cluster, "shard", "list").splitlines()[0]


async def test_every_node_is_restarted_in_turn_and_no_client_sees_an_error(
    copied: tuple[Cluster, dict[str, Any]],
) -> None:
    cluster, _ = copied
    stop, errors = asyncio.Event(), list[KvError]()
    works = [_counts(cluster.url, f"count/{n}", stop, errors) for n in range(6)]
    works += [_writes_all(cluster.url, stop, errors)]
    works += [_takes_turns(cluster.url, "turn", stop, errors) for _ in range(3)]
    pids = {node: _pid(cluster, node) for node in ("s1", "s2", "s3")}
    command = ("shard", "restart", "--all", "--config", str(cluster.folder / "cluster.yaml"), "--json")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        told = [json.loads(line) for line in (await asyncio.to_thread(kvstore, cluster, *command)).splitlines()]
        stop.set()
    assert all(task.result() > 0 for task in tasks)
    assert errors == []
    assert [line["id"] for line in told] == ["s1", "s2", "s3"]
    assert all(line["pid"] == _pid(cluster, line["id"]) != pids[line["id"]] for line in told)
    assert {change["kind"] for change in _changes(cluster)} == {"promote"}, "no shard had to wait for a failover"
    deadline = time.monotonic() + WAIT_S
    while document(cluster)["under_replicated"] and time.monotonic() < deadline:  # a copy that falls out comes back
        await asyncio.sleep(0.1)
    assert document(cluster)["under_replicated"] == []


async def _counts(url: str, key: str, stop: asyncio.Event, errors: list[KvError]) -> int:
    """Writes 1, 2, 3, … and reads each back; no try of its own beyond the first. The last one that was acknowledged."""
    number = 0
    async with Client(url, retries=0, timeout_s=WAIT_S) as kv:
        while not stop.is_set():
            try:
                await kv.put(key, b"%d" % (number + 1))
                number += 1
                item = await kv.get(key)
                assert item is not None
                assert int(item.value) == number
            except KvError as error:
                errors.append(error)
    return number


async def _writes_all(url: str, stop: asyncio.Event, errors: list[KvError]) -> int:
    """Writes the same to keys of all shards at once, and reads all of them. How often."""
    number, keys = 0, [f"all/{n}" for n in range(6)]
    async with Client(url, retries=0, timeout_s=WAIT_S) as kv:
        while not stop.is_set():
            try:
                puts = [{"op": "put", "key": key, "value": str(number)} for key in keys]
                await kv.txn_json(json.dumps({"then": puts}).encode())
                gets = [{"op": "get", "key": key} for key in keys]
                read = await kv.txn_json(json.dumps({"then": gets}).encode())
                assert [each["value"] for each in read["results"]] == [str(number)] * len(keys)
                number += 1
            except KvError as error:
                errors.append(error)
    return number


async def _takes_turns(url: str, name: str, stop: asyncio.Event, errors: list[KvError]) -> int:
    """Waits for a lock, and gives it to the next. How often it had it."""
    turns = 0
    async with Client(url, retries=0, timeout_s=WAIT_S) as kv:
        while not stop.is_set():
            try:
                async with kv.lock(name, ttl=30, wait=30):
                    turns += 1
            except KvError as error:
                errors.append(error)
    return turns


def _pid(cluster: Cluster, node: str) -> int:
    return int((cluster.folder / "data" / "run" / f"shard-{node}.pid").read_text())


def _changes(cluster: Cluster) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{cluster.url}/v1/changes", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["items"]
    return found


def test_a_process_that_is_not_there_is_not_restarted_nor_any_other(copied: tuple[Cluster, dict[str, Any]]) -> None:
    cluster, _ = copied
    before = _pid(cluster, "s1")
    config = str(cluster.folder / "cluster.yaml")
    command = [
        sys.executable,
        "-m",
        "kvstore",
        "shard",
        "restart",
        "s1",
        "s9",
        "--config",
        config,
        "--url",
        cluster.url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no process of shard s9 runs here" in done.stderr
    assert _pid(cluster, "s1") == before
