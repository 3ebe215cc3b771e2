"""Standard streams as they come: closed, full, gone, or in another encoding; and terminals that must not be steered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.cli.terminal import encoded, encoded_json

HOSTILE = "\x1b[2Jљ\x9b2J"  # in UTF-8 the last byte of the letter is 0x9b, too


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    command = ["/bin/sh", "-c", *arguments, sys.executable]
    return subprocess.run(command, capture_output=True, text=True, env=env | environment, check=False)


def test_a_line_for_a_terminal_has_no_byte_that_its_encoding_takes_for_a_control_sequence() -> None:
    assert encoded("kљ → x", True, "latin-1") == b"k\\u0459 -> x"
    assert encoded("kљ", True, "UTF-8") == encoded("kљ", False, "latin-1") == "kљ".encode()
    assert encoded("\udcff", False, "utf-8") == b"\xff"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_on_a_terminal_says_the_same_without_what_steers_it(encoding: str) -> None:
    document = json.dumps({"key": f"{HOSTILE}😀"}, ensure_ascii=False).encode()
    shown = encoded_json(document, True, encoding)
    assert json.loads(shown) == json.loads(document)
    assert not any(character in shown.decode() for character in "\x1b\x9b")
    if encoding != "utf-8":
        assert shown.isascii()
    assert encoded_json(document, False, encoding) == document


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help >&-", 0),
        ("--help 2>&-", 0),
        ("put a <&- --url http://127.0.0.1:1", 2),
        ("txn - <&- --url http://127.0.0.1:1", 2),
        ("import - <&- --url http://127.0.0.1:1", 2),
        ("get a >&- 2>&- --url http://127.0.0.1:1", 2),
        ("--help >/dev/full", 2),
        ("--version >/dev/full", 2),
    ],
)
def test_streams_that_are_closed_or_full_end_without_a_traceback(arguments: str, code: int) -> None:
    done = run(f'"$0" -m kvstore {arguments}')
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_value_is_never_read_from_a_standard_input_that_is_closed() -> None:
    assert "standard input is closed" in run('"$0" -m kvstore put a <&- --url http://127.0.0.1:1').stderr


@pytest.mark.parametrize("command", ["--help", "--version", "put --help"])
def test_a_reader_that_goes_ends_a_command_with_141(command: str, tmp_path: Path) -> None:
    script = f"""
        mkfifo {tmp_path}/pipe
        exec 3<>{tmp_path}/pipe
        exec 4>{tmp_path}/pipe 3<&-
        "$0" -m kvstore {command} >&4
    """
    done = run(script)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_no_encoding_of_the_streams_is_a_traceback(environment: dict[str, str]) -> None:
    for command in ("--help", "txn --help", "get 'k→' --url http://127.0.0.1:1", "get --ä", "import ä"):
        done = run(f'"$0" -m kvstore {command}', **environment)
        assert done.returncode in (0, 2)
        assert "Traceback" not in done.stderr
