"""loadtest.debian_index: from Packages files to import lines."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtest import debian_index
from loadtest.debian_index import BadIndex, open_index, records, stanzas, to_line

HELLO = b"Package: hello\nVersion: 1:2.10-3~deb12\nArchitecture: amd64\nDescription: a greeting\n in two lines\n"
TREE = b"Package: tree\nArchitecture: all\nVersion: 2.1\n"


def convert(text: bytes) -> list[tuple[str, bytes]]:
    return list(records(stanzas(text.splitlines(keepends=True), "Packages")))


def test_a_stanza_becomes_one_record_with_its_exact_bytes() -> None:
    assert convert(HELLO + b"\n" + TREE) == [
        ("debian/hello/1:2.10-3~deb12/amd64", HELLO),
        ("debian/tree/2.1/all", TREE),
    ]


def test_empty_lines_before_between_and_after_stanzas_make_no_record() -> None:
    assert convert(b"\n\n" + HELLO + b"\n \n\n" + TREE + b"\n\n") == convert(HELLO + b"\n" + TREE)


def test_field_names_are_found_in_any_case_and_only_at_the_beginning_of_a_line() -> None:
    text = b"PACKAGE: a\nDescription: x\n Version: 9\nversion: 1\nArchitecture: all\n"
    assert convert(text) == [("debian/a/1/all", text)]


def test_the_same_stanza_in_two_suites_is_written_once() -> None:
    assert convert(HELLO + b"\n" + HELLO) == [("debian/hello/1:2.10-3~deb12/amd64", HELLO)]


def test_a_stanza_that_differs_between_suites_gets_a_key_of_its_own() -> None:
    other, third = HELLO + b"Filename: pool/updates\n", HELLO + b"Filename: pool/security\n"
    keys = [key for key, _ in convert(b"\n".join([HELLO, other, HELLO, third, other]))]
    assert keys == [
        "debian/hello/1:2.10-3~deb12/amd64",
        "debian/hello/1:2.10-3~deb12/amd64/2",
        "debian/hello/1:2.10-3~deb12/amd64/3",
    ]


def test_two_architectures_of_one_version_are_two_records() -> None:
    keys = [key for key, _ in convert(HELLO + b"\n" + HELLO.replace(b"amd64", b"arm64"))]
    assert len(set(keys)) == 2


def test_a_stanza_that_is_no_utf8_comes_back_byte_for_byte_from_base64() -> None:
    stanza = TREE + b"Maintainer: J\xf6rg\n"
    record = json.loads(to_line(*convert(stanza)[0]))
    assert set(record) == {"key", "value_base64"}
    assert base64.b64decode(record["value_base64"]) == stanza


def test_text_beyond_ascii_stays_text() -> None:
    stanza = TREE + "Maintainer: Jörg 🌳\n".encode()
    record = json.loads(to_line(*convert(stanza)[0]))
    assert record == {"key": "debian/tree/2.1/all", "value": stanza.decode()}


@pytest.mark.parametrize("missing", [b"Package", b"Version", b"Architecture"])
def test_a_stanza_without_a_name_version_or_architecture_is_refused_with_its_line(missing: bytes) -> None:
    bad = b"".join(line for line in TREE.splitlines(keepends=True) if not line.startswith(missing))
    with pytest.raises(BadIndex, match=rf"Packages:7: .*{missing.decode()}"):
        convert(HELLO + b"\n" + bad)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".lz4"])
def test_compressed_indexes_give_what_the_plain_one_gives(tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"Packages{suffix}", HELLO + b"\n" + TREE
    if suffix == ".lz4":
        if shutil.which("lz4") is None:
            pytest.skip("lz4 is not installed: apt-get install lz4")
        text = subprocess.run(["lz4", "-c"], input=text, capture_output=True, check=True).stdout
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(suffix, bytes)(text))
    assert list(records(open_index(path))) == convert(HELLO + b"\n" + TREE)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_broken_compressed_index_is_a_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"Packages{suffix}"
    path.write_bytes(b"this was never compressed")
    with pytest.raises(BadIndex, match="Packages"):
        list(open_index(path))


def test_the_command_writes_import_lines_and_tells_how_many(tmp_path: Path) -> None:
    first, second = tmp_path / "a_Packages", tmp_path / "b_Packages"
    first.write_bytes(HELLO + b"\n" + TREE)
    second.write_bytes(HELLO)
    result = CliRunner().invoke(debian_index.main, [str(first), str(second)])
    assert result.exit_code == 0
    assert [json.loads(line)["key"] for line in result.stdout.splitlines()] == [
        key for key, _ in convert(HELLO + b"\n" + TREE)
    ]
    assert "2 packages" in result.stderr


def test_without_a_file_the_command_reads_all_that_apt_has_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian_index, "APT_LISTS", tmp_path)
    (tmp_path / "b_Packages.gz").write_bytes(gzip.compress(HELLO))
    (tmp_path / "a_Packages").write_bytes(TREE)
    (tmp_path / "a_InRelease").write_bytes(b"not an index")
    result = CliRunner().invoke(debian_index.main, [])
    assert [json.loads(line)["value"].encode() for line in result.stdout.splitlines()] == [TREE, HELLO]


def test_an_empty_index_is_an_error_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "Packages"
    path.touch()
    result = CliRunner().invoke(debian_index.main, [str(path)])
    assert result.exit_code == 1
    assert "no package found" in result.stderr
