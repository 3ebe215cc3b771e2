"""All clients of a chaos run, and the reads before and after a phase, when they rest.

Owns: how many of each workload there are, letting them work and rest, what is read at the end of a phase, whether a
listing shows the same.
Promises: the history of a phase can be judged on its own: it begins with the accounts as they were and ends with a read
of everything that was written.
Leaves to others: what each client does (loadtest.workloads), requests (loadtest.drivers.aio), when (run), judging
(loadtest.histories).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from loadtest.chaos.meter import Meter
from loadtest.cluster import changes
from loadtest.drivers.aio import Wire, drive
from loadtest.histories.history import AnyOperation, Balances, Count, Lists, Register
from loadtest.histories.verdict import CLOSING, OPENING
from loadtest.workloads import bank, calls, judged
from loadtest.workloads.answers import Reply
from loadtest.workloads.calls import Call
from loadtest.workloads.judged import Judged
from loadtest.workloads.place import FAULTS, Place, Workload, numbers_of

COUNTS: Mapping[Judged, int] = {
    Judged.BANK: 8,
    Judged.APPEND: 5,
    Judged.REGISTER: 6,
    Judged.COUNTER: 3,
    Judged.SECTION: 4,
    Judged.SET: 3,
    Judged.EXPIRY: 4,
}
PACE_S = 0.02
_READ_TIMEOUT_S = 60.0
_POLL_S = 0.1
_SHOWN_MAX = 5

Stored = dict[str, tuple[bytes, int]]  # values and versions by key


class ReadsError(Exception):
    """What must be readable is not, although the cluster says that it is ready; the message says what."""


class Closing(NamedTuple):
    """`operations`: the whole history of the phase. `stored`: all keys of it. `wrong`: sentences on listings."""

    operations: list[AnyOperation]
    stored: Stored
    wrong: list[str]


class Failure(NamedTuple):
    """A call that was answered otherwise than its workload expects, from when to when (monotonic)."""

    what: str
    begin_s: float
    end_s: float


class Client:
    """One client. `run` goes on until it is cancelled.
    `gate` lets it pass or holds it; `idle` is set while held."""

    def __init__(self, name: str, kind: Judged, wire: Wire) -> None:
        self.name = name
        self.kind = kind
        self.wire = wire
        self.gate = asyncio.Event()
        self.idle = asyncio.Event()
        self.workload: Workload | None = None

    async def run(self) -> None:
        """Step after step, while the gate is open."""
        while True:
            if not self.gate.is_set():
                self.idle.set()
                await self.gate.wait()
                self.idle.clear()
            assert self.workload is not None
            await drive(self.wire, self.workload.step())
            await asyncio.sleep(self.wire.rng.uniform(0.0, 2 * PACE_S))


class Clients:
    """`urls`: for clients; `quiet_urls`: those past the proxy, for what is not the load. `failures`: of the load."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        quiet_urls: Sequence[str],
        seed: int,
        meter: Meter,
        was_duplicated: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self.quiet = Wire(http, quiet_urls, seed)
        self.all: list[Client] = []
        self.failures: list[Failure] = []
        self._prefix = ""
        self._operations: list[AnyOperation] = []
        self._numbers = numbers_of(0)
        self._shared: dict[Judged, dict[str, Any]] = {}
        for kind, count in COUNTS.items():
            for number in range(count):
                wire = Wire(http, urls, seed * 1000 + len(self.all), self._watch(kind, meter), was_duplicated)
                self.all.append(Client(f"{kind.name.lower()}-{number}", kind, wire))

    def _watch(self, kind: Judged, meter: Meter) -> Callable[[Call, Reply], None]:
        def watch(call: Call, reply: Reply) -> None:
            waits = call.method == "POST" and call.path.startswith("/v1/locks/")
            meter.take(kind.name.lower(), reply, None if waits else reply.end_s - reply.begin_s)
            if (wrong := calls.failure(call, reply)) is not None:
                self.failures.append(Failure(f"{call.name}: {wrong}", reply.begin_s, reply.end_s))

        return watch

    # --- working and resting -----------------------------------------------------------------------------------------

    async def turn_to(self, prefix: str) -> None:
        """New keys for all, and what they need before they begin. Raises ReadsError."""
        self._prefix = prefix
        self._operations.clear()
        self._shared = {kind: {} for kind in Judged}
        for client in self.all:
            client.workload = client.kind.value.client(self._place(client.name, client.kind, client.wire))
        await self._all(OPENING, judged.opening)

    def _place(self, name: str, kind: Judged, wire: Wire) -> Place:
        note = self._operations.append
        return Place(self._prefix, name, self._numbers, wire.rng, note, FAULTS, self._shared[kind])

    async def _all(self, name: str, part: Callable[..., Any]) -> None:
        for kind in COUNTS:
            if await drive(self.quiet, part(self._place(name, kind, self.quiet), [kind])):
                raise ReadsError(f"the {name} reads of {kind.name.lower()} cannot be done; {self._counts()}")

    def open_gates(self) -> None:
        for client in self.all:
            client.idle.clear()
            client.gate.set()

    def close_gates(self) -> None:
        for client in self.all:
            client.gate.clear()

    async def idle(self) -> None:
        """Returns when none has a request under way any more."""
        for client in self.all:
            await client.idle.wait()

    def take_complaints(self) -> list[str]:
        """Answers that no router may give."""
        found = [f"{client.name}: {sentence}" for client in self.all for sentence in client.wire.complaints]
        found += [f"closing: {sentence}" for sentence in self.quiet.complaints]
        for wire in [self.quiet, *(client.wire for client in self.all)]:
            wire.complaints.clear()
        return found

    # --- the end of a phase ------------------------------------------------------------------------------------------

    def so_far(self) -> Closing:
        """All that was done, without the reads at the end, while the clients rest."""
        return Closing(sorted(self._operations, key=lambda operation: operation.begin_s), {}, [])

    async def close(self) -> Closing:
        """Read all that was written, of a cluster at rest, and compare it with a listing. Raises ReadsError."""
        before = len(self._operations)
        await self._all(CLOSING, judged.closing)
        stored = await self.stored(self._prefix)
        wrong = compared(self._operations[before:], stored, self._prefix)
        return self.so_far()._replace(stored=stored, wrong=wrong)

    async def stored(self, prefix: str) -> Stored:
        """All keys with this prefix, as they are listed. Raises ReadsError."""
        deadline_s = time.monotonic() + _READ_TIMEOUT_S
        while True:
            items = await drive(self.quiet, calls.pages("list", prefix, values=True))
            if items is not None:
                return {item.key: ((item.value or "").encode(), item.version) for item in items}
            if time.monotonic() > deadline_s:
                raise ReadsError(f"the keys below {prefix} cannot be listed; {self._counts()}")
            await asyncio.sleep(_POLL_S)

    async def counted(self) -> int:
        """How many keys the shards count; -1 if a router cannot tell."""
        shards = (await changes.cluster(self.quiet)).get("shards", [])
        return sum(shard["keys"] or 0 for shard in shards) if shards else -1

    def _counts(self) -> str:
        counts = ", ".join(f"{count} x {status}" for status, count in sorted(self.quiet.counts.items()))
        return f"although no fault lasts any more; answers by status: {counts}"


def compared(reads: Sequence[AnyOperation], stored: Stored, prefix: str = "") -> list[str]:
    """Sentences on keys that are listed otherwise than they were read, of a cluster at rest."""
    wrong = []
    for key, value, version in _single_values(reads, prefix):
        listed_value, listed_version = stored.get(key, (None, None))
        if listed_value != value or (version is not None and listed_version != version):
            wrong.append(f"{key}: listed as {listed_value!r} at {listed_version}, read as {value!r} at {version}")
    return wrong[:_SHOWN_MAX]


def _single_values(reads: Sequence[AnyOperation], prefix: str) -> Iterator[tuple[str, bytes | None, int | None]]:
    """Keys with what was read of them; a version of None is not known."""
    for read in reads:
        if isinstance(read, Register):
            yield read.key, None if read.value is None else read.value.encode(), read.version
        elif isinstance(read, Count):
            yield read.key, None if read.value is None else b"%d" % read.value, None
        elif isinstance(read, Balances):
            for number, account in read.accounts.items():
                yield bank.key_of(prefix, number), b"%d" % account.balance, account.version
        elif isinstance(read, Lists):
            for key, values in read.reads:
                yield key, msgspec.json.encode(values) if values else None, None
