"""What is run against every system.

Owns: the list of workloads.
Promises: the same keys, values and proportions for every system; all requests are built before the clock runs.
Leaves to others: keys and values (data.py), the form of a request (dialects.py), running it (drive.py).

A new workload is one entry of WORKLOADS: how its requests are built from keys, or, where random replay is not enough
(a request that needs something from the answer before it), what is needed around a wrk script of its own (stateful.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from kvstore.config import default_config
from loadtest.bench import batches, transactions
from loadtest.bench.data import Data
from loadtest.bench.dialects import Dialect
from loadtest.bench.http1 import Request
from loadtest.bench.stateful import Cas, HotCas, LockCycles, Stateful
from loadtest.bench.transactions import Transactions

_CONFLICT_S = round(default_config().limits.txn_timeout_s)  # a run that is shorter ends before any 409
_REPLAY = Path(__file__).with_name("replay.lua")


Requests = Callable[[Dialect, Data], list[Request]]
Check = Callable[[str, Dialect, Data], Awaitable[None]]


class Workload(NamedTuple):
    """`requests` gives what wrk chooses from, at random; it raises Unsupported for a system that cannot do it.

    `operations` is the number of operations in one request (or in what the script counts); rates and CPU time are told
    per operation. `replay` is the
    script that replays the requests; `check` raises RuntimeError if a system does not do what is to be measured.
    Answers that take longer than `timeout_s` are errors, and are missing in the latencies. A run takes `seconds_min` at
    least. A stateful workload has no requests: it writes its own file before each run, and counts its operations
    itself.
    """

    name: str
    requests: Requests | None
    operations: int = 1
    stateful: Stateful | None = None
    replay: Path = _REPLAY
    check: Check | None = None
    timeout_s: int = 2
    seconds_min: int = 1

    @property
    def script(self) -> Path:
        return self.replay if self.stateful is None else self.stateful.script


def preload(dialect: Dialect, data: Data) -> list[Request]:
    """The requests that store all keys with their first values."""
    return [dialect.put(key, value) for key, value in zip(data.keys, data.stored, strict=True)]


def _get(dialect: Dialect, data: Data) -> list[Request]:
    return [dialect.get(key) for key in data.keys]


def _put(dialect: Dialect, data: Data) -> list[Request]:
    return [dialect.put(key, value) for key, value in zip(data.keys, data.written, strict=True)]


def _of_batches(name: str, requests: Requests, check: Check) -> Workload:
    return Workload(name, requests, operations=batches.OPERATIONS, replay=batches.SCRIPT, check=check)


def _of_transactions(name: str, draw: transactions.Draw, seconds_min: int = 1) -> Workload:
    drawn = Transactions(draw)
    return Workload(
        name,
        drawn.requests,
        replay=transactions.SCRIPT,
        check=drawn.check,
        timeout_s=2 * _CONFLICT_S,
        seconds_min=seconds_min,
    )


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("get", _get),
        Workload("put", _put),
        _of_batches("batch100", batches.put_requests, batches.check_puts),
        _of_batches("batch100-get", batches.get_requests, batches.check_gets),
        Workload("list", batches.page_requests, check=batches.check_pages),
        Workload("cas", None, stateful=Cas()),
        Workload("cas-hot", None, stateful=HotCas()),
        Workload("lock", None, stateful=LockCycles()),
        _of_transactions("txn4", transactions.over_all_stores),
        _of_transactions("txn1", transactions.in_one_store),
        _of_transactions("txn-zipf", transactions.zipf, 2 * _CONFLICT_S),
    )
}
