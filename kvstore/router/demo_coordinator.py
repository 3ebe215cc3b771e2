"""The second router of `kvstore up --demo`.
Runs one transaction, tells each message of it, and dies where it is asked.

Owns: what POST /v1/demo/coordinate does; the failpoints that a play-through may name; how a message is told.
Promises: the messages are those of the real coordinator on real channels: it is handed channels that tell what passes
through them. All that was told before the death has left this process. Without --demo none of this is reachable.
Leaves to others: the transaction itself (`coordinator`), what is shown of it (`demo`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import msgspec

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.errors import KvError
from kvstore.model import txn_id
from kvstore.protocol import (
    Abort,
    Answer,
    ApplyIntents,
    DecideCommit,
    Forget,
    Outcome,
    Prepare,
    Reply,
    Request,
    ResolveTxn,
    Transact,
    Vote,
)
from kvstore.router.coordinator import Coordinator
from kvstore.router.demo import Stop
from kvstore.router.routes.txn import TxnBody, parse_transaction
from kvstore.router.routing_table import RoutingTable
from kvstore.router.service import RouterService
from kvstore.transport.channel import Channel
from kvstore.transport.http.responses import StreamedResponse
from kvstore.transport.http.routes import Call

NDJSON = "application/x-ndjson"
STOPS = {"never": "", "before-decision": "txn-before-decide-sent", "after-decision": "txn-after-decided"}

_FINISH_S = 3.0
_LEAVES_S = 0.005  # what was written is in the kernel's hands then: a killed process cannot take it back
_WORDS: dict[type[Any], str] = {
    Prepare: "prepare",
    DecideCommit: "decide",
    ApplyIntents: "finish",
    Abort: "abort",
    Transact: "transact",
    ResolveTxn: "ask",
    Forget: "forget",
}


class CoordinateBody(msgspec.Struct, forbid_unknown_fields=True):
    """`transaction`: as the body of POST /v1/txn. `stop`: where this process kills itself."""

    transaction: TxnBody
    stop: Stop = "never"


class DemoCoordinator:
    """The calls of the second router."""

    def __init__(self, service: RouterService, limits: Limits) -> None:
        self._service = service
        self._limits = limits

    async def coordinate(self, call: Call) -> StreamedResponse:
        """Lines of JSON, each as it happens; broken off in the middle if the process was to die."""
        body: CoordinateBody = call.body
        transaction = parse_transaction(body.transaction, self._limits)
        stream = StreamedResponse(call.request, NDJSON, "Cache-Control: no-store\r\n")
        trace = Trace(stream, self._service, is_last=bool(STOPS[body.stop]))
        failpoints.arm(f"{STOPS[body.stop]}=kill" if STOPS[body.stop] else "")
        coordinator = Coordinator(cast(RouterService, TracedService(self._service, trace)), self._limits)
        try:
            result = await coordinator.run(transaction, None)
            trace.note("result", succeeded=result.succeeded, version=result.version, txn=result.id)
        except KvError as error:
            trace.note("error", code=error.code, detail=error.detail)
        await trace.flush()
        await trace.ended(_FINISH_S)
        await trace.flush()
        await stream.end()
        return stream


class Trace:
    """What passed, in order. `is_last`: the process may die at any moment, so what is told must have left it."""

    def __init__(self, stream: StreamedResponse, service: RouterService, *, is_last: bool) -> None:
        self._stream = stream
        self._service = service
        self._is_last = is_last
        self._began_s = time.perf_counter()
        self._lines: list[dict[str, Any]] = []
        self.asked: set[asyncio.Task[Any]] = set()

    def note(self, kind: str, **facts: Any) -> None:
        """Put a line of that kind behind the others."""
        at_ms = round((time.perf_counter() - self._began_s) * 1000, 3)
        self._lines.append({"at_ms": at_ms, "kind": kind, **facts})

    def sent(self, shard: str, request: Request) -> None:
        """Note a message to that shard."""
        facts: dict[str, Any] = {"shard": shard, "message": _WORDS.get(type(request), type(request).__name__.lower())}
        if isinstance(request, Prepare):
            facts["txn"] = txn_id(request.attempt, self._service.table.partition_of(request.anchor))
        self.note("sent", **facts)

    def answered(self, shard: str, request: Request, reply: Reply) -> None:
        """Note a reply of that shard."""
        self.note("answered", shard=shard, message=_WORDS.get(type(request), ""), says=_says(reply))

    async def flush(self) -> None:
        """Write what was noted, so that it has left this process."""
        lines, self._lines = self._lines, []
        if lines:
            await self._stream.write([msgspec.json.encode(line) + b"\n" for line in lines])
            if self._is_last:
                await asyncio.sleep(_LEAVES_S)

    async def ended(self, timeout_s: float) -> None:
        """All that was asked is answered, or the time is over."""
        if self.asked:
            await asyncio.wait(self.asked, timeout=timeout_s)


def _says(reply: Reply) -> str:
    if isinstance(reply, Vote):
        return f"yes, above version {reply.vote}" if reply.holds else "a condition does not hold"
    if isinstance(reply, Outcome):
        return f"{reply.state} at version {reply.version}" if reply.state == "committed" else reply.state
    if isinstance(reply, Answer):
        return "done" if reply.problem is None else str(reply.problem.get("code"))
    return type(reply).__name__.lower()


class TracedService:
    """A router service whose table leads to channels that tell what passes through them."""

    def __init__(self, service: RouterService, trace: Trace) -> None:
        self.table = TracedTable(service.table, trace)
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


class TracedTable:
    """A routing table with such channels."""

    def __init__(self, table: RoutingTable, trace: Trace) -> None:
        self._table = table
        self._trace = trace
        self._channels: dict[str, TracedChannel] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def owner_of(self, key: str) -> Channel:
        """The traced channel to the key's owner. Raises Unavailable without a map."""
        channel = self._table.owner_of(key)
        traced = self._channels.get(channel.shard_id)
        if traced is None or traced.inner is not channel:
            traced = self._channels[channel.shard_id] = TracedChannel(channel, self._trace)
        return cast(Channel, traced)


class TracedChannel:
    """The reply comes to the client only when it was told."""

    def __init__(self, inner: Channel, trace: Trace) -> None:
        self.inner = inner
        self._trace = trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def request(self, request: Request, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        """As `Channel.request`."""
        future = self.inner.request(request, at_leisure=at_leisure)
        self._trace.sent(self.inner.shard_id, request)
        task = asyncio.create_task(self._tell(request, future))
        self._trace.asked.add(task)
        task.add_done_callback(self._end)
        return task

    async def _tell(self, request: Request, future: asyncio.Future[Any]) -> Reply:
        await self._trace.flush()
        reply: Reply = await future
        self._trace.answered(self.inner.shard_id, request, reply)
        await self._trace.flush()
        return reply

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._trace.asked.discard(task)
        if not task.cancelled():
            task.exception()  # looked at once, as those of a channel are
