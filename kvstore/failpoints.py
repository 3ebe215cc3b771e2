"""Named points at which a test makes a real process die or stand still.
Off, and nearly free, in normal runs.

Owns: the environment variable KVSTORE_FAILPOINTS, for example
`batch-after-commit=kill@3;batch-before-commit=pause:200`, or `@FILE`: then the points are taken from that file whenever
there is one, and the file is taken away, so that the successor of a dead process does not find it.
Promises: without the variable `hit` does nothing. `kill` ends the process as SIGKILL does, at the n-th time with
`@n`; `stop` lets it stand still as SIGSTOP does, until SIGCONT comes, also with `@n`; `pause:MS` sleeps that
many milliseconds in the calling thread, each time. `bug` plants the bug of that name, for as long as the process runs:
`planted` says so where the code has a promise to break, so that the checkers can be seen to find it. Those of
`OF_COPIES` do nothing without copies.
A simulation is told of every point that is hit (`watch`), and does what it likes.
`POINTS` lists every point, by who comes to it (`transactions`, `source` and `destination` of a move are shards).
Leaves to others: where the points are: grep for `failpoints.hit` and `failpoints.planted`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_SIDES = ("before", "after")
POINTS = {
    "router": (
        *(f"txn-{side}-{what}-sent" for what in ("prepare", "decide", "finish") for side in _SIDES),
        "txn-after-reads-sent",
        "txn-after-decided",
        "txn-before-forget-sent",
    ),
    "transactions": tuple(
        f"{step}-{side}-commit"
        for step in ("batch", "transact", "prepare", "decide", "finish", "abort", "ask", "forget")
        for side in _SIDES
    ),
    "source": tuple(f"{step}-{side}-commit" for step in ("freeze", "adopt", "trim") for side in _SIDES),
    "destination": (
        *(f"{step}-{side}-commit" for step in ("clear", "take", "complete") for side in _SIDES),
        *(f"move-{side}-{what}" for what in ("copy", "freeze") for side in _SIDES),
        "move-after-last-pull",
        "move-after-complete",
    ),
    "controller": (
        *(f"controller-{side}-plan" for side in _SIDES),
        *(f"move-{side}-commit" for side in _SIDES),
        "move-after-freeze-seen",
        "move-before-void",
    ),
}
OF_COPIES = {
    "acknowledge-before-sync": "a copy acknowledges records that are in its log, and not on its disk yet",
    "answer-before-copies": "a write is answered before the copies that are waited for have it",
    "answer-without-lease": "a primary answers reads though no copy grants it the lease",
    "commit-without-copies": "a move is committed though its destination has fewer copies in sync than its source",
    "give-up-too-many": "nodes are given up, and partitions move, however many nodes are silent at once",
    "go-on-behind": "a controller with an old copy of its record goes on, though nodes follow newer maps",
    "grant-after-promise": "a copy grants the lease to a primary of a lower term than it has promised",
    "grant-while-promising": "a copy grants its primary the lease while it promises itself a higher term",
    "in-sync-too-early": "a primary asks to count a copy as in sync which lacks records",
    "lease-kept": "a primary goes on by the lease that it has given back",
    "move-too-many": "partitions move, however many nodes are silent at once",
    "old-term-taken": "a copy goes on to take records in the session of a term that is over",
    "open-own-log": "an opening takes its own log for the truth, though another copy's is longer",
    "promise-forgotten": "a copy follows a primary of a lower term than it has promised",
    "promise-not-durable": "a promise is told before it is on the disk",
    "promote-not-in-sync": "a copy that is joining takes over from a dead primary",
    "request-of-silent": "what a primary has asked for of its copies is granted though it is not heard any more",
    "serve-alone": "a store that has copies is opened by its own map, without a new term",
    "stale-snapshot-page": "a copy takes a page of a snapshot that another session has begun, also once it is whole",
    "time-out-ends-waiting": "a primary waits no more for a copy that is late, before a map says that it is out",
    "told-not-compared": "a term is opened with a log that ends below what the controller was told of",
    "whole-too-early": "a copy is whole before it has the records that the pages of its snapshot show",
}
BUGS = {
    "early-answer": "a write is answered, and seen by reads, before it is in the log",
    "applied-before-durable": "the file gets rows before the log is synced",
    "late-cache-fill": "what a reader found enters the cache although the key has changed since",
    "ignore-token": "writes need no token, or any, for a name that is leased",
    "ignore-intent": "reads do not look whether a transaction is at work on a key: they see half of it",
    "freeze-stops-only-writes": "a source goes on answering reads of a partition that it has frozen for its move",
    "late-prepare-applied": "an intent that came after its attempt's decision was applied is applied once more",
    "decision-dropped-early": "a decision goes before all who hold keys of its attempt have finished",
    "expiry-by-reader": "a reader decides by its own clock that a key has expired, before the store has",
    "done-not-kept": "a destination tells that all of a move has come, and does not write that down",
    "move-without-last-pull": "a move is called complete without what changed between its last pull and the freeze",
    **OF_COPIES,
}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _parse(text: str) -> dict[str, tuple[str, int]]:
    points = {}
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        if action == "bug":
            plant(name)
        elif action.startswith("pause:"):
            points[name] = ("pause", int(action.removeprefix("pause:")))
        elif action.partition("@")[0] in _SIGNALS:
            points[name] = (action.partition("@")[0], int(action.partition("@")[2] or 1))
        else:
            raise ValueError(f"KVSTORE_FAILPOINTS: {item!r} is none of NAME=kill[@N], stop[@N], pause:MS, bug")
    return points


_planted: set[str] = set()


def plant(name: str) -> None:
    """Break the promise of that bug from now on. Raises ValueError for a name that BUGS does not list."""
    if name not in BUGS:
        raise ValueError(f"KVSTORE_FAILPOINTS: no bug is called {name!r}, only {', '.join(sorted(BUGS))}")
    _planted.add(name)


@contextmanager
def planting(name: str) -> Iterator[None]:
    """That bug is there within the block; none if the name is empty.
    Raises ValueError for one that is not in BUGS."""
    before = set(_planted)
    if name:
        plant(name)
    try:
        yield
    finally:
        _planted.intersection_update(before)


def planted(name: str) -> bool:
    """Whether this process is to be wrong in that way."""
    return name in _planted


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
    """Take these points instead of those so far, counted again: for `kvstore up --demo`. Raises ValueError."""
    global _points, active
    with _taking:
        _points, active = _parse(text), bool(text)
        _hits.clear()


def hit_steps(steps: list[str], side: str) -> None:
    """The process is before, or after, the commit of a batch with these steps."""
    if _points or _file is not None or _watcher is not None:
        hit(*(f"{step}-{side}-commit" for step in steps))


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
    """The points in the file instead of those so far, counted again. Raises ValueError."""
    global _points, active
    with _taking:
        if file.exists():
            text = file.read_text(encoding="ascii")
            file.unlink()
            _points, active = _parse(text), bool(text)
            _hits.clear()
