"""Keeps every shard served and copied: takes the nodes' beats, decides, stores the next map.

Owns: when it is decided, how often a shard may fail over, what nodes and people are told of copies.
Promises: nothing is decided by an answer that a node may not have got: nodes act on maps. While the cluster has one
copy of everything and is to have one, this does nothing but follow the map.
Leaves to others: every decision (`replicas`), what was heard (`heard`), what is said of decisions (`copy_journal`), the
document's races (`document`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from prometheus_client.metrics_core import Metric

from kvstore.config import Limits
from kvstore.controller import change_steps, copy_facts, copy_loss, handing_on
from kvstore.controller.changes import Change
from kvstore.controller.copy_journal import CopyJournal
from kvstore.controller.copy_places import Places
from kvstore.controller.document import ClusterDocument
from kvstore.controller.failure_detector import FailureDetector
from kvstore.controller.heard import Heard
from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import ClusterState, formed_map
from kvstore.controller.replicas import PAUSE_MAX_S, Decided, Decider, to_give_back, too_many_silent
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import BadBody, Conflict, KvError, Unavailable
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication import failover
from kvstore.replication.beats import Beat, BeatAnswer, beat_every_s, beats
from kvstore.replication.configuration import configuration_of, configurations
from kvstore.replication.failover import Damping
from kvstore.said_once import SaidOnce

_SHORTEST_S = 0.01  # between two decisions
_RETRY_S = 0.25
_log = logging.getLogger(__name__)


class CopyKeeper:
    """`run` it in a task of its own. `on_heard`: told of epochs and promised terms, as `ClusterService.hear` wants.

    `new_id` makes an id that no change ever had.
    """

    def __init__(
        self,
        document: ClusterDocument,
        limits: Limits,
        start: str,
        on_heard: Callable[[str, int], None],
        new_id: Callable[[], str],
        environment: Environment = SYSTEM,
    ) -> None:
        self._document = document
        self._limits = limits
        self._on_heard = on_heard
        self._new_id = new_id
        self._environment = environment
        self._now_s = environment.boottime_s
        self._heard = Heard(start, limits, self._now_s(), document.told_numbers)
        self._damping: dict[str, Damping] = {}
        self._state = ClusterState()
        self._due = asyncio.Event()
        self._is_urgent = asyncio.Event()  # a shard answers nothing until it is decided
        self._deciding = asyncio.Lock()
        self._journal = CopyJournal()
        self.on_told: Callable[[str], None] = lambda node: None  # a node has told which map it follows

    async def run(self) -> None:
        """Decide whenever something was heard, and now and then, for ever."""
        said, awake = SaidOnce(), _stay_awake(self._heard.detector, self._environment)
        beside = [asyncio.create_task(self._follow()), asyncio.create_task(awake)]
        try:
            while True:
                await self._wait()
                self._is_urgent.clear()
                try:
                    async with self._deciding:
                        await self._decide()
                    said.is_news("")
                except KvError as error:
                    if said.is_news(error.detail):
                        _log.warning("the copies stay as they are: %s", error)
                    await asyncio.sleep(_RETRY_S)
                await self._environment.wait_for(self._is_urgent.wait(), _SHORTEST_S)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _follow(self) -> None:
        revision = -1
        while True:
            try:
                revision, state = await self._document.after(revision)
            except Unavailable as error:
                _log.debug("the map cannot be read: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._take(state)

    def _take(self, state: ClusterState) -> None:
        before, after = self._state.map, state.map
        if before is None or after is None or after.epoch >= before.epoch:
            self._state = state
            self._due.set()

    async def _wait(self) -> None:
        """Until something was heard, or time has passed that counts."""
        asks = self._state.map is not None and beats(self._state.map)
        if asks:
            await self._environment.wait_for(self._due.wait(), beat_every_s(self._limits.failover_after_s))
        else:
            await self._due.wait()
        self._due.clear()

    # --- nodes

    async def beat(self, beat: Beat) -> BeatAnswer:
        """What a node has told is taken in, and what it is to do.
        Raises Conflict for a node that is not of the map."""
        if self._state.map is None or self._state.map.epoch < beat.epoch:
            self._take(await self._document.read())  # it has not come by itself yet
        cluster_map = self._state.map
        if cluster_map is None or cluster_map.cluster_id != beat.cluster_id or cluster_map.node(beat.node) is None:
            raise Conflict(f"node {beat.node} is not in this controller's map: announce it first.", retry_after_ms=1000)
        self._on_heard(beat.cluster_id, max([beat.epoch, *_terms(beat, cluster_map)]))
        self.on_told(beat.node)
        now = self._now_s()
        number = self._heard.take(beat, now)
        self._note_committed(beat, cluster_map)
        self._journal.note_damage(beat, cluster_map, now)
        self._due.set()
        if any(copy.given_back and copy.given_back == _term(cluster_map, copy.shard) for copy in beat.copies):
            self._is_urgent.set()
        if self._document.behind(self._state) is not None:
            return BeatAnswer(  # orders would be too old
                start=self._heard.start, beat=number, epoch=cluster_map.epoch, behind=True
            )
        places = Places(cluster_map, self._heard, self._limits, now)
        return BeatAnswer(
            start=self._heard.start,
            beat=number,
            epoch=cluster_map.epoch,
            may_stop=beat.stops and handing_on.may_stop(cluster_map, beat.node, self._heard, now),
            make=places.to_make(beat.node),
            drop=places.to_drop(beat.node),
            give_back=to_give_back(self._state, beat.node),
        )

    def _note_committed(self, beat: Beat, cluster_map: ClusterMap) -> None:
        """What primaries in the present terms tell.
        One of an earlier term may tell of what a person has given up."""
        for report in beat.copies:
            config = configuration_of(cluster_map, report.shard) if report.committed else None
            if config is not None and config.primary == (beat.node, report.copy_id) and config.term == report.promised:
                self._document.note_committed(report.store_id, report.committed)

    async def promote_with_loss(self, shard_id: str, to: str, confirmed: str | None) -> dict[str, Any]:
        """A copy that is not in sync, or is older than it should be, becomes the primary: what that loses.

        Raises as `copy_loss` does; Unavailable, ControllerBehind.
        """
        async with self._deciding:  # what was told is forgotten only with the map that goes on without it
            return await self._promote_with_loss(shard_id, to, confirmed)

    async def _promote_with_loss(self, shard_id: str, to: str, confirmed: str | None) -> dict[str, Any]:
        state = await self._document.read()
        await self._document.check_newest(state)  # before anything that was told is forgotten
        places = Places(formed_map(state), self._heard, self._limits, self._now_s())
        loss = copy_loss.judged(places, shard_id, to)
        told = await self._document.tell(loss.store_id, Told())
        copy_loss.check_confirmed(loss, confirmed, told)
        await self._document.accept_old(loss.store_id)
        floor = (await self._document.tell(loss.store_id, Told())).clock_floor
        now_ms = self._environment.now_ms()
        change = Change(id=self._new_id(), kind="promote", shard=shard_id, to=to, began_ms=now_ms)
        ended_max = self._limits.changes_kept_max
        _, after = await self._document.change(
            lambda present: copy_loss.with_loss(present, loss, floor, change, ended_max)
        )
        self._take(after)
        _log.warning("shard %s: %s", shard_id, copy_loss.what_is_lost(loss, told))
        epoch = formed_map(after).epoch
        return {
            "id": shard_id, "to": to, "epoch": epoch, "number": loss.number, "told": told.number, "change": change.id
        }  # fmt: skip

    def announced(self, node: str) -> None:
        """The node has announced itself."""
        self._heard.announced(node, self._now_s())
        self._due.set()

    # --- decisions

    async def _decide(self) -> None:
        now = self._awake_s()
        if self._state.map is None:
            return
        self._heard.follow(self._state.map, now)
        if not beats(self._state.map) and not any(self._heard.beats):
            return
        await self._document.know_told(shard.store_id for shard in self._state.map.shards)
        kept = _silent_primaries(self._state, self._heard, now)
        for store_id in kept:  # what they have told last must outlive this process
            with suppress(Unavailable):  # a full disk, for example, keeps no copy from taking over
                await self._document.keep_committed(store_id)
        now = self._awake_s()
        found = self._decided(self._state, now)
        if found.state is not self._state:
            now = await self._store(kept)
        self._journal.note_older(found.older, self._heard)
        await self._write_down(now)

    def _awake_s(self) -> float:
        """What the time is by now; this process is awake."""
        now = self._now_s()
        self._heard.detector.turn(now)
        return now

    def _decided(self, state: ClusterState, now: float) -> Decided:
        if state.map is None:
            return Decided(state)
        decider = Decider(state, self._heard, self._damping, self._limits, now)
        return decider.decide(self._new_id, self._environment.now_ms())

    async def _store(self, kept: Collection[str]) -> float:
        """Store what is decided once the state is read: that may take a while, in which nodes fall silent.

        `kept`: stores of which it is kept what they told last; no other primary is replaced now. Returns when it was
        decided.
        """
        found, now = Decided(self._state), self._now_s()

        def decide(state: ClusterState) -> ClusterState:
            nonlocal found, now
            now = self._awake_s()
            if all(store_id in kept for store_id in _silent_primaries(state, self._heard, now)):
                found = self._decided(state, now)
            else:
                found = Decided(state)
                self._due.set()
            return found.state

        _, after = await self._document.change(decide)
        self._take(after)
        epoch = formed_map(after).epoch
        for step in found.steps:
            if step.is_failover:
                self._damping[step.after.shard] = failover.failed_over(
                    self._damping.get(step.after.shard, Damping()), now, self._limits.failover_after_s, PAUSE_MAX_S
                )
            self._journal.note(step, epoch, now)
        for node in found.given_up:
            _log.warning("epoch %d: node %s is given up: its copies get places elsewhere", epoch, node)
        return now

    async def _write_down(self, now: float) -> None:
        """Changes that no person asked for, and that are over now."""
        if self._state.map is None:
            return
        ended_max = self._limits.changes_kept_max
        for ended in self._journal.ended(self._state.map, self._heard, now):
            change = ended.as_change(self._new_id(), self._environment.now_ms())
            await self._document.change(partial(change_steps.noted, change=change, ended_max=ended_max))

    # --- people

    def is_dead(self, node: str) -> bool:
        """It is held for dead."""
        return self._heard.detector.is_silent(node, self._now_s())

    def holds_still(self, cluster_map: ClusterMap) -> bool:
        """So many nodes are silent at once that nothing moves and none is given up."""
        return beats(cluster_map) and too_many_silent(cluster_map, self._heard, self._now_s())

    def places(self, cluster_map: ClusterMap) -> Places | None:
        """Where copies are to be, and are, as far as nodes tell.
        None while there is one copy of everything and is to be one."""
        return Places(cluster_map, self._heard, self._limits, self._now_s()) if beats(cluster_map) else None

    def families(self, cluster_map: ClusterMap | None) -> Iterator[Metric]:
        """Metrics of copies."""
        return copy_facts.families(self._journal.stats, self.facts(cluster_map) if cluster_map is not None else None)

    def facts(self, cluster_map: ClusterMap, known: Sequence[Change] = ()) -> dict[str, Any] | None:
        """What people are told of nodes and copies; None as for `places`."""
        places = self.places(cluster_map)
        return copy_facts.described(places, known) if places is not None else None


async def _stay_awake(detector: FailureDetector, environment: Environment) -> None:
    """While the record's store does not answer, this process does not stand still: it hears the nodes."""
    while True:
        detector.turn(environment.boottime_s())
        await environment.sleep(beat_every_s(detector.failover_after_s))


def _silent_primaries(state: ClusterState, heard: Heard, now: float) -> list[str]:
    """The ids of the stores whose primaries are silent."""
    known = configurations(state.map) if state.map is not None else []
    return [each.store_id for each in known if heard.primary_silent_since(*each.primary, now) is not None]


def _terms(beat: Beat, cluster_map: ClusterMap) -> Iterator[int]:
    """Those that the node's copies have promised, or have records of; what another store has means nothing here."""
    for copy in beat.copies:
        shard = cluster_map.shard(copy.shard)
        if shard is not None and shard.store_id == copy.store_id:
            yield from (copy.promised, copy.term)


def _term(cluster_map: ClusterMap, shard: str) -> int:
    config = configuration_of(cluster_map, shard)
    return config.term if config is not None else 0


def check_beat(node_id: str, beat: Beat) -> None:
    """Refuse a beat that is not that of the node in the path. Raises BadBody."""
    if beat.node != node_id:
        raise BadBody(f"the beat is that of node {beat.node}, not of {node_id}.")
