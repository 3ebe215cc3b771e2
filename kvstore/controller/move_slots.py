"""Places for moves at work: so many in all, and so many of each shard.

Owns: who may begin now, and who waits.
Promises: no waiter is passed by one that came later and wants the same shards; a place is given back
whatever happens to the move.
Leaves to others: what a move does with its place (`mover`).

Each shard has one writer, which all moves to it and from it share. More moves of a shard at the same time make none of
them faster, but the freeze of each longer: what ends it waits behind the copying of the others.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MoveSlots:
    """Room for `at_once_max` moves, and for `of_shard_max` with the same shard as source or destination."""

    def __init__(self, at_once_max: int, of_shard_max: int) -> None:
        self._at_once_max = at_once_max
        self._of_shard_max = of_shard_max
        self._taken: Counter[str] = Counter()
        self._at_work = 0
        self._waiting: deque[tuple[tuple[str, str], asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def place(self, source: str, to: str) -> AsyncIterator[None]:
        """Wait for a place, and keep it for the block.

        A caller that is cancelled while it waits leaves its line.
        """
        shards = source, to
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((shards, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._at_work -= 1
                self._taken.subtract(shards)
            else:
                self._waiting.remove((shards, turn))
            self._admit()

    def _admit(self) -> None:
        """All that have room, those that came first before others."""
        wanted: Counter[str] = Counter()  # by those that go on waiting, and came before
        for shards, turn in list(self._waiting):
            if turn.cancelled():
                continue  # it is about to leave
            has_room = all(self._taken[shard] + wanted[shard] < self._of_shard_max for shard in shards)
            if has_room and self._at_work < self._at_once_max:
                self._waiting.remove((shards, turn))
                self._at_work += 1
                self._taken.update(shards)
                turn.set_result(None)
            else:
                wanted.update(shards)
