"""Processes that chaos kills and keeps away, as the supervisor knows them, on tiny children without pid files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstore.config import Limits
from loadtest.cluster import processes
from loadtest.cluster.armed import ArmedCluster, _ArmedSupervisor
from tests.unit.test_supervisor import Lines, child, until


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
async def cluster(tmp_path: Path, lines: Lines) -> AsyncIterator[ArmedCluster]:
    """With one child, shard-s1."""
    found = ArmedCluster(tmp_path)
    found._armed.mkdir()
    supervisor = found._supervisor = _ArmedSupervisor(found._armed, Limits(), lines, lambda each: each)
    try:
        supervisor.add(child("shard-s1"))
        yield found
    finally:
        await supervisor.stop()


async def test_a_process_that_has_no_pid_file_yet_is_killed_and_held_like_any_other(
    cluster: ArmedCluster, lines: Lines
) -> None:
    pid = await lines.pid("shard-s1")
    assert cluster.pids() == {}
    held = cluster.hold("shard-s1")
    assert held is not None
    assert held.pid == pid
    await lines.until("ended by SIGKILL")
    assert not processes.is_running(held)
    await until(lambda: cluster.kill("shard-s1") is not None)  # what waits to come back, waits again
    await lines.until("ended by SIGKILL")
    cluster.let_come_back("shard-s1")
    assert await lines.pid("shard-s1") != pid


async def test_a_process_that_two_faults_hold_comes_back_when_neither_does(cluster: ArmedCluster, lines: Lines) -> None:
    pid = await lines.pid("shard-s1")
    assert cluster.hold("shard-s1") is not None
    await lines.until("ended by SIGKILL")
    cluster.hold("shard-s1")
    cluster.let_come_back("shard-s1")
    assert (cluster._armed / "shard-s1.held").exists()
    cluster.let_come_back("shard-s1")
    assert await lines.pid("shard-s1") != pid
