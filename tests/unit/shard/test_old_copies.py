"""Old folders that are put back in a running cluster with copies: what was acknowledged is there all the same."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import aiohttp
import pytest

from kvstore.placement.cluster_map import Shard
from kvstore.storage.disk import OsDisk
from kvstore.storage.log_check import check_log
from kvstore.store.opening import store_path
from tests.unit.shard.test_node_failover import Cluster, cluster_in

KEYS = 30
SHARDS = ("s1", "s2", "s3")


async def put_all(http: aiohttp.ClientSession, cluster: Cluster, value: str) -> None:
    for number in range(KEYS):
        await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"{value}{number}")


async def check_all(http: aiohttp.ClientSession, cluster: Cluster, value: str, shard: str | None = None) -> None:
    """`shard`: only its keys."""
    for key in await keys_of(http, cluster, shard):
        async with http.get(f"{cluster.url}/v1/kv/{key}") as answer:
            assert await answer.text() == f"{value}{key[1:]}"


async def backed_up(cluster: Cluster, http: aiohttp.ClientSession, node: str) -> Path:
    """A copy of that node's folder, made while the node was stopped."""
    await put_all(http, cluster, "old")
    await cluster.end(node)
    kept = cluster.folder / f"backup-of-{node}"
    shutil.copytree(cluster.folder / node, kept)
    cluster.start_node(node)
    await cluster.until_replicated()
    await put_and_told(http, cluster, "new")
    return kept


async def put_and_told(http: aiohttp.ClientSession, cluster: Cluster, value: str) -> None:
    """Put all keys; return when the beats have told the controller of all records that the logs of the primaries have.

    Stores tell nothing by themselves meanwhile. An old folder that lacks what was told is never served.
    """
    await put_all(http, cluster, value)
    ends = {shard_id: end_of_log(cluster, await cluster.shard(shard_id)) for shard_id in SHARDS}
    async with asyncio.timeout(60):
        while any(number < ends[shard_id] for shard_id, number in (await told(cluster, http)).items()):
            await asyncio.sleep(0.05)


def end_of_log(cluster: Cluster, shard: Shard) -> int:
    """The number of the last record in the primary's log."""
    path = store_path(cluster.folder / shard.primary.node, shard.id, shard.primary.node)
    report = check_log(OsDisk(), path.parent, path.stem)
    assert report.damage is None
    return report.last.number


async def told(cluster: Cluster, http: aiohttp.ClientSession) -> dict[str, int]:
    """By shard, the number of the last record of which the controller knows that it is committed."""
    url, found = f"http://{cluster.config.controllers[0].listen}/v1/told", {}
    for shard_id in SHARDS:
        body = {"store_id": (await cluster.shard(shard_id)).store_id, "number": 0, "version": 0}
        async with http.post(url, json=body) as answer:
            found[shard_id] = (await answer.json())["number"]
    return found


def put_back(cluster: Cluster, node: str, kept: Path) -> None:
    shutil.rmtree(cluster.folder / node)
    shutil.copytree(kept, cluster.folder / node)


async def test_an_old_folder_of_a_node_that_is_put_back_gets_what_it_lacks_and_loses_nothing(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        kept = await backed_up(cluster, http, "s1")
        await cluster.end("s1")
        put_back(cluster, "s1", kept)
        cluster.start_node("s1")
        await cluster.until_replicated()
        await check_all(http, cluster, "new")
        copy_of_s3 = (await cluster.shard("s1")).replicas[0].node
        await cluster.end(copy_of_s3)
        await check_all(http, cluster, "new")
        cluster.start_node(copy_of_s3)
        await cluster.until_replicated()


async def test_an_old_folder_of_a_copy_is_never_served_while_its_primary_is_away(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession() as http:
        await cluster.until_replicated()
        shard = await cluster.shard("s1")
        (copy,) = shard.replicas
        kept = await backed_up(cluster, http, copy.node)
        await cluster.kill("s1")
        await cluster.kill(copy.node)
        put_back(cluster, copy.node, kept)
        cluster.start_node(copy.node)
        served = asyncio.create_task(values(http, cluster))
        done, _ = await asyncio.wait({served}, timeout=4)
        if done:
            assert set(served.result()) <= {f"new{number}" for number in range(KEYS)} | {"503", "504"}
        cluster.start_node("s1")
        await cluster.until_replicated()
        served.cancel()
        await check_all(http, cluster, "new")


async def test_an_old_folder_of_a_primary_without_a_copy_in_sync_is_not_opened(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession() as http:
        await cluster.until_replicated()
        (copy,) = (await cluster.shard("s1")).replicas
        kept = await backed_up(cluster, http, "s1")
        await cluster.until("s1", lambda shard: shard.primary.node == "s1")
        await cluster.end(copy.node)
        await cluster.until("s1", lambda shard: all(each.state == "joining" for each in shard.replicas))
        await put_all(http, cluster, "newest")
        await cluster.end("s1")
        shutil.copytree(cluster.folder / "s1", newest := cluster.folder / "newest-of-s1")
        put_back(cluster, "s1", kept)
        cluster.start_node("s1")
        served = asyncio.create_task(values(http, cluster))
        done, _ = await asyncio.wait({served}, timeout=4)
        if done:
            assert set(served.result()) <= {f"newest{number}" for number in range(KEYS)} | {"503", "504"}
        await cluster.end("s1")
        put_back(cluster, "s1", newest)
        cluster.start_node("s1")
        cluster.start_node(copy.node)
        await cluster.until_replicated()
        served.cancel()
        await check_all(http, cluster, "newest")


async def both_put_back(cluster: Cluster, http: aiohttp.ClientSession) -> tuple[tuple[str, str], dict[str, Path]]:
    """The nodes of s1's primary and copy, which have old folders and run; by node the newest ones."""
    await cluster.until_replicated()
    (copy,) = (await cluster.shard("s1")).replicas
    both = "s1", copy.node
    await put_all(http, cluster, "old")
    kept = await killed(cluster, both, "old")
    for node in both:
        cluster.start_node(node)
    await cluster.until_replicated()
    await put_and_told(http, cluster, "new")
    newest = await killed(cluster, both, "newest")
    for node in both:
        put_back(cluster, node, kept[node])
        cluster.start_node(node)
    return both, newest


async def killed(cluster: Cluster, nodes: tuple[str, ...], name: str) -> dict[str, Path]:
    """By node, a copy of its folder, made once all of them were killed."""
    await asyncio.gather(*(cluster.kill(node) for node in nodes))
    kept = {node: cluster.folder / f"{name}-of-{node}" for node in nodes}
    for node, folder in kept.items():
        shutil.copytree(cluster.folder / node, folder)
    return kept


async def until_waits(cluster: Cluster, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture) -> None:
    """The opening of s1 has met its copy, and says why it does not go on; no key of s1 was answered until then."""
    async with asyncio.timeout(60):
        while "shard s1 is not opened" not in caplog.text:
            await asyncio.sleep(0.05)
    assert "`kvstore shard accept-old s1`" in caplog.text
    reading = asyncio.create_task(values(http, cluster, "s1"))
    done, _ = await asyncio.wait({reading}, timeout=4)
    reading.cancel()
    if done:
        assert set(reading.result()) <= {"503", "504"}


async def test_old_folders_of_a_primary_and_its_copy_are_not_served_until_the_newer_ones_are_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession() as http:
        (_, copy), newest = await both_put_back(cluster, http)
        await until_waits(cluster, http, caplog)
        await cluster.kill(copy)
        put_back(cluster, copy, newest[copy])
        cluster.start_node(copy)  # what it has more is fetched by the opening that waits
        await cluster.until_replicated()
        await check_all(http, cluster, "new", "s1")


async def test_old_folders_of_a_primary_and_its_copy_are_served_once_a_person_has_accepted_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession() as http:
        await both_put_back(cluster, http)
        await until_waits(cluster, http, caplog)
        asked, accept = {"confirm": "s1"}, f"{cluster.url}/v1/shards/s1/accept-old"
        async with http.post(accept, json=asked) as answer:
            assert (answer.status, (await answer.json())["told"] > 0) == (202, True)
        await cluster.until_replicated()
        await check_all(http, cluster, "old", "s1")
        async with http.put(f"{cluster.url}/v1/kv/{(await keys_of(http, cluster, 's1'))[0]}", data="newest") as answer:
            assert answer.status in (200, 201, 204)


async def keys_of(http: aiohttp.ClientSession, cluster: Cluster, shard: str | None) -> list[str]:
    """Those of that shard; all of them for None."""
    found = []
    for number in range(KEYS):
        async with http.get(f"{cluster.url}/v1/explain/k{number}") as answer:
            if shard in (None, (await answer.json())["owner"]):
                found.append(f"k{number}")
    return found


async def values(http: aiohttp.ClientSession, cluster: Cluster, shard: str | None = None) -> list[str]:
    found = []
    for key in await keys_of(http, cluster, shard):
        async with http.get(f"{cluster.url}/v1/kv/{key}") as answer:
            found.append(await answer.text() if answer.status == 200 else f"{answer.status}")
    return found
