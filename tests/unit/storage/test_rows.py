"""Rows: the checksum names everything that a row means, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.storage.rows import Row, checksum

GOOD = ("value", "key", 3, 1000, b"body")


def test_the_checksum_is_frozen() -> None:
    assert checksum(*GOOD) == -817985358109579335
    assert checksum("value", "schlüssel", 1, 0, None) == -8685148906883975076


@pytest.mark.parametrize(
    "other",
    [
        ("lock", "key", 3, 1000, b"body"),
        ("value", "keyb", 3, 1000, b"ody"),
        ("value", "Key", 3, 1000, b"body"),
        ("value", "key", 4, 1000, b"body"),
        ("value", "key", 3, 0, b"body"),
        ("value", "key", 3, 1000, b"bodY"),
        ("value", "key", 3, 1000, b""),
        ("value", "key", 3, 1000, None),
    ],
)
def test_a_change_of_anything_changes_the_checksum(other: tuple[str, str, int, int, bytes | None]) -> None:
    assert checksum(*other) != checksum(*GOOD)


def test_an_empty_value_and_a_tombstone_differ() -> None:
    assert checksum("value", "a", 1, 0, b"") != checksum("value", "a", 1, 0, None)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.binary(max_size=20), st.integers(0, 2**53))
def test_the_checksum_fits_a_signed_column(key: str, body: bytes, version: int) -> None:
    assert -(2**63) <= checksum("value", key, version, 0, body) < 2**63


@given(
    st.tuples(st.text("a\0\x01", max_size=4), st.binary(max_size=4)),
    st.tuples(st.text("a\0\x01", max_size=4), st.binary(max_size=4)),
)
def test_no_byte_can_move_between_key_and_body_unseen(one: tuple[str, bytes], other: tuple[str, bytes]) -> None:
    same = checksum("value", one[0], 1, 0, one[1]) == checksum("value", other[0], 1, 0, other[1])
    assert same == (one == other)


def test_a_row_counts_for_the_bytes_of_key_and_value_and_a_tombstone_for_nothing() -> None:
    assert Row("value", "ü", 0, 1, 1, 0, b"123").payload_bytes == 5
    assert Row("value", "ü", 0, 1, 1, 0, None).payload_bytes == 0
