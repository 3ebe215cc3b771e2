"""Copies whose files are damaged, on real files: another one takes their place, and they are made anew.

The nodes of most of these run in this process, with their controller; a node that serves is stopped, its files are
damaged, and it starts again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from kvstore.errors import KvError
from kvstore.placement.cluster_map import Shard
from tests.unit.shard.test_node_failover import Cluster, cluster_in, replicated


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x55]))


def in_header_of_file(stem: Path) -> None:
    flip(stem.with_name(f"{stem.name}.db"), 3)


def gone(stem: Path) -> None:
    stem.with_name(f"{stem.name}.db").unlink()


def in_id(stem: Path) -> None:
    flip(stem.with_name(f"{stem.name}.id"), 30)


def in_header_of_segment(stem: Path) -> None:
    flip(min(stem.parent.glob(f"{stem.name}.log.0*")), 5)


def in_first_record(stem: Path) -> None:
    flip(min(stem.parent.glob(f"{stem.name}.log.0*")), 4096 + 100)


DAMAGES: list[Callable[[Path], None]] = [in_header_of_file, gone, in_id, in_header_of_segment, in_first_record]


async def put_keys(http: aiohttp.ClientSession, cluster: Cluster, count: int = 40) -> None:
    for number in range(count):
        await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"v{number}")


async def check_keys(http: aiohttp.ClientSession, cluster: Cluster, count: int = 40) -> None:
    for number in range(count):
        async with http.get(f"{cluster.url}/v1/kv/k{number}") as answer:
            assert await answer.text() == f"v{number}"


def has_copy(copy_id: str) -> Callable[[Shard], bool]:
    return lambda shard: copy_id in (shard.primary.copy_id, *(copy.copy_id for copy in shard.replicas))


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_primary_whose_files_are_damaged_is_replaced_and_made_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        for each in ("s1", "s2", "s3"):
            await cluster.until(each, replicated)
        await put_keys(http, cluster)
        before = await cluster.shard("s1")
        await cluster.end("s1")
        damage(tmp_path / "s1" / "shard-s1")
        cluster.start_node("s1")
        lost = has_copy(before.primary.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        await check_keys(http, cluster)
        assert list((tmp_path / "s1").glob("shard-s1.db.damaged*"))


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_copy_whose_files_are_damaged_is_made_anew_from_its_primary(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        for each in ("s1", "s2", "s3"):
            await cluster.until(each, replicated)
        await put_keys(http, cluster)
        (copy,) = (await cluster.shard("s1")).replicas
        await cluster.end(copy.node)
        damage(tmp_path / copy.node / f"shard-s1.copy-{copy.node}")
        cluster.start_node(copy.node)
        lost = has_copy(copy.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        for each in ("s2", "s3"):
            await cluster.until(each, replicated)
        await cluster.end("s1")  # so the copy that was made anew is asked
        await check_keys(http, cluster)


async def test_a_home_whose_folder_is_empty_gets_its_shard_back_from_a_copy(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        for each in ("s1", "s2", "s3"):
            await cluster.until(each, replicated)
        await put_keys(http, cluster)
        before = await cluster.shard("s1")
        await cluster.end("s1")
        shutil.rmtree(tmp_path / "s1")
        cluster.start_node("s1")
        lost = has_copy(before.primary.copy_id)
        after = await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        assert after.store_id == before.store_id
        for each in ("s2", "s3"):
            await cluster.until(each, replicated)
        await check_keys(http, cluster)


async def test_a_damaged_primary_without_a_copy_in_sync_is_refused_and_its_files_are_left_as_they_are(
    tmp_path: Path,
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        for each in ("s1", "s2", "s3"):
            await cluster.until(each, replicated)
        await put_keys(http, cluster)
        (copy,) = (await cluster.shard("s1")).replicas
        await cluster.end(copy.node)
        await cluster.until("s1", lambda shard: not replicated(shard))
        await cluster.end("s1")
        in_header_of_file(tmp_path / "s1" / "shard-s1")
        before = (tmp_path / "s1" / "shard-s1.db").read_bytes()
        cluster.start_node("s1")
        with pytest.raises(KvError, match="cannot be opened as a store"):
            await cluster.until("s1", lambda shard: False)
        assert (tmp_path / "s1" / "shard-s1.db").read_bytes() == before
