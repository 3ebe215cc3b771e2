"""The command line as a user's shell sees it: real processes, a real cluster, exit codes, bytes on both streams."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from kvstore.client import Client, Delete, Operation, Put
from tests.cluster.actions import ask

if TYPE_CHECKING:
    from tests.cluster.clusters import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
BINARY = bytes(range(256)) + b"\r\n\x00\xff"


class Shell:
    """Runs `kvstore` against the cluster; `prefix` begins every key that a test makes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"cli-{uuid.uuid4().hex}/"

    def start(self, *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", "kvstore", *arguments],
            stdin=streams.get("stdin", subprocess.DEVNULL),
            stdout=streams.get("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "KVSTORE_URL": self.url},
        )

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        with self.start(*arguments, stdin=subprocess.PIPE) as process:
            out, err = process.communicate(stdin, timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def ok(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """Standard output of a run that must succeed and say nothing on standard error."""
        run = self.run(*arguments, stdin=stdin)
        assert (run.returncode, run.stderr) == (0, b"")
        return run.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def store(self, values: dict[str, bytes]) -> None:
        """Put keys below the prefix."""
        self._batch([Put(self.prefix + name, value) for name, value in values.items()])

    def stored(self) -> dict[str, bytes]:
        """What is below the prefix."""

        async def read() -> dict[str, bytes]:
            async with Client(self.url) as kv:
                return {
                    item.key.removeprefix(self.prefix): item.value or b""
                    async for item in kv.list(self.prefix, values=True)
                }

        return asyncio.run(read())

    def clear(self) -> None:
        self._batch([Delete(self.prefix + name) for name in self.stored()])

    def _batch(self, operations: list[Operation]) -> None:
        async def write() -> None:
            async with Client(self.url) as kv:
                assert [result.error for result in await kv.batch(operations) if result.error] == []

        asyncio.run(write())


@pytest.fixture
def shell(cluster: Cluster) -> Iterator[Shell]:
    shell = Shell(cluster.url)
    yield shell
    shell.clear()


def lines(output: bytes) -> list[Any]:
    return [json.loads(line) for line in output.splitlines()]


# --- one key -------------------------------------------------------------------------------------------------


def test_put_get_and_delete_a_key(shell: Shell) -> None:
    key = shell.prefix + "a"
    version = int(shell.ok("put", key, "grüße").removeprefix(b"version "))
    assert shell.ok("get", key) == "grüße".encode()
    assert shell.json("get", key) == {"key": key, "version": version, "value": "grüße"}
    assert shell.ok("delete", key) == b"deleted\n"
    gone = shell.run("get", key)
    assert (gone.returncode, gone.stdout) == (1, b"")
    assert gone.stderr.startswith(f"kvstore: there is no key {key!r}. ".encode())
    assert gone.stderr.count(b"\n") == 1
    assert shell.run("delete", key).returncode == 1


def test_with_json_results_are_on_standard_output_and_errors_on_standard_error(shell: Shell) -> None:
    key = shell.prefix + "a"
    version = shell.json("put", key, "v")["version"]
    assert shell.json("get", key)["version"] == version
    assert shell.json("delete", key) == {"key": key, "deleted": True}
    gone = shell.run("get", key, "--json")
    assert (gone.returncode, gone.stdout) == (1, b"")
    assert json.loads(gone.stderr)["code"] == "not-found"


@pytest.mark.parametrize("source", [[], ["-"]])
def test_any_bytes_go_in_by_standard_input_and_come_out_the_same(shell: Shell, source: list[str]) -> None:
    key = shell.prefix + "a"
    shell.ok("put", key, *source, stdin=BINARY)
    assert shell.ok("get", key) == BINARY
    assert "value_base64" in shell.json("get", key)


def test_get_adds_a_newline_on_a_terminal_only(shell: Shell) -> None:
    shell.store({"a": b"text"})
    reader, terminal = pty.openpty()
    with shell.start("get", shell.prefix + "a", stdout=terminal) as process:
        assert process.wait(60) == 0
    os.close(terminal)
    assert os.read(reader, 100) == b"text\r\n"
    os.close(reader)
    assert shell.ok("get", shell.prefix + "a") == b"text"


def test_a_ttl_is_shown_and_a_wrong_one_refused(shell: Shell) -> None:
    shell.ok("put", shell.prefix + "a", "v", "--ttl", "100")
    assert 50 < shell.json("get", shell.prefix + "a")["ttl"] <= 100
    refused = shell.run("put", shell.prefix + "a", "v", "--ttl", "-1")
    assert refused.returncode == 2
    assert b"ttl" in refused.stderr


def test_a_value_that_is_too_large_is_refused_with_1(shell: Shell) -> None:
    refused = shell.run("put", shell.prefix + "a", stdin=bytes(2 * MIB))
    assert refused.returncode == 1
    assert b"Split the value" in refused.stderr


def test_a_key_that_is_not_utf8_is_wrong_usage(shell: Shell) -> None:
    refused = shell.run("put", os.fsdecode(b"cli-\xff"), "v")
    assert refused.returncode == 2
    assert b"not UTF-8" in refused.stderr


# --- transactions --------------------------------------------------------------------------------------------


def test_a_transaction_from_a_file_says_by_its_exit_code_which_branch_ran(shell: Shell, tmp_path: Path) -> None:
    a, b, c = (shell.prefix + name for name in "abc")
    file = tmp_path / "txn.json"
    body = {
        "if": [{"key": a, "exists": False}],
        "then": [
            {"op": "put", "key": a, "value": "1"},
            {"op": "put", "key": b, "value_base64": "/wA="},
            {"op": "delete", "key": c},
        ],
        "else": [{"op": "get", "key": a}, {"op": "get", "key": b}, {"op": "get", "key": c}],
    }
    file.write_text(json.dumps(body))
    out = shell.ok("txn", str(file)).decode().splitlines()
    version = shell.json("get", a)["version"]
    assert out[0].startswith(f"`then` ran, version {version} (transaction ")
    assert [line.split() for line in out[2:]] == [
        [op, str(version), key] for op, key in (("put", a), ("put", b), ("delete", c))
    ]
    again = shell.run("txn", str(file))
    assert (again.returncode, again.stderr) == (1, b"")
    assert [line.split() for line in again.stdout.decode().splitlines()[2:]] == [
        ["get", str(version), a, '"1"'],
        ["get", str(version), b, r'"\xff\x00"'],
        ["get", "absent", c],
    ]


def test_a_transaction_from_standard_input_is_repeated_safely(shell: Shell) -> None:
    body = json.dumps({"then": [{"op": "put", "key": shell.prefix + name, "value": "1"} for name in "ab"]}).encode()
    arguments = ("txn", "-", "--json", "--idempotency-key", shell.prefix)
    first = shell.ok(*arguments, stdin=body)
    assert json.loads(first)["succeeded"] is True
    assert shell.ok(*arguments, stdin=body) == first
    other = shell.run(*arguments, stdin=body + b" ")
    assert (other.returncode, json.loads(other.stderr)["code"]) == (2, "idempotency-key-reused")
    assert set(shell.stored()) == {"a", "b"}


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"", 2), (b"nonsense", 2), (b'{"then":[]}', 2), (b'{"then":[{"op":"put","key":"KEY","value":"1"},7]}', 2)],
)
def test_a_bad_transaction_is_one_line_and_2(shell: Shell, body: bytes, code: int) -> None:
    run = shell.run("txn", "-", stdin=body.replace(b"KEY", shell.prefix.encode()))
    assert (run.returncode, run.stdout) == (code, b"")
    assert run.stderr.count(b"\n") == 1
    assert shell.stored() == {}


def answers_with_423(shell: Shell) -> float:
    """How many the router has given."""
    metrics = ask(shell.url, "GET", "/metrics").body.decode().splitlines()
    counts = [line for line in metrics if line.startswith("kvstore_request_seconds_count") and 'status="423"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in counts)


@pytest.mark.parametrize("command", [("put", "v"), ("delete",)])
def test_a_write_to_a_key_that_another_client_has_locked_is_refused_at_once_with_its_holder(
    shell: Shell, command: tuple[str, ...]
) -> None:
    key = shell.prefix + "leased"

    async def while_held() -> subprocess.CompletedProcess[bytes]:
        async with Client(shell.url) as kv, kv.lock(key, owner="another client", ttl=60):
            return await asyncio.to_thread(shell.run, command[0], key, *command[1:])

    before = answers_with_423(shell)
    refused = asyncio.run(while_held())
    assert answers_with_423(shell) == before + 1  # it is not asked again
    assert refused.returncode == 1
    assert b"another client" in refused.stderr
    assert refused.stderr.count(b"\n") == 1


def test_the_address_of_a_shard_or_a_controller_is_said_to_be_one(shell: Shell, cluster: Cluster) -> None:
    shard = shell.json("status")["shards"][0]
    for command in ("get", "explain"):
        told = shell.run(command, "a", "--url", shard["url"])
        assert told.returncode == 2
        assert told.stderr.startswith(b"kvstore: this is shard s1, which answers routers only. --url must be ")
        assert b"report" not in told.stderr
    told = shell.run("get", "a", "--url", shell.url.replace("http:", "https:"))
    assert told.returncode == 2
    assert b"does not speak TLS" in told.stderr


def test_a_transaction_on_a_key_that_another_client_has_locked_is_1(shell: Shell) -> None:
    key = shell.prefix + "locked"
    body = json.dumps({"then": [{"op": "put", "key": key, "value": "1"}]}).encode()
    command = (sys.executable, "-m", "kvstore", "txn", "-")
    with shell.start("lock", key, "--", *command, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(body, timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"kvstore: ")
    assert shell.stored() == {}


# --- listings ------------------------------------------------------------------------------------------------


def test_list_shows_the_keys_of_a_prefix_in_byte_order(shell: Shell) -> None:
    shell.store({"b": b"2", "a": b"1", "é": b"3"})
    a, b, e = (f"{shell.prefix}{name}" for name in ("a", "b", "é"))
    assert shell.ok("list", shell.prefix).decode().splitlines() == [a, b, e]
    assert shell.ok("list", shell.prefix, "--limit", "2").decode().splitlines() == [a, b]
    assert shell.ok("list", shell.prefix, "--values").decode().splitlines() == [f"{a}\t1", f"{b}\t2", f"{e}\t3"]
    assert shell.ok("list", shell.prefix, "--count") == b"3\n"
    assert shell.json("list", shell.prefix, "--count") == {"count": 3}
    listed = lines(shell.ok("list", shell.prefix, "--values", "--json"))
    assert [(item["key"], item["value"]) for item in listed] == [(a, "1"), (b, "2"), (e, "3")]


def test_a_key_cannot_steer_the_terminal_of_who_lists_it(shell: Shell) -> None:
    shell.store({"\x1b[2J\nx": b"\x1b]0;\xff"})
    assert shell.ok("list", shell.prefix, "--values") == f"{shell.prefix}\\x1b[2J\\nx\t\\x1b]0;\\xff\n".encode()


def test_a_reader_that_goes_away_ends_the_command_quietly(shell: Shell) -> None:
    shell.store({str(n): b"x" * 100_000 for n in range(8)})
    with shell.start("export", shell.prefix) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_a_full_disk_behind_standard_output_is_told(shell: Shell) -> None:
    shell.store({"a": b"v"})
    with Path("/dev/full").open("wb") as full, shell.start("list", shell.prefix, stdout=full) as process:
        assert process.wait(60) == 2
        assert process.stderr is not None
        assert process.stderr.read() == b"kvstore: No space left on device.\n"


# --- export and import ---------------------------------------------------------------------------------------

VALUES = {
    "empty": b"", "text": "grüße\n".encode(), "json": b'{"a":"\\u0000"}', "binary": BINARY, "large": BINARY * 4000,
    "line\nbreak": b"1", "\x00": b"2", "😀/ü?#%2F": b"3", "..": b"4", '"\\': b"5",
}  # fmt: skip


def test_what_is_exported_comes_back_byte_for_byte(shell: Shell, tmp_path: Path) -> None:
    shell.store(VALUES)
    shell.ok("put", shell.prefix + "expires", "v", "--ttl", "500")
    exported = shell.ok("export", shell.prefix)
    assert len(exported.splitlines()) == len(VALUES) + 1
    file = tmp_path / "all.ndjson"
    shell.run("export", shell.prefix, "-o", str(file))
    shell.clear()
    assert shell.stored() == {}

    run = shell.run("import", str(file), "--json")
    assert run.returncode == 0
    assert json.loads(run.stdout)["stored"] == len(VALUES) + 1
    assert shell.stored() == VALUES | {"expires": b"v"}
    assert 400 < shell.json("get", shell.prefix + "expires")["ttl"] <= 500
    assert list(tmp_path.iterdir()) == [file]

    shell.clear()
    assert b"stored 11 records" in shell.ok("import", "-", stdin=exported)
    assert shell.stored() == VALUES | {"expires": b"v"}


def test_what_can_be_read_but_once_is_imported_without_a_journal(shell: Shell, tmp_path: Path) -> None:
    fifo = tmp_path / "as <(command) is"
    os.mkfifo(fifo)
    with shell.start("import", str(fifo)) as process:
        fifo.write_bytes(b'\xef\xbb\xbf{"key":"%s","value":"v"}\n' % (shell.prefix + "k").encode())
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err, out.startswith(b"stored 1 records")) == (0, b"", True)
    assert shell.stored() == {"k": b"v"}
    assert list(tmp_path.iterdir()) == [fifo]
    assert shell.run("import", str(fifo), "--journal", str(tmp_path / "j")).returncode == 2


def test_a_folder_is_imported_file_by_file(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    files = {"a/b/empty": b"", "a/bin": BINARY, "a/sp ace?#%41": b"1", "a/ü😀": b"2", "a/full": b"x" * MIB}
    for name, value in files.items():
        path = folder / shell.prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    assert shell.run("import", "--dir", str(folder)).returncode == 0
    assert shell.stored() == files
    assert list(tmp_path.iterdir()) == [folder]


def test_what_the_store_refuses_is_named_and_the_others_go_on(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / shell.prefix).mkdir()
    (tmp_path / shell.prefix / "a").write_bytes(b"1")
    (tmp_path / shell.prefix / "large").write_bytes(bytes(2 * MIB))
    (tmp_path / shell.prefix / "z").write_bytes(b"2")
    journal = tmp_path.with_name(f"{tmp_path.name}-journal")
    run = shell.run("import", "--dir", str(tmp_path), "--json", "--journal", str(journal))
    assert run.returncode == 1
    assert f"kvstore: {shell.prefix}large: ".encode() in run.stderr
    report = json.loads(run.stdout)
    assert (report["stored"], report["refused"]) == (2, 1)
    assert shell.stored() == {"a": b"1", "z": b"2"}


def test_a_bad_line_stops_the_import_with_its_number_after_all_before_it(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "x.ndjson"
    good = [json.dumps({"key": f"{shell.prefix}{n}", "value": str(n)}) for n in range(4)]
    file.write_text("\n".join([*good[:3], '{"key":"k","valve":"v"}', good[3]]))
    run = shell.run("import", str(file))
    assert (run.returncode, run.stdout) == (2, b"")
    assert b"line 4: Object contains unknown field `valve`. Mend it, or pass --skip-bad." in run.stderr
    assert set(shell.stored()) == {"0", "1", "2"}

    run = shell.run("import", str(file), "--skip-bad", "--json")
    assert run.returncode == 0
    report = json.loads(run.stdout)
    assert (report["stored"], report["stored_before"], report["bad_lines"]) == (1, 3, 1)
    assert set(shell.stored()) == {"0", "1", "2", "3"}


@pytest.mark.parametrize(
    ("kind", "end"), [("file", signal.SIGINT), ("file", signal.SIGKILL), ("folder", signal.SIGINT)]
)
def test_an_import_that_was_ended_goes_on_where_it_stopped(
    shell: Shell, tmp_path: Path, kind: str, end: signal.Signals
) -> None:
    records = {f"{n:05}": str(n).encode() for n in range(6000 if kind == "file" else 3000)}
    if kind == "file":
        source = tmp_path / "x.ndjson"
        with source.open("w") as file:
            for name, value in records.items():
                file.write(json.dumps({"key": shell.prefix + name, "value": value.decode()}) + "\n")
        arguments = ["import", str(source)]
    else:
        source = tmp_path / "tree"
        (source / shell.prefix).mkdir(parents=True)
        for name, value in records.items():
            (source / shell.prefix / name).write_bytes(value)
        arguments = ["import", "--dir", str(source)]
    journal = source.with_name(source.name + ".kvstore-import")

    with shell.start(*arguments) as process:
        wait_for_entry(journal, process)
        process.send_signal(end)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert (b"interrupted. " in err) == (end == signal.SIGINT)

    run = shell.run(*arguments, "--json")
    assert run.returncode == 0
    report = json.loads(run.stdout)
    assert report["stored_before"] > 0
    assert report["stored"] + report["stored_before"] == len(records)
    assert shell.stored() == records
    assert not journal.exists()


def wait_for_entry(journal: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the import has noted that something is done."""
    deadline_s = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, "the import ended before it could be interrupted"
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_a_changed_file_is_imported_from_its_beginning(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "x.ndjson"
    file.write_text(json.dumps({"key": f"{shell.prefix}a", "value": "old"}) + "\nnonsense\n")
    assert shell.run("import", str(file)).returncode == 2
    file.write_text(json.dumps({"key": f"{shell.prefix}a", "value": "new"}) + "\n")
    run = shell.run("import", str(file))
    assert run.returncode == 0
    assert b"the source has changed: beginning again" in run.stderr
    assert shell.stored() == {"a": b"new"}


def test_ctrl_c_ends_an_import_that_waits_for_its_input(shell: Shell) -> None:
    with shell.start("import", "-", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        line = json.dumps({"key": f"{shell.prefix}a", "value": "x" * MIB}).encode() + b"\n"
        process.stdin.write(line * 3)
        process.stdin.flush()
        wait_for_key(shell)  # it has begun, and will be waiting for more
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def wait_for_key(shell: Shell) -> None:
    deadline_s = time.monotonic() + 60
    while not shell.stored():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_standard_librarys_sources_survive_import_and_export(shell: Shell, tmp_path: Path) -> None:
    """In small: two packages of it."""
    library = Path(json.__file__).parents[1]
    folder = tmp_path / "lib" / shell.prefix
    for package in ("json", "asyncio"):
        for source in (library / package).rglob("*"):
            if source.is_file():
                copy = folder / source.relative_to(library)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(source.read_bytes())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert shell.run("import", "--dir", str(tmp_path / "lib")).returncode == 0
    assert shell.stored() == files
    exported = shell.ok("export", shell.prefix)
    shell.clear()
    shell.ok("import", "-", stdin=exported)
    assert shell.stored() == files


# --- the cluster ---------------------------------------------------------------------------------------------


def test_status_shows_every_shard(shell: Shell) -> None:
    table = shell.ok("status").decode()
    document = shell.json("status")
    assert [shard["id"] for shard in document["shards"]] == ["s1", "s2", "s3", "s4"]
    for shard in document["shards"]:
        assert shard["url"] in table
    assert document["cluster_id"] in table


def test_a_watch_shows_the_cluster_again_and_again_until_ctrl_c(shell: Shell) -> None:
    with shell.start("status", "--watch", "--json") as process:
        stream: IO[bytes] | None = process.stdout
        assert stream is not None
        shown = [json.loads(stream.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert shown[0]["cluster_id"] == shown[1]["cluster_id"]


def test_a_watch_on_a_terminal_draws_the_table_again_and_again_until_ctrl_c(shell: Shell) -> None:
    reader, terminal = pty.openpty()
    with shell.start("status", "--watch", stdout=terminal) as process:
        os.close(terminal)
        shown = b""
        while shown.count(b"every partition has an owner") < 2:
            try:
                shown += os.read(reader, 65_536)
            except OSError:
                break  # it has ended
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    os.close(reader)
    assert (process.returncode, errors) == (0, b"")
    assert shown.count(b"127.0.0.1") >= 8  # four shards, twice


def test_ring_tells_how_even_the_partitions_are(shell: Shell) -> None:
    document = shell.json("ring")
    assert sum(shard["partitions"] for shard in document["shards"]) == document["partitions"]
    assert sum(shard["share"] for shard in document["shards"]) == pytest.approx(1)
    assert 1 <= document["partitions_peak_to_mean"] <= 1.02
    assert f"peak/mean: partitions {document['partitions_peak_to_mean']:.3f}".encode() in shell.ok("ring")


def test_explain_names_the_owner_that_holds_the_key(shell: Shell) -> None:
    shell.store({"a": b"v"})
    document = shell.json("explain", shell.prefix + "a")
    assert document["owner"] in document["walk"]  # the first of them that had room
    text = shell.ok("explain", shell.prefix + "a").decode()
    assert f"owner          {document['owner']}\n" in text
    assert " → ".join(document["walk"]) in text
