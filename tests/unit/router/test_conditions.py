"""Conditions on a read: which versions a field of entity tags names (RFC 9110, section 13.1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import BadCondition
from kvstore.router.app import _names_version


@pytest.mark.parametrize("field", ["*", " * ", '"42"', '"41","42"', '"41" , "42"', ', "42",,', '"42", W/"7"'])
def test_a_field_that_names_the_version_holds(field: str) -> None:
    assert _names_version(field, 42, weak=False)


@pytest.mark.parametrize("field", ['"41"', '"41", "43"', '"042"', '"4"', '""', '"42x"', '"xxh3-a!#"'])
def test_a_field_that_names_others_does_not_hold(field: str) -> None:
    assert not _names_version(field, 42, weak=False)
    assert not _names_version(field, 42, weak=True)


def test_weak_tags_count_for_a_cache_and_never_for_a_writer() -> None:
    assert _names_version('W/"42"', 42, weak=True)
    assert not _names_version('W/"42"', 42, weak=False)


@pytest.mark.parametrize(
    "field",
    ["42", "'42'", '"42', '42"', '"42" "43"', '*, "42"', '"42", *', 'w/"42"', 'W/42', 'W/ "42"', '"4 2"', '"a"b"', "", " , "],
)
@pytest.mark.parametrize("weak", [True, False])
def test_a_malformed_condition_is_refused_and_never_taken_for_one_that_fails(field: str, weak: bool) -> None:
    with pytest.raises(BadCondition):
        _names_version(field, 42, weak=weak)


def test_what_follows_a_match_is_still_looked_at() -> None:
    with pytest.raises(BadCondition):
        _names_version('"42", nonsense', 42, weak=False)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 50))
def test_a_list_names_its_members_and_no_others(versions: list[int], version: int) -> None:
    field = ", ".join(f'"{one}"' for one in versions)
    assert _names_version(field, version, weak=False) == (version in versions)
