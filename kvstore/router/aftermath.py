"""What follows a decision: finishes, aborts, and the word that an attempt may be forgotten.

Owns: telling the stores, some tries more where that fails.
Promises: nothing rests on it: a store that hears nothing finds out by itself (`shard.recovery`), only later.
Leaves to others: the decision (`coordinator`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any

from kvstore import failpoints
from kvstore.errors import KvError
from kvstore.protocol import Abort, Attempt, Finish, Forget, Outcome, Request
from kvstore.router.parts import Part
from kvstore.router.service import RouterService
from kvstore.transport.channel import Channel

_FORGET_EVERY_S = 1.0
_FINISH_TRIES = 5


class Aftermath:
    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._finished: dict[str, list[Attempt]] = {}
        self._background: set[asyncio.Task[None]] = set()

    def finish(self, others: list[Part], anchor: str, attempt: Attempt, outcome: Outcome) -> None:
        """Have the intents of the others applied, in the background."""
        left = len(others)

        def on_reply(part: Part, future: asyncio.Future[Any]) -> None:
            nonlocal left
            done = not future.cancelled() and future.exception() is None and future.result().status == 200
            if not done:
                self._spawn(self._finish_later(make(part)))
                return
            left -= 1
            if not left:
                self._forget_later(attempt, anchor)

        def make(part: Part) -> Finish:
            return Finish(0, attempt, list(part.keys), outcome.version, outcome.succeeded, outcome.decided_ms)

        failpoints.hit("txn-before-finish-sent")
        for part in others:
            try:
                future = part.channel.request(make(part), at_leisure=True)
            except KvError:
                self._spawn(self._finish_later(make(part)))
                continue
            future.add_done_callback(partial(on_reply, part))
            if failpoints.active:
                self._spawn(self._hit_when_sent(part.channel))

    async def _hit_when_sent(self, channel: Channel) -> None:
        await channel.flushed()
        failpoints.hit("txn-after-finish-sent")

    async def _finish_later(self, finish: Finish) -> None:
        """A finish did not come through. Some tries more; then the stores see to it (`shard.recovery`)."""
        for number in range(_FINISH_TRIES):
            await asyncio.sleep(0.05 * 2**number)
            try:
                again = [
                    channel.request(
                        Finish(0, finish.attempt, keys, finish.version, finish.succeeded, finish.decided_ms)
                    )
                    for channel, keys in self._by_owner(finish.keys).items()
                ]
                replies = await asyncio.gather(*again)
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
        failpoints.hit("txn-before-forget-sent")
        for channel, anchors in self._by_owner(finished).items():
            self.send(channel, Forget(0, [attempt for anchor in anchors for attempt in finished[anchor]]))

    def abort(self, attempt: Attempt, keys: Iterable[str]) -> None:
        """Of an attempt that never will be committed: its intents go."""
        for channel, its_keys in self._by_owner(keys).items():
            self.send(channel, Abort(0, attempt, its_keys))

    def _by_owner(self, keys: Iterable[str]) -> dict[Channel, list[str]]:
        by_owner: dict[Channel, list[str]] = {}
        for key in keys:
            by_owner.setdefault(self._service.owner_of(key), []).append(key)
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
