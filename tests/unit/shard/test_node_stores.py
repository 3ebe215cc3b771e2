"""What a node says of all of its stores, also when it has none."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.controller.recovery import Told
from kvstore.environment import SYSTEM
from kvstore.errors import Unavailable, WrongOwner
from kvstore.protocol import Answer, Put
from kvstore.replication.beats import Make
from kvstore.shard.folder import FileFolder
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node import Node
from kvstore.shard.node_stores import NodeStores
from kvstore.storage.disk import OsFile
from kvstore.storage.engine import Identity
from kvstore.store.sinks import Then


def some_stores() -> NodeStores:
    nothing = cast(Any, None)
    return NodeStores(Surroundings("s1", nothing, Limits(), nothing, nothing, "", nothing, SYSTEM, nothing))


async def test_a_node_says_whose_its_own_store_is_also_while_the_files_change_hands_and_once_it_was_set_aside() -> None:
    stores = some_stores()
    own = Identity("store", "c", "s1", 64)
    stores.home = cast(Any, SimpleNamespace(local=SimpleNamespace(identity=own)))
    assert stores.identity == own
    stores.home = cast(Any, SimpleNamespace(local=SimpleNamespace(identity=None)))
    assert stores.identity == own


async def test_a_node_whose_last_store_has_gone_goes_on_telling_its_clock() -> None:
    """Its shard was given up while it was away, and no copy of another one has come here yet."""
    stores = some_stores()
    stores.by_shard.clear()
    assert stores.by_shard.clock == 0
    assert stores.newest_map is None
    assert not stores.by_shard.keeps_copies


async def test_a_copy_that_is_made_while_the_node_stops_is_joined_by_no_primary(tmp_path: Path) -> None:
    """The order was on its way."""
    nothing = cast(Any, None)
    folder = FileFolder(tmp_path, "s1", Limits())
    stores = NodeStores(Surroundings("s1", folder, Limits(), nothing, nothing, "", nothing, SYSTEM, nothing))
    stores.note_stop()
    await stores.make(Make(shard="s2", store_id="0123456789abcdef", partitions=64))
    assert stores.by_shard["s2"].stops
    await stores.close()


async def test_a_node_that_settles_has_answered_what_it_took_and_refuses_what_comes_then(tmp_path: Path) -> None:
    nothing = cast(Any, None)
    folder = FileFolder(tmp_path, "s1", Limits())
    stores = NodeStores(Surroundings("s1", folder, Limits(), nothing, nothing, "", nothing, SYSTEM, nothing))
    await stores.begin(64)
    (served,) = stores.by_shard.served
    answers: list[int] = []
    sink = Then(lambda answer: answers.append(cast(Answer, answer).status))
    served.store.write(Put(1, "a", b""), sink)
    assert not await stores.settle(0.0)
    assert answers == []
    assert await stores.settle(60.0)
    assert answers == [WrongOwner.status], "it has no map yet"
    served.store.write(Put(2, "b", b""), sink)
    assert answers == [WrongOwner.status, Unavailable.status]
    await stores.close()


async def test_a_node_tells_a_controller_of_each_copy_that_it_does_not_serve_unless_a_snapshot_fills_it(
    tmp_path: Path,
) -> None:
    nothing = cast(Any, None)
    around = Surroundings(
        "s1", FileFolder(tmp_path, "s1", Limits()), Limits(), nothing, nothing, "", nothing, SYSTEM, nothing
    )
    stores = NodeStores(around)
    stores.home = cast(Any, SimpleNamespace(local=SimpleNamespace(identity=Identity("store", "c", "s1", 64))))
    for shard_id in ("s1", "s2"):  # the home's own is to be filled from its beginning
        await stores.make(Make(shard=shard_id, store_id=f"{shard_id}-of-that-store", partitions=64))
    copy = stores.by_shard["s2"].local.copy
    assert copy is not None
    told = msgspec.convert(Node(around, stores, nothing, nothing, nothing).newest_map(), Told)
    assert told.copies == [("s2", copy.identity.copy_id)]
    assert told.beside == []
    await stores.close()


async def test_what_a_node_serves_knows_of_the_syncs_of_all_logs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie on one disk: see `replication.stalls`."""
    nothing, may_end = cast(Any, None), threading.Event()
    folder = FileFolder(tmp_path, "s1", Limits())
    stores = NodeStores(Surroundings("s1", folder, Limits(), nothing, nothing, "", nothing, SYSTEM, nothing))
    await stores.make(Make(shard="s2", store_id="0123456789abcdef", partitions=64))
    copy = stores.by_shard["s2"].local.copy
    assert copy is not None
    with monkeypatch.context() as hung:
        hung.setattr(OsFile, "sync", lambda file: may_end.wait(60))
        syncing = asyncio.create_task(asyncio.to_thread(copy.log.sync))
        async with asyncio.timeout(60):
            while stores.home._around.syncs() != {copy.log.sync_under_way}:
                await asyncio.sleep(0.01)
        may_end.set()
        await syncing
    assert stores.home._around.syncs() == frozenset()
    await stores.close()
