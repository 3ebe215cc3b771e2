"""`kvstore lock` and conditional writes against real processes: exclusion, exit codes, a lease that is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.clusters import REPOSITORY, Cluster

pytestmark = pytest.mark.timeout(120)

WAIT_S = 30.0


@pytest.fixture
def name() -> str:
    """A lock, and a key, that no other test uses."""
    return f"cli-lock/{uuid.uuid4()}"


def kvstore(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "KVSTORE_URL": cluster.url},
        cwd=REPOSITORY,
        timeout=60,
        check=False,
    )


@contextmanager
def started(cluster: Cluster, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A `kvstore` that runs beside the test, in a session of its own, without a terminal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "KVSTORE_URL": cluster.url},
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def version_of(run: subprocess.CompletedProcess[str]) -> int:
    assert run.returncode == 0, run.stderr
    return int(json.loads(run.stdout)["version"])


# --- conditions ------------------------------------------------------------------------------------------------------


def test_put_if_version_writes_once_and_then_ends_with_1(cluster: Cluster, name: str) -> None:
    version = version_of(kvstore(cluster, "put", name, "a", "--json"))
    newer = version_of(kvstore(cluster, "put", name, "b", "--if-version", str(version), "--json"))
    assert newer > version
    refused = kvstore(cluster, "put", name, "c", "--if-version", str(version), "--json")
    assert (refused.returncode, refused.stdout) == (1, "")
    problem = json.loads(refused.stderr)
    assert (problem["code"], problem["version"]) == ("precondition-failed", newer)
    assert kvstore(cluster, "get", name).stdout == "b"


def test_put_if_absent_and_delete_if_version_say_no_with_1(cluster: Cluster, name: str) -> None:
    version = version_of(kvstore(cluster, "put", name, "a", "--if-absent", "--json"))
    assert kvstore(cluster, "put", name, "b", "--if-absent").returncode == 1
    assert kvstore(cluster, "delete", name, "--if-version", str(version + 1)).returncode == 1
    assert kvstore(cluster, "delete", name, "--if-version", str(version)).returncode == 0
    assert kvstore(cluster, "get", name).returncode == 1


# --- lock ------------------------------------------------------------------------------------------------------------

# Appends its begin and end to a file. Two of them never overlap, so the lines come in pairs.
SECTION = """
import os, time
def note(word):
    with open(os.environ["LINES"], "a") as file:
        file.write(f"{word} {os.environ['KVSTORE_LOCK_TOKEN']}\\n")
note("begin"); time.sleep(0.3); note("end")
"""


def test_two_that_take_the_same_lock_never_overlap(
    cluster: Cluster, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", str(tmp_path / "lines"))
    command = ("lock", name, "--wait", "30", "--", sys.executable, "-c", SECTION)
    with started(cluster, *command) as one, started(cluster, *command) as two, started(cluster, *command) as three:
        assert [each.wait(WAIT_S) for each in (one, two, three)] == [0, 0, 0]
    lines = [line.split() for line in (tmp_path / "lines").read_text().splitlines()]
    assert [word for word, _ in lines] == ["begin", "end"] * 3
    tokens = [int(token) for _, token in lines]
    assert tokens[0::2] == tokens[1::2] == sorted(set(tokens))


def test_the_lock_stands_while_the_command_runs_and_is_free_afterwards(
    cluster: Cluster, name: str, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    command = ("lock", name, "--ttl", "3", "--owner", "ann", "--", "sh", "-c", f"echo begun; cat {go}; exit 7")
    with started(cluster, *command) as holder:
        assert first_line(holder) == "begun"
        began = time.monotonic()
        refused = kvstore(cluster, "lock", name, "--", "true")
        assert refused.returncode == 1
        assert "'ann'" in refused.stderr
        (shown,) = [json.loads(line) for line in kvstore(cluster, "locks", name, "--json").stdout.splitlines()]
        assert (shown["name"], shown["owner"]) == (name, "ann")
        assert 0 < shown["ttl_left"] <= 3
        time.sleep(max(0.0, began + 3.3 - time.monotonic()))  # the lease is shorter than the command: it is renewed
        go.write_text("")
        assert holder.wait(WAIT_S) == 7
    assert kvstore(cluster, "locks", name).stdout == ""
    assert kvstore(cluster, "lock", name, "--", "true").returncode == 0


def test_a_leased_key_is_written_with_the_token_of_its_lock_only(cluster: Cluster, name: str) -> None:
    script = (
        f'"{sys.executable}" -m kvstore put "$KVSTORE_LOCK_NAME" mine --token $KVSTORE_LOCK_TOKEN; echo written; read _'
    )
    with subprocess.Popen(
        [sys.executable, "-m", "kvstore", "lock", name, "--url", cluster.url, "--", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    ) as holder:
        assert first_line(holder).startswith("version ")
        assert first_line(holder) == "written"
        stranger = kvstore(cluster, "put", name, "theirs", "--token", "1", "--json")
        assert stranger.returncode == 1
        assert json.loads(stranger.stderr)["code"] == "lock-lost"
        assert kvstore(cluster, "get", name).stdout == "mine"
    assert kvstore(cluster, "put", name, "theirs").returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_frees_the_lock(
    cluster: Cluster, name: str, number: signal.Signals, code: int
) -> None:
    # No shell: a SIGINT that comes while dash starts a command is held back until that command has ended.
    script = "import time; print('begun', flush=True); time.sleep(60); print('not reached')"
    with started(cluster, "lock", name, "--", sys.executable, "-c", script) as holder:
        assert first_line(holder) == "begun"
        holder.send_signal(number)
        assert holder.wait(WAIT_S) == code
        assert kvstore(cluster, "locks", name).stdout == ""


def lose_the_lease(cluster: Cluster, name: str, holder: subprocess.Popen[str]) -> None:
    """Stop the process that renews until another client has got the lock."""
    holder.send_signal(signal.SIGSTOP)
    assert kvstore(cluster, "lock", name, "--wait", "20", "--", "true").returncode == 0
    holder.send_signal(signal.SIGCONT)


def test_a_lost_lease_ends_the_command_with_1(cluster: Cluster, name: str) -> None:
    with started(cluster, "lock", name, "--ttl", "2", "--", "sh", "-c", "echo begun; sleep 60; echo no") as holder:
        assert first_line(holder) == "begun"
        lose_the_lease(cluster, name, holder)
        began = time.monotonic()
        out, err = holder.communicate(timeout=WAIT_S)  # the end of its output: the command's child has gone, too
        assert time.monotonic() - began < 20
        assert (holder.returncode, out) == (1, "")
        assert "was lost while" in err


def test_with_warn_the_command_goes_on_after_a_lost_lease(cluster: Cluster, name: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    command = ("lock", name, "--ttl", "2", "--on-lost", "warn", "--", "sh", "-c", f"echo begun; cat {go}; exit 5")
    with started(cluster, *command) as holder:
        assert first_line(holder) == "begun"
        lose_the_lease(cluster, name, holder)
        assert holder.stderr is not None
        assert "was lost while" in holder.stderr.readline()
        go.write_text("")
        assert holder.wait(WAIT_S) == 5
