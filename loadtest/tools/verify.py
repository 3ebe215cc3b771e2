"""Reads every value back: `python -m loadtest.verify --url URL (--dir DIR | --ndjson FILE)`.

Owns: comparing a cluster's values, byte for byte, with the files or lines that were imported.
Promises: exit code 0 only if every value is there and equal (and, with --exact, nothing else is); else 1 and a list of
differences; 2 for a source that cannot be read. It reads the sources by code of its own, not by that of the import: a
mistake there cannot hide itself here.
Leaves to others: storing the values (`kvstore import`).
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from kvstore.client import DEFAULT_URL, Client
from kvstore.errors import KvError

CONNECTIONS = 16
VALUE_BYTES_MAX = 1024 * 1024  # the default of limits.value_bytes_max
_TELL_EVERY_S = 1.0


class Expected(NamedTuple):
    """`read` gives the value's bytes when its turn comes: no more than a few are in memory at once."""

    key: str
    read: Callable[[], bytes]


class SourceError(Exception):
    """The source cannot be read; the message says where."""


class Verdict:
    """What was found. `differences` are sentences, each beginning with the key."""

    def __init__(self) -> None:
        self.keys = 0
        self.value_bytes = 0
        self.too_large = 0
        self.differences: list[str] = []

    def compare(self, key: str, expected: bytes, found: bytes | None, value_bytes_max: int) -> None:
        self.keys += 1
        if len(expected) > value_bytes_max:
            self.too_large += 1
            if found is not None:
                self.differences.append(f"{key}: has {len(found):,} bytes, more than a value may have")
        elif found is None:
            self.differences.append(f"{key}: is missing")
        elif found != expected:
            self.differences.append(f"{key}: {_first_difference(expected, found)}")
        else:
            self.value_bytes += len(found)


def _first_difference(expected: bytes, found: bytes) -> str:
    at = next(
        (place for place, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other),
        min(len(expected), len(found)),
    )
    return f"differs from byte {at:,} on ({len(expected):,} bytes expected, {len(found):,} found)"


# --- sources -----------------------------------------------------------------------------------------------------


def folder_values(folder: Path) -> Iterator[Expected]:
    """Every regular file below the folder, links to files followed, links to folders not; the key is its path.

    A name that is not UTF-8 cannot be a key and is left out, as the import does.
    """
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            try:
                key.encode()
            except UnicodeEncodeError:
                continue
            if path.is_file():
                yield Expected(key, path.read_bytes)


def ndjson_values(file: Path) -> Iterator[Expected]:
    """The last line of each key: the one that an import leaves.
    Raises SourceError at a line that is no record."""
    offsets: dict[str, int] = {}
    with file.open("rb") as lines:
        offset = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                offsets[_read_record(line, f"{file}:{number}")[0]] = offset
            offset += len(line)
        for key, offset in offsets.items():
            yield Expected(key, lambda offset=offset: _value_at(file, offset))  # type: ignore[misc]


def _value_at(file: Path, offset: int) -> bytes:
    with file.open("rb") as lines:
        lines.seek(offset)
        return _read_record(lines.readline(), f"{file}, byte {offset}")[1]


def _read_record(line: bytes, where: str) -> tuple[str, bytes]:
    try:
        record = msgspec.json.decode(line, type=dict[str, object])
        key, text, coded = record["key"], record.get("value"), record.get("value_base64")
        if not isinstance(key, str):
            raise ValueError("the key is no text")
        if isinstance(text, str):
            return key, text.encode()
        if isinstance(coded, str):
            return key, base64.b64decode(coded, validate=True)
        raise ValueError("neither value nor value_base64")
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        raise SourceError(f"{where}: {error}") from error


# --- reading back --------------------------------------------------------------------------------------------------


async def verify(
    kv: Client,
    source: Iterator[Expected],
    *,
    exact_prefix: str | None = None,
    value_bytes_max: int = VALUE_BYTES_MAX,
    tell: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Read every value of `source` and compare. With `exact_prefix`, keys that start so and are not in it differ, too.

    A key that cannot be read is a difference; a source that cannot be read raises SourceError or OSError.
    """
    verdict = Verdict()
    known: set[str] = set()
    began = told = time.monotonic()

    async def reader() -> None:
        nonlocal told
        for expected in source:
            known.add(expected.key)
            value = expected.read()
            try:
                item = await kv.get(expected.key)
            except KvError as error:
                verdict.keys += 1
                verdict.differences.append(f"{expected.key}: cannot be read: {error.code}: {error.detail}")
            else:
                verdict.compare(expected.key, value, None if item is None else item.value, value_bytes_max)
            if (now := time.monotonic()) - told >= _TELL_EVERY_S:
                told = now
                tell(f"{verdict.keys:,} keys read, {verdict.keys / (now - began):,.0f}/s")

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(reader())
    if exact_prefix is not None:
        async for item in kv.list(exact_prefix):
            if item.key not in known:
                verdict.differences.append(f"{item.key}: is in the cluster and not in the source")
    return verdict


async def _run(url: str, source: Iterator[Expected], exact_prefix: str | None, value_bytes_max: int) -> Verdict:
    async with Client(url) as kv:
        return await verify(
            kv,
            source,
            exact_prefix=exact_prefix,
            value_bytes_max=value_bytes_max,
            tell=lambda line: click.echo(line, err=True),
        )


@click.command(help="Read every imported value back and compare it byte for byte. Exit code 0: all equal; 1: not.")
@click.option("--url", default=DEFAULT_URL, envvar="KVSTORE_URL", show_default=True, help="The router.")
@click.option(
    "--dir", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="What was imported."
)
@click.option("--ndjson", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What was imported.")
@click.option("--exact", is_flag=True, help="Nothing else may be stored (under --prefix).")
@click.option("--prefix", default="", help="Where --exact looks.")
@click.option("--value-bytes-max", type=int, default=VALUE_BYTES_MAX, help="Larger values must not be stored.")
@click.option("--show", type=click.IntRange(1), default=20, show_default=True, help="Differences to list.")
def main(
    url: str, folder: Path | None, ndjson: Path | None, exact: bool, prefix: str, value_bytes_max: int, show: int
) -> None:
    if (folder is None) == (ndjson is None):
        raise click.UsageError("give either --dir DIR or --ndjson FILE")
    source = folder_values(folder) if folder is not None else ndjson_values(ndjson or Path())
    began = time.monotonic()
    try:
        verdict = asyncio.run(_run(url, source, prefix if exact else None, value_bytes_max))
    except* (SourceError, OSError, KvError, ValueError) as group:
        click.echo(f"Error: {group.exceptions[0]}", err=True)
        sys.exit(2)
    for difference in sorted(verdict.differences)[:show]:
        click.echo(difference)
    if len(verdict.differences) > show:
        click.echo(f"… and {len(verdict.differences) - show:,} more")
    beyond = (
        f"; {verdict.too_large} beyond the limit of a value, not stored, as it should be" if verdict.too_large else ""
    )
    click.echo(
        f"{verdict.keys:,} keys, {verdict.value_bytes:,} bytes equal, {len(verdict.differences):,} differences{beyond}"
        f" ({time.monotonic() - began:.1f} s)"
    )
    sys.exit(1 if verdict.differences or not verdict.keys else 0)
