"""A copy whose file takes no rows for a while: it waits, and so does the node, which has other stores, too."""

from __future__ import annotations

import asyncio

from kvstore.replication.copy import StoreCopy
from kvstore.storage.engine import TryLater
from tests.unit.replication.test_copy import Node, Primary, rows_of


class FullFile:
    """Refuses the first applications."""

    def __init__(self, node: Node, times: int) -> None:
        self.left = times
        node.engine.fail = self._fail
        node.machine.sleep = self._sleep  # type: ignore[method-assign]

    def _fail(self) -> None:
        if self.left:
            self.left -= 1
            raise TryLater("the disk is full")

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


async def _with_one_record(node: Node, committed: int) -> StoreCopy:
    primary, copy = Primary(), await node.make()
    await primary.put("a", b"1")
    await primary.join(copy)
    assert await primary.ship(copy, committed) == 1
    return copy


async def test_a_copy_goes_on_to_apply_when_its_file_takes_rows_again() -> None:
    node = Node()
    copy = await _with_one_record(node, committed=1)
    full = FullFile(node, 3)
    work = asyncio.create_task(copy.run())
    async with asyncio.timeout(30):
        while "a" not in rows_of(copy.engine) and not work.done():
            await asyncio.sleep(0)
    assert not work.done()
    assert full.left == 0
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_a_copy_is_handed_over_when_its_file_takes_rows_again() -> None:
    node = Node()
    copy = await _with_one_record(node, committed=0)
    full = FullFile(node, 3)
    await copy.hand_over()
    assert "a" in rows_of(copy.engine)
    assert full.left == 0
