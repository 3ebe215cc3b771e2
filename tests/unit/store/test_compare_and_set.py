"""Compare-and-set as a batch decides it: the conditions of RFC 9110 against a model, and who sees what of whom."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.model import Preconditions
from kvstore.protocol import Delete, Get, Put, Release
from kvstore.storage.rows import VALUE
from kvstore.store.store import Store
from tests.unit.store.harness import Bench, Sink, acquire, ask, asked, code, next_id, opened

GUARDS = st.builds(
    Preconditions,
    token=st.none(),
    present=st.booleans(),
    absent=st.booleans(),
    versions=st.none() | st.lists(st.integers(0, 12), max_size=3),
    not_versions=st.none() | st.lists(st.integers(0, 12), max_size=3),
)


def holds(guard: Preconditions, version: int | None) -> bool:
    """RFC 9110, 13.1.1 and 13.1.2, word by word."""
    if guard.present and version is None:
        return False
    if guard.versions is not None and not any(version == wanted for wanted in guard.versions):
        return False
    if guard.absent and version is not None:
        return False
    return guard.not_versions is None or not any(version == unwanted for unwanted in guard.not_versions)


@given(st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), GUARDS), max_size=5), max_size=6))
@settings(max_examples=150)
def test_writes_with_conditions_do_what_a_dictionary_of_versions_would(batches):
    bench = Bench()
    versions: dict[str, int] = {}
    highest = 0
    for batch in batches:
        work = [
            Put(next_id(), key, b"v", 0, guard) if puts else Delete(next_id(), key, guard) for key, puts, guard in batch
        ]
        for op, answer in zip(work, bench.run(*work), strict=True):
            there = versions.get(op.key)
            if op.guard is not None and not holds(op.guard, there):
                assert (answer.status, code(answer)) == (412, "precondition-failed")
                assert (answer.problem or {}).get("version") == there
                continue
            if isinstance(op, Delete) and there is None:
                assert answer.status == 404
                continue
            assert answer.version > highest
            highest = answer.version
            if isinstance(op, Put):
                assert answer.status == (201 if there is None else 204)
                versions[op.key] = answer.version
            else:
                assert answer.status == 204
                del versions[op.key]
        assert {key: row.version for (kind, key), row in bench.rows.rows.items() if row.body is not None} == versions


def test_of_many_that_compare_with_one_version_in_one_batch_one_wins():
    bench = Bench()
    version = bench.one(Put(1, "k", b"0")).version
    answers = bench.run(
        *[Put(number, "k", b"%d" % number, 0, Preconditions(versions=[version])) for number in range(50)]
    )
    assert [answer.status for answer in answers] == [204] + [412] * 49
    assert {answer.problem["version"] for answer in answers[1:] if answer.problem} == {answers[0].version}
    assert bench.value("k") == b"0"


def test_of_many_that_create_in_one_batch_one_wins():
    bench = Bench()
    answers = bench.run(*[Put(number, "k", b"%d" % number, 0, Preconditions(absent=True)) for number in range(50)])
    assert [answer.status for answer in answers] == [201] + [412] * 49


def test_the_second_in_a_batch_compares_with_what_the_first_wrote():
    bench = Bench()
    first = bench.one(Put(1, "k", b"0")).version
    answers = bench.run(
        Put(2, "k", b"1", 0, Preconditions(versions=[first])),
        Put(3, "k", b"2", 0, Preconditions(versions=[first + 1])),
        Delete(4, "k", Preconditions(versions=[first + 2])),
        Put(5, "k", b"3", 0, Preconditions(absent=True)),
    )
    assert [answer.status for answer in answers] == [204, 204, 204, 201]
    assert bench.value("k") == b"3"


def test_the_same_value_again_is_another_version():
    """ABA: A is written, deleted or overwritten, and written again; who compares with the first A is refused."""
    bench = Bench()
    first = bench.one(Put(1, "k", b"A")).version
    bench.run(Delete(2, "k"), Put(3, "k", b"A"))
    assert bench.one(Put(4, "k", b"mine", 0, Preconditions(versions=[first]))).status == 412
    second = bench.one(Put(5, "k", b"A")).version
    bench.run(Put(6, "k", b"B"), Put(7, "k", b"A"))
    assert bench.one(Delete(8, "k", Preconditions(versions=[second]))).status == 412
    assert bench.value("k") == b"A"


def test_a_version_is_not_given_again_after_its_tombstone_is_trimmed():
    bench = Bench()
    first = bench.one(Put(1, "k", b"A")).version
    bench.run(Delete(2, "k"))
    bench.rows.rows.clear()
    assert bench.one(Put(3, "k", b"A")).version > first + 1


def test_a_key_past_its_deadline_is_expired_first_whatever_meets_it():
    for guard, status in (
        (Preconditions(absent=True), 201),
        (Preconditions(present=True), 412),
        (Preconditions(versions=[1]), 412),
    ):
        bench = Bench()
        assert bench.one(Put(1, "k", b"v", 1000)).version == 1
        bench.now_ms += 1000
        answer = bench.one(Put(2, "k", b"w", 0, guard))
        assert answer.status == status
        assert "version" not in (answer.problem or {})
        assert bench.batch.changes.expired == 1
        assert bench.rows.rows[VALUE, "k"].version == (3 if status == 201 else 2)


def test_a_condition_that_fails_writes_nothing_not_even_a_step_of_the_clock():
    bench = Bench()
    bench.one(Put(1, "k", b"v"))
    clock = bench.clock
    assert bench.one(Put(2, "k", b"w", 0, Preconditions(absent=True))).status == 412
    assert (bench.clock, bench.batch.changes.rows) == (clock, {})


def test_behind_a_lease_a_condition_is_not_even_looked_at():
    bench = Bench()
    bench.one(Put(1, "k", b"v"))
    mine = bench.acquire("k")
    for guard in (Preconditions(absent=True), Preconditions(present=True), Preconditions(versions=[99])):
        assert bench.one(Put(2, "k", b"w", 0, guard)).status == 423
    assert code(bench.one(Put(3, "k", b"w", 0, Preconditions(token=mine, absent=True)))) == "precondition-failed"
    assert bench.one(Put(4, "k", b"w", 0, Preconditions(token=mine, versions=[1]))).status == 204
    bench.run(Release(5, "k", mine))
    assert code(bench.one(Put(6, "k", b"w", 0, Preconditions(token=mine, present=True)))) == "lock-lost"


def test_on_a_full_disk_the_condition_is_answered_first_and_deletes_go_on():
    bench = Bench()
    bench.one(Put(1, "k", b"v"))
    bench.frees_only = True
    assert bench.one(Put(2, "k", b"w", 0, Preconditions(absent=True))).status == 412
    assert bench.one(Put(3, "k", b"w", 0, Preconditions(versions=[1]))).status == 507
    assert bench.one(Delete(4, "k", Preconditions(versions=[1]))).status == 204


async def test_a_store_counts_every_acknowledged_increment_once(tmp_path: Path):
    """Forty increment a hot key at once: as many commits as it takes, but no increment lost or doubled."""
    async with opened(tmp_path) as store:
        versions: list[int] = []

        async def increment() -> None:
            while True:
                value, version = await read(store)
                guard = Preconditions(absent=True) if version is None else Preconditions(versions=[version])
                answer = await ask(store, Put(next_id(), "k", b"%d" % (value + 1), 0, guard))
                if answer.status != 412:
                    versions.append(answer.version)
                    return

        await asyncio.gather(*(increment() for _ in range(40)))
        value, version = await read(store)
        assert value == 40
        assert len(set(versions)) == 40
        assert version == max(versions)


async def read(store: Store) -> tuple[int, int | None]:
    """The number in the key, and its version."""
    sink = Sink()
    store.get(Get(next_id(), "k"), sink)
    answer = await sink.answer()
    return (0, None) if answer.status == 404 else (int(answer.value or b"0"), answer.version)


async def test_a_hot_key_does_not_cost_a_commit_a_client(tmp_path: Path):
    async with opened(tmp_path) as store:
        await ask(store, Put(1, "k", b"v"))
        sinks = [asked(store, Put(next_id(), "k", b"w", 0, Preconditions(present=True))) for _ in range(200)]
        assert [(await sink.answer()).status for sink in sinks] == [204] * 200
        assert sum(store.tables.stats.commit_s.counts) < 10


async def test_a_lease_and_compare_and_sets_of_one_batch_exclude_each_other(tmp_path: Path):
    async with opened(tmp_path) as store:
        store.get(Get(next_id(), "k"), found := Sink())
        assert (await found.answer()).status == 404  # from now on its row is in memory
        sinks = [
            asked(store, Put(next_id(), "k", b"1", 0, Preconditions(absent=True))),
            asked(store, acquire("k", 60)),
            asked(store, Put(next_id(), "k", b"2", 0, Preconditions(present=True))),
        ]
        assert [(await sink.answer()).status for sink in sinks] == [201, 201, 423]
