"""A simulated node hosts stores as real processes do: those that its disk has and whose maps name it primary."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, NoReturn

import msgspec
import pytest

from kvstore.placement.cluster_map import Primary, at_home, first_map
from kvstore.protocol import Answer, Put
from kvstore.replication.promise import read_identity, write_identity
from kvstore.shard.node import Refused
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened, untold
from kvstore.store.store import Store
from kvstore.transport.channel import Channel
from kvstore.transport.link import Links
from kvstore.transport.sessions import ClusterSession
from loadtest.simulate.cluster import LIMITS, Cluster
from loadtest.simulate.disk import PowerCut, lose_all
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.loop import Killed, Process, SimulatedLoop
from loadtest.simulate.machine import FOLDER, PARTITIONS
from loadtest.simulate.network import Network
from loadtest.simulate.node import NodeServer
from loadtest.simulate.session import SimulatedSession
from loadtest.simulate.store_invariants import Violation

SESSION = "session-1"
Owner = Callable[[str], str]


def fatal(error: BaseException) -> NoReturn:
    raise AssertionError from error


@pytest.fixture
def loop() -> Iterator[SimulatedLoop]:
    loop = SimulatedLoop()
    yield loop
    loop.end()


def run(loop: SimulatedLoop, work: Coroutine[Any, Any, Any]) -> Any:
    return loop.run_until_complete(loop.create_task(work))


async def make_stores(server: NodeServer) -> dict[str, str]:
    """Shards s1 and s2 have their primaries on the node, s3 has not; the stores' ids."""
    folder = server.folder
    folder.environment = server.environment
    stores = {}
    for shard in ("s1", "s2", "s3"):
        opened = await folder.open(shard, PARTITIONS, untold)
        assert isinstance(opened, Opened)
        stores[shard] = await Store.serve(opened, LIMITS, fatal, server.environment)
    homes = [
        at_home(shard, f"http://{shard}", stores[shard].identity.store_id, copy_id=stores[shard].copy_id)
        for shard in ("s1", "s2")
    ]
    found = first_map("c", PARTITIONS, homes)
    promoted = msgspec.structs.replace(found.shards[1], primary=Primary(node="s1", copy_id=stores["s2"].copy_id))
    found = msgspec.structs.replace(found, nodes=found.nodes[:1], shards=[found.shards[0], promoted])
    for shard in ("s1", "s2"):
        await stores[shard].partitions.adopt(found)
    ids = {shard: store.identity.store_id for shard, store in stores.items()}
    for store in stores.values():
        await store.close()
    return ids


async def put_by_channels(network: Network, process: Process, ids: dict[str, str], owner_of: Owner) -> dict[str, int]:
    """Put keys of s1 and s2 over the one connection of a router's process; the status of each."""
    session = SimulatedSession(network, random.Random(3), "r1", process)
    cluster = ClusterSession(SESSION)
    links = Links(LIMITS, session, cluster)  # type: ignore[arg-type]
    channels = {
        shard: Channel(shard, "http://s1", LIMITS, session, ids[shard], cluster, links)  # type: ignore[arg-type]
        for shard in ("s1", "s2")
    }
    statuses = {}
    for number in range(20):
        key = f"k{number}"
        channel = channels[owner_of(key)]
        async with asyncio.timeout(30):
            while not channel.connected:
                await asyncio.sleep(0.05)
        reply = await channel.request(Put(0, key, b"v"))
        assert isinstance(reply, Answer)
        statuses[key] = reply.status
    return statuses


def test_a_router_reaches_both_stores_of_a_simulated_node_over_its_one_connection(loop: SimulatedLoop) -> None:
    network = Network(loop, random.Random(1))
    server = NodeServer("s1", network, random.Random(2), LIMITS, lambda error: None)
    server.keep(SESSION)
    ids = run(loop, make_stores(server))
    server.start()
    run(loop, serving(server))
    assert server.node is not None
    cluster_map = server.node.stores.home.local.store.cluster_map
    assert cluster_map is not None
    owner_of = {f"k{number}": cluster_map.owner_of(f"k{number}".encode()).id for number in range(20)}
    assert set(owner_of.values()) == {"s1", "s2"}
    process = network.host("r1").process = Process("r1")
    work = put_by_channels(network, process, ids, owner_of.__getitem__)
    statuses = loop.run_until_complete(loop.create_task(work, context=process.context))
    assert set(statuses.values()) == {201}


async def ended(server: NodeServer) -> None:
    async with asyncio.timeout(30):
        await server.gone.wait()


async def serving(server: NodeServer) -> list[str]:
    """The shards that it serves, once it does."""
    while server.node is None:
        await asyncio.sleep(0.05)
    return [hosted.shard_id for hosted in server.node.stores.by_shard.served]


def test_a_simulated_node_serves_all_stores_of_which_it_is_primary_also_after_a_power_cut(loop: SimulatedLoop) -> None:
    found: list[BaseException] = []
    server = NodeServer("s1", Network(loop, random.Random(1)), random.Random(2), LIMITS, found.append)
    run(loop, make_stores(server))
    server.start()
    assert run(loop, serving(server)) == ["s1", "s2"]
    before = [hosted.store.copy_id for hosted in server.node.stores.by_shard.served] if server.node else []

    server.cut_power(lose_all)
    assert server.node is None
    server.start()
    assert run(loop, serving(server)) == ["s1", "s2"]
    assert server.node is not None
    assert [hosted.store.copy_id for hosted in server.node.stores.by_shard.served] == before
    assert [hosted.store.served.generations.count(0) for hosted in server.node.stores.by_shard.served] != [
        PARTITIONS,
        PARTITIONS,
    ]
    assert server.node.stores.by_shard["s3"].local.store is None, "it lies there, and is not served"
    for hosted in server.node.stores.by_shard.served:
        assert run(loop, server.node.facts(None, None, None))["unverified"], "there is no controller"
        hosted.told.is_verified = True
    assert "unverified" not in run(loop, server.node.facts(None, None, None))
    absent = run(loop, server.node.admit("s4", "", "", None))
    assert isinstance(absent, Refused)
    assert absent.status == 404
    assert not found


def test_a_promise_that_the_disk_does_not_take_ends_the_process_whatever_asked_for_it(loop: SimulatedLoop) -> None:
    server = NodeServer("s1", Network(loop, random.Random(1)), random.Random(2), LIMITS, fatal)
    run(loop, make_stores(server))
    server.start()
    run(loop, serving(server))
    assert server.node is not None
    assert server.process is not None
    hosted = server.node.stores.home.local.hosted
    assert hosted is not None
    server.sync_fails = True
    asking = loop.create_task(hosted.store.promise(9), context=server.process.context)
    run(loop, ended(server))
    assert server.is_excused, "it is the sync that failed"
    assert isinstance(asking.exception(), Killed)


def test_a_node_whose_power_is_cut_in_any_call_of_its_disk_starts_again(loop: SimulatedLoop) -> None:
    found: list[BaseException] = []
    network = Network(loop, random.Random(1))
    for number in range(1, 16):
        server = NodeServer(f"s{number}", network, random.Random(2), LIMITS, found.append)
        server.disk.power_cut_at = number
        server.start()
        run(loop, ended(server))
        server.start()
        assert run(loop, serving(server)) == [server.name], number
    assert not found


def test_the_map_that_is_in_the_log_only_stands_for_a_lost_id_as_in_real_files(loop: SimulatedLoop) -> None:
    server = NodeServer("s1", Network(loop, random.Random(1)), random.Random(2), LIMITS, fatal)
    run(loop, make_stores(server))
    path, engine = next((path, each) for path, each in server.folder.engines.items() if path.stem == "shard-s1")
    server.folder.engines[path] = SimulatedEngine(engine.identity)  # nothing of the log is applied yet
    before = read_identity(server.disk, path.parent, path.stem)
    server.disk.unlink(path.with_suffix(".id"))
    opened = run(loop, server.folder.open("s1", PARTITIONS, untold))
    assert isinstance(opened, Opened)
    assert opened.copy_file is not None
    assert before is not None
    assert opened.copy_file.identity.copy_id == before.copy_id


@pytest.mark.parametrize(("changed", "is_alone"), [({}, True), ({"promised": 2}, False), ({"copy_id": "x"}, False)])
@pytest.mark.parametrize("shard", ["s1", "s2"])
def test_a_store_is_served_before_the_controller_is_heard_only_under_its_id_and_in_its_term_as_in_real_files(
    loop: SimulatedLoop, shard: str, changed: dict[str, Any], is_alone: bool
) -> None:
    server = NodeServer("s1", Network(loop, random.Random(1)), random.Random(2), LIMITS, fatal)
    run(loop, make_stores(server))
    name = next(path.stem for path in server.folder.engines if path.stem.startswith(f"shard-{shard}"))
    identity = read_identity(server.disk, FOLDER, name)
    assert identity is not None
    write_identity(server.disk, FOLDER, name, identity._replace(**changed))
    opened = run(loop, server.folder.open(shard, PARTITIONS, untold))
    assert isinstance(opened, Opened if is_alone else CopyFiles)


def test_a_node_that_joins_and_refuses_a_damaged_disk_comes_back_once_the_disk_is_mended(loop: SimulatedLoop) -> None:
    server = NodeServer("s5", Network(loop, random.Random(1)), random.Random(2), LIMITS, fatal)
    server.is_removed = lambda: True  # its request to join is under way
    server.start()
    assert run(loop, serving(server)) == ["s5"]
    assert server.process is not None
    server.process.kill()
    path = next(each for each in server.disk.files if each.suffix == ".id")
    server.disk.flip(path, 100)
    server.is_damaged = True
    server.start()
    run(loop, ended(server))
    assert server.refused
    assert not server.is_over

    server.disk.flip(path, 100)
    server.is_damaged = server.refused = False
    server.start()
    assert run(loop, serving(server)) == ["s5"]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_store_whose_setting_aside_a_power_cut_breaks_off_is_made_anew(loop: SimulatedLoop, number: int) -> None:
    server = NodeServer("s1", Network(loop, random.Random(1)), random.Random(2), LIMITS, fatal)
    run(loop, make_stores(server))
    folder, disk = server.folder, server.disk
    for shard in ("s1", "s2"):
        disk.power_cut_at = disk.calls + number
        with suppress(PowerCut):
            run(loop, folder.set_aside(shard))
        disk.restart(lambda newest: newest if server.rng.random() < 0.5 else 0)
    own = run(loop, folder.open("s1", PARTITIONS, untold))
    assert isinstance(own, Opened)
    assert own.engine.applied.position.number == own.log.last.number == 0
    if "s2" not in folder.copies():
        assert run(loop, folder.make_copy("s2", own.engine.identity.store_id, PARTITIONS)).copy.log.last.number == 0


def test_a_second_primary_in_a_term_is_a_violation(loop: SimulatedLoop) -> None:
    cluster = Cluster(loop, 1)
    for term, copy_id in ((5, "one"), (5, "one"), (6, "other"), (7, "one")):
        cluster.invariants.terms.note("the store", term, copy_id)
    with pytest.raises(Violation, match="term 5"):
        cluster.invariants.terms.note("the store", 5, "other")
