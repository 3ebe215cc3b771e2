"""Requests that reach a node before it serves their shard.

Owns: what is kept for a moment while the term opens, and refused else.
Promises: bounded in number and time. What is refused was not executed, so a router asks again.
Leaves to others: when a term opens (`resident`), what a request does (`service`).

A router follows the map that names a new primary at the same moment as that one. If it were refused until the term is
open, it would have to ask again and again, and each client would wait for the next time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.errors import Unavailable
from kvstore.protocol import Answer, Request
from kvstore.transport.channel import Connection


class EarlyRequests:
    """Of one shard. `refused_s`: when something was refused last. `opens`: a term is being opened here."""

    def __init__(self, shard_id: str, limits: Limits, environment: Environment) -> None:
        self.refused_s = float("-inf")
        self.opens = False
        self._shard_id = shard_id
        self._environment = environment
        self._wait_s, self._requests_max = limits.early_wait_s, limits.early_requests_max
        self._kept: deque[tuple[Request, Connection]] = deque()

    def take(self, request: Request, connection: Connection) -> None:
        """Keep it until the term is open, or refuse it."""
        if not self.opens or len(self._kept) >= self._requests_max:
            self._refuse(request, connection)
            return
        if not self._kept:
            self._environment.call_later(self._wait_s, self._refuse_all)
        self._kept.append((request, connection))

    def begin(self, handle: Callable[[Request, Connection], None]) -> None:
        """The term is open: `handle` begins what was kept, in the order in which it came."""
        while self._kept:
            handle(*self._kept.popleft())

    def _refuse_all(self) -> None:
        while self._kept:
            self._refuse(*self._kept.popleft())

    def _refuse(self, request: Request, connection: Connection) -> None:
        self.refused_s = self._environment.monotonic_s()
        refusal = Unavailable(f"this node does not serve shard {self._shard_id} now.", retry_after_ms=100)
        connection.send(Answer(request.id, refusal.status, problem=refusal.problem()))
