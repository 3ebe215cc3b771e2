"""A file of an older format is brought to the present one at opening, with all that it holds, or left as it is."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import ForeignData, KvError, LogDamaged
from kvstore.model import Attempt, IdempotencyKey
from kvstore.placement.cluster_map import ClusterMap, Move, at_home, map_of
from kvstore.protocol import Get, Outcome, Put, ResolveTxn, Scan
from kvstore.storage import schema, sqlite_file
from kvstore.storage.engine import Engine
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.storage.segments import BEGINNING
from kvstore.store.opening import open_files
from tests.unit.storage.hands import PARTITIONS, partition
from tests.unit.storage.old_formats import FENCES, OLD_CLOCK, OLD_ROWS, STORE_ID, write_old
from tests.unit.store.conftest import open_store
from tests.unit.store.harness import Sink, ask, asked, code, opened
from tests.unit.store.real_files import killed
from tests.unit.waiting import until

OLDER = pytest.mark.parametrize("older", [1, 2, 3])
BIG_ROWS = 1500  # more than SQLite keeps in memory before it writes pages of an unfinished transaction


def cluster_map() -> ClusterMap:
    members = [at_home(shard, f"http://{shard}", shard) for shard in ("s1", "s2")]
    moves = [Move(id=move, source="s1", to="s2", partitions=of) for move, of in FENCES.items()]
    return map_of(members, cluster_id="c", epoch=9, partitions=PARTITIONS, owners=[0] * PARTITIONS, moves=moves)


MAP = msgspec.json.encode(cluster_map())


@asynccontextmanager
async def engine_of(path: Path) -> AsyncIterator[Engine]:
    """The engine that opening gives; all is closed at the end."""
    limits = Limits(log_segment_bytes=1 << 16)
    engine, log, lock_fd, *_ = await open_files(path, "s1", PARTITIONS, limits, SYSTEM)
    try:
        yield engine
    finally:
        await engine.close()
        log.close()
        assert lock_fd is not None
        os.close(lock_fd)


async def must_hold_everything(path: Path, older: int, big_rows: int = 0) -> None:
    """Open the file, and compare each row, the clock, the map and the freezes with what was written."""
    async with engine_of(path) as engine:
        assert engine.identity == (STORE_ID, "c", "s1", PARTITIONS)
        attempts_floor = 77 if older > 1 else 0
        assert engine.applied.clock == Clock(*OLD_CLOCK[:5], attempts_floor)
        assert engine.applied.cluster_map == MAP
        fences = FENCES if older == 3 else {}
        assert engine.applied.freezes == {move: frozenset(partitions) for move, partitions in fences.items()}
        assert (engine.applied.position, engine.applied.drops) == (BEGINNING, {})
        for kind, key, sequence, version, expires_at_ms, body, intent, home in OLD_ROWS[older]:
            (row,) = await engine.read([(kind, key)])
            assert row == Row(kind, key, partition(home or key), sequence, version, expires_at_ms or 0, body, intent)
        for row in await engine.read([(VALUE, f"big-{number}") for number in range(big_rows)]):
            assert isinstance(row, Row)
        assert (await engine.digest(frozenset(range(PARTITIONS))))[1].rows == len(OLD_ROWS[older]) - 1 + big_rows
        assert (await engine.verify(None)).faults == []


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE sql IS NOT NULL")}


@OLDER
async def test_a_file_of_an_older_format_is_opened_with_all_that_it_holds(tmp_path: Path, older: int) -> None:
    path = tmp_path / "store.db"
    write_old(path, older, MAP)
    await must_hold_everything(path, older)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone() == ("4",)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    new = tmp_path / "new.db"
    sqlite_file.create_file(new, {})
    assert tables(path) == tables(new), "nothing of the old layout is left, and nothing of the new one is missing"


@OLDER
async def test_the_change_of_format_is_done_once(tmp_path: Path, older: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    write_old(path, older, MAP)
    await must_hold_everything(path, older)

    def convert(*_: object) -> None:
        raise AssertionError("it is of the present format")

    monkeypatch.setattr(schema, "convert", convert)
    await must_hold_everything(path, older)


async def test_a_store_on_a_file_of_format_1_goes_on_where_the_old_program_ended(tmp_path: Path) -> None:
    write_old(tmp_path / "store.db", 1)
    async with opened(tmp_path) as store:
        page = await store.scans.scan(Scan(1, "", "", 10, True))
        assert [item[:3] for item in page.items] == [("a", 11, b"1"), ("b", 12, b"\xff" * 3000), ("later", 15, b"x")]
        assert (await ask(store, Put(1, "name", b"x"))).status == 423, "the lease stands"
        written = await ask(store, Put(2, "gone", b"back"))
        assert (written.status, written.version) == (201, OLD_CLOCK[0] + 1), "the clock went on"
        sink = Sink()
        store.get(Get(3, "a"), sink)
        assert (await sink.answer()).value == b"1"


async def test_intents_decisions_and_replies_of_a_file_of_format_3_are_in_force(tmp_path: Path) -> None:
    write_old(tmp_path / "store.db", 3)
    async with opened(tmp_path) as store:
        blocked = await store.inspection.explain("held")
        assert "12c-router01" in str(blocked["intent"])
        decided = asked(store, ResolveTxn(1, "a", Attempt(200, 200, "router01")))
        await until(lambda: decided.replies)
        (outcome,) = decided.replies
        assert isinstance(outcome, Outcome)
        assert (outcome.state, outcome.version) == ("committed", 17)
        duplicate = await ask(store, Put(2, "a", b"1", once=IdempotencyKey("my-key", "d")))
        assert (duplicate.status, duplicate.version) == (201, 11), "the reply that was kept"


async def test_a_partition_that_was_fenced_in_format_3_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    write_old(path, 3, MAP)
    fenced = {at for partitions in FENCES.values() for at in partitions}
    inside = next(key for key in map(str, range(10_000)) if partition(key) in fenced)
    outside = next(key for key in map(str, range(10_000)) if partition(key) not in fenced)
    fatal: list[BaseException] = []
    store = await open_store(path, fatal)
    try:
        assert (await ask(store, Put(1, outside, b"x"))).status == 201
        refused = await ask(store, Put(2, inside, b"x"))
        assert code(refused) == "wrong-owner"
    finally:
        await store.close()
    assert fatal == []


# --- crashes ----------------------------------------------------------------------------------------------------------


@OLDER
async def test_a_crash_anywhere_in_a_conversion_loses_nothing(
    tmp_path: Path, older: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "live" / "store.db"
    write_old(path, older, MAP, BIG_ROWS)
    left: dict[str, Path] = {}

    def crash(point: str) -> None:
        """What kill -9 would leave here is kept."""
        left[point] = killed(path, tmp_path / point)

    real_convert, real_convert_file, real_run = schema.convert, sqlite_file.convert_file, schema._run
    scripts = 0

    def convert(*args: Any) -> None:
        crash("begun")
        real_convert(*args)
        crash("not-committed")

    def run(*args: Any) -> None:
        nonlocal scripts
        real_run(*args)
        scripts += 1
        crash(f"after-script-{scripts}")

    def convert_file(*args: Any) -> None:
        crash("log-made")
        real_convert_file(*args)
        crash("committed")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "convert", convert)
        patch.setattr(schema, "_run", run)
        patch.setattr(sqlite_file, "convert_file", convert_file)
        await must_hold_everything(path, older, BIG_ROWS)
    points = {"log-made", "begun", "not-committed", "committed"} | {f"after-script-{n}" for n in range(1, scripts + 1)}
    assert set(left) == points
    if older == 1:
        spilled = Path(f"{left['not-committed']}-wal").stat().st_size
        assert spilled > 1 << 20, "the crash is in the middle: SQLite had written most of the pages"
    for point, copy in left.items():
        found = sqlite_file.format_of(copy, write=False)
        assert found == (4 if point == "committed" else older), point
        await must_hold_everything(copy, older, BIG_ROWS)


# --- what is refused, and left as it is -------------------------------------------------------------------------------


def other_shard(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE meta SET value = 's2' WHERE name = 'shard_id'")


def no_number_of_partitions(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE meta SET value = 'many' WHERE name = 'partitions'")


def no_clock(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM clock")


def no_store_id(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM meta WHERE name = 'store_id'")


@OLDER
@pytest.mark.parametrize("spoil", [other_shard, no_number_of_partitions, no_clock, no_store_id])
async def test_a_file_that_cannot_be_converted_is_refused_in_words_and_left_as_it_is(
    tmp_path: Path, older: int, spoil: Callable[[sqlite3.Connection], None]
) -> None:
    path = tmp_path / "store.db"
    write_old(path, older, MAP)
    with closing(sqlite3.connect(path)) as connection, connection:
        spoil(connection)
    before = path.read_bytes()
    with pytest.raises(KvError, match=r"store\.db"):
        async with engine_of(path):
            pass
    assert path.read_bytes() == before


@OLDER
async def test_an_old_file_beside_a_log_with_records_is_refused(tmp_path: Path, older: int) -> None:
    path, spare = tmp_path / "store.db", tmp_path / "spare.db"
    write_old(path, older)
    shutil.copy2(path, spare)
    async with opened(tmp_path) as store:
        assert (await ask(store, Put(1, "a", b"new"))).status == 204
    shutil.copy2(spare, path)
    with pytest.raises((ForeignData, LogDamaged), match="log"):
        async with engine_of(path):
            pass
    assert path.read_bytes() == spare.read_bytes()


async def test_a_converted_file_without_its_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    write_old(path, 3, MAP)
    await must_hold_everything(path, 3)
    for file in tmp_path.glob("store.log.*"):
        file.unlink()
    with pytest.raises(LogDamaged):
        async with engine_of(path):
            pass
