"""What a router does.
Find the shard of a key in the cached map, ask it, follow the map when the answer is 421.

Owns: the cached cluster map, a channel per member.
Promises: holds no state worth keeping. A write is sent once; only a shard's 421 (nothing was executed) sends it on to
another.
Leaves to others: HTTP (`app`), bounds and lost connections (`transport.channel`), the last word on ownership (the
shard), listings and counts (`all_shards`), what is told of the cluster and of a key (`cluster_views`).

No call fails because a partition moves. While it changes hands no shard answers for it: the shards say 421, and what
was asked waits here for a newer map, or is sent again now and then, for up to `reroute_timeout_s`. A new member's
channel is open before its first partition is asked for there; a member that left is still listened to until all that
was asked there is answered.

Nor because the primary of a shard with copies dies: until another one answers, what may be asked again waits here. That
is what was not executed, what only reads, and what has an Idempotency-Key; other writes that were sent end with
OutcomeUnknown as soon as the map names another primary.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any, NamedTuple

import aiohttp

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable, WrongOwner, from_problem
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Acquire,
    Answer,
    CancelWait,
    Delete,
    Get,
    GetLock,
    Info,
    Put,
    Release,
    Renew,
    Reply,
    Request,
    Stats,
)
from kvstore.router.all_shards import AllShards
from kvstore.router.unserved import unserved
from kvstore.transport.channel import Channel
from kvstore.transport.link import Links
from kvstore.transport.sessions import ClusterSession

log = logging.getLogger(__name__)

_STALE_SHARD_WAIT_S = 0.02
_FENCED_WAIT_S = 0.2
_PRIMARY_FIRST_WAIT_S, _PRIMARY_WAIT_S = 0.01, 0.05
_DEPOSED_S = 0.1
_CONNECT_WAIT_S = 1.0
_LINGER_S = 2.0

KeyRequest = Get | Put | Delete | Acquire | Renew | Release | CancelWait | GetLock


class Routed(NamedTuple):
    """An answer and where it came from."""

    answer: Answer
    shard_id: str
    partition: int


class RouterService:
    def __init__(
        self,
        limits: Limits,
        session: aiohttp.ClientSession,
        environment: Environment = SYSTEM,
        cluster: ClusterSession | None = None,
    ) -> None:
        self._environment = environment
        self._cluster = cluster
        self.cluster_map: ClusterMap | None = None
        self.channels: dict[str, Channel] = {}
        self._successors: dict[str, Channel] = {}  # which lead where the next map says, until that is taken over
        self._limits = limits
        self._session = session
        self._links = Links(limits, session, self._cluster)
        self._owners: list[Channel] = []
        self._partitions = 0
        self.largest_part = 1.0  # of the partitions, in one shard
        self.all_shards = AllShards(self, limits)
        self._moving: frozenset[int] = frozenset()
        self._map_changed = asyncio.Event()
        self._was_ready = False
        self._next_map: ClusterMap | None = None
        self._background: dict[asyncio.Task[None], None] = {}
        self.floor = 0  # the highest of any store, as far as it was heard of

    # --- the map ------------------------------------------------------------------------------------------------------

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take over a newer map: open channels to new members and addresses, let go those to old ones.

        Where a partition has an owner that is not connected yet, it is taken over as soon as that one is, in a second
        at the latest: until then the old owners are asked, who say 421.
        """
        self._open_channels(cluster_map)
        self._next_map = cluster_map
        channels = self._new_owners(cluster_map)
        if all(channel.connected for channel in channels):
            self._take_over(cluster_map)
        else:
            self._spawn(self._take_over_when_connected(cluster_map, channels))

    def _open_channels(self, cluster_map: ClusterMap) -> None:
        """One for each shard; where the present one leads elsewhere its successor is opened beside it."""
        for shard in cluster_map.shards:
            reached = cluster_map.url_of(shard), shard.store_id
            present, successor = self.channels.get(shard.id), self._successors.get(shard.id)
            if present is None:
                self.channels[shard.id] = self._channel(shard.id, *reached)
            elif _leads(present) != reached and (successor is None or _leads(successor) != reached):
                if successor is not None:
                    self._spawn(successor.close())  # nothing was asked there yet
                self._successors[shard.id] = self._channel(shard.id, *reached)

    def _channel(self, shard_id: str, url: str, store_id: str) -> Channel:
        return Channel(shard_id, url, self._limits, self._session, store_id, self._cluster, self._links)

    def _new_owners(self, cluster_map: ClusterMap) -> list[Channel]:
        """The channels by which partitions are reached in that map, and were not in the present one."""
        if self.cluster_map is None or self._partitions != cluster_map.partitions:
            return []
        of_shard = [self._successors.get(shard.id, self.channels[shard.id]) for shard in cluster_map.shards]
        owners = zip(self._owners, cluster_map.owners, strict=True)
        return list(dict.fromkeys(of_shard[new] for old, new in owners if of_shard[new] is not old))

    async def _take_over_when_connected(self, cluster_map: ClusterMap, channels: list[Channel]) -> None:
        deadline_s = asyncio.get_running_loop().time() + _CONNECT_WAIT_S
        while asyncio.get_running_loop().time() < deadline_s:
            if all(channel.connected for channel in channels):
                break
            await asyncio.sleep(0.005)
        if self._next_map is cluster_map:  # else there is a newer one by now
            self._take_over(cluster_map)

    def _take_over(self, cluster_map: ClusterMap) -> None:
        reached = {shard.id: (cluster_map.url_of(shard), shard.store_id) for shard in cluster_map.shards}
        for shard_id, channel in [*self.channels.items(), *self._successors.items()]:
            if reached.get(shard_id) != _leads(channel):
                of_old = self.channels if self.channels.get(shard_id) is channel else self._successors
                del of_old[shard_id]
                is_deposed = self.fails_over(shard_id) and shard_id in reached
                self._spawn(self._depose(channel) if is_deposed else self._let_go(channel))
        self.channels |= self._successors
        self._successors.clear()
        self._open_channels(cluster_map)
        of_shard = [self.channels[shard.id] for shard in cluster_map.shards]
        for channel in of_shard:
            channel.name_strike(cluster_map.last_strike)
        self._owners = [of_shard[owner] for owner in cluster_map.owners]
        self._partitions = cluster_map.partitions
        self.largest_part = max(Counter(cluster_map.owners).values()) / cluster_map.partitions
        self._moving = frozenset(partition for move in cluster_map.moves for partition in move.partitions)
        self.cluster_map = cluster_map
        log.info("epoch %d: %d shards", cluster_map.epoch, len(cluster_map.shards))
        self._map_changed.set()
        self._map_changed = asyncio.Event()

    async def _let_go(self, channel: Channel) -> None:
        """Close the channel to a former member, or address, once nothing waits there any more.

        Not at once: a transaction that was split up under the map before may not have asked there yet.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._limits.request_timeout_s
        try:
            await asyncio.sleep(_LINGER_S)
            while channel.ops_under_way and loop.time() < deadline_s:  # noqa: ASYNC110 (it happens once)
                await asyncio.sleep(0.05)
        finally:
            await channel.close()

    async def _depose(self, channel: Channel) -> None:
        """Another node is the primary.
        What the old one was asked last has a moment, then all that waits there ends."""
        try:
            await asyncio.sleep(_DEPOSED_S)
        finally:
            await channel.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background[task] = None
        task.add_done_callback(self._background.pop)

    async def close(self) -> None:
        """Close all channels; requests that still wait end in an error."""
        self._next_map = None
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(each.close() for each in [*self.channels.values(), *self._successors.values()]))

    def note_floor(self, floor: int) -> None:
        """A store's floor of attempts: stamps (microseconds of Unix time) of decisions that are long gone."""
        if floor > self.floor and (ahead_s := (floor - self._environment.now_us()) / 1e6) > 0:
            log.warning(
                "some router's clock is or was more than %.0f s ahead of this one: transactions of this router will "
                "often end in 504 or 409; let all hosts keep the same time",
                ahead_s + 2 * self._limits.txn_timeout_s,
            )
        self.floor = max(self.floor, floor)

    def not_ready(self) -> str | None:
        """Why this router cannot serve yet; None from the moment it can, for good."""
        if self._was_ready:
            return None
        if self.cluster_map is None:
            return "this router has no cluster map yet: the controller is away or waits for the first shards"
        silent = [s.id for s in self.cluster_map.shards if s.state == "up" and not self.channels[s.id].answered]
        if silent:
            return f"these shards have not answered yet: {', '.join(silent)}"
        self._was_ready = True
        return None

    async def greet(self) -> None:
        """Ask each shard that has not answered yet for something, so that `not_ready` can tell."""
        while True:
            for channel in list(self.channels.values()):
                if channel.connected and not channel.answered:
                    try:
                        channel.request(Stats(0)).add_done_callback(self._see_floor)
                    except KvError:
                        pass
            await asyncio.sleep(0.02 if self.not_ready() else 1.0)

    def _see_floor(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None and isinstance(future.result(), Info):
            self.note_floor(future.result().facts.get("attempts_floor", 0))

    # --- one key ------------------------------------------------------------------------------------------------------

    def begin(self, request: KeyRequest) -> tuple[asyncio.Future[Any], Channel, int]:
        """Send a request on its way: its future, its channel, its partition. Raises Unavailable, TooManyRequests."""
        if not self._owners:
            raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
        partition = partition_of(request.key.encode(), self._partitions)
        channel = self._owners[partition]
        return channel.request(request), channel, partition

    async def ask(self, request: KeyRequest) -> Routed:
        """The owner's answer. Raises the errors of `Channel.request`."""
        try:
            future, channel, partition = self.begin(request)
        except Unavailable as error:
            if not self._owners or not self.may_ask_again(request, error, self.owner_of(request.key)):
                raise
            return await self._reroute(request, self.owner_of(request.key), self.partition_of(request.key), error)
        return await self.settle(request, future, channel, partition)

    async def settle(
        self, request: KeyRequest, future: asyncio.Future[Any], channel: Channel, partition: int
    ) -> Routed:
        """Await what `begin` began, following 421 to the present owner, and a shard to its present primary."""
        outcome = await _outcome(future)
        if self._is_final(request, outcome, channel, partition):
            return _routed(outcome, channel, partition)
        return await self._reroute(request, channel, partition, outcome)

    def _is_final(self, request: KeyRequest, outcome: Answer | KvError, channel: Channel, partition: int) -> bool:
        """It is what the client is told. Else nothing was done there, or asking again does no harm."""
        if isinstance(outcome, Answer) and outcome.status not in (WrongOwner.status, Unavailable.status):
            return True
        if isinstance(outcome, Answer) and outcome.status == WrongOwner.status:
            return False
        if isinstance(outcome, Unavailable) and not self.is_owner(channel, partition):
            return False
        return not self.may_ask_again(request, outcome, channel)

    async def _reroute(
        self, request: KeyRequest, channel: Channel, partition: int, outcome: Answer | KvError
    ) -> Routed:
        """`outcome`: what was heard of `channel`, which was asked last."""
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        unknown = outcome if isinstance(outcome, OutcomeUnknown) else None
        asked = None  # the channel to which it was sent last from here
        while asyncio.get_running_loop().time() < deadline_s:
            if isinstance(outcome, Answer) and outcome.status == WrongOwner.status:
                await self.await_other_owner(channel, partition, outcome)
            elif self.is_owner(channel, partition):
                # A node that is the primary from now on may hear of it a moment later than this router.
                await self.await_primary(_PRIMARY_WAIT_S if asked is channel else _PRIMARY_FIRST_WAIT_S)
                asked = channel
            channel = self._owners[partition]
            try:
                outcome = await _outcome(channel.request(request))
            except Unavailable as error:
                outcome = error
            except TooManyRequests as error:
                raise unknown or error from None
            if self._is_final(request, outcome, channel, partition):
                if unknown is not None and _is_unheard(outcome):
                    raise unknown
                return _routed(outcome, channel, partition)
            unknown = outcome if isinstance(outcome, OutcomeUnknown) else unknown
        raise unknown or unserved([channel.shard_id])

    def fails_over(self, shard_id: str) -> bool:
        """Whether another copy may take over from its primary, as of the cached map."""
        shard = self.cluster_map.shard(shard_id) if self.cluster_map is not None else None
        return shard is not None and bool(shard.replicas)

    @property
    def any_fails_over(self) -> bool:
        """Whether any shard has copies."""
        return self.cluster_map is not None and any(shard.replicas for shard in self.cluster_map.shards)

    def may_ask_again(self, request: Request, outcome: Reply | KvError, channel: Channel) -> bool:
        """Whether the shard's primary, this one or another, may be asked the same once more after that."""
        if isinstance(outcome, OutcomeUnknown) and getattr(request, "once", None) is None:
            return False
        is_refused = isinstance(outcome, Answer) and outcome.status == Unavailable.status
        return (is_refused or isinstance(outcome, OutcomeUnknown | Unavailable)) and self.fails_over(channel.shard_id)

    async def await_primary(self, wait_s: float = _PRIMARY_WAIT_S) -> None:
        """A moment, or until there is a newer map."""
        await self._environment.wait_for(self._map_changed.wait(), wait_s)

    def is_owner(self, channel: Channel, partition: int) -> bool:
        """As of the cached map."""
        return self._owners[partition] is channel

    async def await_map(self, epoch: int) -> None:
        """Wait until the cached map, if there is one, is of that epoch or a later one."""
        while self.cluster_map is not None and self.cluster_map.epoch < epoch:
            await self._map_changed.wait()

    def is_moving(self, partition: int) -> bool:
        """It may change hands soon, as of the cached map."""
        return partition in self._moving

    async def await_other_owner(self, channel: Channel, partition: int, refusal: Reply) -> None:
        """`channel` has answered 421 for the partition: wait until it makes sense to ask its owner again."""
        if self.is_owner(channel, partition):  # else there is a newer map already
            await self.await_epoch(*epoch_of(refusal))

    async def await_epoch(self, epoch: int, fenced: bool = False) -> None:
        """Wait for a map of at least that epoch.
        If it is the shard that is behind, give it a moment.

        `fenced`: the shard has stopped to answer for the partition, as of that epoch: wait for a map beyond it, but not
        for long, since the move may be given up.
        """
        changed = self._map_changed
        wait_s = _FENCED_WAIT_S if fenced else self._limits.reroute_timeout_s
        if self.cluster_map is not None and self.cluster_map.epoch >= epoch + fenced:
            wait_s = _STALE_SHARD_WAIT_S
        await self._environment.wait_for(changed.wait(), wait_s)

    # --- for transactions ---------------------------------------------------------------------------------------------

    @property
    def all_channels(self) -> list[Channel]:
        """To every member."""
        return list(self.channels.values())

    @property
    def epoch(self) -> int:
        """Of the cached map, 0 without one."""
        return self.cluster_map.epoch if self.cluster_map is not None else 0

    @property
    def partitions(self) -> int:
        """Their number, 0 without a map."""
        return self._partitions

    def partition_of(self, key: str) -> int:
        return partition_of(key.encode(), self._partitions)

    def owner_of(self, key: str) -> Channel:
        """The channel to the owner, as of the cached map. Raises Unavailable without one."""
        if not self._owners:
            raise Unavailable("this router has no cluster map yet", retry_after_ms=500)
        return self._owners[self.partition_of(key)]

    async def ask_owner(self, partition: int, request: Request) -> Reply:
        """The reply of the partition's owner, following 421. Raises the errors of `Channel.request`."""
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        while True:
            channel = self._owners[partition]
            is_late = asyncio.get_running_loop().time() > deadline_s
            try:
                reply: Reply = await channel.request(request)
            except Unavailable as error:
                if self.is_owner(channel, partition):
                    if is_late or not self.may_ask_again(request, error, channel):
                        raise
                    await self.await_primary()
                continue
            if is_late or not isinstance(reply, Answer):
                return reply
            if reply.status == WrongOwner.status:
                await self.await_other_owner(channel, partition, reply)
            elif self.may_ask_again(request, reply, channel):
                await self.await_primary()
            else:
                return reply


def _leads(channel: Channel) -> tuple[str, str]:
    """Where that channel leads: to the store of that id, at that address."""
    return channel.url, channel.store_id


async def _outcome(future: asyncio.Future[Any]) -> Answer | KvError:
    try:
        answer: Answer = await future
        return answer
    except (Unavailable, OutcomeUnknown) as error:
        return error


def _is_unheard(outcome: Answer | KvError) -> bool:
    """The store did not look whether the same request, which was sent before, has been done."""
    return isinstance(outcome, KvError) or outcome.status in (TooManyRequests.status, Unavailable.status)


def _routed(outcome: Answer | KvError, channel: Channel, partition: int) -> Routed:
    if isinstance(outcome, KvError):
        raise outcome
    return Routed(outcome, channel.shard_id, partition)


def epoch_of(refusal: Reply) -> tuple[int, bool]:
    """What a 421 says of itself: as of which epoch, and whether it is fenced."""
    error = from_problem(refusal.problem if isinstance(refusal, Answer) else None)
    return (error.epoch, error.fenced) if isinstance(error, WrongOwner) else (0, False)
