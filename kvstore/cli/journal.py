"""A sidecar file that says how far a long command came, so that the same command goes on from there.

Owns: the file's form: a JSON line that names the work, then a JSON line per piece done, appended.
Promises: what it lists is done. A line that a crash cut short is ignored; a file that names other work is not believed.
Leaves to others: what a piece is, and when it is done (import: acknowledged by the store, which is after its fsync).

Losing the journal, or its last lines, is harmless: pieces are done once more, and doing them again changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec


class Journal:
    """`work` names what is done, from which source, into which cluster: all of it must agree to go on."""

    def __init__(self, path: Path, work: dict[str, Any]) -> None:
        self.path = path
        self._work = work
        self._file: IO[bytes] | None = None
        self._valid_bytes = 0

    def entries(self) -> list[Any] | None:
        """What an earlier run wrote; empty if there is no journal, None if it is that of other work."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        documents = []
        size = 0
        for line in lines:
            try:
                document = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                break
            if not line.endswith(b"\n"):
                break
            documents.append(document)
            size += len(line)
        if not documents or documents[0] != self._work:
            return None
        self._valid_bytes = size
        return documents[1:]

    def forget(self) -> None:
        """Begin again: what stands in the file no longer counts."""
        self._valid_bytes = 0

    def append(self, entries: Iterable[Any]) -> None:
        """Note these as done. Raises OSError if it cannot be written."""
        if self._file is None:
            mode = "r+b" if self.path.exists() else "w+b"
            # Keys stand in it: no other user may read it, whatever the source or the destination is.
            self._file = open(self.path, mode, opener=partial(os.open, mode=0o600))  # noqa: SIM115
            self._file.truncate(self._valid_bytes)
            self._file.seek(self._valid_bytes)
            if not self._valid_bytes:
                self._write([self._work])
        self._write(entries)

    def close(self) -> None:
        """Keep the file for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def delete(self) -> None:
        """The work is done."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, entries: Iterable[Any]) -> None:
        assert self._file is not None
        self._file.writelines(msgspec.json.encode(entry) + b"\n" for entry in entries)
        self._file.flush()
