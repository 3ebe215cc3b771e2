"""The store of the map, shards that move as a test says, and a controller of three of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstore.controller.map_store.sqlite import SqliteMapStore, open_sqlite
from tests.unit.controller.far_shards import FarShard, far_shards
from tests.unit.controller.moving import Controller, controlled, form


@pytest.fixture
async def far() -> AsyncIterator[dict[str, FarShard]]:
    async with far_shards("s1", "s2", "s3", "s4", "s5", "s6") as shards:
        yield shards


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteMapStore]:
    opened = await open_sqlite(tmp_path / "controller-0.db")
    yield opened
    await opened.close()


@pytest.fixture
async def controller(store: SqliteMapStore, far: dict[str, FarShard]) -> AsyncIterator[Controller]:
    """Of a formed cluster of s1, s2 and s3."""
    await form(store, far, "s1", "s2", "s3")
    async with controlled(store) as controller:
        yield controller
