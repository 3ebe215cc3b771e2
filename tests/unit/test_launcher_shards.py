"""The launcher follows a controller: shards come, go and come back, their files with them, whatever is in the way."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore import launcher
from kvstore.addresses import listen_address
from kvstore.config import ClusterConfig, ControllerConfig, Limits, RouterConfig, ShardConfig
from kvstore.launcher import ShardReconciler
from kvstore.roster import DesiredShards, Placed, Wanted
from kvstore.supervisor import Child, Supervisor
from tests.unit.test_supervisor import Lines, is_running, until

# A shard as far as the launcher can see: its file, its pid file with a lock, its end on SIGTERM or end of input.
SHARD = """
import fcntl, os, pathlib, signal, sys
shard_id, listen, data_dir = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
pid_file = data_dir / "run" / f"shard-{shard_id}.pid"
pid_file.parent.mkdir(exist_ok=True)
held = pid_file.open("a")
fcntl.flock(held, fcntl.LOCK_EX)
with (data_dir / f"shard-{shard_id}.db").open("a") as file:
    file.write("opened;")
def go(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes beside the end of input: once is enough
    pid_file.unlink()
    print("going", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, go)
print("pid", os.getpid(), "at", listen, flush=True)
sys.stdin.read()
go()
"""


class Controller:
    """Answers GET /v1/launch as the controller does."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self._told = DesiredShards(0, False, [], [])
        self._news = asyncio.Event()

    def tell(self, members: str, wanted: str = "", **urls: str) -> None:
        placed = [Placed(each, urls.get(each, "http://127.0.0.1:1")) for each in members.split()]
        self._told = DesiredShards(self._told.revision + 1, True, [Wanted(each) for each in wanted.split()], placed)
        self._news.set()
        self._news = asyncio.Event()

    async def launch(self, request: web.Request) -> web.Response:
        self.running = sorted(filter(None, request.query["running"].split(",")))
        if self._told.revision <= int(request.query["after"]):
            try:
                await asyncio.wait_for(self._news.wait(), 0.5)
            except TimeoutError:
                return web.Response(status=204)
        return web.Response(body=msgspec.json.encode(self._told), content_type="application/json")

    async def until_running(self, *ids: str) -> None:
        await until(lambda: self.running == sorted(ids))


class PidLines(Lines):
    async def pid_of(self, shard_id: str) -> int:
        return int((await self.until(f"[shard-{shard_id}] pid")).split()[2])


class Host:
    """A host with shards s1 and s2 of cluster.yaml, and a launcher that may begin again."""

    def __init__(self, folder: Path, config: ClusterConfig) -> None:
        self.folder, self.config = folder, config
        self._first_port = listen_address(config.shards[0].listen)[1]
        self.lines = PidLines()
        self.supervisor = Supervisor(config.limits, restart=True, log=self.lines)
        self.task: asyncio.Task[None] | None = None

    async def begin(self, *first: str) -> None:
        self.supervisor = Supervisor(self.config.limits, restart=True, log=self.lines)
        for shard in self.config.shards:
            if shard.id in first:
                self.supervisor.add(child(self.config, Path(), shard.id, shard.listen))
                await self.lines.pid_of(shard.id)
        self.task = asyncio.create_task(ShardReconciler(self.config, Path(), self.supervisor, self.lines).follow())

    async def end(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.supervisor.stop()

    def port(self, number: int) -> int:
        """1 and 2 are those of s1 and s2; 3 and 4 are the next that are free."""
        return self._first_port + number - 1

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.folder.glob("shard-*")}


def free_ports_in_a_row(count: int) -> int:
    """The first of so many, below those that the kernel gives to outgoing connections."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for first in random.sample(range(max(1024, lowest - 20_000), lowest - count), k=1000):
        try:
            with ExitStack() as held:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        return first
    raise AssertionError(f"no {count} ports in a row are free")


def child(config: ClusterConfig, _: Path, shard_id: str, listen: str) -> Child:
    return Child("shard", shard_id, (sys.executable, "-S", "-c", SHARD, shard_id, listen, config.data_dir))


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
async def host(controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    application = web.Application()
    application.router.add_get("/v1/launch", controller.launch)
    monkeypatch.setattr(launcher, "shard_child", child)
    async with TestServer(application) as server:
        port = server.port
        assert port is not None
        first = free_ports_in_a_row(4)
        config = ClusterConfig(
            routers=[RouterConfig("0", "127.0.0.1:8080")],
            controllers=[ControllerConfig("0", f"127.0.0.1:{port}")],
            shards=[ShardConfig("s1", f"127.0.0.1:{first}"), ShardConfig("s2", f"127.0.0.1:{first + 1}")],
            data_dir=str(tmp_path),
            limits=Limits(stop_timeout_s=20.0, restart_wait_s_max=0.05, map_poll_s=0.5),
        )
        host = Host(tmp_path, config)
        yield host
        await host.end()


async def test_a_wanted_shard_is_started_at_the_next_free_port_and_started_again_when_it_dies(
    host: Host, controller: Controller
) -> None:
    controller.tell("s1 s2", "s5")
    with socket.create_server(("127.0.0.1", host.port(3))):
        await host.begin("s1", "s2")
        said = await host.lines.until("[shard-s5] pid")
        assert said.endswith(f"at 127.0.0.1:{host.port(4)}")
    await controller.until_running("s1", "s2", "s5")
    controller.tell("s1 s2 s5", s5=f"http://127.0.0.1:{host.port(4)}")
    os.kill(int(said.split()[2]), signal.SIGKILL)
    assert (await host.lines.until("[shard-s5] pid")).endswith(f"at 127.0.0.1:{host.port(4)}")


async def test_a_shard_whose_port_is_taken_while_it_is_down_comes_back_at_another(
    host: Host, controller: Controller
) -> None:
    controller.tell("s1 s2", "s5")
    await host.begin("s1", "s2")
    said = await host.lines.until("[shard-s5] pid")
    assert said.endswith(f"at 127.0.0.1:{host.port(3)}")
    with socket.create_server(("127.0.0.1", host.port(3))):
        os.kill(int(said.split()[2]), signal.SIGKILL)
        assert (await host.lines.until("[shard-s5] pid")).endswith(f"at 127.0.0.1:{host.port(4)}")


async def test_a_removed_shard_ends_its_file_is_set_aside_and_the_controller_hears_of_it(
    host: Host, controller: Controller
) -> None:
    controller.tell("s1 s2")
    await host.begin("s1", "s2")
    await controller.until_running("s1", "s2")
    controller.tell("s1")
    assert await host.lines.until("going") == "[shard-s2] going"
    await controller.until_running("s1")
    assert host.files() == {"shard-s1.db": "opened;", "shard-s2.db.removed": "opened;"}
    controller.tell("s1", "s2")  # there and back again
    assert (await host.lines.until("[shard-s2] pid")).endswith(f"at 127.0.0.1:{host.port(2)}")
    assert host.files()["shard-s2.db"] == "opened;"
    controller.tell("s1")  # it was not wanted for long
    await controller.until_running("s1", "s2")
    await controller.until_running("s1")
    assert host.files().keys() == {"shard-s1.db", "shard-s2.db.removed", "shard-s2.db.removed.1"}


async def test_after_a_restart_members_come_back_and_what_is_no_member_ends_but_keeps_its_file(
    host: Host, controller: Controller
) -> None:
    for name in ("shard-s2.db", "shard-s5.db", "shard-s8.db"):
        (host.folder / name).touch()
    controller.tell("s1 s5", s5=f"http://127.0.0.1:{host.port(3)}")
    await host.begin("s1", "s2")
    seen = {(await host.lines.until("[shard-")).partition(" pid")[0] for _ in range(2)}
    assert seen == {"[shard-s2] going", "[shard-s5]"}
    await controller.until_running("s1", "s5")
    assert host.files() == {
        "shard-s1.db": "opened;",
        "shard-s2.db": "opened;",
        "shard-s5.db": "opened;",
        "shard-s8.db": "",
    }


async def test_a_removal_that_a_crash_cut_short_is_finished_at_the_next_start(
    host: Host, controller: Controller
) -> None:
    (host.folder / "shard-s2.db").write_text("s2;")
    (host.folder / "shard-s2.db.removed").hardlink_to(host.folder / "shard-s2.db")
    controller.tell("s1", "s2")
    await host.begin("s1")
    await host.lines.until("[shard-s2] pid")
    assert host.files() == {"shard-s1.db": "opened;", "shard-s2.db": "opened;", "shard-s2.db.removed": "s2;"}


async def test_a_shard_that_another_process_runs_is_started_when_that_one_has_ended(
    host: Host, controller: Controller
) -> None:
    (host.folder / "shard-s5.db").touch()
    arguments = child(host.config, Path(), "s5", f"127.0.0.1:{host.port(3)}").argv
    other = await asyncio.create_subprocess_exec(*arguments, stdin=-1, stdout=-1)
    assert other.stdout is not None
    await other.stdout.readline()
    controller.tell("s1 s2 s5", s5=f"http://127.0.0.1:{host.port(3)}")
    await host.begin("s1", "s2")
    await controller.until_running("s1", "s2")
    await asyncio.sleep(0.6)
    assert controller.running == ["s1", "s2"]
    other.terminate()
    await other.wait()
    await controller.until_running("s1", "s2", "s5")


async def test_the_end_of_the_launcher_in_the_middle_of_a_removal_leaves_nothing_running_and_the_file_marked(
    host: Host, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.tell("s1 s2")
    await host.begin("s1")
    told = host.folder / "told-to-go"
    waits = f"import time\ndef go(*_):\n    while not os.path.exists({str(told)!r}): time.sleep(0.01)"
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[__name__], "SHARD", SHARD.replace("def go(*_):", waits))
        host.supervisor.add(child(host.config, Path(), "s2", f"127.0.0.1:{host.port(2)}"))
    pid = int((await host.lines.until("[shard-s2] pid")).split()[2])
    await controller.until_running("s1", "s2")
    controller.tell("s1")
    await host.lines.until("shard-s2 has left the cluster")
    ending = asyncio.create_task(host.end())
    assert await host.lines.until("going") == "[shard-s1] going"
    told.touch()
    assert await host.lines.until("going") == "[shard-s2] going"  # in order, not by SIGKILL
    await ending
    assert not is_running(pid)
    assert host.files().keys() == {"shard-s1.db", "shard-s2.db", "shard-s2.db.removed"}
    await host.begin("s1")
    await controller.until_running("s1")
    assert host.files().keys() == {"shard-s1.db", "shard-s2.db.removed"}
