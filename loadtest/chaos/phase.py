"""One phase of a chaos run: load and faults, then calm, then rest, then everything is read.

Owns: the order of things in a phase, and the checks that need no history: the cluster comes back, ends its moves,
leaves nothing in doubt, can be read, lists what it shows, has it on disk, and keeps what was settled before.
Promises: when a phase ends, or is given up, all its faults are over. What was done in one that is given up is there to
be judged, as far as it has ended.
Leaves to others: which faults (schedule), the clients (clients), what the history proves (loadtest.histories).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import NamedTuple

from loadtest.chaos import disk_audit
from loadtest.chaos.clients import Clients, Closing, ReadsError, Stored
from loadtest.chaos.cluster import LIMITS, ChaosCluster
from loadtest.chaos.doubts import Doubts
from loadtest.chaos.nemeses import Nemeses
from loadtest.chaos.reshard import NotSettled, Reshard
from loadtest.chaos.schedule import CALM_S, Step
from loadtest.chaos.summary import Phase
from loadtest.cluster import processes
from loadtest.cluster.armed import ArmedCluster

# For a machine that is busy with something else; a cluster at rest needs a fraction of each.
_BACK_TIMEOUT_S = 90.0
_SETTLE_TIMEOUT_S = 60.0
_IN_SYNC_TIMEOUT_S = 90.0  # a copy that fell out again and again is tried again after half a minute
_IDLE_TIMEOUT_S = 60.0
_DOUBTS_TIMEOUT_S = 2 * LIMITS["txn_timeout_s"] + 1.0  # as promised, and what a busy machine needs to look
_FILES_TIMEOUT_S, _FILES_TIMEOUT_S_MAX = 15.0, 60.0
_POLL_S = 0.1
_COMPLAINTS_MAX = 20
_LOG_LINES = 30


class GivenUp(Exception):
    """The phase cannot go on; the message says why."""


class Stage(NamedTuple):
    """Where phases are played. `tell`: takes a word on what is being done. `hurry`, once set, ends the load."""

    cluster: ChaosCluster
    clients: Clients
    nemeses: Nemeses
    reshard: Reshard
    doubts: Doubts
    tell: Callable[[str], None]
    hurry: asyncio.Event

    async def play(self, phase: Phase, steps: Sequence[Step]) -> Closing | None:
        """None: it could not be brought to its end, and calls are still under way.

        What is wrong goes into the phase, and what did not come to its end.
        """
        try:
            return await self._play(phase, steps)
        except (GivenUp, ReadsError) as error:
            self._note_unfinished(phase, str(error))
            self.nemeses.heal()
            return await self._so_far()
        finally:
            phase.complaints += self.clients.take_complaints()[:_COMPLAINTS_MAX]
            self.nemeses.heal()

    async def _play(self, phase: Phase, steps: Sequence[Step]) -> Closing:
        await self.clients.turn_to(prefix_of(phase.number))
        began_s = time.monotonic()
        self.clients.open_gates()
        self.tell("load and faults" if steps else "load")
        await self._unless_hurried(self.nemeses.run(steps, began_s))
        await self._unless_hurried(_sleep_until(began_s + phase.seconds - CALM_S))
        self.nemeses.heal()
        healed_s = time.monotonic()
        self.tell("load, faults are over")
        await self._recover(phase)
        await self._unless_hurried(_sleep_until(max(began_s + phase.seconds, healed_s + CALM_S)))
        phase.seconds = min(phase.seconds, time.monotonic() - began_s) if self.hurry.is_set() else phase.seconds
        self.tell("clients come to rest")
        await self._rest()
        await self._end_doubts(phase)
        self.tell("reading everything")
        closing = await self.clients.close()
        phase.complaints += closing.wrong
        self.tell("looking at the stores' files")
        wrong = await audited(self.cluster, self.clients)
        phase.complaints += wrong
        if not wrong:
            self.nemeses.copies.is_repaired()
        if not any(operation.outcome == "done" for operation in closing.operations):
            phase.complaints.append("nothing at all was done in this phase")
        return closing

    def _note_unfinished(self, phase: Phase, sentence: str) -> None:
        phase.unfinished.append(f"{sentence}\n{processes.tail(self.cluster.log, _LOG_LINES)}")

    async def _so_far(self) -> Closing | None:
        """What was done in a phase that is given up: without the reads at its end, which some checks need."""
        try:
            await self._rest()
        except GivenUp:
            return None
        return self.clients.so_far()

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

    async def _recover(self, phase: Phase) -> None:
        """Raises GivenUp."""
        try:
            await self.cluster.wait_ready(_BACK_TIMEOUT_S)
        except RuntimeError as error:
            raise GivenUp(f"the cluster did not come back: {error}") from None
        try:
            timeout_s = _SETTLE_TIMEOUT_S if self.cluster.replicas == 1 else _IN_SYNC_TIMEOUT_S
            if sentence := await self.reshard.settle(timeout_s):
                phase.complaints.append(f"{sentence}\n{processes.tail(self.cluster.log, _LOG_LINES)}")
        except NotSettled as error:
            self._note_unfinished(phase, str(error))

    async def _rest(self) -> None:
        """Raises GivenUp."""
        self.clients.close_gates()
        try:
            async with asyncio.timeout(_IDLE_TIMEOUT_S):
                await self.clients.idle()
        except TimeoutError:
            raise GivenUp(f"requests are still under way {_IDLE_TIMEOUT_S:g} s after the last was sent") from None

    async def _end_doubts(self, phase: Phase) -> None:
        if await self.doubts.none_left(_DOUBTS_TIMEOUT_S):
            return
        count, oldest_s = self.doubts.count, self.doubts.oldest_s
        what = f"{count} transactions are in doubt" if count > 0 else "no router can tell what is in doubt"
        sentence = f"{what}, and nothing of that has changed for {_DOUBTS_TIMEOUT_S:g} s, the oldest for {oldest_s:g} s"
        self._note_unfinished(phase, sentence)

    async def look_again(self, settled: Mapping[int, Stored]) -> dict[int, list[str]]:
        """What is not as it was when its phase ended, by phase. The cluster is at rest."""
        found: dict[int, list[str]] = {}
        for number, before in settled.items():
            try:
                now = await self.clients.stored(prefix_of(number))
            except ReadsError as error:
                found[number] = [str(error)]
                continue
            changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
            found[number] = [
                f"{key} has changed after its phase was over: {before.get(key)}, now {now.get(key)}"
                for key in sorted(changed)[:_COMPLAINTS_MAX]
            ]
        return found


async def audited(cluster: ArmedCluster, clients: Clients) -> list[str]:
    """What is listed lies in the file of its owner, and nowhere else, and is counted.
    Sentences on what is not so.

    What an expiry or an application has still to do is waited for, longer while it comes forward. Raises ReadsError.
    """
    began_s, before = time.monotonic(), list[str]()
    deadline_s = began_s + _FILES_TIMEOUT_S
    while True:
        cluster_map = await cluster.cluster_map()
        found = await asyncio.to_thread(disk_audit.look, cluster.data_dir, cluster_map)
        listed = await clients.stored("")
        wrong = [*found.wrong, *found.behind, *found.differences(listed)]
        counted = await clients.counted()
        if counted != len(listed):
            wrong.append(f"/v1/cluster counts {counted} keys, {len(listed)} are listed")
        if not wrong or (now_s := time.monotonic()) > deadline_s:
            return wrong[:_COMPLAINTS_MAX]
        if wrong != before:
            before, deadline_s = wrong, min(now_s + _FILES_TIMEOUT_S, began_s + _FILES_TIMEOUT_S_MAX)
        await asyncio.sleep(_POLL_S)


def prefix_of(number: int) -> str:
    """Of all keys of that phase."""
    return f"chaos/{number:04d}/"


async def _sleep_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))
