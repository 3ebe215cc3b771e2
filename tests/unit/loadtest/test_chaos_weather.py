"""The disk of a chaos run: it reads as a file does, loses what was not synced, and is slow when it is told to be."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos.weather import ForgetfulDisk, Slowness

writes = st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=20), st.booleans()), max_size=12)


@given(writes)
def test_it_reads_as_a_file_does_and_keeps_what_was_synced(operations: list[tuple[int, bytes, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, expected, durable = Path(folder, "log"), bytearray(), bytearray()
        disk = ForgetfulDisk(Slowness(Path(folder, "slow")))
        file = disk.open(path, create=True)
        reader = disk.open(path, write=False)
        for offset, data, syncs in operations:
            file.pwrite(data, offset)
            expected.extend(b"\0" * (offset + len(data) - len(expected)))
            expected[offset : offset + len(data)] = data
            assert file.size() == len(expected)
            assert file.pread(100, 0) == expected
            assert reader.pread(7, 5) == expected[5:12]
            if syncs:
                file.sync()
                durable = bytearray(expected)
            assert path.read_bytes() == durable  # what `kill -9` would leave
        file.close()
        reader.close()


def test_a_sync_takes_long_while_the_marker_is_there(tmp_path: Path) -> None:
    marker = tmp_path / "slow"
    file = ForgetfulDisk(Slowness(marker)).open(tmp_path / "log", create=True)
    marker.touch()
    began_s = time.monotonic()
    file.pwrite(b"1", 0)
    file.sync()
    assert time.monotonic() - began_s > 0.01
    file.close()
