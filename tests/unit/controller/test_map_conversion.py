"""A controller that starts on a document of an earlier program converts it in one swap, and keeps the old one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import msgspec
import pytest

from kvstore.config import default_config
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.interface import MapStore, Stored
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.controller.membership import Announcement, ClusterState
from kvstore.errors import ForeignData, Unavailable
from kvstore.placement.map_format import decode_map
from tests.old_data import state_of_format_3

OLD = state_of_format_3()
OLD_MAP = json.dumps(json.loads(OLD)["map"]).encode()


@asynccontextmanager
async def document_of(folder: Path, stored: bytes | None = None) -> AsyncIterator[ClusterDocument]:
    """On a controller's file, in which `stored` lies before."""
    store = await open_sqlite(folder / "controller-0.db")
    try:
        if stored is not None:
            await store.compare_and_swap(0, stored)
        yield ClusterDocument(store, default_config().limits.map_write_tries_max)
    finally:
        await store.close()


def kept(folder: Path) -> bytes:
    return (folder / "controller-0.db.format3").read_bytes()


def in_file(folder: Path) -> tuple[int, bytes]:
    with closing(sqlite3.connect(folder / "controller-0.db")) as connection:
        revision, document = connection.execute("SELECT revision, document FROM state").fetchone()
        return revision, document


async def test_the_map_is_converted_in_one_swap_and_the_old_document_is_kept(tmp_path: Path) -> None:
    async with document_of(tmp_path, OLD) as document:
        assert await document.convert() == 3
        state = await document.read()
    expected = decode_map(OLD_MAP)
    assert state.map == msgspec.structs.replace(expected, epoch=expected.epoch + 1)
    assert (state.announced, state.wanted, state.clock) == ({}, {}, json.loads(OLD)["clock"])
    assert kept(tmp_path) == OLD, "as it was, byte for byte"
    revision, present = in_file(tmp_path)
    assert (revision, json.loads(present)["map"]["format"]) == (2, 4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


async def test_the_conversion_is_made_once(tmp_path: Path) -> None:
    async with document_of(tmp_path, OLD) as document:
        await document.convert()
    (tmp_path / "controller-0.db.format3").unlink()
    before = in_file(tmp_path)
    async with document_of(tmp_path) as document:
        assert await document.convert() is None
    assert in_file(tmp_path) == before
    assert not (tmp_path / "controller-0.db.format3").exists()


async def test_where_no_cluster_is_formed_there_is_nothing_to_convert(tmp_path: Path) -> None:
    announced = b'{"announced":{"s1":{"id":"s1","url":"http://s1","store_id":"x"}},"map":null}'
    async with document_of(tmp_path) as document:
        assert await document.convert() is None
        assert await document.read() == ClusterState()
    async with document_of(tmp_path, announced) as document:
        assert await document.convert() is None
        state = await document.read()
    assert state.announced == {"s1": Announcement(id="s1", url="http://s1", store_id="x")}
    assert in_file(tmp_path) == (1, announced)


async def test_a_map_of_an_unknown_format_stops_the_controller_and_is_left_as_it_is(tmp_path: Path) -> None:
    newer = json.dumps({"map": {**json.loads(OLD)["map"], "format": 5}}).encode()
    async with document_of(tmp_path, newer) as document:
        with pytest.raises(ForeignData, match="has format 5"):
            await document.convert()
        with pytest.raises(ForeignData, match="has format 5"):
            await document.read()
    assert in_file(tmp_path) == (1, newer)


@pytest.mark.parametrize("damaged", [b"{", b'{"m\xb3p": {}}'])
async def test_a_state_that_is_damaged_stops_the_controller_with_a_plain_error(tmp_path: Path, damaged: bytes) -> None:
    async with document_of(tmp_path, damaged) as document:
        with pytest.raises(ForeignData, match="cannot read the controller's stored state"):
            await document.convert()
        with pytest.raises(ForeignData, match="cannot read the controller's stored state"):
            await document.read()


class _Lossy:
    """A map store whose first swap happens, though its caller is told that it may not have."""

    def __init__(self, store: MapStore) -> None:
        self._store = store
        self.swaps = 0
        self.kept: list[tuple[str, bytes, int]] = []

    async def read(self) -> Stored:
        return await self._store.read()

    async def keep(self, name: str, document: bytes) -> None:
        self.kept.append((name, document, self.swaps))
        await self._store.keep(name, document)

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        self.swaps += 1
        found = await self._store.compare_and_swap(revision, document)
        raise Unavailable(f"the answer is lost: {found}")


async def test_a_swap_whose_outcome_is_unknown_is_looked_up_and_the_old_document_is_kept_before_it(
    tmp_path: Path,
) -> None:
    store = await open_sqlite(tmp_path / "controller-0.db")
    await store.compare_and_swap(0, OLD)
    lossy = _Lossy(store)
    assert await ClusterDocument(lossy, 5).convert() == 3  # type: ignore[arg-type]
    assert (lossy.swaps, lossy.kept) == (1, [("format3", OLD, 0)])
    await store.close()
