"""At the end of a simulated run all copies are compared, and between events what must hold of them is looked at."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.controller.membership import ClusterState
from kvstore.errors import DataCorrupt
from kvstore.placement.cluster_map import ClusterMap, Node, Shard, at_home, first_map
from kvstore.replication.copy import StoreCopy
from kvstore.shard.damaged import DamagedCopy
from kvstore.storage.engine import Identity
from kvstore.storage.log import Log
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.store.damaged_files import Salvaged
from loadtest.simulate.changes import remove_gone
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.cluster_clients import Client, History
from loadtest.simulate.copy_invariants import check_in_sync
from loadtest.simulate.disk import SimulatedDisk
from loadtest.simulate.disk_faults import flip_a_bit
from loadtest.simulate.ending import check_copies, is_replicated
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.held_rows import held
from loadtest.simulate.invariants import Invariants
from loadtest.simulate.loop import SimulatedLoop
from loadtest.simulate.node import NodeServer
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.view import View
from loadtest.workloads.calls import Call

KEYS = 12


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    loop = SimulatedLoop()
    made = Cluster(loop, 5, replicas=2)
    loop.after_event = made.check
    yield made
    loop.end()


def run(cluster: Cluster, work: Callable[[], Awaitable[None]]) -> None:
    """Do it once the cluster has some keys, and all their copies."""

    async def scenario() -> None:
        running = cluster.loop.create_task(cluster.run())
        client = Client("c1", cluster, History(cluster))
        for number in range(KEYS):
            call = Call("key", "PUT", f"/v1/kv/k{number}", b"v")
            while (await client.ask(call)).status not in (200, 201, 204):
                await asyncio.sleep(0.2)
        await replicated(cluster)
        await work()
        running.cancel()

    cluster.loop.run_until_complete(asyncio.wait_for(scenario(), 300))


async def replicated(cluster: Cluster) -> None:
    while not is_replicated(cluster.view):
        await asyncio.sleep(0.1)


def a_shard(cluster: Cluster) -> Shard:
    """With rows."""
    found = cluster.view.map
    assert found is not None
    return found.owner_of(b"k0")


def copy_of(cluster: Cluster, shard: Shard) -> StoreCopy:
    resident = cluster.view.resident(shard.replicas[0].node, shard.id)
    assert resident is not None
    assert resident.local.copy is not None
    return resident.local.copy


def a_row(copy: StoreCopy) -> tuple[MemoryEngine, tuple[str, str]]:
    engine = copy.engine
    assert isinstance(engine, MemoryEngine)
    return engine, next((kind, key) for kind, key in engine._rows if kind == "value")


def test_rows_of_copies_that_are_applied_or_not_are_those_of_their_primaries(cluster: Cluster) -> None:
    async def work() -> None:
        check_copies(cluster.view)
        assert any(
            copy_of(cluster, shard).engine.applied.position != copy_of(cluster, shard).log.last
            for shard in (cluster.view.map.shards if cluster.view.map is not None else ())
        )

    run(cluster, work)


@pytest.mark.parametrize("body", [b"another value", None])
def test_a_copy_that_has_another_value_or_lacks_a_key_is_found(cluster: Cluster, body: bytes | None) -> None:
    async def work() -> None:
        await asyncio.sleep(5)  # until all is applied
        shard = a_shard(cluster)
        engine, key = a_row(copy_of(cluster, shard))
        engine._rows[key] = engine._rows[key]._replace(body=body)
        with pytest.raises(Violation, match=f"the copy of {shard.id} on {shard.replicas[0].node} differs"):
            check_copies(cluster.view)

    run(cluster, work)


def test_all_records_that_are_not_applied_yet_count_however_large_they_are() -> None:
    log, count = Log.create(SimulatedDisk(), Path("/data"), "shard-s1", "a-store"), 5
    for number in range(1, count + 1):
        row = Row(VALUE, f"k{number}", number, number, number, 0, b"v" * 40_000)
        log.append(CommitRecord(Clock(number, number), [row]).encode(), 1)
    log.sync()
    assert len(held(SimulatedEngine(Identity("a-store", None, "s1", 64)), log, count)) == count


def test_a_copy_in_sync_that_lacks_a_committed_record_on_its_disk_is_found(cluster: Cluster) -> None:
    async def work() -> None:
        shard = a_shard(cluster)
        log = copy_of(cluster, shard).log
        check_in_sync(cluster.view, shard)
        log.synced = log.synced._replace(number=log.synced.number - 1)
        with pytest.raises(Violation, match="committed records on its disk"):
            check_in_sync(cluster.view, shard)

    run(cluster, work)


def test_no_disk_is_lost_while_one_node_is_left_whose_store_is_the_only_one(cluster: Cluster) -> None:
    async def work() -> None:
        whole, shard = cluster.view.map, a_shard(cluster)
        assert whole is not None
        assert cluster.lost_disks.may_be_more(shard.primary.node)
        (node,) = (each for each in whole.nodes if each.id == shard.primary.node)
        alone = msgspec.structs.replace(whole, nodes=[node], shards=[msgspec.structs.replace(shard, replicas=[])])
        put(cluster, alone)
        assert cluster.view.is_whole()
        assert not cluster.lost_disks.may_be_more(shard.primary.node)

    run(cluster, work)


def test_a_disk_with_the_last_copy_of_anything_is_not_lost_though_fewer_are_lost_than_there_are_copies(
    cluster: Cluster,
) -> None:
    """A copy that fell out, or is damaged, stands in for none."""

    async def work() -> None:
        whole, shard = cluster.view.map, a_shard(cluster)
        assert whole is not None
        primary, (replica,) = shard.primary.node, shard.replicas
        cluster.view._replicas = 3
        cluster.lost_disks.add()
        assert cluster.lost_disks.may_be_more(primary)
        resident = cluster.view.resident(replica.node, shard.id)
        assert resident is not None
        salvaged = Salvaged(shard.store_id, replica.copy_id, 1, whole)
        resident.local.damaged = DamagedCopy(shard.id, DataCorrupt("wrong"), salvaged)
        assert not cluster.lost_disks.may_be_more(primary)
        resident.local.damaged = None
        out = msgspec.structs.replace(shard, replicas=[msgspec.structs.replace(replica, state="joining")])
        put(cluster, msgspec.structs.replace(whole, shards=[out if s.id == shard.id else s for s in whole.shards]))
        assert not cluster.lost_disks.may_be_more(primary)

    run(cluster, work)


def test_a_shard_that_joined_again_after_its_node_was_ended_is_removed(cluster: Cluster) -> None:
    """Its request was under way."""

    async def work() -> None:
        name = cluster.add_shard()
        assert name is not None
        while not cluster.view.is_member(name):
            await asyncio.sleep(0.01)
        node = cluster.nodes[name]
        assert node.process is not None
        node.wanted = False
        node.process.kill()
        del cluster.nodes[name]
        while not is_replicated(cluster.view):
            await remove_gone(cluster)
            await asyncio.sleep(0.1)
        assert not cluster.view.is_member(name)

    run(cluster, work)


def document(cluster_map: ClusterMap) -> bytes:
    return msgspec.json.encode(ClusterState(map=cluster_map))


def put(cluster: Cluster, cluster_map: ClusterMap) -> None:
    """Into the controller's store."""
    register = cluster.controller.register
    register.stored = register.stored._replace(document=document(cluster_map))


# --- what is no violation


def a_map(epoch: int) -> ClusterMap:
    """Shards s1 and s2 without copies."""
    homes = [at_home(shard, f"http://{shard}", f"store-{shard}") for shard in ("s1", "s2")]
    return msgspec.structs.replace(first_map("c", 64, homes), epoch=epoch)


def test_a_store_is_opened_again_in_its_term_only_if_a_map_named_no_copy_of_it() -> None:
    maps: list[bytes] = []
    invariants = Invariants(View({}, lambda: maps[-1] if maps else None))
    invariants.terms.note_start("store-s1", 1, "first")
    with pytest.raises(Violation, match="in which start first has"):
        invariants.terms.note_start("store-s1", 1, "second")
    maps.append(document(a_map(2)))
    invariants.maps.check()
    invariants.terms.note_start("store-s1", 1, "third")
    with pytest.raises(Violation, match="in which start third has"):
        invariants.terms.note_start("store-s1", 1, "first")


def test_clocks_of_a_store_never_fall_but_another_store_of_that_name_begins_anew(cluster: Cluster) -> None:
    async def work() -> None:
        shard = a_shard(cluster)
        resident = cluster.view.resident(shard.id, shard.id)
        assert resident is not None
        assert resident.local.store is not None
        store, place = resident.local.store, (shard.id, shard.id)
        tables, engine = store.tables, store.tables.engine
        assert isinstance(engine, MemoryEngine)
        identity, visible = engine.identity, tables.visible
        tables.visible = visible._replace(version=0)
        engine.identity = identity._replace(store_id="another")
        cluster.invariants.stores.check(place, store)
        engine.identity = identity
        tables.visible = visible._replace(version=1)
        with pytest.raises(Violation, match="version, sequence, floor went from"):
            cluster.invariants.stores.check(place, store)
        tables.visible = visible

    run(cluster, work)


def test_a_node_without_a_shard_is_no_removed_one_while_the_map_names_it(cluster: Cluster) -> None:
    def store(nodes: Sequence[Node]) -> None:
        put(cluster, msgspec.structs.replace(a_map(2), nodes=list(nodes)))

    members = a_map(2).nodes
    store([*members, Node(id="s3", url="http://s3")])
    assert not cluster.nodes["s3"].is_removed()
    store(members)
    assert cluster.nodes["s3"].is_removed()


class Chooses(random.Random):
    """That node, and the file in which its copy of the shard keeps who it is."""

    def __init__(self, node: NodeServer, shard_id: str) -> None:
        super().__init__(0)
        self._node = node
        self._name = f"shard-{shard_id}.copy-{node.name}.id"

    def choice(self, found: Sequence[Any]) -> Any:
        return self._node if self._node in found else next(path for path in found if path.name == self._name)

    def randrange(self, *_: Any) -> int:
        return 60  # in the first word of the document


def test_damage_to_the_only_copy_in_sync_is_mended_so_that_it_serves_again(cluster: Cluster) -> None:
    async def work() -> None:
        home = cluster.nodes[a_shard(cluster).id]
        home.wanted = False
        assert home.process is not None
        home.process.kill()
        while (shard := a_shard(cluster)).primary.node == home.name or "in-sync" in {e.state for e in shard.replicas}:
            await asyncio.sleep(0.1)
        await flip_a_bit(cluster, Chooses(cluster.nodes[shard.primary.node], shard.id))
        home.wanted = True
        home.start()
        await replicated(cluster)

    run(cluster, work)


def test_damage_to_the_copy_of_a_store_whose_disk_is_lost_elsewhere_is_mended_so_that_it_serves_again(
    cluster: Cluster,
) -> None:
    async def work() -> None:
        shard = a_shard(cluster)
        cluster.lose_disk(cluster.nodes[shard.primary.node])
        await flip_a_bit(cluster, Chooses(cluster.nodes[shard.replicas[0].node], shard.id))
        await replicated(cluster)

    run(cluster, work)


def test_a_damaged_copy_that_its_node_leaves_alone_although_a_map_there_has_its_shard_is_found(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> None:
        """As if no map were found."""

    async def work() -> None:
        shard = a_shard(cluster)
        node = cluster.nodes[shard.replicas[0].node]
        monkeypatch.setattr(node.folder, "salvage", nothing)
        await flip_a_bit(cluster, Chooses(node, shard.id))

    async def until_found() -> None:
        await asyncio.wait({cluster.failed, asyncio.ensure_future(work())}, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Violation, match="left alone"):
            cluster.failed.result()

    run(cluster, until_found)


def test_a_damaged_copy_that_its_node_leaves_alone_is_mended_where_no_map_there_has_its_shard(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> None:
        """As where each file and log there is new, or damaged."""

    monkeypatch.setattr("loadtest.simulate.node._check_unknown", lambda *_: None)

    async def work() -> None:
        shard = a_shard(cluster)
        (copy,) = shard.replicas
        node = cluster.nodes[copy.node]
        monkeypatch.setattr(node.folder, "salvage", nothing)
        await flip_a_bit(cluster, Chooses(node, shard.id))
        await replicated(cluster)
        assert cluster.view.has(copy.node, shard.id, copy.copy_id)

    run(cluster, work)
