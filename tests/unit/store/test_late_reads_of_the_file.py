"""A read of the file that was asked for early and is done late never stands before what became visible since."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvstore.protocol import Get, Put
from kvstore.storage.rows import VALUE, Row
from kvstore.store.memtable import Memtable
from tests.unit.store.harness import Sink, ask, next_id, opened


async def test_a_read_that_was_queued_behind_another_shows_the_change_that_came_since(tmp_path: Path) -> None:
    async with opened(tmp_path, apply_delay_s=60.0) as store, asyncio.timeout(60):
        for key in ("slow", "key"):
            await ask(store, Put(next_id(), key, b"old"))
        await store.applier.flush()
        store.tables.cache.clear()
        reading, go_on = asyncio.Event(), asyncio.Event()
        read = store.tables.engine.read

        async def read_slowly(keys: list[tuple[str, str]]) -> object:
            found = await read(keys)
            if (VALUE, "slow") in keys:
                reading.set()
                await go_on.wait()
            return found

        store.tables.engine.read = read_slowly  # type: ignore[method-assign]
        slow, early = Sink(), Sink()
        store.get(Get(next_id(), "slow"), slow)
        await reading.wait()
        store.get(Get(next_id(), "key"), early)
        assert (await ask(store, Put(next_id(), "key", b"new"))).status == 204
        go_on.set()
        await early.answer()
        late = Sink()
        store.get(Get(next_id(), "key"), late)
        assert (await late.answer()).value == b"new"


def test_a_row_that_became_visible_before_it_was_fetched_is_not_fetched() -> None:
    table = Memtable()
    new = Row(VALUE, "key", 1, 7, 7, 0, b"new")
    table.publish({(VALUE, "key"): new}, 0)
    assert not table.pin((VALUE, "key"))
    table.begin_application()
    table.end_application()
    table.arrived((VALUE, "key"), new._replace(body=b"old", version=3))
    assert table.fetched((VALUE, "key")) == (True, new)
