"""A cluster of real processes, shared by all tests that leave it as they found it, and calls to it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster.calls import Calls, calling
from tests.cluster.clusters import Cluster, running, write_config
from tests.cluster.transactions import keys_by_owner

_numbers = itertools.count()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four shards, shared: a test leaves no key behind that another one could trip over (use a prefix of your own)."""
    with running(write_config(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.fixture
def prefix() -> str:
    """A part of the key space of the test's own."""
    return f"own-{next(_numbers)}/"


@pytest.fixture
async def calls(cluster: Cluster) -> AsyncIterator[Calls]:
    async with calling(cluster.url) as calls:
        yield calls


@pytest.fixture(params=["one store", "all stores"])
async def keys(calls: Calls, request: pytest.FixtureRequest) -> list[str]:
    """Eight keys that do not exist, of one store, or in turn of each."""
    of_shard = await keys_by_owner(calls, 8)
    if request.param == "one store":
        return next(iter(of_shard.values()))
    return [key for row in zip(*of_shard.values(), strict=True) for key in row][:8]
