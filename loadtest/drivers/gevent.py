"""What a Locust process needs besides its users: requests that are sent once, the history, loading and clearing.

Owns: how a workload's calls go through Locust's client and into its statistics; the files of a history.
Promises: every request is sent once (`once_client`), and every failure is counted under its problem code. A call whose
user was ended in the middle enters the history as one of unknown outcome. A history is in its file only.
Leaves to others: what a client does (loadtest.workloads), when it begins and ends (loadtest/locustfile.py).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import random
import sys
from pathlib import Path
from typing import Any, TypeVar

import gevent
from gevent.pool import Pool
from locust.contrib.fasthttp import FastHttpSession
from locust.event import EventHook

from loadtest.drivers.once_client import NeverSent, OnceClient
from loadtest.histories.history import History, now_s
from loadtest.workloads import calls, ycsb
from loadtest.workloads.calls import NO_ANSWER, NOTHING, Call, Pause, Reply, Steps
from loadtest.workloads.keys import Keys
from loadtest.workloads.place import Place, numbers_of

_LOADERS = 4

log = logging.getLogger("loadtest")
Result = TypeVar("Result")


class Unexpected(Exception):
    """An answer that is a failure. Statistics show it as its sentence alone."""

    def __repr__(self) -> str:
        return str(self)


class Failed(Exception):
    """The run cannot begin; the message says why."""


# --- requests --------------------------------------------------------------------------------------------------------


def session(host: str, request_event: Any, user: Any = None) -> FastHttpSession:
    """One that sends every request once, follows nothing, and leaves the judgement of a status to its caller."""
    once: Any = OnceClient()
    http = FastHttpSession(host, request_event, user, client_pool=once, max_retries=0, max_redirects=0)
    agent: Any = http.client
    agent.valid_response_codes = frozenset(range(1000))
    agent.redirect_response_codes = frozenset()
    agent.cookiejar = None
    return http


def quiet(host: str) -> FastHttpSession:
    """One whose requests are in no statistics."""
    unheard: Any = EventHook
    return session(host, unheard())


def send(http: FastHttpSession, call: Call, begin_s: float) -> Reply:
    """One request, counted as what it is."""
    data: Any = call.body
    answer: Any = http.request(
        call.method, call.path, name=call.name, data=data, headers=dict(call.headers), catch_response=True
    )
    with answer as response:
        error = getattr(response, "error", None)
        if error is not None:
            status = calls.NEVER_SENT if isinstance(error, NeverSent) else NO_ANSWER
            reply = Reply(status, error=str(error), begin_s=begin_s, end_s=now_s())
        else:
            tag = (response.headers.get("ETag") or "").strip('"')
            version = int(tag) if tag.isdecimal() else None
            reply = Reply(response.status_code, response.content or b"", version, "", begin_s, now_s())
        wrong = calls.failure(call, reply)
        if wrong is None:
            response.success()
        else:
            response.failure(Unexpected(wrong))
    return reply


def drive(http: FastHttpSession, steps: Steps[Result]) -> Result:
    """Send what these steps ask for. Of what was sent by a user that is ended the outcome is unknown."""
    reply = NOTHING
    try:
        asked = next(steps)
        while True:
            if isinstance(asked, Pause):
                gevent.sleep(asked.seconds)
                reply = NOTHING
            else:
                begin_s = now_s()
                try:
                    reply = send(http, asked, begin_s)
                except gevent.GreenletExit:
                    with contextlib.suppress(StopIteration):
                        steps.send(Reply(NO_ANSWER, error="the user was ended", begin_s=begin_s))
                    raise
            asked = steps.send(reply)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


# --- a run, as one process sees it -----------------------------------------------------------------------------------


class Run:
    """What the users of this process share. `process` counts the workers from 0; a master is -1."""

    def __init__(self, options: argparse.Namespace, process: int) -> None:
        self.keys = Keys(f"{options.prefix}ycsb/", options.keys, max(process, 0))
        self._history: History | None = None
        if options.history is not None:
            self._history = History(file_of(options.history, process))
        self._prefix = f"{options.prefix}{options.run}/"
        self._process = process
        self._numbers = numbers_of(process + 1)
        self._clients = itertools.count()

    def place(self, client: str | None = None) -> Place:
        note = None if self._history is None else self._history.add
        name = f"{self._process}.{next(self._clients)}" if client is None else client
        return Place(self._prefix, name, self._numbers, random.Random(), note)

    def close(self) -> None:
        if self._history is not None:
            self._history.close()
            self._history = None


def file_of(history: str, process: int) -> Path:
    """FILE for a process alone and for a master, FILE.0, FILE.1 and so on for workers."""
    return Path(history if process < 0 else f"{history}.{process}")


def remove_files(history: str) -> None:
    """Those of an earlier run."""
    file = Path(history)
    for old in file.parent.glob(f"{file.name}*"):
        if old == file or (old.stem == file.name and old.suffix[1:].isdecimal()):
            old.unlink()


# --- loading and clearing --------------------------------------------------------------------------------------------


def expect_ready(host: str) -> None:
    """Raises Failed unless a router that is ready is there."""
    reply = send(quiet(host), Call("ready", "GET", "/readyz"), now_s())
    if reply.status != 200:
        raise Failed(f"no router is ready at {host} ({reply.said}): start a cluster with `kvstore up`")


def load(host: str, options: argparse.Namespace, keys: Keys) -> None:
    """The first keys of YCSB, unless an earlier run has loaded as many. Raises Failed."""
    http = quiet(host)
    mark = f"{options.prefix}ycsb-loaded"
    found = drive(http, calls.insist(calls.get("load", mark)))
    if found.status == 200 and int(found.body) >= options.keys:
        return
    batches = list(ycsb.loading(keys, options.keys, random.Random()))
    _all_of(host, batches, "loading", options.keys)
    drive(http, calls.insist(calls.put("load", mark, b"%d" % options.keys)))


def clear(host: str, prefix: str) -> None:
    """Delete all keys below it. Raises Failed."""
    items = drive(quiet(host), calls.pages("clear", prefix, limit=10_000))
    if items is None:
        raise Failed(f"the keys below {prefix} cannot be listed at {host}: is the cluster up?")
    deletes = [{"op": "delete", "key": item.key} for item in items]
    batches = [calls.batch("clear", deletes[first : first + 1000]) for first in range(0, len(deletes), 1000)]
    _all_of(host, batches, "clearing", len(deletes))


def _all_of(host: str, batches: list[Call], what: str, total: int) -> None:
    """Send these, some at a time, and show how far it is. Raises Failed."""
    began_s, done = now_s(), 0

    def one(call: Call) -> Reply:
        return drive(quiet(host), calls.insist(call))

    for number, (call, reply) in enumerate(zip(batches, Pool(_LOADERS).imap(one, batches), strict=True), start=1):
        if wrong := calls.failure(call, reply):
            raise Failed(f"{what} failed: {wrong}")
        done = total * number // len(batches)
        if sys.stderr.isatty():
            left_s = (now_s() - began_s) * (total - done) / max(done, 1)
            print(f"\r{what}: {done:,} of {total:,} keys, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    log.info("%s %s keys took %.1f s", what, f"{total:,}", now_s() - began_s)
