"""What a log makes of damage: a torn end is cut off, and what was durable is never dropped without a word."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import ForeignData, LogDamaged, StoreBehind
from kvstore.storage.log import BEGINNING, Log, LogFailed, Position, Released
from kvstore.storage.notes import Kind, Notes
from kvstore.storage.recovery import cut_offline
from kvstore.storage.segments import Place
from loadtest.simulate.disk import PowerCut, SimulatedDisk, keep_all, lose_all
from tests.unit.storage.log_bench import FOLDER, SEGMENT_BYTES, STORE, STORE_ID, Bench, numbers, payloads

NOTE = FOLDER / f"{STORE}.log.note"


def shorten(disk: SimulatedDisk, path: Path, size: int) -> None:
    """The file ends there."""
    content = disk._content(path)
    for stored in (content.cached, content.durable):
        del stored[size:]


def keep_sectors(bench: Bench, path: Path, offset: int, size: int) -> None:
    """Only what was written there survives the power cut that comes."""
    content = bench.disk._content(path)
    touched = range(offset // 512, (offset + size - 1) // 512 + 1)
    content.versions = {sector: content.versions[sector] for sector in touched if sector in content.versions}


# --- a torn end


def test_a_torn_end_is_kept_aside_cut_off_and_zeroed_before_anything_is_appended() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"torn" * 100)
    path, offset, _ = bench.place_of(4)
    bench.disk.restart(keep_all)
    bench.disk.replace(path, b"????", offset + 300)
    torn = bench.disk.content(path)[offset:].rstrip(b"\0")
    assert numbers(bench.reopen(cut=False)) == [1, 2, 3]
    bench.disk.restart(lose_all)
    assert bench.disk.content(FOLDER / f"{STORE}.log.torn-4") == torn
    assert not any(bench.disk.content(path)[offset:])
    assert bench.reopen()[-1].number == 3
    assert bench.append(b"new") == 4


def test_a_torn_end_in_later_segments_is_zeroed_there_too() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(*[bytes([number]) * 600 for number in range(1, 8)])
    path, offset, _ = bench.place_of(4)
    bench.disk.restart(keep_all)
    bench.disk.flip(path, (offset + 60) * 8)
    assert numbers(bench.reopen(cut=False)) == [1, 2, 3]
    assert sum(any(bench.disk.content(bench.path(each))[4096:]) for each in bench.log._place.indices(bench.disk)) == 1
    for number in range(1, 8):
        bench.append(bytes([number]) * 600)
    bench.log.sync()
    assert numbers(bench.reopen()) == list(range(1, 11))


def test_a_torn_end_that_cannot_be_kept_on_a_full_disk_is_cut_off_all_the_same() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"torn" * 100)
    path, offset, _ = bench.place_of(4)
    bench.disk.restart(keep_all)
    bench.disk.flip(path, (offset + 60) * 8)
    bench.disk.capacity = 0
    assert numbers(bench.reopen(cut=False)) == [1, 2, 3]
    assert not any(bench.disk.content(path)[offset:])


def test_of_two_records_under_one_sync_the_second_alone_is_a_torn_end_and_no_damage() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"first" * 200, b"second" * 100)
    path, offset, size = bench.place_of(5)
    keep_sectors(bench, path, offset, size)
    assert numbers(bench.reopen(fate=keep_all)) == [1, 2, 3]


def test_of_two_records_in_two_segments_under_one_sync_the_second_alone_is_a_torn_end() -> None:
    for synced in (0, 3):
        bench = Bench()
        bench.fill(synced)
        bench.append(b"first" * 200, b"second" * 250)
        path, _, _ = bench.place_of(synced + 1)
        assert path != bench.place_of(synced + 2)[0]
        bench.disk._content(path).versions.clear()
        entries = bench.reopen(fate=lambda newest: newest if newest > 1 else 1)
        assert numbers(entries) == list(range(1, synced + 1))


def test_a_last_record_that_nothing_proves_durable_is_taken_for_a_torn_end() -> None:
    bench = Bench()
    bench.fill(3)
    path, offset, _ = bench.place_of(3)
    bench.disk.flip(path, (offset + 60) * 8)
    bench.reopen()
    assert bench.log.last.number == 2


def test_a_recovery_that_crashed_does_not_spoil_what_was_kept_aside() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"torn" * 300)
    path, offset, _ = bench.place_of(4)
    bench.disk.restart(keep_all)
    bench.disk.flip(path, (offset + 60) * 8)
    torn = bench.disk.content(path)[offset:].rstrip(b"\0")

    def cut_power(call: str, written: Path) -> None:
        if call == "pwrite" and written == path:
            bench.disk.power_cut_at = bench.disk.calls + 1

    bench.disk.hook = cut_power
    with pytest.raises(PowerCut):
        bench.reopen(cut=False)
    bench.disk.hook = lambda _call, _path: None
    bench.reopen(fate=lambda newest: newest % 2)  # half of the zeros survive
    assert bench.disk.content(FOLDER / f"{STORE}.log.torn-4") == torn


# --- damage


def test_a_record_before_one_that_proves_it_durable_is_damage_and_named() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"proof")
    bench.log.sync()
    path, offset, _ = bench.place_of(2)
    bench.disk.flip(path, (offset + 80) * 8 + 3)
    before = {name: bench.disk.content(FOLDER / name) for name in bench.disk.names(FOLDER)}
    with pytest.raises(LogDamaged, match=r"Record 2 in /data/shard-s1\.log\.0.*Restore.*store cut") as raised:
        bench.reopen()
    assert raised.value.members == {"number": 2, "file": str(path), "offset": offset}
    assert {name: bench.disk.content(FOLDER / name) for name in bench.disk.names(FOLDER)} == before


def test_a_flipped_length_does_not_hide_the_later_record_that_proves_damage() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"proof" * 300)  # in the next segment
    bench.log.sync()
    path, offset, _ = bench.place_of(3)
    assert bench.place_of(4)[0] != path
    for bit in range(32):
        bench.disk.flip(path, (offset + 28) * 8 + bit)
        with pytest.raises(LogDamaged) as raised:
            bench.reopen()
        assert raised.value.members["number"] == 3
        bench.disk.flip(path, (offset + 28) * 8 + bit)
    assert len(bench.reopen()) == 4


def test_a_later_record_whose_own_payload_is_damaged_still_proves_damage() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(b"proof" * 20)
    bench.log.sync()
    for number in (2, 4):
        path, offset, _ = bench.place_of(number)
        bench.disk.flip(path, (offset + 70) * 8)
    with pytest.raises(LogDamaged, match="Record 2"):
        bench.reopen()


@pytest.mark.parametrize("proof", ["note", "applied", "told"])
def test_a_last_record_is_damage_where_something_proves_that_it_was_durable(proof: str) -> None:
    bench = Bench()
    bench.fill(3)
    last = bench.log.last
    if proof == "note":
        bench.log.note_durable()
    path, offset, size = bench.place_of(3)
    original = bench.disk.content(path)
    for damaged in (b"\x01" * 10, b"\0" * size):
        bench.disk.replace(path, damaged, offset)
        is_behind = proof == "told" and not any(damaged)  # as if an older copy of the log had been put back
        with pytest.raises(StoreBehind if is_behind else LogDamaged) as raised:
            bench.reopen(last if proof == "applied" else None, 3 if proof == "told" else 0)
        assert raised.value.members["number"] == (2 if is_behind else 3)
        bench.disk.replace(path, original)


def test_a_log_that_ends_before_the_number_last_told_is_refused() -> None:
    bench = Bench()
    bench.fill(3)
    assert len(bench.reopen(told=3)) == 3
    with pytest.raises(StoreBehind, match=r"ends with record 3, and it has told the controller that record 4 was"):
        bench.reopen(told=4)


def test_opening_proves_all_that_it_found_durable() -> None:
    bench = Bench()
    bench.fill(3)
    bench.reopen()
    path, offset, _ = bench.place_of(3)
    bench.disk.flip(path, (offset + 60) * 8)
    with pytest.raises(LogDamaged, match="note beside the log"):
        bench.reopen()


def test_a_gap_between_the_applied_number_and_the_first_record_is_refused() -> None:
    bench = Bench()
    bench.fill(30)
    positions = bench.positions()
    bench.log.release(20)
    assert bench.log.first > 10
    with pytest.raises(LogDamaged, match="applied up to record 5, and the log begins with"):
        bench.reopen(positions[5])


def test_a_gap_is_refused_also_where_no_header_proves_the_missing_record() -> None:
    bench = Bench()
    bench.append(*[bytes(900)] * 8)  # all under one sync
    bench.log.sync()
    positions = bench.positions()
    bench.log.release(7)
    assert bench.log.first == 7
    with pytest.raises(LogDamaged, match="the log begins with 7"):
        bench.reopen(positions[5])


def test_a_file_that_has_applied_more_than_the_log_holds_is_refused() -> None:
    bench = Bench()
    bench.fill(3)
    with pytest.raises(LogDamaged, match="record 9 was durable"):
        bench.reopen(Position(9, 9))


def test_an_empty_log_is_refused_beside_a_file_that_has_applied_records() -> None:
    bench = Bench()
    for applied in (Position(3, 3), Position(0, 7)):
        with pytest.raises(LogDamaged):
            bench.reopen(applied)
    bench = Bench(Position(20, 5))
    with pytest.raises(LogDamaged, match="begins with 21"):
        bench.reopen(BEGINNING)


def test_a_file_and_a_log_that_do_not_belong_together_are_refused() -> None:
    bench = Bench()
    bench.fill(3)
    positions = bench.positions()
    with pytest.raises(LogDamaged, match="not the one that the file has applied"):
        bench.reopen(positions[2]._replace(checksum=1))
    with pytest.raises(LogDamaged, match="not the one that the file has applied"):
        bench.reopen(Position(0, 1))


def test_a_segment_shorter_than_it_was_made_is_refused() -> None:
    for size in (0, 100, 4096, SEGMENT_BYTES - 1):
        bench = Bench()
        bench.fill(2)
        shorten(bench.disk, bench.path(1), size)
        with pytest.raises(LogDamaged, match=r"log\.000001") as raised:
            bench.reopen()
        assert raised.value.members["file"] == str(bench.path(1))


def test_a_missing_segment_is_refused() -> None:
    for index in (1, 2, 3):
        bench = Bench()
        bench.fill(15)
        bench.append(b"end")
        bench.log.note_durable()
        bench.disk.remove(bench.path(index))
        with pytest.raises(LogDamaged):
            bench.reopen()


def test_a_segment_under_the_name_of_another_is_refused() -> None:
    bench = Bench()
    bench.fill(15)
    one, two = bench.disk.content(bench.path(1)), bench.disk.content(bench.path(2))
    bench.disk.replace(bench.path(1), two)
    bench.disk.replace(bench.path(2), one)
    with pytest.raises(LogDamaged, match="under a wrong name"):
        bench.reopen()


def test_what_a_crash_has_left_of_released_segments_is_removed_at_opening() -> None:
    bench = Bench()
    bench.fill(30)
    positions = bench.positions()
    bench.disk.remove(bench.path(2))
    bench.reopen(positions[28])
    assert bench.log._place.indices(bench.disk)[0] == 3
    assert bench.log.first > 10


def test_a_segment_of_a_copy_that_went_another_way_is_refused() -> None:
    one, other = Bench(), Bench()
    one.fill(12, 300)
    other.fill(12, 299)
    assert one.log._used[1].first == other.log._used[1].first
    one.log.note_durable()
    one.disk.replace(one.path(2), other.disk.content(other.path(2)))
    with pytest.raises(LogDamaged, match=f"Record {one.log._used[1].first} "):
        one.reopen()


def test_damage_in_front_of_what_the_file_lacks_is_refused() -> None:
    bench = Bench()
    bench.fill(30)
    positions = bench.positions()
    first = max(segment.first for segment in bench.log._used if segment.first <= 5)
    path, offset, _ = bench.place_of(first)
    bench.disk.flip(path, (offset + 30) * 8)
    with pytest.raises(LogDamaged):
        bench.reopen(positions[25])


def test_a_log_of_another_store_is_refused() -> None:
    bench = Bench()
    bench.fill(1)
    other = Log.create(bench.disk, FOLDER, "shard-s2", "another id", BEGINNING, SEGMENT_BYTES)
    other.close()
    bench.disk.replace(bench.path(1), bench.disk.content(FOLDER / "shard-s2.log.000001"))
    with pytest.raises(ForeignData, match="belongs to the log of store another id"):
        bench.reopen()


def test_a_damaged_log_opens_without_what_is_damaged_once_that_was_cut_off() -> None:
    bench = Bench()
    bench.fill(12)
    bench.log.note_durable()
    path, offset, _ = bench.place_of(7)
    bench.disk.flip(path, (offset + 80) * 8)
    with pytest.raises(LogDamaged, match="--after 6 --accept-loss"):
        bench.reopen()
    place = Place(FOLDER, STORE, STORE_ID)
    cut_offline(bench.disk, place, BEGINNING, 6)
    assert numbers(bench.reopen()) == [1, 2, 3, 4, 5, 6]
    assert bench.append(b"on") == 7
    with pytest.raises(LogDamaged, match="Record 9 is not in the log"):
        cut_offline(bench.disk, place, BEGINNING, 9)
    cut_offline(bench.disk, place, BEGINNING, 0)
    assert bench.reopen() == []


# --- syncing at opening


def test_the_log_is_synced_before_what_was_read_from_it_is_believed() -> None:
    bench = Bench()
    bench.append(b"under way" * 20)
    synced: set[str] = set()
    unsynced: list[str] = []

    def watch(call: str, path: Path) -> None:
        if call == "sync":
            synced.add(path.name)
        elif call == "pread" and path.name not in synced:
            unsynced.append(path.name)

    bench.disk.hook = watch
    entries = bench.reopen(cut=False)  # the next process, on the same machine
    assert unsynced == []
    bench.disk.hook = lambda _call, _path: None
    assert payloads(bench.reopen()) == payloads(entries)


def test_what_a_failed_sync_has_left_unwritten_is_written_again_at_opening() -> None:
    bench = Bench()
    bench.fill(3)

    def fail(call: str, path: Path) -> None:
        if call == "sync":
            bench.disk.forget_dirty(path)
            raise OSError(5, "made to fail")

    bench.append(b"lost?" * 10, b"x" * 1500)
    bench.disk.hook = fail
    with pytest.raises(LogFailed):
        bench.log.sync()
    for segment in bench.log._used:
        bench.disk.forget_dirty(segment.path)
    bench.disk.hook = lambda _call, _path: None
    assert numbers(bench.reopen(cut=False)) == [1, 2, 3, 4, 5]
    bench.append(b"acknowledged")
    bench.log.sync()
    assert numbers(bench.reopen()) == [1, 2, 3, 4, 5, 6]


def test_what_is_not_proved_durable_is_written_again_also_in_segments_that_are_applied() -> None:
    bench = Bench()
    bench.append(*[bytes([number]) * 600 for number in range(1, 8)])
    for segment in bench.log._used:
        bench.disk.forget_dirty(segment.path)
    bench.disk.hook = lambda _call, _path: None
    applied = bench.positions()[7]
    bench.reopen(applied, cut=False)
    bench.disk.restart(lose_all)
    assert numbers(bench.reopen()) == list(range(1, 8))


# --- the note


def test_a_damaged_page_of_the_note_leaves_the_other_one_in_force() -> None:
    bench = Bench()
    bench.fill(2)
    bench.log.note_durable()
    bench.fill(2)
    bench.log.note_durable()
    for bit in (0, 8 * 4096):
        bench.disk.flip(NOTE, bit + 100)
        assert len(bench.reopen()) == 4
    bench.disk.replace(NOTE, bytes(8192))
    with pytest.raises(LogDamaged, match="holds no note"):
        bench.reopen()


def test_a_cut_that_was_begun_is_finished_at_opening() -> None:
    for fate in (lose_all, keep_all, lambda newest: newest % 3):
        bench = Bench()
        for _ in range(9):
            bench.fill(1, 50)

        def cut_power(call: str, path: Path, disk: SimulatedDisk = bench.disk) -> None:
            if call == "pwrite" and path != NOTE:
                disk.power_cut_at = disk.calls + 1

        bench.disk.hook = cut_power
        with pytest.raises(PowerCut):
            bench.log.cut(4)
        bench.disk.hook = lambda _call, _path: None
        assert numbers(bench.reopen(fate=fate)) == [1, 2, 3, 4]
        assert not any(bench.disk.content(bench.path(1))[bench.log._used[-1].end :])


def test_no_page_of_the_note_brings_a_cut_back_that_was_made_offline() -> None:
    for page in (0, 4096):
        bench = Bench()
        bench.fill(6)
        cut_offline(bench.disk, Place(FOLDER, STORE, STORE_ID), BEGINNING, 4)
        bench.disk.flip(NOTE, (page + 20) * 8)
        assert Notes.open(bench.disk, Place(FOLDER, STORE, STORE_ID)).newest.kind is Kind.DURABLE


def test_a_damaged_page_of_the_note_leaves_a_snapshot_in_force() -> None:
    for page in (0, 4096):
        bench = Bench()
        bench.fill(6)
        bench.log.restart(Position(50, 5))
        bench.disk.flip(NOTE, (page + 20) * 8)
        assert bench.reopen(Position(50, 5)) == []


def test_no_page_of_the_note_brings_a_finished_cut_back() -> None:
    for page in (0, 4096):
        bench = Bench()
        bench.fill(6)
        bench.log.cut(4)
        bench.append(b"after the cut", b"another")
        bench.log.sync()
        bench.disk.flip(NOTE, (page + 20) * 8)
        assert numbers(bench.reopen()) == [1, 2, 3, 4, 5, 6]


# --- any damage at all


def history(seed: int) -> tuple[Bench, Position]:
    """A log after a random history, all of whose records are proved durable; and what the file has applied."""
    chance = random.Random(seed)
    bench = Bench()
    for _ in range(chance.randint(1, 25)):
        bench.append(chance.randbytes(chance.choice([0, 3, 100, 900])))
        if chance.random() < 0.5:
            bench.log.sync()
        if chance.random() < 0.1:
            bench.log.cut(chance.randint(bench.log.first, bench.log.last.number))
    bench.log.sync()
    bench.log.note_durable()
    known = {0: BEGINNING} | bench.positions()
    applied = known[chance.randint(0, len(known) - 1)]
    return bench, applied


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 30), place=st.integers(0, 1 << 30))
def test_a_flipped_bit_in_a_record_proved_durable_is_always_noticed(seed: int, place: int) -> None:
    bench, applied = history(seed)
    number = 1 + place % bench.log.last.number
    path, offset, size = bench.place_of(number)
    whole = numbers(list(bench.log.entries(applied.number)))
    bench.disk.flip(path, offset * 8 + place // 7 % (size * 8))
    if number > applied.number:
        with pytest.raises(LogDamaged) as raised:
            bench.reopen(applied)
        assert raised.value.members["number"] == number
        return
    try:
        assert numbers(bench.reopen(applied)) == whole  # what the file has is needed no more
    except LogDamaged:
        return
    with pytest.raises((LogDamaged, Released)):
        list(bench.log.entries(number - 1))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 30), place=st.integers(0, 1 << 30), kind=st.sampled_from(["flip", "zero", "shorten"]))
def test_whatever_is_damaged_nothing_durable_is_dropped_without_a_word(seed: int, place: int, kind: str) -> None:
    bench, applied = history(seed)
    whole = list(bench.log.entries(applied.number))
    names = sorted(bench.disk.names(FOLDER))
    path = FOLDER / names[place % len(names)]
    at = place // 7 % len(bench.disk.content(path))
    if kind == "flip":
        bench.disk.flip(path, at * 8 + place % 8)
    elif kind == "zero":
        length = len(bench.disk.content(path)[at // 512 * 512 :][:512])
        bench.disk.replace(path, bytes(length), at // 512 * 512)
    else:
        shorten(bench.disk, path, at)
    try:
        entries = bench.reopen(applied)
    except (LogDamaged, ForeignData):
        return
    assert entries == whole
