"""A router whose shards are in this process."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import FakeChannel, all_follow, halves, make_service


@pytest.fixture
def fake_channels() -> Iterator[None]:
    with mock.patch("kvstore.router.channels.Channel", FakeChannel):
        yield


@pytest.fixture
async def service(fake_channels: None) -> RouterService:
    """s1 owns the even partitions, s2 the odd ones."""
    service = make_service()
    all_follow(service, halves())
    return service
