"""The Debian package index as import lines: `python -m loadtest.debian_index [FILE…] > packages.ndjson`.

Owns: reading stanzas from Packages files, and the key that each gets.
Promises: one line per package, `{"key": "debian/<package>/<version>/<architecture>", "value": "<the stanza>"}`, with
`value_base64` where the stanza is not UTF-8; the value is the stanza's bytes exactly, line ends included; the same
input gives the same output; no key comes twice; nothing is held in memory but one stanza and the keys seen.
Leaves to others: storing the lines (`kvstore import`) and reading them back (loadtest/verify.py).

The same package and version may stand in several indexes (a suite, its updates, its security archive). An equal stanza
is written once; one that differs (say, another Filename) gets a key with `/2`, `/3` … in the order of the input.

Format: https://www.debian.org/doc/debian-policy/ch-controlfields.html and
https://wiki.debian.org/DebianRepository/Format#A.22Packages.22_Indices
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

APT_LISTS = Path("/var/lib/apt/lists")
APT_HELPER = "/usr/lib/apt/apt-helper"
_DIGEST_BYTES = 16


class BadIndex(Exception):
    """The index cannot be read; the message says where and what to do."""


class Stanza(NamedTuple):
    """`line` is the number of its first line, from 1; `data` its bytes without the empty line that ends it."""

    source: str
    line: int
    data: bytes

    def field(self, name: str) -> str:
        """A field of one line. Raises BadIndex when it is missing, empty or not UTF-8."""
        start = name.lower().encode() + b":"
        for line in self.data.splitlines():
            if line[: len(start)].lower() == start:
                try:
                    value = line[len(start) :].strip().decode()
                except UnicodeDecodeError:
                    raise BadIndex(f"{self.source}:{self.line}: the field {name} is not UTF-8") from None
                if value:
                    return value
        raise BadIndex(f"{self.source}:{self.line}: a stanza without the field {name}: is this a Packages file?")


def stanzas(lines: Iterable[bytes], source: str) -> Iterator[Stanza]:
    """The stanzas of a Packages file, given line by line with line ends."""
    begun: list[bytes] = []
    first = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            if not begun:
                first = number
            begun.append(line)
        elif begun:
            yield Stanza(source, first, b"".join(begun))
            begun = []
    if begun:
        yield Stanza(source, first, b"".join(begun))


def records(found: Iterable[Stanza]) -> Iterator[tuple[str, bytes]]:
    """Key and value for each stanza, repeated ones left out, keys unique. Raises BadIndex."""
    seen: dict[str, list[bytes]] = {}  # the digests of the stanzas of one package, version and architecture
    for stanza in found:
        key = "/".join(("debian", *(stanza.field(name) for name in ("Package", "Version", "Architecture"))))
        digest = hashlib.blake2b(stanza.data, digest_size=_DIGEST_BYTES).digest()
        digests = seen.setdefault(key, [])
        if digest not in digests:
            digests.append(digest)
            yield (key if len(digests) == 1 else f"{key}/{len(digests)}"), stanza.data


def to_line(key: str, value: bytes) -> bytes:
    """One import line, as `kvstore import` takes it."""
    try:
        record = {"key": key, "value": value.decode()}
    except UnicodeDecodeError:
        record = {"key": key, "value_base64": base64.b64encode(value).decode("ascii")}
    return msgspec.json.encode(record) + b"\n"


# --- where the bytes come from --------------------------------------------------------------------------------


def open_index(path: Path) -> Iterator[Stanza]:
    """The stanzas of a Packages file, also one ending in .gz, .xz or .lz4. Raises BadIndex."""
    try:
        with _opener(path)(path) as file:
            yield from stanzas(file, str(path))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BadIndex(f"{path}: {error}") from error


def _opener(path: Path) -> Callable[[Path], AbstractContextManager[Iterable[bytes]]]:
    openers: dict[str, Callable[[Path], AbstractContextManager[Iterable[bytes]]]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".lz4": lambda name: _output_of(_lz4_command(name)),
    }
    return openers.get(path.suffix, lambda name: name.open("rb"))


def _lz4_command(path: Path) -> list[str]:
    """lz4 where it is installed, else apt's own reader. Raises BadIndex when there is neither."""
    if shutil.which("lz4") is not None:
        return ["lz4", "-dc", str(path)]
    if Path(APT_HELPER).exists():
        return [APT_HELPER, "cat-file", str(path)]
    raise BadIndex(f"{path}: to read lz4, install it: apt-get install lz4")


@contextmanager
def _output_of(command: list[str]) -> Iterator[Iterable[bytes]]:
    """The standard output of a program. Raises BadIndex when it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process.stdout or ()
        problem = (process.stderr.read() if process.stderr is not None else b"").decode(errors="replace").strip()
    if process.returncode != 0:
        raise BadIndex(f"{' '.join(command)}: {problem or f'exit code {process.returncode}'}")


def what_apt_has() -> Iterator[Stanza]:
    """The stanzas of all indexes that apt has fetched, in the order of their names; else of `apt-cache dumpavail`."""
    files = sorted(path for path in APT_LISTS.glob("*_Packages*") if path.is_file())
    if files:
        for path in files:
            yield from open_index(path)
    elif shutil.which("apt-cache") is not None:
        with _output_of(["apt-cache", "dumpavail"]) as file:
            yield from stanzas(file, "apt-cache dumpavail")
    else:
        raise BadIndex(f"no index in {APT_LISTS} and no apt-cache: name a Packages file (see --help)")


@click.command(
    help="Convert the Debian package index to lines for `kvstore import`. Without FILE: what apt has fetched."
)
@click.argument("files", metavar="[FILE…]", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    found = (stanza for path in files for stanza in open_index(path)) if files else what_apt_has()
    output = sys.stdout.buffer
    written = 0
    try:
        for key, value in records(found):
            output.write(to_line(key, value))
            written += 1
        output.flush()
    except BadIndex as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:  # the reader has seen enough (head): nothing is wrong, but the exit must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not written:
        raise click.ClickException("no package found: the index is empty (apt-get update fetches it)")
    click.echo(f"{written:,} packages", err=True)


if __name__ == "__main__":
    main()
