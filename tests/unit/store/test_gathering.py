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
    """A wait that is not ended is over at once, and that much later; so many operations as `comes` come during it."""

    gathering: Gathering

    def __init__(self, comes: int) -> None:
        self.now_s = 100.0
        self.waited_s: list[float] = []
        self.comes = comes
        self.queue: list[int] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, function: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """The wait that begins now."""
        (waiting,) = args
        while self.comes and not waiting.done():
            self.comes -= 1
            self.queue.append(0)
            self.gathering.note_queued(len(self.queue))
        if not waiting.done():
            self.now_s += delay_s
            self.waited_s.append(delay_s)
        return super().call_later(0, function, *args)


def gathering_with(queued: int, comes: int = 0, commit_s: float = 1.0) -> tuple[Gathering, Clock]:
    clock = Clock(comes)
    clock.queue = [0] * queued
    clock.gathering = Gathering(clock, lambda: len(clock.queue))
    for _ in range(100):
        clock.gathering.note_commit(commit_s)
    return clock.gathering, clock


async def test_the_wait_ends_when_as_many_are_queued_as_were_being_worked_on() -> None:
    gathered, clock = gathering_with(queued=2, comes=10)
    gathered.note_decided(3)
    gathered.begin(100)
    await gathered.wait()
    assert len(clock.queue) == 5
    assert clock.waited_s == []


@pytest.mark.parametrize("commit_s", [0.0004, 0.01])
async def test_the_wait_is_bounded_by_what_a_record_takes(commit_s: float) -> None:
    gathered, clock = gathering_with(queued=1, comes=50, commit_s=commit_s)
    gathered.note_decided(500)
    gathered.begin(1000)
    await gathered.wait()
    window_s = min(gathering._WINDOW_COMMITS * commit_s, gathering._WINDOW_S_MAX)
    assert clock.waited_s == [pytest.approx(window_s)]


async def test_a_client_that_works_alone_does_not_wait() -> None:
    gathered, clock = gathering_with(queued=0)
    gathered.note_decided(1)
    gathered.begin(100)
    clock.queue.append(0)
    await gathered.wait()
    assert clock.waited_s == []


async def test_what_comes_long_behind_the_last_answers_does_not_wait() -> None:
    gathered, clock = gathering_with(queued=0)
    gathered.note_decided(8)
    gathered.begin(100)
    clock.queue.append(0)
    clock.now_s += gathering._WINDOW_S_MAX
    await gathered.wait()
    assert clock.waited_s == []


async def test_no_more_are_waited_for_than_a_batch_takes() -> None:
    gathered, clock = gathering_with(queued=4, comes=1)
    gathered.note_decided(8)
    gathered.begin(4)
    await gathered.wait()
    assert clock.waited_s == []


async def test_what_must_not_wait_ends_the_wait() -> None:
    gathered, clock = gathering_with(queued=1, comes=3)
    gathered.note_decided(8)
    gathered.begin(100)
    gathered.stop()
    await gathered.wait()
    assert clock.waited_s == []


async def test_a_step_of_the_store_leaves_the_wait_for_clients_as_it_was() -> None:
    gathered, clock = gathering_with(queued=1, comes=1)
    gathered.note_decided(1)
    gathered.begin(100)
    gathered.note_decided(0)
    gathered.begin(100)
    await gathered.wait()
    assert len(clock.queue) == 2
