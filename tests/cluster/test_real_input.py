"""Real files through the front door and back: import, read, kill -9, read again, export, import: byte for byte."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from kvstore.client import Client, Delete, Get
from tests.cluster.actions import kill_everything, kvstore
from tests.cluster.clusters import running, write_config

pytestmark = pytest.mark.timeout(120)

LIBRARY = Path(json.__file__).parents[1]
PACKAGES = ("json", "email", "encodings", "idlelib", "lib2to3", "wsgiref")
ODD_NAMES = (
    "empty",
    "all 256 bytes",
    "per%cent%20and%FF",
    "question?mark#hash",
    "a+b&c=d;e",
    "ключ-鍵-🔑",
    "..two dots",
    'quote"back\\slash',
    "line\nbreak",
    "deep/er/than/one/level.txt",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with a part of the standard library and files of odd names; and what it holds, by key."""
    folder = tmp_path_factory.mktemp("input") / "tree"
    for package in filter(lambda name: (LIBRARY / name).is_dir(), PACKAGES):
        shutil.copytree(LIBRARY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ODD_NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (folder / "empty").write_bytes(b"")
    (folder / "all 256 bytes").write_bytes(bytes(range(256)) * 16)
    (folder / "one MiB").write_bytes(os.urandom(1024 * 1024))
    held = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(held) > 200
    assert b"" in held.values()
    return folder, held


async def read_all(url: str, keys: list[str]) -> dict[str, bytes | None]:
    """The value of each key, one GET each, some at a time."""
    found: dict[str, bytes | None] = {}
    waiting = iter(keys)

    async def reader(kv: Client) -> None:
        for key in waiting:
            item = await kv.get(key)
            found[key] = item.value if item else None

    async with Client(url) as kv:
        await asyncio.gather(*(reader(kv) for _ in range(16)))
    return found


async def listed_keys(url: str) -> list[str]:
    async with Client(url) as kv:
        return [item.key async for item in kv.list(page_size=100)]


def import_folder(url: str, folder: Path) -> dict[str, int]:
    done = kvstore("import", "--dir", str(folder), "--url", url, "--json")
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout)


async def test_an_imported_folder_is_there_byte_for_byte_also_after_kill_9_of_everything(
    tmp_path: Path, files: tuple[Path, dict[str, bytes]]
) -> None:
    folder, held = files
    config = write_config(tmp_path, shards=3)
    with running(config) as cluster:
        done = import_folder(cluster.url, folder)
        assert (done["stored"], done["refused"], done["skipped"]) == (len(held), 0, 0)
        assert done["bytes"] == sum(map(len, held.values()))
        assert await read_all(cluster.url, list(held)) == held
        kill_everything(cluster)
    with running(config) as cluster:
        assert await read_all(cluster.url, list(held)) == held
        assert await listed_keys(cluster.url) == sorted(held, key=str.encode)


async def test_what_is_exported_can_be_imported_again_exactly(
    tmp_path: Path, files: tuple[Path, dict[str, bytes]]
) -> None:
    folder, held = files
    with running(write_config(tmp_path, shards=2)) as cluster:
        import_folder(cluster.url, folder)
        async with Client(cluster.url) as kv:
            await kv.put("with a deadline", b"soon", ttl=1000.0)
            first, second = tmp_path / "first.ndjson", tmp_path / "second.ndjson"
            assert kvstore("export", "-o", str(first), "--url", cluster.url).returncode == 0

            keys = [*held, "with a deadline"]
            for some in (keys[at : at + 100] for at in range(0, len(keys), 100)):
                assert {result.status for result in await kv.batch([Delete(key) for key in some])} == {204}
            assert await kv.count() == 0

            assert kvstore("import", str(first), "--url", cluster.url).returncode == 0
            assert await read_all(cluster.url, list(held)) == held
            assert await kv.count() == len(keys)
            item = await kv.get("with a deadline")
            assert item is not None
            assert item.value == b"soon"
            assert item.ttl is not None
            assert 900 < item.ttl <= 1000
            results = await kv.batch([Get(key) for key in held if len(held[key]) < 100_000])
            assert {result.key: result.value for result in results}.items() <= held.items()

            assert kvstore("export", "-o", str(second), "--url", cluster.url).returncode == 0
        assert content(first) == content(second)


def content(export: Path) -> list[dict[str, str]]:
    """The lines without what changes from one export to the next: versions, and time left."""
    lines = [msgspec.json.decode(line) for line in export.read_bytes().splitlines()]
    return [{name: line[name] for name in line if name not in ("version", "ttl")} for line in lines]
