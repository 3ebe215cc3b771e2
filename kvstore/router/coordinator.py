"""Transactions over any keys: two-phase commit, driven by the router, whose state is data of the stores.

Owns: splitting a transaction by owner, the order of prepare, commit and finish, retries, what a client is told.
Promises: the coordinator keeps nothing worth keeping: it may die at any line below, and whoever meets what it left
finds out what became of it (`shard.recovery`). It says "done" only after the anchor's store said so, and "nothing was
written" only while no commit can be under way.
Leaves to others: the verdict on votes (`transactions.coordination`), what each store does (`storage.participant`).

    all keys in one store          Transact ──> done
    only reads                     ReadLock ──> all stores;  ReadUnlock ──> all: were the locks held all the time?
    else                           Prepare ──> all stores but the anchor's;  Commit ──> the anchor's;  the client is
                                   answered;  Finish ──> the others;  Forget ──> the anchor's, later, many at once

Where it may die: before the commit has reached the anchor's store: the intents are found too old, the attempt is
aborted for good. After: it is committed, and the intents are applied by whoever finds them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.errors import (
    BadParameter,
    Conflict,
    KvError,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    WrongOwner,
    from_problem,
)
from kvstore.protocol import (
    Abort,
    Answer,
    Ask,
    Attempt,
    Commit,
    Condition,
    Finish,
    Forget,
    Look,
    Once,
    Outcome,
    Prepare,
    Read,
    ReadLock,
    Reads,
    ReadUnlock,
    Reply,
    Request,
    Step,
    Transact,
    Vote,
    txn_id,
)
from kvstore.router.service import RouterService
from kvstore.transactions.attempts import Stamps
from kvstore.transactions.coordination import Again, Refused, judge, judge_refusal, too_much_read
from kvstore.transport.channel import Channel

log = logging.getLogger(__name__)

_FORGET_EVERY_S = 1.0
_FINISH_TRIES = 5
_RETRY_MS_MAX = 64.0
_ID = re.compile(r"([0-9a-f]{1,8})-([0-9a-f]{1,16}-[0-9a-f]{8})")


class Transaction(NamedTuple):
    """What a client asks for: if all conditions hold, `then`, else `otherwise`."""

    conditions: list[Condition]
    then: list[Step]
    otherwise: list[Step]

    @property
    def anchor(self) -> str:
        """The first key that it names."""
        return self.conditions[0].key if self.conditions else self.then[0].key

    @property
    def reads_only(self) -> bool:
        """It writes nothing, and all that it asks can be told by the values of its keys."""
        steps = (*self.then, *self.otherwise)
        return all(step.op == "get" for step in steps) and all(c.token is None for c in self.conditions)


class Result(NamedTuple):
    """`version` is None if the branch that ran wrote nothing; `reads` are those of its gets, in order."""

    id: str
    succeeded: bool
    version: int | None
    reads: list[Read]


class _Part:
    """What one store has of a transaction. `then_gets`: the place of each of its gets among all of the branch."""

    __slots__ = ("channel", "conditions", "keys", "otherwise", "otherwise_gets", "then", "then_gets")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.keys: dict[str, None] = {}
        self.conditions: list[Condition] = []
        self.then: list[Step] = []
        self.otherwise: list[Step] = []
        self.then_gets: list[int] = []
        self.otherwise_gets: list[int] = []

    def add(self, steps: list[Step], gets: list[int], step: Step, place: int) -> None:
        steps.append(step)
        self.keys[step.key] = None
        if step.op == "get":
            gets.append(place)


class Coordinator:
    def __init__(self, service: RouterService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._stamps = Stamps(secrets.token_hex(4))
        self._finished: dict[str, list[Attempt]] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def run(self, transaction: Transaction, once: Once | None) -> Result:
        """Do it, trying again for up to `txn_timeout_s` while others are in the way.

        Raises Conflict, Locked, IdempotencyKeyReused, DiskFull, DataCorrupt, TooManyRequests, Unavailable: nothing was
        written; OutcomeUnknown with `txn_id`.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._limits.txn_timeout_s
        self._stamps.see(self._service.floor)
        attempt = self._stamps.draw(_now_us())
        wait_ms = 1.0
        contended = ""
        while True:
            result = await self._try(transaction, attempt, once, deadline_s, contended)
            if isinstance(result, Result):
                return result
            if loop.time() >= deadline_s:
                raise self._in_the_way(result, transaction, attempt)
            if result.epoch:
                await self._service.await_epoch(result.epoch)
            elif not result.key or result.key == contended or result.same_request:
                wait_ms = min(wait_ms * 2, _RETRY_MS_MAX)
                await asyncio.sleep(random.uniform(wait_ms / 2, wait_ms) / 1000)
            contended = result.key
            attempt = self._stamps.draw(_now_us(), attempt.start)

    def _in_the_way(self, again: Again, transaction: Transaction, attempt: Attempt) -> KvError:
        if again.same_request:
            return self._unknown(
                "the same request is under way, and its outcome is not known yet", transaction, attempt
            )
        if again.epoch:
            return Unavailable("no shard owns one of the keys at present", retry_after_ms=500)
        tried_s = self._limits.txn_timeout_s
        if not again.key:
            return Conflict(f"it was not done within {tried_s:g} s and was aborted", retry_after_ms=100)
        return Conflict(f"other transactions were in the way for {tried_s:g} s", retry_after_ms=100, key=again.key)

    def _unknown(self, detail: str, transaction: Transaction, attempt: Attempt) -> OutcomeUnknown:
        return OutcomeUnknown(detail, txn_id=self._id(transaction, attempt))

    def _id(self, transaction: Transaction, attempt: Attempt) -> str:
        return txn_id(attempt, self._service.partition_of(transaction.anchor))

    async def _try(
        self, transaction: Transaction, attempt: Attempt, once: Once | None, deadline_s: float, contended: str
    ) -> Result | Again:
        """`contended`: the key that was in the way of the attempt before, if there was one."""
        parts = self._split(transaction)
        if len(parts) == 1:
            return await self._transact(parts[0], transaction, attempt, once)
        if once is None and transaction.reads_only:
            return await self._read(parts, transaction, attempt)
        return await self._two_phases(parts, transaction, attempt, once, deadline_s, contended)

    def _split(self, transaction: Transaction) -> list[_Part]:
        """By owner, as of now. Raises Unavailable without a map."""
        parts: dict[str, _Part] = {}

        def part_of(key: str) -> _Part:
            channel = self._service.owner_of(key)
            part = parts.get(channel.shard_id)
            if part is None:
                part = parts[channel.shard_id] = _Part(channel)
            return part

        for condition in transaction.conditions:
            part = part_of(condition.key)
            part.conditions.append(condition)
            part.keys[condition.key] = None
        gets = 0
        for step in transaction.then:
            part = part_of(step.key)
            part.add(part.then, part.then_gets, step, gets)
            gets += step.op == "get"
        gets = 0
        for step in transaction.otherwise:
            part = part_of(step.key)
            part.add(part.otherwise, part.otherwise_gets, step, gets)
            gets += step.op == "get"
        return list(parts.values())

    # --- one store ----------------------------------------------------------------------------------------------------

    async def _transact(
        self, part: _Part, transaction: Transaction, attempt: Attempt, once: Once | None
    ) -> Result | Again:
        anchor = transaction.anchor
        request = Transact(0, anchor, attempt, part.conditions, part.then, part.otherwise, once)
        try:
            reply: Reply = await part.channel.request(request)
        except OutcomeUnknown as error:
            raise self._unknown(error.detail, transaction, attempt) from None
        if isinstance(reply, Outcome) and reply.state == "committed":
            return Result(self._id(transaction, attempt), reply.succeeded, reply.version or None, reply.reads)
        return self._refused(reply, transaction)

    def _refused(self, reply: Any, transaction: Transaction) -> Result | Again:
        """Raises the error that the client is told."""
        verdict = judge_refusal(reply)
        if isinstance(verdict, Refused):
            raise verdict.error
        if isinstance(verdict, Again):
            return verdict
        branch = transaction.then if verdict.succeeded else transaction.otherwise
        wrote = any(step.op != "get" for step in branch)
        partition = self._service.partition_of(transaction.anchor)
        name = f"{partition:x}-{verdict.attempt}"
        return Result(name, verdict.succeeded, verdict.version if wrote else None, verdict.reads)

    # --- several stores, reads only -----------------------------------------------------------------------------------

    async def _read(self, parts: list[_Part], transaction: Transaction, attempt: Attempt) -> Result | Again:
        def let_go(part: _Part, reply: Any) -> None:
            if isinstance(reply, Reads):
                self._send(part.channel, ReadUnlock(0, list(part.keys), reply.lock))
            elif reply is None:
                self._send(part.channel, Abort(0, attempt, list(part.keys)))

        replies = await self._ask_all(parts, lambda part: ReadLock(0, attempt, list(part.keys)), Reads, let_go)
        if not isinstance(replies, list):
            return self._refused(replies, transaction)
        confirmed = await asyncio.gather(
            *[
                self._confirm(part.channel, ReadUnlock(0, list(part.keys), reply.lock))
                for part, reply in zip(parts, replies, strict=True)
            ]
        )
        if not all(confirmed):
            return Again()
        if sum(len(read.value or b"") for reply in replies for read in reply.reads) > self._limits.txn_read_bytes_max:
            raise too_much_read(self._limits.txn_read_bytes_max)
        found: dict[str, Read] = {}
        for part, reply in zip(parts, replies, strict=True):
            found.update(zip(part.keys, reply.reads, strict=True))
        succeeded = all(_holds(condition, found[condition.key]) for condition in transaction.conditions)
        branch = transaction.then if succeeded else transaction.otherwise
        return Result(self._id(transaction, attempt), succeeded, None, [found[step.key] for step in branch])

    async def _confirm(self, channel: Channel, unlock: ReadUnlock) -> bool:
        """The locks were held until now."""
        try:
            reply: Answer = await channel.request(unlock)
        except KvError:
            return False
        return reply.status == 200

    # --- several stores -----------------------------------------------------------------------------------------------

    async def _two_phases(
        self,
        parts: list[_Part],
        transaction: Transaction,
        attempt: Attempt,
        once: Once | None,
        deadline_s: float,
        contended: str,
    ) -> Result | Again:
        anchor = transaction.anchor
        (last,) = (part for part in parts if anchor in part.keys)
        others = [part for part in parts if part is not last]
        others.sort(key=lambda part: contended not in part.keys)
        with_contended = [part for part in others[:1] if contended in part.keys]
        once_key = once.key if once is not None else None

        def prepare(part: _Part) -> Prepare:
            first = contended if part in with_contended else ""
            return Prepare(0, anchor, attempt, part.conditions, part.then, part.otherwise, once_key, first)

        def give_up(part: _Part, reply: Any) -> None:
            if reply is None or isinstance(reply, Vote):
                self._send(part.channel, Abort(0, attempt, list(part.keys)))

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
        highest, holds, locked_then, locked_otherwise = judge(votes)
        then_reads, otherwise_reads = _reads_of_others(others, votes, transaction)
        keys = [key for part in others for key in part.keys]
        commit = Commit(
            0, anchor, attempt, last.conditions, last.then, last.otherwise, highest, holds, keys, locked_then,
            locked_otherwise, once, then_reads if once else [], otherwise_reads if once else [],
        )  # fmt: skip
        outcome = await self._commit(commit, transaction, deadline_s)
        if not isinstance(outcome, Outcome) or outcome.state != "committed":
            for part in others:
                give_up(part, None)
            return self._refused(outcome, transaction)
        self._finish(others, anchor, attempt, outcome)
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
        parts: list[_Part],
        make: Callable[[_Part], Any],
        wanted: type,
        give_up: Callable[[_Part, Any], None],
        sent_point: str = "",
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
        if sent_point:
            await asyncio.sleep(0)
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

    async def _commit(self, commit: Commit, transaction: Transaction, deadline_s: float) -> Outcome | Answer:
        """What the anchor's store says for good, asked again while it says nothing. Raises OutcomeUnknown, Unavailable.

        Once the commit may have arrived, only the anchor's store knows what became of it. Where it cannot be done as it
        was split up (421), it is given up by asking: then it is aborted for good, or was done.
        """
        loop = asyncio.get_running_loop()
        give_up_s = deadline_s + self._limits.txn_timeout_s
        may_have_arrived = False
        request: Commit | Ask = commit
        failpoints.hit("txn-before-decide-sent")
        while True:
            error: KvError
            try:
                future = self._service.owner_of(commit.key).request(request)
                if failpoints.active:
                    await asyncio.sleep(0)
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
                if isinstance(reply, Answer) and not isinstance(error, WrongOwner | TooManyRequests):
                    return reply
            if loop.time() > (give_up_s if may_have_arrived else deadline_s):
                break
            if isinstance(error, WrongOwner):
                request = Ask(0, commit.key, commit.attempt)
                await self._service.await_epoch(int(error.members.get("epoch", 0)))
            else:
                await asyncio.sleep(0.02)
        if may_have_arrived:
            raise self._unknown(f"it may have been committed: {error.detail}", transaction, commit.attempt)
        self._abort_everywhere(commit.attempt, commit.keys)
        raise Unavailable(f"{error.detail}; nothing was decided", retry_after_ms=500)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def _finish(self, others: list[_Part], anchor: str, attempt: Attempt, outcome: Outcome) -> None:
        left = len(others)

        def on_reply(part: _Part, future: asyncio.Future[Any]) -> None:
            nonlocal left
            done = not future.cancelled() and future.exception() is None and future.result().status == 200
            if not done:
                self._spawn(self._finish_later(make(part), anchor))
                return
            left -= 1
            if not left:
                self._forget_later(attempt, anchor)

        def make(part: _Part) -> Finish:
            return Finish(0, attempt, list(part.keys), outcome.version, outcome.succeeded, outcome.decided_ms)

        failpoints.hit("txn-before-finish-sent")
        for part in others:
            try:
                future = part.channel.request(make(part))
            except KvError:
                self._spawn(self._finish_later(make(part), anchor))
                continue
            future.add_done_callback(partial(on_reply, part))
            if failpoints.active:
                failpoints.hit("txn-after-finish-sent")

    async def _finish_later(self, finish: Finish, anchor: str) -> None:
        """A finish did not come through. Some tries more; then the stores see to it (`shard.recovery`)."""
        for number in range(_FINISH_TRIES):
            await asyncio.sleep(0.05 * 2**number)
            by_owner: dict[str, list[str]] = {}
            try:
                for key in finish.keys:
                    by_owner.setdefault(self._service.owner_of(key).shard_id, []).append(key)
                replies = await asyncio.gather(
                    *[
                        self._service.channels[shard_id].request(
                            Finish(0, finish.attempt, keys, finish.version, finish.succeeded, finish.decided_ms)
                        )
                        for shard_id, keys in by_owner.items()
                    ]
                )
            except KvError:
                continue
            if all(reply.status == 200 for reply in replies):
                return

    def _forget_later(self, attempt: Attempt, anchor: str) -> None:
        """Tell the anchor's store that all is finished; soon, with others."""
        if not self._finished:
            asyncio.get_running_loop().call_later(_FORGET_EVERY_S, self._forget)
        self._finished.setdefault(anchor, []).append(attempt)

    def _forget(self) -> None:
        finished, self._finished = self._finished, {}
        by_owner: dict[str, list[Attempt]] = {}
        failpoints.hit("txn-before-forget-sent")
        for anchor, attempts in finished.items():
            by_owner.setdefault(self._service.owner_of(anchor).shard_id, []).extend(attempts)
        for shard_id, attempts in by_owner.items():
            self._send(self._service.channels[shard_id], Forget(0, attempts))

    def _abort_everywhere(self, attempt: Attempt, keys: Sequence[str]) -> None:
        by_owner: dict[str, list[str]] = {}
        for key in keys:
            by_owner.setdefault(self._service.owner_of(key).shard_id, []).append(key)
        for shard_id, its_keys in by_owner.items():
            self._send(self._service.channels[shard_id], Abort(0, attempt, its_keys))

    def _send(self, channel: Channel, request: Request) -> None:
        """Whatever the answer: the store finds out by itself what this would have told it."""
        try:
            channel.request(request).add_done_callback(_ignore)
        except KvError:
            pass

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- looking up ---------------------------------------------------------------------------------------------------

    async def look(self, name: str) -> str | None:
        """`committed`, `aborted` or `pending`; None if nothing is known of it. Raises BadParameter, Unavailable."""
        match = _ID.fullmatch(name)
        if match is None or int(match[1], 16) >= self._service.partitions:
            raise BadParameter(f"{name[:100]!a} is no id of a transaction", parameter="id")
        partition = int(match[1], 16)
        reply = await self._service.ask_owner(partition, Look(0, partition, match[2]))
        if isinstance(reply, Outcome):
            if reply.state != "gone":
                return reply.state
            held = await asyncio.gather(*[self._is_held(channel, match[2]) for channel in self._service.all_channels])
            return "pending" if any(held) else None
        raise from_problem(reply.problem if isinstance(reply, Answer) else None)

    async def _is_held(self, channel: Channel, name: str) -> bool:
        try:
            reply: Reply = await channel.request(Look(0, -1, name))
        except KvError:
            return False
        return isinstance(reply, Outcome) and reply.state == "pending"


class _Late:
    """A reply that nobody waits for any more."""

    def __init__(self, part: _Part, wanted: type, give_up: Callable[[_Part, Any], None]) -> None:
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


def _holds(condition: Condition, read: Read) -> bool:
    if condition.exists is not None:
        return (read.value is not None) == condition.exists
    return read.value is not None and read.version == condition.version


def _reads_of_others(
    others: list[_Part], votes: list[Vote], transaction: Transaction
) -> tuple[list[Read | None], list[Read | None]]:
    """What the gets of each branch found, in its order; None for those of the anchor's store."""
    branches: list[list[Read | None]] = [
        [None] * sum(step.op == "get" for step in branch) for branch in (transaction.then, transaction.otherwise)
    ]
    for part, vote in zip(others, votes, strict=True):
        reads = iter(vote.reads)
        for branch, places in zip(branches, (part.then_gets, part.otherwise_gets), strict=True):
            for place in places:
                branch[place] = next(reads)
    return branches[0], branches[1]


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _now_us() -> int:
    return time.time_ns() // 1000
