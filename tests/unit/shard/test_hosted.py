"""A node serves its own shard and those of which the map names it primary, by one door and one connection each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec
import pytest

from kvstore.config import ClusterConfig, ControllerConfig, Limits, RouterConfig, ShardConfig
from kvstore.controller import app as controller_app
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.controller.membership import ClusterState
from kvstore.controller.recovery import Told
from kvstore.environment import StopAsked
from kvstore.placement.cluster_map import ClusterMap, Primary, at_home, first_map
from kvstore.router import serve as router_process
from kvstore.shard import app as shard_app
from kvstore.shard.folder import FileFolder, copies_in
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened, store_path, untold
from kvstore.store.store import Store
from kvstore.transport.channel import Connection
from loadtest.cluster.processes import free_ports

PARTITIONS = 64
LIMITS = Limits(body_bytes_max=1 << 20, log_segment_bytes=4 << 20)


def fatal(error: BaseException) -> NoReturn:
    raise AssertionError from error


async def open_store(folder: Path, shard_id: str, node_id: str) -> Store:
    return await Store.open(store_path(folder, shard_id, node_id), LIMITS, shard_id, PARTITIONS, fatal)


async def make_stores(folder: Path, url: str) -> ClusterMap:
    """Shard s1 at home, and s2 with its primary on node s1, too; s3's copy there is no primary."""
    stores = {shard: await open_store(folder, shard, "s1") for shard in ("s1", "s2", "s3")}
    homes = [
        at_home(shard, url, stores[shard].identity.store_id, copy_id=stores[shard].copy_id) for shard in ("s1", "s2")
    ]
    found = first_map("c", PARTITIONS, homes)
    promoted = msgspec.structs.replace(found.shards[1], primary=Primary(node="s1", copy_id=stores["s2"].copy_id))
    found = msgspec.structs.replace(found, nodes=found.nodes[:1], shards=[found.shards[0], promoted])
    for shard in ("s1", "s2"):
        await stores[shard].partitions.adopt(found)
    for store in stores.values():
        await store.close()
    files = [await FileFolder(folder, "s1", LIMITS).open(shard, PARTITIONS, untold) for shard in stores]
    assert [type(each) for each in files] == [Opened, Opened, CopyFiles]
    for each in files:
        await each.close()
    return found


@asynccontextmanager
async def serving(*serves: Callable[[StopAsked], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Each until the block ends; what one raises is raised."""
    stop = StopAsked()
    tasks = [asyncio.create_task(serve(stop)) for serve in serves]
    try:
        yield
    finally:
        stop.ask_at_once()
        await asyncio.gather(*tasks)


async def wait_ready(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.02)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """All that were ever opened to the node."""
    found: list[Connection] = []
    init = Connection.__init__

    def noted(self: Connection, limits: Limits) -> None:
        found.append(self)
        init(self, limits)

    monkeypatch.setattr(Connection, "__init__", noted)
    return found


async def test_a_node_serves_two_shards_over_one_connection_of_each_router(
    tmp_path: Path, connections: list[Connection]
) -> None:
    router_port, controller_port, shard_port = free_ports(3)
    config = ClusterConfig(
        data_dir=str(tmp_path), partitions=PARTITIONS, replicas=1, limits=LIMITS,
        routers=[RouterConfig("0", f"127.0.0.1:{router_port}")],
        controllers=[ControllerConfig("0", f"127.0.0.1:{controller_port}")],
        shards=[ShardConfig("s1", f"127.0.0.1:{shard_port}")],
    )  # fmt: skip
    cluster_map = await make_stores(tmp_path, f"http://127.0.0.1:{shard_port}")
    map_store = await open_sqlite(tmp_path / "controller-0.db")
    await ClusterDocument(map_store, 1).change(lambda _: ClusterState(map=cluster_map))
    await map_store.close()
    join = f"http://127.0.0.1:{controller_port}"
    url = f"http://127.0.0.1:{router_port}"
    async with (
        aiohttp.ClientSession() as session,
        serving(
            lambda stop: controller_app.serve(
                controller_id="0", listen=config.controllers[0].listen, data_dir=tmp_path, config=config, stop=stop
            ),
            lambda stop: shard_app.serve(
                shard_id="s1", listen=config.shards[0].listen, join=join, data_dir=tmp_path, config=config, stop=stop
            ),
            lambda stop: router_process.serve(
                router_id="0", listen=config.routers[0].listen, join=join, config=config, stop=stop
            ),
        ),
    ):
        await wait_ready(session, url)
        answered_by = set()
        for number in range(50):
            async with session.put(f"{url}/v1/kv/k{number}", data=f"v{number}") as written:
                assert written.status == 201
            async with session.get(f"{url}/v1/kv/k{number}") as read:
                assert await read.text() == f"v{number}"
                answered_by.add(read.headers["Kv-Shard"])
        assert answered_by == {"s1", "s2"}
        async with session.get(f"{url}/v1/cluster") as answer:
            document = await answer.json()
        assert [node["id"] for node in document["nodes"]] == ["s1"]
        assert [(shard["id"], shard["primary"]) for shard in document["shards"]] == [("s1", "s1"), ("s2", "s1")]
        assert sum(shard["keys"] for shard in document["shards"]) == 50
        body = {"then": [{"op": "put", "key": f"k{number}", "value": "both"} for number in range(50)]}
        async with session.post(f"{url}/v1/txn", json=body) as answer:
            assert (await answer.json())["succeeded"] is True
        async with session.get(f"http://{config.shards[0].listen}/metrics") as answer:
            metrics = await answer.text()
        async with session.get(f"http://{config.shards[0].listen}/map") as answer:
            told = msgspec.json.decode(await answer.read(), type=Told)
        ids = [(shard.id, shard.store_id) for shard in cluster_map.shards]
        assert [(told.shard, told.store_id), *told.beside] == ids
        for shard in ("s1", "s2"):
            assert f'kvstore_shard_keys{{node="s1",role="primary",shard="{shard}"}}' in metrics
        assert len(connections) <= 2, "the router's and the controller's"
    for shard in ("s1", "s2"):  # all of both is there, and each store has its own
        store = await open_store(tmp_path, shard, "s1")
        assert store.inspection.snapshot().keys == {s["id"]: s["keys"] for s in document["shards"]}[shard]
        await store.close()


def test_copies_of_other_homes_are_found_by_their_names(tmp_path: Path) -> None:
    for name in (
        "shard-s1.db",
        "shard-s2.copy-s1.db",
        "shard-s9.copy-s1.db",
        "shard-s3.copy-s2.db",
        "shard-s2.copy-s1.id",
    ):
        (tmp_path / name).touch()
    assert copies_in([path.name for path in tmp_path.iterdir()], "s1") == ["s2", "s9"]
