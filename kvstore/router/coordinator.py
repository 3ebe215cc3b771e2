"""Transactions over any keys: two-phase commit, driven by the router, whose state is data of the stores.

Owns: splitting a transaction by owner, the order of prepare, commit and finish, retries, what a client is told.
Promises: the coordinator keeps nothing worth keeping: it may die at any line below, and any process that meets what it
left finds out what became of it (`shard.recovery`). It says "done" only after the anchor's store said so, and "nothing
was written" only while no commit can be under way.
Leaves to others: the verdict on votes (`transactions.coordination`), what each store does (`store.participant`).

    all keys in one store          Transact ──> done
    only reads                     ReadLock ──> all stores;  ReadUnlock ──> all: were the locks held all the time?
    else                           Prepare ──> all stores but the anchor's;  DecideCommit ──> the anchor's;  the client
                                   is answered;  ApplyIntents ──> the others;  Forget ──> the anchor's, later, many at
                                   once

Where it may die: before the commit has reached the anchor's store: the intents are found too old, the attempt is
aborted for good. After: it is committed, and the intents are applied by any process that finds them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import msgspec

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import (
    BadParameter,
    Conflict,
    IdempotencyKeyReused,
    KvError,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    WrongOwner,
    from_problem,
)
from kvstore.model import Attempt, IdempotencyKey, Read, txn_id
from kvstore.protocol import (
    Answer,
    DecideCommit,
    GetTxn,
    Outcome,
    Prepare,
    ReadLock,
    Reads,
    ReadUnlock,
    Reply,
    ResolveTxn,
    Transact,
    Vote,
)
from kvstore.router.intent_resolver import IntentResolver
from kvstore.router.participants import Result, Transaction, TxnShare, holds, reads_of_others, split
from kvstore.router.routing_table import RoutingTable
from kvstore.router.service import RouterService
from kvstore.router.unserved import unserved
from kvstore.transactions.attempts import Stamps
from kvstore.transactions.coordination import Rejected, Retry, judge, judge_refusal, too_much_read
from kvstore.transport.channel import Channel

log = logging.getLogger(__name__)

_RETRY_MS_MAX = 64.0
_ID = re.compile(r"([0-9a-f]{1,8})-([0-9a-f]{1,16}-[0-9a-f]{8})")


class Coordinator:
    """Drives transactions; any number may run beside one another."""

    def __init__(self, service: RouterService, limits: Limits, environment: Environment = SYSTEM) -> None:
        self._service = service
        self._table = service.table
        self._limits = limits
        self._environment = environment
        self._stamps = Stamps(self._environment.random_hex(4))
        self._after = IntentResolver(service)

    async def run(self, transaction: Transaction, once: IdempotencyKey | None) -> Result:
        """Do it, trying again for up to `txn_timeout_s` while others are in the way.

        Raises Conflict, Locked, IdempotencyKeyReused, DiskFull, DataCorrupt, ReadTooLarge, TooManyRequests,
        Unavailable: nothing was written; OutcomeUnknown with `txn_id`.
        """
        deadline = _Deadline(self._table, self._limits)
        self._stamps.see(self._service.floor)
        attempt = self._stamps.draw(self._environment.now_us(), epoch=self._table.epoch)
        wait_ms = 1.0
        contended = ""
        open_attempt: Attempt | None = None  # which may have been done, or may be yet
        while True:
            try:
                result = await self._try(transaction, attempt, once, deadline, contended)
            except KvError as error:
                if open_attempt is None or isinstance(error, OutcomeUnknown | IdempotencyKeyReused):
                    raise
                raise self._unknown(
                    f"It may have been done before: {error.detail}", transaction, open_attempt
                ) from None
            if isinstance(result, Result):
                return result
            open_attempt = attempt if result.same_request else open_attempt
            if deadline.is_over():
                raise self._in_the_way(result, transaction, open_attempt)
            if result.epoch:
                await deadline.await_epoch(result.epoch, result.fenced)
            elif once is not None or not result.key or result.key == contended:
                wait_ms = min(wait_ms * 2, _RETRY_MS_MAX)
                await asyncio.sleep(self._environment.uniform(wait_ms / 2, wait_ms) / 1000)
            contended = result.key
            attempt = self._stamps.draw(self._environment.now_us(), attempt.start, self._table.epoch)

    def _in_the_way(self, again: Retry, transaction: Transaction, open_attempt: Attempt | None) -> KvError:
        if open_attempt is not None:
            return self._unknown(
                "the same request is under way, and its outcome is not known yet", transaction, open_attempt
            )
        if again.epoch:
            return unserved(self._table.owner_of(key).shard_id for key in transaction.keys)
        tried_s = self._limits.txn_timeout_s
        if not again.key:
            return Conflict(f"it was not done within {tried_s:g} s and was aborted.", retry_after_ms=100)
        return Conflict(f"other transactions were in the way for {tried_s:g} s.", retry_after_ms=100, key=again.key)

    def _unknown(self, detail: str, transaction: Transaction, attempt: Attempt) -> OutcomeUnknown:
        return OutcomeUnknown(detail, txn_id=self._id(transaction, attempt))

    def _id(self, transaction: Transaction, attempt: Attempt) -> str:
        return txn_id(attempt, self._table.partition_of(transaction.anchor))

    async def _try(
        self,
        transaction: Transaction,
        attempt: Attempt,
        once: IdempotencyKey | None,
        deadline: _Deadline,
        contended: str,
    ) -> Result | Retry:
        """`contended`: the key that was in the way of the attempt before, if there was one."""
        parts = split(transaction, self._table.owner_of)
        if len(parts) == 1:
            return await self._transact(parts[0], transaction, attempt, once)
        if once is None and transaction.reads_only:
            return await self._read(parts, transaction, attempt)
        if once is None and contended:
            # Its part must be prepared, and first; the anchor's is not. A reply would be kept with the first key named.
            chosen = next((key for part in parts if contended not in part.keys for key in part.keys), "")
            transaction = msgspec.structs.replace(transaction, chosen_anchor=chosen)
        return await self._two_phases(parts, transaction, attempt, once, deadline, contended)

    # --- one store ----------------------------------------------------------------------------------------------------

    async def _transact(
        self, part: TxnShare, transaction: Transaction, attempt: Attempt, once: IdempotencyKey | None
    ) -> Result | Retry:
        anchor = transaction.anchor
        request = Transact(0, anchor, attempt, part.conditions, part.then, part.otherwise, once)
        try:
            reply: Reply = await part.channel.request(request)
            if type(reply) is Answer and isinstance(lost := from_problem(reply.problem), OutcomeUnknown):
                raise lost  # the primary was deposed before it knew
        except OutcomeUnknown as error:
            if self._service.may_ask_again(request, error, part.channel):
                return Retry(epoch=1, same_request=True)
            raise self._unknown(error.detail, transaction, attempt) from None
        except Unavailable as error:
            return self._refused(error, transaction)
        if isinstance(reply, Outcome) and reply.state == "committed":
            return Result(self._id(transaction, attempt), reply.succeeded, reply.version or None, reply.reads)
        return self._refused(reply, transaction)

    def _refused(self, reply: Any, transaction: Transaction) -> Result | Retry:
        """Raises the error that the client is told."""
        verdict = judge_refusal(reply)
        if isinstance(verdict, Rejected):
            shard_id = verdict.error.members.get("shard")
            if shard_id is not None and shard_id not in self._table.channels:
                return Retry(epoch=1)  # it has left the cluster, and by another map
            if isinstance(verdict.error, Unavailable) and self._table.any_fails_over:
                return Retry(epoch=1)  # another primary may answer soon
            raise verdict.error
        if isinstance(verdict, Retry):
            return verdict
        branch = transaction.then if verdict.succeeded else transaction.otherwise
        wrote = any(step.op != "get" for step in branch)
        partition = self._table.partition_of(transaction.anchor)
        name = f"{partition:x}-{verdict.attempt}"
        return Result(name, verdict.succeeded, verdict.version if wrote else None, verdict.reads)

    # --- several stores, reads only -----------------------------------------------------------------------------------

    async def _read(self, parts: list[TxnShare], transaction: Transaction, attempt: Attempt) -> Result | Retry:
        def let_go(part: TxnShare, reply: Any) -> None:
            if isinstance(reply, Reads):
                self._after.let_go(part.channel, ReadUnlock(0, list(part.keys), reply.lock))
            elif reply is None:
                self._after.abort(attempt, list(part.keys), part.channel)

        def lock(part: TxnShare) -> ReadLock:
            return ReadLock(0, attempt, list(part.keys))

        replies = await self._ask_all(parts, lock, Reads, let_go, "txn-after-reads-sent")
        if not isinstance(replies, list):
            return self._refused(replies, transaction)
        confirmed = await asyncio.gather(
            *[
                self._after.is_let_go(part.channel, ReadUnlock(0, list(part.keys), reply.lock))
                for part, reply in zip(parts, replies, strict=True)
            ]
        )
        if not all(confirmed):
            return Retry()
        if sum(len(read.value or b"") for reply in replies for read in reply.reads) > self._limits.txn_read_bytes_max:
            raise too_much_read(self._limits.txn_read_bytes_max)
        found: dict[str, Read] = {}
        for part, reply in zip(parts, replies, strict=True):
            found.update(zip(part.keys, reply.reads, strict=True))
        succeeded = all(holds(condition, found[condition.key]) for condition in transaction.conditions)
        branch = transaction.then if succeeded else transaction.otherwise
        return Result(self._id(transaction, attempt), succeeded, None, [found[step.key] for step in branch])

    # --- several stores -----------------------------------------------------------------------------------------------

    async def _two_phases(
        self,
        parts: list[TxnShare],
        transaction: Transaction,
        attempt: Attempt,
        once: IdempotencyKey | None,
        deadline: _Deadline,
        contended: str,
    ) -> Result | Retry:
        anchor = transaction.anchor
        (last,) = (part for part in parts if anchor in part.keys)
        others = [part for part in parts if part is not last]
        others.sort(key=lambda part: contended not in part.keys)
        with_contended = [part for part in others[:1] if contended in part.keys]
        once_key = once.key if once is not None else None

        def prepare(part: TxnShare) -> Prepare:
            first = contended if part in with_contended else ""
            return Prepare(0, anchor, attempt, part.conditions, part.then, part.otherwise, once_key, first)

        def give_up(part: TxnShare, reply: Any) -> None:
            if reply is None or isinstance(reply, Vote):
                self._after.abort(attempt, list(part.keys), part.channel)

        failpoints.hit("txn-before-prepare-sent")
        votes: list[Vote] = []
        for some in (with_contended, others[len(with_contended) :]):
            replies = await self._ask_all(some, prepare, Vote, give_up, "txn-after-prepare-sent") if some else []
            if not isinstance(replies, list):
                for part, vote in zip(others, votes, strict=False):
                    give_up(part, vote)
                return self._refused(replies, transaction)
            votes += replies
        if sum(len(read.value or b"") for vote in votes for read in vote.reads) > self._limits.txn_read_bytes_max:
            for part in others:
                give_up(part, None)
            raise too_much_read(self._limits.txn_read_bytes_max)
        prepared = judge(votes)
        then_reads, otherwise_reads = reads_of_others(others, votes, transaction)
        keys = [key for part in others for key in part.keys]
        commit = DecideCommit(0, anchor, attempt, last.conditions, last.then, last.otherwise, *prepared, keys)
        if once is not None:
            commit.once, commit.then_reads, commit.otherwise_reads = once, then_reads, otherwise_reads
        outcome = await self._commit(commit, transaction, deadline)
        if not isinstance(outcome, Outcome) or outcome.state != "committed":
            for part in others:
                give_up(part, None)
            return self._refused(outcome, transaction)
        self._after.finish(others, anchor, attempt, outcome)
        branch, reads = (
            (transaction.then, then_reads) if outcome.succeeded else (transaction.otherwise, otherwise_reads)
        )
        own = iter(outcome.reads)
        wrote = any(step.op != "get" for step in branch)
        return Result(
            self._id(transaction, attempt),
            outcome.succeeded,
            outcome.version if wrote else None,
            [next(own) if read is None else read for read in reads],
        )

    async def _ask_all(
        self,
        parts: list[TxnShare],
        make: Callable[[TxnShare], Any],
        wanted: type,
        give_up: Callable[[TxnShare, Any], None],
        sent_point: str,
    ) -> list[Any] | Any:
        """The replies of all, in order; or the first that is another one than wanted, an error included.

        Then `give_up` is called once for each other part: with its reply, with None if there is none yet.
        """
        futures: list[asyncio.Future[Any]] = []
        refusal: Any = None
        for part in parts:
            try:
                futures.append(part.channel.request(make(part)))
            except KvError as error:
                refusal = error
                break
        if failpoints.active:
            await asyncio.gather(*(part.channel.flushed() for part in parts))
            failpoints.hit(sent_point)
        if refusal is None:
            refusal = await _first_unwanted(futures, wanted)
        if refusal is None:
            return [future.result() for future in futures]
        for part, future in zip(parts, futures, strict=False):
            if not future.done():
                give_up(part, None)
                future.add_done_callback(_Late(part, wanted, give_up))
            elif not future.cancelled() and future.exception() is None and isinstance(future.result(), wanted):
                give_up(part, future.result())
            elif future.exception() is not None:
                give_up(part, None)  # it may have been taken in; if so, it must not stay
        return refusal

    async def _commit(self, commit: DecideCommit, transaction: Transaction, deadline: _Deadline) -> Outcome | Answer:
        """What the anchor's store says for good, asked again while it says nothing. Raises OutcomeUnknown, Unavailable.

        Once the commit may have arrived, only the anchor's store knows what became of it. Where it cannot be done as it
        was split up (421), it is given up by asking: then it is aborted for good, or was done.
        """
        may_have_arrived = False
        request: DecideCommit | ResolveTxn = commit
        failpoints.hit("txn-before-decide-sent")
        while True:
            error: KvError
            try:
                future = self._table.owner_of(commit.key).request(request)
                if failpoints.active:
                    await self._table.owner_of(commit.key).flushed()
                    failpoints.hit("txn-after-decide-sent")
                reply: Reply = await future
            except OutcomeUnknown as lost:
                may_have_arrived, error = True, lost
            except KvError as not_sent:
                error = not_sent
            else:
                if isinstance(reply, Outcome):
                    self._stamps.see(reply.floor)
                    if reply.state == "gone":
                        raise self._unknown("the anchor's store knows it no longer", transaction, commit.attempt)
                    failpoints.hit("txn-after-decided")
                    return reply
                error = from_problem(reply.problem if isinstance(reply, Answer) else None)
                if isinstance(reply, Answer) and not self._says_nothing(error, may_have_arrived):
                    return reply
                may_have_arrived = True  # a refusal answers one copy of the message, and another may still be under way
            if deadline.is_over(self._limits.txn_timeout_s if may_have_arrived else 0.0):
                break
            if isinstance(error, WrongOwner):
                request = ResolveTxn(0, commit.key, commit.attempt)
                await deadline.await_epoch(error.epoch, error.fenced)
            else:
                await asyncio.sleep(0.02)
        if may_have_arrived:
            raise self._unknown(f"It may have been committed: {error.detail}", transaction, commit.attempt)
        self._after.abort(commit.attempt, commit.keys)
        raise Unavailable(f"Nothing was decided: {error.detail}", retry_after_ms=500)

    def _says_nothing(self, error: KvError, may_have_arrived: bool) -> bool:
        """A refusal that leaves open what became of a commit: the store did not look at it.
        That it is not to be had now is final for a commit that was sent once, where no other primary may
        answer. Nor does a primary know that was deposed while it committed."""
        if isinstance(error, Unavailable):
            return may_have_arrived or self._table.any_fails_over
        return isinstance(error, WrongOwner | TooManyRequests | OutcomeUnknown)

    # --- looking up ---------------------------------------------------------------------------------------------------

    async def look(self, name: str) -> Outcome | None:
        """What became of it: `committed`, `aborted` or `pending`; None if nothing is known of it.

        Raises BadParameter for what is no id; Unavailable, and what else its anchor's shard answers.
        """
        match = _ID.fullmatch(name)
        if match is None or int(match[1], 16) >= self._table.partitions:
            raise BadParameter(f"{name[:100]!a} is no id of a transaction.", parameter="id")
        partition = int(match[1], 16)
        reply = await self._service.ask_owner(partition, GetTxn(0, partition, match[2]))
        if isinstance(reply, Outcome):
            if reply.state != "gone":
                return reply
            held = await asyncio.gather(
                *[self._is_held(channel, match[2]) for channel in self._table.channels.values()]
            )
            return Outcome(0, "pending", match[2]) if any(held) else None
        raise from_problem(reply.problem if isinstance(reply, Answer) else None)

    async def _is_held(self, channel: Channel, name: str) -> bool:
        try:
            reply: Reply = await channel.request(GetTxn(0, -1, name))
        except KvError:
            return False
        return isinstance(reply, Outcome) and reply.state == "pending"


class _Deadline:
    """Until when a transaction is tried.
    Time in which it waits for a newer map is not its own: up to `reroute_timeout_s` of it does not count."""

    def __init__(self, table: RoutingTable, limits: Limits) -> None:
        self._table = table
        self._loop = asyncio.get_running_loop()
        self._at_s = self._loop.time() + limits.txn_timeout_s
        self._spare_s = limits.reroute_timeout_s

    def is_over(self, more_s: float = 0.0) -> bool:
        """It has passed, and so have `more_s`."""
        return self._loop.time() >= self._at_s + more_s

    async def await_epoch(self, epoch: int, fenced: bool) -> None:
        """See `RoutingTable.await_epoch`."""
        began_s = self._loop.time()
        await self._table.await_epoch(epoch, fenced)
        spared_s = min(self._loop.time() - began_s, self._spare_s)
        self._spare_s -= spared_s
        self._at_s += spared_s


class _Late:
    """A reply that no client waits for any more."""

    def __init__(self, part: TxnShare, wanted: type, give_up: Callable[[TxnShare, Any], None]) -> None:
        self._part = part
        self._wanted = wanted
        self._give_up = give_up

    def __call__(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None and isinstance(future.result(), self._wanted):
            self._give_up(self._part, future.result())


async def _first_unwanted(futures: list[asyncio.Future[Any]], wanted: type) -> Any:
    """Waits until all have the wanted result, and returns None; or until one has not, and returns that."""
    settled: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    left = len(futures)

    def look(future: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if settled.done():
            return
        error = future.exception()
        if error is not None:
            settled.set_result(error)
        elif not isinstance(future.result(), wanted):
            settled.set_result(future.result())
        elif not left:
            settled.set_result(None)

    for future in futures:
        future.add_done_callback(look)
    return await settled
