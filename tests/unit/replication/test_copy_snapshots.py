"""A copy that is filled by a snapshot: its pages, the records behind them, and power cuts within it."""

from __future__ import annotations

from kvstore.replication.session import Join
from loadtest.simulate.disk import PowerCut, keep_all, lose_all
from tests.unit.replication.one_copy import Node, Primary, filling_copy, pages_of, rows_of


async def test_a_snapshot_with_the_records_behind_it_makes_an_equal_file_while_the_primary_is_written_to() -> None:
    node, primary = Node(), Primary()
    copy = await filling_copy(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for at, page in enumerate(await pages_of(primary, 6)):
        await primary.put(f"key-{at}", b"new")
        await primary.put(f"more-{at}", b"new")
        assert await copy.filling.page(named, of.position, page)
        assert await primary.ship(copy, committed=primary.log.last.number) == 0, "nothing counts before it is whole"
        assert await copy.applier.apply_some() == 0
    highest = primary.log.last.number
    await primary.put("last", b"new")
    assert await copy.filling.ends(named, of.position, highest)
    await primary.ship(copy, committed=highest)
    assert copy.is_filling
    while await copy.applier.apply_some():
        pass
    assert not copy.is_filling
    assert copy.records.committed(named, highest + 1) == highest + 1
    while await copy.applier.apply_some():
        pass
    assert rows_of(copy.engine) == rows_of(primary.engine)
    again = await node.restart()
    assert not again.is_filling
    assert await primary.join(again) == highest + 1


async def test_after_a_power_cut_within_a_snapshot_it_goes_on_or_begins_again_with_an_empty_copy() -> None:
    went_on = 0
    for at in range(1, 30):
        node, primary = Node(), Primary()
        copy = await filling_copy(node, primary)
        named, of = primary.session(copy), primary.engine.applied
        node.disk.power_cut_at = node.disk.calls + at
        try:
            assert await copy.filling.begins(named, of)
            for page in await pages_of(primary, 6):
                assert await copy.filling.page(named, of.position, page)
            await primary.put("more", b"new")
            await primary.ship(copy, committed=21)
            assert await copy.filling.ends(named, of.position, 21)
            await copy.applier.apply_some()
        except PowerCut:
            pass
        again = await node.restart(keep_all if at % 2 else lose_all)
        told, join = await primary.greet(again)
        if told.filling:
            assert (rows_of(again.engine) == {}) or (told.snapshot is not None and told.snapshot.at == of.position)
            went_on += told.snapshot is not None
            assert join.snapshot
        else:
            assert rows_of(again.engine) == rows_of(primary.engine)
            assert not join.snapshot
    assert went_on


async def test_records_are_taken_again_where_the_power_took_only_what_the_file_had_last() -> None:
    node, primary = Node(), Primary()
    copy = await filling_copy(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for page in await pages_of(primary, 6):
        assert await copy.filling.page(named, of.position, page)
    for at in range(3):
        await primary.put(f"key-{at}", b"new")
    assert await copy.filling.ends(named, of.position, 23)
    await primary.ship(copy)
    again = await node.restart(kept=len(node.engine._history) - 2)
    assert again.log.last.number == 23
    assert again.filling.snapshot is not None
    assert not again.filling.snapshot.filled_to, "its end was in the file only"
    told, _ = await primary.greet(again)
    named = primary.session(again)
    assert await again.greeting.begin(named, told.position, Join(20, snapshot=True), told.snapshot) == 0
    await primary.put("last", b"new")
    assert await again.filling.ends(named, of.position, 24)
    await again.records.take(named, primary.entries[20:], committed=24)
    while await again.applier.apply_some():
        pass
    assert not again.is_filling
    assert rows_of(again.engine) == rows_of(primary.engine)


async def test_pages_and_ends_of_another_snapshot_or_session_are_thrown_away() -> None:
    node, primary = Node(), Primary()
    copy = await filling_copy(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    other = named._replace(round=99)
    assert not await copy.filling.begins(other, of)
    assert not await copy.filling.page(named, of.position, [])
    assert await copy.filling.begins(named, of)
    assert not await copy.filling.begins(named, of), "a snapshot that is not ahead of the log is not taken"
    assert not await copy.filling.page(other, of.position, [])
    assert not await copy.filling.page(named, of.position._replace(number=3), [])
    assert not await copy.filling.ends(other, of.position, 20)
    assert copy.is_filling


async def test_a_copy_that_is_whole_takes_no_snapshot() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.put("a", b"1")
    await primary.join(copy)
    assert not await copy.filling.begins(primary.session(copy), primary.engine.applied)
    assert await primary.ship(copy, committed=1) == 1
