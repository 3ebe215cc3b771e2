"""The frame of every command: its output, its end.

Owns: `--config`, the form of an error, the exit codes 0, 1, 2, 130 and 141.
Promises: no traceback for anything that a network, a disk or a user can do; standard output carries results only:
an error is one line on standard error, `kvstore: what happened. What to do.`, with `--json` the problem document.
Leaves to others: what a command does, how it asks a cluster (`asking`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from kvstore.addresses import DEFAULT_URL
from kvstore.cli.commands import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from kvstore.cli.terminal import drop_output, encoded, encoded_json
from kvstore.errors import KvError, NoSuchRoute

EXIT_STORE_SAID_NO = 1
EXIT_NO_DECISION = 2
# A value must fit into the channel between router and shard, whatever the limits of a cluster are.
VALUE_BYTES_READ_MAX = 64 * 1024 * 1024

# Decisions of the store about this key. Other 4xx are wrong usage, other 5xx (and 429) no decision at all.
_STATUS_STORE_SAID_NO = frozenset({404, 409, 412, 413, 423, 507})

# What to do next, where the error's own words are about HTTP. Elsewhere its words are right here, too.
_NEXT_STEPS = {
    "key-empty": "Name a key of 1 to 1,024 bytes.",
    "bad-ttl": "Give the seconds until it expires as a decimal number.",
    "bad-parameter": "",
    "bad-body": "Nothing was done.",
    "precondition-failed": "`kvstore get KEY --json` shows its version: read it, and decide again.",
    "locked": "Try again later, or write with its --token; `kvstore lock NAME --wait 60 -- COMMAND` waits for it.",
    "no-such-route": f"--url must be the address of a router: `kvstore up` prints it ({DEFAULT_URL} by default).",
}

F = TypeVar("F", bound=Callable[..., Any])


def takes_config(about: str) -> Callable[[F], F]:
    """The option --config of commands that read the cluster.yaml of this host; `about`: what its help says."""
    return click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        default=Path("cluster.yaml"),
        show_default=True,
        metavar="FILE",
        help=about,
    )


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """End the command with one readable line and its exit code (`click.exceptions.Exit`) when an error comes up.

    BrokenPipeError can only be standard output's here: those of connections arrive as `KvError`.
    """
    try:
        yield
        sys.stdout.flush()
    except KvError as error:
        report(error, as_json)
        raise click.exceptions.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        drop_output()
        raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        report(KvError(f"{where}{error.strerror or error}.", next_step=""), as_json)
        raise click.exceptions.Exit(EXIT_NO_DECISION) from None


def exit_code(error: KvError) -> int:
    """1 if the store decided against the request, 2 if the request was wrong or nothing was decided."""
    is_no = error.status in _STATUS_STORE_SAID_NO and not isinstance(error, NoSuchRoute)
    return EXIT_STORE_SAID_NO if is_no else EXIT_NO_DECISION


def report(error: KvError, as_json: bool) -> None:
    """One line on standard error."""
    problem = error.problem()
    if as_json:
        line = encoded_json(msgspec.json.encode(problem), sys.stderr.isatty(), sys.stderr.encoding)
        complain(line.decode())
    else:
        next_step = error.members.get("next_step", _NEXT_STEPS.get(error.code, error.next_step))
        complain(f"kvstore: {sentence(str(problem['detail']))} {next_step}".rstrip())


def complain(line: str) -> None:
    """A line on standard error, whatever the terminal's encoding is; nothing if that is closed."""
    try:
        click.echo(line, err=True)
    except OSError:
        pass


def write_out(content: bytes) -> None:
    """These bytes on standard output, all of them.

    With PYTHONUNBUFFERED, as containers like to set it, `write` may take a part only: when a signal comes, or the
    reader of a pipe goes, which would then pass unnoticed.
    """
    left = memoryview(content)
    while left:
        left = left[sys.stdout.buffer.write(left) :]


def say(line: str) -> None:
    """A line on standard output, in UTF-8, or in what the terminal shows."""
    write_out(encoded(line, sys.stdout.isatty(), sys.stdout.encoding) + b"\n")


def as_shown(line: str) -> str:
    """The line as `say` would show it, as text."""
    encoding = sys.stdout.encoding
    return encoded(line, sys.stdout.isatty(), encoding).decode(encoding, "replace")


def say_json(document: Any) -> None:
    """One JSON line on standard output."""
    write_json(msgspec.json.encode(document) + b"\n")


def write_json(lines: bytes) -> None:
    """JSON on standard output; harmless on a terminal, too."""
    write_out(encoded_json(lines, sys.stdout.isatty(), sys.stdout.encoding))


def emit(as_json: bool, document: Any, line: str) -> None:
    """One line on standard output: the document for programs, or the line for people."""
    if as_json:
        say_json(document)
    else:
        say(line)


def sentence(text: str) -> str:
    """`text` made printable, with a full stop if it ends without a mark."""
    line = printable(text)
    return line if line.endswith((".", "?", "!")) else f"{line}."


def printable(text: str) -> str:
    """`text` on one line and without control characters: a stored key must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def human_bytes(count: float) -> str:
    """`12.3 MB`: decimal units, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
