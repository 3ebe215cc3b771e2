"""The mover: carries out the moves that stand in the map, and survives whatever fails while it works.

Owns: beginning, committing and voiding moves.
Promises:
  - A move is committed only when its destination has said that this very try is done, and only while it stands; where
    shards have copies, only as `commit_checks` says.
  - A try that may have frozen partitions and cannot be committed is voided: its id goes from the map, so the freeze
    ends as soon as the source follows. The same partitions are then tried under a new id, from the start.
  - So many tries at most are at work at once, in all and of each shard (`move_slots`), and one for each pair of source
    and destination. One that waits for a shard which is away takes none of these places.
Leaves to others: the data (the destination does all of that), what is to move (`placement.moves`), how far tries are
(`move_tries`), what is said to shards (`move_talk`).

A try, from the controller's side
---------------------------------
    reach     bring source and destination to a map in which the try stands (Follow); wait for them as long as it takes
    queue     for a place
    receive   ask the destination again and again: copy, tail, freeze, done
    commit    one swap: the partitions are the destination's, the try is gone; then Follow to both

The map is all there is. A controller that dies leaves tries whose progress is not known: at its start it
gives all of them new ids, in one swap and before anything else, so that no freeze of an earlier time can stand and no
answer of an earlier time can be taken for one of now. If it dies before the commit's swap, that is what happens to the
move; if it dies after it, the shards learn of the commit when they ask for the next map.

Why every error after the first Receive voids: from then on the destination works by itself and may freeze partitions
at the source at any time, without a word to the mover. Voiding costs a copy; not voiding could leave partitions without
a shard that answers for them. An error before that, when nothing was sent, costs nothing and only waits.

Why a task may be cancelled: `_take` cancels the try whose id no longer stands (a new plan, or a cancellation).
It never does from the moment at which the try begins its own swap, the only step whose end must be known.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.controller import change_steps
from kvstore.controller.changes import Change
from kvstore.controller.commit_checks import lacks_copies, refusal, terms_of
from kvstore.controller.document import ClusterDocument
from kvstore.controller.membership import ClusterState, formed_map
from kvstore.controller.move_slots import MoveSlots
from kvstore.controller.move_talk import FIRST_WAIT_S, Away, MoveTalk, longer
from kvstore.controller.move_tries import Tries, Try, now_s
from kvstore.controller.record import Record, milliseconds
from kvstore.controller.shards import ShardClients
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import KvError, Unavailable
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap, Move
from kvstore.said_once import SaidOnce

log = logging.getLogger(__name__)


def new_move_id(environment: Environment = SYSTEM) -> str:
    """An id that no move, and no change, ever had."""
    return environment.random_hex(8)


class _Refused(Exception):
    """The move may not be committed as things are now, and is to be tried again."""


class Mover:
    """`run` it in a task of its own; `tries` may be asked at any time."""

    def __init__(
        self, document: ClusterDocument, shards: ShardClients, limits: Limits, environment: Environment = SYSTEM
    ) -> None:
        self.record = Record()
        self.tries = Tries(self.record)
        self.is_dead: Callable[[str], bool] = lambda node: False  # whether a node is held for dead
        self.holds_still: Callable[[ClusterMap], bool] = lambda cluster_map: False  # too many nodes are silent
        self._environment = environment
        self._new_id = partial(new_move_id, environment)
        self._document = document
        self._shards = shards
        self._talk = MoveTalk(shards, limits)
        self._limits = limits
        self._places = MoveSlots(limits.moves_at_once_max, limits.moves_of_shard_max)
        self._map: ClusterMap | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._stopping = False
        self._said = SaidOnce()

    async def run(self) -> None:
        """Carry out what stands in the map, for ever. Cancel it before the store is closed."""
        try:
            while True:
                await self._follow_maps()
                await asyncio.sleep(self._limits.reconnect_wait_s_max)
        finally:
            self._stopping = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow_maps(self) -> None:
        """Returns when the store cannot answer."""
        try:
            if self._map is None:
                await self._document.change(self._begun_again)
            self._said.is_news("")
            revision = -1
            while True:
                revision, state = await self._document.after(revision)
                if state.map is not None:
                    self._take(state.map)
        except Unavailable as error:
            if self._said.is_news(error.detail):
                log.warning("the map cannot be read or changed, so no move goes on: %s", error)

    def _begun_again(self, state: ClusterState) -> ClusterState:
        """As a controller finds it at its start.
        Each try is another one, and each move is part of a change."""
        voided = _with_map(state, lambda cluster_map: moves.all_voided(cluster_map, self._new_id))
        now_ms = self._environment.now_ms()
        return change_steps.adopted(voided, Change(id=self._new_id(), kind="rebalance", began_ms=now_ms))

    # --- which tries are under way -----------------------------------------------------------------------------------

    def _take(self, cluster_map: ClusterMap) -> None:
        """Another map, this controller's or another's: end what no longer stands, begin what can."""
        if self._map is not None and cluster_map.epoch <= self._map.epoch:
            return
        self._map = cluster_map
        self._shards.follow(cluster_map)
        if not cluster_map.moves:
            self.tries.troubles.clear()
        standing = {move.id: move for move in cluster_map.moves}
        for each in self.tries.by_pair.values():
            each.move = standing.get(each.move.id, each.move)  # it may be part of another change by now
            if each.move.id not in standing and not each.deciding and each.task is not None:
                each.task.cancel()
                self._start(self._tell(each.move.source))
                self._start(self._tell(each.move.to))
        self._fill()

    def _fill(self) -> None:
        """A try for the first move of each pair that has none."""
        if self._map is None or self._stopping:
            return
        for move in self._map.moves:
            if (move.source, move.to) not in self.tries.by_pair:
                new = self.tries.by_pair[move.source, move.to] = Try(move)
                new.task = self._start(self._run_try(new))
                new.task.add_done_callback(partial(self._leave, new))  # also if it is cancelled before it has begun

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    async def _run_try(self, current: Try) -> None:
        try:
            await self._carry_out(current)
        except Exception:
            log.exception("the move %s of %s to %s failed", current.move.id, *current.pair)
            self.tries.note_trouble(current, "the controller met an error of its own; its log says more")

    def _leave(self, current: Try, _: object = None) -> None:
        """Make room for the next move of the pair."""
        current.decided.set()
        if self.tries.by_pair.get(current.pair) is current:
            del self.tries.by_pair[current.pair]
            self._fill()

    # --- one try -----------------------------------------------------------------------------------------------------

    async def _carry_out(self, current: Try) -> None:
        committed = False
        while not current.deciding:
            await self._reach(current)
            async with self._places.place(*current.pair):
                if self._held():
                    continue  # it was not so before it waited for its place
                try:
                    failure = await self._talk.receive(current)
                except Away:
                    await asyncio.sleep(FIRST_WAIT_S)
                    continue
                current.deciding = True
                if failure is None:
                    committed = await self._commit(current)
                else:
                    await self._void(current, failure)
                self._leave(current)
        if committed:
            await self._tell_of_commit(current)

    async def _reach(self, current: Try) -> None:
        """Both shards follow a map in which the try stands; if the tries before failed, not too soon after them."""
        trouble = self.tries.troubles.get(current.pair)
        if trouble is not None:
            current.note("waiting", f"tried {trouble.tries} times so far: {trouble.detail}")
            await asyncio.sleep(trouble.pause_s(self._limits.reconnect_wait_s_max))
        wait_s = FIRST_WAIT_S
        while missing := await self._lacks_to_begin(current):
            current.note("waiting", missing)
            await asyncio.sleep(wait_s)
            wait_s = longer(wait_s, self._limits)
        current.note("queued")

    async def _lacks_to_begin(self, current: Try) -> str:
        """What the try waits for; empty if for nothing.

        Its terms are those of the map that both shards have been brought to. One that came meanwhile may name another
        primary, and in that one's term nobody has acknowledged anything yet.
        """
        brought = self._map
        assert brought is not None
        if missing := self._held() or await self._talk.bring(current.move, brought.epoch) or self._lacks(current.move):
            return missing
        current.terms = terms_of(brought, current.move)
        return ""

    def _held(self) -> str:
        """Why nothing moves at all; empty if that is not so."""
        is_held = self._map is not None and self.holds_still(self._map) and not failpoints.planted("move-too-many")
        return "too many nodes are silent at once, so nothing moves until they are back or given up" if is_held else ""

    def _lacks(self, move: Move) -> str:
        return lacks_copies(self._map, move, self.is_dead) if self._map is not None else ""

    # --- the end of a try --------------------------------------------------------------------------------------------

    async def _commit(self, current: Try) -> bool:
        """Whether the partitions are the destination's now; not if the move no longer stood."""
        move = current.move
        assert current.frozen_s is not None
        done = current.keys_done, current.bytes_done
        current.note("done")
        failpoints.hit("move-before-commit")
        try:
            pause_ms = milliseconds(now_s() - current.frozen_s)
            ended_max = self._limits.changes_kept_max

            def commit(state: ClusterState) -> ClusterState:
                after = change_steps.committed(state, move.id, *done, pause_ms, ended_max)
                if why := self._held() or refusal(formed_map(state), move, current.terms, self.is_dead):
                    raise _Refused(why)
                return after

            cluster_map = await self._insist(commit, current)
        except _Refused as refused:
            await self._void(current, str(refused))
            return False
        except KeyError:
            # A swap of this try whose outcome could not be looked up at first may have been the one that removed it.
            cluster_map = await self._insist(lambda state: state, current)
            if not _is_done(cluster_map, move):
                log.info("the move %s of %s to %s was done, but no longer stood", move.id, *current.pair)
                self._take(cluster_map)
                return False
        failpoints.hit("move-after-commit")
        self.record.note_commit(current.move, *done, current.frozen_s)
        self.tries.troubles.pop(current.pair, None)
        log.info(
            "epoch %d: %d partitions of %s are %s's now (%d rows)",
            cluster_map.epoch, len(move.partitions), *current.pair, current.keys_done,
        )  # fmt: skip
        self._take(cluster_map)
        return True

    async def _void(self, current: Try, failure: str) -> None:
        move, fresh = current.move, self._new_id()
        log.warning("the move %s of %s to %s begins again: %s", move.id, *current.pair, failure)
        current.note("waiting", failure)
        self.tries.note_trouble(current, failure)
        failpoints.hit("move-before-void")
        try:
            cluster_map = await self._insist(
                lambda state: _with_map(state, lambda m: moves.voided(m, move.id, fresh)), current
            )
        except KeyError:
            return  # it no longer stands: there is a new plan, or this was done by a swap of unknown outcome
        self.record.note_void()
        self._take(cluster_map)

    async def _tell_of_commit(self, current: Try) -> None:
        """The write pause ends when the destination knows; the source learns at the same time."""
        assert current.frozen_s is not None
        self._start(self._tell(current.move.source))
        wait_s = FIRST_WAIT_S
        while not await self._knows(current.move.to):
            await asyncio.sleep(wait_s)
            wait_s = longer(wait_s, self._limits)
        self.record.note_answering(current.move, current.frozen_s, now_s())

    async def _tell(self, shard_id: str) -> None:
        """Once, to make it quick: who cannot be reached now will ask for the newest map."""
        await self._knows(shard_id)

    async def _knows(self, shard_id: str) -> bool:
        """Whether the shard follows the newest map now, or is no member any more."""
        assert self._map is not None
        try:
            await self._shards.bring(shard_id, self._map.epoch)
        except KvError as error:
            log.debug("%s", error)
            return self._map.shard(shard_id) is None
        return True

    # --- swaps -------------------------------------------------------------------------------------------------------

    async def _insist(self, change: Callable[[ClusterState], ClusterState], current: Try) -> ClusterMap:
        """Change the state, however long its store cannot answer; raises what `change` raises."""
        wait_s, said = FIRST_WAIT_S, SaidOnce()
        while True:
            try:
                changed = await self._document.change(change)
                return formed_map(changed.after)
            except Unavailable as error:
                if said.is_news(error.detail):
                    log.warning("the map cannot be changed, trying again: %s", error)
                current.detail = error.detail
                await asyncio.sleep(wait_s)
                wait_s = longer(wait_s, self._limits)


def _with_map(state: ClusterState, change: Callable[[ClusterMap], ClusterMap]) -> ClusterState:
    return state if state.map is None else msgspec.structs.replace(state, map=change(state.map))


def _is_done(cluster_map: ClusterMap, move: Move) -> bool:
    return set(move.partitions) <= set(cluster_map.owned_by(move.to))
