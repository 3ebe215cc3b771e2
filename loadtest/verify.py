"""Reads every value back: `python -m loadtest.verify --url URL (--dir DIR | --ndjson FILE)`.

Owns: comparing a cluster's values, byte for byte, with the files or lines that were imported.
Promises: exit code 0 only if every value is there and equal; else 1 and a list of differences; 2 for a source that
cannot be read. It reads the sources by code of its own, not by that of the import: a mistake there cannot hide itself
here.
Leaves to others: storing the values (`kvstore import`).
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from kvstore.client import DEFAULT_URL, Client
from kvstore.config import default_config
from kvstore.errors import KvError

_CONNECTIONS = 16
_SHOWN_MAX = 20


class Expected(NamedTuple):
    """`read` gives the value's bytes when its turn comes: no more than a few are in memory at once."""

    key: str
    read: Callable[[], bytes]


def folder_values(folder: Path) -> Iterator[Expected]:
    """Every regular file below the folder, links to files followed, links to folders not; the key is its path.

    A name that is not UTF-8 cannot be a key and is left out, as the import does.
    """
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            key = path.relative_to(folder).as_posix()
            if path.is_file() and key.encode(errors="ignore").decode() == key:
                yield Expected(key, path.read_bytes)


def ndjson_values(file: Path) -> Iterator[Expected]:
    """The last line of each key: the one that an import leaves.
    Raises ValueError at a line that is no record."""
    offsets: dict[str, int] = {}
    with file.open("rb") as lines:
        offset = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                offsets[_read_record(line, f"{file}:{number}")[0]] = offset
            offset += len(line)
    for key, offset in offsets.items():
        yield Expected(key, partial(_value_at, file, offset))


def _value_at(file: Path, offset: int) -> bytes:
    with file.open("rb") as lines:
        lines.seek(offset)
        return _read_record(lines.readline(), f"{file}, byte {offset}")[1]


def _read_record(line: bytes, where: str) -> tuple[str, bytes]:
    try:
        record = msgspec.json.decode(line, type=dict[str, str | float | None])
        key, text, coded = record["key"], record.get("value"), record.get("value_base64")
        if isinstance(key, str) and isinstance(text, str):
            return key, text.encode()
        if isinstance(key, str) and isinstance(coded, str):
            return key, base64.b64decode(coded, validate=True)
        raise ValueError("it has no key, or neither value nor value_base64")
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def difference(expected: bytes, found: bytes | None, value_bytes_max: int) -> str | None:
    """What is wrong with a value, in words; None if it is as it should be.
    Too large ones are not stored."""
    if len(expected) > value_bytes_max:
        return None if found is None else f"has {len(found):,} bytes, more than a value may have"
    if found is None:
        return "is missing"
    if found == expected:
        return None
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(expected), len(found)))
    return f"differs from byte {at:,} on ({len(expected):,} bytes expected, {len(found):,} found)"


async def verify(kv: Client, source: Iterator[Expected]) -> tuple[int, list[str]]:
    """How many values there are, and what differs, each sentence with its key. Raises OSError, ValueError."""
    keys, differences, value_bytes_max = 0, [], default_config().limits.value_bytes_max

    async def reader() -> None:
        nonlocal keys
        for expected in source:
            keys += 1
            try:
                item = await kv.get(expected.key)
            except KvError as error:
                differences.append(f"{expected.key}: cannot be read: {error.code}: {error.detail}")
                continue
            if wrong := difference(expected.read(), None if item is None else item.value, value_bytes_max):
                differences.append(f"{expected.key}: {wrong}")

    async with asyncio.TaskGroup() as group:
        for _ in range(_CONNECTIONS):
            group.create_task(reader())
    return keys, differences


async def _run(url: str, source: Iterator[Expected]) -> tuple[int, list[str]]:
    async with Client(url) as kv:
        return await verify(kv, source)


@click.command(help="Read every imported value back and compare it byte for byte. Exit code 0: all equal; 1: not.")
@click.option("--url", default=DEFAULT_URL, envvar="KVSTORE_URL", show_default=True, help="The router.")
@click.option(
    "--dir", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="What was imported."
)
@click.option("--ndjson", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What was imported.")
def main(url: str, folder: Path | None, ndjson: Path | None) -> None:
    if (folder is None) == (ndjson is None):
        raise click.UsageError("give either --dir DIR or --ndjson FILE")
    source = folder_values(folder) if folder is not None else ndjson_values(ndjson or Path())
    try:
        keys, differences = asyncio.run(_run(url, source))
    except* (OSError, KvError, ValueError) as group:
        click.echo(f"Error: {group.exceptions[0]}", err=True)
        sys.exit(2)
    for sentence in sorted(differences)[:_SHOWN_MAX]:
        click.echo(sentence)
    click.echo(f"{keys:,} keys, {len(differences):,} differences")
    sys.exit(1 if differences or not keys else 0)


if __name__ == "__main__":
    main()
