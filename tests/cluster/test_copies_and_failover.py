"""Copies in real processes: a killed node that stays dead is replaced, and no acknowledged write is lost.

The processes are started here one by one, so that none of them is started again by itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from kvstore.client import Client
from kvstore.errors import KvError
from tests.cluster.clusters import REPOSITORY, write_config

WAIT_S = 60.0
SHARDS = ("s1", "s2", "s3")


class Nodes:
    """A controller, a router and three nodes. `programs`: what Python runs in place of `-m kvstore`, by node."""

    def __init__(
        self,
        folder: Path,
        at_the_end: ExitStack,
        programs: Mapping[str, Sequence[str]] = MappingProxyType({}),
        *,
        replicas: int = 2,
        **limits: float,
    ) -> None:
        self._programs = programs
        self.config = write_config(folder, shards=3, partitions=64, replicas=replicas, limits=limits)
        self.folder = folder
        self._at_the_end = at_the_end
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        told = yaml.safe_load(self.config.read_text())
        self.url = f"http://{told['routers'][0]['listen']}"
        self._controller = told["controllers"][0]["listen"]
        self._listen = {shard["id"]: shard["listen"] for shard in told["shards"]}
        self._router = told["routers"][0]["listen"]
        self._start("controller", "0", self._controller, "--data-dir", str(folder / "controller"))
        for shard in SHARDS:
            self.start(shard)
        self._start("router", "0", self._router, "--join", f"http://{self._controller}")

    def _start(self, kind: str, name: str, listen: str, *options: str) -> None:
        program = self._programs.get(name, ("-m", "kvstore"))
        command = [sys.executable, *program, kind, "serve", name, "--listen", listen]
        with (self.folder / f"{kind}-{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--config", str(self.config), *options], stdout=log, stderr=log, cwd=REPOSITORY
            )
        self._processes[name if kind == "shard" else kind] = process
        self._at_the_end.callback(_end, process)

    def start(self, node: str) -> None:
        data = ("--data-dir", str(self.folder / node), "--join", f"http://{self._controller}")
        self._start("shard", node, self._listen[node], *data)

    def kill(self, node: str) -> None:
        self._processes[node].kill()
        self._processes[node].wait()

    def wait(self, node: str) -> int:
        """Its exit code, once it has ended by itself."""
        return self._processes[node].wait(WAIT_S)

    def document(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/v1/cluster", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def changes(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/v1/changes", timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["items"]
        return found

    def primaries(self) -> dict[str, str]:
        return {shard["id"]: shard["primary"] for shard in self.document()["shards"]}

    def are_in_sync(self, copies: int = 1) -> bool:
        """Every shard has so many copies, and all are in sync."""
        return all(
            [copy["state"] for copy in shard["copies"]] == ["in-sync"] * copies for shard in self.document()["shards"]
        )

    def until(self, condition: Any) -> None:
        """Wait for it. A router that is not there yet is asked again."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            try:
                if condition():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"it did not come about: {self.document()}")

    def key_of(self, shard: str) -> str:
        """A key that the shard owns."""
        for number in range(1000):
            with urllib.request.urlopen(f"{self.url}/v1/explain/k{number}", timeout=30) as answer:
                if json.load(answer)["owner"] == shard:
                    return f"k{number}"
        raise AssertionError(f"no key belongs to {shard}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as at_the_end:
        found = Nodes(tmp_path, at_the_end)
        found.until(found.are_in_sync)
        yield found


class Writer:
    """Writes 1, 2, 3, … to one key, without a retry of its own; what was acknowledged stays readable."""

    def __init__(self, url: str, key: str) -> None:
        self._kv = Client(url, retries=0, timeout_s=30)
        self._key = key
        self.tried = self.acknowledged = 0
        self.errors: list[KvError] = []

    async def run(self, stop: asyncio.Event) -> None:
        async with self._kv as kv:
            while not stop.is_set():
                self.tried += 1
                try:
                    await kv.put(self._key, b"%d" % self.tried)
                    self.acknowledged = self.tried
                except KvError as error:
                    self.errors.append(error)
                read = int((await kv.get(self._key)).value) if self.acknowledged else 0
                assert self.acknowledged <= read <= self.tried


async def _until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.05)


async def test_a_killed_primary_that_stays_dead_is_replaced_and_nothing_acknowledged_is_lost(nodes: Nodes) -> None:
    writers = [Writer(nodes.url, await asyncio.to_thread(nodes.key_of, shard)) for shard in SHARDS]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for writer in writers:
            tasks.create_task(writer.run(stop))
        await _until(lambda: all(writer.acknowledged > 20 for writer in writers))
        nodes.kill("s1")
        then = [writer.acknowledged for writer in writers]
        await _until(lambda: all(w.acknowledged > before + 20 for w, before in zip(writers, then, strict=True)))
        assert (await asyncio.to_thread(nodes.primaries))["s1"] != "s1"
        nodes.start("s1")
        await asyncio.to_thread(nodes.until, nodes.are_in_sync)
        stop.set()
    assert all(error.code == "outcome-unknown" for writer in writers for error in writer.errors)
    assert sum(len(writer.errors) for writer in writers) <= len(writers)


def test_a_primary_goes_where_a_person_wants_it_and_back(nodes: Nodes) -> None:
    (copy,) = next(shard["copies"] for shard in nodes.document()["shards"] if shard["id"] == "s1")
    for to in (copy["node"], "s1"):
        done = _kvstore(nodes, "shard", "promote", "s1", "--to", to)
        assert f"s1 is served by node {to}" in done
        assert nodes.primaries()["s1"] == to
        nodes.until(nodes.are_in_sync)


def test_the_disaster_exit_goes_on_with_an_older_copy_and_the_node_that_returns_follows_it(nodes: Nodes) -> None:
    (copy,) = next(shard["copies"] for shard in nodes.document()["shards"] if shard["id"] == "s1")
    key, to = nodes.key_of("s1"), copy["node"]
    _kvstore(nodes, "put", key, "early")
    nodes.kill(to)
    nodes.until(lambda: nodes.document()["under_replicated"])
    _kvstore(nodes, "put", key, "late")
    late = int(_kvstore(nodes, "put", key, "later", "--json").split('"version":')[1].rstrip("}\n "))
    nodes.kill("s1")
    nodes.start(to)
    promote = ("shard", "promote", "s1", "--to", to)
    nodes.until(lambda: "--accept-loss" in nodes.document()["advice"])
    assert "in sync: none" in _refused(nodes, *promote)
    said = _refused(nodes, *promote, "--accept-loss", answers="s2\n" if to != "s2" else "s3\n")
    assert "ends with record" in said
    assert "nothing was changed" in said
    _kvstore(nodes, *promote, "--accept-loss", "--confirm", "s1")
    assert _kvstore(nodes, "get", key) == "early"
    nodes.start("s1")
    nodes.until(nodes.are_in_sync)
    nodes.until(lambda: nodes.primaries()["s1"] == "s1")
    assert _kvstore(nodes, "get", key) == "early"
    assert int(_kvstore(nodes, "put", key, "new", "--json").split('"version":')[1].rstrip("}\n ")) > late + 2**31


def test_the_keys_of_a_node_that_is_given_up_move_to_the_others_and_it_is_refused_when_it_returns(
    tmp_path: Path,
) -> None:
    with ExitStack() as at_the_end:
        nodes = Nodes(tmp_path, at_the_end, down_out_s=3.0)
        nodes.until(nodes.are_in_sync)
        keys = {nodes.key_of(shard): shard for shard in SHARDS}
        for key, shard in keys.items():
            _kvstore(nodes, "put", key, f"of {shard}")
        nodes.kill("s1")
        nodes.until(lambda: set(nodes.primaries()) == {"s2", "s3"} and nodes.are_in_sync())
        nodes.until(lambda: [node["id"] for node in nodes.document()["nodes"]] == ["s2", "s3"])
        for key, shard in keys.items():
            assert _kvstore(nodes, "get", key) == f"of {shard}"
        assert nodes.document()["advice"].startswith("All is well")
        nodes.start("s1")
        assert nodes.wait("s1") == 78
        assert "given up because its node was silent for too long" in (tmp_path / "shard-s1.log").read_text()


def test_copies_are_made_and_dropped_while_the_cluster_runs(tmp_path: Path) -> None:
    with ExitStack() as at_the_end:
        nodes = Nodes(tmp_path, at_the_end, replicas=1)
        nodes.until(lambda: nodes.are_in_sync(0))
        for replicas in (2, 1):
            assert f"{replicas} cop" in _kvstore(nodes, "cluster", "replicas", str(replicas))
            nodes.until(lambda: nodes.are_in_sync(replicas - 1))  # noqa: B023 (called here)


def _refused(nodes: Nodes, *arguments: str, answers: str = "") -> str:
    command = [sys.executable, "-m", "kvstore", *arguments, "--url", nodes.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=REPOSITORY, input=answers)
    assert done.returncode in (1, 2), done.stdout
    return done.stderr


def _kvstore(nodes: Nodes, *arguments: str) -> str:
    command = [sys.executable, "-m", "kvstore", *arguments, "--url", nodes.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_damaged_node_is_rebuilt_from_the_others_and_every_key_is_there(nodes: Nodes) -> None:
    """The id of its home's copy and the log of the copy that it has of another shard are not what they were."""
    keys = [f"kept/{number}" for number in range(60)]
    asyncio.run(_put_all(nodes.url, keys))
    nodes.kill("s1")
    folder = nodes.folder / "s1"
    (copy,) = folder.glob("shard-s?.copy-s1.db")
    _flip(folder / "shard-s1.id", 30)
    _flip(min(folder.glob(f"{copy.stem}.log.0*")), 4096 + 100)
    nodes.start("s1")
    nodes.until(lambda: len([*folder.glob("*.db.damaged")]) == 2)
    nodes.until(nodes.are_in_sync)
    asyncio.run(_check_all(nodes.url, keys))
    damaged = {"s1", copy.name.removeprefix("shard-").split(".")[0]}
    nodes.until(lambda: {each["shard"] for each in nodes.changes() if each["kind"] == "rebuild"} == damaged)


def test_a_snapshot_that_a_killed_process_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """First the copy's process is killed, then the primary's; in the end the copy takes over."""
    with ExitStack() as at_the_end:
        nodes = Nodes(tmp_path, at_the_end, snapshot_share=0.05)
        nodes.until(nodes.are_in_sync)
        (copy,) = next(shard["copies"] for shard in nodes.document()["shards"] if shard["id"] == "s1")
        keys = [f"large/{number}" for number in range(900)]
        asyncio.run(_put_all(nodes.url, keys, LARGE))
        nodes.kill(copy["node"])
        _flip(tmp_path / copy["node"] / f"shard-s1.copy-{copy['node']}.id", 30)  # so the copy is rebuilt
        nodes.start(copy["node"])
        done: list[int] = []
        for killed in (copy["node"], "s1"):
            nodes.until(lambda: _rows_done(nodes) > max([60, *done]))
            done.append(_rows_done(nodes))
            nodes.kill(killed)
            nodes.start(killed)
            nodes.until(lambda: len(_went_on(tmp_path)) == len(done))
        assert all(rows >= before - ROWS_OF_A_PAGE for rows, before in zip(_went_on(tmp_path), done, strict=True))
        nodes.until(nodes.are_in_sync)
        nodes.kill("s1")
        asyncio.run(_check_all(nodes.url, keys, LARGE))


LARGE = b"x" * 40_000
ROWS_OF_A_PAGE = (1 << 20) // len(LARGE) + 1


def _rows_done(nodes: Nodes) -> int:
    """Of the snapshot for the copy of s1, as far as is told."""
    return sum(
        copy.get("rows_done", 0)
        for shard in nodes.document()["shards"]
        if shard["id"] == "s1"
        for copy in shard["copies"]
    )


def _went_on(folder: Path) -> list[int]:
    """With how many rows each snapshot for the copy of s1 went on, as its primary says."""
    return [int(rows) for rows in re.findall(r"goes on: (\d+) of", (folder / "shard-s1.log").read_text())]


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x41]))


async def _put_all(url: str, keys: list[str], value: bytes = b"") -> None:
    async with Client(url) as kv:
        for key in keys:
            await kv.put(key, value or key.encode())


async def _check_all(url: str, keys: list[str], value: bytes = b"") -> None:
    async with Client(url) as kv:
        for key in keys:
            assert (await kv.get(key)).value == (value or key.encode())
