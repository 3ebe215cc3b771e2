"""The controller's service: the rules of membership, applied to its document.

Owns: the order of looking, measuring and deciding; what is known in memory of a launcher.
Promises: what people ask for is stored before it is answered, and planned in the same step; `plan` changes nothing.
Leaves to others: HTTP (`app`), every rule (`membership`), the document's races (`document`), moving (`mover`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from kvstore import failpoints
from kvstore.config import ClusterConfig
from kvstore.controller import change_steps, changes, membership
from kvstore.controller.changes import Change, Kind
from kvstore.controller.document import ClusterDocument
from kvstore.controller.launch_place import LaunchPlace
from kvstore.controller.launches import Launcher
from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import Announcement, ClusterState, FirstMembers, Plan
from kvstore.controller.mover import new_move_id
from kvstore.controller.recovery import Found, Recovery, check, described, recovered
from kvstore.controller.shards import ShardClients, Size
from kvstore.controller.sizes import check_room, estimate, expected_keys, group_partitions
from kvstore.controller.twins import Twins
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import ChangeRefused, ControllerBehind, NotFound, Unavailable
from kvstore.placement.cluster_map import ClusterMap, Home, Node, at_home
from kvstore.placement.moves import planned
from kvstore.said_once import SaidOnce
from kvstore.transport.change_documents import Plan as PlanShown

_LOST_PAUSE_S = 1.0
_log = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """The cluster is not formed: these first members have not announced themselves yet."""

    waiting_for: list[str]


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


Rule = Callable[[ClusterState, Plan], ClusterState]


class ClusterService:
    """Every method may be called by any number of tasks at the same time."""

    def __init__(
        self, document: ClusterDocument, config: ClusterConfig, shards: ShardClients, environment: Environment = SYSTEM
    ) -> None:
        self._environment = environment
        self._document = document
        self._shards = shards
        self._limits = config.limits
        self._recovery = Recovery(shards)
        self._twins = Twins(shards)
        self._look_if_behind = asyncio.Event()
        self.on_clock: Callable[[int], None] = lambda clock: None  # a store has told its own
        self.on_announced: Callable[[str], None] = lambda node: None
        self.launch_place: LaunchPlace | None = None  # where a launcher starts shards
        shards.on_epoch = self.hear
        self._launcher = Launcher(config.limits.map_poll_s, environment)
        self._began_ms = environment.now_ms()
        self._first = FirstMembers(
            weights={shard.id: shard.weight for shard in config.shards},
            partitions=config.partitions,
            replicas=config.replicas,
        )

    async def report_start(self) -> None:
        """Log what is stored and where cluster.yaml differs from it, once it is of the present format.

        Raises ForeignData if it is unreadable, Unavailable.
        """
        if (older := await self._document.convert()) is not None:
            _log.warning("the stored map was of format %d; the old document is kept beside it", older)
        state = await self._document.read()
        if state.map is None:
            missing = ", ".join(membership.waiting_for(state.announced, self._first))
            _log.info("the cluster is not formed yet, waiting for shards %s", missing)
            return
        _log.info("cluster %s, epoch %d", state.map.cluster_id, state.map.epoch)
        for difference in membership.differences(self._first, state.map):
            _log.warning("cluster.yaml differs from the stored map, which stands: %s", difference)

    # --- shards ------------------------------------------------------------------------------------------------------

    async def announce(self, announcement: Announcement) -> ClusterMap | Waiting:
        """Write down that a shard is there: the map if it is a member, or who is waited for.

        Raises BadBody, ForeignData and Conflict as `membership.check`, `decide` and `Twins` do; Unavailable if the
        store cannot answer or other writers always came first: then the shard announces itself again.
        """
        membership.check(announcement)
        state = await self._document.read()
        self._recovery.note(announcement)
        if announcement.cluster_id is not None:
            self.hear(announcement.cluster_id, announcement.epoch)
            self.on_clock(announcement.clock)
        if self._recovery.is_offered and (lost := self._lost(state)):
            raise lost  # also for a new file: no second cluster is formed beside the one that is there
        await self._twins.check(state, announcement)
        sizes = await self._measured(state) if membership.may_join(state, announcement) else {}
        asked = self._new_change("add", announcement.id, announcement.weight)

        def decide(present: ClusterState) -> ClusterState:
            change = changes.joining(present.changes, announcement.id) or asked
            plan = self._plan(sizes, change.id)
            cluster_id = self._environment.random_hex(16)
            decided = membership.decide(present, announcement, self._first, cluster_id, plan)
            return self._taken(present, decided, change, sizes) if membership.joins(present, decided) else decided

        before, after = await self._document.change(decide)
        self.on_announced(announcement.id)
        _report_change(announcement, before, after)
        return after.map or Waiting(membership.waiting_for(after.announced, self._first))

    def hear(self, cluster_id: str, epoch: int) -> None:
        """A shard or router follows a map of that epoch of that cluster."""
        before = self._document.heard(cluster_id)
        self._document.hear(cluster_id, epoch)
        if epoch > before:
            self._look_if_behind.set()

    async def watch_if_behind(self) -> None:
        """Say so in the log when this controller's file turns out to be an old copy, or lost. For ever."""
        said = SaidOnce()
        while True:
            await self._look_if_behind.wait()
            self._look_if_behind.clear()
            with suppress(Unavailable):
                state = await self._document.read()
                why = self._document.behind(state) or self._lost(state)
                if why is not None and said.is_news(why.detail):
                    _log.error("%s: nothing is changed until then. %s", why.detail, why.next_step)

    async def tell(self, store_id: str, told: Told) -> Told:
        """Keep what a store tells of its log; returns the highest that it has told. Raises Unavailable."""
        return await self._document.tell(store_id, told)

    async def accept_old(self, shard_id: str, confirm: str) -> dict[str, Any]:
        """The shard may start with an older copy of its file than it has told of.
        Returns what it had told.

        `change`: the id of the change that it is. Raises NotFound, ChangeRefused if `confirm` is not the shard's id,
        Unavailable.
        """
        shard = membership.formed_map(await self._document.read()).shard(shard_id)
        if shard is None:
            raise NotFound(f"there is no shard {shard_id}.", next_step="`kvstore shard list` shows them.")
        if confirm != shard_id:
            raise ChangeRefused(f"confirm must be {shard_id!r}, because all that the older copy lacks is lost.")
        told = await self._document.accept_old(shard.store_id)
        _log.warning("shard %s may start with an older copy; it had told of record %d", shard_id, told.number)
        change = self._new_change("accept-old", shard_id)
        change = changes.done(change, change.began_ms, f"It had told of record {told.number}.")
        ended_max = self._limits.changes_kept_max
        await self._document.change(lambda state: change_steps.noted(state, change, ended_max), though_behind=True)
        return {"id": shard_id, "told": told.number, "version": told.version, "change": change.id}

    async def map_after(self, epoch: int) -> ClusterMap:
        """The map as soon as there is one with a higher epoch; waits for ever if none comes.

        Raises Unavailable when the store is closed, ControllerBehind if it was lost.
        """
        revision = -1
        while True:
            revision, state = await self._document.after(revision)
            if lost := self._lost(state):
                raise lost
            if state.map is not None and state.map.epoch > epoch:
                return state.map

    def _lost(self, state: ClusterState) -> ControllerBehind | None:
        """What to say while there are nodes of a cluster, and no map of it here."""
        if state.map is not None or not (self._recovery.is_offered or self._document.heard_of_any):
            return None
        return ControllerBehind("this controller has no map of the cluster that nodes belong to: its file is lost")

    async def _read(self) -> ClusterState:
        """The state, for who wants to change it. Raises ControllerBehind if it was lost."""
        state = await self._document.read()
        if lost := self._lost(state):
            raise lost
        return state

    # --- recovery ----------------------------------------------------------------------------------------------------

    async def recovery(self) -> dict[str, Any]:
        """The newest map that is to be had, for people. Raises ChangeRefused if there is nothing to recover."""
        return described(await self._find())

    async def recover(self, cluster_id: str, epoch: int, without: Collection[str]) -> Replanned:
        """Go on with that map, which was shown. Raises ChangeRefused, Unavailable."""
        found = await self._find()
        check(found, cluster_id, epoch, without)
        following = recovered(found.map, self._document.heard(cluster_id), self._new_move_id)
        change = self._new_change("recover")

        def decide(state: ClusterState) -> ClusterState:
            if state.map is not None and state.map.epoch > found.map.epoch:
                raise ChangeRefused("another process has recovered the map: nothing was changed.")
            after = msgspec.structs.replace(state, map=following, announced={}, wanted={})
            return self._taken(state, after, change, {})

        _, after = await self._document.change(decide, though_behind=True)
        _log.warning("the map of epoch %d was recovered: epoch %d", epoch, following.epoch)
        return Replanned(membership.formed_map(after), change.id)

    async def _find(self) -> Found:
        state = await self._document.read()
        found = await self._recovery.find(state)
        if state.map is not None and self._document.behind(state) is None and found.map.epoch <= state.map.epoch:
            raise ChangeRefused(
                f"there is nothing to recover: no node has a newer map than this controller, whose epoch is "
                f"{state.map.epoch}."
            )
        return found

    # --- what people ask for -----------------------------------------------------------------------------------------

    async def add(self, shard_id: str, url: str | None, weight: int) -> Asked:
        """The shard at `url` joins; without one, a launcher is asked to start it.

        Raises BadBody; ChangeRefused and ForeignData with what to do first; Unavailable.
        """
        if url is not None:
            newcomer = await self._newcomer(shard_id, url, weight)
            asked = self._new_change("add", shard_id, weight)
            return await self._ask(asked, lambda state, plan: membership.with_joining(state, newcomer, plan))
        _check_shard(shard_id, weight)
        state = await self._read()
        membership.check_newcomer(state, shard_id)
        if not await self._launcher.comes():
            raise ChangeRefused(
                f"no `kvstore up` is there to start shard {shard_id}: start it yourself with `kvstore shard serve "
                f"{shard_id} --join URL --listen HOST:PORT --data-dir DIR`, or name a running one with --shard-url."
            )
        await self._check_place(state, shard_id, weight)
        asked = self._new_change("add", shard_id, weight)
        return await self._ask(asked, lambda state, _: membership.with_wanted(state, shard_id, weight))

    async def _check_place(self, state: ClusterState, shard_id: str, weight: int) -> None:
        """Where a launcher would start it. Raises ChangeRefused, with figures where what would move has no room."""
        if (place := self.launch_place) is None:
            return
        cluster_id = membership.formed_map(state).cluster_id
        spare_bytes = await self._environment.in_thread(lambda: place.spare_bytes(shard_id, cluster_id))
        sizes = {**await self._measured(state), shard_id: Size(0, 0, disk_spare_bytes=spare_bytes)}
        newcomer = at_home(shard_id, "", "", weight=weight)
        after = membership.with_joining(state, newcomer, self._plan(sizes, ""))
        check_room(state.map, membership.formed_map(after), sizes)

    async def plan_add(self, shard_id: str, url: str | None, weight: int) -> PlanShown:
        """What `add` would move. Raises as it does, but asks for no launcher."""
        if url is not None:
            newcomer = await self._newcomer(shard_id, url, weight)
        else:
            _check_shard(shard_id, weight)
            newcomer = at_home(shard_id, "", "", weight=weight)
        return await self._estimate(lambda state, plan: membership.with_joining(state, newcomer, plan))

    async def remove(self, shard_id: str) -> Asked:
        """The shard leaves. Raises NotFound, ChangeRefused for the last one, Unavailable."""
        asked = self._new_change("remove", shard_id)
        return await self._ask(asked, lambda state, plan: membership.without(state, shard_id, plan))

    async def give_up(self, shard_id: str, confirmed: str | None) -> dict[str, Any]:
        """The shard is lost with all that it had: what that is. Raises ChangeRefused unless its id was typed again."""
        before = membership.formed_map(await self._read())
        owned = len(before.owned_by(shard_id))
        anchored = await self._shards.anchored_at(before, shard_id)
        if before.shard(shard_id) is not None and confirmed != shard_id:
            raise ChangeRefused(
                f"{what_is_lost(shard_id, owned, len(anchored))} If that is meant, give confirm={shard_id} along with "
                "lost=true.",
                partitions=owned,
                transactions=anchored,
            )
        change = self._new_change("remove-lost", shard_id)
        asked = await self._ask(change, lambda state, _: membership.lost(state, shard_id))
        return {**asked._asdict(), "partitions": owned, "transactions": anchored}

    async def plan_remove(self, shard_id: str) -> PlanShown:
        """What `remove` would move; raises as it does."""
        return await self._estimate(lambda state, plan: membership.without(state, shard_id, plan))

    async def reweigh(self, shard_id: str, weight: int) -> Asked:
        """The shard gets another weight. Raises BadBody, NotFound, ChangeRefused, Unavailable."""
        membership.check_weight(weight)
        asked = self._new_change("weight", shard_id, weight)
        return await self._ask(asked, lambda state, plan: membership.reweighed(state, shard_id, weight, plan))

    async def plan_reweigh(self, shard_id: str, weight: int) -> PlanShown:
        """What `reweigh` would move; raises as it does."""
        membership.check_weight(weight)
        return await self._estimate(lambda state, plan: membership.reweighed(state, shard_id, weight, plan))

    async def take(
        self, kind: Kind, rule: Callable[[ClusterState], ClusterState], shard: str | None = None, **goal: Any
    ) -> tuple[ClusterState, str]:
        """A change that moves no partition: the state with it, and its id. Raises what `rule` does; Unavailable."""
        change = self._new_change(kind, shard, **goal)
        return await self._change(change, lambda state, _: rule(state), moves=False)

    async def replan(self) -> Replanned:
        """Plan what the present members and weights ask for. Raises Unavailable."""
        after, change_id = await self._change(self._new_change("rebalance"), membership.replanned)
        return Replanned(membership.formed_map(after), change_id)

    async def plan_plan(self) -> PlanShown:
        """What `replan` would move."""
        return await self._estimate(membership.replanned)

    async def cancel(self) -> Replanned:
        """Give up all moves that are not committed, and the changes that they belong to. Raises Unavailable."""
        await self._read()
        cancel, ended_max = self._new_change("cancel"), self._limits.changes_kept_max
        _, after = await self._document.change(
            lambda state: change_steps.cancelled(state, membership.without_moves(state), cancel, ended_max)
        )
        _log.info("the moves are cancelled")
        return Replanned(membership.formed_map(after), cancel.id)

    async def state(self) -> ClusterState:
        """What is stored now."""
        return await self._document.read()

    async def _newcomer(self, shard_id: str, url: str, weight: int) -> Home:
        _check_shard(shard_id, weight)
        membership.check_url(url)
        membership.check_newcomer(await self._read(), shard_id)
        identity = await self._shards.identify(url)
        if identity.shard != shard_id:
            raise ChangeRefused(
                f"the shard at {url} is {identity.shard}, not {shard_id}: name that id, or another url."
            )
        membership.check_newcomer(await self._read(), shard_id, identity.cluster_id, identity.partitions)
        return at_home(shard_id, url, identity.store_id, copy_id=identity.copy_id, weight=weight)

    def _new_change(self, kind: Kind, shard: str | None = None, weight: int | None = None, **more: Any) -> Change:
        now_ms = self._environment.now_ms()
        return Change(id=self._new_move_id(), kind=kind, shard=shard, weight=weight, began_ms=now_ms, **more)

    async def _ask(self, asked: Change, decide: Rule) -> Asked:
        shard_id = asked.shard or ""
        after, change_id = await self._change(asked, decide)
        cluster_map = membership.formed_map(after)
        shard = cluster_map.shard(shard_id)
        state = shard.state if shard is not None else "wanted" if shard_id in after.wanted else "gone"
        _log.info("shard %s is %s: epoch %d, %d moves", shard_id, state, cluster_map.epoch, len(cluster_map.moves))
        return Asked(shard_id, state, cluster_map.epoch, change_id)

    async def _change(self, asked: Change, decide: Rule, *, moves: bool = True) -> tuple[ClusterState, str]:
        """The state after the change, and the change's id: that of one under way if it asks for the same."""
        before = await self._read()
        has_moves = moves or (before.map is not None and bool(before.map.moves))
        sizes = await self._measured(before) if has_moves else {}

        def step(state: ClusterState) -> ClusterState:
            change = changes.running_like(state.changes, asked) or asked
            after = decide(state, self._plan(sizes, change.id))
            check_room(state.map, membership.formed_map(after), sizes)
            return self._taken(state, after, change, sizes)

        failpoints.hit("controller-before-plan")
        _, after = await self._document.change(step)
        failpoints.hit("controller-after-plan")
        known = changes.find(after.changes, asked.id) or changes.running_like(after.changes, asked)
        return after, known.id if known is not None else asked.id

    def _taken(
        self, before: ClusterState, after: ClusterState, change: Change, sizes: Mapping[str, Size]
    ) -> ClusterState:
        expect = expected_keys(membership.formed_map(after), sizes)
        return change_steps.taken(before, after, change, expect, self._limits.changes_kept_max)

    async def _estimate(self, decide: Rule) -> PlanShown:
        state = await self._read()
        sizes = await self._measured(state)
        after = decide(state, self._plan(sizes, ""))
        check_room(state.map, membership.formed_map(after), sizes)
        return estimate(membership.formed_map(after), sizes)

    async def _measured(self, state: ClusterState) -> Mapping[str, Size]:
        """What the members hold, as far as they say."""
        return await self._shards.measure(state.map) if state.map is not None else {}

    def _plan(self, sizes: Mapping[str, Size], change_id: str) -> Plan:
        return lambda cluster_map: planned(
            cluster_map,
            lambda source: group_partitions(cluster_map, source, sizes.get(source), self._limits),
            self._new_move_id,
            change_id,
        )

    def _new_move_id(self) -> str:
        return new_move_id(self._environment)

    # --- the launcher ------------------------------------------------------------------------------------------------

    async def launch_after(self, revision: int, running: frozenset[str]) -> dict[str, Any]:
        """What a launcher is to run, as soon as the state has a higher revision.
        Waits for ever if none comes.

        `running`: the shards that it runs now.
        """
        self._launcher.note(running)
        if self._lost(await self._document.read()):
            revision = -1
            await asyncio.sleep(_LOST_PAUSE_S)  # members may come to be known at any time
        revision, state = await self._document.after(revision)
        nodes = state.map.nodes if state.map is not None else await self._nodes_of_lost(state)
        return {
            "revision": revision,
            "formed": state.map is not None,
            "wanted": [{"id": shard_id, "weight": weight} for shard_id, weight in state.wanted.items()],
            "nodes": [{"id": node.id, "url": node.url} for node in nodes],
        }

    async def _nodes_of_lost(self, state: ClusterState) -> list[Node]:
        """Those of the newest map that the shards have, so that all of them are started, and can tell theirs."""
        if self._lost(state):
            with suppress(ChangeRefused):
                return (await self._recovery.find(state)).map.nodes
        return []

    def may_run(self, shard_id: str, since_ms: int) -> bool:
        """Whether a launcher may still run a shard that was removed at that time.

        A controller that was started since then does not know at first, until a launcher has asked it something.
        """
        return self._launcher.may_run(shard_id, is_new=since_ms >= self._began_ms)

    def ending(self, state: ClusterState) -> list[str]:
        """Shards that a launcher still runs and that are no members any more."""
        if state.map is None:
            return []
        stay = {*(node.id for node in state.map.nodes), *state.wanted}
        return sorted(self._launcher.running() - stay)


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


def _report_change(announcement: Announcement, before: ClusterState, after: ClusterState) -> None:
    if before == after:
        return
    if after.map is None:
        _log.debug("shard %s announced itself from %s", announcement.id, announcement.url)  # the line below names all
    elif before.map is None:
        shards = ", ".join(shard.id for shard in after.map.shards)
        _log.info("cluster %s is formed: epoch 1, shards %s", after.map.cluster_id, shards)
    elif before.map.shard(announcement.id) is None:
        _log.info("shard %s joins: epoch %d, %d moves", announcement.id, after.map.epoch, len(after.map.moves))
    elif before.map.epoch != after.map.epoch:
        _log.info("shard %s moved to %s: epoch %d", announcement.id, announcement.url, after.map.epoch)
