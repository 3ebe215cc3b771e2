"""One launcher for each data folder, however close their starts are."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from kvstore.errors import DataInUse
from kvstore.premises import claim


async def test_of_many_that_start_at_the_same_moment_one_has_the_folder(tmp_path: Path) -> None:
    claims = await asyncio.gather(*(claim(tmp_path / "data") for _ in range(20)), return_exceptions=True)
    refused = [each for each in claims if isinstance(each, DataInUse)]
    assert len(refused) == 19
    assert all(f"started by pid {os.getpid()}: " in error.detail for error in refused)
    (held,) = (each for each in claims if not isinstance(each, BaseException))
    with held, pytest.raises(DataInUse):
        await claim(tmp_path / "data")
    with await claim(tmp_path / "data"):
        pass


async def test_a_launcher_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    with await claim(tmp_path):
        claimed = asyncio.create_task(claim(tmp_path))
        await asyncio.sleep(0.05)
        assert not claimed.done()
    with await claimed:
        assert (tmp_path / "up.lock").read_text() == f"{os.getpid()}\n"


async def test_children_do_not_hold_the_folder_of_a_launcher_that_was_killed(tmp_path: Path) -> None:
    with await claim(tmp_path):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE, close_fds=False
        )
    try:
        with await claim(tmp_path):
            pass
    finally:
        await child.communicate(b"\n")


async def test_a_folder_that_cannot_be_written_is_left_to_the_children(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with await claim(tmp_path / "file" / "data"):
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
