"""The event loop on virtual time: a clock that jumps, processes that die or stand still, hangs that are noticed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.simulate import loop as loops
from loadtest.simulate.disk import SimulatedDisk
from loadtest.simulate.environment import SimulatedEnvironment
from loadtest.simulate.loop import Hang, Process, SimulatedLoop


@pytest.fixture
def loop() -> Iterator[SimulatedLoop]:
    loop = SimulatedLoop()
    yield loop
    loop.end()


def begin(loop: SimulatedLoop, process: Process, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return loop.create_task(work, context=process.context)


def test_an_hour_passes_at_once(loop: SimulatedLoop) -> None:
    began_s = time.monotonic()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.time() >= 3600
    assert time.monotonic() - began_s < 60


def test_timers_come_in_the_order_of_their_times_and_equal_ones_in_that_of_their_start(loop: SimulatedLoop) -> None:
    seen: list[str] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append(name)

    async def all_of_them() -> None:
        await asyncio.gather(wait("late", 2), wait("first", 1), wait("second", 1))

    loop.run_until_complete(all_of_them())
    assert seen == ["first", "second", "late"]


def test_waiting_for_what_never_comes_is_a_hang(loop: SimulatedLoop) -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Hang, match="nothing is ready"):
        loop.run_until_complete(wait())


def test_events_without_end_that_bring_nothing_forward_are_a_hang(
    loop: SimulatedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "EVENTS_MAX", 1000)

    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Hang, match="1,000 events"):
        loop.run_until_complete(spin())


def test_a_killed_process_stops_where_it_is_without_cleaning_up(loop: SimulatedLoop) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            seen.append("begun")
            await asyncio.sleep(1)
            seen.append("went on")
        finally:
            seen.append("cleaned up")

    process = Process("p")
    task = begin(loop, process, work())
    loop.call_later(0.5, process.kill)
    loop.run_until_complete(asyncio.sleep(5))
    assert seen == ["begun"]
    assert not task.done()


def test_a_process_may_be_killed_before_any_of_its_events(loop: SimulatedLoop) -> None:
    async def count(seen: list[int]) -> None:
        for number in range(10):
            seen.append(number)
            await asyncio.sleep(0)

    lengths = []
    for events in range(12):
        seen: list[int] = []
        process = Process("p")
        process.dies_after = events
        begin(loop, process, count(seen))
        loop.run_until_complete(asyncio.sleep(1))
        lengths.append(len(seen))
    assert lengths == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]


def test_a_process_that_stands_still_does_everything_later_and_nothing_twice(loop: SimulatedLoop) -> None:
    seen: list[float] = []

    async def tick() -> None:
        for _ in range(3):
            await asyncio.sleep(1)
            seen.append(loop.time())

    process = Process("p")
    begin(loop, process, tick())
    loop.call_later(1.5, setattr, process, "stands_still", True)
    loop.call_later(10, loop.go_on, process)
    loop.run_until_complete(asyncio.sleep(20))
    assert [round(at_s) for at_s in seen] == [1, 10, 11]


def test_timers_of_a_host_that_sleeps_have_as_long_to_go_as_before_and_come_in_the_order_of_their_times(
    loop: SimulatedLoop,
) -> None:
    seen: list[tuple[str, int]] = []

    async def work(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, round(loop.now_s)))

    sleeper, other = Process("p"), Process("q")
    for process, name, seconds in ((sleeper, "late", 6), (sleeper, "due", 4), (other, "other", 9)):
        begin(loop, process, work(name, seconds))
    loop.call_later(3, setattr, sleeper, "stands_still", True)
    loop.call_later(5, loop.wake, sleeper, 2.0)
    loop.run_until_complete(asyncio.sleep(20))
    assert seen == [("due", 6), ("late", 8), ("other", 9)]


def test_works_that_wait_for_their_own_end_are_closed_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """As a link that logs what ends its session: at the end of a run that is no error."""
    loop = SimulatedLoop()

    async def work() -> None:
        try:
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(1)
        except Exception:
            logging.getLogger("kvstore").exception("this is not to be read")

    begin(loop, Process("p"), work())
    loop.run_until_complete(asyncio.sleep(1))
    loop.end()
    logging.getLogger("kvstore").error("said afterwards")
    assert [record.getMessage() for record in caplog.records] == ["said afterwards"]


def test_the_digest_tells_runs_apart() -> None:
    def digest(seconds: float) -> str:
        loop = SimulatedLoop()
        loop.run_until_complete(asyncio.sleep(seconds))
        loop.end()
        return loop.log.digest

    assert digest(1) == digest(1)
    assert digest(1) != digest(1.001)


def test_a_thread_ends_later_than_it_works_and_others_go_on(loop: SimulatedLoop) -> None:
    environment = SimulatedEnvironment(loop, random.Random(1), SimulatedDisk())
    times: list[float] = []

    async def work() -> float:
        begin_s = loop.time()
        await environment.in_thread(lambda: times.append(loop.time()))
        assert begin_s < times[0] < loop.time()
        return loop.time() - begin_s

    async def both() -> list[float]:
        return await asyncio.gather(work(), work())

    began_s = loop.time()
    spent = loop.run_until_complete(both())
    assert sum(spent) > loop.time() - began_s


def test_clocks_drift_jump_and_begin_again(loop: SimulatedLoop) -> None:
    environment = SimulatedEnvironment(loop, random.Random(1), SimulatedDisk())
    before_s, before_ms = environment.monotonic_s(), environment.now_ms()
    loop.run_until_complete(asyncio.sleep(100))
    passed_s = environment.monotonic_s() - before_s
    assert passed_s != pytest.approx(100, abs=1e-6)
    assert passed_s == pytest.approx(100, rel=0.011)
    environment.jump(-200_000)
    assert environment.now_ms() < before_ms
    boot = environment.boot
    environment.reboot()
    assert environment.boot != boot


def test_free_space_is_that_of_the_simulated_disk(loop: SimulatedLoop) -> None:
    disk = SimulatedDisk()
    environment = SimulatedEnvironment(loop, random.Random(1), disk)
    disk.open(Path("/data/file"), create=True).pwrite(bytes(1000), 0)
    disk.capacity = 1500
    assert environment.free_bytes(Path("/data")) == 500
