"""Copies whose files are damaged, on real files: another one takes their place, and they are rebuilt.

The nodes run in this process, with their controller; a node that serves is stopped, its files are damaged, and it
starts again.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path

import aiohttp
import msgspec
import pytest

from kvstore.errors import KvError
from kvstore.placement.cluster_map import Shard
from kvstore.replication import digest_question
from kvstore.shard.beats import Beats
from tests.unit.shard import test_node_failover
from tests.unit.shard.damage import flip, in_first_record, in_header_of_file, in_id
from tests.unit.shard.test_node_failover import PATIENCE_S, Cluster, cluster_in, replicated


async def put_keys(http: aiohttp.ClientSession, cluster: Cluster, count: int = 40) -> None:
    for number in range(count):
        await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"v{number}")


async def check_keys(http: aiohttp.ClientSession, cluster: Cluster, count: int = 40) -> None:
    for number in range(count):
        async with http.get(f"{cluster.url}/v1/kv/k{number}") as answer:
            assert await answer.text() == f"v{number}"


async def until_rows_are_in(path: Path) -> None:
    """The file follows the log in bulk."""
    async with asyncio.timeout(60):
        while True:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                if connection.execute("SELECT 1 FROM rows WHERE kind = 'value' LIMIT 1").fetchone():
                    return
            await asyncio.sleep(0.02)


def has_copy(copy_id: str) -> Callable[[Shard], bool]:
    return lambda shard: copy_id in (shard.primary.copy_id, *(copy.copy_id for copy in shard.replicas))


@pytest.mark.parametrize("damage", [in_header_of_file, in_id])
async def test_a_primary_whose_files_are_damaged_is_replaced_and_rebuilt(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await put_keys(http, cluster)
        before = await cluster.shard("s1")
        await cluster.end("s1")
        damage(tmp_path / "s1" / "shard-s1")
        cluster.start_node("s1")
        lost = has_copy(before.primary.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        await check_keys(http, cluster)
        assert list((tmp_path / "s1").glob("shard-s1.db.damaged*"))
        await until_told(http, cluster, "s1")


async def until_told(http: aiohttp.ClientSession, cluster: Cluster, node: str) -> None:
    """That the copy was damaged, and rebuilt."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"{cluster.url}/v1/changes") as answer:
                found = [each for each in (await answer.json())["items"] if each["kind"] == "rebuild"]
            if found:
                break
            await asyncio.sleep(0.05)
    assert (found[0]["shard"], found[0]["to"], found[0]["state"]) == ("s1", node, "done")
    assert "rebuilt" in found[0]["detail"]
    async with http.get(f"http://{cluster.config.controllers[0].listen}/metrics") as answer:
        assert "kvstore_copies_rebuilt_total 1.0" in await answer.text()


async def test_a_copy_whose_log_is_damaged_is_rebuilt_from_its_primary(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await put_keys(http, cluster)
        (copy,) = (await cluster.shard("s1")).replicas
        await cluster.end(copy.node)
        in_first_record(tmp_path / copy.node / f"shard-s1.copy-{copy.node}")
        cluster.start_node(copy.node)
        lost = has_copy(copy.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        for each in ("s2", "s3"):
            await cluster.until(each, replicated)
        await cluster.end("s1")  # so the copy that was rebuilt is asked
        await check_keys(http, cluster)


async def test_damage_to_a_copy_that_was_taken_out_while_its_node_was_away_is_told_before_it_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map that the node finds at its start allows the rebuilding at once, and its first beat is late."""
    beat = Beats.run

    async def late(beats: Beats) -> None:
        await asyncio.sleep(1.0)
        await beat(beats)

    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        (copy,) = (await cluster.shard("s1")).replicas
        await cluster.end(copy.node)
        await cluster.until("s1", lambda shard: all(each.state != "in-sync" for each in shard.replicas))
        in_id(tmp_path / copy.node / f"shard-s1.copy-{copy.node}")
        monkeypatch.setattr(Beats, "run", late)
        cluster.start_node(copy.node)
        await until_told(http, cluster, copy.node)


async def test_a_copy_that_verifies_and_differs_is_found_by_comparison_set_aside_and_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = msgspec.structs.replace(test_node_failover.LIMITS, compare_every_s=0.5)
    monkeypatch.setattr(test_node_failover, "LIMITS", often)
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await put_keys(http, cluster)
        (copy,) = (await cluster.shard("s1")).replicas
        stem = tmp_path / copy.node / f"shard-s1.copy-{copy.node}"
        await until_rows_are_in(Path(f"{stem}.db"))
        await cluster.end(copy.node)
        with closing(sqlite3.connect(f"{stem}.db")) as connection:
            assert connection.execute("DELETE FROM rows WHERE kind = 'value'").rowcount
            connection.commit()
        cluster.start_node(copy.node)
        lost = has_copy(copy.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        assert list(stem.parent.glob("shard-s1.copy-*.db.damaged"))
        for each in ("s2", "s3"):
            await cluster.until(each, replicated)
        await cluster.end("s1")  # so the copy that was rebuilt is asked
        await check_keys(http, cluster)


async def test_a_copy_in_sync_whose_file_cannot_be_used_and_whose_log_can_is_told_to_people_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the only one beside the primary's, so it stays."""
    monkeypatch.setattr(digest_question, "_ANSWER_S", 1.0)
    often = msgspec.structs.replace(test_node_failover.LIMITS, compare_every_s=0.2, verify_share=1.0)
    monkeypatch.setattr(test_node_failover, "LIMITS", often)
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        (copy,) = (await cluster.shard("s1")).replicas
        path = tmp_path / copy.node / f"shard-s1.copy-{copy.node}.db"
        with closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_S)) as another_program:
            another_program.execute("BEGIN IMMEDIATE")
            await put_keys(http, cluster)
            await until_advised(http, cluster, f"The copy of shard s1 on node {copy.node} takes records, and did not")
            assert await cluster.shard("s1") == await cluster.until("s1", replicated)
        await until_advised(http, cluster, "All is well")
        assert has_copy(copy.copy_id)(await cluster.shard("s1"))


def in_a_row(stem: Path) -> None:
    """In the value of a key, at a place that no opening looks at."""
    path = stem.with_name(f"{stem.name}.db")
    place = path.read_bytes().find(b"value-of-")
    assert place > 0
    flip(path, place)


@pytest.mark.parametrize("is_primary", [True, False])
async def test_a_row_that_the_verification_finds_damaged_costs_nothing_where_there_is_a_copy(
    tmp_path: Path, is_primary: bool
) -> None:
    """A primary hands its shard on; a copy is taken out. Both are rebuilt."""
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        before = await cluster.shard("s1")
        for number in range(40):
            await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"value-of-{number}")
        found = before.primary if is_primary else before.replicas[0]
        stem = tmp_path / found.node / ("shard-s1" if is_primary else f"shard-s1.copy-{found.node}")
        async with asyncio.timeout(PATIENCE_S):
            while not any(b"value-of-" in path.read_bytes() for path in stem.parent.glob(f"{stem.name}.db*")):
                await asyncio.sleep(0.05)  # a copy applies what it has a moment later
        await cluster.end(found.node)
        in_a_row(stem)
        cluster.start_node(found.node)
        damaged = has_copy(found.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not damaged(shard))
        for number in range(40):
            async with http.get(f"{cluster.url}/v1/kv/k{number}") as answer:
                assert await answer.text() == f"value-of-{number}"


async def test_a_row_of_a_primary_that_was_served_before_any_map_named_a_copy_costs_its_process_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster is new: each store was served first without a map, and got its copies later."""
    often = msgspec.structs.replace(test_node_failover.LIMITS, verify_every_s=0.5)
    monkeypatch.setattr(test_node_failover, "LIMITS", often)
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        before = await cluster.shard("s1")
        assert before.primary.node == "s1"
        await put_keys(http, cluster)
        path = tmp_path / "s1" / "shard-s1.db"
        await until_rows_are_in(path)
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("UPDATE rows SET version = version + 1 WHERE kind = 'value'").rowcount
            connection.commit()
        damaged = has_copy(before.primary.copy_id)
        await cluster.until("s1", lambda shard: replicated(shard) and not damaged(shard))
        assert list(tmp_path.glob("s1/shard-s1.db.damaged*"))
        await check_keys(http, cluster)


def in_sync_copies(count: int) -> Callable[[Shard], bool]:
    return lambda shard: [copy.state for copy in shard.replicas] == ["in-sync"] * count


async def test_a_damaged_row_that_a_copy_is_to_be_filled_with_is_told_and_the_primary_hands_its_shard_on(
    tmp_path: Path,
) -> None:
    """The background verification would find it within a day; until then that copy could not be filled."""
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await http.patch(f"{cluster.url}/v1/cluster", json={"replicas": 3})
        before = await cluster.until("s1", in_sync_copies(2))
        await put_keys(http, cluster)
        path = tmp_path / "s1" / "shard-s1.db"
        await until_rows_are_in(path)
        async with asyncio.timeout(PATIENCE_S):
            for number in count():  # until the first records are in the log no more
                if not list(path.parent.glob("shard-s1.log.000001")):
                    break
                await http.put(f"{cluster.url}/v1/kv/large{number % 10}", data=bytes(200_000))
        await cluster.end("s3")
        await cluster.until("s1", lambda shard: not in_sync_copies(2)(shard))
        shutil.rmtree(tmp_path / "s3")
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("UPDATE rows SET version = version + 1 WHERE kind = 'value'").rowcount
            connection.commit()
        cluster.start_node("s3")
        damaged = has_copy(before.primary.copy_id)
        await cluster.until("s1", lambda shard: in_sync_copies(2)(shard) and not damaged(shard))
        await check_keys(http, cluster)


async def test_a_home_whose_folder_is_empty_gets_its_shard_back_from_a_copy(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
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
        await cluster.until_replicated()
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


async def test_a_damaged_guest_without_a_copy_in_sync_waits_and_a_person_can_go_on_with_the_homes_older_copy(
    tmp_path: Path,
) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await put_keys(http, cluster)
        (guest,) = (await cluster.shard("s1")).replicas
        await cluster.end("s1")
        await cluster.until("s1", lambda shard: shard.primary.node == guest.node and not replicated(shard))
        await cluster.end(guest.node)
        files = tmp_path / guest.node / f"shard-s1.copy-{guest.node}.db"
        in_header_of_file(files.with_suffix(""))
        before = files.read_bytes()
        cluster.start_node(guest.node)
        await until_advised(http, cluster, "Node s1 may have an older one to go on with: start it")
        cluster.start_node("s1")
        await until_advised(http, cluster, "`kvstore shard promote s1 --to s1 --accept-loss` goes on")
        assert files.read_bytes() == before
        accepted = {"to": "s1", "accept_loss": True, "confirm": "s1"}
        await http.post(f"{cluster.url}/v1/shards/s1/promote", json=accepted)
        lost = has_copy(guest.copy_id)
        after = await cluster.until("s1", lambda shard: replicated(shard) and not lost(shard))
        assert after.primary.node == "s1"
        await check_keys(http, cluster)
        assert files.with_suffix(".db.damaged").read_bytes() == before


async def until_advised(http: aiohttp.ClientSession, cluster: Cluster, words: str) -> None:
    """What `advice` of the router says has these words."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"{cluster.url}/v1/cluster") as answer:
                if words in (await answer.json())["advice"]:
                    return
            await asyncio.sleep(0.1)
