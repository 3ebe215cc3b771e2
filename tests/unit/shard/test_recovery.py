"""Recovery of a real store whose peers are away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from kvstore.config import Limits
from kvstore.errors import Unavailable
from kvstore.model import Attempt, TxnOp
from kvstore.protocol import Get, Prepare
from kvstore.shard import recovery
from kvstore.shard.recovery import Recovery
from kvstore.store.store import Store
from tests.unit.store.harness import Sink, asked, next_id, opened
from tests.unit.waiting import until


class Away:
    """Keys that begin with `away` belong to another shard, which is down."""

    def owner(self, key: str) -> str:
        return "s2" if key.startswith("away") else "s1"

    def channel(self, shard_id: str) -> Any:
        raise Unavailable(f"shard {shard_id} is not connected")


async def test_attempts_that_wait_for_a_shard_that_is_away_do_not_stand_before_others(tmp_path: Path) -> None:
    stuck = recovery._AT_ONCE_MAX + 44
    anchors = [f"away {number}" for number in range(stuck)] + ["here"]
    async with opened(tmp_path) as store:
        prepared = [
            asked(store, Prepare(next_id(), anchor, Attempt(n, n, "router01"), [], [TxnOp("put", f"k{n}", b"x")], []))
            for n, anchor in enumerate(anchors, start=1)
        ]
        await until(lambda: all(sink.replies for sink in prepared))
        for sink in prepared:
            sink.closed = True  # the router has died
        reading = Sink()
        store.get(Get(next_id(), f"k{len(anchors)}"), reading)
        at_work = Recovery("s1", store, Away(), Limits(expiry_sweep_s=0.05))  # type: ignore[arg-type]
        rounds = asyncio.create_task(at_work.run())
        try:
            assert (await reading.answer()).status == 404
            assert len(store.tables.holds) == stuck
        finally:
            rounds.cancel()
            await asyncio.gather(rounds, return_exceptions=True)
            await at_work.close()


async def test_a_store_that_was_closed_before_its_first_commit_opens_again(tmp_path: Path) -> None:
    limits = Limits(disk_reserve_bytes=1, log_segment_bytes=4 << 20)
    for _ in range(2):
        fatal: list[BaseException] = []
        store = await Store.open(tmp_path / "s1.db", limits, "s1", 64, fatal.append)  # type: ignore[arg-type]
        await store.close()
        assert fatal == []
