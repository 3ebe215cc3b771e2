"""Load with Locust: YCSB A to F, and workloads whose histories can be judged.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --web-host 127.0.0.1   the web page, at port 8089
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --headless -t 60s --html report.html
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --headless -t 60s -u 200 -r 100 --processes 2
        --history run.ndjson Bank Register        and then:  python -m loadtest.histories --together run.ndjson*

Without names of classes it is a mix of all. `--list` lists them; `--help` ends with the options added here.

Owns: the users (one class for each workload), the options, loading before and closing reads after a run, the files.
Promises: every request is sent once. An answer that the workload expects is no failure; every other one is counted
under its problem code. Each process writes a history file of its own.
Leaves to others: what a client does (loadtest.workloads), the verdict (loadtest.histories).
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import gevent
from locust import events, stats, task
from locust.contrib.fasthttp import FastHttpUser
from locust.runners import MasterRunner, WorkerRunner

from loadtest.drivers.gevent import Failed, Run, clear, drive, expect_ready, load, quiet, remove_files, session
from loadtest.histories.history import now_s
from loadtest.workloads import judged
from loadtest.workloads.judged import Judged
from loadtest.workloads.place import Workload
from loadtest.workloads.ycsb import Mix, Ycsb

USERS = 50
TASK_S = 1.0
STOP_TIMEOUT_S = 10.0
_REST_TIMEOUT_S = STOP_TIMEOUT_S + 5.0

log = logging.getLogger("loadtest")
current: Run | None = None
_rested: set[str] = set()  # the workers whose users have ended


# --- users -----------------------------------------------------------------------------------------------------------


class KeyValueUser(FastHttpUser):
    """A client that waits for nothing but answers: a closed loop without think time."""

    abstract = True

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.client = session(environment.host, environment.events.request, self)

    def on_start(self) -> None:
        assert current is not None
        self.workload = self.make(current)

    def make(self, run: Run) -> Workload:
        raise NotImplementedError

    @task
    def work(self) -> None:
        """Step after step. Between two tasks Locust lets all its other users go first: with many of them, most would
        wait there for their turn and not for the store, and the latencies would be those of a few."""
        until_s = now_s() + TASK_S
        while now_s() < until_s:
            drive(self.client, self.workload.step())


class YcsbUser(KeyValueUser):
    abstract = True
    mix: Mix

    def make(self, run: Run) -> Workload:
        return Ycsb(self.mix, run.keys, random.Random())


class JudgedUser(KeyValueUser):
    abstract = True
    kind: Judged

    def make(self, run: Run) -> Workload:
        return self.kind.value.client(run.place())


_WEIGHTS = {
    Mix.A: 4,
    Mix.B: 4,
    Mix.C: 2,
    Mix.D: 2,
    Mix.E: 1,
    Mix.F: 2,
    Judged.BANK: 2,
    Judged.REGISTER: 2,  # 1: all others
}
_NAMES = {Judged.SECTION: "CriticalSection"}


def _users() -> Iterator[type[KeyValueUser]]:
    """A class for each mix, as `YcsbA`, and for each judged workload, as `Bank`: by these names Locust finds them."""
    for mix in Mix:
        yield type(f"Ycsb{mix.name}", (YcsbUser,), {"mix": mix, "weight": _WEIGHTS[mix]})
    for kind in Judged:
        name = _NAMES.get(kind, kind.name.capitalize())
        yield type(name, (JudgedUser,), {"kind": kind, "weight": _WEIGHTS.get(kind, 1)})


globals().update((user.__name__, user) for user in _users())


def kinds_of(environment: Any) -> list[Judged]:
    return [user.kind for user in environment.user_classes if issubclass(user, JudgedUser)]


# --- before and after ------------------------------------------------------------------------------------------------


def add_options(parser: Any, **_: Any) -> None:
    group = parser.add_argument_group("Load on a key-value store")
    group.add_argument("--keys", type=_count, default=10_000, help="Keys that YCSB loads before it begins (10000).")
    group.add_argument("--prefix", type=_prefix, default="locust/", help="All keys begin with it (locust/).")
    group.add_argument(
        "--history",
        metavar="FILE",
        help="Write what was called and answered, for `python -m loadtest.histories --together FILE*`. Several "
        "processes write FILE, FILE.0, FILE.1 and so on, and must run on one machine.",
    )
    group.add_argument("--clear-start", action="store_true", help="Delete all keys of the prefix before it begins.")
    group.add_argument("--clear-end", action="store_true", help="Delete all keys of the prefix when it has ended.")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 2 on")
    return int(text)


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-][A-Za-z0-9_./-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: use letters, digits and _ . - / only, and begin with none of the /"
        )
    return text


def on_init(environment: Any, runner: Any, **_: Any) -> None:
    options = environment.parsed_options
    if isinstance(runner, WorkerRunner):
        runner.register_message("rest", on_rest)
        return
    if isinstance(runner, MasterRunner):
        runner.register_message("rested", lambda environment, msg: _rested.add(msg.node_id))
    options.run = ""
    options.num_users = USERS if options.num_users is None else options.num_users
    options.spawn_rate = options.num_users if options.spawn_rate is None else options.spawn_rate
    environment.stop_timeout = environment.stop_timeout or STOP_TIMEOUT_S
    if options.headless:  # before the clock of --run-time
        try:
            prepare(environment)
        except Failed as failed:
            log.error("%s", failed)
            sys.exit(1)


def on_start(environment: Any, **_: Any) -> None:
    global current
    if isinstance(environment.runner, WorkerRunner):
        current = Run(environment.parsed_options, environment.runner.worker_index)
    elif current is None:
        try:
            prepare(environment)
        except Failed as failed:
            log.error("%s", failed)
            current = None
            raise gevent.GreenletExit from None  # ends the start, and not the web page


def prepare(environment: Any) -> None:
    """Everything that is done once, by one process, before the users begin. Raises Failed."""
    global current
    options, host = environment.parsed_options, (environment.host or "").rstrip("/")
    if not re.match(r"http://[^/]+$", host):
        raise Failed(f"--host {host}: give the address of a router, such as http://127.0.0.1:8080")
    environment.host = host
    expect_ready(host)
    options.run = uuid.uuid4().hex[:8]
    if options.history is not None:
        remove_files(options.history)
    current = Run(options, -1)
    if options.clear_start:
        clear(host, options.prefix)
    if any(issubclass(user, YcsbUser) for user in environment.user_classes):
        load(host, options, current.keys)
    if unopened := drive(quiet(host), judged.opening(current.place("opening"), kinds_of(environment))):
        raise Failed(f"could not begin with {', '.join(unopened)}: is the cluster at {host} up?")


def on_stopping(environment: Any, **_: Any) -> None:
    """A master waits until the users of all workers have ended: the closing reads come last."""
    runner = environment.runner
    if isinstance(runner, MasterRunner):
        _rested.clear()
        runner.send_message("rest")
        deadline_s = now_s() + _REST_TIMEOUT_S
        while any(worker.id not in _rested for worker in runner.clients.all) and now_s() < deadline_s:
            gevent.sleep(0.05)


def on_rest(environment: Any, msg: Any) -> None:
    """A worker ends its users, and says so."""
    runner = environment.runner
    runner.stop_users(dict(runner.user_classes_count))
    runner.send_message("rested")


def on_stop(environment: Any, **_: Any) -> None:
    global current
    if current is None:
        return
    run, current = current, None
    options, host = environment.parsed_options, environment.host
    try:
        if isinstance(environment.runner, WorkerRunner):
            return
        if options.history is not None:
            if unread := drive(quiet(host), judged.closing(run.place("closing"), kinds_of(environment))):
                log.error("no closing reads of %s: the history cannot be judged by itself", ", ".join(unread))
                environment.process_exit_code = 1
            else:
                log.info("the history is written: python -m loadtest.histories --together %s*", options.history)
        if options.clear_end:
            clear(host, options.prefix)
    except Failed as failed:
        log.error("%s", failed)
    finally:
        run.close()


stats.HISTORY_STATS_INTERVAL_SEC = 1  # of the points in the report
stats.PERCENTILES_TO_CHART = [0.5, 0.99]
hooks: Any = events
hooks.init_command_line_parser.add_listener(add_options)
hooks.init.add_listener(on_init)
hooks.test_start.add_listener(on_start)
hooks.test_stopping.add_listener(on_stopping)
hooks.test_stop.add_listener(on_stop)
