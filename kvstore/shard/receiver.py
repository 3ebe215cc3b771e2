"""The moves to this shard that the controller has asked for.

Owns: one task for each of them.
Promises: a move that stands no more ends at once.
Leaves to others: the steps of a move (`incoming_move`), when it is begun, given up or committed (the controller).
"""

from __future__ import annotations

import asyncio

from kvstore.config import Limits
from kvstore.errors import Conflict
from kvstore.protocol import Progress, Receive
from kvstore.shard.incoming_move import IncomingMove
from kvstore.shard.peers import Peers
from kvstore.store.store import Store

_PROGRESS_S = 0.5


class Receiver:
    """The moves to this shard that the controller has asked for."""

    def __init__(self, shard_id: str, store: Store, peers: Peers, limits: Limits) -> None:
        self._shard_id = shard_id
        self._store = store
        self._peers = peers
        self._limits = limits
        self._moves: dict[str, tuple[IncomingMove, asyncio.Task[None]]] = {}

    async def receive(self, request: Receive) -> Progress:
        """Begin the move, if it is not begun; how far it is. Raises Conflict if it does not stand, Unavailable."""
        self.drop_what_is_over()
        move = next((move for move in self._peers.cluster_map.moves if move.id == request.move), None)
        if move is None or move.to != self._shard_id:
            raise Conflict(f"the move {request.move} to shard {self._shard_id} does not stand.", retry_after_ms=50)
        if move.id not in self._moves:
            begun = IncomingMove(move, self._store, self._peers, self._limits)
            self._moves[move.id] = begun, asyncio.create_task(begun.run())
        at, _ = self._moves[move.id]
        if at.step == request.seen and not at.is_over:
            await self._store.tables.environment.wait_for(at.changed.wait(), _PROGRESS_S)
        return Progress(request.id, at.step, at.rows_done, at.rows_total, at.bytes_done, at.waits_for)

    def drop_what_is_over(self) -> None:
        """Called when there is a new map: moves that do not stand end."""
        standing = {move.id for move in self._peers.cluster_map.moves}
        for move_id in [move_id for move_id in self._moves if move_id not in standing]:
            _, task = self._moves.pop(move_id)
            task.cancel()

    async def close(self) -> None:
        tasks = [task for _, task in self._moves.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
