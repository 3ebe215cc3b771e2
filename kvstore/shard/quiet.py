"""Moves to one store that are about to be frozen, or are: all others give way to them.

Owns: which moves those are.
Promises: what has to be applied to the file while no shard answers is not behind what another move brings. No move
waits for longer than a freeze may last, and none of those that are about to be frozen waits for another one.
Leaves to others: when a move is about to be frozen (`incoming_move`), when it is over (`receiver`).
"""

from __future__ import annotations

import asyncio

from kvstore.environment import Environment


class Quiet:
    """Of one store."""

    def __init__(self, environment: Environment, wait_s_max: float) -> None:
        self._environment = environment
        self._wait_s_max = wait_s_max
        self._moves: set[str] = set()
        self._is_over = asyncio.Event()

    def begin(self, move: str) -> None:
        """From now on the others bring nothing."""
        self._moves.add(move)
        self._is_over.clear()

    def end(self, move: str) -> None:
        """No-op if it has not begun."""
        self._moves.discard(move)
        if not self._moves:
            self._is_over.set()

    async def give_way(self, move: str) -> None:
        """Wait before that move brings more, while there are others that have begun."""
        if self._moves and move not in self._moves:
            await self._environment.wait_for(self._is_over.wait(), self._wait_s_max)
