"""A question to one copy: the digest of some partitions as of a record.

Owns: the one question that is under way.
Promises: an answer counts only for the question that it was given to.
Leaves to others: when to ask, and what a difference means (`store.comparison`).
"""

from __future__ import annotations

import asyncio

from kvstore.environment import Environment
from kvstore.replication import messages
from kvstore.replication.messages import Compared
from kvstore.replication.wire import Wire, WireLost

_ANSWER_S = 10.0


class DigestQuestion:
    """Asks one copy, one question at a time."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._answer: asyncio.Future[Compared | None] | None = None
        self._number = 0

    async def ask(self, wire: Wire, record: int, partitions: list[int]) -> Compared | None:
        """What the copy answers: the digest as of that record, if it has one to tell.

        None where the connection is lost, it does not answer in 10 s, or another question is under way.
        """
        if self._answer is not None:
            return None
        self._answer = answer = asyncio.get_running_loop().create_future()
        self._number += 1
        try:
            await wire.send(messages.Compare(self._number, record, partitions))
            return answer.result() if await self._environment.wait_for(answer, _ANSWER_S) else None
        except WireLost:
            return None
        finally:
            self._answer = None

    def take(self, compared: Compared) -> None:
        """The copy has answered a question."""
        if compared.asked == self._number:
            self._end(compared)

    def lose(self) -> None:
        """The connection is lost: no answer comes."""
        self._end(None)

    def _end(self, compared: Compared | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(compared)
