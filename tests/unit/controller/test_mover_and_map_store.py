"""The mover's own end and start, and a store of the map whose swaps fail, are overtaken or untold."""

from __future__ import annotations

import pytest

from kvstore.controller.map_store.interface import MapStore, Stored
from kvstore.controller.map_store.sqlite import SqliteMapStore
from kvstore.errors import Unavailable
from tests.unit.controller.far_shards import FarShard
from tests.unit.controller.moving import controlled, form, loads
from tests.unit.waiting import until


@pytest.mark.parametrize("step", ["copy", "tail", "freeze"])
async def test_a_controller_that_starts_gives_all_moves_new_ids_before_anything_else(
    store: SqliteMapStore, far: dict[str, FarShard], step: str
) -> None:
    await form(store, far, "s1", "s2", "s3")
    far["s4"].gates[step].clear()
    async with controlled(store) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: step in far["s4"].begun.values())
        old = {move.id for move in (await controller.map()).moves}
    received = len(far["s4"].received)
    far["s4"].gates[step].set()
    async with controlled(store) as controller:
        done = await controller.settled()
    assert loads(done) == {"s1": 16, "s2": 16, "s3": 16, "s4": 16}
    assert not old & set(far["s4"].received[received:])
    assert not any(shard.freezes for shard in far.values())


async def test_a_controller_without_moves_writes_nothing_at_its_start(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2")
    before = await store.read()
    async with controlled(store) as controller:
        await until(lambda: controller.mover._map is not None)
    assert await store.read() == before


class Troubled:
    """A store some of whose swaps happen without their outcome being told, or do not happen at all."""

    def __init__(self, store: MapStore) -> None:
        self._store = store
        self.watch, self.close = store.watch, store.close
        self.untold = 0
        self.unread = 0
        self.unreadable = False
        self.refused = 0
        self.overtaken = 0

    async def read(self) -> Stored:
        if self.unreadable:
            self.unreadable = False
            raise Unavailable("no answer")
        return await self._store.read()

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        if self.refused:
            self.refused -= 1
            raise Unavailable("the disk is full")
        if self.overtaken:
            self.overtaken -= 1
            present = await self._store.read()
            await self._store.compare_and_swap(present.revision, present.document or b"")
        outcome = await self._store.compare_and_swap(revision, document)
        if self.untold or self.unread:
            self.unreadable = self.unread > 0
            self.untold, self.unread = max(0, self.untold - 1), max(0, self.unread - 1)
            raise Unavailable("no answer")
        return outcome


@pytest.mark.parametrize("trouble", ["untold", "unread", "refused", "overtaken"])
async def test_swaps_that_fail_or_are_overtaken_or_untold_change_nothing_in_the_end(
    store: SqliteMapStore, far: dict[str, FarShard], trouble: str
) -> None:
    await form(store, far, "s1", "s2", "s3")
    troubled = Troubled(store)
    far["s4"].gates["freeze"].clear()
    far["s4"].fails = 1
    async with controlled(troubled) as controller:
        added = await controller.changes.add("s4", far["s4"].url, 1)
        await until(lambda: any(shard.freezes for shard in far.values()))
        setattr(troubled, trouble, 12)
        far["s4"].gates["freeze"].set()
        assert loads(await controller.settled()) == {"s1": 16, "s2": 16, "s3": 16, "s4": 16}
        assert (await controller.ended(added.change))["partitions_done"] == 16, "each commit is counted once"
    assert getattr(troubled, trouble) < 12


async def test_a_change_whose_swap_was_untold_is_answered_as_done(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    troubled = Troubled(store)
    async with controlled(troubled) as controller:
        await until(lambda: controller.mover._map is not None)
        troubled.untold = 1
        assert (await controller.changes.add("s4", far["s4"].url, 1)).state == "joining"
        assert loads(await controller.settled())["s4"] == 16


async def test_a_store_that_cannot_be_read_for_a_while_is_waited_for(
    store: SqliteMapStore, far: dict[str, FarShard]
) -> None:
    await form(store, far, "s1", "s2", "s3")
    failing = 5

    class Unreadable(Troubled):
        def __init__(self, store: MapStore) -> None:
            super().__init__(store)
            self.watch = self._watch

        async def _watch(self, revision: int) -> Stored:
            nonlocal failing
            if failing:
                failing -= 1
                raise Unavailable("not now")
            return await store.watch(revision)

    async with controlled(Unreadable(store)) as controller:
        await controller.changes.add("s4", far["s4"].url, 1)
        assert loads(await controller.settled())["s4"] == 16
