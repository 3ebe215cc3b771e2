"""Folders and files that are another's in the place of a node's: refused or copied again, told of, and never served."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import aiohttp
import pytest

from kvstore.errors import ForeignData, KvError
from tests.unit.shard.test_node_failover import Cluster, cluster_in, replicated
from tests.unit.shard.test_old_copies import KEYS, check_all, put_all, put_back, values
from tests.unit.waiting import until


async def another_cluster(folder: Path, http: aiohttp.ClientSession) -> None:
    """It has other values under the same keys, and the same names of nodes and shards; it is stopped."""
    async with cluster_in(folder) as other:
        await other.until_replicated()
        await put_all(http, other, "other")


def files_of(folder: Path, stem: str) -> list[Path]:
    return [path for path in folder.glob(f"{stem}.*") if not path.name.startswith(f"{stem}.copy-")]


def take_away(folder: Path, stem: str) -> None:
    for path in files_of(folder, stem):
        path.unlink()


def misplace(source: Path, stem: str, folder: Path, as_stem: str) -> None:
    """Put the files of a store in the place of those of another one."""
    take_away(folder, as_stem)
    for path in files_of(source, stem):
        shutil.copy(path, folder / f"{as_stem}{path.name.removeprefix(stem)}")


async def copy_without_process(cluster: Cluster) -> tuple[str, Path, str]:
    """End the node that has the copy of shard s1: its id, its folder, and how the names of the copy's files begin."""
    node = (await cluster.shard("s1")).replicas[0].node
    await cluster.end(node)
    return node, cluster.folder / node, f"shard-s1.copy-{node}"


async def check_another_is_made(http: aiohttp.ClientSession, cluster: Cluster, text: str) -> None:
    """The new copy of shard s1 has every value, and takes over."""
    await cluster.until_replicated()
    await cluster.end("s1")
    await check_all(http, cluster, text)


async def refusal_of(cluster: Cluster, node: str) -> KvError:
    """Why the process of that node ends."""
    cluster.start_node(node)
    with pytest.raises(KvError) as refused:
        await cluster.until(node, lambda shard: False)
    return refused.value


async def test_the_folder_of_another_cluster_in_the_place_of_a_nodes_is_refused_and_left_as_it_is(
    tmp_path: Path,
) -> None:
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        await another_cluster(tmp_path / "other", http)
        async with cluster_in(tmp_path / "own") as cluster:
            await cluster.until_replicated()
            await put_all(http, cluster, "own")
            await cluster.end("s1")
            shutil.copytree(cluster.folder / "s1", kept := tmp_path / "kept")
            put_back(cluster, "s1", tmp_path / "other" / "s1")
            before = {path.name: path.read_bytes() for path in (cluster.folder / "s1").glob("*.id")}
            refused = await refusal_of(cluster, "s1")
            assert isinstance(refused, ForeignData)
            assert "cluster" in refused.detail
            assert "move the file away" in refused.sentences
            assert {path.name: path.read_bytes() for path in (cluster.folder / "s1").glob("*.id")} == before
            await check_all(http, cluster, "own")
            put_back(cluster, "s1", kept)
            cluster.start_node("s1")
            await cluster.until_replicated()
            await check_all(http, cluster, "own")


async def test_files_of_another_shard_in_the_place_of_a_copy_are_refused_until_they_are_moved_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await put_all(http, cluster, "v")
        node, folder, stem = await copy_without_process(cluster)
        misplace(folder, f"shard-{node}", folder, stem)
        before = {path.name: path.read_bytes() for path in files_of(folder, stem) if path.suffix in (".id", ".db")}
        cluster.start_node(node)
        await until(lambda: "the copy of shard s1 here is not used" in caplog.text)
        (line,) = [each for each in caplog.messages if "here is not used" in each]
        assert f"belongs to shard_id {node}, not s1" in line
        assert "move the file away" in line
        await check_all(http, cluster, "v")
        assert {path.name: path.read_bytes() for path in files_of(folder, stem) if path.name in before} == before
        take_away(folder, stem)
        await check_another_is_made(http, cluster, "v")


async def test_the_copy_of_another_clusters_shard_of_that_name_is_refused_until_it_is_moved_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        await another_cluster(tmp_path / "other", http)
        async with cluster_in(tmp_path / "own") as cluster:
            await cluster.until_replicated()
            await put_all(http, cluster, "own")
            node, folder, stem = await copy_without_process(cluster)
            misplace(tmp_path / "other" / node, stem, folder, stem)
            before = {path.name: path.read_bytes() for path in files_of(folder, stem) if path.suffix == ".id"}
            cluster.start_node(node)
            await until(lambda: "the copy of shard s1 here is not used" in caplog.text)
            assert "move the file away. Another one is made" in caplog.text
            await put_all(http, cluster, "new")
            assert {path.name: path.read_bytes() for path in files_of(folder, stem) if path.name in before} == before
            take_away(folder, stem)
            await check_another_is_made(http, cluster, "new")


async def test_nodes_whose_folders_are_exchanged_serve_nothing_of_the_shards_that_are_lost_by_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that finds no files of its own begins with empty ones: as if its disk were lost."""
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession() as http:
        await cluster.until_replicated()
        await put_all(http, cluster, "v")
        one, other = "s1", (await cluster.shard("s1")).replicas[0].node
        for node in (one, other):
            await cluster.end(node)
        exchange(cluster.folder, one, other)
        for node in (one, other):
            cluster.start_node(node)
        await until(lambda: f"The files of shard {one} that lay on node {one} are lost" in caplog.text)
        served = asyncio.create_task(values(http, cluster))  # waits for what no node has
        for node in (one, other):
            await cluster.end(node)
        exchange(cluster.folder, one, other)
        for node in (one, other):
            cluster.start_node(node)
        for shard_id in ("s1", "s2", "s3"):
            await cluster.until(shard_id, replicated)
        assert set(await served) <= {f"v{number}" for number in range(KEYS)} | {"503", "504"}
        await check_all(http, cluster, "v")


def exchange(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "between")
    (folder / other).rename(folder / one)
    (folder / "between").rename(folder / other)
