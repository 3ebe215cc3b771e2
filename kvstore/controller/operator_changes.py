"""What people ask of the cluster: shards that join, leave or weigh otherwise, moves, and maps that are taken again.

Owns: what is asked of others before a change is decided.
Promises: what people ask for is stored before it is answered, and planned in the same step; `plan_…` changes nothing.
Leaves to others: HTTP (`routes`), every rule (`membership`), measuring, planning and storing (`planning`), moving
(`mover`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec

from kvstore.config import Limits
from kvstore.controller import change_steps, changes, membership
from kvstore.controller.changes import Change, Kind
from kvstore.controller.document import ClusterDocument
from kvstore.controller.launches import Launches
from kvstore.controller.membership import ClusterState
from kvstore.controller.planning import Planner, Rule
from kvstore.controller.recovery import Recovery, check, recovered
from kvstore.controller.shards import ShardClients, Size
from kvstore.controller.sizes import check_room
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import ChangeRefused, NotFound
from kvstore.placement.cluster_map import ClusterMap, Home, Shard, at_home
from kvstore.transport.change_documents import Plan as PlanShown

_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What became of a call about one shard: its state ("wanted", "gone" or the member's), as of an epoch.

    `change`: the id of the change that it is.
    """

    id: str
    state: str
    epoch: int
    change: str


class Replanned(NamedTuple):
    """What became of a call about all moves: the map, and the id of the change that it is."""

    map: ClusterMap
    change: str


class OperatorChanges:
    """Every method may be called by any number of tasks at the same time."""

    def __init__(
        self,
        document: ClusterDocument,
        planner: Planner,
        recovery: Recovery,
        launches: Launches,
        shards: ShardClients,
        limits: Limits,
        environment: Environment = SYSTEM,
    ) -> None:
        self._document = document
        self._planner = planner
        self.recovery = recovery
        self._launches = launches
        self._shards = shards
        self._limits = limits
        self._environment = environment

    async def accept_old(self, shard_id: str, confirm: str) -> dict[str, Any]:
        """The shard may start with an older copy of its file than it has told of.
        Returns what it had told.

        `change`: the id of the change that it is. Raises NotFound, ChangeRefused if `confirm` is not the shard's id,
        Unavailable.
        """
        shard = membership.formed_map(await self._planner.read()).shard(shard_id)
        if shard is None:
            raise NotFound(f"there is no shard {shard_id}.", next_step="`kvstore shard list` shows them.")
        if confirm != shard_id:
            raise ChangeRefused(f"confirm must be {shard_id!r}, because all that the older copy lacks is lost.")
        told = await self._document.accept_old(shard.store_id)
        _log.warning("shard %s may start with an older copy; it had told of record %d", shard_id, told.number)
        change = self._planner.new_change("accept-old", shard_id)
        change = changes.done(change, change.began_ms, f"It had told of record {told.number}.")
        ended_max = self._limits.changes_kept_max
        await self._document.change(lambda state: change_steps.noted(state, change, ended_max), though_behind=True)
        return {"id": shard_id, "told": told.number, "version": told.version, "change": change.id}

    async def add(self, shard_id: str, url: str | None, weight: int) -> Asked:
        """The shard at `url` joins; without one, a launcher is asked to start it.

        Raises BadBody; ChangeRefused and ForeignData with what to do first; Unavailable.
        """
        if url is not None:
            newcomer = await self._newcomer(shard_id, url, weight)
            asked = self._planner.new_change("add", shard_id, weight)
            return await self._ask(asked, lambda state, plan: membership.with_joining(state, newcomer, plan))
        _check_shard(shard_id, weight)
        state = await self._planner.read()
        membership.check_newcomer(state, shard_id)
        if not await self._launches.launcher.comes():
            raise ChangeRefused(
                f"no `kvstore up` is there to start shard {shard_id}: start it yourself with `kvstore shard serve "
                f"{shard_id} --join URL --listen HOST:PORT --data-dir DIR`, or name a running one with --shard-url."
            )
        await self._check_place(state, shard_id, weight)
        asked = self._planner.new_change("add", shard_id, weight)
        return await self._ask(asked, lambda state, _: membership.with_wanted(state, shard_id, weight))

    async def _check_place(self, state: ClusterState, shard_id: str, weight: int) -> None:
        """Where a launcher would start it. Raises ChangeRefused, with figures where what would move has no room."""
        if (place := self._launches.place) is None:
            return
        cluster_id = membership.formed_map(state).cluster_id
        spare_bytes = await self._environment.in_thread(lambda: place.spare_bytes(shard_id, cluster_id))
        sizes = {**await self._planner.measured(state), shard_id: Size(0, 0, disk_spare_bytes=spare_bytes)}
        newcomer = at_home(shard_id, "", "", weight=weight)
        after = membership.with_joining(state, newcomer, self._planner.plan(sizes, ""))
        check_room(state.map, membership.formed_map(after), sizes)

    async def plan_add(self, shard_id: str, url: str | None, weight: int) -> PlanShown:
        """What `add` would move. Raises as it does, but asks for no launcher."""
        if url is not None:
            newcomer = await self._newcomer(shard_id, url, weight)
        else:
            _check_shard(shard_id, weight)
            newcomer = at_home(shard_id, "", "", weight=weight)
        return await self._planner.estimate(lambda state, plan: membership.with_joining(state, newcomer, plan))

    async def remove(self, shard_id: str) -> Asked:
        """The shard leaves. Raises NotFound, ChangeRefused for the last one, Unavailable."""
        asked = self._planner.new_change("remove", shard_id)
        return await self._ask(asked, lambda state, plan: membership.without(state, shard_id, plan))

    async def give_up(self, shard_id: str, confirmed: str | None) -> dict[str, Any]:
        """The shard is lost with all that it had: what that is. Raises ChangeRefused unless its id was typed again."""
        before = membership.formed_map(await self._planner.read())
        owned = len(before.owned_by(shard_id))
        anchored = await self._shards.anchored_at(before, shard_id)
        shard = before.shard(shard_id)
        if shard is not None and confirmed != shard_id:
            raise ChangeRefused(
                f"{copies_that_would_do(shard)}{what_is_lost(shard_id, owned, len(anchored))} If that is meant, give "
                f"confirm={shard_id} along with lost=true.",
                partitions=owned,
                transactions=anchored,
            )
        change = self._planner.new_change("remove-lost", shard_id)
        asked = await self._ask(change, lambda state, _: membership.lost(state, shard_id))
        return {**asked._asdict(), "partitions": owned, "transactions": anchored}

    async def plan_remove(self, shard_id: str) -> PlanShown:
        """What `remove` would move; raises as it does."""
        return await self._planner.estimate(lambda state, plan: membership.without(state, shard_id, plan))

    async def reweigh(self, shard_id: str, weight: int) -> Asked:
        """The shard gets another weight. Raises BadBody, NotFound, ChangeRefused, Unavailable."""
        membership.check_weight(weight)
        asked = self._planner.new_change("weight", shard_id, weight)
        return await self._ask(asked, lambda state, plan: membership.reweighed(state, shard_id, weight, plan))

    async def plan_reweigh(self, shard_id: str, weight: int) -> PlanShown:
        """What `reweigh` would move; raises as it does."""
        membership.check_weight(weight)
        return await self._planner.estimate(lambda state, plan: membership.reweighed(state, shard_id, weight, plan))

    async def take(
        self, kind: Kind, rule: Callable[[ClusterState], ClusterState], shard: str | None = None, **goal: Any
    ) -> tuple[ClusterState, str]:
        """A change that moves no partition: the state with it, and its id. Raises what `rule` does; Unavailable."""
        change = self._planner.new_change(kind, shard, **goal)
        return await self._planner.change(change, lambda state, _: rule(state), moves=False)

    async def replan(self) -> Replanned:
        """Plan what the present members and weights ask for. Raises Unavailable."""
        after, change_id = await self._planner.change(self._planner.new_change("rebalance"), membership.replanned)
        return Replanned(membership.formed_map(after), change_id)

    async def plan_plan(self) -> PlanShown:
        """What `replan` would move."""
        return await self._planner.estimate(membership.replanned)

    async def cancel(self) -> Replanned:
        """Give up all moves that are not committed, and the changes that they belong to. Raises Unavailable."""
        await self._planner.read()
        cancel, ended_max = self._planner.new_change("cancel"), self._limits.changes_kept_max
        _, after = await self._document.change(
            lambda state: change_steps.cancelled(state, membership.without_moves(state), cancel, ended_max)
        )
        _log.info("the moves are cancelled")
        return Replanned(membership.formed_map(after), cancel.id)

    async def _newcomer(self, shard_id: str, url: str, weight: int) -> Home:
        _check_shard(shard_id, weight)
        membership.check_url(url)
        membership.check_newcomer(await self._planner.read(), shard_id)
        identity = await self._shards.identify(url)
        if identity.shard != shard_id:
            raise ChangeRefused(
                f"the shard at {url} is {identity.shard}, not {shard_id}: name that id, or another url."
            )
        membership.check_newcomer(await self._planner.read(), shard_id, identity.cluster_id, identity.partitions)
        return at_home(shard_id, url, identity.store_id, copy_id=identity.copy_id, weight=weight)

    async def _ask(self, asked: Change, decide: Rule) -> Asked:
        shard_id = asked.shard or ""
        after, change_id = await self._planner.change(asked, decide)
        cluster_map = membership.formed_map(after)
        shard = cluster_map.shard(shard_id)
        state = shard.state if shard is not None else "wanted" if shard_id in after.wanted else "gone"
        _log.info("shard %s is %s: epoch %d, %d moves", shard_id, state, cluster_map.epoch, len(cluster_map.moves))
        return Asked(shard_id, state, cluster_map.epoch, change_id)

    async def recover(self, cluster_id: str, epoch: int, without: Collection[str]) -> Replanned:
        """Go on with that map, which was shown. Raises ChangeRefused, Unavailable."""
        found = await self.recovery.found()
        check(found, cluster_id, epoch, without)
        following = recovered(found.map, self._document.heard(cluster_id), self._planner.new_id)
        change = self._planner.new_change("recover")

        def decide(state: ClusterState) -> ClusterState:
            if state.map is not None and state.map.epoch > found.map.epoch:
                raise ChangeRefused("another process has recovered the map: nothing was changed.")
            after = msgspec.structs.replace(state, map=following, announced={}, wanted={})
            return self._planner.taken(state, after, change, {})

        _, after = await self._document.change(decide, though_behind=True)
        _log.warning("the map of epoch %d was recovered: epoch %d", epoch, following.epoch)
        return Replanned(membership.formed_map(after), change.id)


def copies_that_would_do(shard: Shard) -> str:
    """What is left of the shard beside its primary, if anything is; with a space behind it."""
    if in_sync := [copy.node for copy in shard.replicas if copy.state == "in-sync"]:
        return (
            f"Node {' or '.join(in_sync)} has a copy of shard {shard.id} in sync, with all that was acknowledged: if "
            "it can come back, start it instead, and nothing is lost. "
        )
    if joining := [copy.node for copy in shard.replicas]:
        return (
            f"Node {' or '.join(joining)} may have an older copy of shard {shard.id}: `kvstore shard promote "
            f"{shard.id} --to {joining[0]} --accept-loss` says how old, and loses only what that lacks. "
        )
    return ""


def what_is_lost(shard_id: str, partitions: int, transactions: int) -> str:
    """What giving the shard up means, for the person who decides it."""
    return (
        f"{partitions} partitions of shard {shard_id} would be reopened, empty: all that only it had is lost for "
        f"good. {transactions} undecided transactions have their first key there, and may be done in part; "
        "Idempotency-Keys that it kept run again; its locks end early; should its files come back, they are set aside. "
        "If its process may still run, end it first: what is written there by routers that are cut off is lost, too."
    )


def _check_shard(shard_id: str, weight: int) -> None:
    membership.check_id(shard_id)
    membership.check_weight(weight)
