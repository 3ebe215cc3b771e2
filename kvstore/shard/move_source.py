"""The source of a move, as its destination asks it.

Owns: asking again while the source is away, is busy, or has not the map yet that this shard has.
Promises: an answer is of the kind that was asked for; what the source refuses with is raised.
Leaves to others: what to ask (`incoming_move`), connections (`peers`).
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from kvstore.environment import Environment
from kvstore.errors import Conflict, OutcomeUnknown, TooManyRequests, Unavailable, from_problem
from kvstore.protocol import Answer, Freeze, Frozen, Info, Pull, Rows, Stats
from kvstore.shard.peers import Peers

_RETRY_S = 0.02
_MAP_TRIES_MAX = 50  # of a source whose map is behind

T = TypeVar("T", Rows, Frozen, Info)


class MoveSource:
    """`is_busy`: others were at work there when it answered last, which took it `took_s`; `waits_for`: why the question
    under way is asked again."""

    def __init__(self, peers: Peers, shard_id: str, environment: Environment) -> None:
        self._environment = environment
        self.took_s = 0.0
        self.is_busy = True  # until it says otherwise
        self.waits_for = ""
        self._peers = peers
        self._shard_id = shard_id

    async def ask(self, request: Pull | Freeze | Stats, wanted: type[T]) -> T:
        """The source's reply; while it is away, or busy, ask again. Raises what it refuses with."""
        started_s = self._environment.monotonic_s()
        while True:
            try:
                reply = await self._peers.channel(self._shard_id).request(request)
            except (Unavailable, OutcomeUnknown, TooManyRequests) as error:
                self.waits_for = f"waiting for shard {self._shard_id}: {error.detail}"
                await asyncio.sleep(_RETRY_S)
                continue
            if isinstance(reply, wanted):
                self.waits_for = ""
                self.took_s = self._environment.monotonic_s() - started_s
                if isinstance(reply, Rows):
                    self.is_busy = reply.busy
                return reply
            refusal = from_problem(reply.problem or {}) if isinstance(reply, Answer) else Conflict("an odd reply.")
            if not isinstance(refusal, TooManyRequests | Unavailable):
                raise refusal
            await asyncio.sleep(_RETRY_S)

    async def ask_with_map(self, request: Pull | Freeze, wanted: type[T]) -> T:
        """As `ask`, also while the source has not the map yet that this shard has."""
        for _ in range(_MAP_TRIES_MAX - 1):
            try:
                return await self.ask(request, wanted)
            except Conflict:
                await asyncio.sleep(_RETRY_S)
        return await self.ask(request, wanted)
