"""The next map of the copies.
Who is promoted, who gets a new term, which request is granted, what moves where.

Owns: the order of these decisions, and that of each shard one is taken at a time.
Promises: pure: from the state, what was heard, and the time, to the next state, or the same one if nothing is to
change. All that is due at one moment is one map. Every change of a shard's copies is one of `replication.failover`.
Leaves to others: the rules themselves (`replication.failover`), places (`copy_places`), storing (`copy_keeper`).

    primary silent, or its copy gone      an in-sync copy that has not heard it either, and has all that is known to be
                                          committed, is promoted, in a new term
    primary's copy damaged                an in-sync copy is promoted at once
    primary cannot open in its term       a new term for the same copy
    lease given back for a planned change the copy that it was given to is promoted; if that cannot be, a new term
    primary opens, a copy's node is dead  that copy is out at once, unless what is left has less than was committed
    primary is there, a copy's node stops that copy is out at once
    primary is there, a copy is damaged   that copy is out at once
    requests of the primary               in sync, or out
    else                                  one more copy joins, or one that is not wanted goes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import msgspec

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.controller import changes, damage, handing_on
from kvstore.controller.changes import Change
from kvstore.controller.copy_places import Places, without_empty_nodes
from kvstore.controller.heard import Heard
from kvstore.controller.membership import ClusterState
from kvstore.placement.cluster_map import ClusterMap, Node
from kvstore.replication import failover
from kvstore.replication.beats import CopyReport, GiveBack
from kvstore.replication.configuration import (
    Configuration,
    Request,
    configuration_of,
    configurations,
    with_configuration,
)
from kvstore.replication.failover import Damping

SETTLED_S = 10.0  # for so long a copy is in sync before its shard's primary goes home
PAUSE_MAX_S = 60.0  # between two failovers of a shard that keeps failing over

Why = Literal["silent", "damaged", "planned", "reopened", "out", "in-sync", "places"]


class Step(NamedTuple):
    """What was decided of one shard.
    `since`, `cause`: for a failover, when its primary was heard last, and what of it was found then."""

    why: Why
    before: Configuration
    after: Configuration
    since: float = 0.0
    cause: str = ""

    @property
    def is_failover(self) -> bool:
        """Another copy takes over that was not asked for."""
        return self.why in ("silent", "damaged")


class Decided(NamedTuple):
    """The next state, and what is new in it.
    `older`: of each shard that waits since all that is here of it is too old, the longest log."""

    state: ClusterState
    steps: tuple[Step, ...] = ()
    given_up: tuple[str, ...] = ()
    older: Mapping[str, CopyReport] = {}


class Decider:
    """Decides as of one moment. `damping`: by shard, of its last failovers."""

    def __init__(
        self, state: ClusterState, heard: Heard, damping: dict[str, Damping], limits: Limits, now: float
    ) -> None:
        assert state.map is not None
        self._state = state
        self._map: ClusterMap = state.map
        self._heard = heard
        self._damping = damping
        self._limits = limits
        self._now = now
        self._epoch = state.map.epoch + 1
        self._places = Places(state.map, heard, limits, now)
        self._copies = self._places.copies
        self.holds_still = too_many_silent(state.map, heard, now)

    def decide(self, new_id: Callable[[], str], now_ms: int) -> Decided:
        """The next state. `new_id` and `now_ms`: for the changes that begin by themselves."""
        configs = configurations(self._map)
        steps: list[Step] = []
        joining = sum(self._copies.is_joining(config) for config in configs)
        for config in configs:
            may_join = not self.holds_still or not joining
            step = next(filter(None, self._steps(config, may_join)), None)
            if step is not None:
                steps.append(step)
                joining += len(step.after.replicas) > len(step.before.replicas)
        nodes, given_up = self._nodes(configs)
        cluster_map = _applied(self._map, steps, nodes)
        known = self._settled(self._state.changes, cluster_map, now_ms)
        known = [*known, *self._homeward(configs, known, new_id, now_ms)]
        older = {config.shard: found for config in configs if (found := self._copies.older(config)) is not None}
        if cluster_map is self._map and known == self._state.changes:
            return Decided(self._state, older=older)
        state = msgspec.structs.replace(self._state, map=cluster_map, changes=known)
        return Decided(state, tuple(steps), given_up, older)

    # --- one shard

    def _steps(self, config: Configuration, may_join: bool) -> Iterator[Step | None]:
        """What may be due, the most urgent first."""
        yield self._planned(config)
        yield self._reopened(config)
        yield self._promoted(config)
        yield self._promoted_for_damaged(config)
        yield self._requested(config)
        yield self._without_the_gone(config)
        after = self._places.next_step(config, self._epoch, may_join=may_join)
        yield Step("places", config, after) if after is not None else None

    def _planned(self, config: Configuration) -> Step | None:
        report = self._heard.report(config.primary.node, config.shard, config.primary.copy_id)
        change = planned_change(config, self._state)
        if report is None or change is None or not report.given_back:
            return None
        after = failover.changed(config, change, report.given_back, self._epoch)
        return Step("planned", config, after) if after is not None else None

    def _reopened(self, config: Configuration) -> Step | None:
        """A primary that cannot open in its term, or has given it back in vain, gets a new one."""
        node, copy_id = config.primary
        report = self._heard.report(node, config.shard, copy_id)
        if report is None or self._heard.detector.is_silent(node, self._now):
            return None
        in_vain = report.given_back == config.term and planned_change(config, self._state) is None
        if not in_vain and not (report.needs_term and report.promised >= config.term):
            return None
        after = failover.reopened(config, node, copy_id, self._epoch)
        return Step("reopened", config, after) if after is not None else None

    def _promoted(self, config: Configuration) -> Step | None:
        since = self._heard.primary_silent_since(*config.primary, self._now)
        if since is None or not failover.may_fail_over(self._damping.get(config.shard, Damping()), self._now):
            return None
        best = failover.candidate(
            config,
            self._heard.reports_of(config.shard, self._now),
            since,
            self._now,
            self._limits.failover_after_s,
            self._heard.committed(config.store_id),
        )
        if best is None:
            return None
        after = failover.promoted(config, best.node, best.copy_id, self._epoch)
        cause = (
            "was silent" if self._heard.detector.is_silent(config.primary.node, self._now) else "came without its copy"
        )
        return Step("silent", config, after, since, cause) if after is not None else None

    def _promoted_for_damaged(self, config: Configuration) -> Step | None:
        """The node of the primary has found its copy damaged, and serves it no more."""
        node = config.primary.node
        if damage.damaged(node, config.shard, self._heard, self._now) is None:
            return None
        if not failover.may_fail_over(self._damping.get(config.shard, Damping()), self._now):
            return None
        reports = self._heard.reports_of(config.shard, self._now)
        committed = self._heard.committed(config.store_id)
        best = failover.successor(config, reports, self._now, self._limits.failover_after_s, committed)
        if best is None:
            return None
        after = failover.promoted(config, best.node, best.copy_id, self._epoch)
        return Step("damaged", config, after, self._now, "found its copy damaged") if after is not None else None

    def _requested(self, config: Configuration) -> Step | None:
        """What its primary asks for now. Takings-out first: all that are asked at once are one map."""
        beat = self._heard.beat_of(config.primary.node)
        is_near = self._heard.is_near(config.primary.node, self._now) or failpoints.planted("request-of-silent")
        if beat is None or not is_near:
            return None
        asked = [Request(*msgspec.structs.astuple(each)) for each in beat.requests if each.shard == config.shard]
        asked = handing_on.without_leaving(config, asked, self._heard)
        after = config
        for request in asked:
            after = self._taken_out(after, request)
        if after is not config:
            return Step("out", config, after)
        for request in asked:
            after = failover.in_sync(after, request, self._epoch) or after
        return Step("in-sync", config, after) if after is not config else None

    def _without_the_gone(self, config: Configuration) -> Step | None:
        """Whether a copy in sync is taken out without being waited for.
        So is one that is damaged, one whose node stops, and while the shard is opened one whose node is dead.
        If the primary is not there the copy stays: nothing could take its place."""
        node, copy_id = config.primary
        report = self._heard.report(node, config.shard, copy_id)
        if report is None or report.role == "damaged" or not self._heard.is_near(node, self._now):
            return None
        after = config
        is_sound = report.role == "opening" and report.examined  # else the copy that is dead may be the only good one
        for copy in config.in_sync:
            is_dead = is_sound and self._heard.detector.is_silent(copy.node, self._now)
            is_damaged = damage.damaged(copy.node, config.shard, self._heard, self._now) is not None
            if is_dead or is_damaged or handing_on.is_leaving(copy, config, self._heard, self._now):
                request = Request("out", config.shard, config.term, copy_id, copy.copy_id, copy.joined)
                after = self._taken_out(after, request)
        return Step("out", config, after) if after is not config else None

    def _taken_out(self, config: Configuration, request: Request) -> Configuration:
        """Without that copy; the same one if it may have what the shard is opened with.

        A shard is opened with what its copies in sync have. If all that would be left are older copies of their files,
        the one that is gone is waited for.
        """
        after = failover.taken_out(config, request, self._epoch)
        if after is None or (self._copies.is_opened(config) and self._copies.ends_early(after)):
            return config
        return after

    # --- nodes

    def _nodes(self, configs: list[Configuration]) -> tuple[list[Node], tuple[str, ...]]:
        """With those given up that are dead for too long, and those taken back that are heard again."""
        homes = {shard.id: shard.id for shard in self._map.shards}
        nodes, given_up = [], []
        for node in self._map.nodes:
            if node.given_up and self._heard.is_here(node.id, self._now):
                node = msgspec.structs.replace(node, given_up=False)
            elif not node.given_up and not self.holds_still and self._map.replicas > 1:
                silent_for = self._heard.detector.silent_for(node.id, self._now)
                if failover.may_give_up(node.id, silent_for, configs, homes, self._limits.down_out_s):
                    given_up.append(node.id)
                    node = msgspec.structs.replace(node, given_up=True)
            nodes.append(node)
        return nodes, tuple(given_up)

    # --- planned changes of a primary

    def _settled(self, known: list[Change], cluster_map: ClusterMap, now_ms: int) -> list[Change]:
        """Planned changes that cannot be made any more are over."""
        return [self._ended(change, cluster_map, now_ms) if is_promotion(change) else change for change in known]

    def _ended(self, change: Change, cluster_map: ClusterMap, now_ms: int) -> Change:
        config = configuration_of(cluster_map, change.shard or "")
        if config is None:
            return changes.ended_early(change, now_ms, f"Shard {change.shard} has left.")
        if config.primary.node == change.to:
            return change
        if self._heard.stops(change.to or ""):
            return changes.ended_early(change, now_ms, f"Node {change.to} is about to stop.")
        if failover.plan_change(config, change.to or "") is not None:
            return change
        return changes.ended_early(change, now_ms, f"The copy on node {change.to} is not in sync any more.")

    def _homeward(
        self, configs: list[Configuration], known: list[Change], new_id: Callable[[], str], now_ms: int
    ) -> Iterator[Change]:
        """A change for each shard whose primary is not where it belongs, and can go there."""
        busy = {change.shard for change in known if is_promotion(change)}
        for config in configs:
            if config.shard in busy or not self._copies.serves(config):
                continue
            if (place := self._away(config)) is not None:
                yield Change(id=new_id(), kind="promote", shard=config.shard, to=place, began_ms=now_ms)
                continue
            home = self._home_of(config)
            copy = config.copy_on(home)
            if copy is None or self._heard.stops(home):
                continue
            since = self._heard.in_sync_since(config.shard, copy.copy_id, copy.joined)
            if failover.goes_home(config, home, since, self._now, SETTLED_S):
                yield Change(id=new_id(), kind="promote", shard=config.shard, to=home, began_ms=now_ms)

    def _away(self, config: Configuration) -> str | None:
        """The node of a copy in sync that takes over.
        The primary's node stops, or it has found damage in its own copy, which is rebuilt after that."""
        report = self._heard.report(config.primary.node, config.shard, config.primary.copy_id)
        is_damaged = report is not None and bool(report.damage)
        if not is_damaged and not self._heard.stops(config.primary.node):
            return None
        return handing_on.heir(config, self._heard, self._now)

    def _home_of(self, config: Configuration) -> str:
        """Where its primary belongs: where a person wants it, at home, or on the first node that may keep it."""
        for node in (self._state.preferred.get(config.shard), config.shard):
            if node is not None and self._places.may_keep(node):
                return node
        if self._places.may_keep(config.primary.node):
            return config.primary.node
        return next((copy.node for copy in config.in_sync if self._places.may_keep(copy.node)), config.primary.node)


def is_promotion(change: Change) -> bool:
    """A planned change of primary that is under way."""
    return change.is_running and change.kind == "promote"


def planned_change(config: Configuration, state: ClusterState) -> failover.Change | None:
    """The planned change of its primary that is under way, if it can be made now."""
    wanted = next((c for c in state.changes if is_promotion(c) and c.shard == config.shard), None)
    if wanted is None or wanted.to is None or wanted.to == config.primary.node:
        return None
    return failover.plan_change(config, wanted.to)


def to_give_back(state: ClusterState, node: str) -> list[GiveBack]:
    """The leases that the node is to give back."""
    if state.map is None:
        return []
    found = []
    for shard in state.map.shards:
        config = configuration_of(state.map, shard.id)
        if config is not None and config.primary.node == node:
            change = planned_change(config, state)
            if change is not None:
                found.append(GiveBack(**change._asdict()))
    return found


def too_many_silent(cluster_map: ClusterMap, heard: Heard, now: float) -> bool:
    """Whether so many nodes are silent at once that nothing is given up."""
    standing = [
        failover.Standing(node.id, node.host or None, heard.detector.is_silent(node.id, now), node.given_up)
        for node in cluster_map.nodes
    ]
    return failover.too_many_silent(standing, cluster_map.replicas)


def _applied(before: ClusterMap, steps: list[Step], nodes: list[Node]) -> ClusterMap:
    """The map of the next epoch with all of that; the same one if that is nothing."""
    after = msgspec.structs.replace(before, nodes=nodes)
    for step in steps:
        after = with_configuration(msgspec.structs.replace(after, epoch=before.epoch), step.after)
    after = msgspec.structs.replace(after, nodes=without_empty_nodes(after))
    if after.nodes == before.nodes and not steps:
        return before
    return msgspec.structs.replace(after, epoch=before.epoch + 1)
