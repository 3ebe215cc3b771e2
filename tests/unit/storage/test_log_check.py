"""Reports on a log that is not open, which agree with what an opening would make of it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import LogDamaged
from kvstore.storage.log import Log, Position
from kvstore.storage.log_check import check_log, read_log
from loadtest.simulate.disk import PowerCut, keep_all
from tests.unit.storage.log_bench import FOLDER, SEGMENT_BYTES, STORE, STORE_ID, Bench
from tests.unit.storage.test_log_damage import history


def files(bench: Bench) -> dict[str, bytes]:
    return {name: bench.disk.content(FOLDER / name) for name in bench.disk.names(FOLDER)}


def test_a_whole_log_is_reported_with_its_store_and_numbers_and_is_not_changed() -> None:
    bench = Bench(Position(100, 5))
    bench.fill(20)
    bench.log.note_durable()
    before = files(bench)
    shown: list[tuple[int, int]] = []
    report = check_log(bench.disk, FOLDER, STORE, progress=lambda done, total: shown.append((done, total)))
    assert report._replace(last=Position(120, 0)) == (
        STORE_ID, len(bench.log._used), bench.log.bytes, 20, 101, Position(120, 0), 120, None, None, None,
    )  # fmt: skip
    assert report.last == bench.log.last
    assert shown[0] == (0, bench.log.bytes)
    assert shown[-1] == (bench.log.bytes, bench.log.bytes)
    assert shown == sorted(shown)
    assert len(shown) == len(bench.log._used) + 1
    assert files(bench) == before


def test_records_are_read_with_their_places_from_any_number_on() -> None:
    bench = Bench()
    bench.fill(20)
    logged = list(read_log(bench.disk, FOLDER, STORE, after=4))
    assert [each.entry for each in logged] == list(bench.log.entries(4))
    assert [(each.file, each.offset) for each in logged] == [bench.place_of(number)[:2] for number in range(5, 21)]
    assert {each.durable for each in logged} == {0}


def test_damage_that_an_opening_does_not_look_at_is_named_with_file_and_offset() -> None:
    bench = Bench()
    bench.fill(30)
    positions = bench.positions()
    path, offset, _ = bench.place_of(3)
    bench.disk.flip(path, (offset + 80) * 8)
    bench.append(b"proof")
    bench.log.sync()
    bench.reopen(positions[25])
    report = check_log(bench.disk, FOLDER, STORE, positions[25])
    assert report.damage is not None
    assert report.damage.members == {"number": 3, "file": str(path), "offset": offset}
    assert report.records == 2
    reader = read_log(bench.disk, FOLDER, STORE)
    assert [next(reader).entry.number for _ in range(2)] == [1, 2]
    with pytest.raises(LogDamaged) as raised:
        next(reader)
    assert raised.value.members["number"] == 3


def test_a_torn_end_is_reported_as_one_and_left_as_it_is() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"torn" * 50)
    path, offset, _ = bench.place_of(4)
    bench.disk.restart(keep_all)
    bench.disk.flip(path, (offset + 80) * 8)
    before = files(bench)
    report = check_log(bench.disk, FOLDER, STORE)
    assert (report.torn, report.damage, report.last.number) == ((0, offset, 4), None, 3)
    assert [each.entry.number for each in read_log(bench.disk, FOLDER, STORE)] == [1, 2, 3]
    assert files(bench) == before


def test_a_cut_that_is_not_finished_is_reported_and_what_it_takes_away_is_not_shown() -> None:
    for cut_at in range(3, 9):
        bench = Bench()
        bench.fill(20)
        bench.disk.calls, bench.disk.power_cut_at = 0, cut_at
        with pytest.raises(PowerCut):
            bench.log.cut(8)
        bench.disk.restart(keep_all)
        report = check_log(bench.disk, FOLDER, STORE)
        assert (report.cut_to, report.records, report.damage, report.torn) == (8, 8, None, None)
        assert len(list(read_log(bench.disk, FOLDER, STORE))) == 8


def test_a_missing_note_or_log_is_reported() -> None:
    bench = Bench()
    bench.disk.remove(FOLDER / f"{STORE}.log.note")
    damage = check_log(bench.disk, FOLDER, STORE).damage
    assert damage is not None
    assert "note is missing" in damage.detail
    damage = check_log(bench.disk, FOLDER, "shard-s9").damage
    assert damage is not None
    assert "holds no segment" in damage.detail


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 30), place=st.integers(0, 1 << 30))
def test_a_check_finds_whatever_an_opening_refuses(seed: int, place: int) -> None:
    bench, applied = history(seed)
    names = sorted(bench.disk.names(FOLDER))
    path = FOLDER / names[place % len(names)]
    bench.disk.flip(path, place // 7 % (len(bench.disk.content(path)) * 8))
    bench.disk.restart()
    report = check_log(bench.disk, FOLDER, STORE, applied)
    found = report.damage and (report.damage.members.get("number", 0))
    try:
        Log.open(bench.disk, FOLDER, STORE, STORE_ID, applied, segment_bytes=SEGMENT_BYTES)
    except LogDamaged as error:
        refused = error.members.get("number", 0)
    else:
        assert found is None or 0 < found <= applied.number  # the file has those: no opening reads them
        return
    assert found is not None
    assert found <= refused or not refused  # an opening does not count where it only sees that the front is damaged
