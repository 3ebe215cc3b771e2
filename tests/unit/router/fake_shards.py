"""Shards as a router sees them, without sockets and files: what they own they answer for, what they do not is 421."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from kvstore.config import Limits
from kvstore.errors import KvError, Locked, WrongOwner
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap, Move, at_home, map_of
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    ApplyIntents,
    CancelWait,
    Count,
    Explain,
    Get,
    Info,
    Outcome,
    Page,
    Put,
    Release,
    Request,
    Scan,
    Stats,
    Transact,
)
from kvstore.router.service import RouterService

PARTITIONS = 64


def make_map(
    epoch: int, owner_of: Callable[[int], int], *shards: str, urls: dict[str, str] | None = None
) -> ClusterMap:
    members = [at_home(s, (urls or {}).get(s, f"http://{s}"), f"store-{s}") for s in shards]
    owners = [owner_of(partition) for partition in range(PARTITIONS)]
    return map_of(members, cluster_id="c", epoch=epoch, partitions=PARTITIONS, owners=owners)


def halves(epoch: int = 1) -> ClusterMap:
    """s1 owns the even partitions, s2 the odd ones."""
    return make_map(epoch, lambda partition: partition % 2, "s1", "s2")


def all_on(epoch: int, owner: str) -> ClusterMap:
    return make_map(epoch, lambda _: ("s1", "s2").index(owner), "s1", "s2")


def with_move(cluster_map: ClusterMap, *keys: str) -> ClusterMap:
    """The same map, but the partitions of these keys are to move from s1 to s2."""
    partitions = sorted({partition_of(key.encode(), PARTITIONS) for key in keys})
    moves = [Move(id="m", source="s1", to="s2", partitions=partitions)]
    return msgspec.structs.replace(cluster_map, moves=moves)


class Waiting(NamedTuple):
    """Who waits for a lock."""

    channel: FakeChannel
    request: Acquire
    future: asyncio.Future[Any]


class FakeShard:
    """A shard as the router sees it. It owns what its own map says; its pages are small if it is told so."""

    def __init__(self, shard_id: str) -> None:
        self.shard_id = shard_id
        self.map: ClusterMap | None = None
        self.data: dict[str, bytes] = {}
        self.ghosts: set[str] = set()  # rows that fill a page and are not shown: expired ones, for example
        self.page_rows_max = 10_000
        self.attempts_floor = 0
        self.fenced: set[int] = set()  # partitions that it has stopped to answer for
        self.asked: list[Request] = []
        self.before_answer: list[Callable[[], None]] = []
        self.holders: dict[str, int] = {}  # of locks, by name: the token
        self.waiting: list[Waiting] = []

    def owns(self, key: str) -> bool:
        return bool(self.owned() >> partition_of(key.encode(), PARTITIONS) & 1)

    def owned(self, wanted: bytes = b"") -> int:
        """The set of partitions that it answers for, of those that are wanted."""
        owned = set(self.map.owned_by(self.shard_id) if self.map else ()) - self.fenced
        bits = sum(1 << partition for partition in owned)
        return bits & partition_set.decode(wanted) if wanted else bits

    @property
    def epoch(self) -> int:
        return self.map.epoch if self.map else 0

    def fence(self, *keys: str) -> None:
        """Stop to answer for the partitions of these keys; who waits there for a lock is bounced."""
        self.fenced |= {partition_of(key.encode(), PARTITIONS) for key in keys}
        self.bounce()

    def bounce(self) -> None:
        """Who waits for what is not owned any more is told so."""
        for waiting in [waiting for waiting in self.waiting if not self.owns(waiting.request.key)]:
            self.waiting.remove(waiting)
            waiting.future.set_result(self._wrong_owner(waiting.request))

    def release(self, name: str) -> None:
        """The next one has the lock."""
        del self.holders[name]
        for waiting in self.waiting:
            if waiting.request.key == name:
                self.waiting.remove(waiting)
                waiting.future.set_result(self._grant(waiting.request))
                return

    def _grant(self, request: Any) -> Answer:
        self.holders[request.key] = 7
        return Answer(request.id, 201, 7)

    def _wrong_owner(self, request: Any) -> Answer:
        is_fenced = partition_of(request.key.encode(), PARTITIONS) in self.fenced
        error = WrongOwner("not mine", epoch=self.epoch, **({"fenced": True} if is_fenced else {}))
        return Answer(request.id, 421, problem=error.problem())

    def answer(self, request: Request, channel: FakeChannel, future: asyncio.Future[Any]) -> Any:
        """None: later, or never."""
        self.asked.append(request)
        if self.before_answer:
            self.before_answer.pop(0)()
        if isinstance(request, Scan):
            return self._page(request)
        if isinstance(request, Count):
            owned = self.owned(request.wanted)
            count = sum(key.startswith(request.prefix) and is_in(key, owned) for key in self.data)
            return Page(request.id, partition_set.encode(owned, PARTITIONS), False, "", [], count)
        if isinstance(request, Explain):
            return Info(request.id, self.epoch, {"row": "value" if request.key in self.data else "absent"})
        if isinstance(request, Stats):
            return Info(
                request.id, self.epoch, {"keys": len(self.data), "bytes": 7, "attempts_floor": self.attempts_floor}
            )
        if isinstance(request, Transact | ApplyIntents | Abort):
            return self._on_transaction(request)
        assert hasattr(request, "key")
        if not self.owns(request.key):
            return self._wrong_owner(request)
        if isinstance(request, Acquire | CancelWait | Release):
            return self._on_lock(request, channel, future)
        if isinstance(request, Put):
            self.data[request.key] = request.value
            return Answer(request.id, 201, 1)
        value = self.data.get(request.key)
        if value is None:
            return Answer(request.id, 404)
        if isinstance(request, Get) and 0 < request.bytes_max < len(value):
            return Answer(request.id, 200, 1, left_out_bytes=len(value))
        return Answer(request.id, 200, 1, value)

    def _on_transaction(self, request: Transact | ApplyIntents | Abort) -> Any:
        keys = [request.key] if isinstance(request, Transact) else request.keys
        foreign = next((key for key in keys if not self.owns(key)), None)
        if foreign is not None:
            return msgspec.structs.replace(self._wrong_owner(Get(0, foreign)), id=request.id)
        if isinstance(request, Transact):
            return Outcome(request.id, "committed", request.attempt.name, 9, succeeded=True)
        return Answer(request.id, 200)

    def _on_lock(
        self, request: Acquire | CancelWait | Release, channel: FakeChannel, future: asyncio.Future[Any]
    ) -> Any:
        if isinstance(request, Release):
            self.release(request.key)
            return Answer(request.id, 204)
        if isinstance(request, CancelWait):
            for waiting in [w for w in self.waiting if (w.channel, w.request.id) == (channel, request.acquire)]:
                self.waiting.remove(waiting)
                waiting.future.set_result(Answer(request.acquire, 423, problem=Locked("left").problem()))
            return Answer(request.id, 200)
        if request.key not in self.holders:
            return self._grant(request)
        if not request.wait_ms:
            return Answer(request.id, 423, problem=Locked("held").problem())
        self.waiting.append(Waiting(channel, request, future))
        return None

    def _page(self, scan: Scan) -> Page:
        keys = [
            k for k in sorted(self.data | dict.fromkeys(self.ghosts)) if k.startswith(scan.prefix) and k > scan.after
        ]
        owned = self.owned(scan.wanted)
        keys = [key for key in keys if not scan.until or key <= scan.until]
        taken = keys[: min(scan.limit, self.page_rows_max)]
        shown = [key for key in taken if key not in self.ghosts and is_in(key, owned)]
        sizes = {key: len(self.data[key]) for key in shown if scan.values}
        left_out = {key: size for key, size in sizes.items() if 0 < scan.value_bytes_max < size}
        items = [(key, 1, self.data[key] if scan.values and key not in left_out else None, 0) for key in shown]
        more = len(taken) < len(keys)
        last = taken[-1] if taken else scan.after
        return Page(scan.id, partition_set.encode(owned, PARTITIONS), more, last, items, left_out=left_out)


def is_in(key: str, bits: int) -> bool:
    return bool(bits >> partition_of(key.encode(), PARTITIONS) & 1)


class FakeChannel:
    """Stands in for `Channel`: the same attributes, and answers a turn of the loop later."""

    is_connected_at_first = True

    def __init__(self, shard_id: str, url: str, limits: Limits, session: Any, store_id: str = "", *_: Any) -> None:
        self.shard_id = shard_id
        self.url = url
        self.store_id = store_id
        self.connected = self.is_connected_at_first
        self.answered = True
        self.ops_under_way = 0
        self.error: KvError | None = None
        self.fails_with: KvError | None = None
        self.failed = asyncio.Event()  # a request with that
        self.is_silent = False
        self.closed = False
        self.shard = shards[shard_id]
        self._next_id = 0

    def name_strike(self, strike: int) -> None:
        self.strike = strike

    def request(self, request: Request, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        if self.error is not None:
            raise self.error
        self._next_id += 1
        request.id = self._next_id
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.is_silent:
            asyncio.get_running_loop().call_soon(self._settle, future, request)
        return future

    def _settle(self, future: asyncio.Future[Any], request: Request) -> None:
        if self.fails_with is not None:
            future.set_exception(self.fails_with)
            self.failed.set()
        elif not future.done():
            self.answered = True
            reply = self.shard.answer(request, self, future)
            if reply is not None:
                future.set_result(reply)

    async def close(self) -> None:
        self.closed = True


shards: dict[str, FakeShard] = {}


def make_service(**limits: Any) -> RouterService:
    shards.clear()
    shards.update({shard_id: FakeShard(shard_id) for shard_id in ("s1", "s2", "s3")})
    return RouterService(Limits(**{"reroute_timeout_s": 2.0, **limits}), None)  # type: ignore[arg-type]


def all_follow(service: RouterService, cluster_map: ClusterMap) -> None:
    service.table.follow(cluster_map)
    for shard in shards.values():
        shard.map = cluster_map


def key_of(shard_id: str) -> str:
    """A key that this shard owns under `halves`."""
    wanted = ("s1", "s2").index(shard_id)
    return next(key for key in map(str, range(100)) if partition_of(key.encode(), PARTITIONS) % 2 == wanted)
