"""Changes of the cluster over real HTTP, with shards on real channels: what is answered, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.config import ClusterConfig, Limits, ShardConfig, default_config
from kvstore.controller.app import serve
from kvstore.controller.shards import Size
from kvstore.controller.sizes import group_partitions
from kvstore.placement.cluster_map import at_home, first_map
from loadtest.cluster.processes import free_ports
from tests.unit.controller.far_shards import FarShard, far_shards

WAIT_S = 20.0
LIMITS = Limits(reconnect_wait_s_max=0.05, map_poll_s=0.2, move_freeze_timeout_s=10.0)
CONFIG = msgspec.structs.replace(
    default_config(),
    partitions=64,
    replicas=1,
    shards=[ShardConfig("s1", "127.0.0.1:1"), ShardConfig("s2", "127.0.0.1:2")],
    limits=LIMITS,
)


class Cluster(NamedTuple):
    """A controller and the shards that may take part."""

    url: str
    session: aiohttp.ClientSession
    far: dict[str, FarShard]

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.session.request(method, self.url + path, json=body) as answer:
            text = await answer.read()
            return answer.status, msgspec.json.decode(text) if text else None

    async def announce(self, shard_id: str, **more: Any) -> tuple[int, Any]:
        shard = self.far[shard_id]
        said = {"id": shard_id, "url": shard.url, "store_id": shard.store_id, "cluster_id": shard.cluster_id}
        return await self.call("POST", "/v1/members", {**said, **more})

    async def states(self) -> dict[str, str]:
        _, cluster_map = await self.call("GET", "/v1/map")
        return {member["id"]: member["state"] for member in cluster_map["shards"]}

    async def settled(self) -> dict[str, Any]:
        """GET /v1/moves once no move stands."""
        async with asyncio.timeout(WAIT_S):
            while True:
                _, found = await self.call("GET", "/v1/moves")
                if not found["moves"]:
                    return dict(found)
                await asyncio.sleep(0.01)

    async def loads(self) -> dict[str, int]:
        _, cluster_map = await self.call("GET", "/v1/map")
        names = [member["id"] for member in cluster_map["shards"]]
        return {name: cluster_map["owners"].count(index) for index, name in enumerate(names)}


def free_port() -> int:
    return free_ports(1)[0]


@asynccontextmanager
async def running(data_dir: Path, far: dict[str, FarShard], config: ClusterConfig = CONFIG) -> AsyncIterator[Cluster]:
    stop, listen = asyncio.Event(), f"127.0.0.1:{free_port()}"
    serving = asyncio.create_task(serve(controller_id="0", listen=listen, data_dir=data_dir, config=config, stop=stop))
    async with aiohttp.ClientSession() as session:
        cluster = Cluster(f"http://{listen}", session, far)
        try:
            async with asyncio.timeout(WAIT_S):
                while not serving.done():
                    try:
                        await cluster.call("GET", "/healthz")
                        break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.01)
            yield cluster
        finally:
            stop.set()
            await serving


@pytest.fixture
async def far() -> AsyncIterator[dict[str, FarShard]]:
    async with far_shards("s1", "s2", "s3", "s4") as shards:
        yield shards


@pytest.fixture
async def unformed(tmp_path: Path, far: dict[str, FarShard]) -> AsyncIterator[Cluster]:
    async with running(tmp_path, far) as cluster:
        yield cluster


@pytest.fixture
async def cluster(unformed: Cluster) -> Cluster:
    await unformed.announce("s1")
    status, formed = await unformed.announce("s2")
    assert status == 200
    for name in ("s1", "s2"):
        unformed.far[name].cluster_id = formed["cluster_id"]
    return unformed


# --- shards ----------------------------------------------------------------------------------------------------------


async def test_a_running_shard_is_added_by_its_url_and_removed_again(cluster: Cluster) -> None:
    status, answer = await cluster.call("POST", "/v1/shards", {"id": "s3", "url": cluster.far["s3"].url, "weight": 2})
    assert (status, answer) == (202, {"id": "s3", "state": "joining", "epoch": 2})
    found = await cluster.settled()
    assert await cluster.loads() == {"s1": 16, "s2": 16, "s3": 32}
    assert await cluster.states() == {"s1": "up", "s2": "up", "s3": "up"}
    assert (found["wanted"], found["ending"], found["last"]["partitions"]) == ([], [], 32)
    status, answer = await cluster.call("DELETE", "/v1/shards/s3")
    assert (status, answer["state"]) == (202, "leaving")
    await cluster.settled()
    assert await cluster.loads() == {"s1": 32, "s2": 32}


async def test_a_new_weight_moves_partitions(cluster: Cluster) -> None:
    status, answer = await cluster.call("PATCH", "/v1/shards/s1", {"weight": 3})
    assert (status, answer["state"]) == (202, "up")
    await cluster.settled()
    assert await cluster.loads() == {"s1": 48, "s2": 16}


async def test_a_shard_that_asks_to_join_is_a_member_at_once(cluster: Cluster) -> None:
    status, joined = await cluster.announce("s3", join=True)
    assert (status, joined["epoch"]) == (200, 2)
    assert [member["state"] for member in joined["shards"]] == ["up", "up", "joining"]
    await cluster.settled()
    assert set((await cluster.loads()).values()) == {21, 22}


async def test_a_plan_tells_what_would_move_and_changes_nothing(cluster: Cluster) -> None:
    _, before = await cluster.call("GET", "/v1/map")
    url = cluster.far["s3"].url
    for method, path, body, expected in [
        ("POST", "/v1/shards", {"id": "s3", "url": url}, {"s1": 11, "s2": 11}),
        ("POST", "/v1/shards", {"id": "s3"}, {"s1": 11, "s2": 11}),
        ("PATCH", "/v1/shards/s1", {"weight": 3}, {"s2": 16}),
        ("DELETE", "/v1/shards/s2", None, {"s2": 32}),
        ("POST", "/v1/moves", None, {}),
    ]:
        status, plan = await cluster.call(method, f"{path}?plan=true", body)
        assert status == 200
        partitions = {move["from"]: move["partitions"] for move in plan["moves"]}
        assert sum(partitions.values()) == sum(expected.values()) == plan["partitions"]
        assert partitions.keys() == expected.keys()
        for move in plan["moves"]:
            keys = round(1000 * move["partitions"] / 32)
            assert (move["keys"], move["bytes"]) == (keys, round(100_000 * move["partitions"] / 32))
        assert plan["keys"] == sum(move["keys"] for move in plan["moves"])
    assert (await cluster.call("GET", "/v1/map"))[1] == before


async def test_a_plan_does_not_guess_what_a_dead_shard_holds(cluster: Cluster) -> None:
    await cluster.far["s2"].kill()
    _, plan = await cluster.call("POST", "/v1/shards?plan=true", {"id": "s3", "url": cluster.far["s3"].url})
    assert (plan["partitions"], plan["keys"], plan["bytes"]) == (22, None, None)
    assert {move["from"]: move["keys"] is None for move in plan["moves"]} == {"s1": False, "s2": True}


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("POST", "/v1/shards", {"id": "s1"}, (409, "change-refused", "exists already")),
        ("POST", "/v1/shards", {"id": "s9"}, (409, "change-refused", "start it yourself with `kvstore shard serve s9")),
        ("POST", "/v1/shards", {"id": "s9", "url": "http://127.0.0.1:9"}, (409, "change-refused", "no shard answers")),
        ("POST", "/v1/shards", {"id": "S9"}, (400, "bad-body", "no shard id")),
        ("POST", "/v1/shards", {"id": "s9", "url": "nowhere"}, (400, "bad-body", "no address")),
        ("POST", "/v1/shards", {"id": "s9", "weight": 0}, (400, "bad-body", "1 to 1000")),
        ("POST", "/v1/shards", {"id": "s9", "weight": "2"}, (400, "bad-body", "int")),
        ("POST", "/v1/shards", {"id": "s9", "wait": 2}, (400, "bad-body", "wait")),
        ("POST", "/v1/shards", {}, (400, "bad-body", "id")),
        ("POST", "/v1/shards?plan=yes", {"id": "s9"}, (400, "bad-parameter", "neither true nor false")),
        ("POST", "/v1/shards?x=1", {"id": "s9"}, (400, "bad-parameter", "plan")),
        ("PATCH", "/v1/shards/s9", {"weight": 2}, (404, "not-found", "the members are s1, s2")),
        ("PATCH", "/v1/shards/s1", {"weight": 1001}, (400, "bad-body", "1 to 1000")),
        ("PATCH", "/v1/shards/s1", {}, (400, "bad-body", "weight")),
        ("DELETE", "/v1/shards/s9", None, (404, "not-found", "the members are s1, s2")),
        ("GET", "/v1/shards", None, (405, "method-not-allowed", "GET")),
        ("GET", "/v1/moves?x=1", None, (400, "bad-parameter", "known are: copies")),
        ("DELETE", "/v1/moves?plan=true", None, (400, "bad-parameter", "this call takes none")),
        ("GET", "/v1/launch?after=x", None, (400, "bad-parameter", "whole number")),
        ("GET", "/v1/launch?running=S1", None, (400, "bad-parameter", "no shard id")),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_reason(
    cluster: Cluster, method: str, path: str, body: Any, expected: tuple[int, str, str]
) -> None:
    before = (await cluster.call("GET", "/v1/map"))[1]
    status, problem = await cluster.call(method, path, body)
    assert (status, problem["code"]) == expected[:2]
    assert expected[2] in problem["detail"]
    assert problem["next_step"]
    assert (await cluster.call("GET", "/v1/map"))[1] == before


async def test_the_wrong_process_at_a_url_is_refused(cluster: Cluster) -> None:
    async def add(shard_id: str, url: str) -> tuple[int, str]:
        status, problem = await cluster.call("POST", "/v1/shards", {"id": shard_id, "url": url})
        return status, problem["code"]

    far = cluster.far
    assert await add("s9", far["s3"].url) == (409, "change-refused")  # it is s3
    assert await add("s9", cluster.url) == (409, "change-refused")  # it is no shard
    far["s3"].cluster_id = "another"
    assert await add("s3", far["s3"].url) == (409, "foreign-data")
    far["s3"].cluster_id = far["s1"].cluster_id
    assert await add("s3", far["s3"].url) == (409, "foreign-data")  # it was removed
    far["s3"].cluster_id, far["s3"].store_id = None, "store-s1"
    assert await add("s3", far["s3"].url) == (409, "foreign-data")  # its file is a copy
    assert set(await cluster.states()) == {"s1", "s2"}


async def test_the_last_shard_cannot_be_removed(cluster: Cluster) -> None:
    await cluster.call("DELETE", "/v1/shards/s1")
    await cluster.settled()
    status, problem = await cluster.call("DELETE", "/v1/shards/s2")
    assert (status, problem["code"]) == (409, "change-refused")
    assert (await cluster.loads()) == {"s2": 64}


async def test_before_the_cluster_is_formed_changes_are_answered_503(unformed: Cluster) -> None:
    for method, path, body in [
        ("POST", "/v1/shards", {"id": "s3"}),
        ("POST", "/v1/shards?plan=true", {"id": "s3"}),
        ("DELETE", "/v1/shards/s1", None),
        ("POST", "/v1/moves", None),
        ("DELETE", "/v1/moves", None),
    ]:
        status, problem = await unformed.call(method, path, body)
        assert (status, problem["code"], problem["retry_after_ms"]) == (503, "unavailable", 1000)
    empty = {"epoch": 0, "moves": [], "wanted": [], "ending": [], "last": None}
    assert await unformed.call("GET", "/v1/moves") == (200, empty)


# --- moves -----------------------------------------------------------------------------------------------------------


async def test_a_cancel_leaves_no_trace_and_a_plan_goes_on(cluster: Cluster) -> None:
    cluster.far["s1"].gates["copy"].clear()
    _, before = await cluster.call("GET", "/v1/map")
    await cluster.call("PATCH", "/v1/shards/s1", {"weight": 3})
    _, standing = await cluster.call("GET", "/v1/moves")
    assert [(move["from"], move["to"]) for move in standing["moves"]] == [("s2", "s1")]
    status, answer = await cluster.call("DELETE", "/v1/moves")
    assert (status, answer) == (202, {"epoch": 3})
    _, after = await cluster.call("GET", "/v1/map")
    assert (after["owners"], after["moves"]) == (before["owners"], [])
    cluster.far["s1"].gates["copy"].set()
    assert (await cluster.call("POST", "/v1/moves"))[0] == 202
    await cluster.settled()
    assert await cluster.loads() == {"s1": 48, "s2": 16}


async def test_moves_are_in_the_metrics(cluster: Cluster) -> None:
    await cluster.announce("s3", join=True)
    last = (await cluster.settled())["last"]
    async with cluster.session.get(f"{cluster.url}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    samples = {(s.name, s.labels.get("le")): s.value for family in families for s in family.samples}
    assert samples["kvstore_moved_partitions_total", None] == last["partitions"] == 22
    assert samples["kvstore_moved_keys_total", None] == last["keys"]
    assert samples["kvstore_moved_bytes_total", None] == last["bytes"]
    assert samples["kvstore_moves_voided_total", None] == 0
    assert samples["kvstore_cluster_epoch", None] == (await cluster.call("GET", "/v1/map"))[1]["epoch"]
    async with asyncio.timeout(WAIT_S):
        while samples.get(("kvstore_move_write_pause_seconds_bucket", "+Inf")) != last["groups"]:
            async with cluster.session.get(f"{cluster.url}/metrics") as answer:
                families = text_string_to_metric_families(await answer.text())
            samples = {(s.name, s.labels.get("le")): s.value for family in families for s in family.samples}


# --- the launcher ----------------------------------------------------------------------------------------------------


async def test_a_launcher_is_told_what_is_wanted_and_its_shard_joins_when_it_comes(cluster: Cluster) -> None:
    _, told = await cluster.call("GET", "/v1/launch?running=s1,s2")
    nodes = [{"id": name, "url": cluster.far[name].url} for name in ("s1", "s2")]
    assert (told["formed"], told["wanted"], told["nodes"]) == (True, [], nodes)
    waiting = asyncio.create_task(cluster.call("GET", f"/v1/launch?after={told['revision']}&running=s1,s2"))
    status, answer = await cluster.call("POST", "/v1/shards", {"id": "s3", "weight": 2})
    assert (status, answer) == (202, {"id": "s3", "state": "wanted", "epoch": 1})
    status, told = await waiting
    assert (status, told["wanted"]) == (200, [{"id": "s3", "weight": 2}])
    assert (await cluster.call("GET", "/v1/moves"))[1]["wanted"] == ["s3"]
    status, joined = await cluster.announce("s3")
    assert (status, joined["shards"][2]["weight"]) == (200, 2)
    await cluster.settled()
    assert await cluster.loads() == {"s1": 16, "s2": 16, "s3": 32}


async def test_a_shard_asked_for_just_after_the_start_waits_for_the_launcher_to_come(cluster: Cluster) -> None:
    adding = asyncio.create_task(cluster.call("POST", "/v1/shards", {"id": "s3"}))
    await asyncio.sleep(0.2)
    assert not adding.done()
    await cluster.call("GET", "/v1/launch?running=s1,s2")
    assert await adding == (202, {"id": "s3", "state": "wanted", "epoch": 1})


async def test_a_wanted_shard_survives_a_restart_of_the_controller(tmp_path: Path, far: dict[str, FarShard]) -> None:
    async with running(tmp_path, far) as cluster:
        await cluster.announce("s1")
        await cluster.announce("s2")
        await cluster.call("GET", "/v1/launch")
        await cluster.call("POST", "/v1/shards", {"id": "s3"})
    async with running(tmp_path, far) as cluster:
        await cluster.announce("s1")
        await cluster.announce("s2")
        assert (await cluster.call("GET", "/v1/launch"))[1]["wanted"] == [{"id": "s3", "weight": 1}]
        await cluster.announce("s3")
        await cluster.settled()
        assert set(await cluster.states()) == {"s1", "s2", "s3"}


async def test_a_wanted_shard_is_forgotten_when_it_is_removed(cluster: Cluster) -> None:
    await cluster.call("GET", "/v1/launch")
    await cluster.call("POST", "/v1/shards", {"id": "s3"})
    assert (await cluster.call("DELETE", "/v1/shards/s3"))[1]["state"] == "gone"
    status, problem = await cluster.announce("s3")
    assert (status, problem["code"]) == (409, "conflict")


async def test_a_launcher_without_news_is_answered_204(cluster: Cluster) -> None:
    _, told = await cluster.call("GET", "/v1/launch")
    assert await cluster.call("GET", f"/v1/launch?after={told['revision']}") == (204, None)


async def test_shards_that_still_run_and_are_no_members_are_ending(cluster: Cluster) -> None:
    await cluster.call("GET", "/v1/launch?running=s1,s2,s7")
    assert (await cluster.call("GET", "/v1/moves"))[1]["ending"] == ["s7"]
    await cluster.call("GET", "/v1/launch?running=s1,s2")
    assert (await cluster.call("GET", "/v1/moves"))[1]["ending"] == []


async def test_a_launcher_that_was_not_heard_of_for_long_is_not_there(
    tmp_path: Path, far: dict[str, FarShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.controller.launches.GRACE_S", 0.0)
    async with running(tmp_path, far) as cluster:
        await cluster.announce("s1")
        await cluster.announce("s2")
        await cluster.call("GET", "/v1/launch?running=s1,s2,s7")
        await asyncio.sleep(LIMITS.map_poll_s)
        status, problem = await cluster.call("POST", "/v1/shards", {"id": "s3"})
        assert (status, problem["code"]) == (409, "change-refused")
        assert (await cluster.call("GET", "/v1/moves"))[1]["ending"] == []


@pytest.mark.parametrize(
    ("keys", "size_bytes", "partitions"),
    [(0, 0, 32), (100, 1000, 32), (1000, 1000, 3), (100, 10_000, 3), (1000, 20_000, 1), (10**9, 10**12, 1)],
)
def test_a_group_is_bounded_by_keys_and_by_bytes(keys: int, size_bytes: int, partitions: int) -> None:
    members = [at_home(shard, f"http://{shard}", shard) for shard in ("s1", "s2")]
    cluster_map = first_map("c", 64, members)
    limits = Limits(move_group_keys_max=100, move_group_bytes_max=1000)
    assert group_partitions(cluster_map, "s1", Size(keys, size_bytes), limits) == partitions


# --- changes as resources ---------------------------------------------------------------------------------------------


async def location(cluster: Cluster, method: str, path: str, body: Any = None) -> str:
    """Where the change that the call begins is to be found."""
    async with cluster.session.request(method, cluster.url + path, json=body) as answer:
        assert answer.status == 202
        return answer.headers["Location"]


async def ended(cluster: Cluster, path: str) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_S):
        while True:
            status, found = await cluster.call("GET", path)
            assert status == 200
            if found["state"] != "running":
                return dict(found)
            await asyncio.sleep(0.01)


async def test_every_call_that_changes_the_cluster_names_its_change(cluster: Cluster) -> None:
    calls = [
        ("POST", "/v1/shards", {"id": "s3", "url": cluster.far["s3"].url}),
        ("PATCH", "/v1/shards/s1", {"weight": 2}),
        ("POST", "/v1/moves", None),
        ("DELETE", "/v1/shards/s3", None),
        ("DELETE", "/v1/moves", None),
        ("POST", "/v1/shards/s1/accept-old", {"confirm": "s1"}),
        ("DELETE", "/v1/shards/s2?lost=true&confirm=s2", None),
    ]
    named = []
    for call in calls:
        named.append(await location(cluster, *call))
        if call[1] != "/v1/moves":
            await ended(cluster, named[-1])
    _, listed = await cluster.call("GET", "/v1/changes")
    assert [f"/v1/changes/{change['id']}" for change in listed["items"]] == named[::-1]
    kinds = ["add", "weight", "rebalance", "remove", "cancel", "accept-old", "remove-lost"]
    assert [change["kind"] for change in listed["items"]] == kinds[::-1]
    assert {change["state"] for change in listed["items"]} == {"done"}


async def test_what_is_told_after_accept_old_names_a_floor_above_every_version(cluster: Cluster) -> None:
    _, cluster_map = await cluster.call("GET", "/v1/map")
    told = {"store_id": cluster_map["shards"][0]["store_id"], "number": 7, "version": 41}
    assert (await cluster.call("POST", "/v1/told", told))[1] == {"number": 7, "version": 41, "clock_floor": 0}
    assert (await cluster.call("POST", "/v1/shards/s1/accept-old", {"confirm": "s2"}))[0] == 409
    status, answer = await cluster.call("POST", "/v1/shards/s1/accept-old", {"confirm": "s1"})
    assert (status, answer["told"], answer["version"]) == (202, 7, 41)
    again = told | {"number": 0, "version": 0}
    assert (await cluster.call("POST", "/v1/told", again))[1] == {"number": 0, "version": 0, "clock_floor": 41 + 2**32}
    await cluster.call("POST", "/v1/shards/s1/accept-old", {"confirm": "s1"})
    assert (await cluster.call("POST", "/v1/told", again))[1]["clock_floor"] == 41 + 2 * 2**32


async def test_the_contrary_supersedes_and_a_cancel_cancels(cluster: Cluster) -> None:
    cluster.far["s3"].gates["copy"].clear()
    added = await location(cluster, "POST", "/v1/shards", {"id": "s3", "url": cluster.far["s3"].url})
    assert (await cluster.call("GET", added))[1]["state"] == "running"
    removed = await location(cluster, "DELETE", "/v1/shards/s3")
    superseded = await ended(cluster, added)
    assert superseded["state"] == "superseded"
    assert removed.rpartition("/")[2] in superseded["detail"]
    cluster.far["s1"].gates["copy"].clear()
    weighed = await location(cluster, "PATCH", "/v1/shards/s1", {"weight": 5})
    cancel = await location(cluster, "DELETE", "/v1/moves")
    found = await ended(cluster, weighed)
    assert (found["state"], cancel.rpartition("/")[2] in found["detail"]) == ("cancelled", True)


async def test_the_same_call_again_names_the_change_that_runs(cluster: Cluster) -> None:
    cluster.far["s1"].gates["copy"].clear()
    first = await location(cluster, "PATCH", "/v1/shards/s1", {"weight": 5})
    assert await location(cluster, "PATCH", "/v1/shards/s1", {"weight": 5}) == first
    assert await location(cluster, "PATCH", "/v1/shards/s1", {"weight": 4}) != first


@pytest.mark.parametrize("change_id", ["0123456789abcdef", "s1", "x" * 300])
async def test_a_wrong_id_is_not_found(cluster: Cluster, change_id: str) -> None:
    status, problem = await cluster.call("GET", f"/v1/changes/{change_id}")
    assert (status, problem["code"]) == (404, "not-found")
    assert "there is no change" in problem["detail"]
    assert "GET /v1/changes" in problem["next_step"]


async def test_changes_survive_a_restart_and_one_under_way_goes_on(tmp_path: Path, far: dict[str, FarShard]) -> None:
    async with running(tmp_path, far) as first:
        await first.announce("s1")
        await first.announce("s2")
        done = await ended(first, await location(first, "POST", "/v1/moves"))
        far["s3"].gates["copy"].clear()
        added = await location(first, "POST", "/v1/shards", {"id": "s3", "url": far["s3"].url})
        before = (await first.call("GET", added))[1]
    far["s3"].gates["copy"].set()
    async with running(tmp_path, far) as second:
        assert await ended(second, f"/v1/changes/{done['id']}") == done
        after = await ended(second, added)
        assert (after["state"], after["partitions_done"]) == ("done", before["partitions_total"])
        assert after["started_at"] == before["started_at"]


async def test_a_shard_that_joins_by_itself_is_a_change_too(cluster: Cluster) -> None:
    await cluster.announce("s3", join=True)
    _, listed = await cluster.call("GET", "/v1/changes")
    (change,) = listed["items"]
    assert (change["kind"], change["shard"]) == ("add", "s3")
    assert (await ended(cluster, f"/v1/changes/{change['id']}"))["state"] == "done"


async def test_a_shard_that_is_away_is_named_as_what_the_change_waits_for(cluster: Cluster) -> None:
    url = cluster.far["s3"].url
    cluster.far["s1"].gates["copy"].clear()
    cluster.far["s2"].gates["copy"].clear()
    added = await location(cluster, "POST", "/v1/shards", {"id": "s3", "url": url})
    await cluster.far["s3"].kill()
    async with asyncio.timeout(WAIT_S):
        while (found := (await cluster.call("GET", added))[1])["waiting_for"] is None:
            await asyncio.sleep(0.01)
    assert found["state"] == "running"
    assert "s3" in found["waiting_for"]
    assert found["waiting_for"] in found["detail"]
