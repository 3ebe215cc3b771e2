"""A copy whose file takes no rows for a while: it waits, and so does the node, which has other stores, too."""

from __future__ import annotations

import asyncio
import errno

import pytest

from kvstore.replication.copy import StoreCopy
from kvstore.replication.session import Join
from kvstore.storage.engine import Engine, TryLater
from tests.unit.replication.one_copy import Node, Primary, filling_copy, pages_of, rows_of


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


async def test_a_copy_goes_on_to_apply_when_its_file_takes_rows_again_and_says_once_that_it_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = Node()
    copy = await _with_one_record(node, committed=1)
    full = FullFile(node, 3)
    work = asyncio.create_task(copy.applier.run())
    async with asyncio.timeout(30):
        while "a" not in rows_of(copy.engine) and not work.done():
            await asyncio.sleep(0)
    assert not work.done()
    assert full.left == 0
    assert caplog.text.count("applying to a copy's file waits: the disk is full") == 1
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_a_copy_is_handed_over_when_its_file_takes_rows_again() -> None:
    node = Node()
    copy = await _with_one_record(node, committed=0)
    full = FullFile(node, 3)
    await copy.applier.hand_over()
    assert "a" in rows_of(copy.engine)
    assert full.left == 0


@pytest.mark.parametrize("fails_at", ["renewing", "the first row"])
async def test_a_snapshot_that_finds_no_room_to_begin_is_taken_from_its_beginning_in_the_next_session(
    fails_at: str,
) -> None:
    """Until then the log is behind that position, and the file is nothing: it must not be taken for a copy."""
    node, primary = Node(), Primary()
    copy = await filling_copy(node, primary)
    renew = node.place.renew

    async def full() -> Engine:
        if fails_at == "renewing":
            raise OSError(errno.ENOSPC, "No space left on device")
        engine = await renew()
        FullFile(node, 1)
        return engine

    copy.own_engine._renew = full
    with pytest.raises((TryLater, OSError)):
        await copy.filling.begins(primary.session(copy), primary.engine.applied)
    assert copy.is_filling
    copy.own_engine._renew = renew
    told, join = await primary.greet(copy, first_kept=21)
    assert join == Join(0, snapshot=True)
    assert await copy.greeting.begin(primary.session(copy), told.position, join) == 0
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for page in await pages_of(primary, 6):
        assert await copy.filling.page(named, of.position, page)
    assert await copy.filling.ends(named, of.position, of.position.number)
    assert not copy.is_filling
    assert rows_of(copy.engine) == rows_of(primary.engine)
