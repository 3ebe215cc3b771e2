"""A controller without its map, or with an old one: what it refuses, what it finds, what it goes on with."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.controller.recovery import EPOCH_STEP, Found, Told, check, newest, recovered, silent
from kvstore.errors import ChangeRefused
from kvstore.placement.cluster_map import ClusterMap, Move, Node, Primary, Replica, at_home, first_map, with_node_url
from kvstore.roster import DesiredShards, Files, decide
from tests.unit.controller.test_controller_app import CONFIG, Controller, running

MEMBERS = [at_home(shard, f"http://{shard}:1", f"store-{shard}") for shard in ("s1", "s2")]
FIRST = first_map("c", 64, MEMBERS)
QUICK = msgspec.structs.replace(CONFIG, limits=Limits(map_poll_s=0.05))
NEXT = with_node_url(FIRST, "s1", "http://s1:2")


# --- the rules --------------------------------------------------------------------------------------------------------


def test_the_newest_map_is_that_of_the_highest_epoch() -> None:
    assert newest([NEXT, FIRST, NEXT]) is NEXT


@pytest.mark.parametrize(
    ("maps", "why"),
    [
        ([], "start the shards"),
        ([FIRST, msgspec.structs.replace(NEXT, cluster_id="d")], "several clusters here, c, d"),
        ([NEXT, with_node_url(FIRST, "s1", "http://s1:3")], "different maps of epoch 2"),
    ],
)
def test_maps_of_which_none_is_the_newest_are_refused(maps: list[ClusterMap], why: str) -> None:
    with pytest.raises(ChangeRefused, match=why):
        newest(maps)


def test_a_member_is_silent_until_its_own_file_was_heard_of() -> None:
    assert silent(FIRST, [Told("s1", "store-s1"), Told("s2", "another")]) == ["s2"]
    assert silent(FIRST, [Told("s1", "store-s1"), Told("s2", "store-s2")]) == []
    assert silent(FIRST, [Told("s1", "store-s1", beside=[("s2", "store-s2")])]) == [], "served by the same node"


def test_a_shard_is_heard_of_where_its_primary_waits_as_a_copy_for_a_controller() -> None:
    """Its home has new files, or none, and the primary's process began anew."""
    s2 = FIRST.shards[1]
    away = msgspec.structs.replace(s2, primary=Primary(node="s1", copy_id="copy-1"))
    moved = msgspec.structs.replace(FIRST, shards=[FIRST.shards[0], away])
    home = Told("s2", "made-anew")
    assert silent(moved, [Told("s1", "store-s1", copies=[("s2", "copy-1")]), home]) == []
    assert silent(moved, [Told("s1", "store-s1", copies=[("s2", "another")]), home]) == ["s2"], "no primary's copy"
    assert silent(moved, [Told("s1", "store-s1"), home]) == ["s2"]


def test_a_primary_that_waits_as_a_copy_is_not_heard_while_a_copy_that_may_have_taken_over_is_silent() -> None:
    s2, other = FIRST.shards[1], Node(id="s3", url="http://s3:1")
    synced = Replica(node="s3", copy_id="copy-3", state="in-sync", joined=1)
    away = msgspec.structs.replace(s2, primary=Primary(node="s1", copy_id="copy-1"), replicas=[synced])
    moved = msgspec.structs.replace(FIRST, shards=[FIRST.shards[0], away], nodes=[*FIRST.nodes, other])
    waits = Told("s1", "store-s1", copies=[("s2", "copy-1")])
    assert silent(moved, [waits, Told("s2", "made-anew")]) == ["s2"]
    assert silent(moved, [waits, Told("s2", "made-anew"), Told("s3", "store-s3")]) == []


@pytest.mark.parametrize("heard", [0, 7])
def test_the_map_that_is_gone_on_with_is_far_above_all_that_was_heard_of_and_begins_its_moves_again(heard: int) -> None:
    move = Move(id="m", source="s1", to="s2", partitions=FIRST.owned_by("s1")[:1])
    found = msgspec.structs.replace(FIRST, moves=[move])
    numbers: Iterator[int] = count()
    after = recovered(found, heard, lambda: f"new-{next(numbers)}")
    assert after.epoch == max(heard, 1) + EPOCH_STEP
    assert [each.id for each in after.moves] == ["new-0"]
    assert msgspec.structs.replace(after, epoch=1, moves=[move]) == found


@pytest.mark.parametrize(
    ("epoch", "quiet", "without", "why"),
    [
        (2, [], [], "the newest map is that of epoch 1"),
        (1, ["s2"], [], "shard s2 is a member and silent"),
        (1, [], ["s2"], "shard s2 is not among the silent"),
    ],
)
def test_what_was_not_shown_and_who_was_not_named_is_not_taken(
    epoch: int, quiet: list[str], without: list[str], why: str
) -> None:
    check(Found(FIRST, [], quiet), "c", 1, quiet)
    with pytest.raises(ChangeRefused, match=why):
        check(Found(FIRST, [], quiet), "c", epoch, without)


# --- a controller -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def node(shard_id: str) -> AsyncIterator[dict[str, Any]]:
    """A shard that says what is in the dictionary when it is asked for its map."""
    told: dict[str, Any] = {"shard": shard_id, "store_id": shard_id, "map": None}

    async def get_map(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode({name: told[name] for name in ("shard", "store_id", "map")}))

    app = web.Application()
    app.router.add_get("/map", get_map)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    told["url"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield told
    await runner.cleanup()


async def form(controller: Controller, *nodes: dict[str, Any]) -> ClusterMap:
    for each in nodes:
        _, formed = await controller.announce(each["shard"], url=each["url"])
    for each in nodes:
        each["map"] = formed
    return msgspec.convert(formed, ClusterMap)


async def test_a_controller_whose_file_was_lost_goes_on_with_the_map_of_its_shards(tmp_path: Path) -> None:
    async with node("s1") as one, node("s2") as two:
        async with running(tmp_path / "before") as controller:
            formed = await form(controller, one, two)
        async with running(tmp_path / "after") as controller:
            assert (await controller.call("GET", "/v1/recovery"))[0] == 409
            ours = {"cluster_id": formed.cluster_id, "epoch": 1}
            status, refused = await controller.announce("s1", url=one["url"], **ours)
            assert (status, refused["code"]) == (503, "controller-behind")
            for shard_id in ("s1", "s2"):  # no second cluster is formed
                status, refused = await controller.announce(shard_id)
                assert (status, refused["code"]) == (503, "controller-behind")
            for method, path, body in (
                ("GET", "/v1/map", None),
                ("POST", "/v1/moves", None),
                ("DELETE", "/v1/shards/s1", None),
                ("PATCH", "/v1/cluster", {"replicas": 2}),
                ("POST", "/v1/shards/s1/promote", {"to": "s2"}),
                ("POST", "/v1/shards/s1/promote", {"to": "s2", "accept_loss": True}),
                ("POST", "/v1/shards/s1/accept-old", {"confirm": "s1"}),
            ):
                status, refused = await controller.call(method, path, json=body)
                assert (status, refused["code"]) == (503, "controller-behind"), path
            _, told = await controller.call("GET", "/v1/moves?copies=true")
            assert "its file is lost" in told["behind"], "routers say it to people"
            status, shown = await controller.call("GET", "/v1/recovery")
            assert (status, shown["epoch"], shown["told"], shown["silent"]) == (200, 1, ["s1", "s2"], [])
            status, taken = await controller.call("POST", "/v1/recovery", json=ours)
            assert (status, taken["epoch"]) == (202, 1 + EPOCH_STEP)
            status, after = await controller.announce("s1", url=one["url"], **ours)
            assert (status, msgspec.convert(after, ClusterMap).owners) == (200, formed.owners)
            assert (await controller.call("POST", "/v1/recovery", json=ours))[0] == 409
            assert (await controller.call("DELETE", "/v1/moves"))[0] == 202


async def test_a_lost_map_is_not_taken_while_a_member_is_silent_unless_it_is_named(tmp_path: Path) -> None:
    async with node("s1") as one:
        async with node("s2") as two, running(tmp_path / "before") as controller:
            formed = await form(controller, one, two)
        async with running(tmp_path / "after") as controller:
            ours = {"cluster_id": formed.cluster_id, "epoch": 1}
            await controller.announce("s1", url=one["url"], **ours)
            status, refused = await controller.call("POST", "/v1/recovery", json=ours)
            assert (status, refused["silent"]) == (409, ["s2"])
            assert (await controller.call("GET", "/v1/map"))[0] == 503
            status, _ = await controller.call("POST", "/v1/recovery", json={**ours, "without": ["s2"]})
            assert status == 202


async def test_a_controller_whose_file_is_an_old_copy_changes_nothing_once_it_hears_of_a_newer_epoch(
    tmp_path: Path,
) -> None:
    async with node("s1") as one, node("s2") as two:
        async with running(tmp_path / "data") as controller:
            formed = await form(controller, one, two)
        shutil.copytree(tmp_path / "data", tmp_path / "old")
        async with running(tmp_path / "data") as controller:
            _, newer = await controller.announce("s2", url="http://127.0.0.1:1", cluster_id=formed.cluster_id)
            assert newer["epoch"] == 2
            _, newest_map = await controller.announce("s2", url=two["url"], cluster_id=formed.cluster_id)
            one["map"] = newest_map
        async with running(tmp_path / "old", QUICK) as controller:
            poll = f"/v1/map?after={newest_map['epoch']}&cluster={formed.cluster_id}"
            assert (await controller.call("DELETE", "/v1/moves"))[0] == 202, "nothing was heard yet"
            assert (await controller.call("GET", poll))[0] == 204
            status, refused = await controller.announce("s1", url="http://new:1", cluster_id=formed.cluster_id)
            assert (status, refused["code"], refused["heard"]) == (503, "controller-behind", 3)
            assert (await controller.call("GET", "/v1/map"))[1]["epoch"] == 1
            assert (await controller.announce("s1", url=one["url"], cluster_id=formed.cluster_id))[0] == 200
            ours = {"cluster_id": formed.cluster_id, "epoch": 3}
            assert (await controller.call("POST", "/v1/recovery", json=ours))[0] == 202
            status, after = await controller.announce("s1", url="http://new:1", cluster_id=formed.cluster_id)
            assert (status, after["epoch"]) == (200, 3 + EPOCH_STEP + 1)
            nodes = {node["id"]: node["url"] for node in after["nodes"]}
            assert nodes == {"s1": "http://new:1", "s2": two["url"]}


async def test_a_record_that_is_one_epoch_old_is_not_changed_before_the_nodes_could_tell(tmp_path: Path) -> None:
    """Else the controller would make another map of that epoch, and could not be told any more."""
    async with node("s1") as one, node("s2") as two:
        async with running(tmp_path / "data") as controller:
            formed = await form(controller, one, two)
        shutil.copytree(tmp_path / "data", tmp_path / "old")
        ours = {"cluster_id": formed.cluster_id}
        async with running(tmp_path / "old") as controller:
            first = asyncio.create_task(controller.announce("s1", url="http://127.0.0.1:1", **ours))
            await asyncio.sleep(0.1)
            assert (await controller.announce("s2", url=two["url"], epoch=2, **ours))[0] == 200
            status, refused = await first
            assert (status, refused["code"], refused["heard"]) == (503, "controller-behind", 2)


async def test_a_node_that_has_joined_since_an_old_copy_of_the_record_is_not_told_that_it_was_removed(
    tmp_path: Path,
) -> None:
    async with node("s1") as one, node("s2") as two, running(tmp_path) as controller:
        formed = await form(controller, one, two)
        ours = {"cluster_id": formed.cluster_id}
        assert (await controller.announce("s3", url="http://127.0.0.1:1", **ours))[1]["code"] == "foreign-data"
        status, refused = await controller.announce("s3", url="http://127.0.0.1:1", epoch=9, **ours)
        assert (status, refused["code"]) == (503, "controller-behind")


async def test_the_epochs_of_another_cluster_are_none_of_this_one(tmp_path: Path) -> None:
    async with node("s1") as one, node("s2") as two, running(tmp_path, QUICK) as controller:
        await form(controller, one, two)
        assert (await controller.call("GET", "/v1/map?after=9&cluster=other"))[0] == 204
        assert (await controller.announce("s1", url="http://new:1"))[0] == 200


async def test_a_launcher_is_told_to_end_no_node_that_has_joined_since_an_old_copy_of_the_record(
    tmp_path: Path,
) -> None:
    """Before the nodes could tell, and once they have: that one has keys. It is started where it does not run."""
    async with node("s1") as one, node("s2") as two, node("s3") as three:
        async with running(tmp_path / "data") as controller:
            formed = await form(controller, one, two)
        newest_map = msgspec.structs.replace(formed, epoch=2, nodes=[*formed.nodes, Node(id="s3", url=three["url"])])
        one["map"] = msgspec.to_builtins(newest_map)
        async with running(tmp_path / "data") as controller:
            asking = asyncio.create_task(controller.call("GET", "/v1/launch?running=s1,s2,s3"))
            for each in (one, two):
                ours = {"cluster_id": formed.cluster_id, "epoch": 2}
                assert (await controller.announce(each["shard"], url=each["url"], **ours))[0] == 200
            for running_here, told in (("s1,s2,s3", await asking), ("s1,s2", None)):
                told = told or await controller.call("GET", f"/v1/launch?running={running_here}")
                launch = msgspec.convert(told[1], DesiredShards)
                steps = decide(launch, CONFIG, Files(frozenset(["s1", "s2", "s3"])), running_here.split(","), {"s3"})
                assert (steps.stop, steps.remove, "s3" in steps.start) == ([], [], running_here == "s1,s2")
            assert (await controller.call("GET", "/v1/moves"))[1]["ending"] == []


async def test_a_launcher_that_knows_a_later_revision_than_that_of_the_record_is_answered_at_once(
    tmp_path: Path,
) -> None:
    """An older copy of the record was put back: else the launcher would hear of nothing for as long."""
    async with node("s1") as one, node("s2") as two, running(tmp_path, QUICK) as controller:
        await form(controller, one, two)
        status, told = await controller.call("GET", "/v1/launch?after=99&running=s1,s2")
        assert status == 200
        assert (await controller.call("GET", f"/v1/launch?after={told['revision']}&running=s1,s2"))[0] == 204
