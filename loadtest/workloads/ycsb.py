"""The core workloads of YCSB: six mixes over the same keys.

Owns: the mixes A to F of Cooper et al., "Benchmarking cloud serving systems with YCSB" (SoCC 2010), in the calls of
this store, the values, and the loading of the first keys.
Promises: every value names its key, and every read looks for that name: a value under a wrong key is a failure.
Leaves to others: which key (keys), histories: these workloads measure; what they do is not judged.

    A  update heavy        50 % read, 50 % update            zipfian
    B  read mostly         95 % read,  5 % update            zipfian
    C  read only          100 % read                         zipfian
    D  read latest         95 % read,  5 % insert            latest
    E  short ranges        95 % scan,  5 % insert            zipfian; 1 to 100 keys, uniform
    F  read-modify-write   50 % read, 50 % read and write    zipfian

YCSB scans from a key on. Here a scan is one page of a listing: of the keys that share their first digits with the key.
Read-modify-write is a compare-and-set, so that it loses nothing; YCSB's own writes whatever was there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from loadtest.workloads import calls
from loadtest.workloads.calls import Call, Reply, Steps
from loadtest.workloads.keys import Choice, Keys

VALUE_BYTES = 100
SCAN_MAX = 100
_BATCH = 500


class Share(NamedTuple):
    """How often, and over which keys."""

    read: float = 0.0
    update: float = 0.0
    insert: float = 0.0
    scan: float = 0.0
    modify: float = 0.0
    choice: Choice = Keys.zipfian


class Mix(Enum):
    A = Share(read=0.5, update=0.5)
    B = Share(read=0.95, update=0.05)
    C = Share(read=1.0)
    D = Share(read=0.95, insert=0.05, choice=Keys.latest)
    E = Share(scan=0.95, insert=0.05)
    F = Share(read=0.5, modify=0.5)


class Ycsb:
    """One client of one mix."""

    def __init__(self, mix: Mix, keys: Keys, rng: random.Random) -> None:
        share = mix.value
        actions = (self._read, self._update, self._insert, self._scan, self._modify)
        chosen = [(action, weight) for action, weight in zip(actions, share[:5], strict=True) if weight]
        self._actions = [action for action, _ in chosen]
        self._weights = [weight for _, weight in chosen]
        self._choice = share.choice
        self._keys = keys
        self._rng = rng
        self._name = f"YCSB {mix.name}"

    def step(self) -> Steps[None]:
        (action,) = self._rng.choices(self._actions, self._weights)
        reply = yield from action()
        yield from calls.rest(reply)

    def _key(self) -> str:
        return self._choice(self._keys, self._rng)

    def _read(self) -> Steps[Reply]:
        return (yield _get(f"{self._name} read", self._key()))

    def _update(self) -> Steps[Reply]:
        key = self._key()
        return (yield calls.put(f"{self._name} update", key, value_of(key, self._rng)))

    def _insert(self) -> Steps[Reply]:
        key = self._keys.fresh()
        reply = yield calls.put(f"{self._name} insert", key, value_of(key, self._rng))
        if reply.outcome == "done":
            self._keys.insert(key)
        return reply

    def _scan(self) -> Steps[Reply]:
        limit = self._rng.randint(1, SCAN_MAX)
        return (yield calls.page(f"{self._name} scan", self._keys.bucket(self._key()), limit, values=True))

    def _modify(self) -> Steps[Reply]:
        key = self._key()
        for _ in range(calls.RETRIES_MAX):
            reply = yield _get(f"{self._name} modify, read", key)
            if reply.outcome != "done":
                break
            value = value_of(key, self._rng)
            reply = yield calls.swap(f"{self._name} modify, write", key, value, reply.version)
            if reply.status not in (409, 412):
                break
        return reply


def value_of(key: str, rng: random.Random) -> bytes:
    """100 bytes that no client can guess and that name their key."""
    return f"{key} {rng.randbytes(VALUE_BYTES).hex()}".encode()[:VALUE_BYTES]


def loading(keys: Keys, count: int, rng: random.Random) -> Iterator[Call]:
    """The batches that write the first `count` keys."""
    for first in range(0, count, _BATCH):
        names = [keys.name(number) for number in range(first, min(first + _BATCH, count))]
        puts = [{"op": "put", "key": name, "value": value_of(name, rng).decode()} for name in names]
        yield calls.batch("load", puts)


def _get(name: str, key: str) -> Call:
    begin = f"{key} ".encode()

    def check(reply: Reply) -> str | None:
        return None if reply.status == 404 or reply.body.startswith(begin) else "the value of another key"

    return calls.get(name, key, check)
