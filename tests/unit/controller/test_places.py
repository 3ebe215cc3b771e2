"""Places for moves: never too many, never lost, and no move waits for ever."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.controller.move_slots import MoveSlots

PAIRS = [(source, to) for source in "abc" for to in "xyz"]


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Worker:
    """Keeps its place until it is told to end."""

    def __init__(self, places: MoveSlots, pair: tuple[str, str]) -> None:
        self.pair = pair
        self.at_work = False
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._run(places))

    async def _run(self, places: MoveSlots) -> None:
        async with places.place(*self.pair):
            self.at_work = True
            try:
                await self.end.wait()
            finally:
                self.at_work = False


async def start(places: MoveSlots, *pairs: tuple[str, str]) -> list[Worker]:
    workers = [Worker(places, pair) for pair in pairs]
    await turns()
    return workers


async def finish(*workers: Worker) -> None:
    for worker in workers:
        worker.end.set()
    await asyncio.gather(*(worker.task for worker in workers))
    await turns()


async def test_so_many_work_in_all() -> None:
    workers = await start(MoveSlots(2, 9), ("a", "x"), ("b", "y"), ("c", "z"))
    assert [worker.at_work for worker in workers] == [True, True, False]
    await finish(workers[0])
    assert workers[2].at_work
    await finish(*workers[1:])


async def test_so_many_work_for_each_shard_and_others_pass() -> None:
    workers = await start(MoveSlots(9, 2), ("a", "x"), ("b", "x"), ("c", "x"), ("c", "y"), ("a", "y"))
    assert [worker.at_work for worker in workers] == [True, True, False, True, True]
    await finish(workers[1])
    assert workers[2].at_work
    await finish(*workers)


async def test_who_waits_is_not_passed_for_ever_by_those_who_want_the_same_shard() -> None:
    places = MoveSlots(9, 2)
    first, second = await start(places, ("a", "x"), ("b", "x"))
    (patient,) = await start(places, ("c", "x"))
    (late,) = await start(places, ("c", "x"))
    await finish(first)
    assert patient.at_work
    assert not late.at_work
    await finish(second)
    assert late.at_work
    await finish(patient, late)


@pytest.mark.parametrize("at_work", [True, False])
async def test_a_cancelled_one_leaves_its_place(at_work: bool) -> None:
    places = MoveSlots(1, 1)
    workers = await start(places, ("a", "x"), ("b", "y"), ("c", "z"))
    gone = workers[0] if at_work else workers[1]
    gone.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone.task
    rest = [worker for worker in workers if worker is not gone]
    await finish(rest[0])
    assert rest[1].at_work
    await finish(rest[1])


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.sampled_from(PAIRS), max_size=12),
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=30),
)
@settings(max_examples=60)
def test_never_too_many_and_all_come_to_their_end(
    at_once_max: int, of_shard_max: int, pairs: list[tuple[str, str]], endings: list[tuple[int, bool]]
) -> None:
    async def run() -> None:
        everyone = await start(MoveSlots(at_once_max, of_shard_max), *pairs)
        workers = list(everyone)
        for choice, is_cancelled in endings:
            check(everyone)
            if workers:
                worker = workers.pop(choice % len(workers))
                if is_cancelled:
                    worker.task.cancel()
                worker.end.set()
                await turns()
        for _ in range(len(workers)):
            check(everyone)
            worker = next((worker for worker in workers if worker.at_work), None)
            if worker is not None:
                await finish(worker)
        assert all(worker.task.done() for worker in everyone)

    def check(workers: list[Worker]) -> None:
        at_work = [worker.pair for worker in workers if worker.at_work]
        shards = Counter(shard for pair in at_work for shard in pair)
        assert len(at_work) <= at_once_max
        assert max(shards.values(), default=0) <= of_shard_max
        for worker in workers:
            has_room = len(at_work) < at_once_max and all(shards[shard] < of_shard_max for shard in worker.pair)
            if has_room and not worker.at_work and not worker.task.done():
                waiting = [other for other in workers if not other.at_work and not other.task.done()]
                before = waiting[: waiting.index(worker)]
                assert any(set(other.pair) & set(worker.pair) for other in before)

    asyncio.run(run())


async def test_places_are_not_lost_when_who_works_and_who_waits_are_cancelled_at_once() -> None:
    """As a cancelled change does: a waiter must not be given the place of a worker."""
    places = MoveSlots(1, 9)
    workers = await start(places, ("a", "x"), ("b", "y"), ("c", "z"))
    for worker in workers[:2]:
        worker.task.cancel()
    found = await asyncio.gather(*(worker.task for worker in workers[:2]), return_exceptions=True)
    assert [type(each) for each in found] == [asyncio.CancelledError] * 2
    await turns()
    assert workers[2].at_work
    await finish(workers[2])
