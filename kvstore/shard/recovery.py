"""Recovery of what a dead, slow or lost router left behind.
Any process that finds it brings it to its end.

Owns: asking about intents that are too old, finishing decisions that no router has acknowledged, dropping those that
are finished.
Promises: it never guesses. An intent is applied or dropped only on the word of its anchor's owner, a decision is
dropped only when the owners of all its keys have said that no intent of it is left. Every step is idempotent, and
tried again in the next round if it fails.
Leaves to others: which intents are too old (`store.store`), what is answered (`store.participant`).

It works for owned partitions only, in rounds: every `expiry_sweep_s`, and at once when an operation is blocked by an
intent that is too old. Some attempts at a time, in turns: those that wait for a shard that is away do not stand before
others.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from kvstore.config import Limits
from kvstore.errors import KvError
from kvstore.model import Attempt
from kvstore.protocol import Abort, Answer, ApplyIntents, Outcome, Reply, ResolveTxn
from kvstore.shard.peers import Peers
from kvstore.store.ops import DropDecisions
from kvstore.store.store import Store
from kvstore.transactions.intents import PreparedTxn

log = logging.getLogger(__name__)

_AT_ONCE_MAX = 256  # attempts that are asked about at the same time
_DROPPED_MAX = 2000  # decisions that are dropped in one round


class Recovery:
    """`run` until cancelled, then `close`."""

    def __init__(self, shard_id: str, store: Store, peers: Peers, limits: Limits) -> None:
        self._shard_id = shard_id
        self._store = store
        self._peers = peers
        self._limits = limits
        self._at_work: dict[Attempt, asyncio.Task[None]] = {}
        self._round = 0
        self._turns: dict[Attempt, int] = {}  # the round in which one was last tried

    async def run(self) -> None:
        """Do rounds of recovery, for ever."""
        environment = self._store.tables.environment
        while True:
            await environment.wait_for(self._store.recovery_due.wait(), self._limits.expiry_sweep_s)
            self._store.recovery_due.clear()
            if self._store.cluster_map is not None:
                self._begin_round()
                await asyncio.sleep(0.05)  # who is blocked by what cannot be resolved now does not make it spin

    async def close(self) -> None:
        """End what is at work."""
        for task in list(self._at_work.values()):
            task.cancel()
        await asyncio.gather(*self._at_work.values(), return_exceptions=True)

    def _begin_round(self) -> None:
        finished, unfinished = self._store.undecided.old_decisions(_DROPPED_MAX)
        if finished:
            self._store.tell(DropDecisions(finished))
        due: dict[Attempt, Callable[[], Coroutine[Any, Any, None]]] = {
            attempt: partial(self._finish, attempt) for attempt in unfinished
        }
        due |= {hold.attempt: partial(self._resolve, hold) for hold in self._store.undecided.old_holds()}
        self._round += 1
        self._turns = turns = {attempt: turn for attempt, turn in self._turns.items() if attempt in due}
        waiting = [attempt for attempt in due if attempt not in self._at_work]
        room = _AT_ONCE_MAX - len(self._at_work)
        for attempt in heapq.nsmallest(room, waiting, key=lambda attempt: turns.get(attempt, 0)):
            turns[attempt] = self._round
            task = asyncio.create_task(self._guarded(attempt, due[attempt]()))
            self._at_work[attempt] = task
            task.add_done_callback(partial(self._end, attempt))

    def _end(self, attempt: Attempt, _: asyncio.Task[None]) -> None:
        del self._at_work[attempt]

    async def _guarded(self, attempt: Attempt, work: Awaitable[None]) -> None:
        try:
            await work
        except KvError as error:
            log.debug("attempt %s is resolved later: %s", attempt.name, error)
        except Exception:
            log.exception("attempt %s could not be resolved", attempt.name)

    async def _resolve(self, hold: PreparedTxn) -> None:
        """Ask what became of it, and do that to its keys here."""
        reply = await self._ask(hold.anchor, ResolveTxn(0, hold.anchor, hold.attempt))
        if not isinstance(reply, Outcome):
            return
        keys = self._store.undecided.owned_keys(hold)
        if reply.state == "committed":
            await self._store.ask(ApplyIntents(0, hold.attempt, keys, reply.version, reply.succeeded, reply.decided_ms))
        elif reply.state in ("aborted", "gone"):
            await self._store.ask(Abort(0, hold.attempt, keys))
        log.info("attempt %s, found undecided on %d keys: %s", hold.attempt.name, len(keys), reply.state)

    async def _finish(self, attempt: Attempt) -> None:
        """Have it finished by the owners of all its keys; when they all say so, it is acknowledged."""
        decision = await self._store.undecided.decision(attempt)
        if decision is None:
            return
        by_owner: dict[str, list[str]] = {}
        for key in decision.keys:
            by_owner.setdefault(self._peers.owner(key), []).append(key)
        for keys in by_owner.values():
            finish = ApplyIntents(0, attempt, keys, decision.version, decision.succeeded, decision.decided_ms)
            reply = await self._ask(keys[0], finish)
            if not isinstance(reply, Answer) or reply.status != 200:
                return
        self._store.undecided.acknowledge([attempt])

    async def _ask(self, key: str, request: ResolveTxn | ApplyIntents) -> Reply:
        """The reply of the key's owner, who may be this very store. Raises Unavailable and other KvErrors."""
        owner = self._peers.owner(key)
        if owner == self._shard_id:
            return await self._store.ask(request)
        reply: Reply = await self._peers.channel(owner).request(request)
        return reply
