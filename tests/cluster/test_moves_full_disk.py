"""Moves and a disk that clients have filled: they wait, are refused with figures, and never take a shard down."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.process import pid_file
from tests.cluster.actions import (
    Reply,
    ask,
    delete,
    facts,
    get,
    kill_and_wait,
    pids,
    put,
    small_disk,
    take_all_room,
    wait_until,
)
from tests.cluster.clusters import Cluster, running, write_config

pytestmark = pytest.mark.timeout(180)

MIB = 1024 * 1024
SPARE_MIB = 40
VALUE = os.urandom(200_000)


def filled(cluster: Cluster) -> set[str]:
    """Put until nothing more is taken; the keys that were acknowledged."""
    stored, refused_in_row = set(), 0
    for number in range(4000):
        reply = put(cluster, f"fill-{number:04d}", VALUE)
        assert reply.status in (201, 507), reply
        refused_in_row = refused_in_row + 1 if reply.status == 507 else 0
        if reply.status == 201:
            stored.add(f"fill-{number:04d}")
        if refused_in_row == 20:
            return stored
    raise AssertionError("the disk is not full")


def change(cluster: Cluster, location: str) -> dict[str, Any]:
    return dict(ask(cluster.url, "GET", location).json)


def states(cluster: Cluster) -> dict[str, str]:
    return {shard["id"]: shard["state"] for shard in facts(cluster)["shards"]}


def cancelled(cluster: Cluster) -> Reply | None:
    """The answer, once the router is there again."""
    with suppress(OSError):
        reply = ask(cluster.url, "DELETE", "/v1/moves")
        return reply if reply.status == 202 else None
    return None


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[Cluster, set[str], Path]]:
    """A cluster of two shards on a disk that its clients have filled, what is stored, and the disk."""
    limits = {"disk_reserve_bytes": 16 * MIB, "wal_bytes_max": MIB, "batch_bytes_max": MIB, "request_timeout_s": 2.0}
    limits |= {"log_segment_bytes": 4 * MIB, "body_bytes_max": 2 * MIB}
    with small_disk(tmp_path / "data", mib=120 + SPARE_MIB) as disk:
        (disk / "spare").write_bytes(bytes(SPARE_MIB * MIB))
        config = write_config(tmp_path, shards=2, limits=limits)
        with running(config) as cluster:
            yield cluster, filled(cluster), disk


def test_a_shard_is_added_cancelled_and_removed_on_a_full_disk_and_everything_stays_up(
    full: tuple[Cluster, set[str], Path],
) -> None:
    cluster, stored, disk = full
    first = pids(cluster)

    refused = ask(cluster.url, "PATCH", "/v1/shards/s1", msgspec.json.encode({"weight": 9}))
    assert (refused.status, refused.json["code"]) == (409, "change-refused")
    assert refused.json["bytes_needed"]["s1"] > refused.json["bytes_free"]["s1"]
    assert f"s1 needs {refused.json['bytes_needed']['s1']:,} bytes" in refused.json["detail"]

    before = sorted(path.name for path in disk.iterdir())
    refused = ask(cluster.url, "POST", "/v1/shards", b'{"id":"s5"}')
    assert (refused.status, refused.json["code"]) == (409, "change-refused")
    assert "s5" in refused.json["bytes_free"]
    assert sorted(path.name for path in disk.iterdir()) == before
    (disk / "spare").unlink()
    added = ask(cluster.url, "POST", "/v1/shards", b'{"id":"s5"}')
    (disk / "spare").write_bytes(bytes(SPARE_MIB * MIB))  # gone again before the new process has begun
    assert added.status == 202, added.json
    location = added.headers["location"]
    waits = wait_until(
        lambda: (
            found if "waits for room on s5: " in ((found := change(cluster, location))["waiting_for"] or "") else None
        ),
        "the moves wait for room",
    )
    assert waits["state"] == "running"
    assert "MB needed" in waits["detail"]
    assert "MB free" in waits["detail"]

    take_all_room(disk / "hog")  # to the last byte: the controller and the pid files have their own
    kill_and_wait(cluster, "router-0")
    cancel = wait_until(lambda: cancelled(cluster), "it is cancelled")
    assert change(cluster, cancel.headers["location"])["state"] == "done"
    assert change(cluster, location)["state"] == "cancelled"
    (disk / "hog").unlink()
    if "s5" in states(cluster):
        assert ask(cluster.url, "DELETE", "/v1/shards/s5").status == 202
    wait_until(lambda: states(cluster) == {"s1": "up", "s2": "up"}, "only the first shards are left, and are up")

    for key in sorted(stored)[::2]:
        assert delete(cluster, key).status == 204
        stored.discard(key)
    wait_until(lambda: put(cluster, "at-last", VALUE).status == 201, "there is room again")
    for key in stored:
        assert get(cluster, key).body == VALUE
    now = pids(cluster)
    assert {name: now[name] for name in first if name != "router-0"} == {
        name: pid for name, pid in first.items() if name != "router-0"
    }, "no process had to die for it"


async def test_the_controllers_store_has_room_on_a_disk_without_a_free_byte(tmp_path: Path) -> None:
    with small_disk(tmp_path / "data", mib=40) as disk:
        store = await open_sqlite(disk / "controller-0.db")
        try:
            take_all_room(disk / "hog")
            for revision in range(40):
                assert await store.compare_and_swap(revision, os.urandom(50_000)) == revision + 1
        finally:
            await store.close()


def test_a_pid_file_has_room_on_a_disk_without_a_free_byte(tmp_path: Path) -> None:
    own = f"{os.getpid()}\n"
    with small_disk(tmp_path / "data", mib=4) as disk:
        with pid_file(disk, "shard", "s1"):
            take_all_room(disk / "hog")
        with pid_file(disk, "shard", "s1"):
            assert (disk / "run" / "shard-s1.pid").read_text() == own
        (disk / "run" / "shard-s2.pid").write_text("999999999\n")  # of a process that was killed
        take_all_room(disk / "what-was-given-back")
        with pid_file(disk, "shard", "s2"):
            assert (disk / "run" / "shard-s2.pid").read_text() == own
        assert not list((disk / "run").iterdir())
