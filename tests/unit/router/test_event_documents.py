"""The documents of events: runs of partitions, rates of shards, locks and attempts put together."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvstore.metrics import ShardStats
from kvstore.placement.cluster_map import Move, Replica, Strike, at_home, first_map, map_of
from kvstore.placement.ring import key_hash
from kvstore.router.cluster_documents import under_replicated
from kvstore.router.event_documents import (
    CHANGES_ENDED_MAX,
    Sample,
    changes_document,
    changes_identity,
    locks_document,
    locks_identity,
    map_document,
    shard_documents,
    transactions_document,
    transactions_identity,
)

MEMBERS = [at_home(name, f"http://{name}", name) for name in ("s1", "s2")]
MAP = first_map("c", 64, MEMBERS)
NOTHING: dict[str, Any] = {"leases_count": 0, "leases": [], "attempts_count": 0, "intents": 0, "attempts": []}


def sample(at_s: float, hits: int = 0, writes: int = 0, **stats: Any) -> Sample:
    shard = ShardStats(cache_hits=hits, **stats)
    for _ in range(writes):
        shard.batch_ops.observe(1)
        shard.commit_s.observe(0.0025)
    return Sample(shard, NOTHING, at_s)


def attempt(age_s: float, *keys: str, abandoned: bool = False) -> dict[str, Any]:
    return {
        "id": "1-a", "anchor": "k", "keys": list(keys), "keys_count": len(keys), "age_s": age_s, "abandoned": abandoned
    }  # fmt: skip


def test_the_owners_of_a_map_come_back_from_their_runs() -> None:
    document = map_document(MAP)
    owners = [owner for owner, count in document["owners"] for _ in range(count)]
    assert owners == MAP.owners
    assert len(document["virtual_nodes"]) == 128
    assert all(0 <= point < 2**32 and owner in (0, 1) for point, owner in document["virtual_nodes"])
    assert document["virtual_nodes"] == sorted(document["virtual_nodes"])


def test_the_map_tells_where_each_node_stands_and_which_keep_copies() -> None:
    replica = Replica(node="s2", copy_id="b", state="in-sync", joined=1)
    first = msgspec.structs.replace(MAP.shards[0], replicas=[replica])
    document = map_document(msgspec.structs.replace(MAP, shards=[first, MAP.shards[1]], replicas=2))
    assert [(m["primary"], m["copies"]) for m in document["members"]] == [("s1", ["s2"]), ("s2", [])]
    assert [node["id"] for node in document["nodes"]] == ["s1", "s2"]
    points = {node["id"]: node["point"] for node in document["nodes"]}
    assert points == {name: key_hash(name.encode()) >> 32 for name in ("s1", "s2")}
    shard, _ = shard_documents(MAP, {}, {})
    assert (shard["primary"], shard["copies"]) == ("s1", [])


def test_the_log_and_what_of_it_is_not_in_the_file_yet_are_told() -> None:
    first, _ = shard_documents(MAP, {"s1": sample(2.0, log_bytes=4096, unapplied_rows=7, wal_bytes=1)}, {})
    assert (first["log_bytes"], first["unapplied_rows"]) == (4096, 7)


def test_partitions_are_told_as_runs() -> None:
    move = Move(id="m", source="s1", to="s2", partitions=[7, 8])
    moving = map_of(MEMBERS, cluster_id="c", epoch=2, partitions=64, owners=MAP.owners, moves=[move])
    assert map_document(moving)["moves"] == [{"from": "s1", "to": "s2", "partitions": [[7, 2]]}]


def test_of_changes_those_that_run_are_told_and_the_last_that_ended() -> None:
    ended = [{"id": f"e{n}", "state": "done", "seconds": 1.0} for n in range(CHANGES_ENDED_MAX + 5)]
    running = [{"id": f"r{n}", "state": "running", "seconds": 1.0} for n in range(2)]
    told = changes_document([running[0], *ended, running[1]])
    assert told == {"items": [running[0], *ended[:CHANGES_ENDED_MAX], running[1]]}
    assert changes_document(None) == {"items": None}


def test_the_time_that_passes_is_news_of_a_change_once_a_second() -> None:
    def at(seconds: float, **more: Any) -> Any:
        return changes_identity(changes_document([{"id": "a", "state": "running", "seconds": seconds, **more}]))

    assert at(1.2) == at(1.9) != at(2.0)
    assert at(1.2, progress=0.5) != at(1.2, progress=0.6)
    assert changes_identity(changes_document(None)) not in (None, at(1.2), changes_identity(changes_document([])))


def test_a_shard_that_was_given_up_is_told_with_whether_its_partitions_are_open() -> None:
    strike = Strike(shard="s3", store_id="x", epoch=4, partitions=[1, 2, 3], clock=9)
    struck = msgspec.structs.replace(MAP, strikes=[strike])
    told = {"shard": "s3", "epoch": 4, "partitions": 3, "opened": 0}
    assert map_document(struck)["lost"] == [told]
    after = msgspec.structs.replace(MAP, strikes=[msgspec.structs.replace(strike, opened=6)])
    assert map_document(after)["lost"] == [{**told, "opened": 6}]
    assert map_document(MAP)["lost"] == []


def test_a_ring_of_too_many_points_is_left_out() -> None:
    heavy = first_map("c", 64, [at_home("s1", "http://s1", "s1", weight=100)])
    assert map_document(heavy)["virtual_nodes"] == []


def test_the_rates_of_a_shard_are_those_since_the_sample_before() -> None:
    now = {"s1": sample(12.0, hits=300, writes=50), "s2": sample(12.0)}
    before = {"s1": sample(10.0, hits=100, writes=10)}
    first, second = shard_documents(MAP, now, before)
    assert (first["reads_per_s"], first["writes_per_s"]) == (100.0, 20.0)
    assert 2 <= first["commit_p99_ms"] <= 3
    assert (second["reads_per_s"], second["commit_p99_ms"]) == (0.0, None)


def test_a_shard_that_was_started_again_has_no_negative_rates() -> None:
    first, _ = shard_documents(MAP, {"s1": sample(12.0, hits=3)}, {"s1": sample(10.0, hits=900, writes=9)})
    assert (first["reads_per_s"], first["writes_per_s"]) == (0.0, 0.0)


def test_a_shard_that_does_not_answer_is_down_with_its_last_numbers() -> None:
    _, second = shard_documents(MAP, {"s1": sample(2.0), "s2": None}, {"s2": sample(1.0, keys=7)})
    assert (second["state"], second["keys"]) == ("down", 7)


def test_locks_come_by_name_with_their_shard() -> None:
    lease = {"name": "b", "owner": "me", "token": 3, "ttl": 9.0, "ttl_left": 8.0, "waiting": 1, "waiters": ["you"]}
    live = {"s2": {**NOTHING, "leases_count": 1, "leases": [lease]},
            "s1": {**NOTHING, "leases_count": 5, "leases": [{**lease, "name": "a"}]}}  # fmt: skip
    document = locks_document(live)
    assert [(item["name"], item["shard"]) for item in document["items"]] == [("a", "s1"), ("b", "s2")]
    assert document["count"] == 6


def test_time_that_passes_is_no_change_of_a_lock_and_a_renewal_is() -> None:
    def identity(ttl_left: float, now_s: float) -> list[Any]:
        lease = {"name": "b", "owner": "", "token": 3, "ttl": 9.0, "ttl_left": ttl_left, "waiting": 0, "waiters": []}
        return locks_identity(locks_document({"s1": {**NOTHING, "leases_count": 1, "leases": [lease]}}), now_s)

    assert identity(8.0, 100.0) == identity(7.5, 100.5)
    assert identity(8.0, 100.0) != identity(9.0, 100.5)


def test_an_attempt_that_holds_keys_in_two_shards_is_one() -> None:
    live = {
        "s1": {**NOTHING, "intents": 1, "attempts": [attempt(0.5, "a")]},
        "s2": {**NOTHING, "intents": 2, "attempts": [attempt(2.0, "b", "c", abandoned=True)]},
    }
    document = transactions_document(live)
    (item,) = document["items"]
    assert (item["age_s"], item["abandoned"], document["intents"]) == (2.0, True, 3)
    assert [part["shard"] for part in item["at"]] == ["s1", "s2"]
    older = transactions_document(
        {shard: {**facts, "attempts": [{**facts["attempts"][0], "age_s": 9.0}]} for shard, facts in live.items()}
    )
    assert transactions_identity(older) == transactions_identity(document)


@pytest.mark.parametrize(
    ("lag", "awaited"),
    [
        (None, "the copy on node s2"),
        (0, "the copy on node s2, which has every record by now"),
        (1200, "the copy on node s2, which is 1,200 records behind"),
    ],
)
def test_how_far_a_copy_is_that_is_waited_for_is_said(lag: int | None, awaited: str) -> None:
    shard = {"id": "s1", "state": "up", "copies": [{"node": "s2", "state": "joining", "lag": lag}]}
    document = {"replicas": 2, "nodes": [{"id": "s1"}, {"id": "s2"}], "shards": [shard]}
    (found,) = under_replicated(document, {"missing": {"s1": ["s2"]}, "silent": {}})
    assert found == {"shard": "s1", "in_sync": 1, "wanted": 2, "awaited": awaited}
