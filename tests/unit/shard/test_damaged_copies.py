"""Copies whose files are damaged, on real files: another one takes their place, and they are rebuilt.

The nodes of most of these run in this process, with their controller; a node that serves is stopped, its files are
damaged, and it starts again.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import aiohttp
import msgspec
import pytest

from kvstore.environment import SYSTEM
from kvstore.errors import DataCorrupt, KvError, is_damage
from kvstore.placement.cluster_map import ClusterMap, Primary, Shard
from kvstore.placement.ring import partition_of
from kvstore.replication import digest_question
from kvstore.replication.copy import StoreCopy
from kvstore.replication.promise import Identity, read_identity, write_identity
from kvstore.shard.beats import Beats
from kvstore.shard.damaged import until_damaged
from kvstore.storage.disk import OsDisk, OsFile
from kvstore.storage.engine import Application
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.store.copy_place import CopyFiles
from kvstore.store.damaged_files import salvage, set_damaged_aside
from kvstore.store.opening import Opened, untold
from tests.unit.shard import test_node_failover
from tests.unit.shard.resident_copy import LIMITS, PARTITIONS, STORE_ID, folder_of, named
from tests.unit.shard.test_node_failover import PATIENCE_S, Cluster, cluster_in, replicated


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


def in_clock(stem: Path) -> None:
    """Another number, and the checksum as it was."""
    with closing(sqlite3.connect(stem.with_name(f"{stem.name}.db"))) as connection:
        connection.execute("UPDATE clock SET version = version + 1")
        connection.commit()


def in_format(stem: Path) -> None:
    with closing(sqlite3.connect(stem.with_name(f"{stem.name}.db"))) as connection:
        connection.execute("UPDATE meta SET value = '5' WHERE name = 'format'")
        connection.commit()


def without_id(stem: Path) -> None:
    stem.with_name(f"{stem.name}.id").unlink()


def in_note(stem: Path) -> None:
    for offset in (0, 4096):
        flip(stem.with_name(f"{stem.name}.log.note"), offset)


def _of_another_store(stem: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in stem.parent.glob(f"{stem.name}.{pattern}"):
            path.unlink()
        for path in (stem.parent / "another").glob(f"{stem.name}.{pattern}"):
            shutil.copy(path, stem.parent)


def with_the_log_of_another_store(stem: Path) -> None:
    _of_another_store(stem, "log.*")


def with_the_file_of_another_store(stem: Path) -> None:
    _of_another_store(stem, "db", "db-wal", "db-shm")


def with_the_id_of_another_store(stem: Path) -> None:
    _of_another_store(stem, "id")


DAMAGES: list[Callable[[Path], None]] = [
    in_header_of_file, gone, in_clock, in_format, in_id, without_id, in_header_of_segment, in_first_record, in_note,
    with_the_log_of_another_store, with_the_file_of_another_store, with_the_id_of_another_store,
]  # fmt: skip


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
    often = msgspec.structs.replace(test_node_failover.LIMITS, compare_every_s=0.2)
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


# --- one folder


def a_map(copy_id: str, epoch: int = 3) -> ClusterMap:
    """Shard s1 of node s1, whose copy has that id; a copy in sync lies on node s2."""
    found = named("another")
    shard = msgspec.structs.replace(found.shards[0], primary=Primary(node="s1", copy_id=copy_id), term=1)
    return msgspec.structs.replace(found, epoch=epoch, shards=[shard])


def _row(number: int) -> Row:
    key = f"k{number}"
    return Row(VALUE, key, partition_of(key.encode(), PARTITIONS), 1, 1, 0, b"v")


async def a_store_with_copies(path: Path, store_id: str = STORE_ID) -> str:
    """The home of shard s1, with some records in log and file, and the map that names its copy; its copy's id."""
    files = await folder_of(path, "s1").make_copy("s1", store_id, PARTITIONS)
    copy, rows = files.copy, [_row(number) for number in range(50)]
    copy_id = copy.identity.copy_id
    encoded = msgspec.json.encode(a_map(copy_id))
    copy.log.append(CommitRecord(Clock(1, 1), rows, encoded).encode())
    copy.log.append(CommitRecord(Clock(2, 2), []).encode())
    copy.log.sync()
    await copy.engine.apply(Application(rows, copy.log.last, Clock(2, 2), encoded))
    copy.log.append(CommitRecord(Clock(3, 3), []).encode())
    copy.log.sync()
    copy.log.note_durable()
    await files.close()
    identity = read_identity(OsDisk(), path, "shard-s1")
    assert identity is not None
    write_identity(OsDisk(), path, "shard-s1", identity._replace(promised=2, filling=False))
    return copy_id


@pytest.mark.parametrize("damage", DAMAGES)
async def test_each_kind_of_damage_is_found_at_the_opening_and_all_that_was_there_is_kept(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    copy_id = await a_store_with_copies(tmp_path)
    await a_store_with_copies(tmp_path / "another", "another-store")
    damage(tmp_path / "shard-s1")
    there = {path.name: path.read_bytes().rstrip(b"\0") for path in tmp_path.glob("shard-s1.*")}
    folder = folder_of(tmp_path, "s1")
    with pytest.raises(KvError) as found:
        await folder.open("s1", PARTITIONS, untold)
    assert is_damage(found.value)
    salvaged = await folder.salvage("s1", a_map(copy_id, 2))
    assert salvaged is not None
    knows_id = damage not in (in_id, without_id, with_the_id_of_another_store)
    assert (salvaged.store_id, salvaged.copy_id) == (STORE_ID, copy_id if knows_id else "")
    files = await folder.rebuild("s1", salvaged, PARTITIONS)
    assert files.copy.is_filling
    assert files.copy.identity.copy_id != copy_id
    assert files.copy.identity.promised == (2 if knows_id else 0)
    assert files.copy.log.last.number == 0
    await files.close()
    kept = {path.name: path.read_bytes().rstrip(b"\0") for path in tmp_path.glob("shard-s1.db.damaged*")}
    for name in set(there) - {"shard-s1.lock", "shard-s1.db-wal", "shard-s1.db-shm"}:
        aside = "shard-s1.db.damaged" + name.removeprefix("shard-s1").removeprefix(".db")
        assert aside in kept
        if name not in ("shard-s1.db", "shard-s1.log.note"):  # which an opening may add to before it finds out
            assert kept[aside] == there[name], name


async def test_damage_to_a_row_of_a_copy_counts_only_while_its_primary_is_heard(tmp_path: Path) -> None:
    await a_store_with_copies(tmp_path)
    with closing(sqlite3.connect(tmp_path / "shard-s1.db")) as connection:
        connection.execute("UPDATE rows SET body = 'w' WHERE key = 'k3'")
        connection.commit()
    files = await folder_of(tmp_path, "s1").open("s1", PARTITIONS, untold)
    assert isinstance(files, CopyFiles)
    files.copy.lease.heard_at -= 1000
    verifying = asyncio.create_task(until_damaged(files.copy, SYSTEM, LIMITS))
    await asyncio.wait([verifying], timeout=1.5)
    assert not verifying.done()
    patient = asyncio.create_task(_heard_again_and_again(files.copy))
    with pytest.raises(DataCorrupt, match="k3"):
        await asyncio.wait_for(verifying, PATIENCE_S)
    patient.cancel()
    await files.close()


async def test_a_copy_that_has_nothing_to_apply_is_examined_before_it_has_to_open_a_term(tmp_path: Path) -> None:
    await a_store_with_copies(tmp_path)
    files = await folder_of(tmp_path, "s1").open("s1", PARTITIONS, untold)
    assert isinstance(files, CopyFiles)
    assert not files.copy.own_engine.is_examined
    verifying = asyncio.create_task(until_damaged(files.copy, SYSTEM, LIMITS))
    async with asyncio.timeout(PATIENCE_S):
        while not files.copy.own_engine.is_examined:
            await asyncio.sleep(0.01)
    verifying.cancel()
    await asyncio.gather(verifying, return_exceptions=True)
    await files.close()


async def _heard_again_and_again(copy: StoreCopy) -> None:
    while True:
        copy.lease.hear()
        await asyncio.sleep(0.01)


async def test_files_without_another_copy_by_any_map_are_refused_as_with_one_copy(tmp_path: Path) -> None:
    await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    folder = folder_of(tmp_path, "s1")
    alone = msgspec.structs.replace(named(None), epoch=9)
    assert await folder.salvage("s1", alone) is None
    assert await folder.salvage("s1", None) is not None, "a record of its log has a map"


async def test_a_map_that_only_the_log_of_another_copy_here_has_says_that_there_are_copies(tmp_path: Path) -> None:
    """What a copy has is applied late, and the log of the damaged store may be released further."""
    await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    found = salvage(tmp_path / "shard-s9.db", "s1", "s1", None, [tmp_path / "shard-s1.db"])
    assert found is not None
    assert found.store_id == STORE_ID


@pytest.mark.parametrize("broken_off_at", range(12))
async def test_a_store_that_no_map_names_is_set_aside_whole_after_a_crash_at_any_line(
    tmp_path: Path, broken_off_at: int
) -> None:
    """As one that a node made because its files were lost: nothing here says that another copy could take its place."""
    folder = folder_of(tmp_path, "s1")
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, Opened)
    await opened.close()
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    with suppress(OSError):
        fresh = Identity(STORE_ID, "fresh", 2, filling=True)
        set_damaged_aside(BrokenOff(broken_off_at), tmp_path, "shard-s1", fresh)
    again = await folder.open("s1", PARTITIONS, untold)
    if isinstance(again, Opened):  # as before
        assert again.engine.identity == opened.engine.identity
    else:
        assert again.copy.identity.copy_id == "fresh"
        kept = {name.replace("shard-s1.db", "shard-s1").replace("shard-s1", "shard-s1.db.damaged") for name in names}
        assert kept <= {path.name for path in tmp_path.iterdir()}
        assert (tmp_path / "shard-s1.db.damaged.id").read_bytes() == names["shard-s1.id"]
        assert not list(tmp_path.glob("*.begun"))
    await again.close()


@pytest.mark.parametrize("broken_off_at", range(12))
async def test_a_crash_while_damaged_files_are_set_aside_never_leaves_what_is_served(
    tmp_path: Path, broken_off_at: int
) -> None:
    copy_id = await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    disk = BrokenOff(broken_off_at)
    with suppress(OSError):
        set_damaged_aside(disk, tmp_path, "shard-s1", Identity(STORE_ID, "fresh", 2, filling=True))
    folder = folder_of(tmp_path, "s1")
    found: KvError | None = None
    try:
        opened = await folder.open("s1", PARTITIONS, untold)
    except KvError as error:
        found = error
    if found is not None:
        assert is_damage(found)
        return
    if isinstance(opened, CopyFiles):
        assert opened.copy.identity.copy_id == "fresh"
        assert opened.copy.is_filling
    else:
        assert opened.engine.identity.store_id != STORE_ID, "a new store, which the cluster refuses"
        assert opened.copy_file is not None
        assert opened.copy_file.identity.copy_id != copy_id
    await opened.close()


class BrokenOff(OsDisk):
    """The process dies at the call of that number that changes a name or makes a file."""

    def __init__(self, at: int) -> None:
        self._left = at

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise OSError(5, "the process dies here")

    def rename(self, old: Path, new: Path) -> None:
        self._count()
        super().rename(old, new)

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> OsFile:
        if create:
            self._count()
        return super().open(path, create=create, write=write)
