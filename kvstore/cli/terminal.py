"""What may be written to a terminal: only what it can show, and nothing that steers it.

Owns: standard streams that are closed or cannot encode a character, the stand-ins for such characters.
Promises: no character raises; whatever is stored under a key cannot move the cursor or end a line; costs no import.
Leaves to others: what is said (`frame`, and the commands).

A terminal that is not set to UTF-8 takes bytes for what its own encoding says. The last byte of "ћ" in UTF-8 is 0x9B,
which begins a control sequence on one that is set to Latin-1: so text for a terminal is written in its encoding.
"""

from __future__ import annotations

import json
import os
import re
import sys

_PLAIN = str.maketrans({"→": "->", "…": "...", "─": "-", "█": "#"})  # of this program; what users stored is escaped
_STEERING = re.compile("[\x7f-\x9f]")  # what JSON leaves of the control characters
_DESCRIPTORS = (0, 1, 2)


def open_streams() -> None:
    """Make standard output and standard error files that take any text.

    If one was closed, what goes there is dropped; else the next file opened would get its number, and be written to.
    """
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # the lowest number that is free; reading from it fails, as it should
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Standard output goes nowhere from now on, else Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def encoded(line: str, on_terminal: bool, encoding: str) -> bytes:
    """A line for people: UTF-8, or what the terminal can show of it.
    Bytes of the command line stay what they were."""
    if not on_terminal or is_utf8(encoding):
        return line.encode("utf-8", "surrogateescape")
    return line.translate(_PLAIN).encode(encoding, "backslashreplace")


def encoded_json(document: bytes, on_terminal: bool, encoding: str) -> bytes:
    """JSON in UTF-8.
    On a terminal with escapes, which say the same, for what it cannot show or what would steer it."""
    if not on_terminal:
        return document
    text = document.decode()
    if not is_utf8(encoding):
        text = re.sub("[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


def is_utf8(encoding: str) -> bool:
    """Whether that is a name of UTF-8."""
    return encoding.lower().replace("_", "-") in {"utf-8", "utf8"}
