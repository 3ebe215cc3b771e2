"""What tests do to a cluster of real processes: ask it, wait for it, stop, kill and restart its processes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec
import pytest

from tests.cluster.clusters import REPOSITORY, Cluster

WAIT_S = 40.0
_POLL_S = 0.03


class Reply(NamedTuple):
    """A whole answer; names in `headers` are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


# --- asking ----------------------------------------------------------------------------------------------------------


def ask(url: str, method: str, path: str, body: bytes | None = None, timeout_s: float = WAIT_S) -> Reply:
    """One request on a connection of its own, sent once. Raises OSError and http.client.HTTPException."""
    address = urlsplit(url)
    assert address.hostname is not None
    with closing(HTTPConnection(address.hostname, address.port, timeout=timeout_s)) as connection:
        connection.request(method, path, body)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, response.read())


def put(cluster: Cluster, key: str, value: bytes) -> Reply:
    return ask(cluster.url, "PUT", f"/v1/kv/{quote(key)}", value)


def get(cluster: Cluster, key: str) -> Reply:
    return ask(cluster.url, "GET", f"/v1/kv/{quote(key)}")


def delete(cluster: Cluster, key: str) -> Reply:
    return ask(cluster.url, "DELETE", f"/v1/kv/{quote(key)}")


def facts(cluster: Cluster) -> Any:
    """GET /v1/cluster."""
    return ask(cluster.url, "GET", "/v1/cluster").json


def keys_of(cluster: Cluster, shard_id: str, count: int, prefix: str = "k") -> list[str]:
    """Keys that this shard owns."""
    names = (f"{prefix}{number}" for number in itertools.count())
    owned = (name for name in names if ask(cluster.url, "GET", f"/v1/explain/{name}").json["owner"] == shard_id)
    return list(itertools.islice(owned, count))


def answers(cluster: Cluster, key: str) -> bool:
    """Whether the shard of the key answers reads."""
    return get(cluster, key).status in (200, 404)


def assert_unavailable(reply: Reply) -> None:
    """A 503 that says when to try again."""
    assert (reply.status, reply.json["code"]) == (503, "unavailable"), reply
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json["retry_after_ms"] > 0


# --- waiting ---------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """The first true result of `condition`. Fails when there was none in that time."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(_POLL_S)


def process_state(pid: int) -> str:
    """As in /proc/PID/stat: R, S, D run; T stands still; Z is a corpse; X when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_running(pid: int) -> bool:
    return process_state(pid) not in "ZX"


def wait_gone(pids: Sequence[int], timeout_s: float = WAIT_S) -> None:
    wait_until(lambda: not any(map(is_running, pids)), f"{pids} have ended", timeout_s)


def pids(cluster: Cluster) -> dict[str, int]:
    """All running processes but `up`, by name, as the pid files say."""
    found = {path.stem: int(path.read_text()) for path in (cluster.data_dir / "run").glob("*.pid")}
    return {name: pid for name, pid in found.items() if is_running(pid)}


# --- stopping and killing --------------------------------------------------------------------------------------------


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still (SIGSTOP) until the block ends."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(pid) == "T", f"{pid} stands still")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def children(cluster: Cluster, name: str) -> list[int]:
    """The pids of the children of `up` that are that process, also one that has no pid file yet."""
    role, _, process_id = name.partition("-")
    wanted = f"\0{role}\0serve\0{process_id}\0".encode()
    found = Path(f"/proc/{cluster.up.pid}/task/{cluster.up.pid}/children").read_text().split()
    return [int(pid) for pid in found if wanted in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def down(cluster: Cluster, name: str) -> Iterator[None]:
    """The process is dead (SIGKILL) until the block ends: `up` stands still during it, so it cannot start it again."""
    with stopped(cluster.up.pid):
        victims = children(cluster, name)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        wait_gone(victims)
        yield


def wait_running(cluster: Cluster, *names: str) -> None:
    """Until each of these processes runs and has its pid file."""
    wait_until(lambda: set(names) <= pids(cluster).keys(), f"{names} run")


def kill_and_wait(cluster: Cluster, name: str) -> None:
    """SIGKILL, and wait until a new process has taken its place."""
    pid = cluster.pid(name)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pids(cluster).get(name, pid) != pid, f"{name} runs again")


def kill_everything(cluster: Cluster) -> None:
    """SIGKILL to `up` and all its processes, as at once as it goes."""
    victims = [cluster.up.pid, *pids(cluster).values()]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    cluster.up.wait()
    wait_gone(victims)


# --- commands --------------------------------------------------------------------------------------------------------


def kvstore(*arguments: str, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
    """Run `python -m kvstore` with these arguments to its end."""
    command = [sys.executable, "-m", "kvstore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY, check=False)


# --- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of its own, in memory. Skips the test where mounting is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def take_all_room(file: Path) -> None:
    with file.open("wb", buffering=0) as hog, suppress(OSError):
        while hog.write(b"\0" * 4096):
            pass
    assert shutil.disk_usage(file.parent).free == 0
