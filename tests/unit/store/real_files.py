"""A store on real files: what tests of damage share."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, NoReturn

from kvstore.config import Limits
from kvstore.placement.cluster_map import ClusterMap, at_home, map_of
from kvstore.protocol import Answer, Delete, Get, Put, Reply
from kvstore.store.store import Store

PARTITIONS = 64
SEGMENT_BYTES = 1 << 16
LIMITS: dict[str, Any] = {"log_segment_bytes": SEGMENT_BYTES, "expiry_sweep_s": 3600.0, "batch_bytes_max": 8192}


def threads() -> set[threading.Thread]:
    """Those that run, but for the event loop's own pool, which grows when it likes and ends with the loop."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


def cluster_map(epoch: int = 1) -> ClusterMap:
    """Of one shard, which owns everything."""
    member = at_home("s1", "http://s1", "s1")
    return map_of([member], cluster_id="c", epoch=epoch, partitions=PARTITIONS, owners=[0] * PARTITIONS, moves=[])


def end(error: BaseException) -> NoReturn:
    raise AssertionError("the store gave up") from error


class Hands:
    """Asks the store, and waits for the answer."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def get(self, key: str) -> Answer:
        return await self._answer(lambda sink: self.store.get(Get(1, key), sink))

    async def put(self, key: str, value: bytes) -> Answer:
        return await self._answer(lambda sink: self.store.write(Put(1, key, value, 0), sink))

    async def delete(self, key: str) -> Answer:
        return await self._answer(lambda sink: self.store.write(Delete(1, key), sink))

    async def _answer(self, ask: Any) -> Answer:
        sink = _Sink()
        ask(sink)
        answer = await asyncio.wait_for(sink.future, 20)
        assert isinstance(answer, Answer)
        return answer


class _Sink:
    closed = False

    def __init__(self) -> None:
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def send(self, reply: Reply, /) -> None:
        self.future.set_result(reply)


@asynccontextmanager
async def opened(path: Path, **limits: Any) -> AsyncIterator[Hands]:
    """The store on that file, closed in order at the end."""
    store = await Store.open(path, Limits(**{**LIMITS, **limits}), "s1", PARTITIONS, end)
    try:
        await store.partitions.adopt(cluster_map(store.served.epoch + 1))
        yield Hands(store)
    finally:
        await store.close()


async def filled(path: Path, count: int, size: int = 40) -> dict[str, bytes]:
    """A store with so many keys, closed in order; what was put."""
    values = {f"key-{number:02d}": b"%02d" % number * (size // 2) for number in range(count)}
    async with opened(path) as hands:
        for key, value in values.items():
            assert (await hands.put(key, value)).status == 201
    return values


def killed(path: Path, folder: Path) -> Path:
    """The files of an open store as kill -9 leaves them: copied to another folder."""
    copy_files(path.parent, folder)
    return folder / path.name


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of an open store as kill -9 leaves them, apart from its lock; `folder` is made.

    Files may be renamed while this runs, for segments are made in the background, but no record is lost: one that is
    renamed holds none.
    """
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".lock", ".new"):
            shutil.copy2(file, folder / file.name)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def place_in(path: Path, tree: str, text: bytes) -> int:
    """The offset of that text in the root page of a table or index of a closed file."""
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (tree,)).fetchone()
    data = path.read_bytes()
    offset = data.find(text, (page - 1) * 4096, page * 4096)
    assert offset >= 0, f"{text!r} is not in the root page of {tree}"
    return offset


def hide_from_unique_index(path: Path, key: str) -> None:
    """From now on the unique index of the closed file does not lead to the key."""
    flip(path, place_in(path, "sqlite_autoindex_rows_1", b"value" + key.encode()) + len(b"value" + key.encode()) - 1, 6)
