"""A cluster as its router describes it to people: the channels are in-process fakes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from kvstore.errors import Unavailable
from kvstore.metrics import StoreLabels
from kvstore.placement.cluster_map import ClusterMap, Primary
from kvstore.placement.ring import key_hash, partition_of
from kvstore.protocol import Answer
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import (
    PARTITIONS,
    all_on,
    key_of,
    shards,
)

pytestmark = pytest.mark.usefixtures("fake_channels")


async def test_the_cluster_is_described_with_a_silent_shard_as_down_and_its_last_known_numbers(
    service: RouterService,
) -> None:
    shards["s2"].data = {"a": b"1", "b": b"2"}
    views = ClusterViews(service)
    document = await views.cluster()
    assert (document["epoch"], document["partitions"], document["replicas"]) == (1, PARTITIONS, 1)
    assert [(s["id"], s["state"], s["keys"], s["partitions"]) for s in document["shards"]] == [
        ("s1", "up", 0, 32),
        ("s2", "up", 2, 32),
    ]
    service.table.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    document = await views.cluster()
    assert [(s["id"], s["state"], s["keys"]) for s in document["shards"]] == [("s1", "up", 0), ("s2", "down", 2)]


async def test_a_node_that_does_not_serve_its_store_now_is_described_as_down(
    service: RouterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Unavailable("this node does not serve shard s2 now")
    refused = Answer(0, refusal.status, problem=refusal.problem())

    def request(request: Any, *, at_leisure: bool = False) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(refused)
        return future

    monkeypatch.setattr(service.table.channels["s2"], "request", request)
    document = await ClusterViews(service).cluster()
    assert [(s["id"], s["state"]) for s in document["shards"]] == [("s1", "up"), ("s2", "down")]


async def test_the_cluster_is_described_as_of_the_epoch_that_is_asked_for(service: RouterService) -> None:
    shards["s2"].data = {"a": b"1"}
    described = asyncio.create_task(ClusterViews(service).cluster(2))
    await asyncio.sleep(0.05)
    service.table.follow(all_on(2, "s2"))
    shards["s1"].map = all_on(2, "s2")
    await asyncio.sleep(0.05)
    assert not described.done()  # s2 has not followed yet, and counts what it had before
    shards["s2"].map, shards["s2"].data = all_on(2, "s2"), {"a": b"1", "b": b"2"}
    document = await described
    assert (document["epoch"], [s["partitions"] for s in document["shards"]]) == (2, [0, 64])
    assert document["shards"][1]["keys"] == 2
    async with asyncio.timeout(60):
        assert (await ClusterViews(service).cluster(3))["epoch"] == 2  # it did not come in time


async def test_a_shard_that_hangs_does_not_hang_the_description(service: RouterService) -> None:
    service.table.channels["s2"].is_silent = True  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        stats = await ClusterViews(service).shard_stats()
    assert stats["s1"] is not None
    assert stats["s2"] is None


def away_from_home(cluster_map: ClusterMap, node_id: str) -> ClusterMap:
    """The next map, in which the primary of s2 is on another node."""
    primary = Primary(node=node_id, copy_id="copy")
    promoted = msgspec.structs.replace(cluster_map.shards[1], primary=primary, term=cluster_map.epoch + 1)
    shards = [cluster_map.shards[0], promoted]
    return msgspec.structs.replace(cluster_map, epoch=cluster_map.epoch + 1, shards=shards)


async def test_a_shard_is_asked_and_shown_where_its_primary_is(service: RouterService) -> None:
    assert service.table.cluster_map is not None
    moved = away_from_home(service.table.cluster_map, "s1")
    shards["s1"].map = shards["s2"].map = moved
    service.table.follow(moved)
    await asyncio.sleep(0)
    assert [service.table.channels[shard].url for shard in ("s1", "s2")] == ["http://s1", "http://s1"]
    document = await ClusterViews(service).cluster()
    assert [(node["id"], node["url"], node["state"]) for node in document["nodes"]] == [
        ("s1", "http://s1", "up"), ("s2", "http://s2", "up"),
    ]  # fmt: skip
    shown = [(shard["id"], shard["primary"], shard["term"], shard["url"]) for shard in document["shards"]]
    assert shown == [("s1", "s1", 1, "http://s1"), ("s2", "s1", service.table.cluster_map.epoch, "http://s1")]
    explained = await ClusterViews(service).explain(key_of("s2"))
    assert (explained["owner"], explained["primary"], explained["owner_url"], explained["copies"]) == (
        "s2", "s1", "http://s1", [],
    )  # fmt: skip
    stats = await ClusterViews(service).shard_stats()
    assert set(ClusterViews(service).labelled(stats)) == {
        StoreLabels("s1", "s1", "primary"),
        StoreLabels("s1", "s2", "primary"),
    }


async def test_a_node_is_down_while_no_shard_of_its_own_answers(service: RouterService) -> None:
    service.table.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    states = {node["id"]: node["state"] for node in (await ClusterViews(service).cluster())["nodes"]}
    assert states == {"s1": "up", "s2": "down"}


async def test_explain_shows_the_way_of_a_key(service: RouterService) -> None:
    key = key_of("s2")
    shards["s2"].data = {key: b"1"}
    shown = await ClusterViews(service).explain(key)
    assert shown["hash"] == f"{key_hash(key.encode()):016x}"
    assert (shown["owner"], shown["owner_url"], shown["owner_state"]) == ("s2", "http://s2", "up")
    assert shown["partition"] == partition_of(key.encode(), PARTITIONS)
    assert sorted(shown["walk"]) == ["s1", "s2"]
    assert shown["row"] == "value"
    service.table.channels["s2"].error = Unavailable("away")  # type: ignore[attr-defined]
    shown = await ClusterViews(service).explain(key)
    assert (shown["owner"], shown["owner_state"], shown["detail"]) == ("s2", "down", "away")


async def test_a_clock_that_runs_ahead_of_this_routers_is_told_once(
    service: RouterService, caplog: pytest.LogCaptureFixture
) -> None:
    now_us = time.time_ns() // 1000
    shards["s1"].attempts_floor = now_us - 10_000_000  # as it is while all clocks agree
    await ClusterViews(service).shard_stats()
    assert "clock" not in caplog.text
    shards["s2"].attempts_floor = now_us + 60_000_000
    await ClusterViews(service).shard_stats()
    await ClusterViews(service).shard_stats()
    assert service.floor == now_us + 60_000_000
    assert caplog.text.count("let all hosts keep the same time") == 1
