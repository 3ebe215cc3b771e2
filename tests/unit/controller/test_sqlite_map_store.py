"""The SQLite file of the controller: whose files it opens, and that acknowledged means on disk."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.controller.map_store.interface import Stored, Told
from kvstore.controller.map_store.sqlite import FORMAT, open_sqlite
from kvstore.errors import ConfigError, ForeignData, Unavailable


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


async def make(path: Path) -> None:
    store = await open_sqlite(path)
    await store.compare_and_swap(0, b"mine")
    await store.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: change(path, f"PRAGMA user_version = {FORMAT + 1}"),
        lambda path: change(path, "PRAGMA application_id = 7"),
        lambda path: path.write_bytes(b"this is not a database, but it is long enough to be one" * 20),
    ],
    ids=["another format", "another program's database", "no database"],
)
async def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "controller-0.db"
    await make(path)
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(ForeignData, match=r"controller-0\.db"):
        await open_sqlite(path)
    assert path.read_bytes() == before


async def test_another_database_without_our_mark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "controller-0.db"
    change(path, "CREATE TABLE kv (key TEXT)")
    with pytest.raises(ForeignData):
        await open_sqlite(path)


async def test_an_empty_file_becomes_a_new_store(tmp_path: Path) -> None:
    path = tmp_path / "controller-0.db"
    path.touch()
    await make(path)


async def test_a_file_is_open_in_one_process_only(tmp_path: Path) -> None:
    path = tmp_path / "controller-0.db"
    store = await open_sqlite(path)
    with pytest.raises(ConfigError, match="open in another process"):
        await open_sqlite(path)
    await store.close()
    again = await open_sqlite(path)
    await again.close()


async def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        await open_sqlite(tmp_path)


async def test_commits_are_synced_to_the_disk(tmp_path: Path) -> None:
    store = await open_sqlite(tmp_path / "controller-0.db")
    rows = [await store._execute(f"PRAGMA {name}", ()) for name in ("journal_mode", "synchronous")]
    await store.close()
    assert rows == [[("wal",)], [(2,)]]  # 2 is FULL


_KILLED = """
import asyncio, sys
from pathlib import Path
from kvstore.controller.map_store.sqlite import open_sqlite

async def main():
    store = await open_sqlite(Path(sys.argv[1]))
    revision = 0
    while True:
        revision = await store.compare_and_swap(revision, b"%d" % (revision + 1))
        print(revision, flush=True)

asyncio.run(main())
"""


async def test_an_acknowledged_swap_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "controller-0.db"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _KILLED, str(path), stdout=subprocess.PIPE)
    assert process.stdout is not None
    acknowledged = 0
    while acknowledged < 20:
        acknowledged = int(await process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = await process.stdout.read()
    await process.wait()
    acknowledged = int(rest.splitlines()[-1]) if rest.endswith(b"\n") else acknowledged
    store = await open_sqlite(path)
    stored = await store.read()
    await store.close()
    assert stored.revision >= acknowledged
    assert stored == Stored(stored.revision, b"%d" % stored.revision)


async def test_what_a_store_has_told_can_be_asked_for_while_nothing_can_be_written(tmp_path: Path) -> None:
    """A full disk of the controller keeps no copy from taking over."""
    store = await open_sqlite(tmp_path / "controller-0.db")
    await store.tell("a", Told(5, 50))
    await store.forget("b", 900)
    await store._connection.execute("PRAGMA query_only = 1")
    assert await store.tell("a", Told()) == Told(5, 50)
    assert await store.tell("a", Told(4, 50)) == Told(5, 50)
    assert await store.tell("b", Told()) == Told(0, 0, 900)
    with pytest.raises(Unavailable):
        await store.tell("a", Told(6, 50))
    await store.close()
