"""A copy of a data directory started beside the original: each goes on by itself, and both say so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.cluster.actions import facts, get, kvstore, put, wait_until
from tests.cluster.clusters import Cluster, running, write_config

KEYS = [f"k{n}" for n in range(120)]
ADOPT = "kvstore cluster adopt"


@pytest.fixture(scope="module")
def stopped_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cluster.yaml of a cluster that has KEYS and has ended."""
    config = write_config(tmp_path_factory.mktemp("original"), shards=2, partitions=64)
    with running(config) as cluster:
        for key in KEYS:
            assert put(cluster, key, b"original").status == 201
    shutil.copytree(config.parent / "data", config.parent / "pristine")
    return config


@pytest.fixture(scope="module")
def original(stopped_data: Path) -> Iterator[Cluster]:
    """That cluster, running again."""
    with running(stopped_data) as cluster:
        yield cluster


@pytest.fixture
def copied(stopped_data: Path, tmp_path: Path) -> Path:
    """The cluster.yaml of a copy of its data, with other ports."""
    shutil.copytree(stopped_data.parent / "pristine", tmp_path / "data")
    return write_config(tmp_path, shards=2, partitions=64)


def test_a_copy_beside_the_original_touches_nothing_of_it_and_both_say_so(original: Cluster, copied: Path) -> None:
    before = facts(original)
    with running(copied) as copy:
        for key in KEYS:
            assert put(copy, key, b"copy").status == 204
        assert put(original, KEYS[0], b"newer").status == 204
        weighed = kvstore("shard", "weight", "s1", "4", "--url", copy.url)
        assert weighed.returncode == 0, weighed.stderr
        assert len({shard["partitions"] for shard in facts(copy)["shards"]}) > 1
        wait_until(lambda: "runs on a copy of this data directory" in original.log, "the original says so")
        wait_until(lambda: "by another cluster with the same ids" in copy.log, "the copy says so")
        assert ADOPT in original.log
        assert ADOPT in copy.log
        assert {get(copy, key).body for key in KEYS} == {b"copy"}
    assert [get(original, key).body for key in KEYS] == [b"newer", *[b"original"] * (len(KEYS) - 1)]
    after = facts(original)
    assert (after["epoch"], after["moves"]) == (before["epoch"], [])
    assert [shard["keys"] for shard in after["shards"]] == [shard["keys"] for shard in before["shards"]]


def test_a_copy_that_was_adopted_is_a_cluster_of_its_own_with_all_its_keys(original: Cluster, copied: Path) -> None:
    copied_from, etag = facts(original)["cluster_id"], get(original, KEYS[1]).headers["etag"]
    said = len(original.log)
    refused = kvstore("cluster", "adopt", "--config", str(original.folder / "cluster.yaml"), "--confirm", copied_from)
    assert (refused.returncode, "in use" in refused.stderr or "open in another" in refused.stderr) == (2, True)
    assert kvstore("cluster", "adopt", "--config", str(copied), "--confirm", "another-").returncode == 1
    adopted = kvstore("cluster", "adopt", "--config", str(copied), "--confirm", copied_from[:8], "--json")
    assert adopted.returncode == 0, adopted.stderr
    told = msgspec.json.decode(adopted.stdout)
    assert (told["copied_from"], told["shards"]) == (copied_from, ["s1", "s2"])
    with running(copied) as copy:
        assert facts(copy)["cluster_id"] == told["cluster_id"] != copied_from
        assert {get(copy, key).body for key in KEYS} == {b"original"}
        assert get(copy, KEYS[1]).headers["etag"] == etag
        assert put(copy, KEYS[1], b"copy").status == 204
    assert get(original, KEYS[1]).body == b"original"
    assert "same ids" not in original.log[said:] + copy.log
