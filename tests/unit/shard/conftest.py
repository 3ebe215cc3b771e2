"""Two shards of this process, with real files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.shard.two_shards import Cluster, cluster_of_two


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_of_two(tmp_path) as opened:
        yield opened
