"""What the controller can tell of changes at a moment.
Its document, and what is under way in memory, as of one map.

Owns: putting both together.
Promises: nothing of a change that the document shows as moved is missing from its figures.
Leaves to others: the form of what is told (`change_report`), HTTP (`routes`).
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.controller import change_report, changes
from kvstore.controller.change_report import Around, Doing
from kvstore.controller.changes import Change
from kvstore.controller.copy_places import Places
from kvstore.controller.document import ClusterDocument
from kvstore.controller.launches import Launches
from kvstore.controller.membership import ClusterState
from kvstore.controller.mover import Mover
from kvstore.environment import SYSTEM
from kvstore.errors import NotFound
from kvstore.placement.cluster_map import ClusterMap
from kvstore.transport.change_documents import Change as ChangeShown
from kvstore.transport.change_documents import LastChange


class ChangeViews:
    """`opening`: why partitions of a lost shard are not opened yet, "" if nothing is in the way.

    `places`: where copies are to be, None where there is one copy of everything.
    """

    def __init__(
        self,
        document: ClusterDocument,
        mover: Mover,
        launches: Launches,
        opening: Callable[[], str],
        places: Callable[[ClusterMap], Places | None],
    ) -> None:
        self._places = places
        self._document = document
        self._launches = launches
        self._mover = mover
        self._opening = opening

    async def all(self) -> list[ChangeShown]:
        """All that are known, the newest first. Raises Unavailable."""
        state = await self._state()
        return [self._described(change, state) for change in reversed(state.changes)]

    async def one(self, change_id: str) -> ChangeShown:
        """The change of that id. Raises NotFound, Unavailable."""
        state = await self._state()
        change = changes.find(state.changes, change_id)
        if change is None:
            raise NotFound(
                f"there is no change {change_id[:100]!r}, or it ended long ago: only the last ones are kept.",
                title="There is no such change",
                next_step="GET /v1/changes lists those that are known.",
            )
        return self._described(change, state)

    def last(self, state: ClusterState) -> LastChange | None:
        """`last` of GET /v1/moves."""
        pauses = {}
        if state.map is not None:
            pauses = {change.id: self._mover.tries.pauses(state.map, change.id) for change in state.changes}
        return change_report.last_change(state.changes, pauses, SYSTEM.now_ms())

    async def _state(self) -> ClusterState:
        state = await self._document.read()
        if state.map is not None:
            await self._mover.tries.caught_up(state.map)
        return state

    def _described(self, change: Change, state: ClusterState) -> ChangeShown:
        around = Around()
        if state.map is not None:
            around = Around(
                doing=self._mover.tries.doing(state.map).get(change.id, Doing()),
                pauses=self._mover.tries.pauses(state.map, change.id),
                opening=self._opening(),
                copies=self._awaited(change, state.map),
                unanswered=self._mover.record.is_open(change.id),
                ending=change.kind == "remove" and self._launches.may_run(change.shard or "", change.began_ms),
            )
        return change_report.described(change, state, around, SYSTEM.now_ms())

    def _awaited(self, change: Change, cluster_map: ClusterMap) -> tuple[str, ...]:
        if not change.is_running or change.kind != "add" or change.shard is None:
            return ()
        places = self._places(cluster_map)
        return tuple(places.awaited_on(change.shard)) if places is not None else ()
