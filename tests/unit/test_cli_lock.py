"""kvstore lock, locks, put --if-version: arguments, exit codes, and what becomes of the command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import lock as lock_module
from kvstore.cli import locked_command
from kvstore.cli.commands import main
from kvstore.cli.lock import default_owner
from kvstore.cli.locked_command import LockedCommand
from kvstore.client import Client, Holder
from kvstore.errors import Locked, LockLost, PreconditionFailed, Unavailable

PYTHON = sys.executable


class Store:
    """What the client was asked for; `answers` are raised by the call of that name, the first one first."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[Exception]] = {}

    def note(self, call: str, **members: Any) -> None:
        self.asked.append((call, members))
        if self.answers.get(call):
            raise self.answers[call].pop(0)

    def named(self, call: str) -> list[dict[str, Any]]:
        return [members for name, members in self.asked if name == call]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The calls of the client, without any network."""
    store = Store()

    async def acquire(_: Client, name: str, **members: Any) -> int:
        store.note("acquire", name=name, **members)
        return 12

    async def renew(_: Client, name: str, token: int, *, new_connection: bool = False) -> None:
        store.note("renew", name=name, token=token)

    async def release(_: Client, name: str, token: int, *, new_connection: bool = False) -> None:
        store.note("release", name=name, token=token)

    async def withdraw(_: Client, name: str, idempotency_key: str) -> None:
        store.note("withdraw", name=name, idempotency_key=idempotency_key)

    async def put(_: Client, key: str, value: bytes, **members: Any) -> int:
        store.note("put", key=key, value=value, **members)
        return 8

    async def delete(_: Client, key: str, **members: Any) -> bool:
        store.note("delete", key=key, **members)
        return True

    async def holders(_: Client, prefix: str = "") -> AsyncIterator[Holder]:
        store.note("holders", prefix=prefix)
        yield Holder("jobs/a", "me\nyou", 7, 12.25)
        yield Holder("jobs/b", "", 8, 1.0)

    for call in (acquire, renew, release, withdraw, put, delete, holders):
        monkeypatch.setattr(Client, call.__name__, call)
    return store


def run_python(script: str, *options: str) -> int:
    return main(["lock", "job", *options, "--", PYTHON, "-c", script])


# --- put and delete with conditions ----------------------------------------------------------------------------------


def test_put_hands_over_its_conditions(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["put", "a", "1", "--if-version", "7", "--token", "3"]) == 0
    assert main(["put", "a", "1", "--if-absent", "--json"]) == 0
    first, second = store.named("put")
    assert (first["if_version"], first["if_absent"], first["token"]) == (7, False, 3)
    assert (second["if_version"], second["if_absent"], second["token"]) == (None, True, None)
    assert capsys.readouterr().out == 'version 8\n{"key":"a","version":8}\n'


def test_delete_hands_over_its_conditions(store: Store) -> None:
    assert main(["delete", "a", "--if-version", "0", "--token", "3"]) == 0
    assert store.named("delete") == [{"key": "a", "if_version": 0, "token": 3}]


@pytest.mark.parametrize("error", [PreconditionFailed("no"), LockLost("no"), Locked("no")])
@pytest.mark.parametrize("command", [["put", "a", "1"], ["delete", "a"]])
def test_a_condition_or_lock_that_says_no_ends_with_1(store: Store, command: list[str], error: Exception) -> None:
    store.answers[command[0]] = [error]
    assert main([*command, "--if-version", "7"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["put", "a", "1", "--if-version", "7", "--if-absent"],
        ["put", "a", "1", "--if-version", "seven"],
        ["delete", "a", "--token", "-1"],
        ["lock", "job"],
        ["lock", "job", "--"],
        ["lock", "job", "--on-lost", "shrug", "--", "true"],
        ["lock", "job", "--ttl", "long", "--", "true"],
        ["lock", "job", "ls", "-l"],
    ],
)
def test_wrong_usage_ends_with_2_and_asks_the_store_for_nothing(
    store: Store, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "Error: " in capsys.readouterr().err
    assert store.asked == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_lock_is_acquired_as_asked_and_released(store: Store) -> None:
    assert run_python("", "--ttl", "5", "--wait", "2.5", "--owner", "me") == 0
    (asked,) = store.named("acquire")
    assert (asked["name"], asked["ttl"], asked["wait"], asked["owner"]) == ("job", 5.0, 2.5, "me")
    assert store.asked[-1] == ("release", {"name": "job", "token": 12})


def test_the_owner_names_user_host_and_process_unless_told(store: Store) -> None:
    run_python("")
    assert store.named("acquire")[0]["owner"] == default_owner()
    user_and_host, _, pid = default_owner().rpartition(":")
    assert "@" in user_and_host
    assert int(pid) == os.getpid()


def test_the_command_finds_token_name_and_address_in_its_environment(store: Store, tmp_path: Path) -> None:
    script = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'env')!r}, 'w'))"
    assert run_python(script, "--url", "http://127.0.0.1:7") == 0
    environment = json.loads((tmp_path / "env").read_text())
    assert environment["KVSTORE_LOCK_TOKEN"] == "12"
    assert environment["KVSTORE_LOCK_NAME"] == "job"
    assert environment["KVSTORE_URL"] == "http://127.0.0.1:7"


@pytest.mark.parametrize(
    ("script", "code"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_exit_code_is_the_commands(store: Store, script: str, code: int) -> None:
    assert run_python(script) == code
    assert store.named("release")


def test_options_after_the_dashes_belong_to_the_command(store: Store, tmp_path: Path) -> None:
    script = f"import sys; open({str(tmp_path / 'arguments')!r}, 'w').write(' '.join(sys.argv[1:]))"
    assert main(["lock", "job", "--", PYTHON, "-c", script, "--ttl", "x", "--json", "--"]) == 0
    assert (tmp_path / "arguments").read_text() == "--ttl x --json --"


def test_a_held_lock_ends_with_1_and_tells_who_holds_it(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.answers["acquire"] = [Locked("the lock 'job' is held by 'ann' for another 9 s at most", owner="ann")] * 2
    assert run_python(f"open({str(tmp_path / 'ran')!r}, 'w')") == 1
    assert "held by 'ann'" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert run_python("", "--json") == 1
    problem = json.loads(capsys.readouterr().err)
    assert (problem["code"], problem["owner"]) == ("locked", "ann")


def test_an_unreachable_store_ends_with_2_and_the_command_does_not_run(store: Store, tmp_path: Path) -> None:
    store.answers["acquire"] = [Unavailable("no answer")]
    assert run_python(f"open({str(tmp_path / 'ran')!r}, 'w')") == 2
    assert not (tmp_path / "ran").exists()


def test_a_command_that_is_not_there_ends_with_127_and_takes_no_lock(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lock", "job", "--", "no-such-command-here"]) == 127
    assert capsys.readouterr().err == "kvstore: the command no-such-command-here is not found.\n"
    assert store.asked == []


def test_a_file_that_is_no_program_ends_with_126(store: Store, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("hello")
    assert main(["lock", "job", "--", str(tmp_path / "notes")]) == 126
    assert store.asked == []


def test_a_program_whose_interpreter_is_missing_ends_with_127_and_the_lock_is_released(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    assert main(["lock", "job", "--", str(tmp_path / "script")]) == 127
    assert store.named("release")


def test_a_failed_release_is_told_and_the_exit_code_stays_the_commands(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.answers["release"] = [Unavailable("no answer")]
    assert run_python("raise SystemExit(3)") == 3
    assert "could not be released" in capsys.readouterr().err


# --- the lease is lost -----------------------------------------------------------------------------------------------


def test_a_lost_lease_ends_the_command_with_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.answers["renew"] = [LockLost("gone")]
    assert run_python("import time; time.sleep(60)", "--ttl", "0.3") == 1
    assert "was lost while" in capsys.readouterr().err
    assert not store.named("release")


def test_with_warn_a_lost_lease_is_told_and_the_command_goes_on(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.answers["renew"] = [LockLost("gone")]
    assert run_python("import time; time.sleep(1.2); raise SystemExit(5)", "--ttl", "0.3", "--on-lost", "warn") == 5
    assert "was lost while" in capsys.readouterr().err


@pytest.mark.parametrize(("on_lost", "code"), [("kill", 1), ("warn", 4)])
def test_a_loss_that_only_the_release_shows_is_told_as_well(
    store: Store, on_lost: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store.answers["release"] = [LockLost("gone")]
    assert run_python("raise SystemExit(4)", "--on-lost", on_lost) == code
    assert "may have run beside the next holder" in capsys.readouterr().err


async def test_a_command_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locked_command, "END_TIMEOUT_S", 0.2)
    ready = fifo(tmp_path / "ready")
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    )
    async with LockedCommand([PYTHON, "-c", script], os.environ) as running:
        await opened(ready)
        assert await running.end() == 128 + signal.SIGKILL


async def test_what_the_command_started_is_ended_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locked_command, "_in_foreground", lambda: False)
    held_open = fifo(tmp_path / "held-open")
    # The shell's child holds the fifo open for writing: the reader sees its end when the child has gone.
    async with LockedCommand(["sh", "-c", f"sleep 60 > {held_open} & wait"], os.environ) as running:
        reader = await asyncio.to_thread(held_open.open, "rb")
        await running.end()
        with reader:
            assert await asyncio.wait_for(asyncio.to_thread(reader.read), 60) == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_are_passed_on_to_the_command(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(locked_command, "_in_foreground", lambda: False)
    ready = fifo(tmp_path / "ready")
    script = (
        f"import signal, sys, time; signal.signal({int(number)}, lambda *_: sys.exit(42)); "
        f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    )
    async with LockedCommand([PYTHON, "-c", script], os.environ) as running:
        await opened(ready)
        os.kill(os.getpid(), number)
        assert await running.ended() == 42


async def test_a_command_still_running_when_the_block_is_left_is_killed() -> None:
    with pytest.raises(ZeroDivisionError):
        async with LockedCommand(["sleep", "60"], os.environ) as running:
            raise ZeroDivisionError
    assert await running.ended() == 128 + signal.SIGKILL


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


async def opened(path: Path) -> None:
    """Until a process has opened the fifo for writing and closed it."""
    await asyncio.to_thread(path.read_bytes)


# --- locks -----------------------------------------------------------------------------------------------------------


def test_locks_shows_a_line_for_each_holder(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["locks", "jobs/"]) == 0
    assert store.named("holders") == [{"prefix": "jobs/"}]
    assert capsys.readouterr().out.splitlines() == [
        "jobs/a\tme\\nyou\ttoken 7\t12.2 s left",
        "jobs/b\t-\ttoken 8\t1.0 s left",
    ]


def test_locks_speaks_json(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["locks", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"name": "jobs/a", "owner": "me\nyou", "token": 7, "ttl_left": 12.25}


def test_an_owner_is_cut_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module.socket, "gethostname", lambda: "ü" * 300)
    assert len(default_owner().encode()) <= 256
    assert default_owner().endswith(f":{os.getpid()}")
