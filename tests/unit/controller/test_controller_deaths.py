"""The controller's process killed at each of its steps: what was asked for is done, or was never asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import yaml

import kvstore
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.controller.membership import ClusterState
from kvstore.placement.cluster_map import ClusterMap, at_home, first_map
from loadtest.cluster.processes import free_ports
from tests.unit.controller.far_shards import FarShard, far_shards

ROOT = Path(kvstore.__file__).parents[1]
WAIT_S = 30.0
PARTITIONS = 64
LIMITS = {
    "reconnect_wait_s_max": 0.05, "move_group_keys_max": 200, "move_freeze_timeout_s": 10.0,
    "failover_after_s": 0.5, "lease_s": 0.4, "replica_timeout_s": 0.4,
}  # fmt: skip


class Process:
    """`kvstore controller serve`, with or without points at which it dies."""

    def __init__(self, folder: Path, port: int, session: aiohttp.ClientSession) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process: asyncio.subprocess.Process | None = None
        self._folder = folder
        self._port = port
        self._session = session

    async def start(self, points: str = "") -> None:
        config = self._folder / "cluster.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "partitions": PARTITIONS,
                    "routers": [{"id": "0", "listen": "127.0.0.1:1"}],
                    "controllers": [{"id": "0", "listen": f"127.0.0.1:{self._port}"}],
                    "shards": [{"id": name, "listen": f"127.0.0.1:{i + 2}"} for i, name in enumerate(("s1", "s2"))],
                    "limits": LIMITS,
                }
            )
        )
        listen = ("--listen", f"127.0.0.1:{self._port}", "--data-dir", str(self._folder), "--config", str(config))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvstore", "controller", "serve", "0", *listen,
            env={**os.environ, "KVSTORE_FAILPOINTS": points},
            cwd=ROOT,
        )  # fmt: skip

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer, or None if the process died before it answered; waits for a process that is starting."""
        while True:
            assert self.process is not None
            try:
                async with self._session.request(method, self.url + path, json=body) as answer:
                    return msgspec.json.decode(await answer.read())
            except aiohttp.ClientConnectorError:
                if self.process.returncode is not None:
                    return None
                await asyncio.sleep(0.02)
            except aiohttp.ClientError:
                return None

    async def map(self) -> ClusterMap:
        return msgspec.convert(await self.call("GET", "/v1/map"), ClusterMap)

    async def settled(self) -> ClusterMap:
        """The map once no move stands in it and the moved partitions are known to their owners."""
        async with asyncio.timeout(WAIT_S):
            while (found := await self.call("GET", "/v1/moves"))["moves"]:
                await asyncio.sleep(0.02)
        assert found is not None
        return await self.map()

    async def died(self) -> bool:
        """Whether it was killed by its failpoint."""
        assert self.process is not None
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait() == -signal.SIGKILL

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


@asynccontextmanager
async def formed(folder: Path) -> AsyncIterator[tuple[Process, dict[str, FarShard]]]:
    """A cluster of s1 and s2 that knows nothing yet of s3, and a controller that is not started."""
    [port] = free_ports(1)  # none that the kernel gives to a server of another test before this one is started
    async with far_shards("s1", "s2", "s3") as far, aiohttp.ClientSession() as session:
        members = [at_home(name, far[name].url, far[name].store_id) for name in ("s1", "s2")]
        store = await open_sqlite(folder / "controller-0.db")
        state = ClusterState(map=first_map("c", PARTITIONS, members))
        await store.compare_and_swap(0, msgspec.json.encode(state))
        await store.close()
        process = Process(folder, port, session)
        try:
            yield process, far
        finally:
            await process.stop()


def loads(cluster_map: ClusterMap) -> dict[str, int]:
    return {member.id: len(cluster_map.owned_by(member.id)) for member in cluster_map.shards}


@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("point", ["move-after-freeze-seen", "move-before-commit", "move-after-commit"])
async def test_killed_while_it_moves_it_goes_on_where_the_map_says(tmp_path: Path, point: str, nth: int) -> None:
    async with formed(tmp_path) as (controller, far):
        await controller.start(f"{point}=kill@{nth}")
        await controller.call("POST", "/v1/shards", {"id": "s3", "url": far["s3"].url})
        assert await controller.died()
        await controller.start()
        done = await controller.settled()
        assert sorted(loads(done).values()) == [21, 21, 22]
        assert {member.state for member in done.shards} == {"up"}
        for shard in far.values():
            shard.follow(done)  # a real one asks for it
            assert not shard.freezes


async def test_killed_again_and_again_it_comes_to_the_end(tmp_path: Path) -> None:
    async with formed(tmp_path) as (controller, far):
        await controller.start("move-before-commit=kill")
        await controller.call("POST", "/v1/shards", {"id": "s3", "url": far["s3"].url})
        for point in ("move-after-commit", "move-after-freeze-seen", "move-after-commit"):
            assert await controller.died()
            await controller.start(f"{point}=kill")
        assert await controller.died()
        await controller.start()
        assert sorted(loads(await controller.settled()).values()) == [21, 21, 22]


async def test_killed_before_it_voids_a_failed_move_it_begins_it_again(tmp_path: Path) -> None:
    async with formed(tmp_path) as (controller, far):
        far["s3"].fails = 1
        await controller.start("move-before-void=kill")
        await controller.call("POST", "/v1/shards", {"id": "s3", "url": far["s3"].url})
        assert await controller.died()
        failed = {move_id for move_id, step in far["s3"].seen if step == "failed"}
        await controller.start()
        assert sorted(loads(await controller.settled()).values()) == [21, 21, 22]
        assert not failed & far["s3"].finished.keys()


@pytest.mark.parametrize(("point", "is_stored"), [("controller-before-plan", False), ("controller-after-plan", True)])
@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("POST", "/v1/shards", {"id": "s3"}, [21, 21, 22]),
        ("DELETE", "/v1/shards/s2", None, [64]),
        ("PATCH", "/v1/shards/s2", {"weight": 3}, [16, 48]),
    ],
)
async def test_killed_while_it_plans_it_has_planned_all_or_nothing(
    tmp_path: Path, point: str, is_stored: bool, method: str, path: str, body: Any, expected: list[int]
) -> None:
    async with formed(tmp_path) as (controller, far):
        await controller.start(f"{point}=kill")
        if method == "POST":
            body = {**body, "url": far["s3"].url}
        before = await controller.map()
        assert await controller.call(method, path, body) is None
        assert await controller.died()
        await controller.start()
        done = await controller.settled()
        if is_stored:
            assert sorted(loads(done).values()) == expected
        else:
            assert done == before


async def test_a_freeze_of_a_controller_that_died_ends_when_the_next_one_starts(tmp_path: Path) -> None:
    async with formed(tmp_path) as (controller, far):
        far["s3"].gates["freeze"].clear()
        await controller.start("move-after-freeze-seen=kill")
        await controller.call("POST", "/v1/shards", {"id": "s3", "url": far["s3"].url})
        assert await controller.died()
        old = far["s1"].freezes | far["s2"].freezes
        assert old
        await controller.start()
        async with asyncio.timeout(WAIT_S):
            while old & (far["s1"].freezes | far["s2"].freezes):
                await asyncio.sleep(0.01)
        far["s3"].gates["freeze"].set()
        assert sorted(loads(await controller.settled()).values()) == [21, 21, 22]
