"""Shards over real channels whose data do not matter: they follow maps, and move as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import Conflict
from kvstore.placement.cluster_map import ClusterMap, Move
from kvstore.protocol import Answer, Follow, Info, Progress, Receive, Reply, Request, Stats
from kvstore.transport.channel import Connection

STEPS = ("copy", "tail", "freeze", "done")
ANSWER_S = 0.05
LIMITS = Limits()


class FarShard:
    """`gates`: beyond a step whose gate is closed no move here goes. `fails`: so many moves end as failed."""

    def __init__(self, shard_id: str, others: dict[str, FarShard]) -> None:
        self.id = shard_id
        self.store_id = f"store-{shard_id}"
        self.cluster_id: str | None = None
        self.url = ""
        self.keys = 1000
        self.attempts: list[dict[str, str]] = []  # that hold keys here
        self.map: ClusterMap | None = None
        self.followed: list[int] = []
        self.received: list[str] = []
        self.seen: list[tuple[str, str]] = []
        self.begun: dict[str, str] = {}
        self.freezes: set[str] = set()
        self.frozen_ever: set[str] = set()
        self.finished: dict[str, frozenset[int]] = {}
        self.wrongs: list[str] = []
        self.gates = {step: asyncio.Event() for step in ("follow", *STEPS)}
        self.fails = 0
        self.waits_for_source = False
        self.forgets_maps = 0
        self._others = others
        self._tasks: set[asyncio.Task[None]] = set()
        self._moving: dict[str, asyncio.Task[None]] = {}
        self._runner: web.AppRunner | None = None
        self._transports: list[asyncio.BaseTransport] = []
        self._port = 0
        for gate in self.gates.values():
            gate.set()

    # --- its process -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/channel", self._channel)
        app.router.add_get("/healthz", self._healthz)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def kill(self) -> None:
        """As kill -9: what was durable stays, the map and the freezes."""
        for transport in self._transports:
            transport.abort()  # type: ignore[attr-defined]
        for task in (*self._tasks, *self._moving.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._moving.values(), return_exceptions=True)
        self._moving.clear()
        self.begun.clear()
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    def hang_up(self) -> None:
        """The connection is lost, the process goes on."""
        for transport in self._transports:
            transport.abort()  # type: ignore[attr-defined]

    async def _healthz(self, request: web.Request) -> web.Response:
        facts = {"status": "alive", "shard": self.id, "store_id": self.store_id, "cluster_id": self.cluster_id}
        return web.json_response(facts)

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        if request.query["shard"] != self.id or request.query["store"] != self.store_id:
            raise web.HTTPConflict
        socket = web.WebSocketResponse(compress=False, max_msg_size=0)
        await socket.prepare(request)
        assert request.transport is not None
        self._transports.append(request.transport)
        await Connection(LIMITS).serve(socket, self._handle)
        return socket

    def _handle(self, request: Request, connection: Connection) -> None:
        async def answer() -> None:
            connection.send(await self._answer(request))

        task = asyncio.create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Request) -> Reply:
        if isinstance(request, Follow):
            await self.gates["follow"].wait()
            self.follow(msgspec.json.decode(request.cluster_map, type=ClusterMap))
            return Answer(request.id, 200)
        if isinstance(request, Receive):
            return await self._receive(request)
        assert isinstance(request, Stats)
        live = {"live": {"attempts": self.attempts}} if request.live_max else {}
        return Info(request.id, 1, {"keys": self.keys, "bytes": self.keys * 100, "more": {}, **live})

    # --- its part in moves -------------------------------------------------------------------------------------------

    def follow(self, cluster_map: ClusterMap) -> None:
        self.followed.append(cluster_map.epoch)
        if self.forgets_maps:
            self.forgets_maps -= 1
            return
        if self.map is not None and cluster_map.epoch <= self.map.epoch:
            return
        self._check_arrivals(cluster_map)
        self.map = cluster_map
        standing = {move.id for move in cluster_map.moves}
        self.freezes &= standing
        for move_id in set(self._moving) - standing:
            self._moving.pop(move_id).cancel()

    def _check_arrivals(self, cluster_map: ClusterMap) -> None:
        """What comes here must have been moved here, and no other shard may answer for it by now."""
        if self.map is None:
            return
        arrived = set(cluster_map.owned_by(self.id)) - set(self.map.owned_by(self.id))
        for move_id, partitions in reversed(self.finished.items()):  # the last one that brought it
            if not partitions & arrived:
                continue
            source = next(other for other in self._others.values() if move_id in other.frozen_ever)
            owned = set(source.map.owned_by(source.id)) if source.map is not None else set()
            if owned & partitions & arrived and move_id not in source.freezes:
                self.wrongs.append(f"{source.id} answers for {move_id}, which is committed to {self.id}")
            arrived -= partitions
        if arrived:
            self.wrongs.append(f"{self.id} owns {sorted(arrived)} without having received them")

    def stands(self, move_id: str) -> Move | None:
        """The move, if it stands in the map that this shard follows."""
        return next((move for move in (self.map.moves if self.map else []) if move.id == move_id), None)

    async def _receive(self, request: Receive) -> Reply:
        self.received.append(request.move)
        move = self.stands(request.move)
        if move is None or move.to != self.id:
            return Answer(request.id, 409, problem=Conflict("it does not stand here").problem())
        if move.id not in self._moving:
            self.begun[move.id] = "copy"
            self._moving[move.id] = asyncio.create_task(self._move(move))
        for _ in range(10):
            if self.begun[move.id] != request.seen:
                break
            await asyncio.sleep(ANSWER_S / 10)
        step = self.begun[move.id]
        self.seen.append((move.id, step))
        detail = {"failed": "the digests differ", "copy": "waiting for the source" * self.waits_for_source}.get(
            step, ""
        )
        return Progress(request.id, step, 10 * len(move.partitions), 10 * len(move.partitions), 1000, detail)

    async def _move(self, move: Move) -> None:
        for step in STEPS:
            if step == "done" and self.fails:
                self.fails -= 1
                self.begun[move.id] = "failed"
                return
            if step == "freeze":
                source = self._others[move.source]
                if source.stands(move.id) is None:
                    self.begun[move.id] = "failed"
                    return
                source.freezes.add(move.id)
                source.frozen_ever.add(move.id)
            if step == "done":
                self.finished[move.id] = frozenset(move.partitions)
            self.begun[move.id] = step
            await self.gates[step].wait()


@asynccontextmanager
async def far_shards(*shard_ids: str) -> AsyncIterator[dict[str, FarShard]]:
    """Shards by id, each running. At the end, none may have come to own what was not moved to it as it should be."""
    shards: dict[str, FarShard] = {}
    for shard_id in shard_ids:
        shards[shard_id] = FarShard(shard_id, shards)
        await shards[shard_id].start()
    try:
        yield shards
        wrongs = [wrong for shard in shards.values() for wrong in shard.wrongs]
        assert not wrongs, wrongs
    finally:
        for shard in shards.values():
            await shard.kill()
