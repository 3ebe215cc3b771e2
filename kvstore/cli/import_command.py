"""import: NDJSON or a folder into the cluster, resumable.

Owns: the command's arguments, where its journal lies, what it tells people and programs.
Promises: whatever stops it, what was confirmed is stored, and the same command run again ends with the same data.
Leaves to others: reading (`sources`), storing (`importer`), the journal's file (`journal`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec

from kvstore.cli.asking import talks_to_cluster
from kvstore.cli.commands import EXIT_INTERRUPTED
from kvstore.cli.frame import (
    EXIT_NO_DECISION,
    EXIT_STORE_SAID_NO,
    complain,
    emit,
    human_bytes,
    printable,
    report,
    reporting,
    sentence,
)
from kvstore.cli.importer import BadLine, Done, Importer, batches, in_thread
from kvstore.cli.journal import Journal
from kvstore.cli.progress import Progress, progress
from kvstore.cli.sources import Entry, folder_bytes, folder_records, ndjson_records
from kvstore.client import Client
from kvstore.errors import KvError

_SUFFIX = ".kvstore-import"


@click.command("import")
@click.argument("file", required=False, metavar="[FILE.ndjson|-]")
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="All files below DIR; a file's key is its path below DIR.",
)
@click.option("--skip-bad", is_flag=True, help="Count and name bad lines instead of stopping at the first.")
@click.option(
    "--journal",
    "journal_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PATH",
    help=f"Where to note what is done [default: FILE{_SUFFIX} or DIR{_SUFFIX}].",
)
@talks_to_cluster
def import_(
    file: str | None, folder: Path | None, skip_bad: bool, journal_path: Path | None, url: str, as_json: bool
) -> None:
    """Store the records of FILE.ndjson (- for standard input) or the files below DIR.

    A line is {"key","value"|"value_base64","ttl"?}, as `kvstore export` writes them ("version" is ignored).
    Keys that exist are replaced. Of two lines with one key the later wins.

    It can be interrupted and run again: what is stored is noted in a journal beside the source, from which the
    same command goes on, and which is deleted at the end. A journal counts only for the same cluster and an
    unchanged FILE; files below DIR that changed since are stored again. Delete it to begin again. Standard input,
    and a FILE that is a FIFO or a device, have none. Running an import twice is harmless: it stores the same values.

    Values that the store refuses (too large) and files that cannot be read or named as a key are reported on
    standard error, and the others go on. Links to folders and what is no regular file are skipped.

    \b
    Exit codes: 0 all stored; 1 some refused, or the disk is full; 2 a bad line
    (unless --skip-bad), or no answer for a minute; 130 interrupted.
    With --json: {"stored","bytes","refused","bad_lines","skipped",
    "stored_before","seconds"}.

    \b
    Example:
      kvstore import packages.ndjson
      kvstore import --dir /usr/share/doc
      kvstore export | kvstore import - --url http://127.0.0.1:8081
    """
    if (file is None) == (folder is None):
        raise click.UsageError("name either a FILE (or - for standard input) or --dir DIR")
    if file == "-" and journal_path is not None:
        raise click.UsageError("standard input cannot be read again, so --journal goes with FILE or --dir only")
    is_stream = file is not None and file != "-" and _is_stream(Path(file))
    if file not in {None, "-"} and not (is_stream or Path(str(file)).is_file()):
        raise click.BadParameter(f"there is no file {file!r}", param_hint="FILE")
    if is_stream and journal_path is not None:
        raise click.UsageError(f"{file} cannot be read again, so --journal goes with FILE or --dir only")
    work = _Import(skip_bad, as_json)
    if folder is not None:
        work.source = Path(folder).resolve()
    elif is_stream:
        work.stream = Path(str(file))
    elif file != "-":
        work.source = Path(str(file)).resolve()
    with reporting(as_json):
        raise click.exceptions.Exit(work.run(url, journal_path))


@dataclass(slots=True)
class _Counts:
    stored: int = 0
    bytes: int = 0
    refused: int = 0
    bad_lines: int = 0
    skipped: int = 0
    stored_before: int = 0


class _Import:
    """One import; `source` None is standard input, or the FIFO or device `stream`."""

    def __init__(self, skip_bad: bool, as_json: bool) -> None:
        self.source: Path | None = None
        self.stream: Path | None = None
        self._skip_bad = skip_bad
        self._as_json = as_json
        self._counts = _Counts()
        self._journal: Journal | None = None
        self._stream: BinaryIO | None = None
        self._progress = Progress("import", None)

    def run(self, url: str, journal_path: Path | None) -> int:
        """The exit code. Raises KvError when the store could not go on."""
        began_s = time.monotonic()
        try:
            asyncio.run(self._import(url, journal_path))
        except KeyboardInterrupt:
            complain(f"kvstore: interrupted. {self._how_far()}")
            return EXIT_INTERRUPTED
        except BadLine as error:
            stored = self._counts.stored + self._counts.stored_before
            hint = f"Mend it, or pass --skip-bad. The {stored:,} records before it are stored."
            report(KvError(str(error), next_step=hint), self._as_json)
            return EXIT_NO_DECISION
        except KvError as error:
            if self._counts.stored:
                error.members["next_step"] = f"{error.problem()['next_step']} {self._how_far()}"
            raise
        finally:
            if self._journal:
                self._journal.close()
            if self._stream:
                self._stream.close()
        if self._journal:
            self._journal.delete()
        self._summary(time.monotonic() - began_s)
        return EXIT_STORE_SAID_NO if self._counts.refused else 0

    async def _import(self, url: str, journal_path: Path | None) -> None:
        async with Client(url) as kv:
            entries, total, before = await self._open(kv, journal_path)
            with progress("import", total) as self._progress:
                self._progress.resume_at(before)
                importer = Importer(kv, self._progress, self._done)
                await importer.run(batches(entries, skip_bad_lines=self._skip_bad))

    # --- the source and its journal ------------------------------------------------------------------------------

    async def _open(self, kv: Client, journal_path: Path | None) -> tuple[Iterator[Entry], int | None, int]:
        """What is still to be stored.
        The entries, the size of the source in bytes, and how much of it was done before."""
        cluster_id = (await kv.cluster())["cluster_id"]  # also: fail now, not after a long scan
        if self.source is None:
            return ndjson_records(await self._open_stream()), None, 0
        path = journal_path or self.source.with_name(self.source.name + _SUFFIX)
        facts = self.source.stat()
        work: dict[str, Any] = {"import": os.fsencode(self.source).decode("utf-8", "backslashreplace")}
        if not stat.S_ISDIR(facts.st_mode):
            work |= {"bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
        self._journal = Journal(path, {**work, "cluster_id": cluster_id})
        marks = self._marks(self._journal)
        if stat.S_ISDIR(facts.st_mode):
            return await self._open_folder(self.source, marks)
        return self._open_file(self.source, facts.st_size, marks)

    async def _open_stream(self) -> BinaryIO:
        if (path := self.stream) is None:
            return _standard_input()
        return await in_thread(lambda: path.open("rb"))  # a FIFO opens when a writer opens it

    def _marks(self, journal: Journal) -> list[Any]:
        marks = journal.entries()
        if marks is None:
            complain(f"kvstore: {journal.path} is of another import, or the source has changed: beginning again.")
            return []
        if marks:
            complain(f"kvstore: going on from {journal.path}.")
        return marks

    async def _open_folder(self, folder: Path, marks: list[Any]) -> tuple[Iterator[Entry], int, int]:
        done = frozenset((key, size, mtime_ns) for key, size, mtime_ns in marks)
        self._counts.stored_before = len(done)
        total = await in_thread(lambda: folder_bytes(folder))
        return folder_records(folder, done), total, sum(size for _, size, _ in done)

    def _open_file(self, file: Path, size: int, marks: list[Any]) -> tuple[Iterator[Entry], int, int]:
        offset, line = 0, 0
        if marks:
            (offset, line), counts = marks[-1]
            before = msgspec.convert(counts, _Counts)
            self._counts.stored_before = before.stored + before.stored_before
            self._counts.refused, self._counts.bad_lines = before.refused, before.bad_lines
        self._stream = file.open("rb")
        self._stream.seek(offset)
        return ndjson_records(self._stream, offset=offset, line=line), size, offset

    # --- what is done --------------------------------------------------------------------------------------------

    def _done(self, done: Done) -> None:
        for record, error in done.refused:
            self._progress.say(f"kvstore: {printable(record.key)}: {sentence(error.detail)}")
        for entry in done.no_records:
            self._progress.say(f"kvstore: {entry.where}: {sentence(entry.reason)}")
        kinds = [entry.kind for entry in done.no_records]
        self._counts.stored += len(done.stored)
        self._counts.bytes += sum(len(record.value) for record in done.stored)
        self._counts.refused += len(done.refused) + kinds.count("refused")
        self._counts.bad_lines += kinds.count("bad-line")
        self._counts.skipped += kinds.count("skipped")
        self._note(done)
        self._progress.add(done.steps, len(done.stored))

    def _note(self, done: Done) -> None:
        if self._journal is None or done.last is None:
            return
        try:
            if self.source is not None and self.source.is_dir():
                self._journal.append(record.mark for record in done.stored)
            else:
                self._journal.append([[done.last.mark, self._counts]])
        except OSError as error:
            self._progress.say(
                f"kvstore: {self._journal.path} cannot be written ({error.strerror}): run again, this import would "
                "begin again, which is harmless. --journal PATH names another place."
            )
            self._journal.close()
            self._journal = None

    def _how_far(self) -> str:
        counts = self._counts
        if not counts.stored + counts.stored_before:
            return "Nothing is stored yet."
        stored = f"{counts.stored + counts.stored_before:,} records are stored."
        if self._journal is None:
            return f"{stored} The same command stores them once more, which is harmless."
        return f"{stored} The same command goes on from there."

    def _summary(self, seconds: float) -> None:
        counts = self._counts
        parts = [
            f"stored {counts.stored:,} records ({human_bytes(counts.bytes)}) in {seconds:.1f} s, "
            f"{counts.stored / max(seconds, 1e-9):,.0f} records/s"
        ]
        for number, words in (
            (counts.stored_before, "stored before"),
            (counts.refused, "refused"),
            (counts.bad_lines, "bad lines left out"),
            (counts.skipped, "skipped"),
        ):
            parts += [f"{words}: {number:,}"] if number else []
        document = {**msgspec.to_builtins(counts), "seconds": round(seconds, 3)}
        emit(self._as_json, document, "; ".join(parts))


def _is_stream(path: Path) -> bool:
    """What can be read but once: a FIFO (as `<(command)` is), or a device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _standard_input() -> BinaryIO:
    # A buffer of its own, which is never closed: after Ctrl-C a thread may be blocked in a read of it for ever, and the
    # interpreter must not wait for that at its exit.
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed; name a FILE")
    return open(sys.stdin.fileno(), "rb", closefd=False)
