"""One process for each store, however close two starts are: a lock of the operating system says so."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.errors import DataInUse
from kvstore.store.opening import lock

STARTS = 20


def test_of_many_that_open_a_store_at_the_same_moment_one_gets_it(tmp_path: Path) -> None:
    """A lock belongs to the file that was opened, so threads compete as processes do."""
    path, together = tmp_path / "shard-s1.db", threading.Barrier(STARTS)

    def start(_: int) -> int | DataInUse:
        together.wait(60)
        try:
            return lock(path)
        except DataInUse as error:
            return error

    with ThreadPoolExecutor(STARTS) as threads:
        outcomes = list(threads.map(start, range(STARTS)))
    (held,) = (each for each in outcomes if isinstance(each, int))
    with pytest.raises(DataInUse, match=f"in use by the process with pid {os.getpid()}"):
        lock(path)
    inode = path.with_suffix(".lock").stat().st_ino
    os.close(held)
    os.close(lock(path))
    assert path.with_suffix(".lock").stat().st_ino == inode, "it is never replaced"
