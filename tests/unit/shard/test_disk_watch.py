"""The watch over a node's disk: a sync that hangs ends the process, one that is slow, again and again, does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from kvstore.shard.disk_watch import DiskWatch
from kvstore.storage.disk import OsDisk, OsFile
from kvstore.storage.log import Log

PATIENCE_S = 30.0
LOOKS = 16


class Stuck:
    """A disk whose syncs return when they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.let_go = Event(), Event()
        sync = OsFile.sync

        def stuck(file: OsFile) -> None:
            self.begun.set()
            assert self.let_go.wait(PATIENCE_S)
            sync(file)

        monkeypatch.setattr(OsFile, "sync", stuck)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    opened = Log.create(OsDisk(), tmp_path, "store", "id", segment_bytes=1 << 16)
    yield opened
    opened.close()


def test_a_sync_that_hangs_is_found(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, hung = Stuck(monkeypatch), Event()
    watch = DiskWatch(0.05, lambda: [log], lambda _: hung.set())
    log.append(b"record")
    syncing = Thread(target=log.sync)
    syncing.start()
    assert disk.begun.wait(PATIENCE_S)
    watch.start()
    assert hung.wait(PATIENCE_S)
    disk.let_go.set()
    syncing.join()
    watch.close()
    assert log.sync_under_way is None


def test_many_syncs_one_after_the_other_are_no_hung_disk(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each look a sync is under way, but never the same one for too long."""
    watch = DiskWatch(0.05, lambda: [log], lambda _: None)
    sync = OsFile.sync

    def looked_at(file: OsFile) -> None:
        assert not any(watch.look() for _ in range(LOOKS - 1))
        sync(file)

    monkeypatch.setattr(OsFile, "sync", looked_at)
    for _ in range(3):
        log.append(b"record")
        log.sync()
    assert log.durable == 3


def test_a_log_that_is_watched_no_more_is_not_looked_at(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that lost its copies waits for its disk."""
    watched = [log]
    watch = DiskWatch(0.05, lambda: watched, lambda _: None)
    found: list[bool] = []

    def looked_at(file: OsFile) -> None:
        for _ in range(LOOKS):
            watch.look()
        watched.clear()
        found.append(watch.look())
        watched.append(log)
        found.append(watch.look())  # it counts from here on

    monkeypatch.setattr(OsFile, "sync", looked_at)
    log.append(b"record")
    log.sync()
    assert found == [False, False]


def test_a_failed_sync_is_not_under_way_any_more(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: OsFile) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(OsFile, "sync", fails)
    log.append(b"record")
    with pytest.raises(Exception, match="cannot be written"):
        log.sync()
    assert log.sync_under_way is None


def test_a_process_whose_disk_hangs_ends_even_if_it_cannot_say_so(tmp_path: Path) -> None:
    """The loop's own thread hangs in the sync, and holds what the log of the process is written with."""
    code = """
        import logging, sys, threading
        from pathlib import Path
        from kvstore.shard.disk_watch import DiskWatch, end_process
        from kvstore.storage.disk import OsDisk, OsFile
        from kvstore.storage.log import Log

        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        log = Log.create(OsDisk(), Path(sys.argv[1]), "store", "id", segment_bytes=1 << 16)
        watch = DiskWatch(0.1, lambda: [log], end_process)
        watch.start()
        if sys.argv[2] == "mute":
            handler.acquire()
        OsFile.sync = lambda file: threading.Event().wait()
        log.append(b"record")
        log.sync()
    """
    for name, said in (("heard", "disk_stall_s"), ("mute", "")):
        folder = tmp_path / name
        folder.mkdir()
        argv = [sys.executable, "-c", textwrap.dedent(code), str(folder), name]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 74
        assert said in ended.stderr
