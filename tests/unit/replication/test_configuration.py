"""One shard's copies, out of the cluster map and back into it."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.placement.cluster_map import ClusterMap, Node, at_home, checked_map, first_map
from kvstore.replication import failover
from kvstore.replication.configuration import (
    Configuration,
    Primary,
    Replica,
    configuration_of,
    with_configuration,
)


def _map() -> ClusterMap:
    homes = [at_home(shard, f"http://{shard}", f"store-{shard}", copy_id=f"copy-{shard}") for shard in ("s1", "s2")]
    return first_map("cluster", 64, homes)


def test_a_shard_without_copies_has_its_home_alone() -> None:
    config = configuration_of(_map(), "s1")
    assert config == Configuration("s1", "store-s1", 1, 1, Primary("s1", "copy-s1"))
    assert configuration_of(_map(), "s9") is None


def test_every_change_of_a_configuration_comes_back_out_of_the_map_that_it_is_written_to() -> None:
    cluster_map = _map()
    alone = configuration_of(cluster_map, "s1")
    assert alone is not None
    named = failover.named(alone, "s2", "c2", 2)
    assert named is not None
    cluster_map = checked_map(with_configuration(cluster_map, named))
    assert configuration_of(cluster_map, "s1") == named
    synced = named._replace(epoch=3, replicas=(Replica("s2", "c2", "in-sync", 2),))
    cluster_map = with_configuration(cluster_map, synced)
    promoted = failover.promoted(synced, "s2", "c2", 4)
    assert promoted is not None
    cluster_map = checked_map(with_configuration(cluster_map, promoted))
    assert configuration_of(cluster_map, "s1") == promoted
    decoded = msgspec.json.decode(msgspec.json.encode(cluster_map), type=ClusterMap)
    assert configuration_of(decoded, "s1") == promoted


def test_the_other_shards_and_the_owners_stay_as_they_are() -> None:
    before = _map()
    config = configuration_of(before, "s1")
    assert config is not None
    after = with_configuration(before, config._replace(epoch=2, term=2))
    assert after.epoch == 2
    assert (after.shards[1], after.owners, after.nodes) == (before.shards[1], before.owners, before.nodes)


@pytest.mark.parametrize("changes", [{"epoch": 1}, {"epoch": 3}, {"epoch": 2, "shard": "s9"}])
def test_a_configuration_goes_only_into_the_next_map_of_a_cluster_that_has_the_shard(
    changes: dict[str, object],
) -> None:
    config = configuration_of(_map(), "s1")
    assert config is not None
    with pytest.raises(ValueError, match="does not follow"):
        with_configuration(_map(), config._replace(**changes))  # type: ignore[arg-type]


def test_a_node_of_a_copy_must_be_in_the_map() -> None:
    config = configuration_of(_map(), "s1")
    assert config is not None
    foreign = with_configuration(_map(), config._replace(epoch=2, replicas=(Replica("n9", "c9", "joining", 2),)))
    with pytest.raises(ValueError, match="node"):
        checked_map(foreign)
    nodes = [*foreign.nodes, Node(id="n9", url="http://n9")]
    assert checked_map(msgspec.structs.replace(foreign, nodes=nodes))
