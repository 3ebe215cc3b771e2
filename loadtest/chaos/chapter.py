"""One chapter of a chaos run: load and faults, then calm, then rest, then everything is read.

Owns: the order of things in a chapter, and the checks that need no history: the cluster comes back, ends its moves,
leaves nothing in doubt, can be read, lists what it shows, and keeps what was settled before.
Promises: when a chapter ends, or is given up, all its faults are over.
Leaves to others: which faults (schedule), the clients (crew), what the history proves (loadtest.histories).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import NamedTuple

from loadtest import processes
from loadtest.chaos.cluster import LIMITS, ChaosCluster
from loadtest.chaos.crew import Closing, Crew, ReadsError, Stored
from loadtest.chaos.nemeses import Nemeses
from loadtest.chaos.reshard import Reshard
from loadtest.chaos.schedule import CALM_S, Step
from loadtest.chaos.summary import Chapter
from loadtest.txn_doubts import Doubts

_BACK_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 40.0
_IDLE_TIMEOUT_S = 30.0
_DOUBTS_TIMEOUT_S = 2 * LIMITS["txn_timeout_s"] + 1.0  # as promised, and what a busy machine needs to look
_POLL_S = 0.1
_COMPLAINTS_MAX = 20
_LOG_LINES = 30


class GivenUp(Exception):
    """The chapter cannot go on; the message is a complaint."""


class Stage(NamedTuple):
    """Where chapters are played. `tell`: takes a word on what is being done. `hurry`, once set, ends the load."""

    cluster: ChaosCluster
    crew: Crew
    nemeses: Nemeses
    reshard: Reshard
    doubts: Doubts
    tell: Callable[[str], None]
    hurry: asyncio.Event

    async def play(self, chapter: Chapter, steps: Sequence[Step]) -> Closing | None:
        """None: it could not be brought to its end. Complaints go into the chapter."""
        try:
            return await self._play(chapter, steps)
        except (GivenUp, ReadsError) as error:
            chapter.complaints.append(f"{error}\n{processes.tail(self.cluster.log, _LOG_LINES)}")
            return None
        finally:
            chapter.complaints += self.crew.take_complaints()[:_COMPLAINTS_MAX]
            self.nemeses.heal()

    async def _play(self, chapter: Chapter, steps: Sequence[Step]) -> Closing:
        opening = await self.crew.turn_to(prefix_of(chapter.number))
        began_s = time.monotonic()
        self.crew.open_gates()
        self.tell("load and faults" if steps else "load")
        await self._unless_hurried(self.nemeses.run(steps, began_s))
        await self._unless_hurried(_sleep_until(began_s + chapter.seconds - CALM_S))
        self.nemeses.heal()
        healed_s = time.monotonic()
        self.tell("load, faults are over")
        await self._recover(chapter)
        await self._unless_hurried(_sleep_until(max(began_s + chapter.seconds, healed_s + CALM_S)))
        chapter.seconds = min(chapter.seconds, time.monotonic() - began_s) if self.hurry.is_set() else chapter.seconds
        self.tell("clients come to rest")
        await self._rest()
        await self._end_doubts(chapter)
        self.tell("reading everything")
        closing = await self.crew.close(opening)
        chapter.complaints += closing.wrong
        if not any(operation.outcome == "done" for operation in closing.operations):
            chapter.complaints.append("nothing at all was done in this chapter")
        return closing

    async def _unless_hurried(self, work: Coroutine[None, None, None]) -> None:
        """To its end, or until the run is to end early: then it is cancelled."""
        task, hurried = asyncio.ensure_future(work), asyncio.create_task(self.hurry.wait())
        try:
            await asyncio.wait([task, hurried], return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()
            is_over = task.done()
            task.cancel()
            await asyncio.gather(task, hurried, return_exceptions=True)
        if is_over:
            task.result()

    async def _recover(self, chapter: Chapter) -> None:
        """Raises GivenUp."""
        try:
            await self.cluster.wait_ready(_BACK_TIMEOUT_S)
        except RuntimeError as error:
            raise GivenUp(f"the cluster did not come back: {error}") from None
        if sentence := await self.reshard.settle(_SETTLE_TIMEOUT_S):
            chapter.complaints.append(f"{sentence}\n{processes.tail(self.cluster.log, _LOG_LINES)}")

    async def _rest(self) -> None:
        """Raises GivenUp."""
        self.crew.close_gates()
        try:
            async with asyncio.timeout(_IDLE_TIMEOUT_S):
                await self.crew.idle()
        except TimeoutError:
            raise GivenUp(f"requests are still under way {_IDLE_TIMEOUT_S:g} s after the last was sent") from None

    async def _end_doubts(self, chapter: Chapter) -> None:
        deadline_s = time.monotonic() + _DOUBTS_TIMEOUT_S
        while True:
            await self.doubts.look()
            if self.doubts.count == 0:
                return
            if time.monotonic() > deadline_s:
                count, oldest_s = self.doubts.count, self.doubts.oldest_s
                what = f"{count} transactions are in doubt" if count > 0 else "nobody can tell what is in doubt"
                sentence = f"{what} {_DOUBTS_TIMEOUT_S:g} s after the last call, the oldest for {oldest_s:g} s"
                chapter.complaints.append(sentence)
                return
            await asyncio.sleep(_POLL_S)

    async def look_again(self, settled: Mapping[int, Stored]) -> dict[int, list[str]]:
        """What is not as it was when its chapter ended, by chapter. The cluster is at rest."""
        found: dict[int, list[str]] = {}
        for number, before in settled.items():
            try:
                now = await self.crew.stored(prefix_of(number))
            except ReadsError as error:
                found[number] = [str(error)]
                continue
            changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
            found[number] = [
                f"{key} has changed after its chapter was over: {before.get(key)}, now {now.get(key)}"
                for key in sorted(changed)[:_COMPLAINTS_MAX]
            ]
        return found


def prefix_of(number: int) -> str:
    """Of all keys of that chapter but the accounts."""
    return f"chaos/{number:04d}/"


async def _sleep_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))
