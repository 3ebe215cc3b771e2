"""What a log does while it is open: numbers, syncs, room, reading, and what is taken away."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ForeignData, LogDamaged
from kvstore.replication.chain import some_entries
from kvstore.storage import segments
from kvstore.storage.disk import OsDisk
from kvstore.storage.log import (
    BEGINNING,
    Log,
    LogFailed,
    LogFull,
    NotNext,
    Position,
    RecordTooLarge,
    Released,
)
from loadtest.simulate.disk import SimulatedFile, lose_all
from tests.unit.storage.log_bench import FOLDER, SEGMENT_BYTES, STORE, STORE_ID, Bench, numbers, payloads

WAIT_S = 20.0


def fail(bench: Bench, call: str, number: int = 1, code: int = errno.EIO, name: str = "") -> list[str]:
    """The n-th call of that kind (of the file with that in its name) fails; returns the calls seen, as they come."""
    seen: list[str] = []

    def hook(each: str, path: Path) -> None:
        seen.append(each)
        if each == call and name in path.name and seen.count(call) == number:
            raise OSError(code, "made to fail")

    bench.disk.hook = hook
    return seen


def _append_and_sync(log: Log) -> None:
    log.append(b"lost")
    log.sync()


# --- appending and syncing


def test_numbers_are_consecutive_and_begin_behind_the_position_of_the_start() -> None:
    bench = Bench(Position(700, 12345, 4))
    assert [bench.append(b"a"), bench.append(b"b"), bench.append(b"c")] == [701, 702, 703]
    entries = list(bench.log.entries(700))
    assert entries[0].previous == 12345
    assert [entry.previous for entry in entries[1:]] == [entry.checksum for entry in entries[:-1]]
    assert bench.log.last == Position(703, entries[-1].checksum, 0)


@pytest.mark.parametrize("records", [[bytes(50)], [b"a", b"b" + bytes(3)], [bytes(9), b"c", bytes(9)], [b"d", b""]])
def test_a_record_that_ends_with_zeros_is_found_again_before_the_zeros_of_its_segment(records: list[bytes]) -> None:
    bench = Bench()
    bench.append(*records)
    bench.log.sync()
    assert payloads(bench.reopen()) == records


def test_a_record_is_one_write_and_its_sync_is_one_sync() -> None:
    bench = Bench()
    calls = fail(bench, "none")
    bench.log.append(b"payload")
    assert calls == ["pwrite"]
    bench.log.sync()
    assert calls == ["pwrite", "sync"]


def test_several_records_share_one_sync() -> None:
    bench = Bench()
    bench.append(b"a", b"b", b"c")
    assert bench.log.durable == 0
    calls = fail(bench, "none")
    assert bench.log.sync() == 3
    assert calls == ["sync"]
    assert payloads(bench.reopen()) == [b"a", b"b", b"c"]


def test_a_record_that_is_appended_during_a_sync_is_not_durable_after_it() -> None:
    bench = Bench()
    bench.append(b"before")
    syncing, go_on = threading.Event(), threading.Event()

    def stall(call: str, _path: Path) -> None:
        if call == "sync":
            syncing.set()
            assert go_on.wait(WAIT_S)

    bench.disk.hook = stall
    returned: list[int] = []
    thread = threading.Thread(target=lambda: returned.append(bench.log.sync()))
    thread.start()
    assert syncing.wait(WAIT_S)
    bench.append(b"during")
    go_on.set()
    thread.join(WAIT_S)
    assert returned == [1]
    assert bench.log.durable == 1
    assert bench.log.sync() == 2


def test_a_sync_covers_the_segment_that_was_left_while_an_earlier_sync_was_under_way() -> None:
    bench = Bench()
    assert bench.log.prepare_segment()
    bench.append(b"x" * 1500)
    syncing, go_on = threading.Event(), threading.Event()

    def stall(call: str, _path: Path) -> None:
        if call == "sync" and not syncing.is_set():
            syncing.set()
            assert go_on.wait(WAIT_S)

    bench.disk.hook = stall
    thread = threading.Thread(target=bench.log.sync)
    thread.start()
    assert syncing.wait(WAIT_S)
    bench.append(b"y" * 300)  # still in the first segment, behind what that sync covers
    bench.append(b"z" * 1500)
    go_on.set()
    thread.join(WAIT_S)
    bench.disk.hook = lambda _call, _path: None
    assert bench.log.sync() == 3
    assert len(bench.reopen()) == 3


def test_each_record_carries_the_number_that_was_durable_when_it_was_written() -> None:
    bench = Bench()
    bench.append(b"a")
    bench.log.sync()
    bench.append(b"b", b"c")
    data = bench.disk.content(bench.path(1))
    durable = [int.from_bytes(data[place + 20 : place + 28], "little") for place in (4096, 4153, 4210)]
    assert durable == [0, 1, 1]


@pytest.mark.parametrize("call", ["pwrite", "sync"])
def test_after_a_failed_write_or_sync_nothing_is_written_or_synced_any_more(call: str) -> None:
    bench = Bench()
    bench.fill(2)
    calls = fail(bench, call)
    with pytest.raises(LogFailed, match="made to fail"):
        _append_and_sync(bench.log)
    del calls[:]
    for _ in range(2):
        with pytest.raises(LogFailed):
            bench.log.sync()
        with pytest.raises(LogFailed):
            bench.log.append(b"later")
    assert calls == []
    assert bench.log.durable == 2


def test_an_entry_of_another_copy_is_appended_only_where_it_follows() -> None:
    one, other = Bench(), Bench()
    one.append(b"a", b"b", b"c")
    entries = list(one.log.entries(0))
    one.log.sync()
    one.append(b"d")  # carries another durable number here than there
    entries += one.log.entries(3)
    with pytest.raises(NotNext, match="does not follow"):
        other.log.extend(entries[1])
    for entry in entries:
        other.log.extend(entry)
    assert other.log.last == one.log.last
    assert list(other.log.entries(0)) == entries
    damaged = entries[3]._replace(number=5, previous=entries[3].checksum)
    with pytest.raises(NotNext, match="checksum"):
        other.log.extend(damaged)
    with pytest.raises(NotNext, match="does not follow"):
        other.log.extend(entries[3]._replace(number=5))


# --- room


def test_a_record_that_no_segment_holds_is_refused_before_anything_is_written() -> None:
    bench = Bench()
    calls = fail(bench, "none")
    with pytest.raises(RecordTooLarge):
        bench.log.append(bytes(SEGMENT_BYTES - 4096 - 55))
    assert calls == []
    assert bench.log.append(bytes(SEGMENT_BYTES - 4096 - 56)) == 1


def test_without_a_segment_for_it_a_record_is_refused_before_anything_is_written() -> None:
    bench = Bench()
    bench.append(bytes(1500))
    assert bench.log.room(frees=True) < 1500
    calls = fail(bench, "none")
    with pytest.raises(LogFull):
        bench.log.append(bytes(1500), frees=True)
    assert calls == []
    assert bench.log.prepare_segment()
    assert bench.log.append(bytes(1500), frees=True) == 2


def test_the_last_spare_segment_is_kept_for_what_frees_room() -> None:
    bench = Bench()
    assert bench.log.prepare_segment()
    bench.append(bytes(1500))
    with pytest.raises(LogFull):
        bench.log.append(bytes(1500))
    assert bench.log.append(bytes(1500), frees=True) == 2
    assert bench.log.prepare_segment()
    assert bench.log.append(bytes(100)) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["create", "pwrite", "sync", "rename", "sync_folder"])
def test_a_full_disk_leaves_no_half_segment_and_the_next_try_succeeds(call: str, code: int) -> None:
    bench = Bench()
    names = set(bench.disk.names(FOLDER))
    fail(bench, call, code=code)
    assert not bench.log.prepare_segment()
    assert set(bench.disk.names(FOLDER)) == names
    assert bench.log.full
    bench.disk.hook = lambda _call, _path: None
    assert bench.log.prepare_segment()
    assert not bench.log.full
    bench.log.close()
    bench.reopen()


def test_a_disk_without_room_for_half_a_segment_still_takes_what_frees_room() -> None:
    bench = Bench()
    bench.disk.capacity = sum(len(bench.disk.content(FOLDER / name)) for name in bench.disk.names(FOLDER)) + 3000
    assert not bench.log.prepare_segment()
    assert bench.log.room() < 10
    with pytest.raises(LogFull):
        bench.log.append(b"put")
    assert bench.log.append(b"delete", frees=True) == 1
    bench.disk.capacity = None
    assert bench.log.prepare_segment()
    assert bench.log.append(b"put") == 2


def test_a_disk_error_while_a_segment_is_made_is_raised_and_leaves_the_log_usable() -> None:
    bench = Bench()
    fail(bench, "sync", code=errno.EIO, name=".new")
    with pytest.raises(OSError, match="made to fail"):
        bench.log.prepare_segment()
    assert bench.fill(2) == 2
    assert bench.log.prepare_segment()


def test_a_segment_is_seen_only_when_it_is_whole_and_durable() -> None:
    bench = Bench()
    bench.disk.hook = lambda _call, _path: None
    assert bench.log.prepare_segment()
    bench.disk.restart(lose_all)
    data = bench.disk.content(bench.path(2))
    assert len(data) == SEGMENT_BYTES
    assert not any(data[4096:])
    bench.reopen()
    assert len(bench.log._spare) == 1


def test_one_spare_segment_is_wanted_and_another_when_the_open_one_is_half_full() -> None:
    bench = Bench()
    assert bench.log.wants_segment
    bench.log.prepare_segment()
    bench.log._used[-1].end = 4096 * 3 // 4  # of 6,144: not half of it
    assert not bench.log.wants_segment
    bench.log._used[-1].end = 4096
    assert bench.log.wants_segment
    bench.log.prepare_segment()
    assert not bench.log.wants_segment


def test_segment_numbers_are_never_given_twice() -> None:
    bench = Bench()
    bench.fill(30)
    before = {int(name[-6:]) for name in bench.disk.names(FOLDER) if name[-1].isdigit()}
    bench.log.release(bench.log.durable)
    bench.reopen(bench.log.last)
    bench.fill(30)
    after = {int(name[-6:]) for name in bench.disk.names(FOLDER) if name[-1].isdigit()}
    assert min(after) == max(before)


def test_a_full_disk_has_room_for_the_note_of_the_durable_number() -> None:
    bench = Bench()
    bench.disk.capacity = 0
    for _ in range(3):
        bench.append(b"x")
        bench.log.sync()
        bench.log.note_durable()
    assert bench.log.durable == 3


# --- reading


def test_entries_are_read_from_any_number_on_across_segments() -> None:
    bench = Bench(segment_bytes=200_000)
    bench.fill(1500, 400)
    for after in (0, 1, 399, 700, 1499, 1500):
        assert numbers(list(bench.log.entries(after))) == list(range(after + 1, 1501))
    assert payloads(list(bench.log.entries(0))) == [bench.payloads[number] for number in range(1, 1501)]


def test_a_segment_is_made_in_pieces_so_that_no_other_sync_waits_for_all_of_it() -> None:
    bench = Bench(segment_bytes=4 << 20)
    calls = fail(bench, "none")
    assert bench.log.prepare_segment()
    written = [call for call in calls if call in ("pwrite", "sync")]
    assert written == ["pwrite", "sync", "pwrite", "sync", "pwrite", "sync", "pwrite", "pwrite", "sync"]


def test_of_a_segment_only_the_piece_with_the_records_that_are_asked_for_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(segment_bytes=4 << 20)
    bench.fill(900, 4000)
    read: list[int] = []
    pread = SimulatedFile.pread

    def counted(file: SimulatedFile, count: int, offset: int) -> bytes:
        read.append(count)
        return pread(file, count, offset)

    monkeypatch.setattr(SimulatedFile, "pread", counted)
    assert numbers(some_entries(bench.log, 100, 100_000)) == list(range(101, 126))
    assert sum(read) <= 1 << 18  # and not the 3 MB that follow
    assert numbers(list(bench.log.entries(0))) == list(range(1, 901))


@pytest.mark.parametrize("size", [(1 << 18) - 57, (1 << 18) - 56, (1 << 18) - 55, 1 << 20])
def test_a_record_that_is_larger_than_a_piece_is_read_whole(size: int) -> None:
    bench = Bench(segment_bytes=8 << 20)
    for each in (10, size, 10, size, size):
        bench.append(bytes([each % 251]) * each)
    assert payloads(list(bench.log.entries(0))) == list(bench.payloads.values())
    assert payloads(list(bench.log.entries(3))) == list(bench.payloads.values())[3:]


def test_a_reader_goes_on_in_a_segment_that_was_released_while_it_reads() -> None:
    bench = Bench()
    bench.fill(30)
    reader = bench.log.entries(0)
    assert next(reader).number == 1
    bench.log.release(30)
    with pytest.raises(Released):
        numbers(list(reader))
    with pytest.raises(Released):
        list(bench.log.entries(0))
    assert numbers(list(bench.log.entries(bench.log.first - 1))) == list(range(bench.log.first, 31))


def test_a_damaged_record_is_never_read_as_an_entry() -> None:
    bench = Bench()
    bench.fill(6)
    path, offset, size = bench.place_of(4)
    bench.disk.flip(path, (offset + size - 1) * 8)
    reader = bench.log.entries(0)
    assert [next(reader).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(LogDamaged) as raised:
        next(reader)
    assert raised.value.members["number"] == 4


# --- taking away


def test_release_keeps_every_record_that_is_still_needed() -> None:
    bench = Bench()
    bench.fill(30)
    for number in range(0, 31, 3):
        bench.log.release(number)
        assert bench.log.first <= number + 1
    assert bench.log.first > 20
    gone = bench.log.first
    assert bench.log.bytes < SEGMENT_BYTES * 8
    position = bench.positions()[gone]
    assert numbers(bench.reopen(position)) == list(range(gone + 1, 31))


def test_release_never_takes_what_is_not_durable() -> None:
    bench = Bench()
    bench.fill(3)
    bench.append(*[bytes(500)] * 9)
    bench.log.release(12)
    assert bench.log.first <= 4
    assert numbers(list(bench.log.entries(3))) == list(range(4, 13))


def test_release_leaves_alone_what_the_next_sync_covers() -> None:
    bench = Bench()
    bench.fill(5)
    bench.append(bytes(1500))  # in the next segment, and not synced
    bench.log.release(5)
    assert bench.log.sync() == 6
    bench.log.release(5)
    assert bench.log.first == 6


def test_what_was_cut_never_comes_back() -> None:
    bench = Bench()
    bench.fill(20)
    bench.log.cut(9)
    for path in (bench.path(index) for index in bench.log._place.indices(bench.disk)):
        assert all(b"%d:" % number not in bench.disk.content(path) for number in range(10, 21))
    assert bench.append(b"another") == 10
    bench.log.sync()
    entries = bench.reopen()
    assert numbers(entries) == list(range(1, 11))
    assert entries[-1].payload == b"another"


def test_a_cut_goes_from_the_end_towards_the_front_each_step_synced_after_a_durable_note() -> None:
    bench = Bench()
    bench.fill(20)
    steps: list[str] = []
    bench.disk.hook = lambda call, path: (
        steps.append(f"{call} {path.name[-6:]}") if call in ("pwrite", "sync") else None
    )
    bench.log.cut(7)
    written = [step for step in steps if step.startswith("pwrite")]
    indices = [step[-6:] for step in written if "note" not in step]
    assert written[0] == "pwrite g.note"
    assert indices == sorted(indices, reverse=True)
    assert len(indices) >= 3
    assert [step.partition(" ")[2] for step in steps[steps.index(written[0]) + 1 :: 2]] == [
        step.partition(" ")[2] for step in written
    ]


def test_what_a_cut_leaves_is_durable_though_it_was_not_synced_before() -> None:
    bench = Bench()
    bench.append(*[bytes([number]) * 600 for number in range(1, 9)])
    bench.log.cut(6)
    assert bench.log.durable == 6
    assert numbers(bench.reopen()) == [1, 2, 3, 4, 5, 6]


def test_a_cut_to_the_very_front_leaves_an_empty_log_that_goes_on() -> None:
    bench = Bench(Position(50, 99, 7))
    bench.fill(9)
    bench.log.cut(50)
    assert bench.log.last == Position(50, 99, 7)
    assert bench.reopen() == []
    assert bench.append(b"on") == 51
    with pytest.raises(ValueError, match="not in the log"):
        bench.log.cut(49)
    with pytest.raises(ValueError, match="not in the log"):
        bench.log.cut(52)


def test_a_cut_to_the_front_of_a_log_whose_beginning_was_released_leaves_it_usable() -> None:
    bench = Bench()
    bench.fill(20)
    positions = bench.positions()
    bench.log.release(20)
    front = bench.log.first - 1
    bench.log.cut(front)
    assert bench.log.last == positions[front]
    assert bench.append(b"on") == front + 1
    bench.log.sync()
    assert payloads(bench.reopen(positions[front])) == [b"on"]


def test_a_snapshot_begins_in_new_segments() -> None:
    bench = Bench()
    bench.fill(20)
    old = set(bench.log._place.indices(bench.disk))
    start = Position(500, 77, 3)
    bench.log.restart(start)
    assert not old & set(bench.log._place.indices(bench.disk))
    assert bench.append(b"next") == 501
    bench.log.sync()
    assert payloads(bench.reopen(start)) == [b"next"]


# --- making and opening


def test_a_log_with_records_is_never_rebuilt() -> None:
    bench = Bench()
    bench.fill(1)
    with pytest.raises(ForeignData, match="holds records"):
        Log.create(bench.disk, FOLDER, STORE, STORE_ID)
    assert len(bench.reopen()) == 1


def test_what_a_crash_has_left_of_an_empty_log_is_no_obstacle() -> None:
    bench = Bench()
    bench.disk.restart()
    log = Log.create(bench.disk, FOLDER, STORE, "another", Position(9, 9), SEGMENT_BYTES)
    assert log.append(b"x") == 10


def test_a_log_of_another_store_or_format_is_refused() -> None:
    bench = Bench()
    bench.fill(1)
    bench.disk.remove(FOLDER / f"{STORE}.log.note")
    with pytest.raises(LogDamaged, match="missing"):
        bench.reopen()
    bench = Bench()
    with pytest.raises((ForeignData, LogDamaged)):
        Log.open(bench.disk, FOLDER, STORE, "fedcba9876543210", BEGINNING)


def test_the_log_works_on_the_operating_systems_files(tmp_path: Path) -> None:
    log = Log.create(OsDisk(), tmp_path, "shard-s1", STORE_ID, segment_bytes=SEGMENT_BYTES)
    for number in range(1, 31):
        if log.room() < 300:
            assert log.prepare_segment()
            assert log.prepare_segment()
        assert log.append(b"%d:" % number + bytes(300)) == number
    assert log.sync() == 30
    log.note_durable()
    log.cut(25)
    kept = list(log.entries(0))
    log.close()
    log, entries = Log.open(OsDisk(), tmp_path, "shard-s1", STORE_ID, BEGINNING, 25)
    assert entries == kept
    log.release(20)
    assert log.first > 10
    log.restart(Position(40, 1))
    assert log.append(b"x") == 41
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "shard-s1.log.note"


@given(st.binary(max_size=3), st.sampled_from([0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20]))
def test_the_used_bytes_end_with_the_last_that_is_not_zero_however_many_zeros_follow(front: bytes, zeros: int) -> None:
    data = bytes(zeros) + front + bytes(zeros)
    assert segments.used_bytes(data) == len(data.rstrip(b"\0"))
