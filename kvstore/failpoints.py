"""Named points at which a test makes a real process die or stand still; off, and nearly free, in normal runs.

Owns: the environment variable KVSTORE_FAILPOINTS, for example
`batch-after-commit=kill@3;batch-before-commit=pause:200`, or `@FILE`: then the points are taken from that file whenever
there is one, and the file is taken away, so that whoever comes in the place of a dead process does not find it.
Promises: without the variable `hit` does nothing. `kill` ends the process as SIGKILL does, at the n-th time with
`@n`; `stop` lets it stand still as SIGSTOP does, until somebody sends SIGCONT, also with `@n`; `pause:MS` sleeps that
many milliseconds in the calling thread, each time.
A simulation is told of every point that is hit (`watch`), and does what it likes.
Leaves to others: where the points are: grep for `failpoints.hit`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _parse(text: str) -> dict[str, tuple[str, int]]:
    points = {}
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        if action.startswith("pause:"):
            points[name] = ("pause", int(action.removeprefix("pause:")))
        elif action.partition("@")[0] in _SIGNALS:
            points[name] = (action.partition("@")[0], int(action.partition("@")[2] or 1))
        else:
            raise ValueError(f"KVSTORE_FAILPOINTS: {item!r} is none of NAME=kill[@N], NAME=stop[@N], NAME=pause:MS")
    return points


_text = os.environ.get("KVSTORE_FAILPOINTS", "")
_file = Path(_text[1:]) if _text.startswith("@") else None
_points = _parse("" if _file else _text)
_hits: dict[str, int] = {}
_taking = Lock()  # points are hit in several threads
active = bool(_points)
_watcher: Callable[[tuple[str, ...]], None] | None = None


def watch(watcher: Callable[[tuple[str, ...]], None] | None) -> None:
    """From now on call it with the names of the points that are hit, until `watch(None)`."""
    global _watcher
    _watcher = watcher


def arm(text: str) -> None:
    """Take these points instead of those so far, counted anew: for `kvstore up --demo`. Raises ValueError."""
    global _points, active
    with _taking:
        _points, active = _parse(text), bool(text)
        _hits.clear()


def hit(*names: str) -> None:
    """The process has come to the points `names`."""
    if _watcher is not None:
        _watcher(names)
    if _file is not None:
        _take(_file)
    if not _points:
        return
    for name in filter(_points.__contains__, names):
        action, number = _points[name]
        _hits[name] = _hits.get(name, 0) + 1
        if action == "pause":
            time.sleep(number / 1000)
        elif _hits[name] == number:
            os.kill(os.getpid(), _SIGNALS[action])


def _take(file: Path) -> None:
    """The points in the file instead of those so far, counted anew. Raises ValueError."""
    global _points, active
    with _taking:
        if file.exists():
            text = file.read_text(encoding="ascii")
            file.unlink()
            _points, active = _parse(text), bool(text)
            _hits.clear()
