"""Copies under `kvstore up`: what a person sees who starts a cluster with them, and takes its nodes down one by one."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.conftest import REPOSITORY, Cluster, running, write_config

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
