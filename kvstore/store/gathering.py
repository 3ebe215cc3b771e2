"""Fuller batches where records go to copies: how long the next operations of clients just answered are awaited.

Owns: how many operations are worth waiting for, and how long a record takes until it is on every disk; the wait.
Promises: behind the answers of a batch the next one waits no longer than a multiple of what a record took lately, and
never longer than `_WINDOW_S_MAX`. The wait ends as soon as as many operations are queued as were being worked on; where
some of them wait for rows from the file, it may end only with its time. A client that works alone never waits.
Leaves to others: what is queued and decided (`pipeline`).

A record costs its primary, its copy and the network between them much the same however few operations it carries.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from kvstore.environment import Environment

_WINDOW_S_MAX = 0.002
_WINDOW_COMMITS = 3  # so many times as long as a record took
_FIRST_COMMIT_S = 0.0005
_MEAN_SHARE = 0.125  # of the mean that each record counts for


class Gathering:
    """`queued`: how many operations wait to be decided."""

    def __init__(self, environment: Environment, queued: Callable[[], int]) -> None:
        self._environment = environment
        self._queued = queued
        self._commit_s = _FIRST_COMMIT_S
        self._ends_s = 0.0
        self._enough = 0
        self._decided = 0
        self._awaited = sys.maxsize
        self._waiting: asyncio.Future[None] | None = None

    def note_commit(self, seconds: float) -> None:
        """From its batch on a record took that long until it was on every disk that is waited for."""
        self._commit_s += (seconds - self._commit_s) * _MEAN_SHARE

    def note_decided(self, count: int) -> None:
        """The newest batch has so many operations; a step of the store has none."""
        self._decided = count

    def begin(self, batch_ops_max: int) -> None:
        """The newest batch was just answered, and nothing is on its way."""
        if self._decided:
            self._ends_s = self._environment.monotonic_s() + min(_WINDOW_COMMITS * self._commit_s, _WINDOW_S_MAX)
            self._enough = min(self._queued() + self._decided, batch_ops_max)

    def note_queued(self, count: int) -> None:
        """An operation is queued; so many are now."""
        if count >= self._awaited:
            _end(self._waiting)

    async def wait(self) -> None:
        """Until enough operations are queued, or the time is over."""
        left_s = self._ends_s - self._environment.monotonic_s()
        if left_s <= 0 or self._queued() >= self._enough:
            return
        self._awaited = self._enough
        self._waiting = waiting = asyncio.get_running_loop().create_future()
        timer = self._environment.call_later(left_s, _end, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            self._awaited = sys.maxsize

    def stop(self) -> None:
        """Something has come that must not wait."""
        self._ends_s = 0.0
        _end(self._waiting)


def _end(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
