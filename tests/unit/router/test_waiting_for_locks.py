"""Who waits for a lock waits on, wherever its partition goes, and no longer than it wanted to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.config import Limits
from kvstore.errors import Locked, Unavailable
from kvstore.protocol import Acquire, CancelWait
from kvstore.router.routes.locks import LOCK_ROUTES, LockRoutes
from kvstore.router.service import RouterService
from kvstore.transport.http.requests import Head
from kvstore.transport.http.responses import Response
from tests.unit.router.calls import answer
from tests.unit.router.fake_shards import PARTITIONS, all_follow, all_on, key_of, make_service, shards
from tests.unit.waiting import until

NAME = key_of("s1")


class Client:
    """Asks for the lock and may hang up."""

    def __init__(self, service: RouterService, limits: Limits | None = None) -> None:
        self.left = False
        self._limits = limits or Limits()
        self.routes = LockRoutes(service, self._limits)

    def acquire(self, wait_s: float) -> asyncio.Task[Response]:
        request: Any = SimpleNamespace(transport=SimpleNamespace(is_closing=lambda: self.left), protocol=None)
        head, body = Head("POST", f"/v1/locks/{NAME}", "", {}), b'{"wait":%g}' % wait_s
        return asyncio.create_task(answer(self.routes, LOCK_ROUTES, head, body, limits=self._limits, request=request))


def held(*shard_ids: str) -> None:
    """Another client has the lock, wherever it is."""
    for shard_id in shard_ids:
        shards[shard_id].holders[NAME] = 1


def asked(shard_id: str) -> list[Acquire]:
    return [request for request in shards[shard_id].asked if isinstance(request, Acquire)]


async def test_a_waiter_goes_on_waiting_at_the_new_owner_for_what_is_left_of_its_time(service: RouterService) -> None:
    held("s1", "s2")
    waiting = Client(service).acquire(10)
    await until(lambda: shards["s1"].waiting)
    await asyncio.sleep(0.3)
    shards["s1"].fence(NAME)
    await asyncio.sleep(0.05)
    assert not shards["s2"].asked
    all_follow(service, all_on(2, "s2"))
    await until(lambda: shards["s2"].waiting)
    assert 2000 < shards["s2"].waiting[0].request.wait_ms <= 9700
    shards["s2"].release(NAME)
    assert (await waiting).status == 201


async def test_a_waiter_whose_time_ran_out_on_the_way_asks_once_more_without_waiting(service: RouterService) -> None:
    held("s1", "s2")
    waiting = Client(service).acquire(0.2)
    await until(lambda: shards["s1"].waiting)
    shards["s1"].fence(NAME)
    await asyncio.sleep(0.3)
    all_follow(service, all_on(2, "s2"))
    with pytest.raises(Locked, match="held"):
        await waiting
    assert [request.wait_ms for request in asked("s2")] == [0]


async def test_a_waiter_whose_move_is_given_up_waits_on_where_it_was(service: RouterService) -> None:
    held("s1")
    waiting = Client(service).acquire(10)
    await until(lambda: shards["s1"].waiting)
    shards["s1"].fence(NAME)
    await asyncio.sleep(0.05)
    shards["s1"].fenced.clear()
    await until(lambda: shards["s1"].waiting)
    shards["s1"].release(NAME)
    assert (await waiting).status == 201


async def test_a_waiter_that_hangs_up_leaves_the_line_in_which_it_stands_now(service: RouterService) -> None:
    held("s1", "s2")
    client = Client(service)
    waiting = client.acquire(10)
    await until(lambda: shards["s1"].waiting)
    for key in ("x", "y"):  # so that the channels count differently
        await service.ask(CancelWait(0, key, 0))
    shards["s1"].fence(NAME)
    all_follow(service, all_on(2, "s2"))
    await until(lambda: shards["s2"].waiting)
    client.left = True
    with pytest.raises(Locked, match="left"):
        await waiting
    assert not shards["s2"].waiting
    assert client.routes.waiting == 0


async def test_a_waiter_that_hung_up_while_the_lock_had_no_owner_does_not_stand_in_line_again(
    service: RouterService,
) -> None:
    held("s1", "s2")
    client = Client(service)
    waiting = client.acquire(10)
    await until(lambda: shards["s1"].waiting)
    client.left = True
    shards["s1"].fence(NAME)
    with pytest.raises(Locked, match="left"):
        await waiting
    all_follow(service, all_on(2, "s2"))
    assert asked("s2") == []


async def test_what_is_granted_by_the_new_owner_to_a_waiter_that_hung_up_is_given_back(
    service: RouterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.router.routes.locks._LOOK_S", 10.0)  # it is found out only when the lock is granted
    held("s1", "s2")
    client = Client(service)
    waiting = client.acquire(10)
    await until(lambda: shards["s1"].waiting)
    shards["s1"].fence(NAME)
    all_follow(service, all_on(2, "s2"))
    await until(lambda: shards["s2"].waiting)
    client.left = True
    shards["s2"].release(NAME)
    with pytest.raises(Locked, match="given back"):
        await waiting
    assert NAME not in shards["s2"].holders


async def test_a_lock_without_an_owner_for_too_long_is_unavailable(fake_channels: None) -> None:
    limits = Limits(reroute_timeout_s=0.3)
    service = make_service(reroute_timeout_s=0.3)
    all_follow(service, all_on(1, "s1"))
    shards["s1"].fenced = set(range(PARTITIONS))
    with pytest.raises(Unavailable, match="shard s1 does not answer for its keys now"):
        await Client(service, limits).acquire(10)


async def test_however_often_it_moves_a_waiter_stands_in_line_until_its_time_is_over(fake_channels: None) -> None:
    limits = Limits(reroute_timeout_s=1.5)
    service = make_service(reroute_timeout_s=1.5)
    all_follow(service, all_on(1, "s1"))
    held("s1", "s2")
    waiting = Client(service, limits).acquire(10)
    for epoch in range(2, 7):
        owner, other = ("s1", "s2") if epoch % 2 == 0 else ("s2", "s1")
        await until(lambda owner=owner: shards[owner].waiting)
        await asyncio.sleep(0.15)
        shards[owner].fence(NAME)
        await asyncio.sleep(0.35)  # five times that is more than it may take once
        shards[owner].fenced.clear()
        all_follow(service, all_on(epoch, other))
    await until(lambda: shards["s2"].waiting)
    shards["s2"].release(NAME)
    assert (await waiting).status == 201
