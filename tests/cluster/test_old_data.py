"""A cluster that an earlier program has left, killed in the middle of moves, goes on where it was."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

from tests.cluster.clusters import running, write_config
from tests.old_data import state_of_format_3, unpack_cluster_of_format_3

LIMITS = {"body_bytes_max": 2 * 2**20, "log_segment_bytes": 8 * 2**20}
SHARDS = ("s1", "s2", "s4", "s5")
WAIT_S = 60.0


def ask(url: str) -> bytes:
    with urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def stored_map(path: Path, query: str) -> dict[str, object]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        found = json.loads(connection.execute(query).fetchone()[0])
    return dict(found.get("map", found))


def test_a_data_dir_of_format_3_is_served_with_all_keys_and_its_moves_are_finished(tmp_path: Path) -> None:
    unpack_cluster_of_format_3(tmp_path)
    config = write_config(tmp_path, shards=3, partitions=64, limits=LIMITS)
    with running(config) as cluster:
        for number in range(1, 41):
            assert ask(f"{cluster.url}/v1/kv/k{number}") == f"new{number}".encode()
        give_up_s = time.monotonic() + WAIT_S
        while (found := json.loads(ask(f"{cluster.url}/v1/cluster")))["moves"] and time.monotonic() < give_up_s:
            time.sleep(0.05)
        assert found["moves"] == []
        assert {shard["id"]: shard["state"] for shard in found["shards"]} == dict.fromkeys(
            ["s1", "s2", "s4", "s5"], "up"
        )
        assert sum(shard["keys"] for shard in found["shards"]) == 40
        for number in range(1, 41):
            assert ask(f"{cluster.url}/v1/kv/k{number}") == f"new{number}".encode()
    data = tmp_path / "data"
    assert (data / "controller-0.db.format3").read_bytes() == state_of_format_3()
    present = stored_map(data / "controller-0.db", "SELECT document FROM state")
    assert (present["format"], present["epoch"]) == (4, found["epoch"])
    for shard in SHARDS:
        assert stored_map(data / f"shard-{shard}.db", "SELECT value FROM meta WHERE name = 'cluster_map'") == present
