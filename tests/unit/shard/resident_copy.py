"""A copy of shard s1 on node n2 with real files, and the maps that tell it what it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.placement.cluster_map import ClusterMap, Node, Primary, Replica, Shard, at_home, first_map
from kvstore.replication.beats import Make
from kvstore.shard.copy_wires import connect
from kvstore.shard.folder import FileFolder
from kvstore.shard.hosted import Surroundings
from kvstore.shard.resident import Resident
from kvstore.store.tables import OnFatal
from kvstore.transport.sessions import ClusterSession

PARTITIONS = 64
LIMITS = Limits(log_segment_bytes=1 << 20, told_timeout_s=0.2)
STORE_ID = "0123456789abcdef0123456789abcdef"


def fatal(error: BaseException) -> NoReturn:
    raise AssertionError from error


def folder_of(path: Path, node_id: str) -> FileFolder:
    return FileFolder(path, node_id, LIMITS)


def named(copy_id: str | None) -> ClusterMap:
    """Shard s1 of node s1; with that copy on node n2."""
    home = at_home("s1", "http://127.0.0.1:1", STORE_ID)
    replicas = [Replica(node="n2", copy_id=copy_id, state="in-sync", joined=1)] if copy_id is not None else []
    shard = Shard(id="s1", store_id=STORE_ID, primary=home.shard.primary, term=1, replicas=replicas)
    return first_map("c", PARTITIONS, [home._replace(shard=shard)])


def promoted(copy_id: str) -> ClusterMap:
    """That copy is the primary of shard s1, in term 3."""
    found = named(None)
    node = Node(id="n2", url="http://127.0.0.1:2")
    shard = msgspec.structs.replace(found.shards[0], primary=Primary(node="n2", copy_id=copy_id), term=3)
    return msgspec.structs.replace(found, epoch=3, nodes=[*found.nodes, node], shards=[shard])


def is_served(resident: Resident) -> bool:
    return resident.local.hosted is not None and resident.local.hosted.is_open


async def until(running: asyncio.Task[None], condition: Callable[[], bool]) -> None:
    """Raises what ends the work before."""
    async with asyncio.timeout(60):
        while not condition():
            if running.done():
                running.result()
            await asyncio.sleep(0.01)


async def nothing_told(_: web.Request) -> web.Response:
    """What a controller answers that no store has told of any record."""
    return web.json_response({"number": 0, "version": 0, "clock_floor": 0})


@asynccontextmanager
async def resident_copy(path: Path, on_fatal: OnFatal = fatal) -> AsyncIterator[Resident]:
    """On node n2, an empty copy of shard s1."""
    controller = web.Application()
    controller.router.add_post("/v1/told", nothing_told)
    async with TestServer(controller) as server, aiohttp.ClientSession() as session:
        dial, url = partial(connect, session, ClusterSession()), str(server.make_url("/"))
        folder = folder_of(path, "n2")
        around = Surroundings("n2", folder, LIMITS, session, ClusterSession(), url, on_fatal, SYSTEM, dial)
        resident = Resident("s1", around)
        await resident.make(Make(shard="s1", store_id=STORE_ID, partitions=PARTITIONS))
        yield resident


class Came:
    """A connection by which these messages have come, and then no more."""

    def __init__(self, *messages: Any) -> None:
        self._messages = list(messages)
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def receive(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def close(self) -> None:
        self._messages.clear()


def promoted_before_a_copy(copy_id: str) -> ClusterMap:
    """As `promoted`; a copy of it on node s1 joins."""
    found = promoted(copy_id)
    joining = [Replica(node="s1", copy_id=STORE_ID, state="joining", joined=3)]
    return msgspec.structs.replace(found, shards=[msgspec.structs.replace(found.shards[0], replicas=joining)])


def replaced(copy_id: str) -> ClusterMap:
    """The primary of shard s1 is on node s1 again, in term 9; that copy is one in sync."""
    home = at_home("s1", "http://127.0.0.1:1", STORE_ID)
    replicas = [Replica(node="n2", copy_id=copy_id, state="in-sync", joined=9)]
    shard = Shard(id="s1", store_id=STORE_ID, primary=home.shard.primary, term=9, replicas=replicas)
    return msgspec.structs.replace(promoted(copy_id), epoch=9, shards=[shard])


@asynccontextmanager
async def served_by(resident: Resident) -> AsyncIterator[asyncio.Task[None]]:
    """The copy is promoted, and served."""
    running = asyncio.create_task(resident.run())
    try:
        resident.hear(promoted_before_a_copy(resident.local.copy_id))
        await until(running, lambda: is_served(resident))
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await resident.close()
