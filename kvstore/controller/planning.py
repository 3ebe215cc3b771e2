"""A change of the cluster, from the question to what is stored: look, measure, decide, plan, store.

Owns: the order of these steps.
Promises: a change is planned and stored in the same step, with the room that it takes checked as of that very state.
One that asks for the same as a change under way is that change. `estimate` stores nothing.
Leaves to others: the rules (`membership`), their moves (`placement.moves`), what becomes of changes (`change_steps`),
the document's races (`document`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.controller import change_steps, changes, membership
from kvstore.controller.changes import Change, Kind
from kvstore.controller.document import ClusterDocument
from kvstore.controller.membership import ClusterState, Plan
from kvstore.controller.mover import new_move_id
from kvstore.controller.recovery import Recovery
from kvstore.controller.shards import ShardClients, Size
from kvstore.controller.sizes import check_room, estimate, expected_keys, group_partitions
from kvstore.environment import SYSTEM, Environment
from kvstore.placement.moves import planned
from kvstore.transport.change_documents import Plan as PlanShown

Rule = Callable[[ClusterState, Plan], ClusterState]


class Planner:
    """Plans and stores changes of the cluster.

    Every method may be called by any number of tasks at the same time.
    """

    def __init__(
        self,
        document: ClusterDocument,
        recovery: Recovery,
        shards: ShardClients,
        limits: Limits,
        environment: Environment = SYSTEM,
    ) -> None:
        self._document = document
        self._recovery = recovery
        self._shards = shards
        self._limits = limits
        self._environment = environment

    def new_id(self) -> str:
        """An id that no move, and no change, ever had."""
        return new_move_id(self._environment)

    def new_change(self, kind: Kind, shard: str | None = None, weight: int | None = None, **more: Any) -> Change:
        """A change that is asked for now."""
        now_ms = self._environment.now_ms()
        return Change(id=self.new_id(), kind=kind, shard=shard, weight=weight, began_ms=now_ms, **more)

    async def change(self, asked: Change, decide: Rule, *, moves: bool = True) -> tuple[ClusterState, str]:
        """The state after the change, and the change's id: that of one under way if it asks for the same.

        `decide` may be called several times. `moves`: it may plan some. Raises what `decide` raises; ChangeRefused
        where the disks have no room, Unavailable, ControllerBehind.
        """
        before = await self.read()
        has_moves = moves or (before.map is not None and bool(before.map.moves))
        sizes = await self.measured(before) if has_moves else {}

        def step(state: ClusterState) -> ClusterState:
            change = changes.running_like(state.changes, asked) or asked
            after = decide(state, self.plan(sizes, change.id))
            check_room(state.map, membership.formed_map(after), sizes)
            return self.taken(state, after, change, sizes)

        failpoints.hit("controller-before-plan")
        _, after = await self._document.change(step)
        failpoints.hit("controller-after-plan")
        known = changes.find(after.changes, asked.id) or changes.running_like(after.changes, asked)
        return after, known.id if known is not None else asked.id

    async def estimate(self, decide: Rule) -> PlanShown:
        """What the change would move. Raises as `change` does."""
        state = await self.read()
        sizes = await self.measured(state)
        after = decide(state, self.plan(sizes, ""))
        check_room(state.map, membership.formed_map(after), sizes)
        return estimate(membership.formed_map(after), sizes)

    async def read(self) -> ClusterState:
        """The state, for who wants to change it. Raises Unavailable, and ControllerBehind (`lost`) if it was lost."""
        state = await self._document.read()
        if lost := self._recovery.lost(state):
            raise lost
        return state

    async def measured(self, state: ClusterState) -> Mapping[str, Size]:
        """What the members hold, as far as they say."""
        return await self._shards.measure(state.map) if state.map is not None else {}

    def taken(
        self, before: ClusterState, after: ClusterState, change: Change, sizes: Mapping[str, Size]
    ) -> ClusterState:
        """The state `after` with the change in it, and how many keys it is expected to move."""
        expect = expected_keys(membership.formed_map(after), sizes)
        return change_steps.taken(before, after, change, expect, self._limits.changes_kept_max)

    def plan(self, sizes: Mapping[str, Size], change_id: str) -> Plan:
        """The rule by which moves of that change are planned, in groups of a size that follows from `sizes`."""
        return lambda cluster_map: planned(
            cluster_map,
            lambda source: group_partitions(cluster_map, source, sizes.get(source), self._limits),
            self.new_id,
            change_id,
        )
