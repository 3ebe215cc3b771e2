"""The launcher: its children, and `up` in a process of its own with tiny children."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kvstore import launcher
from kvstore.addresses import is_loopback
from kvstore.config import CONFIG_VARIABLE, Limits, RouterConfig, decode_config, default_config
from kvstore.demo import DOOR_VARIABLE, DemoDoor, check_demo, with_demo
from kvstore.errors import ConfigError
from kvstore.launcher import cluster_children, router_child, shard_child, up, url_of
from kvstore.readiness import http_get
from loadtest.cluster.processes import free_ports
from tests.unit.test_supervisor import DEAF, SERVE, is_running, until

CERTIFICATES = "from aiohttp.connector import _SSL_CONTEXT_VERIFIED as tls; print(tls.cert_store_stats()['x509'])"

# --- rules -----------------------------------------------------------------------------------------------------------


def test_a_node_begins_without_loading_certificates_that_it_never_needs() -> None:
    child = shard_child(default_config(), Path("/etc/cluster.yaml"), "s1", "127.0.0.1:9101")
    environment = {**os.environ, **child.environment}
    done = subprocess.run([sys.executable, "-c", CERTIFICATES], capture_output=True, text=True, env=environment)
    assert done.stdout == "0\n"


def test_every_process_of_the_file_becomes_a_child() -> None:
    children = cluster_children(default_config(), Path("/etc/cluster.yaml"))
    assert [one.name for one in children] == [
        "controller-0", "shard-s1", "shard-s2", "shard-s3", "shard-s4", "router-0",
    ]  # fmt: skip
    by_name = {one.name: one.argv for one in children}
    start = (sys.executable, "-P", "-m", "kvstore")
    join, config = ("--join", "http://127.0.0.1:8090"), ("--config", "/etc/cluster.yaml", "--supervised")
    data = ("--data-dir", default_config().data_dir)
    assert by_name["controller-0"] == (*start, "controller", "serve", "0", "--listen", "127.0.0.1:8090", *data, *config)
    assert by_name["shard-s1"] == (*start, "shard", "serve", "s1", "--listen", "127.0.0.1:9101", *join, *data, *config)
    assert by_name["router-0"] == (*start, "router", "serve", "0", "--listen", "127.0.0.1:8080", *join, *config)


def test_a_demo_has_a_second_router_that_the_others_know() -> None:
    config = default_config()
    door = DemoDoor()
    children = with_demo(
        cluster_children(config, Path("/c.yaml")), partial(router_child, config, Path("/c.yaml")), door
    )
    by_name = {one.name: one.argv for one in children}
    told = {one.name for one in children if DOOR_VARIABLE in one.environment}
    assert told == {"router-0"}  # the word is in no command line, which every user of the machine can read
    word = door.place.partition("/")[2]
    door.close()
    assert not any(word in argument for argv in by_name.values() for argument in argv)
    assert [name for name in by_name if name.startswith("router")] == ["router-0", "router-demo"]
    assert "--demo-coordinator" in by_name["router-demo"]
    listen = by_name["router-demo"][by_name["router-demo"].index("--listen") + 1]
    assert is_loopback(listen)
    assert by_name["router-0"][-2:] == ("--demo-url", f"http://{listen}")
    assert not [name for name, argv in by_name.items() if "--demo-url" in argv and not name.startswith("router")]


@pytest.mark.parametrize("router", [RouterConfig("demo", "127.0.0.1:80"), RouterConfig("0", "0.0.0.0:80")])
def test_a_demo_is_refused_where_it_cannot_be(router: RouterConfig) -> None:
    with pytest.raises(ConfigError, match="--demo"):
        check_demo(msgspec.structs.replace(default_config(), routers=[router]))


def test_every_child_is_given_the_configuration_that_was_read() -> None:
    config = msgspec.structs.replace(default_config(), limits=Limits(value_bytes_max=7))
    for child in cluster_children(config, Path("/etc/cluster.yaml")):
        assert decode_config(child.environment[CONFIG_VARIABLE]) == config


def test_an_address_that_means_all_is_reached_at_loopback() -> None:
    assert url_of("0.0.0.0:80") == "http://127.0.0.1:80"
    assert url_of("[::]:80") == "http://[::1]:80"
    assert url_of("kv.example:80") == "http://kv.example:80"


def test_a_shard_on_all_addresses_is_announced_at_loopback() -> None:
    argv = shard_child(default_config(), Path("/etc/cluster.yaml"), "s9", "0.0.0.0:9109").argv
    assert argv[argv.index("--advertise") :][:2] == ("--advertise", "127.0.0.1:9109")
    assert "--advertise" not in shard_child(default_config(), Path("/etc/cluster.yaml"), "s9", "[::1]:9109").argv


@pytest.mark.parametrize("has_path", [True, False])
def test_children_run_this_package_and_nothing_that_lies_where_up_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_path: bool
) -> None:
    for name in ("random.py", "secrets.py", "asyncio.py", "kvstore.py"):
        (tmp_path / name).write_text("raise SystemExit('this was run')\n")
    here = Path(launcher.__file__).parents[1]
    if has_path:
        monkeypatch.setenv("PYTHONPATH", f"/nowhere{os.pathsep}{here}")
    else:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    child = cluster_children(default_config(), Path("/etc/cluster.yaml"))[1]
    environment = {**os.environ, **child.environment}
    python = child.argv[: child.argv.index("-m")]
    for arguments in ((*python, "-c", "import kvstore; print(kvstore.__path__[0])"), (*child.argv[:6], "--help")):
        run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        assert str(here / "kvstore") in run.stdout or "Usage:" in run.stdout


def test_python_m_kvstore_runs_nothing_that_lies_where_it_is_started(tmp_path: Path) -> None:
    for name in ("random.py", "secrets.py"):
        (tmp_path / name).write_text("raise SystemExit('this was run')\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(launcher.__file__).parents[1])}
    for command in (["up"], ["shard", "serve"], ["get"]):
        arguments = [sys.executable, "-m", "kvstore", *command, "--help"]
        run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")


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
from kvstore.supervisor import Child

def children(config, path):
    port = config.routers[0].listen.rpartition(":")[2]
    return [
        Child("router", "0", (sys.executable, "-c", sys.argv[2], port)),
        Child("shard", "s1", (sys.executable, "-S", "-c", sys.argv[3])),
    ]

launcher.cluster_children = children
restart = sys.argv[4] == "restart"
print_line = lambda line: print(line, flush=True)
sys.exit(asyncio.run(launcher.up(Path(sys.argv[1]), restart=restart, announce=print_line)))
"""


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


DesiredShards = Callable[..., "asyncio.Future[Running]"]


@pytest.fixture
async def launch(cluster_yaml: Path) -> AsyncIterator[Callable[..., object]]:
    launched: list[Running] = []

    async def start(*, shard: str = SERVE, restart: bool = True, ignoring: str = "") -> Running:
        # As nohup does (HUP), and a script's shell for what it starts with & (INT, QUIT).
        shell = ("sh", "-c", f'trap "" {ignoring}; exec "$@"', "sh") if ignoring else ()
        process = await asyncio.create_subprocess_exec(
            *(*shell, sys.executable, "-c", UP, str(cluster_yaml), READY, shard, "restart" if restart else "no"),
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
    launch: DesiredShards, cluster_yaml: Path, number: signal.Signals
) -> None:
    running = await launch()
    pid = int((await running.until("[shard-s1] pid")).rpartition(" ")[2])
    async with asyncio.timeout(60):
        assert await running.out.readline() == f"ready: http://127.0.0.1:{router_port(cluster_yaml)}\n".encode()
    running.process.send_signal(number)
    code, rest = await running.end()
    assert (code, "[shard-s1] going" in rest, "ready" in rest) == (0, True, False)
    assert not is_running(pid)
    left = [path.name for path in (cluster_yaml.parent / "data").iterdir()]
    assert left == ["up.lock"], "all else is the children's"


async def test_a_child_that_cannot_start_for_good_ends_a_cluster_that_is_not_ready_with_2(
    launch: DesiredShards,
) -> None:
    for restart in (True, False):
        running = await launch(shard="import sys; print('mend my file', flush=True); sys.exit(78)", restart=restart)
        code, text = await running.end()
        assert code == 2
        assert "[shard-s1] mend my file" in text
        assert "for the reason that it gave: stopping everything" in text
        assert "kill -HUP" not in text


async def test_a_child_that_refuses_later_is_set_aside_and_sighup_starts_it_again(
    launch: DesiredShards, tmp_path: Path
) -> None:
    spoiled = tmp_path / "spoiled"
    running = await launch(shard=f"import os, sys\nos.path.exists({str(spoiled)!r}) and sys.exit(78)\n{SERVE}")
    pid = int((await running.until("[shard-s1] pid")).rpartition(" ")[2])
    async with asyncio.timeout(60):
        await running.out.readline()  # it is ready
    spoiled.touch()
    os.kill(pid, signal.SIGKILL)
    assert f"`kill -HUP {running.process.pid}`" in await running.until("exit code 78")
    spoiled.unlink()
    running.process.send_signal(signal.SIGHUP)
    await running.until("starting shard-s1 again, as SIGHUP asks")
    await running.until("[shard-s1] pid")
    running.process.send_signal(signal.SIGHUP)  # nothing is set aside any more
    assert (await running.end())[0] == 0


async def test_with_kvstore_log_json_every_line_on_standard_error_is_a_json_object(
    launch: DesiredShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_LOG", "json")
    running = await launch()
    line = await running.until('"pid ')
    assert json.loads(line)["process"] == "shard-s1"
    running.process.terminate()
    _, err = await asyncio.wait_for(running.process.communicate(), 60)
    said = [json.loads(line) for line in err.splitlines()]
    assert {"up", "shard-s1"} <= {line["process"] for line in said}


async def test_under_nohup_up_outlives_its_terminal_and_still_stops_when_it_is_told_to(
    launch: DesiredShards, cluster_yaml: Path
) -> None:
    running = await launch(ignoring="HUP INT QUIT")
    async with asyncio.timeout(60):
        assert (await running.out.readline()).startswith(b"ready: ")
    running.process.send_signal(signal.SIGHUP)
    status, _ = await http_get("127.0.0.1", router_port(cluster_yaml), "/readyz")
    assert status == 200
    assert running.process.returncode is None
    running.process.send_signal(signal.SIGINT)
    assert (await running.end())[0] == 0


async def test_up_without_restart_ends_with_1_when_a_child_dies(launch: DesiredShards) -> None:
    running = await launch(restart=False)
    os.kill(int((await running.until("[shard-s1] pid")).rpartition(" ")[2]), signal.SIGKILL)
    assert (await running.end())[0] == 1


async def test_children_end_when_up_is_killed(launch: DesiredShards) -> None:
    running = await launch()
    pid = int((await running.until("[shard-s1] pid")).rpartition(" ")[2])
    running.process.kill()
    await running.end()  # returns at the end of its output, which the children share: so they have ended
    await until(lambda: not is_running(pid))


async def test_a_second_signal_kills_what_does_not_stop(launch: DesiredShards) -> None:
    running = await launch(shard=DEAF)
    await running.until("deaf")
    running.process.send_signal(signal.SIGINT)
    await running.until("stopping")
    running.process.send_signal(signal.SIGINT)
    assert (await running.end())[0] == 0


async def test_a_port_in_use_ends_up_with_2_and_names_the_holder(launch: DesiredShards, cluster_yaml: Path) -> None:
    port = router_port(cluster_yaml)
    with socket.create_server(("127.0.0.1", port)):
        code, text = await (await launch()).end()
    assert code == 2
    assert f"port {port} is in use by pid {os.getpid()} (" in text
    assert "[shard-s1]" not in text


async def test_the_ports_of_children_that_are_just_ending_are_waited_for(
    launch: DesiredShards, cluster_yaml: Path
) -> None:
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
    assert capfd.readouterr() == ("", f"kvstore up: {path}:1: routers must be a list; begin each entry with `- `.\n")


async def test_a_setting_with_an_older_name_is_told_before_anything_is_started(
    cluster_yaml: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = cluster_yaml.read_text().replace('{id: "0"', "{id: demo", 1) + "\nlimits: {move_fence_timeout_s: 2.0}\n"
    assert text.count("limits:") == 1
    cluster_yaml.write_text(text)
    assert await up(cluster_yaml, restart=True, announce=print, demo=True) == 2
    told, refused = capfd.readouterr().err.splitlines()
    assert told.endswith("limits.move_fence_timeout_s is called move_freeze_timeout_s now; rename it.")
    assert "--demo starts a router 'demo' of its own" in refused


async def test_http_get_says_why_there_is_no_answer() -> None:
    (port,) = free_ports(1)
    status, reason = await http_get("127.0.0.1", port, "/readyz")
    assert status == 0
    assert reason
