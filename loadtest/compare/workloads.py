"""What is run against every system.

Owns: the list of workloads, the keys and the values.
Promises: the same keys, values and proportions for every system; all requests are built before the clock runs.
Leaves to others: the form of a request (dialects.py), running it (drive.py).

A new workload is one entry of WORKLOADS: how its requests are built from keys, or, where random replay is not enough
(a request that needs something from the answer before it), what is needed around a wrk script of its own (stateful.py).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from loadtest.compare.dialects import Dialect
from loadtest.compare.http1 import Request
from loadtest.compare.stateful import Cas, HotCas, LockCycles, Stateful

VALUE_BYTES = 100
_REPLAY = Path(__file__).with_name("replay.lua")
_ALPHABET = string.ascii_letters + string.digits


class Data(NamedTuple):
    """The keys and, for each, the value stored before the first run and the one that the runs write."""

    keys: Sequence[str]
    stored: Sequence[bytes]
    written: Sequence[bytes]


class Workload(NamedTuple):
    """`requests` gives what wrk chooses from, at random; it raises Unsupported for a system that cannot do it.

    `operations` is the number of operations in one request; rates and CPU time are told per operation. A stateful
    workload has no requests: it writes its own file before each run, and counts its operations itself.
    """

    name: str
    title: str
    requests: Callable[[Dialect, Data], list[Request]] | None
    operations: int = 1
    stateful: Stateful | None = None

    @property
    def script(self) -> Path:
        return _REPLAY if self.stateful is None else self.stateful.script


def make_data(keys: int, seed: int) -> Data:
    """`keys` keys with two values of 100 bytes each; the same for the same seed."""
    rng = random.Random(seed)

    def values() -> list[bytes]:
        return ["".join(rng.choices(_ALPHABET, k=VALUE_BYTES)).encode() for _ in range(keys)]

    return Data([f"key-{number:08d}" for number in range(keys)], values(), values())


def preload(dialect: Dialect, data: Data) -> list[Request]:
    """The requests that store all keys with their first values."""
    return [dialect.put(key, value) for key, value in zip(data.keys, data.stored, strict=True)]


def _get(dialect: Dialect, data: Data) -> list[Request]:
    return [dialect.get(key) for key in data.keys]


def _put(dialect: Dialect, data: Data) -> list[Request]:
    return [dialect.put(key, value) for key, value in zip(data.keys, data.written, strict=True)]


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("get", "GET of a random key", _get),
        Workload("put", "PUT of a random key", _put),
        Workload("cas", "compare-and-set of a random key", None, stateful=Cas()),
        Workload("cas-hot", "increments of one key by compare-and-set", None, stateful=HotCas()),
        Workload("lock", "acquire and release of a random lock", None, stateful=LockCycles()),
    )
}
