"""The importer against a store in memory that refuses, fails and stalls as told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from kvstore.cli import importer
from kvstore.cli.importer import BadLine, Batch, Done, Importer, batches
from kvstore.cli.progress import Progress
from kvstore.cli.sources import Entry, NoRecord, Record
from kvstore.client import Put, Result
from kvstore.errors import (
    BadBody,
    DiskFull,
    KvError,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
)


def record(key: str, value: bytes = b"v", mark: object = None) -> Record:
    return Record(key, value, None, len(value), mark)


class Store:
    """The part of a client that an import uses. `fate` may raise for a whole call, `op_fate` for one record."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.calls: list[list[str]] = []
        self.under_way: set[str] = set()
        self.fate: Callable[[list[str]], None] = lambda keys: None
        self.op_fate: Callable[[str], KvError | None] = lambda key: None
        self.takes_s = 0.0

    async def put(self, key: str, value: bytes, *, ttl: float | None = None) -> int:
        (result,) = await self.batch([Put(key, value, ttl)])
        if result.error:
            raise result.error
        return 1

    async def batch(self, operations: Sequence[Put]) -> list[Result]:
        keys = [operation.key for operation in operations]
        assert not self.under_way & set(keys), "two writes of one key are under way together"
        self.under_way |= set(keys)
        self.calls.append(keys)
        await asyncio.sleep(self.takes_s)
        self.under_way -= set(keys)
        self.fate(keys)
        results = []
        for operation in operations:
            error = self.op_fate(operation.key)
            if error is None:
                self.data[operation.key] = operation.value
            results.append(Result(operation.key, error.status if error else 201, error=error))
        return results


class Run:
    """One import, with what it confirmed."""

    def __init__(self, store: Store) -> None:
        self.done: list[Done] = []
        self.confirmed = asyncio.Event()
        self.importer = Importer(store, Progress("import", None), self._confirm)  # type: ignore[arg-type]

    async def __call__(self, entries: Sequence[Entry], skip_bad_lines: bool = False) -> None:
        await self.importer.run(batches(iter(entries), skip_bad_lines=skip_bad_lines))

    def _confirm(self, done: Done) -> None:
        self.done.append(done)
        self.confirmed.set()

    @property
    def stored(self) -> list[str]:
        return [record.key for done in self.done for record in done.stored]

    @property
    def refused(self) -> list[str]:
        return [record.key for done in self.done for record, _ in done.refused]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "RETRY_WAIT_S_MIN", 0.001)
    monkeypatch.setattr(importer, "RETRY_WAIT_S_MAX", 0.002)


def keys_of(entries: Sequence[Entry]) -> list[list[str]]:
    cut = batches(iter(entries), skip_bad_lines=False)
    return [[entry.key for entry in batch.entries if isinstance(entry, Record)] for batch in cut if batch.entries]


def test_batches_are_bounded_in_records_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "BATCH_RECORDS_MAX", 3)
    monkeypatch.setattr(importer, "BATCH_BYTES_MAX", 10)
    small = [record(f"s{n}") for n in range(4)]
    assert keys_of(small) == [["s0", "s1", "s2"], ["s3"]]
    large = record("large", b"x" * 50)
    assert keys_of([small[0], large, small[1]]) == [["s0"], ["large"], ["s1"]]


def test_no_batch_has_a_key_twice() -> None:
    assert keys_of([record("a"), record("b"), record("a")]) == [["a", "b"], ["a"]]


async def test_everything_is_stored_and_confirmed_in_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "BATCH_RECORDS_MAX", 7)
    entries = [record(f"{n:03}", str(n).encode()) for n in range(100)]
    run = Run(store)
    await run(entries)
    assert run.stored == [entry.key for entry in entries]
    assert store.data == {entry.key: entry.value for entry in entries}


async def test_of_two_records_with_one_key_the_later_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "BATCH_RECORDS_MAX", 2)
    store.takes_s = 0.02  # long enough for a second batch to be sent, were it not held back
    run = Run(store)
    await run([record(key, str(n).encode()) for n, key in enumerate("abacadabra")])
    assert store.data == {"a": b"9", "b": b"7", "c": b"3", "d": b"5", "r": b"8"}


@pytest.mark.parametrize("error", [TooManyRequests, Unavailable, OutcomeUnknown])
async def test_what_was_not_decided_is_tried_again(store: Store, error: type[KvError]) -> None:
    left = {"b": 3}

    def fate(key: str) -> KvError | None:
        left[key] = left.get(key, 0) - 1
        return error() if left[key] >= 0 else None

    store.op_fate = fate
    run = Run(store)
    await run([record("a"), record("b"), record("c")])
    assert sorted(run.stored) == ["a", "b", "c"]
    assert store.calls == [["a", "b", "c"], ["b"], ["b"], ["b"]]


async def test_a_refused_record_is_reported_and_the_others_go_on(store: Store) -> None:
    store.op_fate = lambda key: ValueTooLarge() if key == "b" else None
    run = Run(store)
    await run([record("a"), record("b"), record("c")])
    assert (run.stored, run.refused) == (["a", "c"], ["b"])


async def test_one_record_that_spoils_the_whole_request_is_found(store: Store) -> None:
    def fate(keys: list[str]) -> None:
        if "5" in keys:
            raise BadBody()

    store.fate = fate
    run = Run(store)
    await run([record(str(n)) for n in range(9)])
    assert (sorted(run.stored), run.refused) == (list("01234678"), ["5"])


async def test_patience_ends_when_nothing_at_all_is_stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "PATIENCE_S", 0.02)

    def fate(keys: list[str]) -> None:
        raise Unavailable("no answer")

    store.fate = fate
    run = Run(store)
    with pytest.raises(Unavailable, match="no answer"):
        await run([record("a")])
    assert run.done == []


async def test_a_full_disk_stops_the_import_at_once(store: Store) -> None:
    store.op_fate = lambda key: DiskFull() if key == "b" else None
    with pytest.raises(DiskFull):
        await Run(store)([record("a"), record("b")])
    assert len(store.calls) == 1


async def test_all_before_a_bad_line_is_stored(store: Store) -> None:
    run = Run(store)
    bad = NoRecord("line 3", "nonsense", "bad-line")
    with pytest.raises(BadLine, match="line 3: nonsense"):
        await run([record("a"), record("b"), bad, record("c")])
    assert run.stored == ["a", "b"]


async def test_bad_lines_can_be_left_out(store: Store) -> None:
    run = Run(store)
    bad = NoRecord("line 2", "nonsense", "bad-line")
    await run([record("a"), bad, record("c")], skip_bad_lines=True)
    assert run.stored == ["a", "c"]
    assert [entry for done in run.done for entry in done.no_records] == [bad]


async def test_an_interrupt_confirms_no_batch_that_has_an_undone_one_before_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "BATCH_RECORDS_MAX", 1)
    stalled = asyncio.Event()

    async def batch(operations: Sequence[Put]) -> list[Result]:
        if operations[0].key == "b":
            stalled.set()
            await asyncio.Event().wait()
        return [Result(operation.key, 201) for operation in operations]

    monkeypatch.setattr(store, "batch", batch)
    run = Run(store)
    task = asyncio.create_task(run([record(key) for key in "abcdefgh"]))
    await stalled.wait()
    await run.confirmed.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.stored == ["a"]


async def test_an_interrupt_while_the_source_has_nothing_to_give_is_heard(store: Store) -> None:
    asked, release = threading.Event(), threading.Event()

    def source() -> object:
        asked.set()
        release.wait()
        yield Batch()

    task = asyncio.create_task(Importer(store, Progress("x", None), print).run(source()))  # type: ignore[arg-type]
    try:
        await asyncio.to_thread(asked.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)
    finally:
        release.set()
