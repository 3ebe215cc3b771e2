"""Damage to copies of killed stores: what the program finds, and that it can find something."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.cluster.local import REPOSITORY
from loadtest.damage.clusters import damages
from loadtest.damage.inject import PLACES, SHAPES, damage
from loadtest.damage.verdicts import CORRUPT, EQUAL, LOST, VIOLATIONS, WRONG, Finding, Tally, table


def test_twenty_damages_lose_nothing_that_was_acknowledged() -> None:
    command = [sys.executable, "-m", "loadtest.damage", "--count", "20", "--seed", "11", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    document = json.loads(ended.stdout)
    assert document["ok"] is True
    assert len(document["stores"]) == 20
    assert len({finding["verdict"] for finding in document["stores"]}) > 1


def test_every_place_and_shape_changes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    seen = set()
    for number in range(600):
        path.write_bytes(bytes([10]) * 8192 + b'"cluster_id"' + bytes([7]) * 500)
        for name in (f"{path.name}-wal", "shard-s1.log.000001", "shard-s1.log.note", "shard-s1.id"):
            (tmp_path / name).write_bytes(bytes([9]) * 9000)
        found = damage(path, random.Random(number))
        assert found is not None
        seen.add((found.place, found.shape))
        file = tmp_path / found.file
        assert (found.offset == -1) == (not file.exists())
    assert {place for place, _ in seen} == set(PLACES)
    assert {shape for _, shape in seen} == set(SHAPES)


@pytest.mark.parametrize(("replicas", "numbers"), [(1, {1}), (2, {1}), (3, {1, 2})])
def test_one_copy_of_a_shard_always_stays_whole_and_other_shards_are_left_alone(
    tmp_path: Path, replicas: int, numbers: set[int]
) -> None:
    stems = ["shard-s1", "shard-s1.copy-s2", "shard-s1.copy-s3"][:replicas]
    found = set()
    for number in range(25):
        for stem in (*stems, "shard-s10"):
            for name in ("db", "db-wal", "log.000001", "log.note", "id"):
                (tmp_path / f"{stem}.{name}").write_bytes(b"\n" * 5000)
        done = damages(tmp_path, "s1", replicas, random.Random(number))
        assert {each.file.partition(".db")[0].partition(".log")[0].removesuffix(".id") for each in done} <= {*stems}
        found.add(len({each.file for each in done}))
    assert found - {0} == numbers, "none: what was drawn was not there"


@pytest.mark.parametrize(
    ("status", "value", "code", "verdict"),
    [
        (200, b"new", "", EQUAL),
        (200, b"open", "", EQUAL),
        (200, b"old", "", WRONG),
        (404, None, "", LOST),
        (500, None, "data-corrupt", CORRUPT),
        (500, None, "internal", "unclean"),
        (503, None, "unavailable", "down"),
    ],
)
def test_an_answer_is_judged_by_what_was_acknowledged(status: int, value: bytes, code: str, verdict: str) -> None:
    tally = Tally()
    tally.judge("a", frozenset({b"new", b"open"}), status, value, code)
    assert tally.worst[0] == verdict


def test_a_deleted_key_must_not_come_back() -> None:
    tally = Tally()
    tally.judge("a", frozenset({None}), 404, None, "")
    tally.judge("b", frozenset({None}), 200, b"back", "")
    assert tally.worst == (WRONG, "1 of 2, key b: 200")


def test_one_violation_outweighs_everything_else_and_stands_in_the_table() -> None:
    tally = Tally()
    for verdict in (EQUAL, LOST, CORRUPT):
        tally.add(verdict, "here")
    assert tally.worst[0] == LOST
    assert tally.worst[0] in VIOLATIONS
    lines = table([Finding("log", "bit", "f", 1, LOST), Finding("log", "bit", "f", 2, EQUAL)])
    assert lines[0].split() == ["damage", EQUAL, LOST]
    assert lines[1].split() == ["log", "bit", "1", "1"]
