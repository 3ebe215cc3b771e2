"""The launcher with real, tiny children: started again when they die, stopped in order, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kvstore.config import Limits, default_config
from kvstore.launcher import Child, Log, Supervisor, cluster_children, http_get, next_wait_s, up, url_of

LIMITS = Limits(stop_timeout_s=30.0, restart_wait_s_max=0.05)

# A child that says its pid, serves until SIGTERM or the end of its standard input, and says that it goes.
SERVE = """
import os, signal, sys
def go(*_):
    print("going", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, go)
print("pid", os.getpid(), flush=True)
sys.stdin.read()
go()
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def child(name: str, script: str = SERVE) -> Child:
    role, _, child_id = name.partition("-")
    return Child(role, child_id, (sys.executable, "-S", "-c", script))


class Lines(Log):
    """A log that tests read line by line."""

    def __init__(self) -> None:
        self.written: asyncio.Queue[str] = asyncio.Queue()

    def write(self, source: str, line: str) -> None:
        self.written.put_nowait(f"[{source}] {line}")

    async def until(self, wanted: str) -> str:
        """The next line that holds `wanted`; lines before it are passed over."""
        async with asyncio.timeout(60):
            while wanted not in (line := await self.written.get()):
                pass
            return line

    async def pid(self, name: str) -> int:
        return int((await self.until(f"[{name}] pid")).rpartition(" ")[2])


@pytest.fixture
def lines() -> Lines:
    return Lines()


Make = Callable[..., Supervisor]


@pytest.fixture
async def make(lines: Lines) -> AsyncIterator[Make]:
    made: list[Supervisor] = []

    def supervisor(limits: Limits = LIMITS, *, restart: bool = True) -> Supervisor:
        made.append(Supervisor(limits, restart=restart, log=lines))
        return made[-1]

    yield supervisor
    for one in made:
        one.kill()
        await one.stop()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_a_child_that_lived_is_started_again_at_once_and_one_that_did_not_waits_longer_each_time() -> None:
    waits = [next_wait_s(0.2, 0.0, 2.0)]
    for _ in range(6):
        waits.append(next_wait_s(0.2, waits[-1], 2.0))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert next_wait_s(1.0, 2.0, 2.0) == 0.0


def test_every_process_of_the_file_becomes_a_child() -> None:
    children = cluster_children(default_config(), Path("/etc/cluster.yaml"))
    assert [one.name for one in children] == [
        "controller-0", "shard-s1", "shard-s2", "shard-s3", "shard-s4", "router-0",
    ]  # fmt: skip
    by_name = {one.name: one.argv for one in children}
    start = (sys.executable, "-m", "kvstore")
    join, config = ("--join", "http://127.0.0.1:8090"), ("--config", "/etc/cluster.yaml", "--supervised")
    data = ("--data-dir", default_config().data_dir)
    assert by_name["controller-0"] == (*start, "controller", "serve", "0", "--listen", "127.0.0.1:8090", *data, *config)
    assert by_name["shard-s1"] == (*start, "shard", "serve", "s1", "--listen", "127.0.0.1:9101", *join, *data, *config)
    assert by_name["router-0"] == (*start, "router", "serve", "0", "--listen", "127.0.0.1:8080", *join, *config)


def test_an_address_that_means_all_is_reached_at_loopback() -> None:
    assert url_of("0.0.0.0:80") == "http://127.0.0.1:80"
    assert url_of("[::]:80") == "http://[::1]:80"
    assert url_of("kv.example:80") == "http://kv.example:80"


# --- keeping children running ----------------------------------------------------------------------------------------


async def test_what_a_child_prints_is_forwarded_with_its_name(make: Make, lines: Lines) -> None:
    make().add(child("shard-s1", "import sys; print('out'); sys.stdout.flush(); print('ä', file=sys.stderr, end='')"))
    assert await lines.until("out") == "[shard-s1] out"
    assert await lines.until("ä") == "[shard-s1] ä"


async def test_a_line_without_end_is_cut(make: Make, lines: Lines) -> None:
    make().add(child("shard-s1", "print('x' * 1_000_000)"))
    line = await lines.until("xxx")
    assert 64 * 1024 <= len(line) < 200_000


async def test_a_killed_child_is_started_again(make: Make, lines: Lines) -> None:
    make().add(child("shard-s1"))
    first = await lines.pid("shard-s1")
    os.kill(first, signal.SIGKILL)
    assert f"shard-s1 (pid {first}) ended by SIGKILL: starting it again" in await lines.until("[up]")
    assert await lines.pid("shard-s1") != first


async def test_a_child_that_refuses_to_start_is_tried_for_ever_and_its_message_is_seen(
    make: Make, lines: Lines
) -> None:
    make().add(child("shard-s1", "import sys; print('foreign data'); sys.exit(2)"))
    for _ in range(4):
        assert await lines.until("foreign data") == "[shard-s1] foreign data"
        assert "ended with exit code 2: starting it again" in await lines.until("[up]")


async def test_a_program_that_cannot_be_started_is_tried_for_ever(make: Make, lines: Lines) -> None:
    make().add(Child("shard", "s1", ("/nonexistent/program",)))
    for _ in range(2):
        assert "could not be started" in await lines.until("[up]")


async def test_without_restart_the_first_death_asks_everything_to_stop(make: Make, lines: Lines) -> None:
    supervisor = make(restart=False)
    supervisor.add(child("shard-s1"))
    os.kill(await lines.pid("shard-s1"), signal.SIGKILL)
    async with asyncio.timeout(60):
        await supervisor.stop_asked.wait()
    assert supervisor.gave_up


async def test_all_children_stop_in_order_of_their_roles(make: Make, lines: Lines) -> None:
    supervisor = make()
    names = ["controller-0", "shard-s1", "shard-s2", "router-0", "other-x"]
    for name in names:
        supervisor.add(child(name))
        await lines.pid(name)
    await supervisor.stop()
    said = [lines.written.get_nowait() for _ in names]
    assert [said[0], *sorted(said[1:3]), *said[3:]] == [
        "[router-0] going", "[shard-s1] going", "[shard-s2] going", "[controller-0] going", "[other-x] going",
    ]  # fmt: skip
    assert lines.written.empty()


async def test_a_child_that_does_not_stop_is_killed_and_the_others_still_stop_in_order(
    make: Make, lines: Lines
) -> None:
    supervisor = make(Limits(stop_timeout_s=2.0))
    supervisor.add(child("router-0", DEAF))
    await lines.until("deaf")
    supervisor.add(child("shard-s1"))
    await lines.pid("shard-s1")
    await supervisor.stop()
    assert await lines.until("going") == "[shard-s1] going"


async def test_stopping_right_after_starting_leaves_nothing_running(make: Make, lines: Lines) -> None:
    supervisor = make()
    for i in range(3):
        supervisor.add(child(f"shard-s{i}"))
    await supervisor.stop()
    while not lines.written.empty():
        line = lines.written.get_nowait()
        assert "starting it again" not in line
        assert "pid" not in line or not is_running(int(line.rpartition(" ")[2]))


async def test_children_can_be_added_and_removed_while_others_run(make: Make, lines: Lines) -> None:
    supervisor = make()
    supervisor.add(child("shard-s1"))
    stays = await lines.pid("shard-s1")
    supervisor.add(child("shard-s2"))
    goes = await lines.pid("shard-s2")
    with pytest.raises(ValueError, match="runs already"):
        supervisor.add(child("shard-s2"))
    await supervisor.remove("shard-s2")
    assert await lines.until("going") == "[shard-s2] going"
    assert not is_running(goes)
    assert is_running(stays)
    supervisor.add(child("shard-s2"))
    await lines.pid("shard-s2")
    with pytest.raises(KeyError):
        await supervisor.remove("shard-s9")
    await supervisor.stop()
    with pytest.raises(ValueError, match="too late"):
        supervisor.add(child("shard-s3"))


async def test_removing_a_child_that_does_not_stop_kills_it(make: Make, lines: Lines) -> None:
    supervisor = make(Limits(stop_timeout_s=0.2))
    supervisor.add(child("shard-s1", DEAF))
    await lines.until("deaf")
    await supervisor.remove("shard-s1")
    supervisor.add(child("shard-s1"))


# --- the log ---------------------------------------------------------------------------------------------------------


def read_all(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 65_536):
        chunks.append(chunk)
    return b"".join(chunks)


async def test_a_log_that_nobody_reads_stops_nobody_and_tells_what_it_dropped() -> None:
    reading, writing = os.pipe()
    log = Log(writing)
    for i in range(20_000):
        log.write("shard-s1", f"line {i} " + "x" * 50)
    received = asyncio.create_task(asyncio.to_thread(read_all, reading))
    await until(log._lines.empty)
    log.write("shard-s1", "after")
    await asyncio.to_thread(log.close)
    os.close(writing)
    lines = (await received).decode().splitlines()
    os.close(reading)
    assert lines[0].startswith("[shard-s1] line 0 ")
    assert lines[-1] == "[shard-s1] after"
    told = [line for line in lines if line.endswith("lines were dropped: nobody read standard error")]
    assert told, "a gap is never silent"
    written = len(lines) - len(told) - 1
    assert written + sum(int(line.split()[1]) for line in told) == 20_000


async def test_a_log_whose_reader_is_gone_stops_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = Log(writing)
    for _ in range(20_000):
        log.write("up", "hello")
    await asyncio.to_thread(log.close)
    os.close(writing)


# --- up, in a process of its own -------------------------------------------------------------------------------------

READY = """
import http.server, os, signal, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    calls = 0
    def do_GET(self):
        Handler.calls += 1
        body = b"{\\"detail\\": \\"no map\\"}"
        self.send_response(200 if self.path == "/readyz" and Handler.calls > 2 else 503)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

UP = """
import asyncio, sys
from pathlib import Path
from kvstore import launcher

def children(config, path):
    port = config.routers[0].listen.rpartition(":")[2]
    return [
        launcher.Child("router", "0", (sys.executable, "-c", sys.argv[2], port)),
        launcher.Child("shard", "s1", (sys.executable, "-S", "-c", sys.argv[3])),
    ]

launcher.cluster_children = children
restart = sys.argv[4] == "restart"
print_line = lambda line: print(line, flush=True)
sys.exit(asyncio.run(launcher.up(Path(sys.argv[1]), restart=restart, announce=print_line)))
"""


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.fixture
def cluster_yaml(tmp_path: Path) -> Path:
    router, controller, shard = free_ports(3)
    path = tmp_path / "cluster.yaml"
    path.write_text(
        f'routers: [{{id: "0", listen: 127.0.0.1:{router}}}]\n'
        f'controllers: [{{id: "0", listen: 127.0.0.1:{controller}}}]\n'
        f"shards: [{{id: s1, listen: 127.0.0.1:{shard}}}]\n"
    )
    return path


def router_port(cluster_yaml: Path) -> int:
    return int(cluster_yaml.read_text().splitlines()[0].rpartition(":")[2].rstrip("}]"))


class Running:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.out, self.err = process, process.stdout, process.stderr

    async def until(self, wanted: str) -> str:
        async with asyncio.timeout(60):
            while line := (await self.err.readline()).decode():
                if wanted in line:
                    return line.strip()
        raise AssertionError(f"ended without {wanted!r}")

    async def end(self) -> tuple[int, str]:
        async with asyncio.timeout(60):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, (out + err).decode()


Launch = Callable[..., "asyncio.Future[Running]"]


@pytest.fixture
async def launch(cluster_yaml: Path) -> AsyncIterator[Callable[..., object]]:
    launched: list[Running] = []

    async def start(*, shard: str = SERVE, restart: bool = True) -> Running:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", UP, str(cluster_yaml), READY, shard, "restart" if restart else "no"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        launched.append(Running(process))
        return launched[-1]

    yield start
    for running in launched:
        if running.process.returncode is None:
            running.process.kill()
            await running.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_up_says_ready_once_and_stops_on_a_signal(
    launch: Launch, cluster_yaml: Path, number: signal.Signals
) -> None:
    running = await launch()
    pid = int((await running.until("[shard-s1] pid")).rpartition(" ")[2])
    async with asyncio.timeout(60):
        assert await running.out.readline() == f"ready: http://127.0.0.1:{router_port(cluster_yaml)}\n".encode()
    running.process.send_signal(number)
    code, rest = await running.end()
    assert (code, "[shard-s1] going" in rest, "ready" in rest) == (0, True, False)
    assert not is_running(pid)
    assert not (cluster_yaml.parent / "data").exists()


async def test_up_without_restart_ends_with_1_when_a_child_dies(launch: Launch) -> None:
    running = await launch(restart=False)
    os.kill(int((await running.until("[shard-s1] pid")).rpartition(" ")[2]), signal.SIGKILL)
    assert (await running.end())[0] == 1


async def test_children_end_when_up_is_killed(launch: Launch) -> None:
    running = await launch()
    pid = int((await running.until("[shard-s1] pid")).rpartition(" ")[2])
    running.process.kill()
    await running.end()  # returns at the end of its output, which the children share: so they have ended
    await until(lambda: not is_running(pid))


async def test_a_second_signal_kills_what_does_not_stop(launch: Launch) -> None:
    running = await launch(shard=DEAF)
    await running.until("deaf")
    running.process.send_signal(signal.SIGINT)
    await running.until("stopping")
    running.process.send_signal(signal.SIGINT)
    assert (await running.end())[0] == 0


async def test_a_port_in_use_ends_up_with_2_and_names_the_holder(launch: Launch, cluster_yaml: Path) -> None:
    port = router_port(cluster_yaml)
    with socket.create_server(("127.0.0.1", port)):
        code, text = await (await launch()).end()
    assert code == 2
    assert f"port {port} is in use by pid {os.getpid()} (" in text
    assert "[shard-s1]" not in text


async def test_the_ports_of_children_that_are_just_ending_are_waited_for(launch: Launch, cluster_yaml: Path) -> None:
    run_dir = cluster_yaml.parent / "data" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "router-0.pid").write_text(f"{os.getpid()}\n")
    with socket.create_server(("127.0.0.1", router_port(cluster_yaml))):
        running = await launch()
        await asyncio.sleep(0.5)
    assert await running.until("[shard-s1] pid")


async def test_a_wrong_file_ends_up_with_2_and_the_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("routers: 1\n")
    assert await up(path, restart=True, announce=print) == 2
    assert capfd.readouterr() == ("", f"kvstore up: {path}:1: routers must be a list; begin each entry with `- `\n")


async def test_http_get_says_why_there_is_no_answer() -> None:
    (port,) = free_ports(1)
    status, reason = await http_get("127.0.0.1", port, "/readyz")
    assert status == 0
    assert reason
