"""The real coordinator and the real recovery, one step at a time, without sockets and without waiting.

A coroutine cannot be copied. So an actor is kept as what it was told so far (which reply came to which of its requests,
and who owned what at that time), and played again from the beginning with one thing more. It sees a time of its own,
which jumps to the next timer whenever nothing else is left to do.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import msgspec

from kvstore.config import Limits
from kvstore.errors import KvError, OutcomeUnknown, Unavailable
from kvstore.model import Attempt, IdempotencyKey
from kvstore.protocol import Reply
from kvstore.router.coordinator import Coordinator
from kvstore.router.participants import Result, Transaction
from kvstore.shard.recovery import Recovery
from kvstore.transactions.attempts import Stamps
from kvstore.transactions.decisions import Decision
from kvstore.transactions.intents import PreparedTxn
from tests.unit.transactions.world import PARTITIONS, at

Owners = tuple[tuple[str, int], ...]  # of each key the store that owns it, by number

_TIMEOUT_S = 1000.0  # so long that only tests that make the time pass reach it

LOST = "lost"  # it may have been executed, or may yet be
UNSENT = "unsent"  # it never left


class Told(NamedTuple):
    """What an actor is told: the reply to its request of that number, or LOST or UNSENT. `view`: of a recovery, the
    keys that carry intents of its attempt in its store."""

    request: int
    reply: Any
    owners: Owners
    view: tuple[str, ...] = ()


class Sent(NamedTuple):
    store: int
    op: Any


class Played(NamedTuple):
    """`replies`: to each of `sent` what it was answered, None if it was not. `result` None: not finished."""

    sent: list[Sent]
    replies: list[Any]
    result: Any
    acknowledged: list[Attempt]

    def form(self) -> Any:
        """What it may yet depend on: of attempts that are over, and when the client is answered, only who owes an
        answer."""
        last = max((op.attempt.stamp for _, op in self.sent if hasattr(op, "attempt")), default=0)
        parts = []
        for (store, op), reply in zip(self.sent, self.replies, strict=True):
            stamp = op.attempt.stamp if hasattr(op, "attempt") else last
            over = self.result is not None or stamp != last
            body = b"" if over else msgspec.msgpack.encode(op)
            parts.append((store, type(op).__name__, stamp, _brief(reply, over), body))
        return tuple(parts), self.result


def _brief(reply: Any, over: bool) -> Any:
    if reply is None or isinstance(reply, str):
        return reply
    if over:
        return type(reply).__name__, getattr(reply, "status", 0)
    return msgspec.msgpack.encode(reply)


class Loop(asyncio.BaseEventLoop):
    """Runs what can run, then lets time jump; stops when nothing is left that could ever run by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._now = 0.0
        self._begun: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self._now

    def pass_time(self, seconds: float) -> None:
        self._now += seconds

    def select(self, timeout: float | None) -> list[Any]:
        self._now += timeout or 0.0
        return []

    def _process_events(self, events: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = super().create_task(coro, **options)
        self._begun.append(task)
        return task

    def play(self, coro: Coroutine[Any, Any, Any], tell: Callable[[], bool]) -> asyncio.Task[Any]:
        """Until nothing moves any more; `tell` brings the next news, and says if there was any."""
        self._now = 0.0
        asyncio.events._set_running_loop(self)
        try:
            task = self.create_task(coro)
            self._run_dry()
            while tell():
                self._run_dry()
            return task
        finally:
            self._end_all()
            asyncio.events._set_running_loop(None)

    def _run_dry(self) -> None:
        while self._ready or self._scheduled:
            self._run_once()

    def _end_all(self) -> None:
        """What is not finished never will be."""
        for task in self._begun:
            if not task.done():
                task._log_destroy_pending = False
                task.get_coro().close()
            elif not task.cancelled():
                task.exception()
        self._begun.clear()
        self._ready.clear()
        heapq.heapify(self._scheduled)
        self._scheduled.clear()


_loop = Loop()


class _Net:
    """Stands in for the router's service and its table, and for the stores that a recovery talks to."""

    partitions = PARTITIONS
    epoch = 0
    any_fails_over = False  # each store has one copy here

    def may_ask_again(self, *_: Any) -> bool:
        return False

    def __init__(self, owners: Owners) -> None:
        self.owners = dict(owners)
        self.table = self
        self.floor = 0
        self.view: tuple[str, ...] = ()
        self.sent: list[Sent] = []
        self.replies: list[Any] = []
        self._futures: list[asyncio.Future[Any]] = []

    def owner_of(self, key: str) -> _Channel:
        return _Channel(self, self.owners[key])

    @property
    def channels(self) -> dict[str, _Channel]:
        return {str(store): _Channel(self, store) for store in self.owners.values()}

    def partition_of(self, key: str) -> int:
        return at(key)

    async def await_epoch(self, epoch: int, fenced: bool = False) -> None:
        """The map that is asked for is always there."""

    def send(self, store: int, op: Any) -> asyncio.Future[Any]:
        self.sent.append(Sent(store, op))
        self.replies.append(None)
        self._futures.append(_loop.create_future())
        return self._futures[-1]

    def tell(self, told: Told) -> None:
        self.owners, self.view = dict(told.owners), told.view
        self.replies[told.request] = told.reply
        future = self._futures[told.request]
        if future.done():
            return
        if told.reply == LOST:
            future.set_exception(OutcomeUnknown("lost"))
        elif told.reply == UNSENT:
            future.set_exception(Unavailable("not sent"))
        else:
            future.set_result(told.reply)


class _Channel(NamedTuple):
    net: _Net
    store: int

    @property
    def shard_id(self) -> str:
        return str(self.store)

    def request(self, op: Any, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        return self.net.send(self.store, op)


class _FixedStamps(Stamps):
    """The router's clock stands still. With the last of its attempts its time is over."""

    def __init__(self, router: str, now_us: int, attempts_max: int) -> None:
        super().__init__(router)
        self._now_us = now_us
        self._left = attempts_max

    def draw(self, now_us: int, start: int = 0, epoch: int = 0) -> Attempt:
        self._left -= 1
        if not self._left:
            _loop.pass_time(1.5 * _TIMEOUT_S)
        return super().draw(self._now_us, start)


class Coordinating(NamedTuple):
    """A transaction that is run by a router of its own. `now_us`: the router's clock."""

    number: int
    transaction: Transaction
    once: IdempotencyKey | None
    now_us: int
    attempts_max: int

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coordinating) and self.number == other.number

    def work(self, net: _Net, played: Played) -> Coroutine[Any, Any, Any]:
        coordinator = Coordinator(net, Limits(txn_timeout_s=_TIMEOUT_S))  # type: ignore[arg-type]
        coordinator._stamps = _FixedStamps(f"router{self.number}", self.now_us, self.attempts_max)
        return coordinator.run(self.transaction, self.once)

    def result(self, task: asyncio.Task[Any]) -> Any:
        """("done", succeeded, version, reads), ("unknown",), ("no", code)."""
        error = task.exception()
        if isinstance(error, OutcomeUnknown):
            return ("unknown",)
        if isinstance(error, KvError):
            return "no", error.code
        if error is not None:
            raise error
        result: Result = task.result()
        reads = tuple((read.version, read.value) for read in result.reads)
        return "done", result.succeeded, result.version or 0, reads


class _Asking(Recovery):
    def __init__(self, net: _Net, own: int, decision: Decision | None, played: Played) -> None:
        self._net = net
        self._own = own
        self._store = self  # type: ignore[assignment]
        self._peers = self  # type: ignore[assignment]
        self.undecided = self
        self._decision = decision
        self._played = played

    def owner(self, key: str) -> str:
        return str(self._net.owners[key])

    async def _ask(self, key: str, request: Any) -> Reply:
        reply: Reply = await self._net.send(self._net.owners[key], request)
        return reply

    async def ask(self, op: Any) -> Reply:
        reply: Reply = await self._net.send(self._own, op)
        return reply

    def owned_keys(self, hold: PreparedTxn) -> list[str]:
        return list(self._net.view)

    async def decision(self, attempt: Attempt) -> Decision | None:
        return self._decision

    def acknowledge(self, attempts: list[Attempt]) -> None:
        self._played.acknowledged.extend(attempts)


class Resolving(NamedTuple):
    """A store asks what became of an attempt that holds keys there."""

    store: int
    attempt: Attempt
    anchor: str

    def work(self, net: _Net, played: Played) -> Coroutine[Any, Any, Any]:
        return _Asking(net, self.store, None, played)._resolve(PreparedTxn(self.attempt, self.anchor, 0.0, None))

    def result(self, task: asyncio.Task[Any]) -> Any:
        return _over(task)


class Finishing(NamedTuple):
    """A store has a decision finished that was never acknowledged."""

    store: int
    attempt: Attempt
    decision: bytes

    def work(self, net: _Net, played: Played) -> Coroutine[Any, Any, Any]:
        decision = msgspec.json.decode(self.decision, type=Decision)
        return _Asking(net, self.store, decision, played)._finish(self.attempt)

    def result(self, task: asyncio.Task[Any]) -> Any:
        return _over(task)


def _over(task: asyncio.Task[Any]) -> Any:
    """A recovery that failed is tried again in the next round: that is another one."""
    error = task.exception()
    if error is not None and not isinstance(error, KvError):
        raise error
    return ("over",)


Role = Coordinating | Resolving | Finishing


def play(role: Role, owners: Owners, told: tuple[Told, ...]) -> Played:
    """All that it has done when it was told that, one after the other. `owners`: at its beginning."""
    net = _Net(owners)
    played = Played(net.sent, net.replies, None, [])
    news = iter(told)

    def tell() -> bool:
        each = next(news, None)
        if each is not None:
            net.tell(each)
        return each is not None

    task = _loop.play(role.work(net, played), tell)
    return played._replace(result=role.result(task)) if task.done() else played
