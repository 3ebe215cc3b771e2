"""The rows of copies, compared with the primary's: a real store on a real file, and copies in memory."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.errors import DataCorrupt
from kvstore.placement.ring import partition_of
from kvstore.replication import digest_question
from kvstore.replication.session import Session
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.rows import VALUE
from tests.unit.store.harness import PARTITIONS, until
from tests.unit.store.test_store_with_copies import Primary, primary

KEYS = [f"key-{number}" for number in range(50)]


async def _with_rows(one: Primary, *nodes: str) -> None:
    """These copies are in sync, and have the rows of all keys in their files."""
    for node in nodes:
        await one.make_copy(node)
    await one.in_sync(*nodes)
    for key in KEYS:
        await one.put(key).answer()
    for node in nodes:
        await until(lambda node=node: len(_rows(one, node)) == len(KEYS))


def _rows(one: Primary, node: str) -> dict[tuple[str, str], object]:
    engine = one.copies[node].engine
    assert isinstance(engine, MemoryEngine)
    return engine._rows  # type: ignore[return-value]


async def _told(one: Primary) -> str:
    """What a copy that is not to be used any more was told."""
    await until(lambda: any(task.done() and not task.cancelled() and task.exception() for task in one._tasks))
    (ended,) = [task for task in one._tasks if task.done() and not task.cancelled() and task.exception()]
    one._tasks.remove(ended)
    error = ended.exception()
    assert isinstance(error, DataCorrupt)
    return error.detail


async def test_copies_are_compared_as_of_one_record_while_writes_go_on(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                for key in KEYS[:10]:
                    await one.put(key).answer()

        writing = asyncio.create_task(write())
        for _ in range(5):
            await one.store.replicas.comparison.round()
        stop.set()
        await writing
        stats = one.store.tables.stats
        assert (stats.compared_rounds, stats.copies_differed) == (5, 0)
        assert one.store.replicas.comparison.disputed == frozenset()


async def test_a_copy_whose_rows_differ_though_they_verify_is_told_so_and_no_other(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        del _rows(one, "n3")[VALUE, KEYS[7]]
        await one.store.replicas.comparison.round()
        partition = partition_of(KEYS[7].encode(), PARTITIONS)
        assert f"Partition {partition} was not what it is at the primary" in await _told(one)
        assert one.store.tables.stats.copies_differed == 1
        assert one.store.tables.verification.damage == ""


async def test_where_all_copies_agree_and_not_with_the_primary_nothing_is_changed_but_told(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        for node in ("n2", "n3"):
            del _rows(one, node)[VALUE, KEYS[7]]
        await one.store.replicas.comparison.round()
        partition = partition_of(KEYS[7].encode(), PARTITIONS)
        assert one.store.replicas.comparison.disputed == {partition}
        stats = one.store.inspection.snapshot()
        assert (stats.disputed_partitions, stats.copies_differed) == (1, 0)
        assert (await one.put("still").answer()).status == 201


@pytest.mark.parametrize("is_connected", [True, False])
async def test_of_two_copies_that_agree_and_not_with_the_primary_none_is_judged_before_the_other_has_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_connected: bool
) -> None:
    """Alone it looks like a copy that differs, which is rebuilt."""
    monkeypatch.setattr(digest_question, "_ANSWER_S", 0.05)
    partition = partition_of(KEYS[7].encode(), PARTITIONS)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        for node in ("n2", "n3"):
            del _rows(one, node)[VALUE, KEYS[7]]
        comparison, stats = one.store.replicas.comparison, one.store.tables.stats
        (wire,) = [wire for wire, session in zip(one.wires, one.sessions, strict=True) if _is_on(one, "n3", session)]
        copy, gate = one.copies["n3"], asyncio.Event()
        if is_connected:
            wire.gate = gate  # it is slow
        else:
            del one.copies["n3"]
            await wire.close()
            await until(lambda: comparison._in_sync()["n3"] is None)
        await comparison.round()
        assert (stats.compared_rounds, stats.copies_differed, comparison.disputed) == (0, 0, frozenset())
        assert f"{PARTITIONS} of {PARTITIONS} partitions are not compared this time: the copy on node n3" in caplog.text
        gate.set()
        one.copies["n3"] = copy
        await until(lambda: comparison._in_sync()["n3"] is not None)
        await comparison.round()
        assert (stats.compared_rounds, stats.copies_differed, comparison.disputed) == (1, 0, {partition})
        one.hold_up()
        await comparison.round()
        assert (stats.compared_rounds, comparison.disputed) == (1, {partition}), "it stays so until it is compared"


def _is_on(one: Primary, node: str, session: Session) -> bool:
    return session.copy_id == one.copies[node].following.copy_id


async def test_where_the_primarys_own_rows_do_not_verify_it_is_the_one_that_is_damaged(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2")
        await one.store.applier.flush()
        with closing(sqlite3.connect(one.path)) as connection:
            connection.execute("UPDATE rows SET checksum = checksum + 1 WHERE key = ?", (KEYS[7],))
            connection.commit()
        await one.store.replicas.comparison.round()
        assert "does not match its checksum" in one.store.tables.verification.damage
        assert one.store.tables.stats.copies_differed == 0


async def test_a_copy_that_is_beyond_the_record_tells_nothing(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2")
        sender = one.store.tables.sender
        assert sender is not None
        (link,) = sender.links.in_sync(sender.shipping.links)
        number = one.copies["n2"].engine.applied.position.number
        assert await link.compare(number - 1, [1]) is None
        assert await link.compare(number, [1]) is not None
