"""Storing many records: batches of a bounded size, several under way, each repeated until the store has decided.

Owns: cutting into batches, order, repeats, what counts as done.
Promises: a record is confirmed (journal, counts) only when it and all before it are stored or refused for good.
Two records of one key are stored in their order, the last one wins: they are never under way together.
Leaves to others: reading (`sources`), the journal's file (`journal`), words for people (`import_command`).

A put of which the outcome is unknown is put again: the same value, so the result is the same, unless another client
wrote that key in between; that is what an import is: these values, now.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kvstore.cli.frame import sentence
from kvstore.cli.progress import Progress
from kvstore.cli.sources import Entry, NoRecord, Record
from kvstore.client import Client, Put
from kvstore.errors import (
    BadRequest,
    BodyTooLarge,
    DiskFull,
    KvError,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
)

BATCH_RECORDS_MAX = 512
BATCH_BYTES_MAX = 1024 * 1024
BATCHES_IN_FLIGHT_MAX = 4
RETRY_WAIT_S_MIN = 0.1
RETRY_WAIT_S_MAX = 2.0
# How long the import goes on without a single record stored before it gives up.
PATIENCE_S = 60.0

_AGAIN = (TooManyRequests, Unavailable, OutcomeUnknown)
_STATUS_ABOUT_THE_KEY = frozenset({409, 412, 423})
T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """Entries in the order of the source; no key twice."""

    entries: list[Entry] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    value_bytes: int = 0

    def takes(self, entry: Entry) -> bool:
        """Whether the entry may join: there is room, and its key is not there yet."""
        if not self.entries:
            return True
        size = len(entry.value) if isinstance(entry, Record) else 0
        fits = len(self.entries) < BATCH_RECORDS_MAX and self.value_bytes + size <= BATCH_BYTES_MAX
        return fits and not (isinstance(entry, Record) and entry.key in self.keys)

    def add(self, entry: Entry) -> None:
        """Append the entry."""
        self.entries.append(entry)
        if isinstance(entry, Record):
            self.keys.add(entry.key)
            self.value_bytes += len(entry.value)


class BadLine(Exception):
    """The source is broken at this entry, and the import was not told to skip such lines."""

    def __init__(self, entry: NoRecord) -> None:
        super().__init__(f"{entry.where}: {entry.reason}")


def batches(entries: Iterator[Entry], *, skip_bad_lines: bool) -> Iterator[Batch]:
    """Cut into batches. Raises BadLine at a bad line, after all that stands before it, unless those are skipped."""
    batch = Batch()
    for entry in entries:
        if isinstance(entry, NoRecord) and entry.kind == "bad-line" and not skip_bad_lines:
            yield batch
            raise BadLine(entry)
        if not batch.takes(entry):
            yield batch
            batch = Batch()
        batch.add(entry)
    yield batch


@dataclass(frozen=True, slots=True)
class Done:
    """A batch of which every record is stored, or refused for good."""

    stored: Sequence[Record]
    refused: Sequence[tuple[Record, KvError]]
    no_records: Sequence[NoRecord]
    last: Entry | None
    steps: int


class Importer:
    """Sends batches; `confirm` is called with each, in the order of the source, when it is done."""

    def __init__(self, kv: Client, progress: Progress, confirm: Callable[[Done], None]) -> None:
        self._kv = kv
        self._progress = progress
        self._confirm = confirm
        self._under_way: deque[tuple[Batch, asyncio.Task[Done]]] = deque()
        self._nothing_stored_since_s: float | None = None

    async def run(self, source: Iterator[Batch]) -> None:
        """Raises BadLine, or the error that does not go away (Unavailable, DiskFull, …); confirmed is confirmed."""
        try:
            while batch := await in_thread(lambda: next(source, None)):
                while self._must_wait(batch):
                    await self._confirm_first()
                self._under_way.append((batch, asyncio.create_task(self._store(batch))))
        except BadLine:
            await self._confirm_all()
            raise
        else:
            await self._confirm_all()
        finally:
            await self._abandon()

    def _must_wait(self, batch: Batch) -> bool:
        if len(self._under_way) >= BATCHES_IN_FLIGHT_MAX:
            return True
        return any(not batch.keys.isdisjoint(other.keys) for other, _ in self._under_way)

    async def _confirm_first(self) -> None:
        done = await self._under_way[0][1]
        self._under_way.popleft()
        self._confirm(done)

    async def _confirm_all(self) -> None:
        while self._under_way:
            await self._confirm_first()

    async def _abandon(self) -> None:
        """Interrupted or failed: what is done by now and has nothing undone before it still counts."""
        tasks = [task for _, task in self._under_way]
        while tasks and tasks[0].done() and not tasks[0].cancelled() and tasks[0].exception() is None:
            self._confirm(tasks.pop(0).result())
        self._under_way.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one batch ---------------------------------------------------------------------------------------------

    async def _store(self, batch: Batch) -> Done:
        records = [entry for entry in batch.entries if isinstance(entry, Record)]
        stored: list[Record] = []
        refused: list[tuple[Record, KvError]] = []
        left = records
        wait_s = RETRY_WAIT_S_MIN
        while left:
            again: list[tuple[Record, KvError]] = []
            for record, error in zip(left, await self._put_all(left), strict=True):
                if error is None:
                    stored.append(record)
                elif isinstance(error, DiskFull):
                    raise error
                else:
                    (again if isinstance(error, _AGAIN) else refused).append((record, error))
            if len(again) < len(left):
                self._nothing_stored_since_s = None
                wait_s = RETRY_WAIT_S_MIN
            left = [record for record, _ in again]
            if again:
                wait_s = await self._wait(again[0][1], wait_s)
        no_records = [entry for entry in batch.entries if isinstance(entry, NoRecord)]
        last = batch.entries[-1] if batch.entries else None
        return Done(stored, refused, no_records, last, sum(entry.steps for entry in batch.entries))

    async def _wait(self, error: KvError, wait_s: float) -> float:
        """Before the next try; returns the wait of the one after. Raises `error` when patience is at its end."""
        now_s = time.monotonic()
        self._nothing_stored_since_s = self._nothing_stored_since_s or now_s
        if now_s - self._nothing_stored_since_s > PATIENCE_S:
            raise error
        if wait_s >= RETRY_WAIT_S_MAX:
            self._progress.say(f"kvstore: {sentence(error.detail)} Trying again.")
        await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        return min(wait_s * 2, RETRY_WAIT_S_MAX)

    async def _put_all(self, records: Sequence[Record]) -> Sequence[KvError | None]:
        """One try: for each record None (stored) or the reason."""
        try:
            if len(records) == 1:
                await self._kv.put(records[0].key, records[0].value, ttl=records[0].ttl)
                return [None]
            operations = [Put(record.key, record.value, record.ttl) for record in records]
            return [result.error for result in await self._kv.batch(operations)]
        except _AGAIN as error:
            return [error] * len(records)
        except (BadRequest, BodyTooLarge, ValueTooLarge) as error:
            if len(records) == 1:
                return [error]
            # One of them spoils the request for all: find it by halves.
            half = len(records) // 2
            return [*await self._put_all(records[:half]), *await self._put_all(records[half:])]
        except KvError as error:
            if len(records) == 1 and error.status in _STATUS_ABOUT_THE_KEY:
                return [error]
            raise


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking `work` in a thread that does not keep the process alive.

    (asyncio.to_thread would: after Ctrl-C the process would wait for a read of standard input that never ends.)
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop has been closed: nothing waits any more

    threading.Thread(target=run, daemon=True).start()
    return await future
