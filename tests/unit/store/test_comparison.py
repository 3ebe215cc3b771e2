"""The rows of copies, compared with the primary's: a real store on a real file, and copies in memory."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Set
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from kvstore.errors import DataCorrupt
from kvstore.placement.ring import partition_of
from kvstore.replication import digest_question
from kvstore.replication.session import Session
from kvstore.storage.engine import Digest, TryLater
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.rows import VALUE
from kvstore.store import comparison
from kvstore.store.unproved import ROUNDS_MAX
from tests.unit.store.harness import PARTITIONS
from tests.unit.store.store_with_copies import Primary, primary
from tests.unit.waiting import until

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
    monkeypatch.setattr(digest_question, "_ANSWER_S", 1.0)
    partition = partition_of(KEYS[7].encode(), PARTITIONS)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        for node in ("n2", "n3"):
            del _rows(one, node)[VALUE, KEYS[7]]
        compared, stats = one.store.replicas.comparison, one.store.tables.stats
        (wire,) = [wire for wire, session in zip(one.wires, one.sessions, strict=True) if _is_on(one, "n3", session)]
        copy, gate = one.copies["n3"], asyncio.Event()
        if is_connected:
            wire.gate = gate  # it is slow
        else:
            del one.copies["n3"]
            await wire.close()
            await until(lambda: compared._in_sync()["n3"] is None)
        await compared.round()
        assert (stats.compared_rounds, stats.copies_differed, compared.disputed) == (0, 0, frozenset())
        assert f"{PARTITIONS} of {PARTITIONS} partitions are not compared this time: the copy on node n3" in caplog.text
        gate.set()
        one.copies["n3"] = copy
        await until(lambda: compared._in_sync()["n3"] is not None)
        await compared.round()
        assert (stats.compared_rounds, stats.copies_differed, compared.disputed) == (1, 0, {partition})
        one.hold_up()
        await compared.round()
        assert (stats.compared_rounds, compared.disputed) == (1, {partition}), "it stays so until it is compared"


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
        beyond, there = await link.compare(number - 1, [1]), await link.compare(number, [1])
        assert beyond is not None
        assert there is not None
        assert (beyond.digest, beyond.failed) == (None, False)
        assert there.digest is not None


def _hold(one: Primary, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the file of that copy cannot be used; its log can."""

    async def held(partitions: Set[int]) -> NoReturn:
        raise TryLater("another program holds the file")

    monkeypatch.setattr(one.copies[node].engine, "digest", held)


async def _rounds(one: Primary, count: int) -> None:
    for _ in range(count):
        await one.store.replicas.comparison.round()


async def test_a_copy_that_takes_records_and_does_not_tell_what_it_has_is_named_and_stays_if_it_is_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2")
        with monkeypatch.context() as held:
            _hold(one, "n2", held)
            await _rounds(one, ROUNDS_MAX - 1)
            assert one.store.replicas.comparison.unproved == []
            await _rounds(one, 2)
            assert (await one.put("still").answer()).status == 201
            assert one.store.replicas.comparison.unproved == ["n2"]
            assert one.store.inspection.snapshot().unproved_copies == 1
            assert one.store.tables.may_answer(), "it is in sync, and not rebuilt"
        await _rounds(one, 1)
        assert one.store.replicas.comparison.unproved == []
        assert one.store.tables.stats.compared_rounds == 1


async def test_a_copy_that_does_not_tell_what_it_has_is_rebuilt_where_another_one_has_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        _hold(one, "n2", monkeypatch)
        await _rounds(one, ROUNDS_MAX - 1)
        assert not _are_told(one)
        await _rounds(one, 1)
        assert "For several rounds the primary was not told which rows" in await _told(one)
        await until(lambda: one.store.replicas.comparison._in_sync()["n2"] is None)
        assert one.store.replicas.comparison._in_sync()["n3"] is not None
        assert one.store.tables.stats.copies_differed == 0


async def test_a_copy_that_does_not_tell_and_falls_out_and_is_in_sync_again_within_a_round_is_looked_at_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No partition lacks its answer then: it was out of sync when the others told."""
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        _hold(one, "n2", monkeypatch)
        await _rounds(one, ROUNDS_MAX - 1)
        sender, digest, sleep = one.store.tables.sender, one.copies["n3"].engine.digest, one.environment.sleep
        assert sender is not None
        (other,) = [one.replica("n3", "in-sync", link.session.joined) for link in sender.shipping.links[1:]]
        is_out = False

        async def told_late(partitions: Set[int]) -> tuple[int, Digest]:
            nonlocal is_out
            await asyncio.sleep(0.05)  # n2 has told that it cannot
            await one.store.partitions.adopt(one.map(other))
            is_out = True
            return await digest(partitions)

        async def behind_the_last_partitions(seconds: float) -> None:
            nonlocal is_out
            if is_out and not seconds:
                is_out = False
                joining = one.replica("n2", "joining", one.epoch + 1)
                await one.store.partitions.adopt(one.map(joining, other))
                await until(lambda: [each.kind for each in sender.requests()] == ["in-sync"])
                synced = msgspec.structs.replace(joining, state="in-sync")
                await one.store.partitions.adopt(one.map(synced, other))
            await sleep(seconds)

        with monkeypatch.context() as patched:
            patched.setattr(one.copies["n3"].engine, "digest", told_late)
            patched.setattr(one.environment, "sleep", behind_the_last_partitions)
            await _rounds(one, 1)
        assert not _are_told(one)
        await _rounds(one, 1)
        assert "For several rounds the primary was not told which rows" in await _told(one)


async def test_a_copy_that_is_in_sync_only_since_the_last_partitions_were_compared_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2")
        await one.make_copy("n3")
        _hold(one, "n2", monkeypatch)
        await _rounds(one, ROUNDS_MAX - 1)
        sender, look = one.store.tables.sender, one.store.replicas.comparison._look
        assert sender is not None
        (other,) = [one.replica("n2", "in-sync", link.session.joined) for link in sender.shipping.links]

        async def then_n3_joins(partitions: range) -> set[int]:
            disputed = await look(partitions)
            joining = one.replica("n3", "joining", one.epoch + 1)
            await one.store.partitions.adopt(one.map(other, joining))
            await until(lambda: [each.kind for each in sender.requests()] == ["in-sync"])
            await one.store.partitions.adopt(one.map(other, msgspec.structs.replace(joining, state="in-sync")))
            return disputed

        with monkeypatch.context() as patched:
            patched.setattr(one.store.replicas.comparison, "_look", then_n3_joins)
            await _rounds(one, 1)
        await asyncio.sleep(0.05)
        assert not _are_told(one)
        assert one.store.replicas.comparison.unproved == ["n2"]
        await _rounds(one, 1)
        assert "For several rounds the primary was not told which rows" in await _told(one)


@pytest.mark.parametrize("other", ["is held, too", "differs"])
async def test_a_copy_that_does_not_tell_what_it_has_stays_where_no_other_one_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """One that differs may be right: the copy that does not tell would decide it."""
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        _hold(one, "n2", monkeypatch)
        if other == "differs":
            del _rows(one, "n3")[VALUE, KEYS[7]]
        else:
            _hold(one, "n3", monkeypatch)
        await _rounds(one, ROUNDS_MAX + 1)
        assert not _are_told(one)
        assert one.store.replicas.comparison.unproved == (["n2"] if other == "differs" else ["n2", "n3"])


async def test_a_copy_that_is_always_beyond_the_record_is_not_taken_for_one_that_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2", "n3")
        engine = one.store.tables.engine
        digest = engine.digest

        async def late(partitions: Set[int]) -> tuple[int, Digest]:
            found = await digest(partitions)
            number = found[0]
            await one.put("more").answer()
            await until(lambda: one.copies["n2"].engine.applied.position.number > number)
            return found

        monkeypatch.setattr(engine, "digest", late)
        await _rounds(one, ROUNDS_MAX)
        assert one.store.tables.stats.compared_rounds == 0
        assert one.store.replicas.comparison.unproved == []
        assert not _are_told(one)


async def test_a_round_that_lacks_an_answer_is_soon_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_RETRY_S", 0.0)
    async with primary(tmp_path) as one:
        await _with_rows(one, "n2")
        every_s, pauses, sleep = one.limits.compare_every_s, list[float](), one.environment.sleep
        held = monkeypatch.context()

        async def noted(seconds: float) -> None:
            if seconds < every_s / 100:
                await sleep(seconds)
                return
            pauses.append(seconds)
            if len(pauses) == 2:
                held.__exit__(None, None, None)
            elif len(pauses) == 3:
                await asyncio.Event().wait()

        monkeypatch.setattr(one.environment, "sleep", noted)
        _hold(one, "n2", held.__enter__())
        running = asyncio.create_task(one.store.replicas.comparison.run())
        await until(lambda: len(pauses) == 3)
        running.cancel()
        assert pauses == [every_s, every_s / 8, every_s]


def _are_told(one: Primary) -> bool:
    """Whether a copy was told that it is not to be used any more."""
    return any(task.done() and not task.cancelled() and task.exception() for task in one._tasks)
