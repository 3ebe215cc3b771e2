"""export: keys and values as NDJSON, resumable when it goes to a file.

Owns: the form of an export line, the partial file and its journal.
Promises: FILE appears when it is complete, never half; what `import` reads from it is byte for byte what was stored.
A link stays a link, a device or FIFO is written to and never replaced, and a file keeps its owner and its mode.
Leaves to others: listing (`kvstore.client`), the journal's file (`journal`).

An export is no snapshot: it shows each key as it was when its page was read.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import time
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import click
import msgspec

from kvstore.cli.asking import talks_to_cluster
from kvstore.cli.commands import EXIT_INTERRUPTED
from kvstore.cli.data import end_with_missing, listed_members, skip_down_option
from kvstore.cli.frame import complain, emit, human_bytes, reporting, write_json
from kvstore.cli.importer import in_thread
from kvstore.cli.journal import Journal
from kvstore.cli.progress import Progress, progress
from kvstore.client import Client, ListedItem, Page
from kvstore.errors import BadCursor

_SUFFIX = ".kvstore-export"
_PAGE_SIZE = 1000
_TTL_S_MIN = 0.001


@click.command()
@click.argument("prefix", default="")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to FILE instead of standard output.",
)
@skip_down_option
@talks_to_cluster
def export(prefix: str, output: Path | None, skip_down: bool, url: str, as_json: bool) -> None:
    """Write all keys that start with PREFIX (all, without) and their values as NDJSON, for `kvstore import`.

    \b
    A line is {"key","version","value"|"value_base64","ttl"?};
    ttl is the time left in seconds.

    With -o, the lines go to FILE.part, which becomes FILE when it is complete; interrupted, the same command goes
    on where it stopped. If FILE is a device or a FIFO, the lines go straight to it. With -o and --json, the last line
    on standard output is {"exported","bytes","seconds"}.

    While a shard is down this fails, since a gap is worse. With --skip-down the keys of the other shards are exported,
    standard error says what is missing ({"missing":[partitions]} with --json), and the exit code is 1 if anything is:
    FILE is there, but it is not all.

    \b
    Example:
      kvstore export > backup.ndjson
      kvstore export user/ -o users.ndjson
      kvstore export --skip-down -o rest.ndjson
    """
    with reporting(as_json):
        if output is None:
            end_with_missing(asyncio.run(_to_stdout(url, prefix, skip_down)), as_json)
            return
        if _cannot_be_replaced(output):
            with output.open("wb", buffering=0) as stream:
                missing = asyncio.run(_to_stream(url, prefix, stream, skip_down, as_json))
            end_with_missing(missing, as_json)
            return
        target = Path(os.path.realpath(output))
        try:
            end_with_missing(asyncio.run(_ToFile(url, prefix, target, skip_down, as_json).run()), as_json)
        except KeyboardInterrupt:
            complain(f"kvstore: interrupted. {target}.part is kept; the same command goes on from there.")
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


async def _total(kv: Client, prefix: str, skip_down: bool) -> int:
    return (await kv.count_what_is_up(prefix)).count if skip_down else await kv.count(prefix)


async def _to_stdout(url: str, prefix: str, skip_down: bool) -> set[int]:
    """The partitions that were left out."""
    # On a terminal the lines themselves are the progress.
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    missing: set[int] = set()
    async with Client(url) as kv:
        total = await _total(kv, prefix, skip_down) if shown else None
        with progress("export", total, bar=shown) as bar:
            async for page in kv.pages(prefix, values=True, page_size=_PAGE_SIZE, skip_down=skip_down):
                missing.update(page.missing)
                write_json(_lines(page))
                bar.add(len(page.items), len(page.items))
    return missing


def _cannot_be_replaced(output: Path) -> bool:
    """A device, FIFO or socket; also a file without a name, which /dev/fd/N may lead to."""
    try:
        return not stat.S_ISREG(output.stat().st_mode) or not Path(os.path.realpath(output)).exists()
    except OSError:
        return False  # nothing is there yet


async def _to_stream(url: str, prefix: str, stream: RawIOBase, skip_down: bool, as_json: bool) -> set[int]:
    """The partitions that were left out."""
    began_s = time.monotonic()
    size = records = 0
    missing: set[int] = set()
    async with Client(url) as kv:
        with progress("export", await _total(kv, prefix, skip_down)) as bar:
            async for page in kv.pages(prefix, values=True, page_size=_PAGE_SIZE, skip_down=skip_down):
                missing.update(page.missing)
                lines = memoryview(_lines(page))
                while lines:
                    written = await in_thread(partial(stream.write, lines)) or 0
                    size, lines = size + written, lines[written:]
                records += len(page.items)
                bar.add(len(page.items), len(page.items))
    _summary(as_json, records, size, time.monotonic() - began_s)
    return missing


def _summary(as_json: bool, records: int, size: int, seconds: float) -> None:
    document = {"exported": records, "bytes": size, "seconds": round(seconds, 3)}
    line = f"exported {records:,} records ({human_bytes(size)}) in {seconds:.1f} s"
    emit(as_json, document, line)


class _ToFile:
    """`output` is no link: what it leads to is replaced.

    `_missing`: the partitions that were left out, those of the pages before an interruption included.
    """

    def __init__(self, url: str, prefix: str, output: Path, skip_down: bool, as_json: bool) -> None:
        self._url, self._prefix, self._output, self._as_json = url, prefix, output, as_json
        self._skip_down = skip_down
        self._missing: set[int] = set()
        self._part = output.with_name(output.name + ".part")
        self._bytes = self._records = 0

    async def run(self) -> set[int]:
        """The partitions that were left out."""
        began_s = time.monotonic()
        async with Client(self._url) as kv:
            work = {"export": self._prefix, "cluster_id": (await kv.cluster())["cluster_id"]}
            work |= {"skip_down": True} if self._skip_down else {}
            journal = Journal(self._output.with_name(self._output.name + _SUFFIX), work)
            with progress("export", await _total(kv, self._prefix, self._skip_down)) as bar:
                try:
                    await self._pages(kv, journal, self._resume(journal), bar)
                except BadCursor:
                    journal.close()
                    journal.forget()
                    await self._pages(kv, journal, None, bar)
                finally:
                    journal.close()
            self._part.replace(self._output)
            journal.delete()
        _summary(self._as_json, self._records, self._bytes, time.monotonic() - began_s)
        return self._missing

    def _resume(self, journal: Journal) -> str | None:
        """The cursor of the page to go on with, if the journal and the partial file agree."""
        entries = journal.entries()
        if entries and self._part.exists():
            size, records, cursor, *missing = entries[-1]
            if self._part.stat().st_size >= size:
                self._bytes, self._records, self._missing = size, records, set(*missing)
                complain(f"kvstore: going on after {records:,} records in {self._part}.")
                return str(cursor)
        journal.forget()
        return None

    async def _pages(self, kv: Client, journal: Journal, after: str | None, bar: Progress) -> None:
        if after is None:
            self._bytes = self._records = 0
            self._missing.clear()
        bar.resume_at(self._records)
        with self._part.open("r+b") if after is not None else self._new_part() as file:
            file.truncate(self._bytes)
            file.seek(self._bytes)
            pages = kv.pages(self._prefix, values=True, page_size=_PAGE_SIZE, after=after, skip_down=self._skip_down)
            async for page in pages:
                self._missing.update(page.missing)
                self._write(file, page)
                bar.add(len(page.items), len(page.items))
                if page.next is not None:
                    missing = [sorted(self._missing)] if self._skip_down else []
                    journal.append([[self._bytes, self._records, page.next, *missing]])
            file.flush()
            os.fsync(file.fileno())

    def _new_part(self) -> BinaryIO:
        """The partial file, empty, with owner and mode of the file whose place it will take."""
        try:
            facts = self._output.stat()
        except FileNotFoundError:
            return self._part.open("wb")
        file = open(self._part, "wb", opener=partial(os.open, mode=0o600))  # noqa: SIM115 (it is the caller's)
        mode = stat.S_IMODE(facts.st_mode)
        try:
            os.fchown(file.fileno(), facts.st_uid, facts.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG  # the rights of its group are not for the new file
        os.fchmod(file.fileno(), mode)
        return file

    def _write(self, file: BinaryIO, page: Page) -> None:
        lines = _lines(page)
        file.write(lines)
        file.flush()  # before the journal says so
        self._bytes += len(lines)
        self._records += len(page.items)


def _lines(page: Page) -> bytes:
    return b"".join(msgspec.json.encode(_members(item)) + b"\n" for item in page.items)


def _members(item: ListedItem) -> dict[str, object]:
    members = listed_members(item)
    if item.ttl is not None:
        members["ttl"] = max(item.ttl, _TTL_S_MIN)  # what was still there when it was read must be importable
    return members
