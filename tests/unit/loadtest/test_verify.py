"""loadtest.verify: what was imported, read by code of its own, and what differs in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.verify import difference, folder_values, ndjson_values


def test_a_value_that_is_missing_other_or_too_large_is_told_and_an_equal_one_is_not() -> None:
    assert difference(b"red", b"red", 10) is None
    assert difference(b"red", None, 10) == "is missing"
    assert difference(b"red", b"rod", 10) == "differs from byte 1 on (3 bytes expected, 3 found)"
    assert difference(b"red", b"redder", 10) == "differs from byte 3 on (3 bytes expected, 6 found)"
    assert difference(b"larger", None, 3) is None
    assert difference(b"larger", b"larger", 3) == "has 6 bytes, more than a value may have"


def test_the_last_line_of_a_key_counts_and_values_may_be_in_base64(tmp_path: Path) -> None:
    file = tmp_path / "lines.ndjson"
    file.write_text(
        '{"key":"a","value":"old"}\n\n{"key":"b","value_base64":"/w==","ttl":1.5}\n{"key":"a","value":"new","version":3}\n',
        encoding="utf-8",
    )
    assert {each.key: each.read() for each in ndjson_values(file)} == {"a": b"new", "b": b"\xff"}


@pytest.mark.parametrize("line", ["{", '{"value":"x"}', '{"key":"a"}', '{"key":"a","value_base64":"?"}'])
def test_a_line_that_is_no_record_is_told_with_its_place(tmp_path: Path, line: str) -> None:
    file = tmp_path / "lines.ndjson"
    file.write_text('{"key":"a","value":"1"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"lines\.ndjson:2"):
        list(ndjson_values(file))


def test_the_path_below_the_folder_is_the_key(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    assert {each.key: each.read() for each in folder_values(tmp_path)} == {"a": b"1", "deep/er/b": b"2"}
