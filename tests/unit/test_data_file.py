"""What stands in the place of a data file, and what a person is told about it."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.config import Limits
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.data_file import Reserve, make_sparse, opening_error, prepare_data_file
from kvstore.environment import SYSTEM
from kvstore.errors import ConfigError, DataInUse, ForeignData
from kvstore.store.opening import open_files


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "not-mounted" / "s1.db")


def circle(path: Path) -> None:
    path.symlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder_beside(path: Path) -> None:
    Path(f"{path}-wal").mkdir()


WRONG = pytest.mark.parametrize(
    ("make", "said"),
    [
        (folder, "it is a folder"),
        (dangling, "it is a link to"),
        (circle, "it is a link to"),
        (pipe, "no regular file"),
        (folder_beside, "-wal cannot be opened: it is a folder"),
    ],
)


@WRONG
async def test_what_is_no_file_is_refused_by_the_shard_and_the_controller_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "x.db"
    make(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=said):
        await open_files(path, "s1", 64, Limits(), SYSTEM)
    with pytest.raises(ConfigError, match=said):
        await open_sqlite(path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("spoil", ["path.chmod(0o444)", "path.parent.chmod(0o555)", "path.chmod(0o222)"])
def test_rights_that_are_missing_are_named_with_mode_owner_and_user(tmp_path: Path, spoil: str) -> None:
    script = f"""if True:
        import os
        from pathlib import Path
        from kvstore.data_file import prepare_data_file
        path = Path("data/x.db")  # the folders above may be closed to other users
        prepare_data_file(path)
        {spoil}
        if os.geteuid() == 0:  # to whom no right is ever missing
            os.setresuid(65534, 65534, 65534)
        prepare_data_file(path)
    """
    tmp_path.chmod(0o755)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    (tmp_path / "data").chmod(0o755)
    last = run.stderr.splitlines()[-1]
    assert "ConfigError" in last
    assert "cannot be opened: " in last
    assert "has mode" in last
    assert "(chown, chmod)" in last


def test_a_file_that_is_not_there_is_created_and_one_that_is_there_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.db"
    prepare_data_file(path)
    path.write_bytes(b"content")
    prepare_data_file(path)
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_BUSY, DataInUse),
        (sqlite3.SQLITE_BUSY | 1 << 8, DataInUse),
        (sqlite3.SQLITE_NOTADB, ForeignData),
        (sqlite3.SQLITE_ERROR, ForeignData),
        (sqlite3.SQLITE_READONLY, ConfigError),
        (sqlite3.SQLITE_CANTOPEN, ConfigError),
        (sqlite3.SQLITE_FULL, OSError),
        (sqlite3.SQLITE_IOERR, OSError),
    ],
)
def test_an_error_of_sqlite_says_whether_it_may_pass(tmp_path: Path, code: int, kind: type[Exception]) -> None:
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code
    meant = opening_error(tmp_path / "x.db", error, "a store")
    assert type(meant) is kind
    if isinstance(meant, OSError):
        assert meant.errno == (errno.ENOSPC if code == sqlite3.SQLITE_FULL else errno.EIO)


# --- room -------------------------------------------------------------------------------------------------------------


def blocks_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_reserve_takes_room_and_gives_it_back_once(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", 1 << 20)
    assert not reserve.give()
    reserve.fill()
    assert blocks_bytes(tmp_path / "reserve") >= 1 << 20
    assert reserve.give()
    assert blocks_bytes(tmp_path / "reserve") == 0
    assert not reserve.give()
    reserve.fill()
    assert reserve.give()


def test_a_reserve_takes_no_room_where_there_is_not_twice_as_much(tmp_path: Path) -> None:
    Reserve(tmp_path / "reserve", 1 << 60).fill()
    Reserve(tmp_path / "nowhere" / "reserve", 1 << 20).fill()
    assert not list(tmp_path.iterdir())


def test_a_sparse_file_has_the_same_bytes_and_takes_less_room(tmp_path: Path) -> None:
    path, content = tmp_path / "segment", b"\0records\0" + b"records" + bytes(1 << 20)
    for data in (content, b"nothing to gain", b"", bytes(1 << 20)):
        path.write_bytes(data)
        make_sparse(path)
        assert path.read_bytes() == data
        assert blocks_bytes(path) <= 64 * 1024
    assert [file.name for file in tmp_path.iterdir()] == ["segment"]
