"""A copied data directory becomes a cluster of its own: all of it, or what the next call finishes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.config import ClusterConfig, ControllerConfig, Limits, ShardConfig
from kvstore.controller import adoption
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.interface import Told
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.controller.membership import ClusterState
from kvstore.errors import DataInUse, ForeignData
from kvstore.placement.cluster_map import ClusterMap, at_home, first_map
from kvstore.store import adoption as of_stores
from kvstore.store.offline import check
from kvstore.store.store import Store
from tests.unit.store.real_files import Hands

PARTITIONS = 64
LIMITS = Limits(log_segment_bytes=1 << 20)
CONFIG = ClusterConfig(
    routers=[],
    controllers=[ControllerConfig("0", "127.0.0.1:8090")],
    shards=[ShardConfig(each, "127.0.0.1:1") for each in ("s1", "s2")],
    partitions=PARTITIONS,
    limits=LIMITS,
)


def end(error: BaseException) -> None:
    raise AssertionError from error


async def open_store(folder: Path, shard_id: str) -> Store:
    return await Store.open(folder / f"shard-{shard_id}.db", LIMITS, shard_id, PARTITIONS, end)  # type: ignore[arg-type]


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """The data of two shards, each with a key that its log has and its file perhaps not."""
    stores = {shard_id: await open_store(tmp_path, shard_id) for shard_id in ("s1", "s2")}
    members = [at_home(each, f"http://{each}", store.identity.store_id) for each, store in stores.items()]
    cluster_map = first_map("copied", PARTITIONS, members)
    for shard_id, store in stores.items():
        await store.partitions.adopt(cluster_map)
        await Hands(store).put(key_of(cluster_map, shard_id), shard_id.encode())
        await store.close()
    controller = await open_sqlite(tmp_path / "controller-0.db")
    await ClusterDocument(controller, 1).change(lambda state: ClusterState(map=cluster_map, clock=7))
    await controller.tell(members[0].shard.store_id, Told(5, 5))
    await controller.close()
    (tmp_path / "shard-s1.session").write_text("x")
    (tmp_path / "controller-0.sessions").write_text("x")
    return tmp_path


def key_of(cluster_map: ClusterMap, shard_id: str) -> str:
    return next(key for key in map(str, range(1000)) if cluster_map.owner_of(key.encode()).id == shard_id)


async def adopt(folder: Path) -> adoption.Adoption:
    async with adoption.opened(folder, CONFIG) as found:
        await found.run()
        return found


async def assert_adopted(folder: Path, cluster_id: str) -> None:
    """All of it is of that cluster, and every key is there."""
    controller = await open_sqlite(folder / "controller-0.db")
    state = await ClusterDocument(controller, 1).read()
    assert state.map is not None
    assert (state.map.cluster_id, state.clock) == (cluster_id, 7)
    for member in state.map.shards:
        path = folder / f"shard-{member.id}.db"
        assert check(path).damaged == 0
        store = await open_store(folder, member.id)
        assert (store.identity.cluster_id, store.identity.store_id) == (cluster_id, member.store_id)
        assert store.cluster_map == state.map
        assert await controller.tell(member.store_id, Told()) == Told()
        assert (await Hands(store).get(key_of(state.map, member.id))).value == member.id.encode()
        await store.close()
    await controller.close()
    assert not (folder / "adopting.json").exists()
    assert not (folder / "shard-s1.session").exists()
    assert not (folder / "controller-0.sessions").exists()


async def test_everything_has_new_ids_and_the_same_keys(folder: Path) -> None:
    done = await adopt(folder)
    assert done.begun.copied_from == "copied" != done.begun.cluster_id
    await assert_adopted(folder, done.begun.cluster_id)


Break = Callable[[pytest.MonkeyPatch], None]


def _raise(*arguments: Any, **named: Any) -> None:
    raise OSError("the power is gone")


def before_identity(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvstore.store.adoption.sqlite_file.set_identity", _raise)


def before_new_log(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(of_stores.Log, "create", _raise)


def before_second_store(patch: pytest.MonkeyPatch) -> None:
    once = of_stores.adopt_store

    async def first_only(path: Path, *rest: Any) -> None:
        await once(path, *rest) if "s1" in path.name else _raise()

    patch.setattr(adoption, "adopt_store", first_only)


def before_document(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adoption.ClusterDocument, "change", _raise)


def before_last_line(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvstore.controller.map_store.sqlite.SqliteMapStore.forget", _raise)


@pytest.mark.parametrize(
    "crash", [before_identity, before_new_log, before_second_store, before_document, before_last_line]
)
async def test_a_crash_at_any_step_is_finished_by_the_next_call_with_the_id_that_was_begun(
    folder: Path, crash: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash(patch)
        with pytest.raises(OSError, match="the power is gone"):
            await adopt(folder)
    begun = msgspec.json.decode((folder / "adopting.json").read_bytes(), type=adoption.Begun)
    done = await adopt(folder)
    assert done.begun == begun
    await assert_adopted(folder, begun.cluster_id)


async def test_a_store_that_went_on_after_a_crash_keeps_what_it_was_given_since(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_second_store(patch)
        with pytest.raises(OSError, match="the power is gone"):
            await adopt(folder)
    store = await open_store(folder, "s1")
    assert store.cluster_map is not None
    key = key_of(store.cluster_map, "s1")
    await Hands(store).put(f"{key}", b"s1")
    number = store.durable
    await store.close()
    await adopt(folder)
    store = await open_store(folder, "s1")
    assert store.durable >= number
    await store.close()


@pytest.mark.parametrize("note", [b"{", b'{"copied_from": "\xb3"}'])
async def test_a_note_of_an_earlier_call_that_cannot_be_read_is_refused(folder: Path, note: bytes) -> None:
    (folder / "adopting.json").write_bytes(note)
    with pytest.raises(ForeignData, match="cannot be read"):
        await adopt(folder)


async def test_nothing_is_changed_while_a_store_is_open_missing_or_another_one(folder: Path) -> None:
    store = await open_store(folder, "s2")
    with pytest.raises(DataInUse):
        await adopt(folder)
    await store.close()
    (folder / "shard-s2.db").rename(folder / "away.db")
    with pytest.raises(ForeignData, match=r"shard-s2\.db"):
        await adopt(folder)
    other = folder / "other"
    other.mkdir()
    await (await open_store(other, "s2")).close()
    (other / "shard-s2.db").rename(folder / "shard-s2.db")
    with pytest.raises(ForeignData, match="the controller's map names"):
        await adopt(folder)
    assert not (folder / "adopting.json").exists()


async def test_where_no_cluster_was_formed_there_is_none_to_adopt(tmp_path: Path) -> None:
    with pytest.raises(ForeignData, match="no controller's file"):
        await adopt(tmp_path)
    await (await open_sqlite(tmp_path / "controller-0.db")).close()
    with pytest.raises(ForeignData, match="no cluster map"):
        await adopt(tmp_path)
