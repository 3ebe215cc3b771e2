"""loadtest.chaos.copies: disks are lost and copies rot only where a good one is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from kvstore.placement.cluster_map import ClusterMap, Home, Node, Primary, Replica, Shard, map_of
from loadtest.chaos.cluster import ChaosCluster
from loadtest.chaos.copies import CopyFaults, files_of, flip, may_lose, may_rot
from loadtest.chaos.schedule import Step
from loadtest.chaos.summary import Fault
from loadtest.drivers.aio import Wire


def with_copies(state: str = "in-sync", replicas: int = 3) -> ClusterMap:
    """s1 on n1 with a copy on n2, s2 on n2 with copies on n1 and n3."""

    def home(shard_id: str, node: str, copies: list[str]) -> Home:
        replicas = [Replica(node=each, copy_id=f"{shard_id}-{each}", state=state, joined=1) for each in copies]  # type: ignore[arg-type]
        primary = Primary(node=node, copy_id=f"{shard_id}-{node}")
        shard = Shard(id=shard_id, store_id=shard_id, primary=primary, term=1, replicas=replicas)
        return Home(Node(id=node, url=f"http://{node}"), shard)

    homes = [home("s1", "n1", ["n2"]), home("s2", "n2", ["n1", "n3"])]
    return map_of(homes, cluster_id="c", epoch=1, partitions=2, owners=[0, 1], moves=[], replicas=replicas)


def test_a_disk_is_lost_only_where_each_of_its_shards_has_another_good_copy_in_sync() -> None:
    healthy = with_copies()
    assert all(may_lose(healthy, node, set()) for node in ("n1", "n2", "n3"))
    assert not may_lose(healthy, "n1", {"s1-n2"})
    assert may_lose(healthy, "n2", {"s2-n1"})
    assert not may_lose(healthy, "n2", {"s2-n1", "s2-n3"})
    joining = with_copies("joining")
    assert [may_lose(joining, node, set()) for node in ("n1", "n2", "n3")] == [False, False, True]


def test_a_copy_rots_only_beside_a_good_one_and_primaries_do_not() -> None:
    healthy = with_copies()
    assert may_rot(healthy, set()) == {
        ("s1", "n2", "s1-n2", "n1"), ("s2", "n1", "s2-n1", "n2"), ("s2", "n3", "s2-n3", "n2"),
    }  # fmt: skip
    assert may_rot(healthy, {"s1-n1", "s2-n2", "s2-n1"}) == {("s2", "n1", "s2-n1", "n3")}
    assert may_rot(with_copies("joining"), set()) == set()


def test_a_copy_that_is_about_to_go_again_is_none_that_others_may_be_spoilt_for() -> None:
    """There are to be two of each, and s2 has three while its copies change places."""
    two = with_copies(replicas=2)
    assert may_lose(two, "n2", set())
    assert not may_lose(two, "n2", {"s2-n1"})
    assert may_rot(two, {"s2-n1"}) == {("s1", "n2", "s1-n2", "n1"), ("s2", "n1", "s2-n1", "n2")}


class Known(ChaosCluster):
    """A cluster whose controller has that map; no process of it runs."""

    def __init__(self, folder: Path, cluster_map: ClusterMap) -> None:
        super().__init__(folder, 3, 1, None)
        self.map = cluster_map

    def members(self) -> set[str]:
        return {"router-0", *(f"shard-{node.id}" for node in self.map.nodes)}

    async def cluster_map(self) -> ClusterMap:
        return self.map


@pytest.fixture
async def faults(tmp_path: Path) -> AsyncIterator[tuple[Known, CopyFaults]]:
    cluster = Known(tmp_path, with_copies())
    cluster.data_dir.mkdir()
    for name in ("shard-s1.copy-n2.db", "shard-s2.copy-n1.db", "shard-s2.copy-n3.db"):
        (cluster.data_dir / name).write_bytes(b"rows")
    async with aiohttp.ClientSession() as http:
        yield cluster, CopyFaults(cluster, None, Wire(http, [], 1))


async def rotten(copies: CopyFaults) -> Fault:
    fault = Fault(0.0, 0.0, "rot", "file", [])
    await copies.rot(Step(0.0, 0.0, "rot", "file", 1), random.Random(1), fault)
    return fault


async def test_the_node_with_the_good_copy_is_left_alone_until_the_damaged_one_counts_no_more(
    faults: tuple[Known, CopyFaults],
) -> None:
    cluster, copies = faults
    assert "byte" in (await rotten(copies)).note
    (guarded,) = cluster.members() - copies.free()
    assert guarded in {"shard-n1", "shard-n2"}
    assert "left alone" in (await rotten(copies)).note, "one at a time"
    cluster.map = with_copies("joining")
    async with asyncio.timeout(60):
        while copies.free() != cluster.members():
            await asyncio.sleep(0.01)


async def test_a_copy_does_not_rot_while_the_node_with_the_good_one_is_away(faults: tuple[Known, CopyFaults]) -> None:
    cluster, copies = faults
    copies.busy = cluster.members
    assert "left alone" in (await rotten(copies)).note
    assert copies.spoilt == set()
    assert copies.free() == cluster.members()


def test_the_files_of_a_node_are_its_own_shards_and_its_copies_of_others(tmp_path: Path) -> None:
    own = ["shard-s1.db", "shard-s1.db-wal", "shard-s1.id", "shard-s1.log.1", "shard-s2.copy-s1.db"]
    for name in [*own, "shard-s1.copy-s2.db", "shard-s2.db", "shard-s10.db", "shard-s2.copy-s10.id"]:
        (tmp_path / name).touch()
    assert [path.name for path in files_of(tmp_path, "s1")] == own


def test_one_bit_of_what_was_written_is_changed(tmp_path: Path) -> None:
    path, before = tmp_path / "log", bytes(range(1, 100)) + b"\0" * 100
    path.write_bytes(before)
    at = flip(path, random.Random(1))
    differs = [
        number for number, (one, other) in enumerate(zip(before, path.read_bytes(), strict=True)) if one != other
    ]
    assert differs == [at]
    assert at < 99
    assert (before[at] ^ path.read_bytes()[at]).bit_count() == 1
