"""The file of a copy's id and promise, on a disk that loses what is not synced."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstore.errors import DataCorrupt
from kvstore.replication.promise import Identity, identity_path, read_identity, write_identity
from loadtest.simulate.disk import PowerCut, SimulatedDisk, keep_all, lose_all

FOLDER, STORE = Path("/data"), "shard-s1"
FIRST, SECOND = Identity("store", "copy", 4), Identity("store", "copy", 9)


def test_what_was_written_is_read_after_a_power_cut() -> None:
    disk = SimulatedDisk()
    assert read_identity(disk, FOLDER, STORE) is None
    write_identity(disk, FOLDER, STORE, FIRST)
    disk.restart(lose_all)
    assert read_identity(disk, FOLDER, STORE) == FIRST


def test_a_power_cut_at_any_call_leaves_the_old_promise_or_the_new_one() -> None:
    seen = set()
    for fates in range(30):
        chance = random.Random(fates)
        for at in range(1, 20):
            disk = SimulatedDisk()
            write_identity(disk, FOLDER, STORE, FIRST)
            disk.power_cut_at = disk.calls + at
            try:
                write_identity(disk, FOLDER, STORE, SECOND)
                disk.restart(lose_all)
                expected = {SECOND}
            except PowerCut:
                disk.restart([lose_all, keep_all, lambda newest, chance=chance: chance.randint(0, newest)][fates % 3])
                expected = {FIRST, SECOND}
            found = read_identity(disk, FOLDER, STORE)
            assert found in expected
            disk.restart(lose_all)
            assert read_identity(disk, FOLDER, STORE) == found, "what was believed once does not change"
            seen.add(found)
    assert seen == {FIRST, SECOND}


def test_a_flipped_byte_is_noticed() -> None:
    disk = SimulatedDisk()
    write_identity(disk, FOLDER, STORE, FIRST)
    file = disk.open(identity_path(FOLDER, STORE))
    for offset in range(file.size() - 1):
        (byte,) = file.pread(1, offset)
        for bit in (1, 0x80):  # the second one leaves no text
            file.pwrite(bytes([byte ^ bit]), offset)
            with pytest.raises(DataCorrupt):
                read_identity(disk, FOLDER, STORE)
        file.pwrite(bytes([byte]), offset)
    assert read_identity(disk, FOLDER, STORE) == FIRST
