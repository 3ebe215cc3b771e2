"""All clients of a chaos run, and the reads before and after a chapter, when they rest.

Owns: who there is, letting them work and rest, what is read at the end, whether a listing shows the same.
Promises: the history of a chapter can be judged on its own: it begins with the accounts as they were and ends with a
read of everything that was written.
Leaves to others: what each client does (clients, loadtest.txn_clients), when (run), judging (loadtest.histories).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import aiohttp
import msgspec

from loadtest.chaos.clients import Counter, KeyWorker, Locker, Registrar, SetWorker, ended
from loadtest.chaos.meter import Meter, MeteredWire
from loadtest.histories.history import AnyOperation, Balances, Count, Lists, Markers, Register, now_s
from loadtest.move_clients import listed
from loadtest.txn_clients import Appender, Auditor, Places, Teller, Worker, account_key, opening_transaction
from loadtest.txn_wire import Wire

ACCOUNTS = 200
BALANCE = 100
LISTS = 6
PACE_S = 0.02
_ACCOUNTS_PLACED = 100
_PATIENCE_S = 5.0
_READ_TIMEOUT_S = 20.0
_READERS = 8
_POLL_S = 0.1
_SHOWN_MAX = 5

Stored = dict[str, tuple[bytes, int]]  # values and versions by key
_T = TypeVar("_T")


class ReadsError(Exception):
    """What must be readable is not, although the cluster says that it is ready; the message says what."""


class Closing(NamedTuple):
    """`operations`: the whole history of the chapter. `stored`: all keys of it. `wrong`: sentences on listings."""

    operations: list[AnyOperation]
    stored: Stored
    wrong: list[str]


class Crew:
    """`urls`: for clients; `quiet_urls`: those past the links, for what is not the load."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        quiet_urls: Sequence[str],
        seed: int,
        meter: Meter,
        was_repeated: Callable[[str], bool],
    ) -> None:
        numbers: Counts[str] = Counts()

        def wire(workload: str, number: int) -> MeteredWire:
            return MeteredWire(http, urls, seed * 1000 + number, meter, workload, _PATIENCE_S, was_repeated)

        quiet = MeteredWire(http, quiet_urls, seed, Meter(), "closing")
        self.quiet: Wire = quiet
        self._places = Places()
        self._prefix = ""
        self._used: set[str] = set()
        self._tellers = [Teller(f"teller-{n}", wire("bank", n), ACCOUNTS, _PATIENCE_S, self._places) for n in range(8)]
        self._appenders = [Appender(f"appender-{n}", wire("append", 200 + n), numbers) for n in range(4)]
        self._key_workers: list[KeyWorker] = [
            *(Registrar(f"registrar-{n}", wire("register", 300 + n), self._used) for n in range(6)),
            *(Counter(f"counter-{n}", wire("counter", 400 + n)) for n in range(3)),
            *(Locker(f"locker-{n}", wire("critical-section", 500 + n)) for n in range(4)),
            *(SetWorker(f"set-{n}", wire("set", 600 + n)) for n in range(3)),
        ]
        self.workers: list[Worker] = [
            *self._tellers,
            *(Auditor(f"auditor-{n}", wire("bank", 100 + n), ACCOUNTS) for n in range(2)),
            *self._appenders,
            *self._key_workers,
        ]
        for worker in self.workers:
            worker.pace_s = PACE_S
        # those that read when all others rest
        self._auditor = Auditor("closing", quiet, ACCOUNTS)
        self._reader = Appender("closing", quiet, numbers)
        self._registrar = Registrar("closing", quiet, set())
        self._counter = Counter("closing", quiet)
        self._lister = SetWorker("closing", quiet)

    # --- working and resting -----------------------------------------------------------------------------------------

    async def open_bank(self) -> None:
        """Raises ReadsError."""
        reply, answered = await self.quiet.transact(opening_transaction(ACCOUNTS, BALANCE))
        if answered is None or not answered.succeeded:
            raise ReadsError(f"the bank could not be opened: {reply.words}")
        await self._places.learn(self.quiet, _ACCOUNTS_PLACED)

    async def turn_to(self, prefix: str) -> Balances:
        """New keys for all; the accounts as they are now. Raises ReadsError."""
        self._prefix = prefix
        self._used.clear()
        for teller in self._tellers:
            teller.markers = f"{prefix}marker/"
        for appender in [*self._appenders, self._reader]:
            appender.keys = [f"{prefix}list/{number}" for number in range(LISTS)]
        for worker in [*self._key_workers, self._registrar, self._counter, self._lister]:
            worker.turn_to(prefix)
        return await self._audit("opening")

    def open_gates(self) -> None:
        for worker in self.workers:
            worker.idle.clear()
            worker.gate.set()

    def close_gates(self) -> None:
        for worker in self.workers:
            worker.gate.clear()

    async def idle(self) -> None:
        """Returns when none has a request under way any more."""
        for worker in self.workers:
            await worker.idle.wait()

    def take_counts(self) -> Counts[str]:
        found: Counts[str] = Counts()
        for worker in self.workers:
            found.update(worker.wire.counts)
            worker.wire.counts.clear()
        return found

    def take_complaints(self) -> list[str]:
        found = [f"{worker.name}: {sentence}" for worker in self.workers for sentence in worker.wire.complaints]
        found += [f"closing: {sentence}" for sentence in self.quiet.complaints]
        for wire in [self.quiet, *(worker.wire for worker in self.workers)]:
            wire.complaints.clear()
        return found

    # --- the end of a chapter ----------------------------------------------------------------------------------------

    async def close(self, opening: Balances) -> Closing:
        """Read all that was written, of a cluster at rest, and compare it with a listing. Raises ReadsError."""
        history = [operation for worker in self.workers for operation in worker.history.operations]
        for worker in self.workers:
            worker.history.operations.clear()
        balances = await self._audit("closing")
        markers, stored = await self._markers_and_all()
        reads = [*await self._read_lists(), *await self._read_singly(), *await self._list_sets()]
        accounts = await self.stored(account_key(0).rpartition("/")[0] + "/")
        wrong = compared([balances, *reads], stored | accounts)
        history.sort(key=lambda operation: operation.begin_s)
        return Closing([opening, *history, balances, markers, *reads], stored, wrong)

    async def stored(self, prefix: str) -> Stored:
        """All keys with this prefix, as they are listed. Raises ReadsError."""
        pages = await self._insist(lambda: listed(self.quiet, prefix), f"the listing of {prefix}")
        return {key: (value, version) for key, value, version in pages}

    async def _audit(self, name: str) -> Balances:
        async def audit() -> Balances | None:
            await self._auditor.audit()
            found = [each for each in taken(self._auditor, name) if isinstance(each, Balances)]
            return found[0] if found else None

        return await self._insist(audit, "all accounts, in one transaction,")

    async def _markers_and_all(self) -> tuple[Markers, Stored]:
        operation = Markers(client="closing", begin_s=now_s())
        stored = await self.stored(self._prefix)
        marker = f"{self._prefix}marker/"
        operation.markers = {key: value.decode() for key, (value, _) in stored.items() if key.startswith(marker)}
        ended(operation, "done", "")
        return operation, stored

    async def _read_lists(self) -> list[AnyOperation]:
        async def look() -> bool:
            _, found = await self._reader.look(self._reader.keys)
            return bool(found)

        await self._insist(look, "the lists, in one transaction,")
        return taken(self._reader, "closing")

    async def _read_singly(self) -> list[AnyOperation]:
        """Registers and counters, a few at once."""
        wanted = iter([*((self._registrar, key) for key in sorted(self._used)), *_with(self._counter)])

        async def read() -> None:
            for reader, key in wanted:
                await self._insist(lambda reader=reader, key=key: _read(reader, key), key)  # type: ignore[misc]

        await asyncio.gather(*(read() for _ in range(_READERS)))
        return [*taken(self._registrar, "closing"), *taken(self._counter, "closing")]

    async def _list_sets(self) -> list[AnyOperation]:
        for prefix in self._lister.sets:
            await self._insist(lambda prefix=prefix: self._lister.list(prefix), f"the set {prefix}")  # type: ignore[misc]
        return taken(self._lister, "closing")

    async def _insist(self, read: Callable[[], Awaitable[_T | None]], what: str) -> _T:
        """Until it has a result that is none of None and False. Raises ReadsError."""
        deadline_s = time.monotonic() + _READ_TIMEOUT_S
        while True:
            found = await read()
            if found is not None and found is not False:
                return found
            if time.monotonic() > deadline_s:
                counts = ", ".join(f"{count} x {status}" for status, count in self.quiet.counts.items())
                raise ReadsError(f"{what} cannot be read, although no fault lasts any more; answers: {counts}")
            await asyncio.sleep(_POLL_S)


async def _read(reader: Registrar | Counter, key: str) -> bool:
    _, found = await reader.read(key)
    return found is not None


def _with(counter: Counter) -> list[tuple[Counter, str]]:
    return [(counter, key) for key in counter.keys]


def taken(worker: Worker, client: str) -> list[AnyOperation]:
    """What a worker has noted so far, taken out of its history and put down to this client."""
    found = list(worker.history.operations)
    worker.history.operations.clear()
    for operation in found:
        operation.client = client
    return found


def compared(reads: Sequence[AnyOperation], stored: Stored) -> list[str]:
    """Sentences on keys that are listed otherwise than they were read, of a cluster at rest."""
    wrong = []
    for key, value, version in _single_values(reads):
        listed_value, listed_version = stored.get(key, (None, None))
        if listed_value != value or (version is not None and listed_version != version):
            wrong.append(f"{key}: listed as {listed_value!r} at {listed_version}, read as {value!r} at {version}")
    return wrong[:_SHOWN_MAX]


def _single_values(reads: Sequence[AnyOperation]) -> Iterator[tuple[str, bytes | None, int | None]]:
    """Keys with what was read of them; a version of None is not known."""
    for read in reads:
        if isinstance(read, Register):
            yield read.key, None if read.value is None else read.value.encode(), read.version
        elif isinstance(read, Count):
            yield read.key, None if read.value is None else b"%d" % read.value, None
        elif isinstance(read, Balances):
            for number, account in read.accounts.items():
                yield account_key(number), b"%d" % account.balance, account.version
        elif isinstance(read, Lists):
            for key, values in read.reads:
                yield key, msgspec.json.encode(values) if values else None, None
