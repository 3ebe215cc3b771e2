"""What follows a decision: finishes, aborts, and the word that an attempt may be forgotten.
The end of locks of reads.

Owns: telling the stores, some tries more where that fails.
Promises: nothing rests on it: a store that hears nothing finds out by itself (`shard.recovery`), only later.
Leaves to others: the decision (`coordinator`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from kvstore import failpoints
from kvstore.errors import KvError, TooManyRequests, Unavailable, WrongOwner
from kvstore.model import Attempt
from kvstore.protocol import Abort, Answer, ApplyIntents, Forget, Outcome, ReadUnlock, Reply, Request
from kvstore.router.participants import TxnShare
from kvstore.router.routing_table import epoch_of
from kvstore.router.service import RouterService
from kvstore.transport.channel import Channel

_FORGET_EVERY_S = 1.0
_TELL_FOR_S = 10.0
_TELL_WAIT_S_MAX = 1.0
_NOT_TAKEN_IN = frozenset({TooManyRequests.status, Unavailable.status})

Keys = list[str]


class IntentResolver:
    """Sends what follows a decision, in the background; nothing is raised."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._table = service.table
        self._finished: dict[str, list[Attempt]] = {}
        self._background: set[asyncio.Task[None]] = set()

    def finish(self, others: list[TxnShare], anchor: str, attempt: Attempt, outcome: Outcome) -> None:
        """Have the intents of the others applied, in the background."""
        left = len(others)

        def on_reply(part: TxnShare, future: asyncio.Future[Any]) -> None:
            nonlocal left
            done = not future.cancelled() and future.exception() is None and future.result().status == 200
            if not done:
                self._spawn(self._tell(make, list(part.keys)))
                return
            left -= 1
            if not left:
                self._forget_later(attempt, anchor)

        def make(keys: Keys) -> ApplyIntents:
            return ApplyIntents(0, attempt, keys, outcome.version, outcome.succeeded, outcome.decided_ms)

        failpoints.hit("txn-before-finish-sent")
        for part in others:
            try:
                future = part.channel.request(make(list(part.keys)), at_leisure=True)
            except KvError:
                self._spawn(self._tell(make, list(part.keys)))
                continue
            future.add_done_callback(partial(on_reply, part))
            if failpoints.active:
                self._spawn(self._hit_when_sent(part.channel))

    async def _hit_when_sent(self, channel: Channel) -> None:
        await channel.flushed()
        failpoints.hit("txn-after-finish-sent")

    async def _tell(self, make: Callable[[Keys], ApplyIntents | Abort], keys: Keys) -> None:
        """Their owners were not reached, or are others by now. Some tries more; then the stores see to it themselves
        (`shard.recovery`)."""
        loop = asyncio.get_running_loop()
        deadline_s, wait_s = loop.time() + _TELL_FOR_S, 0.05
        while keys and loop.time() < deadline_s:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _TELL_WAIT_S_MAX)
            by_owner = self._by_owner(keys).items()
            told = await asyncio.gather(*[self._is_told(channel, make(its_keys)) for channel, its_keys in by_owner])
            keys = [
                key for (_, its_keys), is_told in zip(by_owner, told, strict=True) if not is_told for key in its_keys
            ]

    async def _is_told(self, channel: Channel, request: ApplyIntents | Abort) -> bool:
        """If the answer is 421, returns once it makes sense to ask again."""
        try:
            reply: Reply = await channel.request(request)
        except KvError:
            return False
        if isinstance(reply, Answer) and reply.status == WrongOwner.status:
            await self._table.await_epoch(*epoch_of(reply))
        return isinstance(reply, Answer) and reply.status == 200

    def _forget_later(self, attempt: Attempt, anchor: str) -> None:
        """Tell the anchor's store that all is finished; soon, with others."""
        if not self._finished:
            asyncio.get_running_loop().call_later(_FORGET_EVERY_S, self._forget)
        self._finished.setdefault(anchor, []).append(attempt)

    def _forget(self) -> None:
        finished, self._finished = self._finished, {}
        failpoints.hit("txn-before-forget-sent")
        for channel, anchors in self._by_owner(finished).items():
            self.send(channel, Forget(0, [attempt for anchor in anchors for attempt in finished[anchor]]))

    def abort(self, attempt: Attempt, keys: Keys, channel: Channel | None = None) -> None:
        """Have the intents of an attempt dropped that never will be committed.

        `channel`: to whom the keys belonged when it was prepared, if that was one; it is told first, and others if the
        keys are theirs by now.
        """

        def make(keys: Keys) -> Abort:
            return Abort(0, attempt, keys)

        def on_reply(its_keys: Keys, future: asyncio.Future[Any]) -> None:
            if future.cancelled() or future.exception() is not None or future.result().status == 200:
                return
            self._spawn(self._tell(make, its_keys))

        for each, its_keys in ({channel: keys} if channel is not None else self._by_owner(keys)).items():
            try:
                each.request(make(its_keys)).add_done_callback(partial(on_reply, its_keys))
            except KvError:
                self._spawn(self._tell(make, its_keys))

    def let_go(self, channel: Channel, unlock: ReadUnlock) -> asyncio.Future[Any] | None:
        """Have the shared locks of reads let go; the future brings the first reply, None: it was not sent.

        It is told again where the store takes nothing in for a moment: its primary may go on, and so would the locks.
        """
        try:
            future = channel.request(unlock)
        except KvError as error:  # the locks end with the connection
            if isinstance(error, TooManyRequests):
                self._spawn(self._let_go_later(channel, unlock))
            return None

        def on_reply(future: asyncio.Future[Any]) -> None:
            if not future.cancelled() and future.exception() is None and future.result().status in _NOT_TAKEN_IN:
                self._spawn(self._let_go_later(channel, unlock))

        future.add_done_callback(on_reply)
        return future

    async def is_let_go(self, channel: Channel, unlock: ReadUnlock) -> bool:
        """Whether they were held until now; see `let_go`."""
        future = self.let_go(channel, unlock)
        try:
            return future is not None and (await future).status == 200
        except KvError:
            return False

    async def _let_go_later(self, channel: Channel, unlock: ReadUnlock) -> None:
        loop = asyncio.get_running_loop()
        deadline_s, wait_s, status = loop.time() + _TELL_FOR_S, 0.05, Unavailable.status
        while status in _NOT_TAKEN_IN and loop.time() < deadline_s:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _TELL_WAIT_S_MAX)
            if all(each is not channel for each in self._table.channels.values()):
                return  # another node is the primary, and has none of them
            try:
                status = (await channel.request(msgspec.structs.replace(unlock))).status
            except TooManyRequests:
                continue
            except KvError:
                return

    def _by_owner(self, keys: Iterable[str]) -> dict[Channel, Keys]:
        by_owner: dict[Channel, Keys] = {}
        for key in keys:
            by_owner.setdefault(self._table.owner_of(key), []).append(key)
        return by_owner

    def send(self, channel: Channel, request: Request) -> None:
        """Whatever the answer: the store finds out by itself what this would have told it."""
        try:
            channel.request(request).add_done_callback(_ignore)
        except KvError:
            pass

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
