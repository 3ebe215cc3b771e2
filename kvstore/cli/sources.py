"""What is imported: the records of an NDJSON stream, or the files below a folder.

Owns: reading, checking and decoding of both; the order of records; what is no record and why.
Promises: a source is read once, in bounded memory; every line and every file comes out as exactly one entry.
Leaves to others: storing the records, noting their `mark` in a journal (`importer`).
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec

from kvstore.cli.frame import VALUE_BYTES_READ_MAX, printable
from kvstore.operations import value_of
from kvstore.strict_json import decode_strictly

# A value at its largest, every byte of it escaped (\u0000).
LINE_BYTES_MAX = 6 * VALUE_BYTES_READ_MAX


@dataclass(frozen=True, slots=True)
class Record:
    """To be stored. `steps`: bytes of the source; `mark`: the journal's entry once it and all before it are stored."""

    key: str
    value: bytes
    ttl: float | None
    steps: int
    mark: Any


@dataclass(frozen=True, slots=True)
class NoRecord:
    """Something in the source that is no record: `where`, why not, and what that means.

    `bad-line`: the source is broken there. `refused`: it should have been stored. `skipped`: nothing is missing.
    """

    where: str
    reason: str
    kind: Literal["bad-line", "refused", "skipped"]
    steps: int = 0
    mark: Any = None


Entry = Record | NoRecord


# --- NDJSON ---------------------------------------------------------------------------------------------------


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    value: str | msgspec.UnsetType = msgspec.UNSET
    value_base64: str | msgspec.UnsetType = msgspec.UNSET
    ttl: Annotated[float, msgspec.Meta(gt=0)] | None = None
    version: msgspec.Raw = msgspec.Raw()  # of an export: ignored


_lines = msgspec.json.Decoder(_Line)


def ndjson_records(stream: BinaryIO, *, offset: int = 0, line: int = 0) -> Iterator[Entry]:
    """One entry per line that is not blank; `stream` stands at `offset`, after `line` lines. Marks: [offset, line].

    A byte order mark, with which some editors and shells begin a file, is passed over (files may have been joined).
    """
    while raw := stream.readline(LINE_BYTES_MAX + 1):
        size = len(raw)
        too_long = size > LINE_BYTES_MAX
        while too_long and not raw.endswith(b"\n") and (raw := stream.readline(LINE_BYTES_MAX)):
            size += len(raw)
        offset, line = offset + size, line + 1
        mark = [offset, line]
        if too_long:
            yield NoRecord(f"line {line}", f"it has {size:,} bytes", "bad-line", size, mark)
        elif raw.removeprefix(codecs.BOM_UTF8).strip():
            yield _record_of_line(raw.removeprefix(codecs.BOM_UTF8), size, line, mark)


def _record_of_line(raw: bytes, size: int, line: int, mark: Any) -> Entry:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return NoRecord(f"line {line}", "this is UTF-16: save the file as UTF-8", "bad-line", size, mark)
    try:
        fields = decode_strictly(_lines, raw)
        given = {
            name: text
            for name, text in (("value", fields.value), ("value_base64", fields.value_base64))
            if text is not msgspec.UNSET
        }
        if len(given) != 1:
            raise ValueError("exactly one of `value` and `value_base64` is needed")
        value = value_of(given)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return NoRecord(f"line {line}", str(error), "bad-line", size, mark)
    assert value is not None
    return Record(fields.key, value, fields.ttl, size, mark)


# --- a folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    name: str  # below the folder, with / between its parts; both as `os.fsdecode` gives them
    size: int
    mtime_ns: int


def folder_bytes(folder: Path) -> int:
    """The sum of the files' sizes, as of now."""
    return sum(entry.size for entry in _files(folder) if isinstance(entry, _File))


def folder_records(folder: Path, done: frozenset[tuple[str, int, int]] = frozenset()) -> Iterator[Entry]:
    """One entry per file, sorted folder by folder; the key is its path below `folder`, byte for byte.

    Files in `done` (key, size, mtime_ns: the marks) are left out. Symbolic links to files are followed, those to
    folders are not, so that there is an end to it; they and what is no regular file are skipped.
    """
    for entry in _files(folder):
        if isinstance(entry, NoRecord):
            yield entry
        elif (mark := (entry.name, entry.size, entry.mtime_ns)) not in done:
            yield _record_of_file(entry, mark)


def _record_of_file(file: _File, mark: Any) -> Entry:
    where = _shown(file.name)
    try:
        # A name with bytes that are not UTF-8 has surrogates in it (PEP 383), which UTF-8 cannot encode.
        file.name.encode()
    except UnicodeEncodeError:
        return NoRecord(where, "its name is not UTF-8, so it cannot be a key", "refused", file.size)
    if file.size > VALUE_BYTES_READ_MAX:
        return NoRecord(where, f"it has {file.size:,} bytes; no cluster takes that", "refused", file.size)
    try:
        with Path(file.path).open("rb") as content:
            return Record(file.name, content.read(VALUE_BYTES_READ_MAX + 1), None, file.size, mark)
    except OSError as error:
        return NoRecord(where, f"it cannot be read: {error.strerror}", "refused", file.size)


def _files(folder: Path) -> Iterator[_File | NoRecord]:
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort(key=os.fsencode)
        below = Path(parent).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for name in sorted(names, key=os.fsencode):
            yield _stat(f"{parent}/{name}", f"{prefix}{name}")
        for name in folders:
            if Path(parent, name).is_symlink():
                yield NoRecord(_shown(f"{prefix}{name}"), "a link to a folder is not followed", "skipped")
        yield from _refusals(unreadable)
    yield from _refusals(unreadable)


def _refusals(unreadable: list[OSError]) -> Iterator[NoRecord]:
    while unreadable:
        error = unreadable.pop(0)
        yield NoRecord(_shown(str(error.filename)), f"it cannot be read: {error.strerror}", "refused")


def _stat(path: str, name: str) -> _File | NoRecord:
    try:
        facts = Path(path).stat()
    except FileNotFoundError:
        return NoRecord(_shown(name), "it has gone, or is a link that leads nowhere", "skipped")
    except OSError as error:
        return NoRecord(_shown(name), f"it cannot be read: {error.strerror}", "refused")
    if not stat.S_ISREG(facts.st_mode):
        return NoRecord(_shown(name), "it is no regular file", "skipped")
    return _File(path, name, facts.st_size, facts.st_mtime_ns)


def _shown(name: str) -> str:
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))
