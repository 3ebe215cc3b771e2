"""What `kvstore status` and `kvstore shard list` say of copies, from documents of GET /v1/cluster."""

from __future__ import annotations

from typing import Any

from kvstore.cli.cluster import _status, copies_text
from kvstore.cli.shards import _line


def shard(name: str, *copies: dict[str, Any], primary: str = "") -> dict[str, Any]:
    return {
        "id": name, "url": f"http://{name}", "state": "up", "weight": 1, "partitions": 32, "keys": 5, "bytes": 100,
        "primary": primary or name, "term": 3, "copies": list(copies),
    }  # fmt: skip


SYNCED = {"node": "s2", "state": "in-sync", "lag": 0}
BEHIND = {"node": "s2", "state": "in-sync", "lag": 1200}
JOINING = {"node": "s3", "state": "joining", "lag": None, "rows_done": 40, "rows_total": 100}


def document(replicas: int, *shards: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"cluster_id": "k", "epoch": 7, "partitions": 64, "replicas": replicas, "shards": list(shards), **more}


def test_each_copy_is_told_with_what_it_lacks() -> None:
    assert copies_text(shard("s1", SYNCED)) == "s2 in sync"
    assert copies_text(shard("s1", BEHIND, JOINING)) == "s2 in sync, 1,200 behind, s3 joining 40%"
    assert copies_text(shard("s1")) == "none"


def test_status_shows_copies_what_is_under_replicated_what_comes_next_and_the_last_failovers() -> None:
    under = {"shard": "s2", "in_sync": 1, "wanted": 2, "awaited": "node s3, which is silent, or another place in 540 s"}
    failover = {
        "shard": "s1", "to": "s2", "at": "2026-11-28T21:14:03.250Z", "seconds": 2.1,
        "cause": "Node s1 was silent; node s2 took over and served after 2.1 s.",
    }  # fmt: skip
    told = document(2, shard("s1", SYNCED, primary="s2"), shard("s2"), under_replicated=[under], failovers=[failover])
    said = "\n".join(_status(told, None, False))
    for part in (
        "s1 on s2", "s2 in sync", "s2: 1 of 2 in sync; waits for node s3, which is silent, or another place in 540 s",
        "shard s1: Node s1 was silent; node s2 took over and served after 2.1 s.",
    ):  # fmt: skip
        assert part in said


def test_without_copies_nothing_is_said_of_them() -> None:
    said = "\n".join(_status(document(1, shard("s1"), under_replicated=[], failovers=[]), None, False))
    assert "cop" not in said


def test_the_list_has_the_primarys_node_and_the_copies_where_there_are_some() -> None:
    assert _line(shard("s1", SYNCED, primary="s2"), shows_copies=True).endswith("primary on s2\tcopies: s2 in sync")
    assert _line(shard("s1"), shows_copies=False).endswith("http://s1")
