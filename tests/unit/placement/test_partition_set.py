"""Sets of partitions: whatever way they are written, they are the same set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.placement.partition_set import all_of, as_text, decode, encode, from_flags, runs, to_flags

counts = st.sampled_from([64, 128, 4096])


@given(counts.flatmap(lambda count: st.lists(st.booleans(), min_size=count, max_size=count)))
def test_flags_bits_and_bytes_are_the_same_set(flags: list[bool]) -> None:
    bits = from_flags(flags)
    assert to_flags(bits, len(flags)) == flags
    assert decode(encode(bits, len(flags))) == bits
    assert [bool(bits >> partition & 1) for partition in range(len(flags))] == flags


def test_any_true_value_is_a_flag() -> None:
    assert from_flags([0, 7, "", "x", None, 1]) == 0b101010


def test_the_bytes_are_as_the_protocol_says() -> None:
    assert encode(1 << 9, 64) == b"\0\2\0\0\0\0\0\0"
    assert decode(b"") == 0


def test_all_are_all() -> None:
    assert to_flags(all_of(64), 64) == [True] * 64
    assert to_flags(1 << 64 | 1, 64) == [True] + [False] * 63, "there are no more than that"


def test_partitions_are_told_as_runs() -> None:
    assert runs([5, 1, 2, 3, 9, 10]) == [[1, 3], [5, 1], [9, 2]]
    assert as_text([5, 1, 2, 3, 9, 10]) == "1-3, 5, 9-10"
    assert runs([]) == []
    assert as_text([]) == ""
