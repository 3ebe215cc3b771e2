"""The sentence on the cluster: the worst that is true of it."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.router.advice import advice

UP = {"id": "s1", "state": "up"}
MOVE = {"from": "s1", "to": "s2", "partitions": 7, "step": "copy", "detail": ""}
DOWN = {"id": "s2", "state": "down"}
COPIED = {**UP, "copies": [{"node": "s2", "state": "in-sync", "lag": 0}]}
HEARD: dict[str, Any] = {"silent": {}, "missing": {}, "holds_still": False}
COPY = {"node": "s3", "state": "in-sync", "lag": 0}
LATE = {"node": "s1", "state": "joining", "lag": 1200}
FILLED = {"node": "s1", "state": "joining", "lag": None, "rows_done": 1200, "rows_total": 5000}
STRANDED = {"nodes": ["s2"], "other": "s3"}
DAMAGED: dict[str, Any] = {"nodes": ["s4"], "other": None, "is_damaged": True}
AWAY: dict[str, Any] = DAMAGED | {"nodes": ["s4", "s3"]}
GUEST = {"id": "s2", "state": "up", "primary": "s4"}
ALONE = {"nodes": ["s2", "s4"], "other": None}
OLDER: dict[str, Any] = {"older": {"s2": {"number": 7, "told": 1200}}}
LOST = {"shard": "s2", "epoch": 8, "partitions": 16}
WELL: dict[str, Any] = {
    "shards": [UP, {"id": "s2", "state": "up"}],
    "moves": [],
    "wanted": [],
    "in_doubt": {"count": 0, "oldest_s": None},
}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", "All is well: 2 shards up"),
        ({"shards": [UP]}, "ok", "1 shard up"),
        ({"shards": [UP, {"id": "s2", "state": "down"}]}, "warning", "Shard s2 does not answer"),
        (
            {"shards": [{"id": "s1", "state": "down"}, {"id": "s2", "state": "down"}]},
            "warning",
            "s1, s2 do not answer: their keys",
        ),
        ({"shards": [{**UP, "disk_full": True}]}, "warning", "The disk of s1 is nearly full"),
        ({"moves": [MOVE, MOVE]}, "busy", "14 partitions still to move"),
        ({"moves": [{**MOVE, "step": "waiting", "detail": "shard s2 is away"}]}, "warning", "shard s2 is away"),
        ({"wanted": ["s5"]}, "busy", "Shard s5 is being started"),
        ({"wanted": None}, "warning", "The controller does not answer"),
        (
            {"behind": "Its file is lost.", "shards": [DOWN]},
            "warning",
            "Its file is lost. Keys are served, but no copy",
        ),
        ({"in_doubt": {"count": 1, "oldest_s": 60.0}}, "warning", "in doubt for 60 s"),
        ({"in_doubt": {"count": 1, "oldest_s": 0.2}}, "ok", "All is well"),
        ({"shards": []}, "warning", "no shards yet"),
        ({"copies": None}, "ok", "All is well"),
        ({"shards": [COPIED], "replicas": 2, "copies": HEARD}, "ok", "2 copies of every key are in sync"),
        ({"shards": [{**COPIED, "state": "down"}], "copies": HEARD}, "warning", "the copy on node s2 takes over"),
        ({"copies": {"silent": {"s1": 3.0}, "missing": {"s2": ["s1"]}}}, "warning", "Node s1 is silent"),
        ({"copies": {"silent": {}, "missing": {"s2": ["s1"]}}}, "warning", "Shard s2 has no copy in sync on node s1"),
        (
            {"copies": {"missing": {"s2": ["s1"]}, "copies": {"s2": [FILLED]}}},
            "warning",
            "yet: 1,200 of 5,000 rows are",
        ),
        (
            {"copies": {"missing": {"s2": ["s1"]}, "copies": {"s2": [LATE]}}},
            "warning",
            "it lacks 1,200 records, and that",
        ),
        ({"copies": {"disputed": {"s2": 3}}}, "warning", "3 partitions of shard s2: all copies have the same rows"),
        ({"copies": {"unproved": {"s2": ["s1"]}}}, "warning", "copy of shard s2 on node s1 takes records, and did not"),
        ({"copies": {"silent": {"s2": 1, "s1": 2}, "holds_still": True}}, "warning", "Nodes s1, s2 are silent, too"),
        ({"copies": {"silent": {"s1": 3.0}, "given_up_in_s": 540.0}}, "warning", "In 540 s it is given up"),
        ({"copies": {"silent": {"s1": 900.0}, "given_up": ["s1"]}}, "warning", "too long and is given up: copies are"),
        ({"copies": {"lacking_nodes": 1}}, "warning", "add another one with `kvstore shard add`"),
        ({"copies": {"one_zone": ["s1"]}}, "warning", "Copies of shard s1 lie in one zone"),
        ({"shards": [{**DOWN, "copies": [COPY]}], "copies": {"silent": {}}}, "warning", "copy on node s3 takes"),
        ({"shards": [DOWN], "copies": {"stranded": {"s2": STRANDED}}}, "warning", "promote s2 --to s3 --accept-loss"),
        ({"shards": [DOWN], "copies": {"stranded": {"s2": ALONE}}}, "warning", "when node s2 is back, or s4. If its"),
        (
            {"shards": [DOWN], "copies": OLDER | {"stranded": {"s2": STRANDED}}},
            "warning",
            "promote s2 --to s3 --accept",
        ),
        ({"shards": [DOWN], "copies": OLDER}, "warning", "with record 7, and record 1,200 was acknowledged"),
        ({"shards": [DOWN], "copies": {"stranded": {"s2": DAMAGED}}}, "warning", "remove s2 --lost` gives up its keys"),
        (
            {"shards": [DOWN], "copies": {"stranded": {"s2": DAMAGED}, "silent": {"s3": 9}, "copies": {"s2": [COPY]}}},
            "warning",
            "If node s4 was started with another folder, give it its own. Node s3 may have an older one",
        ),
        (
            {"shards": [DOWN], "copies": {"stranded": {"s2": DAMAGED | {"other": "s3"}}}},
            "warning",
            "started with another folder, give it its own. `kvstore shard promote s2 --to s3 --accept-loss`",
        ),
        (
            {"shards": [DOWN], "copies": {"stranded": {"s2": AWAY}, "silent": {"s3": 9}}},
            "warning",
            "one in sync takes its place when node s3 is back. If that is lost, `kvstore shard remove",
        ),
        (
            {"shards": [{**GUEST, "copies": [COPY]}], "copies": {"damaged": {"s2": {"s4": "A bit."}}}},
            "warning",
            "one in sync takes its place",
        ),
        (
            {"shards": [{**GUEST, "copies": [COPY]}], "copies": {"damaged": {"s2": {"s4": "A"}}, "silent": {"s3": 9}}},
            "warning",
            "none in sync can take its place before node s3 is back",
        ),
        (
            {"shards": [GUEST], "copies": {"damaged": {"s2": {"s4": "A bit."}}}},
            "warning",
            "no other is in sync: what can be read is served",
        ),
        (
            {"shards": [{**GUEST, "copies": [COPY]}], "copies": {"damaged": {"s2": {"s3": "A bit."}}}},
            "warning",
            "it is rebuilt from the primary",
        ),
        ({"lost": [{**LOST, "opened": 0}], "shards": [UP, DOWN]}, "warning", "Shard s2 is given up as lost"),
        ({"lost": [{**LOST, "opened": 0}], "shards": [{**UP, "state": "down"}, DOWN]}, "warning", "start s1, or give"),
        ({"lost": [{**LOST, "opened": 9}]}, "ok", "All is well"),
        ({"shards": [{**UP, "state": "down"}], "moves": [MOVE], "wanted": None}, "warning", "s1 does not answer"),
    ],
)
def test_it_says_what_matters_most(changes: dict[str, Any], level: str, words: str) -> None:
    said = advice(WELL | changes)
    assert said["level"] == level
    assert words in said["sentence"]
    assert said["sentence"].endswith(".")
