"""What a router does.
Find the shard of a key in the cached map, ask it, follow the map when the answer is 421.

Owns: whom to ask, and when to ask again; whether the router is ready.
Promises: a write is sent once; only a shard's 421 (nothing was executed) sends it on to another.
Leaves to others: HTTP (`app`), the cached map (`routing_table`), bounds and lost connections (`transport.channel`), the
last word on ownership (the shard), listings and counts (`all_shards`), what is told of the cluster and of a key
(`cluster_views`).

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
from typing import Any, NamedTuple

import aiohttp

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable, WrongOwner
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
from kvstore.router.routing_table import PRIMARY_WAIT_S, RoutingTable
from kvstore.router.unserved import unserved
from kvstore.transport.channel import Channel
from kvstore.transport.sessions import ClusterSession

log = logging.getLogger(__name__)

_PRIMARY_FIRST_WAIT_S = 0.01

KeyRequest = Get | Put | Delete | Acquire | Renew | Release | CancelWait | GetLock


class Routed(NamedTuple):
    """An answer and where it came from."""

    answer: Answer
    shard_id: str
    partition: int


class RouterService:
    """Asks the owners of keys, for the router's calls; any number of calls may run beside one another."""

    def __init__(
        self,
        limits: Limits,
        session: aiohttp.ClientSession,
        environment: Environment = SYSTEM,
        cluster: ClusterSession | None = None,
    ) -> None:
        self._environment = environment
        self._limits = limits
        self.table = RoutingTable(limits, session, environment, cluster)
        self.all_shards = AllShards(self.table, limits)
        self._was_ready = False
        self.floor = 0  # the highest of any store, as far as it was heard of

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
        cluster_map, channels = self.table.cluster_map, self.table.channels
        if cluster_map is None:
            return "this router has no cluster map yet: the controller is away or waits for the first shards"
        silent = [shard.id for shard in cluster_map.shards if shard.state == "up" and not channels[shard.id].answered]
        if silent:
            return f"these shards have not answered yet: {', '.join(silent)}"
        self._was_ready = True
        return None

    async def greet(self) -> None:
        """Ask each shard that has not answered yet for something, so that `not_ready` can tell."""
        while True:
            for channel in list(self.table.channels.values()):
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
        table = self.table
        owners = table.owners
        if not owners:
            raise Unavailable("this router has no cluster map yet.", retry_after_ms=500)
        partition = partition_of(request.key.encode(), table.partitions)
        channel = owners[partition]
        return channel.request(request), channel, partition

    async def ask(self, request: KeyRequest) -> Routed:
        """The owner's answer. Raises the errors of `Channel.request`."""
        try:
            future, channel, partition = self.begin(request)
        except Unavailable as error:
            if not self.table.owners:
                raise
            partition = self.table.partition_of(request.key)
            channel = self.table.owners[partition]
            if not self.may_ask_again(request, error, channel):
                raise
            return await self._reroute(request, channel, partition, error)
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
        if isinstance(outcome, Unavailable) and not self.table.is_owner(channel, partition):
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
                await self.table.await_other_owner(channel, partition, outcome)
            elif self.table.is_owner(channel, partition):
                # A node that is the primary from now on may hear of it a moment later than this router.
                await self.table.await_primary(PRIMARY_WAIT_S if asked is channel else _PRIMARY_FIRST_WAIT_S)
                asked = channel
            channel = self.table.owners[partition]
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

    def may_ask_again(self, request: Request, outcome: Reply | KvError, channel: Channel) -> bool:
        """Whether the shard's primary, this one or another, may be asked the same once more after that."""
        if isinstance(outcome, OutcomeUnknown) and getattr(request, "once", None) is None:
            return False
        is_refused = isinstance(outcome, Answer) and outcome.status == Unavailable.status
        is_lost = isinstance(outcome, OutcomeUnknown | Unavailable)
        return (is_refused or is_lost) and self.table.fails_over(channel.shard_id)

    async def ask_owner(self, partition: int, request: Request) -> Reply:
        """The reply of the partition's owner, following 421. Raises the errors of `Channel.request`."""
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        while True:
            channel = self.table.owners[partition]
            is_late = asyncio.get_running_loop().time() > deadline_s
            try:
                reply: Reply = await channel.request(request)
            except Unavailable as error:
                if self.table.is_owner(channel, partition):
                    if is_late or not self.may_ask_again(request, error, channel):
                        raise
                    await self.table.await_primary()
                continue
            if is_late or not isinstance(reply, Answer):
                return reply
            if reply.status == WrongOwner.status:
                await self.table.await_other_owner(channel, partition, reply)
            elif self.may_ask_again(request, reply, channel):
                await self.table.await_primary()
            else:
                return reply


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
