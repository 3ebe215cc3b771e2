"""A disk that neither fails nor answers: the node's process ends by itself, and a copy serves its shard."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.test_copies_and_failover import Nodes, Writer

WAIT_S = 60.0
EXIT_DISK_FAILED = 74
HANGS = """
import sys
import threading
from pathlib import Path

from kvstore.__main__ import run
from kvstore.storage.disk import OsFile

hung, sync = Path(sys.argv.pop(1)), OsFile.sync


def sync_or_hang(file):
    if hung.exists():
        threading.Event().wait()
    sync(file)


OsFile.sync = sync_or_hang
run()
"""  # `python -m kvstore`, in whose process no sync of a log returns once the file is there


@pytest.mark.parametrize("inline_ms_max", [0.001, 1000.0], ids=["sync in a thread", "sync on the loop"])
async def test_a_node_whose_disk_hangs_ends_and_a_copy_serves_its_shard(tmp_path: Path, inline_ms_max: float) -> None:
    with ExitStack() as at_the_end:
        hung = tmp_path / "hung"
        nodes = Nodes(tmp_path, at_the_end, {"s1": ("-c", HANGS, str(hung))}, sync_inline_ms_max=inline_ms_max)
        await asyncio.to_thread(nodes.until, nodes.are_in_sync)
        writer, stop = Writer(nodes.url, await asyncio.to_thread(nodes.key_of, "s1")), asyncio.Event()
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(writer.run(stop))
            await _until(lambda: writer.acknowledged > 20)
            hung.touch()
            hung_s = time.monotonic()
            assert await asyncio.to_thread(nodes.wait, "s1") == EXIT_DISK_FAILED
            ended_s, before = time.monotonic(), writer.acknowledged
            await _until(lambda: writer.acknowledged > before)
            served_s = time.monotonic()
            await _until(lambda: writer.acknowledged > before + 20)
            stop.set()
        assert (await asyncio.to_thread(nodes.primaries))["s1"] != "s1"
        assert all(error.code == "outcome-unknown" for error in writer.errors)
        print(f"after the disk hung: exit {ended_s - hung_s:.2f} s, next acknowledged write {served_s - hung_s:.2f} s")


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
