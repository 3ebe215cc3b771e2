"""GET /v1/events: the cluster as it changes, for the page and for people with `curl -N`.

Owns: the listeners and their bounds; looking at the shards, the controller and the counts while there are listeners.
Promises: nothing is looked at while no client listens, and the hot path pays nothing: all that is told is sampled from
counts and tables that exist anyway. A listener that does not read is cut off; as many as `events_listeners_max` may
be there. Every one gets a snapshot first, then changes, and a comment when nothing was said for 15 s.
Leaves to others: what is told and when (`feed`), the documents (`event_documents`, `rates`, `advice`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from aiohttp import web

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import KvError, TooManyRequests
from kvstore.metrics import RequestStats, ShardStats
from kvstore.placement.cluster_map import Shard
from kvstore.protocol import Info, Stats
from kvstore.router.advice import advice
from kvstore.router.cluster_documents import nodes_of, with_copies
from kvstore.router.controller_client import Controller
from kvstore.router.event_documents import (
    LIVE_MAX,
    Sample,
    changes_document,
    changes_identity,
    in_doubt,
    locks_document,
    locks_identity,
    lost_documents,
    map_document,
    shard_documents,
    transactions_document,
    transactions_identity,
)
from kvstore.router.feed import GAP_S, Feed
from kvstore.router.rates import Rates
from kvstore.router.service import RouterService
from kvstore.transport.channel import Channel
from kvstore.transport.http.requests import client_has_left
from kvstore.transport.http.responses import Response, StreamedResponse
from kvstore.transport.http.routes import Call, Reply

log = logging.getLogger(__name__)

EVENT_STREAM = "text/event-stream"
HEADER_LINES = "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\nX-Content-Type-Options: nosniff\r\n"

_LOOK_S = GAP_S
_RATES_S = 1.0
_ANSWER_S = 1.0
_FIRST_S = 1.5  # that a snapshot waits for the first look at everything
_IDLE_CHANGES_S = 2.0
_IDLE_COPIES_S = 1.0  # with copies, whose lag is known to the controller only
_COMMENT_S = 15.0
_COMMENT = b": nothing new\n\n"


class Events:
    """The listeners, and what is looked at for them."""

    def __init__(
        self, router_id: str, service: RouterService, controller: Controller, stats: RequestStats, limits: Limits
    ) -> None:
        self.listeners = 0
        self.feed = Feed(secrets.token_hex(8), {"router": router_id})
        self._service = service
        self._controller = controller
        self._stats = stats
        self._limits = limits
        self._rates = Rates()
        self._told: dict[str, Any] | None = dict(_NOTHING_TOLD)  # by the controller; None: it does not answer
        self._copies: dict[str, Any] | None = None  # what it has heard of nodes and copies, if there are any
        self._live: dict[str, dict[str, Any]] = {}
        self._epoch = 0
        self._changed = asyncio.Event()
        self._looked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    # --- listeners ----------------------------------------------------------------------------------------------------

    async def stream(self, call: Call) -> Reply:
        """Tell until the client leaves. Raises TooManyRequests when there are as many listeners as are taken."""
        request, head = call.request, call.head
        if head.method == "HEAD":
            return Response(200, b"", EVENT_STREAM, HEADER_LINES)
        if self.listeners >= self._limits.events_listeners_max:
            raise TooManyRequests(
                f"{self.listeners} clients listen to this router's events already; the limit is events_listeners_max.",
                retry_after_ms=5000,
            )
        stream = StreamedResponse(request, EVENT_STREAM, HEADER_LINES)
        self.listeners += 1
        try:
            if not self._tasks:
                self._begin()
            with contextlib.suppress(ConnectionError):
                await self._tell(request, stream, self.feed.number_of(head.fields.get("last-event-id")))
                await stream.end()
        finally:
            self.listeners -= 1
            if not self.listeners:
                await self._end()
        return stream

    async def _tell(self, request: web.BaseRequest, stream: StreamedResponse, seen: int | None) -> None:
        await SYSTEM.wait_for(self._looked.wait(), _FIRST_S)
        while not self._closing and not client_has_left(request):
            changed = self._changed
            if seen is None:
                said = self.feed.snapshot().encode()
            else:
                said = b"".join([event.encode() for event in self.feed.since(seen)])
            seen = self.feed.number
            if said:
                await self._write(request, stream, said)
            if not await SYSTEM.wait_for(changed.wait(), _COMMENT_S):
                await self._write(request, stream, _COMMENT)

    async def _write(self, request: web.BaseRequest, stream: StreamedResponse, data: bytes) -> None:
        """Raises ConnectionError when the client has left, or takes nothing in."""
        try:
            async with asyncio.timeout(self._limits.events_write_timeout_s):
                await stream.write([data])
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the listener does not read") from None

    async def close(self) -> None:
        """End all streams: the process stops."""
        self._closing = True
        self._announce()
        await self._end()

    # --- looking, while a client listens ------------------------------------------------------------------------------

    def _begin(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._rates.begin(self._stats.histograms(), now_s)
        self.feed.keep("history", list(self._rates.history))
        works: list[Callable[[], Coroutine[Any, Any, None]]] = [self._watch_shards, self._watch_changes]
        works += [self._watch_rates, self._publish]
        self._tasks = [asyncio.create_task(work()) for work in works]
        for task in self._tasks:
            task.add_done_callback(_report)

    async def _end(self) -> None:
        tasks, self._tasks = self._tasks, []
        self._looked.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _publish(self) -> None:
        """Release what is due, a little after it was offered at the latest."""
        loop = asyncio.get_running_loop()
        while True:
            before = self.feed.number
            self.feed.release(loop.time())
            if self.feed.number != before:
                self._announce()
            await asyncio.sleep(_LOOK_S / 5)

    async def _watch_rates(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_RATES_S)
            sample = self._rates.look(self._stats.histograms(), loop.time(), time.time_ns() // 1_000_000)
            self.feed.offer("rates", sample)
            self.feed.keep("history", list(self._rates.history))

    async def _watch_changes(self) -> None:
        """The controller's word on changes, moves and copies: often while there are any, now and then else."""
        waited_s, is_running = _IDLE_CHANGES_S, False
        while True:
            idle_s = _IDLE_CHANGES_S if self._copies is None else _IDLE_COPIES_S
            if waited_s >= idle_s or is_running or self._is_busy():
                asked = self._controller.moves(copies=True), self._controller.changes()
                told, items = await asyncio.gather(*asked)
                self._copies = told.pop("copies", None) if told is not None else None
                self._told = told
                waited_s = 0.0
                is_running = any(item["state"] == "running" for item in items or ())
                changes = changes_document(items)
                self.feed.offer("moves", self._moves())
                self.feed.offer("changes", changes, changes_identity(changes))
            await asyncio.sleep(_LOOK_S)
            waited_s += _LOOK_S

    def _is_busy(self) -> bool:
        """Partitions move, or copies are not all as they should be."""
        cluster_map = self._service.table.cluster_map
        if cluster_map is not None and cluster_map.moves:
            return True
        if self._told and (self._told["wanted"] or self._told["moves"]):
            return True
        copies = self._copies or {}
        return any(copies.get(name) for name in ("silent", "unserved", "missing"))

    def _moves(self) -> dict[str, Any]:
        if self._told is None:
            return {**_NOTHING_TOLD, "epoch": self._epoch, "wanted": None, "ending": None}
        return {name: value for name, value in self._told.items() if name != "behind"}

    async def _watch_shards(self) -> None:
        loop = asyncio.get_running_loop()
        seen: dict[str, Sample] = {}
        while True:
            cluster_map = self._service.table.cluster_map
            if cluster_map is not None:
                channels = list(self._service.table.channels.values())
                answers = await asyncio.gather(*map(self._ask, channels))
                now = {channel.shard_id: answer for channel, answer in zip(channels, answers, strict=True)}
                if cluster_map.epoch != self._epoch:
                    self._epoch = cluster_map.epoch
                    self.feed.offer("map", map_document(cluster_map))
                self._offer_live(cluster_map.shards, now, loop.time())
                shards = shard_documents(cluster_map, now, seen)
                seen = self._kept(seen, now, loop.time())
                answering = {shard for shard, sample in now.items() if sample is not None}
                self._offer_cluster(shards, nodes_of(cluster_map, answering), int(loop.time()))
                if not self._looked.is_set():  # what the first snapshot shows is told with it
                    self.feed.release(loop.time())
                    self._looked.set()
            await asyncio.sleep(_LOOK_S)

    @staticmethod
    def _kept(seen: dict[str, Sample], now: dict[str, Sample | None], now_s: float) -> dict[str, Sample]:
        """With what the next samples are compared: those of a second ago, and the last of shards that are away."""
        kept = dict(seen)
        for shard, sample in now.items():
            if sample is not None and (shard not in seen or now_s - seen[shard].at_s >= _RATES_S):
                kept[shard] = sample
        return kept

    async def _ask(self, channel: Channel) -> Sample | None:
        """None if it does not answer."""
        loop = asyncio.get_running_loop()
        try:
            reply = await asyncio.wait_for(channel.request(Stats(0, LIVE_MAX)), _ANSWER_S)
            if not isinstance(reply, Info):
                return None
            live = reply.facts.get("live") or _NOTHING_LIVE
            return Sample(msgspec.convert(reply.facts, ShardStats), live, loop.time())
        except (KvError, TimeoutError, msgspec.ValidationError):
            return None

    def _offer_live(self, shards: list[Shard], now: dict[str, Sample | None], now_s: float) -> None:
        ids = {shard.id for shard in shards}
        for shard_id, sample in now.items():
            if sample is not None:
                self._live[shard_id] = sample.live
        self._live = {
            shard_id: live for shard_id, live in self._live.items() if shard_id in ids
        }  # of one that is down: the last
        at_ms = time.time_ns() // 1_000_000
        locks, transactions = locks_document(self._live), transactions_document(self._live)
        self.feed.offer("locks", {"at_ms": at_ms, **locks}, locks_identity(locks, now_s))
        identity = transactions_identity(transactions)
        self.feed.offer("transactions", {"at_ms": at_ms, **transactions}, identity)

    def _offer_cluster(self, shards: list[dict[str, Any]], nodes: list[dict[str, Any]], second: int) -> None:
        cluster_map = self._service.table.cluster_map
        assert cluster_map is not None
        moves = self._moves()
        document = {
            "cluster_id": cluster_map.cluster_id,
            "epoch": cluster_map.epoch,
            "partitions": cluster_map.partitions,
            "replicas": cluster_map.replicas,
            "nodes": nodes,
            "shards": shards,
            "in_doubt": in_doubt(transactions_document(self._live)["items"]),
        }
        if self._copies is not None:
            document = with_copies(document, self._copies)
        lost = lost_documents(cluster_map)
        about = {"moves": moves["moves"], "wanted": moves["wanted"], "lost": lost, "copies": self._copies}
        about["behind"] = (self._told or {}).get("behind")
        word = advice({**document, **about})
        self.feed.offer("cluster", {**document, "advice": word}, (second, _states(document), word))


def _states(document: dict[str, Any]) -> list[Any]:
    """What is told at once when it changes: figures wait for the next second."""
    return [(node["id"], node["state"]) for node in document["nodes"]] + [
        (s["id"], s["state"], s["partitions"], s["primary"], [(copy["node"], copy["state"]) for copy in s["copies"]])
        for s in document["shards"]
    ]


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the events stand still until their listeners come back", exc_info=error)


_NOTHING_TOLD: dict[str, Any] = {"epoch": 0, "moves": [], "wanted": [], "ending": [], "last": None}
_NOTHING_LIVE: dict[str, Any] = {
    "leases_count": 0,
    "leases": [],
    "attempts_count": 0,
    "intents": 0,
    "attempts": [],
}
