"""Ends changes of the cluster: says `done` of one that has reached its goal, and keeps its write pauses.

Owns: when that is said.
Promises: a change is done only when clients are answered for all that it has moved, when the process of a shard that
it removed has ended, if the launcher runs it, and when the copies that the node of a shard that it added is to have are
in sync, also those that no map names yet. A controller that dies before it has said so finds that the goal is
reached, and says it.
Leaves to others: what the goal is (`changes`), moving (`mover`), what a launcher runs (`launches`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvstore.config import Limits
from kvstore.controller import change_steps, changes
from kvstore.controller.changes import Change
from kvstore.controller.copy_places import Places
from kvstore.controller.document import ClusterDocument
from kvstore.controller.membership import ClusterState
from kvstore.controller.mover import Mover
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import KvError
from kvstore.placement.cluster_map import ClusterMap
from kvstore.said_once import SaidOnce

_RETRY_S = 0.05
_log = logging.getLogger(__name__)


class ChangeCloser:
    """`run` it in a task of its own. `may_run`: whether the launcher may still run that shard's process; `places`:
    where copies are to be, None where there is one of everything."""

    def __init__(
        self,
        document: ClusterDocument,
        mover: Mover,
        may_run: Callable[[str, int], bool],
        limits: Limits,
        environment: Environment = SYSTEM,
        places: Callable[[ClusterMap], Places | None] = lambda cluster_map: None,
    ) -> None:
        self._environment = environment
        self._document = document
        self._mover = mover
        self._may_run = may_run
        self._places = places
        self._limits = limits

    async def run(self) -> None:
        """End what is done, for ever."""
        revision, said = -1, SaidOnce()
        while True:
            try:
                revision, state = await self._document.after(revision)
                while await self._close(state):
                    await asyncio.sleep(_RETRY_S)
                    state = await self._document.read()
                said.is_news("")
            except KvError as error:
                if said.is_news(error.detail):
                    _log.warning("changes that are done cannot be written down: %s", error)
                await asyncio.sleep(1.0)
                revision = -1

    async def _close(self, state: ClusterState) -> bool:
        """End what is done; whether one is left that waits for what no map shows."""
        if state.map is None:
            return False
        record, cluster_map = self._mover.record, state.map
        reached = [c for c in state.changes if c.is_running and changes.is_reached(c, cluster_map, state.wanted)]
        over = [c for c in state.changes if not c.is_running and c.id in record.known()]
        if not reached and not over:
            return False
        await self._mover.tries.caught_up(cluster_map)
        due = [change for change in (*reached, *over) if not self._waits(change, cluster_map)]
        if due:
            pauses = {change.id: self._mover.tries.pauses(cluster_map, change.id) for change in due}
            now_ms, ended_max = self._environment.now_ms(), self._limits.changes_kept_max
            await self._document.change(lambda present: change_steps.ended(present, pauses, now_ms, ended_max))
            for change in due:
                record.forget(change.id)
                _log.info("change %s is over: %s", change.id, changes.named(change))
        return len(due) < len(reached) + len(over)

    def _waits(self, change: Change, cluster_map: ClusterMap) -> bool:
        if self._mover.record.is_open(change.id):
            return True
        if not change.is_running or change.shard is None:
            return False
        match change.kind:
            case "promote":
                return (places := self._places(cluster_map)) is not None and change.shard in places.unserved()
            case "add":
                return (places := self._places(cluster_map)) is not None and bool(places.awaited_on(change.shard))
            case "remove":
                return self._may_run(change.shard, change.began_ms)
            case _:
                return False
