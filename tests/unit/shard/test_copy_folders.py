"""What a node's folder is taken for when its process starts: real files of copies, whole or left by half."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from kvstore import set_aside
from kvstore.errors import ForeignData, is_damage
from kvstore.replication.promise import read_identity, write_identity
from kvstore.shard.folder import FileFolder
from kvstore.storage.disk import OsDisk
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened, ToldBefore, untold
from tests.unit.shard.resident_copy import PARTITIONS, STORE_ID, folder_of


async def opened_home(folder: FileFolder) -> Opened:
    """The store of shard s1 on its home."""
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, Opened)
    assert opened.lock_fd is not None
    return opened


async def home_with_a_record(folder: FileFolder) -> Opened:
    """The same, with a record in its log."""
    opened = await opened_home(folder)
    opened.log.append(b"of the time before")
    opened.log.sync()
    return opened


async def made_copy(path: Path) -> str:
    """Node n2 has an empty copy of shard s1; the copy's id."""
    files = await folder_of(path, "n2").make_copy("s1", STORE_ID, PARTITIONS)
    await files.close()
    return files.copy.identity.copy_id


async def test_a_copy_keeps_its_id_and_is_never_served_by_itself(tmp_path: Path) -> None:
    made = await made_copy(tmp_path)
    folder = folder_of(tmp_path, "n2")
    assert folder.copies() == ["s1"]
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, CopyFiles)
    assert opened.copy.identity.copy_id == made
    await opened.close()


async def test_a_node_without_a_folder_makes_its_own_store(tmp_path: Path) -> None:
    opened = await opened_home(folder_of(tmp_path / "new", "s1"))
    await opened.close()


@pytest.mark.parametrize("has_begun_again", [False, True])
async def test_a_home_that_a_snapshot_was_filling_opens_as_an_empty_copy_and_does_not_serve(
    tmp_path: Path, has_begun_again: bool
) -> None:
    """Its file knows no map, as that of a new store, which would serve."""
    folder = folder_of(tmp_path, "s1")
    new = await home_with_a_record(folder)
    if has_begun_again:  # the process died between the log's new beginning and that of the file
        new.log.restart(new.log.last)
    await new.close()
    identity = read_identity(OsDisk(), tmp_path, "shard-s1")
    assert identity is not None
    write_identity(OsDisk(), tmp_path, "shard-s1", identity._replace(promised=7, filling=True))
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, CopyFiles)
    assert opened.copy.is_filling
    assert opened.copy.log.last.number == 0
    assert opened.copy.identity == identity._replace(promised=7, filling=True)
    await opened.close()


@pytest.mark.parametrize("broken_off", [False, True])
async def test_an_empty_copy_on_its_shards_home_is_a_copy_again_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_off: bool
) -> None:
    """No map is in its files yet; as a store that serves it would be behind what the primary elsewhere has told."""
    folder = folder_of(tmp_path, "s1")

    async def told(_: str) -> ToldBefore:
        return ToldBefore(40)

    if broken_off:  # its log is made, its file half
        with monkeypatch.context() as patched:
            patched.setattr(SqliteEngine, "open", _dies)
            with pytest.raises(OSError, match="dies"):
                await folder.make_copy("s1", STORE_ID, PARTITIONS)
    else:
        await (await folder.make_copy("s1", STORE_ID, PARTITIONS)).close()
    made = read_identity(OsDisk(), tmp_path, "shard-s1")
    opened = await folder.open("s1", PARTITIONS, told)
    assert isinstance(opened, CopyFiles)
    assert opened.copy.identity == made
    assert opened.copy.engine.identity.store_id == STORE_ID
    await opened.close()


async def test_an_empty_copy_whose_id_is_damaged_is_refused_as_damaged_and_not_as_a_store_that_is_behind(
    tmp_path: Path,
) -> None:
    """Who is told that it is behind would look for a newer backup; the copy needs none."""
    folder = folder_of(tmp_path, "s1")
    await (await folder.make_copy("s1", STORE_ID, PARTITIONS)).close()
    path = tmp_path / "shard-s1.id"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    async def told(_: str) -> ToldBefore:
        return ToldBefore(40)

    with pytest.raises(ForeignData, match="are copied from there") as refused:
        await folder.open("s1", PARTITIONS, told)
    assert is_damage(refused.value)


async def _dies(*_: object) -> NoReturn:
    raise OSError(5, "the process dies here")


async def test_what_a_crash_left_of_a_copy_that_was_being_made_is_rebuilt(tmp_path: Path) -> None:
    """Without an id it would stand under the store's own, which the primary's copy may have."""
    made = await made_copy(tmp_path)
    (tmp_path / "shard-s1.copy-n2.id").unlink()
    assert folder_of(tmp_path, "n2").copies() == []
    again = await made_copy(tmp_path)
    assert again not in (made, STORE_ID)
    assert folder_of(tmp_path, "n2").copies() == ["s1"]


async def test_a_copy_whose_id_is_damaged_is_refused(tmp_path: Path) -> None:
    await made_copy(tmp_path)
    (tmp_path / "shard-s1.copy-n2.id").write_bytes(b"{}")
    with pytest.raises(ForeignData, match="move its files away"):
        await folder_of(tmp_path, "n2").open("s1", PARTITIONS, untold)


async def test_a_copy_whose_setting_aside_was_broken_off_at_any_file_is_never_opened(tmp_path: Path) -> None:
    made = await made_copy(tmp_path)
    folder = folder_of(tmp_path, "n2")
    renamed: list[str] = []
    rename = Path.rename

    def broken_off(path: Path, target: Path) -> Path:
        if renamed:
            raise OSError(5, "the process dies here")
        renamed.append(path.name)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", broken_off)
        with pytest.raises(OSError, match="dies"):
            await folder.set_aside("s1")
    assert folder.copies() == []
    await folder.set_aside("s1")
    assert not (tmp_path / "shard-s1.copy-n2.db").exists()
    assert await made_copy(tmp_path) != made


@pytest.mark.parametrize("done", [0, 1, 2])
async def test_a_home_whose_setting_aside_was_broken_off_is_set_aside_at_the_next_start_which_makes_a_store(
    tmp_path: Path, done: int
) -> None:
    folder = folder_of(tmp_path, "s1")
    await (await home_with_a_record(folder)).close()
    synced: list[Path] = []

    def break_off(path: Path) -> None:
        synced.append(path)
        if len(synced) > done:
            raise OSError(5, "the power goes")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(set_aside, "sync_folder", break_off)
        if done < 2:
            with pytest.raises(OSError, match="the power goes"):
                await folder.set_aside("s1")
            assert (tmp_path / "shard-s1.db").exists(), "the file goes last"
        else:
            set_aside.begin(tmp_path / "shard-s1.db")
    new = await opened_home(folder)
    assert new.log.last.number == 0
    assert (tmp_path / "shard-s1.db.removed.log.000001").exists()
    await new.close()


async def test_a_copy_that_is_set_aside_takes_the_place_of_none_that_was_set_aside_before(tmp_path: Path) -> None:
    """Each may be the last that has what was acknowledged."""
    folder, made = folder_of(tmp_path, "n2"), []
    for _ in range(3):
        made.append(await made_copy(tmp_path))
        await folder.set_aside("s1")
    kept = ["shard-s1.copy-n2.db.removed.1", "shard-s1.copy-n2.db.removed.2", "shard-s1.copy-n2.db.removed"]
    found = [read_identity(OsDisk(), tmp_path, name) for name in kept]
    assert [identity.copy_id for identity in found if identity is not None] == made
    assert all((tmp_path / name).exists() and (tmp_path / f"{name}.log.000001").exists() for name in kept)
    assert not (tmp_path / "shard-s1.copy-n2.lock").exists()
