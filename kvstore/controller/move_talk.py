"""What the controller and the two shards of a move say to each other.

Owns: questions, and how long their answers may take.
Promises: the destination is not left alone for longer than a freeze may last.
Leaves to others: what follows (`mover`), the data (the destination does all of that), connections (`shards`).
"""

from __future__ import annotations

import asyncio

from kvstore.config import Limits
from kvstore.controller.move_tries import Try, now_s
from kvstore.controller.shards import ShardClients
from kvstore.errors import KvError, from_problem
from kvstore.placement.cluster_map import Move
from kvstore.protocol import Progress

FIRST_WAIT_S = 0.01
_ANSWER_S = 0.5  # a Receive is answered at the latest after this time


class Away(Exception):
    """The destination cannot be asked, and nothing was sent to it."""


class MoveTalk:
    """Asks the two shards of a move; many moves may be asked about beside one another."""

    def __init__(self, shards: ShardClients, limits: Limits) -> None:
        self._shards = shards
        self._limits = limits

    async def bring(self, move: Move, epoch: int, *, again: bool = False) -> str:
        """Bring both shards to that epoch; says who could not be brought, empty if none."""
        shards = (move.to, move.source)
        found = await asyncio.gather(
            *(self._shards.bring(shard, epoch, again=again) for shard in shards), return_exceptions=True
        )
        for outcome in found:
            if isinstance(outcome, BaseException) and not isinstance(outcome, KvError):
                raise outcome
        return "; ".join(outcome.detail for outcome in found if isinstance(outcome, KvError))

    async def receive(self, current: Try) -> str | None:
        """None when the destination is done, else why the try must be voided. Raises Away if nothing was sent."""
        move, seen, wait_s, was_sent = current.move, "", FIRST_WAIT_S, False
        while True:
            asked_s = now_s()
            try:
                answer = self._shards.receive(move.to, move.id, seen)
                was_sent = True
                async with asyncio.timeout(self._patience_s(current)):
                    reply = await answer
            except TimeoutError:
                return self._impatience(current)
            except KvError as error:
                if not was_sent:
                    raise Away from error
                return error.detail
            if isinstance(reply, Progress):
                current.take(reply, asked_s, now_s())
                if reply.step in ("done", "failed"):
                    return None if reply.step == "done" else reply.detail or "the destination failed"
                if current.has_waited_s(now_s()) > self._limits.request_timeout_s:
                    return reply.detail  # it waits on without its place: see `_reach`
                seen = reply.step
                continue
            refusal = from_problem(reply.problem)
            if reply.status != 409 or seen:
                return refusal.detail
            # It does not stand in the destination's map: not yet, or the shard was restarted with an older one.
            current.note("waiting", f"shard {move.to} has not heard of the move yet")
            await asyncio.sleep(wait_s)
            wait_s = longer(wait_s, self._limits)
            await self.bring(move, 0, again=True)

    def _patience_s(self, current: Try) -> float:
        """How long the next answer may take: no longer than a freeze that is not heard of may last."""
        if current.frozen_s is None:
            return _ANSWER_S + self._limits.move_freeze_timeout_s
        return max(0.0, current.frozen_s + self._limits.move_freeze_timeout_s - now_s())

    def _impatience(self, current: Try) -> str:
        if current.frozen_s is None:
            return f"shard {current.move.to} did not say in time how far it is"
        return f"the freeze lasted longer than {self._limits.move_freeze_timeout_s:g} s"


def longer(wait_s: float, limits: Limits) -> float:
    """The wait after that one."""
    return min(wait_s * 2, limits.reconnect_wait_s_max)
