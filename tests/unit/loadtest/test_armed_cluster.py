"""Processes that chaos kills and keeps away, as the supervisor knows them, on tiny children without pid files."""

from __future__ import annotations

from pathlib import Path

from kvstore.config import Limits
from loadtest.cluster import processes
from loadtest.cluster.armed import ArmedCluster, _ArmedSupervisor
from tests.unit.test_supervisor import Lines, child, until


async def test_a_process_that_has_no_pid_file_yet_is_killed_and_held_like_any_other(tmp_path: Path) -> None:
    lines, cluster = Lines(), ArmedCluster(tmp_path)
    cluster._armed.mkdir()
    supervisor = cluster._supervisor = _ArmedSupervisor(cluster._armed, Limits(), lines, lambda each: each)
    try:
        supervisor.add(child("shard-s1"))
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
    finally:
        await supervisor.stop()


async def test_a_process_that_two_faults_hold_comes_back_when_neither_does(tmp_path: Path) -> None:
    lines, cluster = Lines(), ArmedCluster(tmp_path)
    cluster._armed.mkdir()
    supervisor = cluster._supervisor = _ArmedSupervisor(cluster._armed, Limits(), lines, lambda each: each)
    try:
        supervisor.add(child("shard-s1"))
        pid = await lines.pid("shard-s1")
        assert cluster.hold("shard-s1") is not None
        await lines.until("ended by SIGKILL")
        cluster.hold("shard-s1")
        cluster.let_come_back("shard-s1")
        assert (cluster._armed / "shard-s1.held").exists()
        cluster.let_come_back("shard-s1")
        assert await lines.pid("shard-s1") != pid
    finally:
        await supervisor.stop()
