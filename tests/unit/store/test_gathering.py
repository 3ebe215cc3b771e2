"""How long a batch waits to become fuller, on a clock that a test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.environment import Environment
from kvstore.store import gathering
from kvstore.store.gathering import Gathering


class Clock(Environment):
    """Each wait that is not ended is over at once, and that much later; `comes` says what comes during it."""

    gathering: Gathering

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waited_s: list[float] = []
        self.comes: list[int] = []
        self.queue: list[int] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, function: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """The wait that begins now."""
        for _ in range(self.comes.pop(0) if self.comes else 0):
            self.queue.append(0)
            self.gathering.note_queued(len(self.queue))
        (waiting,) = args
        if not waiting.done():
            self.now_s += delay_s
            self.waited_s.append(delay_s)
        return super().call_later(0, function, *args)


def gathering_with(queued: int, comes: list[int], commit_s: float = 1.0) -> tuple[Gathering, Clock]:
    clock = Clock()
    clock.queue, clock.comes = [0] * queued, comes
    clock.gathering = Gathering(clock, lambda: len(clock.queue))
    for _ in range(100):
        clock.gathering.note_commit(commit_s)
    return clock.gathering, clock


async def test_the_wait_ends_when_as_many_are_queued_as_were_being_worked_on() -> None:
    gathered, clock = gathering_with(queued=2, comes=[1, 1, 1, 1])
    gathered.note_decided(3)
    gathered.begin(100)
    await gathered.wait()
    assert len(clock.queue) == 5
    assert len(clock.waited_s) == 2, "it ends in the third wait"


async def test_the_wait_ends_when_none_comes_any_more() -> None:
    gathered, clock = gathering_with(queued=2, comes=[1, 0, 1])
    gathered.note_decided(8)
    gathered.begin(100)
    await gathered.wait()
    assert len(clock.queue) == 3
    assert clock.waited_s == [gathering._QUIET_S] * 2


@pytest.mark.parametrize("commit_s", [0.0004, 0.01])
async def test_the_wait_is_bounded_by_what_a_record_takes(commit_s: float) -> None:
    gathered, clock = gathering_with(queued=1, comes=[1] * 50, commit_s=commit_s)
    gathered.note_decided(500)
    gathered.begin(1000)
    await gathered.wait()
    window_s = min(gathering._WINDOW_COMMITS * commit_s, gathering._WINDOW_S_MAX)
    assert sum(clock.waited_s) == pytest.approx(window_s)


async def test_a_client_that_works_alone_does_not_wait() -> None:
    gathered, clock = gathering_with(queued=0, comes=[])
    gathered.note_decided(1)
    gathered.begin(100)
    clock.queue.append(0)
    await gathered.wait()
    assert clock.waited_s == []


async def test_what_comes_long_behind_the_last_answers_does_not_wait() -> None:
    gathered, clock = gathering_with(queued=0, comes=[])
    gathered.note_decided(8)
    gathered.begin(100)
    clock.queue.append(0)
    clock.now_s += gathering._WINDOW_S_MAX
    await gathered.wait()
    assert clock.waited_s == []


async def test_no_more_are_waited_for_than_a_batch_takes() -> None:
    gathered, clock = gathering_with(queued=4, comes=[1])
    gathered.note_decided(8)
    gathered.begin(4)
    await gathered.wait()
    assert clock.waited_s == []


async def test_what_must_not_wait_ends_the_wait() -> None:
    gathered, clock = gathering_with(queued=1, comes=[1, 1, 1])
    gathered.note_decided(8)
    gathered.begin(100)
    gathered.stop()
    await gathered.wait()
    assert clock.waited_s == []


async def test_a_step_of_the_store_leaves_the_wait_for_clients_as_it_was() -> None:
    gathered, clock = gathering_with(queued=1, comes=[1])
    gathered.note_decided(1)
    gathered.begin(100)
    gathered.note_decided(0)
    gathered.begin(100)
    await gathered.wait()
    assert len(clock.queue) == 2
