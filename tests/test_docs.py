"""The documents are true: commands run, links lead somewhere, and everything that has a name is named.

The tables are the real ones: operations of the OpenAPI document, errors, limits, click's commands, the metrics of a
running cluster. How a document is taken apart is in `documents`.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import requests
import yaml

from kvstore.cli.commands import root
from kvstore.cli.deploy import FILES
from kvstore.client import Client
from kvstore.config import ClusterConfig, ControllerConfig, Limits, RouterConfig, ShardConfig, default_config
from kvstore.errors import ConfigError, all_errors
from kvstore.placement.ring import ShardWeight, key_hash, partition_of, place, walk
from kvstore.router.routes.table import PUBLIC_ROUTES
from tests.cluster.clusters import Cluster, running, write_config
from tests.documents import DOCUMENTS, REPOSITORY, Command, Document, anchors, commands_of, inline_commands

PLACEHOLDERS = {"CONTROLLER": "127.0.0.1", "HOST:PORT": "127.0.0.1:9000", "FILE…": "run.ndjson"}
NOT_RUN = {
    "python3 -m venv": "installs this repository; .ci/run does that in a fresh clone",
    "kvstore up": "the cluster that all commands here talk to is one",
    "kvstore status --watch": "runs until Ctrl-C",
    "kvstore shard serve": "needs a second host",
    "kvstore router serve": "needs a second host",
    "kvstore controller serve": "needs a second host",
    "eval": "is bash's; test_completion_in_bash_offers_commands_and_options runs it",
    "locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --web-host": "runs until Ctrl-C",
    "python -m loadtest.chaos": "takes minutes; tests/cluster/test_chaos.py runs it",
}
by_name = {"ids": lambda value: value.name if isinstance(value, Document) else None}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four new shards, as the shipped file has them, for all that the documents do, in their order."""
    with running(write_config(tmp_path_factory.mktemp("docs"), replicas=default_config().replicas)) as cluster:
        (cluster.folder / "DIR").mkdir()
        (cluster.folder / "DIR" / "a.txt").write_text("a file")
        (cluster.folder / "loadtest").symlink_to(REPOSITORY / "loadtest")
        (cluster.folder / ".documents").mkdir()
        yield cluster


def here(text: str, cluster: Cluster) -> str:
    """The text with the ports of this cluster."""
    config = yaml.safe_load((cluster.folder / "cluster.yaml").read_text())
    ports = {"127.0.0.1:8080": config["routers"][0]["listen"], "127.0.0.1:8090": config["controllers"][0]["listen"]}
    ports |= {f"127.0.0.1:{9100 + n}": shard["listen"] for n, shard in enumerate(config["shards"], 1)}
    for theirs, ours in ports.items():
        text = text.replace(theirs, ours)
    return text


def environment(cluster: Cluster) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "KVSTORE_URL": cluster.url, "LC_ALL": "C.UTF-8"}


def release_all(cluster: Cluster) -> None:
    for lease in requests.get(f"{cluster.url}/v1/locks").json()["items"]:
        token = {"Lock-Token": str(lease["token"])}
        requests.delete(f"{cluster.url}/v1/locks/{requests.utils.quote(lease['name'])}", headers=token)


# --- commands ---------------------------------------------------------------------------------------------------------


def why_not_run(command: Command) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.text.startswith(start)), None)


@pytest.mark.parametrize("document", DOCUMENTS, **by_name)
def test_comments_to_paste_come_after_what_makes_zsh_take_them(document: Document) -> None:
    commented = [block for block in document.blocks("sh") if re.search(r"^[^#\n]+ # ", block, re.M)]
    if commented:
        assert "`setopt interactivecomments`" in document.text[: document.text.index(commented[0])]


def test_the_page_of_locust_is_for_this_machine_only() -> None:
    commands = [command.text for document in DOCUMENTS for command in commands_of(document)]
    pages = [text for text in commands if text.startswith("locust ") and " --headless" not in text]
    assert pages
    assert all(" --web-host 127.0.0.1" in text for text in pages)


@pytest.mark.parametrize("document", DOCUMENTS, **by_name)
def test_every_command_does_what_its_comment_says(cluster: Cluster, document: Document) -> None:
    run = [command for command in commands_of(document) if why_not_run(command) is None]
    output = cluster.folder / ".documents"
    script = "".join(
        f"{{ {here(command.text, cluster)}\n}} >{output}/{n} 2>&1 </dev/null\necho $? >{output}/{n}.code\n"
        for n, command in enumerate(run)
    ).replace("-t 5s", "-t 1s")  # the load runs long enough to have a history
    ended = subprocess.run(
        ["sh"], input=script, cwd=cluster.folder, env=environment(cluster), text=True, capture_output=True, timeout=120
    )
    assert ended.stderr == ""
    for n, command in enumerate(run):
        said = (output / str(n)).read_text()
        assert (output / f"{n}.code").read_text() == "0\n", f"{command.text}\n{said}"
        assert '"/problems/' not in said or command.status is not None, f"{command.text}\n{said}"
        if command.status is not None:
            assert f"HTTP/1.1 {command.status} " in said, f"{command.text}\n{said}"
    release_all(cluster)


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    texts = [command.text for document in DOCUMENTS for command in commands_of(document)]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []


def checkable() -> list[str]:
    """Commands that are not run here, and those within a line of text; a program's name and its arguments."""
    texts = {command.text for document in DOCUMENTS for command in commands_of(document) if why_not_run(command)}
    texts |= {text for document in DOCUMENTS for text in inline_commands(document)}
    parts = {part.strip() for text in texts for part in re.split(r"&&|;|\|", text)}
    return sorted({re.sub(r"^\.venv/bin/", "", part).partition("  #")[0].strip() for part in parts})


@pytest.mark.parametrize("text", [text for text in checkable() if text.startswith("kvstore ")])
def test_a_command_that_is_not_run_is_one_that_kvstore_takes(text: str, tmp_path: Path) -> None:
    words = text.replace("`", "").split()[1:]
    words = [PLACEHOLDERS.get(word, word.replace("CONTROLLER", "127.0.0.1")) for word in words if word != "…"]
    command: click.Command = root
    context = click.Context(root, info_name="kvstore")
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            assert set(words) <= {"--help", "--version", "--json"}
            return
        found = command.get_command(context, words[0])
        assert found is not None, text
        command, words = found, words[1:]
    if words in (["--help"], []):
        return
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--") and word != "--"} <= known
    if (REPOSITORY / "cluster.yaml").name in words:
        words[words.index("cluster.yaml")] = str(REPOSITORY / "cluster.yaml")
    required = sum(isinstance(parameter, click.Argument) and parameter.required for parameter in command.params)
    if [word for word in words if not word.startswith("-")][:required]:
        command.make_context(command.name, words)


def programs() -> dict[str, list[str]]:
    """Programs of the load test, each with the options that the documents give them."""
    options: dict[str, list[str]] = {}
    for text in checkable():
        words = text.split()
        if text.startswith("python -m "):
            options.setdefault(words[2], []).extend(word for word in words[3:] if word.startswith("-"))
    return options


@pytest.mark.parametrize("program", sorted(programs()))
def test_a_program_that_is_named_has_the_options_that_are_given(program: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        capture_output=True, text=True, timeout=60, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert [option for option in programs()[program] if option not in shown.stdout] == []


def test_every_program_of_the_load_test_is_named() -> None:
    starts = re.compile(r'^if __name__ == "__main__"', re.M)
    files = [path for path in (REPOSITORY / "loadtest").rglob("*.py") if starts.search(path.read_text("utf-8"))]
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in files}
    text = (REPOSITORY / "loadtest" / "README.md").read_text(encoding="utf-8")
    inner = {"loadtest.chaos.child", "loadtest.bench.bare", "loadtest.damage.child"}  # started by others
    assert {each for each in modules - inner if f"python -m {each.removesuffix('.__main__')}" not in text} == set()


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if document.blocks("python")], **by_name)
async def test_every_python_line_runs(cluster: Cluster, document: Document) -> None:
    names = await python_of(document, cluster)
    async with Client(cluster.url) as kv:
        if "transfer" in names:
            await kv.batch([])
            await kv.put("docs/from", b"30")
            assert await names["transfer"](kv, "docs/from", "docs/to", 10)
            found = [await kv.get(key) for key in ("docs/from", "docs/to")]
            assert [item.value for item in found if item] == [b"20", b"10"]


async def python_of(document: Document, cluster: Cluster) -> dict[str, Any]:
    """The names that its blocks define, all run in their order, as `python -m asyncio` would."""
    names: dict[str, Any] = {}
    for block in document.blocks("python"):
        code = compile(here(block, cluster), document.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waiting = eval(code, names)
        if inspect.isawaitable(waiting):
            await waiting
    return names


async def test_the_recipe_of_leader_election_leads_and_is_followed_by_the_next(cluster: Cluster) -> None:
    document = next(document for document in DOCUMENTS if document.name == "kvstore/API.md")
    names = await python_of(document, cluster)
    async with Client(cluster.url) as kv:
        for me in ("first", "second"):
            leading, work = asyncio.Event(), names["work_as_leader"]

            async def works(kv: Client, token: int, leading: asyncio.Event = leading, work: Any = work) -> None:
                await work(kv, token)
                leading.set()
                await asyncio.Event().wait()

            names["work_as_leader"] = works
            task = asyncio.create_task(names["lead"](kv, me))
            async with asyncio.timeout(30):
                await leading.wait()
            leader, report = await kv.get("leader"), await kv.get("report")
            assert leader is not None
            assert leader.value == me.encode()
            assert report is not None
            assert report.value == b"written by the leader"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            names["work_as_leader"] = work


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash: apt-get install bash")
@pytest.mark.parametrize(("typed", "offered"), [("kvstore sha", "shard"), ("kvstore shard w", "weight")])
def test_completion_in_bash_offers_commands_and_options(cluster: Cluster, typed: str, offered: str) -> None:
    line = next(c.text for d in DOCUMENTS for c in commands_of(d) if c.text.startswith("eval"))
    words = " ".join(f"'{word}'" for word in typed.split())
    script = f"""{line}
COMP_WORDS=({words}); COMP_CWORD={len(typed.split()) - 1}
"$(complete -p kvstore | sed 's/.*-F \\([^ ]*\\).*/\\1/')" kvstore
echo "${{COMPREPLY[@]}}"
"""
    ended = subprocess.run(["bash", "-c", script], env=environment(cluster), capture_output=True, text=True, timeout=60)
    assert (ended.stdout.strip(), ended.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_for_other_shells_is_where_the_document_says(cluster: Cluster, shell: str) -> None:
    assert f"{shell}_source" in RUNNING
    asked = {**environment(cluster), "_KVSTORE_COMPLETE": f"{shell}_source"}
    ended = subprocess.run(["kvstore"], env=asked, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"_KVSTORE_COMPLETE={shell}_complete" in ended.stdout


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, **by_name)
def test_every_link_leads_to_a_file_and_a_heading(document: Document) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.path.parent / path).resolve() if path else document.path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, **by_name)
def test_every_file_and_test_that_is_named_exists(document: Document) -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    quoted = set(re.findall(r"`([^`\n]+)`", document.prose))
    roots = (REPOSITORY, REPOSITORY / "kvstore", document.path.parent)
    rooms = tuple(path for path in (REPOSITORY / "kvstore").iterdir() if path.is_dir())
    files = {name for name in quoted if re.fullmatch(r"[a-z_][a-z_/-]*\.(py|yaml|yml|json)", name)}
    made = {"summary.json"}  # by a run of chaos
    tests_dirs = tuple(path for path in (REPOSITORY / "tests").rglob("*") if path.is_dir())
    nowhere = {
        name for name in files - made if not any((folder / name).exists() for folder in (*roots, *rooms, *tests_dirs))
    }
    assert nowhere == set()
    named = {name for name in quoted if re.fullmatch(r"test_\w+", name)}
    assert {name for name in named if f"def {name}(" not in tests} == set()


# --- names ------------------------------------------------------------------------------------------------------------

API = (REPOSITORY / "kvstore" / "API.md").read_text(encoding="utf-8")
RUNNING = (REPOSITORY / "kvstore" / "deploy" / "README.md").read_text(encoding="utf-8")
EVERYTHING = "\n".join(document.text for document in DOCUMENTS)


def test_every_call_is_in_the_table_of_calls_and_no_other() -> None:
    table = API.partition("## All calls")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", table, re.M))
    assert listed == {f"{route.method} {route.path}" for route in PUBLIC_ROUTES}


def test_every_error_is_in_the_table_of_status_codes_with_its_status() -> None:
    table = API.partition("## Status codes")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| ")]
    statuses = {code: status for status, codes in rows for code in re.findall(r"`([a-z0-9-]+)`", codes)}
    for error in all_errors():
        if issubclass(error, ConfigError):  # printed by a process that cannot start
            assert f"`{error.code}`" in API
        else:
            assert str(error.status) in statuses.pop(error.code), error.code
    assert statuses == {}


def test_every_setting_is_in_the_shipped_file_and_every_one_of_the_first_floor_in_the_text() -> None:
    shipped = (REPOSITORY / "cluster.yaml").read_text(encoding="utf-8")
    for struct in (ClusterConfig, Limits, RouterConfig, ControllerConfig, ShardConfig):
        names = [field.name for field in msgspec.structs.fields(struct)]
        assert [name for name in names if not re.search(rf"\b{name}:", shipped)] == []
        if struct is not Limits:
            assert [name for name in names if f"`{name}`" not in RUNNING] == []


def test_every_file_for_other_programs_is_named() -> None:
    assert [name for name in FILES if f"`{name}`" not in RUNNING] == []


def test_every_room_of_the_package_is_in_the_table_of_rooms() -> None:
    text = (REPOSITORY / "kvstore" / "README.md").read_text(encoding="utf-8")
    entries = [path for path in (REPOSITORY / "kvstore").iterdir() if not path.name.startswith("_")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in entries if path.suffix in ("", ".py")}
    rooms = text.partition("## The rooms")[2].partition("\n## ")[0]
    assert {name for name in names if f"`{name}`" not in rooms} == set()


def test_every_environment_variable_is_named() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "kvstore").rglob("*.py"))
    read = set(re.findall(r'"(KVSTORE_[A-Z_]+)"', sources))
    assert read
    assert {name for name in read if f"`{name}" not in RUNNING} == set()


def command_paths(group: click.Group, path: str = "kvstore") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from command_paths(command, f"{path} {name}")
        else:
            yield f"{path} {name}"


def test_every_command_is_named() -> None:
    assert [path for path in command_paths(root) if not re.search(rf"{path}\b", EVERYTHING)] == []


def metrics_of(*addresses: str) -> set[str]:
    """The names of all families; of a histogram, also those of its series."""
    names = set()
    for address in addresses:
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", requests.get(f"{address}/metrics").text, re.M):
            names.add(name)
            if kind == "histogram":
                names |= {f"{name}_{series}" for series in ("bucket", "count", "sum")}
    return names


@pytest.fixture(scope="module")
def metrics(cluster: Cluster) -> set[str]:
    return metrics_of(cluster.url, here("http://127.0.0.1:8090", cluster), here("http://127.0.0.1:9101", cluster))


def test_every_metric_is_in_the_table_of_metrics_and_no_other(metrics: set[str]) -> None:
    table = RUNNING.partition("All metrics:")[2].partition("\n## ")[0]
    families = {name for name in metrics if not re.search(r"_(bucket|count|sum)$", name) or "in_doubt_" in name}
    assert set(re.findall(r"`(kvstore_\w+)`", table)) == families


def test_alarms_and_board_are_about_metrics_that_exist(metrics: set[str]) -> None:
    for name in ("prometheus.yml", "prometheus-rules.yml", "grafana-board.json"):
        text = (REPOSITORY / "kvstore" / "deploy" / name).read_text(encoding="utf-8")
        assert set(re.findall(r"\bkvstore_\w+", text)) <= metrics, name
    assert set(re.findall(r"\bkvstore_\w+", EVERYTHING)) <= metrics


def test_every_alarm_is_documented_and_well_formed() -> None:
    rules = yaml.safe_load((REPOSITORY / "kvstore" / "deploy" / "prometheus-rules.yml").read_text(encoding="utf-8"))
    alarms = [rule for group in rules["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in alarms} == set(re.findall(r"^\| `(Kvstore\w+)`", RUNNING, re.M))
    for rule in alarms:
        assert {"summary", "description"} == rule["annotations"].keys()
        assert rule["expr"].count("(") == rule["expr"].count(")")
    assert "prometheus-rules.yml" in (REPOSITORY / "kvstore" / "deploy" / "prometheus.yml").read_text()


def test_every_panel_of_the_board_has_a_place_and_a_query() -> None:
    board = msgspec.json.decode((REPOSITORY / "kvstore" / "deploy" / "grafana-board.json").read_bytes())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) > 10
    for panel in board["panels"]:
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])


# --- style ------------------------------------------------------------------------------------------------------------


def test_the_first_page_is_short() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1100


def test_every_folder_says_in_a_line_and_three_more_what_it_is_for_and_has_no_code_of_its_own() -> None:
    folders = {path.parent for name in ("kvstore", "loadtest") for path in (REPOSITORY / name).rglob("*.py")}
    for folder in folders:
        module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        said = [line for line in (ast.get_docstring(module) or "").splitlines() if line]
        assert 2 <= len(said) <= 4, folder
        assert len(module.body) == 1 or folder == REPOSITORY / "kvstore" / "client", folder


def test_every_rule_that_a_mutation_takes_out_is_in_the_design() -> None:
    design = re.sub(r"[*\s]+", " ", (REPOSITORY / "kvstore" / "DESIGN.md").read_text(encoding="utf-8")).lower()
    mutations = REPOSITORY / "tests" / "unit" / "transactions" / "test_transaction_mutations.py"
    headings = re.findall(r"^# --- (.*\".*)$", mutations.read_text(encoding="utf-8"), re.M)
    rules = [rule for heading in headings for rule in re.findall(r'"([^"]+)"', heading)]
    assert len(rules) > 10
    assert [rule for rule in rules if rule.lower() not in design] == []


def test_the_design_names_each_mutation_of_replication_beside_its_rule() -> None:
    design = (REPOSITORY / "kvstore" / "DESIGN.md").read_text(encoding="utf-8")
    mutations = REPOSITORY / "tests" / "unit" / "replication" / "test_replication_mutations.py"
    taken_out = re.findall(r"^@shown_by\(.*\)\ndef (\w+)", mutations.read_text(encoding="utf-8"), re.M)
    assert len(taken_out) > 30
    table = design.partition("## 7. ")[2].partition("## 8. ")[0]
    named = [name for line in table.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)]
    assert sorted(named) == sorted(taken_out)


def test_every_rule_outside_of_transactions_names_its_test() -> None:
    design = (REPOSITORY / "kvstore" / "DESIGN.md").read_text(encoding="utf-8")
    rules = [line for line in design.partition("## 5. ")[0].partition("## 1. ")[2].splitlines() if "**" in line]
    rules += [line for line in design.partition("## 6. ")[2].partition("## 7. ")[0].splitlines() if "**" in line]
    assert len(rules) > 10
    assert [rule for rule in rules if "(`test_" not in rule] == []


def test_the_examples_of_the_documents_lie_where_they_say() -> None:
    shards = [ShardWeight(shard.id, shard.weight) for shard in default_config().shards]
    for key, shard in (("user:42", "s3"), ("fruit/apple", "s4")):
        partition = partition_of(key.encode(), default_config().partitions)
        assert place(shards, default_config().partitions)[partition] == shard
        assert walk(shards, partition, default_config().partitions)[0] == shard
    assert f"partition {partition_of(b'user:42', default_config().partitions)}" in EVERYTHING
    assert f"{key_hash(b'user:42'):x}"[:3] == "9fc"
