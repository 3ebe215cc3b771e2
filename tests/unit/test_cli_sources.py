"""What is imported: lines and files, each exactly one entry."""

from __future__ import annotations

import codecs
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import sources
from kvstore.cli.frame import VALUE_BYTES_READ_MAX
from kvstore.cli.sources import Entry, NoRecord, Record, folder_bytes, folder_records, ndjson_records


def read(text: bytes) -> list[Entry]:
    return list(ndjson_records(io.BytesIO(text)))


def one(text: bytes) -> Entry:
    (entry,) = read(text)
    return entry


# --- NDJSON --------------------------------------------------------------------------------------------------


def test_a_line_of_an_export_is_a_record() -> None:
    entry = one(b'{"key":"k","version":7,"value":"\\u0000gr\xc3\xbc\xc3\x9fe","ttl":1.5}\n')
    assert isinstance(entry, Record)
    assert (entry.key, entry.value, entry.ttl) == ("k", "\0grüße".encode(), 1.5)


def test_a_byte_order_mark_is_passed_over_also_where_files_were_joined() -> None:
    line = codecs.BOM_UTF8 + b'{"key":"k","value":"v"}\n'
    entries = read(line + line + codecs.BOM_UTF8 + b"\n" + line)
    assert [(type(entry), entry.mark) for entry in entries] == [
        (Record, [len(line), 1]), (Record, [2 * len(line), 2]), (Record, [3 * len(line) + 4, 4]),
    ]  # fmt: skip
    assert [entry.steps for entry in entries] == [len(line)] * 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(encoding: str) -> None:
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    entry = read(mark + '{"key":"k","value":"v"}'.encode(encoding))[0]
    assert isinstance(entry, NoRecord)
    assert (entry.kind, entry.reason) == ("bad-line", "this is UTF-16: save the file as UTF-8")


def test_bytes_travel_as_base64() -> None:
    entry = one(b'{"key":"k","value_base64":"/wA="}')
    assert isinstance(entry, Record)
    assert entry.value == b"\xff\0"


def test_an_empty_value_is_a_value() -> None:
    entry = one(b'{"key":"k","value":""}')
    assert isinstance(entry, Record)
    assert entry.value == b""


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b'{"key":"k"}',
        b'{"key":"k","value":"v","value_base64":"dg=="}',
        b'{"key":"k","value_base64":"%%%"}',
        b'{"key":"k","value":1}',
        b'{"key":1,"value":"v"}',
        b'{"value":"v"}',
        b'{"key":"k","value":"v","tll":5}',
        b'{"key":"k","value":"v","value":"w"}',
        b'{"key":"k","value":"v","ttl":0}',
        b'{"key":"k","value":"v","ttl":"5"}',
        b'{"key":"k","value":"v"} {"key":"l","value":"w"}',
        b'{"key":"\\ud800","value":"v"}',
        b'{"key":"\xff","value":"v"}',
        b'{"key":"k","value":"v',
    ],
)
def test_a_line_that_is_no_record_is_named_by_its_number(line: bytes) -> None:
    entries = read(b'{"key":"a","value":"1"}\n\n' + line + b'\n{"key":"b","value":"2"}\n')
    assert [type(entry) for entry in entries] == [Record, NoRecord, Record]
    bad = entries[1]
    assert isinstance(bad, NoRecord)
    assert (bad.where, bad.kind) == ("line 3", "bad-line")
    assert bad.reason


def test_reading_on_from_a_mark_gives_the_rest() -> None:
    text = b'{"key":"a","value":"1"}\n\n{"key":"b","value":"2"}\nnonsense\n{"key":"c","value":"3"}'
    whole = read(text)
    for done, entry in enumerate(whole, 1):
        offset, line = entry.mark
        stream = io.BytesIO(text)
        stream.seek(offset)
        assert list(ndjson_records(stream, offset=offset, line=line)) == whole[done:]


def test_a_line_without_end_is_refused_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LINE_BYTES_MAX", 100)
    entries = read(b'{"key":"a","value":"' + b"x" * 1000 + b'"}\n{"key":"b","value":"2"}\n')
    assert isinstance(entries[0], NoRecord)
    assert entries[0].reason == "it has 1,023 bytes"
    assert isinstance(entries[1], Record)
    assert entries[1].mark == [1047, 2]


# --- a folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"text\r\n")
    (tmp_path / "b" / "empty").write_bytes(b"")
    (tmp_path / "b" / "c" / "bin ?#%41 😀").write_bytes(bytes(range(256)))
    return tmp_path


def test_a_key_is_the_path_below_the_folder_and_the_value_is_the_file(folder: Path) -> None:
    entries = list(folder_records(folder))
    assert {entry.key: entry.value for entry in entries if isinstance(entry, Record)} == {
        "a.txt": b"text\r\n",
        "b/empty": b"",
        "b/c/bin ?#%41 😀": bytes(range(256)),
    }
    assert folder_bytes(folder) == 262 == sum(entry.steps for entry in entries)


def test_a_file_that_is_done_is_left_out_until_it_changes(folder: Path) -> None:
    done = frozenset(entry.mark for entry in folder_records(folder) if isinstance(entry, Record))
    assert list(folder_records(folder, done)) == []
    changed = folder / "a.txt"
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
    assert [entry.key for entry in folder_records(folder, done) if isinstance(entry, Record)] == ["a.txt"]


def test_a_name_that_is_not_utf8_is_refused_and_the_others_go_on(folder: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/bad\xffname")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    refused = [entry for entry in folder_records(folder) if isinstance(entry, NoRecord)]
    assert [(entry.where, entry.kind) for entry in refused] == [("bad\\xffname", "refused")]
    assert sum(isinstance(entry, Record) for entry in folder_records(folder)) == 3


def test_links_to_files_are_followed_and_loops_are_not(folder: Path) -> None:
    (folder / "link").symlink_to("a.txt")
    (folder / "b" / "loop").symlink_to("..")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    entries = list(folder_records(folder))
    assert {entry.key for entry in entries if isinstance(entry, Record)} == {
        "a.txt", "link", "b/empty", "b/c/bin ?#%41 😀",
    }  # fmt: skip
    skipped = {entry.where for entry in entries if isinstance(entry, NoRecord) and entry.kind == "skipped"}
    assert skipped == {"b/loop", "dangling", "fifo"}


def test_a_file_too_large_for_any_cluster_is_refused_unread(folder: Path) -> None:
    with (folder / "huge").open("wb") as file:
        file.truncate(VALUE_BYTES_READ_MAX + 1)
    refused = [entry for entry in folder_records(folder) if isinstance(entry, NoRecord)]
    assert [(entry.where, entry.kind) for entry in refused] == [("huge", "refused")]


def test_what_may_not_be_read_is_refused_and_the_others_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, for root may read everything."""
    scandir: Any = os.scandir
    read: Any = Path.open

    def scan(path: str) -> object:
        if str(path).endswith("/c"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def open_(path: Path, *mode: str) -> object:
        if path.name == "a.txt":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path, *mode)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(Path, "open", open_)
    entries = list(folder_records(folder))
    refused = [entry for entry in entries if isinstance(entry, NoRecord)]
    assert [(entry.where, entry.kind, entry.reason) for entry in refused] == [
        ("a.txt", "refused", "it cannot be read: Permission denied"),
        (f"{folder}/b/c", "refused", "it cannot be read: Permission denied"),
    ]
    assert [entry.key for entry in entries if isinstance(entry, Record)] == ["b/empty"]
