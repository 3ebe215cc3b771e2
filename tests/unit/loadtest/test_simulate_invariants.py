"""Each invariant that is looked at between events is seen to fail in a state that breaks it, and in no other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import pytest

from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import ClusterState
from kvstore.controller.move_tries import Try
from kvstore.placement.cluster_map import ClusterMap, Move, Shard
from kvstore.placement.moves import committed
from kvstore.replication.copy import StoreCopy
from kvstore.replication.lease import Granted
from kvstore.shard.resident import Resident
from kvstore.storage.memory import MemoryEngine
from kvstore.store.store import Store
from loadtest.simulate import term_invariants
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.cluster_clients import Client, History
from loadtest.simulate.copy_invariants import check_opener, check_opening
from loadtest.simulate.ending import is_replicated
from loadtest.simulate.invariants import Invariants
from loadtest.simulate.loop import SimulatedLoop
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.term_invariants import check_asked, check_change, check_commit, check_given_up
from loadtest.simulate.view import View
from loadtest.workloads.calls import Call

KEYS = 12


class Settled(NamedTuple):
    """A cluster with two copies of each key, between two events. `shard` has rows."""

    cluster: Cluster
    shard: Shard
    primary: Resident
    copy: StoreCopy

    @property
    def place(self) -> tuple[str, str]:
        return self.shard.primary.node, self.shard.id

    @property
    def store(self) -> Store:
        assert self.primary.local.hosted is not None
        return self.primary.local.hosted.store

    @property
    def invariants(self) -> Invariants:
        """That have seen nothing yet."""
        return Invariants(self.cluster.view)


@pytest.fixture(scope="module")
def settled() -> Iterator[Settled]:
    loop = SimulatedLoop()
    cluster = Cluster(loop, 5, replicas=2)
    loop.after_event = cluster.check

    async def fill() -> None:
        loop.create_task(cluster.run())
        client = Client("c1", cluster, History(cluster))
        for number in range(KEYS):
            call = Call("key", "PUT", f"/v1/kv/k{number}", b"v")
            while (await client.ask(call)).status not in (200, 201, 204):
                await asyncio.sleep(0.2)
        while not is_replicated(cluster.view):
            await asyncio.sleep(0.1)
        await asyncio.sleep(5)  # until all is applied

    loop.run_until_complete(asyncio.wait_for(fill(), 300))
    found = cluster.view.map
    assert found is not None
    shard = found.owner_of(b"k0")
    primary, guest = (
        cluster.view.resident(shard.primary.node, shard.id),
        cluster.view.resident(shard.replicas[0].node, shard.id),
    )
    assert primary is not None
    assert guest is not None
    assert guest.local.copy is not None
    yield Settled(cluster, shard, primary, guest.local.copy)
    loop.end()


def test_in_a_cluster_at_rest_nothing_is_found(settled: Settled) -> None:
    invariants = settled.invariants
    for _ in range(2):
        invariants.maps.check()
        for node in settled.cluster.nodes.values():
            invariants.check(node)


# --- a store


def test_what_is_applied_is_visible_and_what_is_visible_durable(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = settled.store.tables.log
    settled.invariants.stores.check(settled.place, settled.store)
    monkeypatch.setattr(log, "synced", log.synced._replace(number=settled.store.applier.visible - 1))
    with pytest.raises(Violation, match=r"applied \d+, visible \d+, durable"):
        settled.invariants.stores.check(settled.place, settled.store)


def test_what_is_visible_is_committed(settled: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = settled.store.tables.sender
    assert sender is not None
    below = sender.shipping._replace(committed=settled.store.applier.visible - 1)
    monkeypatch.setattr(sender, "shipping", below)
    with pytest.raises(Violation, match="is visible, not committed"):
        settled.invariants.primaries.check(settled.shard.id, settled.store)


def test_what_is_committed_is_on_the_disk_of_each_copy_in_sync(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = settled.copy.log
    monkeypatch.setattr(log, "synced", log.synced._replace(number=log.synced.number - 1))
    with pytest.raises(Violation, match=r"in-sync, .* committed records on its disk"):
        settled.invariants.primaries.check(settled.shard.id, settled.store)


@pytest.mark.parametrize("lacks", [0, 1])
def test_what_is_committed_is_on_the_disk_of_each_copy_that_is_asked_for_as_in_sync(
    settled: Settled, monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    sender, log, replica = settled.store.tables.sender, settled.copy.log, settled.shard.replicas[0]
    assert sender is not None
    joining = tuple(link._replace(in_sync=False) for link in sender.shipping.links)
    shard = msgspec.structs.replace(settled.shard, replicas=[msgspec.structs.replace(replica, state="joining")])
    monkeypatch.setattr(sender, "shipping", sender.shipping._replace(links=joining))
    monkeypatch.setattr(settled.cluster.view, "shard", lambda _: shard)
    monkeypatch.setattr(log, "synced", log.synced._replace(number=sender.shipping.committed - lacks))
    invariants = settled.invariants
    invariants.primaries._shipping[settled.store.copy_id] = sender.shipping._replace(links=())
    with pytest.raises(Violation, match=r"joining, .* asked for as in sync") if lacks else nullcontext():
        invariants.primaries.check(settled.shard.id, settled.store)


def test_rows_are_disputed_by_no_copy(settled: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled.store.tables.stats, "copies_differed", 1)
    with pytest.raises(Violation, match="not the same in its copies"):
        settled.invariants.primaries.check(settled.shard.id, settled.store)


def test_a_partition_has_one_owner_that_may_answer(settled: Settled) -> None:
    invariants = settled.invariants
    others = [node for node in settled.cluster.nodes.values() if node.name != settled.shard.primary.node]
    for node in others:
        invariants.check(node)
    invariants.owners._serving = dict.fromkeys(
        range(len(settled.store.served.generations)), (others[0].name, others[0].name)
    )
    with pytest.raises(Violation, match="is served by"):
        invariants.owners._note(settled.place, settled.store)


# --- a copy


def test_a_promise_never_falls(settled: Settled) -> None:
    invariants, copy_id = settled.invariants, settled.copy.following.copy_id
    invariants.copies._promised[copy_id] = settled.copy.following.promised + 1
    with pytest.raises(Violation, match="has promised"):
        invariants.copies.check(settled.shard.id, settled.copy)


def test_a_copy_follows_the_term_that_it_has_promised(settled: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    following = settled.copy.following
    monkeypatch.setattr(settled.copy.notes, "following", following._replace(promised=following.promised + 1))
    with pytest.raises(Violation, match="follows term"):
        settled.invariants.copies.check(settled.shard.id, settled.copy)


def test_in_one_session_the_file_of_a_copy_never_goes_back(settled: Settled) -> None:
    invariants, copy = settled.invariants, settled.copy
    invariants.copies.check(settled.shard.id, copy)
    seen = invariants.copies._seen[copy.identity.copy_id]
    ahead = seen.position._replace(number=seen.position.number + 1)
    invariants.copies._seen[copy.identity.copy_id] = seen._replace(position=ahead)
    with pytest.raises(Violation, match="back to"):
        invariants.copies.check(settled.shard.id, copy)


def test_nothing_but_records_changes_the_rows_of_a_copy_that_is_whole(settled: Settled) -> None:
    invariants, copy = settled.invariants, settled.copy
    invariants.copies.check(settled.shard.id, copy)
    seen = invariants.copies._seen[copy.identity.copy_id]
    earlier = seen._replace(applications=seen.applications - 1)
    record_before = seen.position._replace(number=seen.position.number - 1)
    was_filling = earlier._replace(identity=earlier.identity._replace(filling=True))
    for other in (was_filling, earlier._replace(position=record_before)):
        invariants.copies._seen[copy.identity.copy_id] = other
        invariants.copies.check(settled.shard.id, copy)
    invariants.copies._seen[copy.identity.copy_id] = earlier
    with pytest.raises(Violation, match="were changed by no record"):
        invariants.copies.check(settled.shard.id, copy)


@pytest.mark.parametrize("lacks", [True, False])
def test_a_copy_that_a_snapshot_has_just_filled_has_the_rows_of_its_primary(
    settled: Settled, monkeypatch: pytest.MonkeyPatch, lacks: bool
) -> None:
    engine = settled.copy.engine
    assert isinstance(engine, MemoryEngine)
    rows = dict(engine._rows)
    key = next(key for key in rows if key[0] == "value")
    if lacks:
        del rows[key]
    else:
        rows[key] = rows[key]._replace(body=b"of another time")
    invariants = settled.invariants
    invariants.copies._filling[settled.copy.identity.copy_id] = None
    invariants.copies.check(settled.shard.id, settled.copy)
    invariants.copies._seen.clear()
    invariants.copies._filling[settled.copy.identity.copy_id] = None
    monkeypatch.setattr(engine, "_rows", rows)
    with pytest.raises(Violation, match="is filled, and has"):
        invariants.copies.check(settled.shard.id, settled.copy)


def test_no_row_of_a_copy_that_a_snapshot_has_just_filled_is_newer_than_its_last_record(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, copy_id = settled.copy.engine, settled.copy.identity.copy_id
    assert isinstance(engine, MemoryEngine)
    rows, clock = dict(engine._rows), engine.applied.clock
    key = next(key for key in rows if key[0] == "value")
    rows[key] = rows[key]._replace(version=clock.version + 1)
    monkeypatch.setattr(engine, "_rows", rows)
    invariants = settled.invariants
    invariants.copies._filling[copy_id] = None
    with pytest.raises(Violation, match=rf"rows up to version {clock.version + 1}, which are newer than record"):
        invariants.copies.check(settled.shard.id, settled.copy)


# --- terms and maps


def test_a_copy_that_opens_a_term_has_granted_nothing_that_lasts_and_no_primary_may_answer_beside_it(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, shard, copy = settled.cluster.view, settled.shard, settled.copy
    guest, sender = view.resident(shard.replicas[0].node, shard.id), settled.store.tables.sender
    assert guest is not None
    assert sender is not None
    next_term = sender.shipping.config.term + 1
    opening = SimpleNamespace(config=sender.shipping.config._replace(term=next_term))
    monkeypatch.setattr(guest, "_opening", opening)
    check_opener(view, shard.id, guest, copy)  # not as long as it is not promised
    monkeypatch.setattr(copy.notes, "following", copy.following._replace(promised=next_term))
    with pytest.raises(Violation, match=f"opens term {next_term}, and what it has granted lasts"):
        check_opener(view, shard.id, guest, copy)
    monkeypatch.setattr(copy.lease, "given", Granted(0.0))
    with pytest.raises(Violation, match=rf"opened in term {next_term}, and may be answered in term {next_term - 1} on"):
        check_opener(view, shard.id, guest, copy)
    monkeypatch.setattr(sender.lease, "_until", 0.0)
    check_opener(view, shard.id, guest, copy)


def test_no_primary_may_answer_while_a_copy_opens_a_higher_term(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, sender = settled.shard.replicas[0].node, settled.store.tables.sender
    guest = settled.cluster.view.resident(node, settled.shard.id)
    assert sender is not None
    settled.invariants.primaries.check(settled.shard.id, settled.store)
    next_term = sender.shipping.config.term + 1
    opening = SimpleNamespace(config=sender.shipping.config._replace(term=next_term))
    monkeypatch.setattr(guest, "_opening", opening)
    settled.invariants.primaries.check(settled.shard.id, settled.store)  # not as long as it is not promised
    monkeypatch.setattr(settled.copy.notes, "following", settled.copy.following._replace(promised=next_term))
    with pytest.raises(Violation, match=rf"may be answered in term \d+ while {node} opens term {next_term}"):
        settled.invariants.primaries.check(settled.shard.id, settled.store)


def test_a_term_begins_with_all_that_each_copy_in_sync_has(settled: Settled) -> None:
    sender = settled.store.tables.sender
    assert sender is not None
    shipping, last = sender.shipping, settled.copy.log.last
    check_opening(settled.cluster.view, settled.shard.id, shipping)
    above = settled.copy.following.promised
    config = shipping.config._replace(term=above)
    log_of_older_term = last._replace(term=above - 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(settled.copy.log, "last", log_of_older_term)
        with pytest.raises(Violation, match="has record"):
            check_opening(settled.cluster.view, settled.shard.id, shipping._replace(config=config, opening=last.number))


def test_the_primary_changes_in_a_higher_term_to_a_copy_in_sync(settled: Settled) -> None:
    before = settled.shard
    copy = before.replicas[0]
    heir = msgspec.structs.replace(before.primary, node=copy.node, copy_id=copy.copy_id)
    after = msgspec.structs.replace(before, primary=heir, replicas=[], term=before.term + 1)
    check_change(before, after)
    with pytest.raises(Violation, match="another primary in the same term"):
        check_change(before, msgspec.structs.replace(after, term=before.term))
    with pytest.raises(Violation, match="the term of shard"):
        check_change(before, msgspec.structs.replace(before, term=before.term - 1))
    joining = msgspec.structs.replace(before, replicas=[msgspec.structs.replace(copy, state="joining")])
    with pytest.raises(Violation, match="which was not in sync"):
        check_change(joining, after)
    with pytest.raises(Violation, match="two copies of shard"):
        check_change(before, msgspec.structs.replace(after, replicas=[copy]))


def test_a_move_is_committed_once_its_source_is_frozen_and_its_destination_has_written_down_that_all_has_come(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settled.cluster.view.map
    assert found is not None
    to = next(each for each in found.shards if each.id != settled.shard.id)
    destination = settled.cluster.view.primary(to.id)
    assert destination is not None
    move = Move(id="m1", source=settled.shard.id, to=to.id, partitions=[1])

    def note(store: Store) -> None:
        view = store.partitions.view
        monkeypatch.setattr(store.partitions, "view", view._replace(freezes={"m1": frozenset()}))

    with pytest.raises(Violation, match=f"the primary of {move.source} has not frozen"):
        check_commit(settled.cluster.view, found, move)
    note(settled.store)
    with pytest.raises(Violation, match=f"the primary of {move.to} has not written down"):
        check_commit(settled.cluster.view, found, move)
    lost = msgspec.structs.replace(to, primary=msgspec.structs.replace(to.primary, copy_id="lost with its disk"))
    both = [lost if each is to else each for each in found.shards]
    check_commit(settled.cluster.view, msgspec.structs.replace(found, shards=both), move)
    note(destination)
    check_commit(settled.cluster.view, found, move)


def test_a_move_is_committed_to_a_shard_with_as_many_copies_in_sync_as_its_source_has(settled: Settled) -> None:
    found = settled.cluster.view.map
    assert found is not None
    to = next(each for each in found.shards if each.id != settled.shard.id)
    bare = msgspec.structs.replace(
        to, replicas=[msgspec.structs.replace(each, state="joining") for each in to.replicas]
    )
    both = msgspec.structs.replace(found, shards=[bare if each is to else each for each in found.shards])
    with pytest.raises(Violation, match=f"{to.id} has 0 copies in sync, and {settled.shard.id} 1"):
        check_commit(settled.cluster.view, both, Move(id="m1", source=settled.shard.id, to=to.id, partitions=[1]))


def test_no_node_is_given_up_while_more_are_away_than_may_be(settled: Settled) -> None:
    before = settled.cluster.view.map
    assert before is not None
    one, other = (node.id for node in before.nodes[:2])
    nodes = [msgspec.structs.replace(node, given_up=node.id == one) for node in before.nodes]
    after = msgspec.structs.replace(before, nodes=nodes)
    check_given_up(before, after, [one])
    check_given_up(before, before, [one, other])
    check_given_up(after, after, [one, other])
    with pytest.raises(Violation, match=f"{one} is given up, and 2 of 4 nodes are away"):
        check_given_up(before, after, [one, other])


def test_no_move_is_committed_while_more_nodes_are_held_for_dead_than_may_be(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, view, found = settled.cluster, settled.cluster.view, settled.cluster.view.map
    assert found is not None
    (one, other, *_), to = found.nodes, next(each.id for each in found.shards if each.id != settled.shard.id)
    move = Move(id="m1", source=settled.shard.id, to=to, partitions=found.owned_by(settled.shard.id)[:1])
    before = msgspec.structs.replace(found, moves=[move])
    shown: list[ClusterMap] = []
    monkeypatch.setattr(term_invariants, "check_commit", lambda *_: None)

    def check(dead: list[str]) -> None:
        maps = settled.invariants.maps
        with monkeypatch.context() as patched:
            patched.setattr(type(view), "map", property(lambda _: shown[-1]))
            patched.setattr(view.controller, "is_held_for_dead", dead.__contains__)
            for each in (before, committed(before, "m1")):
                shown.append(each)
                maps.check()
                patched.setattr(cluster.loop, "_now_s", cluster.loop.now_s + 1.0)

    check([one.id])
    with pytest.raises(Violation, match="move m1 is committed, and 2 of 4 nodes are away"):
        check([one.id, other.id])


def test_no_move_begins_while_more_nodes_are_held_for_dead_than_may_be(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, view, found = settled.cluster, settled.cluster.view, settled.cluster.view.map
    assert found is not None
    dead, move = [node.id for node in found.nodes[:2]], Try(Move(id="m1", source="s1", to="s2", partitions=[1]))
    maps = settled.invariants.maps
    monkeypatch.setattr(view.controller, "is_held_for_dead", dead.__contains__)
    monkeypatch.setattr(view.controller, "tries", lambda: [move])
    maps.check()
    move.step = "copy"
    maps.check()  # it may have begun before
    move.step = "waiting"
    maps.check()
    monkeypatch.setattr(cluster.loop, "_now_s", cluster.loop.now_s + 2.0)
    maps.check()
    move.step = "tail"
    with pytest.raises(Violation, match="move m1 begins, and 2 of 4 nodes are away"):
        maps.check()


def test_a_store_is_served_with_all_of_which_the_controller_was_told(settled: Settled) -> None:
    told, store = settled.cluster.controller.register.told, settled.store
    store_id = store.identity.store_id
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(told, store_id, Told(store.durable))
        settled.invariants.owners.check(settled.place, store)
        patched.setitem(told, store_id, Told(store.durable + 1))
        with pytest.raises(Violation, match=rf"and the controller was told of {store.durable + 1}"):
            settled.invariants.owners.check(settled.place, store)


def test_no_copy_is_taken_out_in_a_term_whose_primary_is_away(settled: Settled) -> None:
    shard = settled.shard
    without = msgspec.structs.replace(shard, replicas=[])
    check_asked(shard, without, 1.0)
    check_asked(shard, shard, 60.0)
    check_asked(shard, msgspec.structs.replace(without, term=shard.term + 1), 60.0)
    with pytest.raises(Violation, match="its primary is away for"):
        check_asked(shard, without, 60.0)


def test_a_copy_whose_node_has_lost_it_is_not_in_sync_whether_or_not_its_primary_is_away(settled: Settled) -> None:
    shard = settled.shard
    (copy,) = shard.replicas
    other = msgspec.structs.replace(copy, copy_id="another", state="joining", joined=copy.joined + 1)
    check_asked(shard, msgspec.structs.replace(shard, replicas=[other]), 60.0)
    moved = msgspec.structs.replace(other, node="elsewhere")
    with pytest.raises(Violation, match="its primary is away for"):
        check_asked(shard, msgspec.structs.replace(shard, replicas=[moved]), 60.0)


class Maps:
    """Invariants of maps, which are shown one after the other."""

    def __init__(self, settled: Settled) -> None:
        shown = self._shown = list[ClusterMap]()
        found = settled.cluster.view.map
        assert found is not None
        self.first = found
        view = View(settled.cluster.nodes, lambda: msgspec.json.encode(ClusterState(map=shown[-1])))
        self.of = Invariants(view)
        self.view = view

    def show(self, cluster_map: ClusterMap) -> None:
        self._shown.append(cluster_map)
        self.of.maps.check()

    def later(self, epochs: int, shard: Shard | None = None) -> ClusterMap:
        """The first one so many epochs later, with that shard in it."""
        shards = [shard if shard is not None and each.id == shard.id else each for each in self.first.shards]
        return msgspec.structs.replace(self.first, epoch=self.first.epoch + epochs, shards=shards)


def in_next_term(shard: Shard, epoch: int) -> Shard:
    """Its copy has taken over."""
    heir, old = shard.replicas[0], shard.primary
    primary = msgspec.structs.replace(old, node=heir.node, copy_id=heir.copy_id)
    copy = msgspec.structs.replace(heir, node=old.node, copy_id=old.copy_id)
    return msgspec.structs.replace(shard, term=epoch, primary=primary, replicas=[copy])


def test_the_epochs_of_maps_rise_but_where_an_old_record_is_put_back(settled: Settled) -> None:
    maps = Maps(settled)
    maps.show(maps.later(2))
    with pytest.raises(Violation, match="is followed by one of epoch"):
        maps.show(maps.later(1))
    maps = Maps(settled)
    maps.show(maps.later(3))
    maps.of.maps.put_back()
    assert maps.view.is_behind
    maps.show(maps.first)
    maps.show(maps.later(1))
    assert maps.view.is_behind
    maps.show(maps.later(1_000_000))
    assert not maps.view.is_behind


def test_a_term_is_given_to_one_copy_also_by_a_controller_with_an_old_record(settled: Settled) -> None:
    maps, shard = Maps(settled), settled.shard
    epoch = maps.first.epoch + 1
    heir = in_next_term(shard, epoch)
    maps.show(maps.first)
    maps.show(maps.later(1, heir))
    maps.of.maps.put_back()
    maps.show(maps.first)
    with pytest.raises(
        Violation, match=f"term {epoch} of shard {shard.id} is given to .* and was to {heir.primary.copy_id}"
    ):
        maps.show(maps.later(1, msgspec.structs.replace(shard, term=epoch)))


def test_what_is_made_of_an_old_record_takes_no_partition_from_the_store_that_serves_it(settled: Settled) -> None:
    maps, shard = Maps(settled), settled.shard
    maps.of.owners._note(settled.place, settled.store)
    others = [at for at, each in enumerate(maps.first.shards) if each.id != shard.id]
    moved = maps.first.owned_by(shard.id)[0]
    owners = [others[0] if partition == moved else owner for partition, owner in enumerate(maps.first.owners)]
    before = msgspec.structs.replace(maps.first, owners=owners)
    maps.show(maps.later(1))
    maps.of.maps.put_back()
    maps.show(before)
    where = f"partition {moved} is served by {shard.primary.node} of {shard.id}, and the map gives it to"
    with pytest.raises(Violation, match=where):
        maps.show(msgspec.structs.replace(before, epoch=maps.first.epoch + 2))


def test_of_each_epoch_the_nodes_follow_one_map(settled: Settled) -> None:
    maps, shard = Maps(settled), settled.shard
    one, other = maps.later(1), maps.later(1, in_next_term(shard, maps.first.epoch + 1))
    maps.of.maps.check_followed("s1", one)
    maps.of.maps.check_followed("s2", maps.later(1))
    maps.of.maps.check_followed("s2", maps.later(2))
    with pytest.raises(Violation, match=f"s3 follows a map of epoch {one.epoch}, of which there is another one"):
        maps.of.maps.check_followed("s3", other)


def test_the_disk_of_a_node_that_opens_a_store_is_not_lost(settled: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    disks, node = settled.cluster.lost_disks, settled.shard.primary.node
    assert disks.may_be_more(node)
    monkeypatch.setattr(settled.primary.local.hosted, "is_open", False)
    assert not disks.may_be_more(node)


def test_a_node_is_away_for_as_long_as_it_and_the_controller_are_looked_at(
    settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, loop = settled.invariants.maps, settled.cluster.loop
    node = next(iter(settled.cluster.nodes.values()))
    maps.check()
    with monkeypatch.context() as dead:
        dead.setattr(type(node), "is_alive", property(lambda server: server is not node))
        for passed_s in (0.2, 60.0):  # in the second one, no event of the controller
            dead.setattr(loop, "_now_s", loop.now_s + passed_s)
            maps.check()
        assert maps._away_s[node.name] == pytest.approx(0.7)
    maps.check()
    assert not any(maps._away_s.values())


def test_a_recovered_map_may_lack_a_term_that_no_process_has_served_and_no_other(settled: Settled) -> None:
    found = settled.cluster.view.map
    assert found is not None

    def in_term(term: int) -> bytes:
        shards = [
            msgspec.structs.replace(each, term=term) if each.id == settled.shard.id else each for each in found.shards
        ]
        later = msgspec.structs.replace(found, epoch=next(epochs), shards=shards)
        return msgspec.json.encode(ClusterState(map=later))

    stored: list[bytes | None] = []
    epochs = count(found.epoch)
    term = settled.shard.term
    invariants = Invariants(View(settled.cluster.nodes, lambda: stored[-1]))
    invariants.owners._note(settled.place, settled.store)
    for each in (in_term(term + 1), None, in_term(term), None):
        stored.append(each)
        invariants.maps.check()
    stored.append(in_term(term - 1))
    with pytest.raises(Violation, match=f"was served in term {term}, and the recovered map has {term - 1}"):
        invariants.maps.check()
