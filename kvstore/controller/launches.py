"""What is known of the launcher, `kvstore up`: whether it is there, what it runs, what it is to run.

Owns: what its questions have told, and their answers.
Promises: a controller that has just started gives a launcher a moment to come before it says that there is none. While
its record is lost, or an old copy, nothing is to end, and those of the newest map that the nodes have are to run.
Leaves to others: who is wanted and who is a member (`membership`), the processes (`kvstore.launcher`).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from kvstore.config import Limits
from kvstore.controller.document import ClusterDocument
from kvstore.controller.launch_place import LaunchPlace
from kvstore.controller.membership import ClusterState
from kvstore.controller.recovery import Recovery
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import ChangeRefused
from kvstore.placement.cluster_map import Node

_LOST_PAUSE_S = 1.0
GRACE_S = 5.0  # for so long a launcher may be silent: after the end of its last question, or a start


class Launcher:
    """What its questions have told of a launcher. It asks again as soon as it is answered."""

    def __init__(self, poll_s: float, environment: Environment) -> None:
        self._clock_s = environment.monotonic_s
        self._known_s = poll_s + GRACE_S
        self._running: frozenset[str] = frozenset()
        self._began_s = self._clock_s()
        self._asked_s = float("-inf")
        self._came = asyncio.Event()

    def note(self, running: frozenset[str]) -> None:
        """It has asked, and runs these shards."""
        self._running, self._asked_s = running, self._clock_s()
        self._came.set()

    async def comes(self) -> bool:
        """Whether one is there.

        A controller that has just started does not know yet, and waits for its question, `GRACE_S` at most.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._began_s + GRACE_S - self._clock_s())):
                await self._came.wait()
        return self._is_there()

    def running(self) -> frozenset[str]:
        """The shards that it runs; none if no launcher is there."""
        return self._running if self._is_there() else frozenset()

    def may_run(self, shard_id: str, *, is_new: bool) -> bool:
        """Whether that process runs, as far as that is known; `is_new`: it was started in this controller's time."""
        unknown = not self._came.is_set() and self._clock_s() < self._began_s + GRACE_S
        return shard_id in self.running() or (unknown and not is_new)

    def _is_there(self) -> bool:
        return self._clock_s() - self._asked_s < self._known_s


class Launches:
    """What a launcher is to run. `place`: where it starts shards, if that is known."""

    def __init__(
        self, document: ClusterDocument, recovery: Recovery, limits: Limits, environment: Environment = SYSTEM
    ) -> None:
        self.place: LaunchPlace | None = None
        self.launcher = Launcher(limits.map_poll_s, environment)
        self._document = document
        self._recovery = recovery
        self._began_ms = environment.now_ms()

    async def after(self, revision: int, running: frozenset[str]) -> dict[str, Any]:
        """What a launcher is to run, as soon as the state has a higher revision.
        Waits for ever if none comes.

        `running`: the shards that it runs now.
        """
        self.launcher.note(running)
        present, state = await self._document.after(-1)
        if self._is_known_better(state):
            revision = -1
            await asyncio.sleep(_LOST_PAUSE_S)  # members may come to be known at any time
        elif revision > present:
            revision = -1  # it was told by a later record, of which an old copy was put back
        revision, state = await self._document.after(revision)
        stay = {*(node.id for node in state.map.nodes), *state.wanted} if state.map is not None else running
        if not running <= stay or not state.wanted.keys() <= running:
            await self._document.look_first(state)  # who would be ended, or begun as a new one, may have joined since
        keeps = self._is_known_better(state)
        nodes = state.map.nodes if state.map is not None else []
        return {
            "revision": revision,
            "formed": state.map is not None,
            "wanted": [{"id": shard_id, "weight": weight} for shard_id, weight in state.wanted.items()],
            "nodes": [{"id": node.id, "url": node.url} for node in (await self._newest(state) if keeps else nodes)],
            "keeps": keeps,
        }

    def _is_known_better(self, state: ClusterState) -> bool:
        """Whether the record here is lost, or an old copy: the nodes know better who belongs to the cluster."""
        return (self._recovery.lost(state) or self._document.behind(state)) is not None

    async def _newest(self, state: ClusterState) -> list[Node]:
        """The nodes of the newest map that they have, so that all of them are started, and can tell theirs."""
        with suppress(ChangeRefused):
            return (await self._recovery.find(state)).map.nodes
        return state.map.nodes if state.map is not None else []

    def may_run(self, shard_id: str, since_ms: int) -> bool:
        """Whether a launcher may still run a shard that was removed at that time.

        A controller that was started since then does not know at first, until a launcher has asked it something.
        """
        return self.launcher.may_run(shard_id, is_new=since_ms >= self._began_ms)

    def ending(self, state: ClusterState) -> list[str]:
        """Shards that a launcher still runs and that are no members any more."""
        if state.map is None or self._document.behind(state):
            return []
        stay = {*(node.id for node in state.map.nodes), *state.wanted}
        return sorted(self.launcher.running() - stay)
