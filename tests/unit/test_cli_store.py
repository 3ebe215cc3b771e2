"""store check, store log, store cut: one store's files, looked at and cut while no process has them."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli.commands import main
from tests.unit.store.real_files import filled, flip, hide_from_unique_index, killed, opened, place_in


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store that was killed: 20 keys in its file, and 10 changes that only its log has."""
    folder = tmp_path_factory.mktemp("kept")

    async def fill() -> None:
        path = folder / "live" / "shard-s1.db"
        await filled(path, 20)
        async with opened(path, apply_delay_s=60.0) as hands:
            await hands.store.applier.flush()
            for number in range(10):
                await hands.put(f"late-{number}", b"late" * 10)
            killed(path, folder / "killed")

    asyncio.run(fill())
    return folder / "killed"


@pytest.fixture
def path(kept: Path, tmp_path: Path) -> Path:
    """The file of a copy of that store."""
    shutil.copytree(kept, tmp_path / "data")
    return tmp_path / "data" / "shard-s1.db"


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """The file of a store that was closed in order."""
    asyncio.run(filled(tmp_path / "shard-s1.db", 20))
    return tmp_path / "shard-s1.db"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["store", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def contents(path: Path) -> dict[str, bytes]:
    """Of all files that are the store's; the lock and SQLite's shared memory are none."""
    files = (file for file in path.parent.iterdir() if file.suffix != ".lock" and not file.name.endswith("-shm"))
    return {file.name: file.read_bytes() for file in files}


def log_of(path: Path) -> Path:
    """The segment in which the records of the killed store lie."""
    return next(file for file in sorted(path.parent.glob("shard-s1.log.0*")) if b"late-" in file.read_bytes())


def last_number(path: Path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        (applied,) = connection.execute("SELECT log_number FROM clock").fetchone()
    return int(applied)


def get(path: Path, *keys: str) -> list[bytes | None]:
    """What an opened store answers."""

    async def ask() -> list[bytes | None]:
        async with opened(path) as hands:
            return [(await hands.get(key)).value for key in keys]

    return asyncio.run(ask())


def put(path: Path, key: str) -> None:
    async def ask() -> None:
        async with opened(path) as hands:
            await hands.put(key, b"x")

    asyncio.run(ask())


# --- check ------------------------------------------------------------------------------------------------------------


def test_a_killed_store_that_is_whole_is_said_to_be_and_left_as_it_is(path: Path, run: Any) -> None:
    before = contents(path)
    code, out, err = run("check", path)
    assert (code, err) == (0, "")
    assert "All is as it was written." in out
    assert contents(path) == before


def test_programs_get_the_figures(path: Path, run: Any) -> None:
    code, out, _ = run("check", path, "--json")
    found = json.loads(out)
    assert (code, found["damaged"], found["findings"], found["rows"]) == (0, 0, [], 20)
    assert found["shard"] == "s1"
    assert found["log"]["last"] == found["applied"] + 10


def test_a_damaged_record_is_named_with_its_file_and_what_to_do(path: Path, run: Any) -> None:
    segment = log_of(path)
    offset = segment.read_bytes().index(b"late-3")
    flip(segment, offset)
    code, out, _ = run("check", path)
    assert code == 1
    assert f"in {segment}" in out
    assert "kvstore store cut" in out
    document = json.loads(run("check", path, "--json")[1])
    damage = document["log"]["damage"]
    assert 0 < offset - damage["offset"] < 200
    assert damage["number"] == document["applied"] + 4  # behind late-0 to late-2


def test_a_missing_segment_is_named(path: Path, run: Any) -> None:
    log_of(path).unlink()
    code, out, _ = run("check", path)
    assert code == 1
    assert "damaged: " in out


@pytest.mark.parametrize("tree", ["rows", "sqlite_autoindex_rows_1"])
def test_a_damaged_row_or_index_is_named_by_its_key(closed: Path, run: Any, tree: str) -> None:
    if tree == "rows":
        flip(closed, place_in(closed, "rows", b"07" * 20))
    else:
        hide_from_unique_index(closed, "key-07")
    code, out, _ = run("check", closed)
    assert code == 1
    assert "the value row of key 'key-07'".lower() in out.lower()


def test_damage_of_what_is_no_row_is_named(closed: Path, run: Any) -> None:
    flip(closed, place_in(closed, "meta", b'"epoch":') + len('"epoch":'))
    with closing(sqlite3.connect(closed)) as connection, connection:
        connection.execute("UPDATE clock SET version = version + 1")
    code, out, _ = run("check", closed)
    assert code == 1
    assert "entry cluster_map" in out
    assert "clock" in out


def test_a_zeroed_page_does_not_hide_what_else_is_damaged(closed: Path, run: Any) -> None:
    hide_from_unique_index(closed, "key-07")
    page = place_in(closed, "rows_partition", b"\x03\x01") // 4096 * 4096
    with closed.open("r+b") as file:
        file.seek(page)
        file.write(bytes(512))
    code, out, _ = run("check", closed)
    assert code == 1
    assert "The index of partitions cannot be read" in out
    assert "SQLite's own check" in out
    assert " 20 rows" in out


def test_a_store_that_a_process_has_is_not_looked_at(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "shard-s1.db"

    async def beside() -> tuple[int, str, str]:
        async with opened(path):
            return await asyncio.to_thread(run, "check", path)

    code, _, err = asyncio.run(beside())
    assert code == 2
    assert "in use by the process with pid" in err


@pytest.mark.parametrize("content", [None, b"no database at all " * 300])
def test_what_is_no_store_cannot_be_checked(tmp_path: Path, run: Any, content: bytes | None) -> None:
    path = tmp_path / "shard-s1.db"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run("check", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".db"] == ([path.name] if content else [])


# --- log --------------------------------------------------------------------------------------------------------------


def test_the_log_is_printed_for_people_and_for_programs(path: Path, run: Any) -> None:
    before = contents(path)
    code, out, _ = run("log", path, "--values")
    assert code == 0
    assert "value late-3  version" in out
    assert "latelate" in out
    lines = [json.loads(line) for line in run("log", path, "--json")[1].splitlines()]
    numbers = [line["number"] for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert lines[-1]["rows"][0]["key"] == "late-9"
    assert [
        json.loads(line)["number"] for line in run("log", path, "--json", "--after", numbers[-2])[1].splitlines()
    ] == [numbers[-1]]
    assert contents(path) == before


def test_printing_stops_at_a_damaged_record_and_says_so(path: Path, run: Any) -> None:
    segment = log_of(path)
    flip(segment, segment.read_bytes().index(b"late-3"))
    code, out, err = run("log", path)
    assert code == 1
    assert "late-2" in out
    assert "late-4" not in out
    assert "is damaged or lost" in err


# --- cut --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(path: Path) -> tuple[Path, int]:
    """A store that does not open, because a record is damaged; the number of the last whole one."""
    segment = log_of(path)
    whole = last_number(path) + 3
    flip(segment, segment.read_bytes().index(b"late-3"))
    return path, whole


def test_a_cut_opens_a_store_with_a_damaged_record_without_what_follows(broken: tuple[Path, int], run: Any) -> None:
    path, whole = broken
    code, out, err = run("cut", path, "--after", whole, "--accept-loss", "--confirm", "s1")
    assert code == 0
    assert "will be lost" in err
    assert f"ends with record {whole} now" in out
    assert get(path, "key-07", "late-2", "late-3", "late-9") == [b"07" * 20, b"late" * 10, None, None]
    assert run("check", path)[0] == 0


@pytest.mark.parametrize("confirm", [(), ("--confirm", "s2")])
def test_nothing_is_cut_without_the_shards_id(
    broken: tuple[Path, int], run: Any, confirm: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = broken
    before = contents(path)
    assert run("cut", path, "--after", whole, "--accept-loss", *confirm)[0] == 1
    assert contents(path) == before
    assert run("cut", path, "--after", whole, "--confirm", "s1")[0] == 2  # without --accept-loss
    assert contents(path) == before


def test_a_cut_that_would_take_what_the_file_has_applied_is_refused(path: Path, run: Any) -> None:
    before = contents(path)
    code, _, err = run("cut", path, "--after", last_number(path) - 1, "--accept-loss", "--confirm", "s1")
    assert code == 2
    assert "has applied up to record" in err
    assert contents(path) == before


@pytest.mark.parametrize("what", ["note", "all"])
def test_a_lost_log_is_replaced_behind_what_the_file_has_applied(path: Path, run: Any, what: str) -> None:
    for file in path.parent.glob("shard-s1.log.note" if what == "note" else "shard-s1.log.*"):
        file.unlink()
    applied = last_number(path)
    code, _, err = run("cut", path, "--after", applied + 1, "--accept-loss", "--confirm", "s1")
    assert (code, f"Cut after {applied}." in err) == (2, True)
    assert run("cut", path, "--after", applied, "--accept-loss", "--confirm", "s1")[0] == 0
    assert get(path, "key-07", "late-2") == [b"07" * 20, None]
    put(path, "new")
    assert get(path, "new") == [b"x"]
    assert run("check", path)[0] == 0
