"""Clients of a simulated cluster: the workloads of `loadtest.workloads`, each call over the simulated network.

Owns: how a call reaches a router, and what its fate means; repeating with an Idempotency-Key.
Promises: a call is sent once, except by a client that gives it an Idempotency-Key: that one repeats it while
it is not known what became of it, and it is one operation of the history.
Leaves to others: what is called (`loadtest.workloads`), whether the history can be (`loadtest.histories`).
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from loadtest.histories.history import AnyOperation, Lease
from loadtest.simulate.brief import Briefs
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.network import End
from loadtest.workloads.calls import NEVER_SENT, NO_ANSWER, NOTHING, Call, Pause, Reply, Steps
from loadtest.workloads.judged import Judged
from loadtest.workloads.place import LOAD, Place, Workload

PREFIX = "sim/"
_PATIENCE_S = 6.0
_CONNECT_S = 1.0
_PAUSE_S = 0.042  # between two calls, in the mean
_TRIES_MAX = 40
_CLOCKS_AGREE = 0.985
_ONCE_SHARE = 0.4

CLIENTS = 10
_SHAPE = LOAD.crowded(8)
_WEIGHTS = {Judged.REGISTER: 3, Judged.SECTION: 2, Judged.COUNTER: 0.5}


class History:
    """What all clients did."""

    def __init__(self, cluster: Cluster) -> None:
        self.operations: list[AnyOperation] = []
        self.calls = 0
        self.numbers = itertools.count(1)
        self._cluster = cluster

    def add(self, operation: AnyOperation) -> None:
        if isinstance(operation, Lease):
            operation.ttl_s *= _CLOCKS_AGREE  # a shard's clock may be that much faster than the history's
        self.operations.append(operation)
        self._cluster.loop.note(f"{operation.client}: {operation!r}")


class Client:
    """One client, which asks for one thing after the other."""

    def __init__(self, name: str, cluster: Cluster, history: History) -> None:
        self.name = name
        self._cluster = cluster
        self._history = history
        self._rng = cluster.random(f"client {name}")
        self.place = Place(PREFIX, name, history.numbers, self._rng, history.add, _SHAPE)
        self._at: End | None = None
        self._router = self._rng.randrange(len(cluster.routers))
        self._keys = itertools.count(1)
        self.repeats = False  # with an Idempotency-Key
        self._pause_s = 0.0  # between calls, in the mean

    async def run(self, until_s: float) -> None:
        """Do now one thing and now another."""
        self._pause_s = _PAUSE_S
        workloads: list[Workload] = [*(kind.value.client(self.place) for kind in Judged), Briefs(self.place)]
        weights = [*(_WEIGHTS.get(kind, 1.0) for kind in Judged), 1.0]
        while self._cluster.loop.time() < until_s:
            self.repeats = self._rng.random() < _ONCE_SHARE
            await self.do(self._rng.choices(workloads, weights)[0].step())

    async def do(self, steps: Steps[Any]) -> Any:
        """Do all of it; what it returns."""
        reply: Reply | None = None
        while True:
            try:
                wish = steps.send(reply) if reply is not None else next(steps)
            except StopIteration as end:
                return end.value
            if isinstance(wish, Pause):
                await asyncio.sleep(wish.seconds)
                reply = NOTHING
            else:
                reply = await self.ask(wish)
                if self._pause_s:
                    await asyncio.sleep(self._rng.expovariate(1 / self._pause_s))

    # --- calls --------------------------------------------------------------------------------------------------------

    async def ask(self, call: Call) -> Reply:
        self._history.calls += 1
        may_repeat = (call.method in ("PUT", "DELETE") and call.path.startswith("/v1/kv/")) or call.path == "/v1/txn"
        if not self.repeats or not may_repeat:
            return await self._send(call, self._cluster.loop.time())
        key = f"{self.name}-{next(self._keys)}"
        call = call._replace(headers={**call.headers, "Idempotency-Key": key})
        begin_s, is_open = self._cluster.loop.time(), False
        for _ in range(_TRIES_MAX):
            reply = await self._send(call, begin_s)
            is_open |= reply.outcome == "unknown"
            if not is_open or reply.outcome == "done":
                return reply
            await asyncio.sleep(self._rng.uniform(0.01, 0.5))
        return reply._replace(status=NO_ANSWER, error="no try was answered")

    async def _send(self, call: Call, begin_s: float) -> Reply:
        loop = self._cluster.loop
        try:
            at = await self._connected()
        except OSError as error:
            self._turn_away()
            return Reply(NEVER_SENT, error=type(error).__name__, begin_s=begin_s, end_s=loop.time())
        answer, why = None, "the connection was lost"
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await at.send(call)
                answer = await at.receive()
        except (ConnectionResetError, TimeoutError) as error:
            why = type(error).__name__
        if answer is None:
            at.close()
            self._turn_away()
            return Reply(NO_ANSWER, error=why, begin_s=begin_s, end_s=loop.time())
        status, body, version = answer
        return Reply(status, body, version, begin_s=begin_s, end_s=loop.time())

    async def _connected(self) -> End:
        """Raises OSError, which TimeoutError is."""
        if self._at is None or self._at.over:
            router = self._cluster.routers[self._router]
            async with asyncio.timeout(_CONNECT_S):
                self._at = await self._cluster.network.connect(None, self.name, router.name, "client")
        return self._at

    def _turn_away(self) -> None:
        """The next call goes to another router, as a rule."""
        self._at = None
        self._router = self._rng.randrange(len(self._cluster.routers))
