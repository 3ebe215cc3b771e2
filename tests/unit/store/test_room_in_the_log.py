"""Large operations and the segments of the log: each that is taken in is decided, however the segments are filled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvstore.protocol import Put
from tests.unit.store.rig import ask, next_id, opened

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
