"""What every backend of the controller's store must keep to. A new backend is one more entry in `BACKENDS`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from kvstore.controller.map_store.interface import MapStore, Stored, Told
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.errors import Unavailable


async def _open_sqlite(place: Path) -> MapStore:
    return await open_sqlite(place / "controller-0.db")


BACKENDS = {"sqlite": _open_sqlite}

Open = Callable[[], Awaitable[MapStore]]


@pytest.fixture(params=BACKENDS)
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens the same store again, after closing it where it is open."""
    opened: list[MapStore] = []

    async def open_again() -> MapStore:
        for store in opened:
            await store.close()
        opened[:] = [await BACKENDS[request.param](tmp_path)]
        return opened[0]

    yield open_again
    for store in opened:
        await store.close()


@pytest.fixture
async def store(reopen: Open) -> MapStore:
    return await reopen()


async def swap(store: MapStore, revision: int, document: bytes) -> int:
    following = await store.compare_and_swap(revision, document)
    assert following is not None
    return following


async def test_a_new_store_holds_nothing_at_revision_0(store: MapStore) -> None:
    assert await store.read() == Stored(0, None)


async def test_a_swap_from_the_present_revision_replaces_the_document(store: MapStore) -> None:
    first = await swap(store, 0, b"one")
    assert first > 0
    assert await store.read() == Stored(first, b"one")
    second = await swap(store, first, b"two")
    assert second > first
    assert await store.read() == Stored(second, b"two")


async def test_an_empty_document_is_a_document(store: MapStore) -> None:
    assert await store.read() != Stored(await swap(store, 0, b""), None)
    assert (await store.read()).document == b""


async def test_a_swap_from_another_revision_changes_nothing(store: MapStore) -> None:
    present = await swap(store, await swap(store, 0, b"one"), b"two")
    for revision in (0, present - 1, present + 1):
        assert await store.compare_and_swap(revision, b"lost") is None
    assert await store.read() == Stored(present, b"two")


async def test_swapping_in_an_equal_document_is_a_change(store: MapStore) -> None:
    first = await swap(store, 0, b"same")
    assert await swap(store, first, b"same") > first


async def test_of_many_swaps_at_once_from_one_revision_exactly_one_succeeds(store: MapStore) -> None:
    revision = 0
    for round_number in range(10):
        documents = [b"%d/%d" % (round_number, i) for i in range(8)]
        outcomes = await asyncio.gather(*(store.compare_and_swap(revision, document) for document in documents))
        (winner,) = [i for i, outcome in enumerate(outcomes) if outcome is not None]
        stored = await store.read()
        assert stored == Stored(outcomes[winner] or 0, documents[winner])
        revision = stored.revision


async def test_writers_that_read_and_try_again_lose_no_update(store: MapStore) -> None:
    async def add(times: int) -> None:
        while times:
            revision, document = await store.read()
            if await store.compare_and_swap(revision, b"%d" % (int(document or b"0") + 1)) is not None:
                times -= 1

    await asyncio.gather(*(add(5) for _ in range(6)))
    assert (await store.read()).document == b"30"


async def test_what_was_acknowledged_is_there_after_reopening(reopen: Open) -> None:
    document = bytes(range(256)) * 1000
    revision = await swap(await reopen(), 0, document)
    assert await (await reopen()).read() == Stored(revision, document)
    following = await swap(await reopen(), revision, b"next")
    assert await (await reopen()).read() == Stored(following, b"next")


async def test_a_watcher_of_an_older_revision_returns_at_once(store: MapStore) -> None:
    assert await store.watch(-1) == Stored(0, None)
    revision = await swap(store, 0, b"one")
    assert await store.watch(0) == Stored(revision, b"one")


async def test_all_watchers_are_woken_by_a_swap(store: MapStore) -> None:
    watchers = [asyncio.create_task(store.watch(0)) for _ in range(5)]
    await asyncio.sleep(0)
    revision = await swap(store, 0, b"one")
    assert await asyncio.gather(*watchers) == [Stored(revision, b"one")] * 5


async def test_a_watcher_is_not_woken_by_a_swap_that_lost(store: MapStore) -> None:
    revision = await swap(store, 0, b"one")
    watcher = asyncio.create_task(store.watch(revision))
    await store.compare_and_swap(0, b"lost")
    await store.read()
    assert not watcher.done()
    following = await swap(store, revision, b"two")
    assert await watcher == Stored(following, b"two")


async def test_a_watcher_that_follows_misses_no_last_change(store: MapStore) -> None:
    async def follow() -> bytes | None:
        revision, document = 0, None
        while document != b"last":
            revision, document = await store.watch(revision)
        return document

    followers = [asyncio.create_task(follow()) for _ in range(4)]
    revision = 0
    for i in range(30):
        revision = await swap(store, revision, b"%d" % i)
    await swap(store, revision, b"last")
    assert await asyncio.gather(*followers) == [b"last"] * 4


async def test_a_cancelled_watcher_leaves_the_others_watching(store: MapStore) -> None:
    stays, goes = asyncio.create_task(store.watch(0)), asyncio.create_task(store.watch(0))
    await store.read()
    goes.cancel()
    with pytest.raises(asyncio.CancelledError):
        await goes
    revision = await swap(store, 0, b"one")
    assert await stays == Stored(revision, b"one")


async def test_a_swap_whose_caller_was_cancelled_is_whole_or_absent_and_wakes_watchers(store: MapStore) -> None:
    watcher = asyncio.create_task(store.watch(0))
    await store.read()
    swapping = asyncio.create_task(store.compare_and_swap(0, b"one"))
    await asyncio.sleep(0)
    swapping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swapping
    stored = await store.read()
    assert stored in (Stored(0, None), Stored(stored.revision, b"one"))
    if stored.document is None:
        await swap(store, 0, b"one")
    assert (await watcher).document == b"one"


async def test_closing_ends_watchers_and_refuses_what_comes_after(store: MapStore) -> None:
    watcher = asyncio.create_task(store.watch(0))
    await store.read()
    await store.close()
    with pytest.raises(Unavailable):
        await watcher
    with pytest.raises(Unavailable):
        await store.read()
    with pytest.raises(Unavailable):
        await store.compare_and_swap(0, b"late")


async def test_a_swap_under_way_at_the_close_ends_first(reopen: Open) -> None:
    store = await reopen()
    swapping = asyncio.create_task(store.compare_and_swap(0, b"one"))
    await asyncio.sleep(0)
    await store.close()
    revision = await swapping
    assert await (await reopen()).read() == Stored(revision or 0, b"one")


# --- what stores have told --------------------------------------------------------------------------------------------


async def test_the_highest_numbers_that_a_store_has_told_are_kept(store: MapStore, reopen: Open) -> None:
    assert await store.tell("a", Told(5, 50)) == Told(5, 50)
    assert await store.tell("a", Told(3, 60)) == Told(5, 60)
    assert await store.tell("b", Told(1, 1)) == Told(1, 1)
    again = await reopen()
    assert await again.tell("a", Told()) == Told(5, 60)
    assert await again.read() == Stored(0, None)  # it is no change of the document


async def test_a_store_that_was_forgotten_begins_again(store: MapStore) -> None:
    await store.tell("a", Told(5, 50))
    assert await store.forget("a") == Told(5, 50)
    assert await store.forget("a") == Told()
    assert await store.tell("a", Told(2, 2)) == Told(2, 2)


async def test_a_clock_floor_is_told_from_then_on_and_never_lowered(store: MapStore, reopen: Open) -> None:
    await store.tell("a", Told(5, 50))
    await store.forget("a", 900)
    assert await store.tell("b", Told()) == Told()
    assert await store.tell("a", Told()) == Told(0, 0, 900)
    again = await reopen()
    assert await again.tell("a", Told(7, 901)) == Told(7, 901, 900)
    assert await again.forget("a", 800) == Told(7, 901, 900)
    assert (await again.tell("a", Told(1, 1))).clock_floor == 900
    assert (await again.tell("b", Told())).clock_floor == 0


async def test_telling_wakes_no_watcher_of_the_document(store: MapStore) -> None:
    watcher = asyncio.create_task(store.watch(0))
    await store.tell("a", Told(5, 50))
    await asyncio.sleep(0)
    assert not watcher.done()
    await swap(store, 0, b"one")
    assert (await asyncio.wait_for(watcher, 60)).document == b"one"


async def test_a_document_is_kept_beside_the_present_one_and_changes_nothing(store: MapStore) -> None:
    await store.compare_and_swap(0, b"present")
    await store.keep("format3", b"first")
    await store.keep("format3", b"second")
    assert await store.read() == Stored(1, b"present")
