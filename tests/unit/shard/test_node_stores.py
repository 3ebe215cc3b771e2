"""What a node says of all of its stores, also when it has none."""

from __future__ import annotations

from typing import Any, cast

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node_stores import NodeStores


async def test_a_node_whose_last_store_has_gone_goes_on_telling_its_clock() -> None:
    """Its shard was given up while it was away, and no copy of another one has come here yet."""
    nothing = cast(Any, None)
    stores = NodeStores(
        Surroundings("s1", nothing, Limits(), nothing, nothing, "", nothing, SYSTEM, nothing, lambda: None)
    )
    stores.by_shard.clear()
    assert stores.clock == 0
    assert stores.newest_map is None
    assert not stores.keeps_copies
