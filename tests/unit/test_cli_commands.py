"""The table of commands: what each says of itself, what it imports, how a run of `main` ends."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from kvstore.cli.commands import main, root
from kvstore.cli.frame import exit_code, printable, report
from kvstore.cli.lazy import LazyCommand, LazyGroup
from kvstore.errors import KvError, all_errors

UNREACHABLE = ["--url", "http://127.0.0.1:1"]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands(root))


def test_there_is_every_command_that_was_promised() -> None:
    assert {" ".join(path) for path in ALL} == {
        "up", "get", "put", "delete", "list", "import", "export", "status", "ring", "explain",
        "txn", "lock", "locks",
        "shard add", "shard remove", "shard weight", "shard rebalance", "shard cancel", "shard list",
        "shard serve", "router serve", "controller serve", "controller recover", "deploy",
        "shard accept-old", "store check", "store log", "store cut", "cluster adopt",
        "cluster replicas", "shard promote", "shard restart",
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_an_example_of_the_command(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "--help"]) == 0
    assert f"kvstore {' '.join(path)}" in capsys.readouterr().out.partition("Example:")[2]


@pytest.mark.parametrize("path", [(), ("shard",), ("router",), ("controller",), *ALL], ids=" ".join)
def test_help_fits_on_80_columns(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*path, "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("path", [path for path in ALL if "serve" not in path], ids=" ".join)
def test_every_command_for_users_speaks_json(path: tuple[str, ...]) -> None:
    assert any("--json" in parameter.opts for parameter in ALL[path].params)


@pytest.mark.parametrize(
    "group", [root, *(root.get_command(click.Context(root), name) for name in ("shard", "router"))]
)
def test_the_summaries_in_the_overview_are_not_empty(group: LazyGroup) -> None:
    for name, command in group._lazy.items():
        assert command.summary if isinstance(command, LazyCommand) else command.get_short_help_str(), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["statsu"], "No such command 'statsu'. Did you mean 'status'?"),
        (["shard", "promot", "s1"], "No such command 'promot'. Did you mean 'promote'?"),
        (["qqq"], "No such command 'qqq'.\n"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_nearest_one(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def imported_by(*arguments: str) -> set[str]:
    """The modules that one run of the command line imports."""
    script = (
        f"import sys\nfrom kvstore.cli.commands import main\nmain({list(arguments)!r})\n"
        "sys.stderr.write('\\n' + ' '.join(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stderr.splitlines()[-1].split())


def test_get_imports_neither_rich_nor_any_server() -> None:
    modules = imported_by("get", "a", *UNREACHABLE)
    assert "kvstore.client" in modules
    servers = {"kvstore.launcher", "kvstore.process", "kvstore.shard", "kvstore.router", "kvstore.controller"}
    assert not modules & {"rich", "prometheus_client", "yaml", "uvloop", *servers}


def test_the_overview_imports_no_command() -> None:
    assert "aiohttp" not in imported_by("--help")


def test_up_imports_no_http() -> None:
    assert "aiohttp" not in imported_by("up", "--help")


def test_no_garbage_is_looked_for_while_a_command_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "command_for_a_test.py").write_text(
        "import gc\nimport click\ncommand = click.Command(str(gc.isenabled()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert LazyCommand("command_for_a_test:command", "").load().name == "False"
    assert gc.isenabled()


@pytest.mark.parametrize("role", ["shard", "router", "controller"])
def test_serve_imports_no_other_role(role: str) -> None:
    modules = imported_by(role, "serve", "--help")
    roles = {name for name in ("shard", "router", "controller") if f"kvstore.{name}.app" in modules}
    assert roles == {role}


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvstore {version('kvstore')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["get"],
        ["get", "a", "--url", "localhost:8080"],
        ["get", "a", "--url", "http://localhost/?q=1"],
        ["list", "--count", "--limit", "3"],
        ["txn"],
        ["txn", "-", "--idempotency-key", ""],
        ["import"],
        ["import", "no-such-file.ndjson"],
        ["import", "-", "--dir", "."],
        ["import", "-", "--journal", "j"],
        ["shard", "serve", "BAD ID", "--listen", "127.0.0.1:1", "--join", "http://h:1", "--data-dir", "d"],
        ["router", "serve", "0", "--listen", "8080", "--join", "http://h:1"],
        ["router", "serve", "0", "--listen", "127.0.0.1:1", "--join", "nonsense"],
    ],
)
def test_wrong_usage_ends_with_2_and_a_word_on_standard_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error: " in err


@pytest.mark.parametrize("role", ["shard", "router", "controller"])
def test_a_process_whose_configuration_is_wrong_ends_with_78(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("limits: {nonsense: 1}\n")
    options = {"shard": ["--join", "http://h:1", "--data-dir", "d"], "router": ["--join", "http://h:1"]}
    arguments = [role, "serve", "0", "--listen", "127.0.0.1:1", "--config", str(config)]
    assert main([*arguments, *options.get(role, ["--data-dir", "d"])]) == 78
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"kvstore: {config}:1: ")


def test_wrong_usage_is_a_json_line_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", "add", "--json", "s5", "--weight", "0"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    problem = json.loads(err)
    assert (problem["code"], problem["next_step"]) == ("usage", "`kvstore shard add --help` shows how it is used.")
    assert "--weight" in problem["detail"]
    assert main(["nonsense", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["detail"].startswith("No such command")
    assert main(["lock", "name", "--ttl", "x", "--", "true", "--json"]) == 2
    assert "Error: " in capsys.readouterr().err  # it is an argument of `true`


def test_ctrl_c_before_the_commands_are_loaded_ends_quietly() -> None:
    script = """if True:
        import sys
        class Interrupted:
            def find_spec(self, name, path=None, target=None):
                if name == "kvstore.cli":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupted())
        from kvstore.__main__ import run
        run()
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")


def test_an_unreachable_store_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "a", *UNREACHABLE]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kvstore: http://127.0.0.1:1 cannot be reached: Connection refused. Start the cluster")


def test_with_json_an_error_is_a_problem_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "a", "--json", *UNREACHABLE]) == 2
    problem = json.loads(capsys.readouterr().err)
    assert problem["code"] == "unavailable"
    assert problem["next_step"].startswith("Start the cluster")


def test_the_address_can_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVSTORE_URL", "http://127.0.0.1:2")
    assert main(["get", "a"]) == 2
    assert "http://127.0.0.1:2 cannot be reached" in capsys.readouterr().err


def test_exit_code_1_means_that_the_store_decided() -> None:
    decided = {error.code for error in all_errors() if exit_code(error()) == 1}
    assert {"not-found", "precondition-failed", "value-too-large", "disk-full", "change-refused"} <= decided
    assert not decided & {"unavailable", "outcome-unknown", "too-many-requests", "key-empty", "bad-ttl", "internal"}


def test_an_error_that_quotes_a_hostile_key_stays_one_harmless_line(capsys: pytest.CaptureFixture[str]) -> None:
    report(KvError("no key \x1b[2J\nkvstore: all is well"), as_json=False)
    err = capsys.readouterr().err
    assert err.startswith("kvstore: no key \\x1b[2J\\nkvstore: all is well. Look into the log")
    assert err.count("\n") == 1


def test_printable_leaves_readable_text_alone() -> None:
    assert printable("grüße/😀 a\\n") == "grüße/😀 a\\n"
