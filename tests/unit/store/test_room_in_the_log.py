"""Large operations and the segments of the log: each that is taken in is decided, however the segments are filled."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.protocol import Delete, Put
from kvstore.storage.disk import OsDisk, OsFile, may_not_grow
from kvstore.store import applier
from tests.unit.store.harness import ask, asked, next_id, opened
from tests.unit.waiting import until

SEGMENT_BYTES = 64 * 1024


@pytest.mark.parametrize(
    "value_bytes",
    [
        pytest.param(50_000, id="does not fit into the open segment, which is not half full"),
        pytest.param(58_000, id="may need more, by its estimate, than any segment has"),
    ],
)
async def test_an_operation_of_most_of_a_segment_does_not_wait_for_ever(tmp_path: Path, value_bytes: int) -> None:
    async with opened(tmp_path, log_segment_bytes=SEGMENT_BYTES) as store, asyncio.timeout(60):
        for size in (20_000, value_bytes, 1):
            assert (await ask(store, Put(next_id(), f"key of {size}", bytes(size)))).status == 201


class FullDisk(OsDisk):
    """No new file has room any more, though the file system says that it has plenty."""

    def open(self, path: Path, *, create: bool = False, **options: Any) -> OsFile:
        if create:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().open(path, create=create, **options)


async def test_a_log_without_room_for_segments_refuses_writes_and_goes_on_with_deletes(tmp_path: Path) -> None:
    async with opened(tmp_path, log_segment_bytes=SEGMENT_BYTES) as store, asyncio.timeout(60):
        records = store.tables.log
        assert (await ask(store, Put(next_id(), "key", b"value"))).status == 201
        await until(lambda: records._spare)
        records._disk = FullDisk()
        statuses = []
        for _ in range(10):
            sinks = [asked(store, Put(next_id(), f"key {number}", bytes(3000))) for number in range(5)]
            statuses += [(await sink.answer()).status for sink in sinks]
        assert statuses[0] == 201
        assert statuses[-1] == 507
        assert (await ask(store, Delete(next_id(), "key"))).status == 204
        assert records.full
        records._disk = OsDisk()
        await until(lambda: not records.full)
        assert (await ask(store, Put(next_id(), "key", b"value"))).status == 201


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may become larger, as `ulimit -f` has it."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


async def test_a_limit_of_the_size_of_files_refuses_puts_with_507_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(applier, "_RETRY_S", 0.02)  # a disk that fails is given up after some tries
    async with opened(tmp_path, log_segment_bytes=SEGMENT_BYTES) as store, asyncio.timeout(60):

        async def put(number: int) -> int:
            await asyncio.sleep(0.005)
            return (await ask(store, Put(next_id(), f"key {number}", bytes(30_000)))).status

        with largest_file(1 << 20):
            number = refused = 0
            while refused < 50:  # in a row: while the file still grows, the WAL begins anew
                number += 1
                refused = refused + 1 if (status := await put(number)) == 507 else 0
                assert status in (201, 507)
            assert getattr(await store.reads.read("key 1"), "status", 0) == 200
            assert (await ask(store, Delete(next_id(), "key 1"))).status == 204
        await until(lambda: not store.tables.file_full)
        assert await put(number) == 201
    assert "has reached the largest size of a file, 1048576 bytes" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_quota_is_told_from_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "one.db"
    path.write_bytes(b"x")
    assert not may_not_grow([path, tmp_path / "none"])

    def refuse(**_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert ("quota" in may_not_grow([path])) == (code != errno.EIO)
