"""Beats: the form in which a node and the controller talk, and when a node talks at all."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.placement.cluster_map import ClusterMap, Replica, at_home, first_map
from kvstore.replication.beats import Asked, Beat, BeatAnswer, CopyReport, Echo, GiveBack, Make, beats
from kvstore.replication.configuration import Request


def cluster_map(replicas: int) -> ClusterMap:
    homes = [at_home(name, f"http://127.0.0.1:910{name[1]}", f"store-{name}") for name in ("s1", "s2")]
    return msgspec.structs.replace(first_map("c", 64, homes), replicas=replicas)


def test_nodes_do_not_beat_while_every_store_has_one_copy_and_is_to_have_one() -> None:
    assert not beats(cluster_map(1))


def test_nodes_beat_from_the_map_on_that_asks_for_copies() -> None:
    assert beats(cluster_map(2))


def test_nodes_beat_until_the_last_copy_is_gone_from_the_map() -> None:
    lowered = cluster_map(1)
    copy = Replica(node="s2", copy_id="b", state="joining", joined=2)
    shards = [msgspec.structs.replace(lowered.shards[0], replicas=[copy]), lowered.shards[1]]
    assert beats(msgspec.structs.replace(lowered, shards=shards))


def test_a_node_beats_as_long_as_it_keeps_a_copy_that_it_may_have_to_drop() -> None:
    assert beats(cluster_map(1), keeps_copies=True)


def test_what_is_asked_in_a_beat_has_the_fields_of_the_rules_request() -> None:
    assert Asked.__struct_fields__ == Request._fields


def test_a_beat_and_its_answer_are_the_same_after_the_way_over_the_wire() -> None:
    report = CopyReport(
        shard="s1", store_id="a", copy_id="b", role="primary", behind={"c": 3}, snapshots={"c": (10, 200)}
    )
    asked = Asked(kind="out", shard="s1", term=4, primary="b", copy_id="c", joined=3)
    echo = Echo(start="y", beat=7)
    beat = Beat(node="s1", start="x", cluster_id="k", epoch=4, echo=echo, copies=[report], requests=[asked])
    assert msgspec.json.decode(msgspec.json.encode(beat), type=Beat) == beat
    back = GiveBack(shard="s1", term=4, to="s2", copy_id="c")
    answer = BeatAnswer(
        start="y", beat=7, epoch=5, make=[Make(shard="s2", store_id="d", partitions=64)], give_back=[back]
    )
    assert msgspec.json.decode(msgspec.json.encode(answer), type=BeatAnswer) == answer


def test_a_beat_with_a_field_that_is_not_known_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"node":"s1","start":"x","cluster_id":"k","epoch":4,"role":"x"}', type=Beat)
