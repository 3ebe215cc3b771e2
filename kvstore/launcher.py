"""`kvstore up`: the whole cluster of a cluster.yaml as child processes of one small process.

Owns: starting the children, starting them again when they die, stopping them, forwarding what they print.
Promises: a child that dies is started again for as long as the launcher lives; no child outlives it, not even after
kill -9 (each child's standard input is a pipe that only the launcher holds open); all of them have ended within 10 s
of a stop.
Leaves to others: what a child does and its pid file (`process`), the command line (`cli`).

`Supervisor` knows nothing of kvstore's roles but the order in which they stop, so children can be added and removed
while it runs.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import queue
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from kvstore.config import ClusterConfig, Limits, listen_address, load_config
from kvstore.errors import ConfigError, KvError
from kvstore.process import EXIT_REFUSED, port_holder, port_in_use, refusal

# Routers first: while they take requests, shards and controller should be there to answer.
STOP_ORDER = ("router", "shard", "controller")

_QUICK_DEATH_S = 1.0
_FIRST_WAIT_S = 0.1
_LINE_BYTES_MAX = 64 * 1024
_LOG_LINES_MAX = 10_000
_LEFTOVER_WAIT_S = 3.0
_READY_POLL_S = 0.05
_READY_TIMEOUT_S = 2.0
_NOT_READY_REPORT_S = 10.0


class Child(NamedTuple):
    """A process to keep running. `argv[0]` is the program."""

    role: str
    id: str
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.role}-{self.id}"


async def up(config_path: Path, *, restart: bool, announce: Callable[[str], None]) -> int:
    """Run the cluster until SIGINT or SIGTERM. Returns the exit code: 0 stopped, 1 a child died, 2 cannot start.

    `announce` gets one line, "ready: URL", when the first router is ready. `restart` False: the first child that dies
    ends everything with 1. A second signal does not wait for the children any longer, it kills them.
    """
    try:
        config = load_config(config_path)
        refusals = await _ports_in_use(config)
    except KvError as error:
        refusals = [refusal(error)]
    for line in refusals:
        print(f"kvstore up: {line}", file=sys.stderr, flush=True)
    if refusals:
        return EXIT_REFUSED
    log = Log()
    try:
        return await _run(config, cluster_children(config, config_path.absolute()), restart, announce, log)
    finally:
        await asyncio.to_thread(log.close)


async def _run(
    config: ClusterConfig, children: Sequence[Child], restart: bool, announce: Callable[[str], None], log: Log
) -> int:
    supervisor = Supervisor(config.limits, restart=restart, log=log)
    _stop_on_signals(supervisor, log)
    for child in children:
        supervisor.add(child)
    ready = asyncio.create_task(_announce_ready(config.routers[0].listen, announce, log))
    try:
        await supervisor.stop_asked.wait()
    finally:
        ready.cancel()
        await supervisor.stop()
        await asyncio.gather(ready, return_exceptions=True)
    return 1 if supervisor.gave_up else 0


def _stop_on_signals(supervisor: Supervisor, log: Log) -> None:
    def stop() -> None:
        if supervisor.stop_asked.is_set():
            supervisor.kill()
            return
        log.write("up", "stopping all processes; a second signal kills them")
        supervisor.stop_asked.set()

    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means: stay
        signals.append(signal.SIGHUP)
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, stop)


# --- the children of a cluster ---------------------------------------------------------------------------------------


def cluster_children(config: ClusterConfig, config_path: Path) -> list[Child]:
    """All processes that cluster.yaml names; `config_path` is absolute."""
    join = ("--join", url_of(config.controllers[0].listen))
    data = ("--data-dir", config.data_dir)
    shared = ("--config", str(config_path), "--supervised")

    def child(role: str, child_id: str, listen: str, *options: str) -> Child:
        command = (sys.executable, "-m", "kvstore", role, "serve", child_id, "--listen", listen)
        return Child(role, child_id, (*command, *options, *shared))

    return [
        *(child("controller", controller.id, controller.listen, *data) for controller in config.controllers),
        *(child("shard", shard.id, shard.listen, *join, *data) for shard in config.shards),
        *(child("router", router.id, router.listen, *join) for router in config.routers),
    ]


def url_of(listen: str) -> str:
    """Where on this machine a process is reached that listens there: 0.0.0.0 becomes 127.0.0.1."""
    host, port = _reachable(listen)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reachable(listen: str) -> tuple[str, int]:
    host, port = listen_address(listen)
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


# --- ports -----------------------------------------------------------------------------------------------------------


async def _ports_in_use(config: ClusterConfig) -> list[str]:
    """A line for each port of the cluster that is taken.

    Children of an earlier launcher that was killed are just ending: they are waited for a little. So is a holder
    that cannot be told: it may have ended since the look at its port.
    """
    listens = [router.listen for router in config.routers]
    listens += [controller.listen for controller in config.controllers]
    listens += [shard.listen for shard in config.shards]
    clock = asyncio.get_running_loop()
    deadline = clock.time() + _LEFTOVER_WAIT_S
    while True:
        taken = [port for host, port in map(listen_address, listens) if _is_taken(host, port)]
        leftovers = _known_pids(Path(config.data_dir) / "run")
        holders = [port_holder(port) for port in taken]
        ending = all(holder is None or holder.pid in leftovers for holder in holders)
        if not taken or not ending or clock.time() > deadline:
            return [port_in_use(port) for port in taken]
        await asyncio.sleep(0.1)


def _is_taken(host: str, port: int) -> bool:
    """Raises ConfigError for an address that cannot be listened on for another reason."""
    try:
        # Same options as the loops set when they listen: what succeeds here succeeds there.
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return True
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}; change it in cluster.yaml.") from None
    return False


def _known_pids(run_dir: Path) -> set[int]:
    pids = set()
    for path in run_dir.glob("*.pid"):
        with suppress(OSError, ValueError):
            pids.add(int(path.read_text()))
    return pids


# --- keeping children running ----------------------------------------------------------------------------------------


def next_wait_s(lived_s: float, waited_s: float, wait_s_max: float) -> float:
    """How long to wait before a child that lived for `lived_s` is started again, having waited `waited_s` before.

    None at all, unless it died right after its start: then twice as long as the last time.
    """
    if lived_s >= _QUICK_DEATH_S:
        return 0.0
    return min(max(waited_s * 2, _FIRST_WAIT_S), wait_s_max)


class Supervisor:
    """Keeps any number of children running. `stop_asked` may be set by anybody; who set it then calls `stop`."""

    def __init__(self, limits: Limits, *, restart: bool, log: Log) -> None:
        self._limits = limits
        self._restart = restart
        self._log = log
        self._kept: dict[str, _Kept] = {}
        self.stop_asked = asyncio.Event()
        self.gave_up = False

    def add(self, child: Child) -> None:
        """Start the child and keep it running. Raises ValueError if its name is taken, or all are being stopped."""
        if child.name in self._kept:
            raise ValueError(f"{child.name} runs already")
        if self.stop_asked.is_set():
            raise ValueError(f"{child.name} comes too late: everything is being stopped")
        self._kept[child.name] = _Kept(child, self._limits, self._log, on_end=None if self._restart else self._give_up)

    async def remove(self, name: str) -> None:
        """Stop the child (SIGTERM, later SIGKILL) and forget it; returns when it has ended. Raises KeyError."""
        kept = self._kept[name]
        kept.terminate()
        if not await _all_ended([kept], self._limits.stop_timeout_s):
            kept.kill()
        await kept.ended()
        self._kept.pop(name, None)

    async def stop(self) -> None:
        """Stop all children, role by role, within stop_timeout_s; then kill those that are left."""
        self.stop_asked.set()
        clock = asyncio.get_running_loop()
        deadline = clock.time() + self._limits.stop_timeout_s
        for role in (*STOP_ORDER, None):
            group = [kept for kept in self._kept.values() if role in (kept.child.role, None)]
            for kept in group:
                kept.terminate()
            # A role that hangs must not use up the time of the next: the last round waits for all that are left.
            patience_s = self._limits.stop_timeout_s / 4 if role else deadline - clock.time()
            await _all_ended(group, min(patience_s, deadline - clock.time()))
        self.kill()
        await asyncio.gather(*(kept.ended() for kept in self._kept.values()))
        self._kept.clear()

    def kill(self) -> None:
        """SIGKILL to all that still run; none is started again."""
        for kept in self._kept.values():
            kept.kill()

    def _give_up(self) -> None:
        self.gave_up = True
        self.stop_asked.set()


async def _all_ended(group: Sequence[_Kept], timeout_s: float) -> bool:
    if not group:
        return True
    _, running = await asyncio.wait([kept.task for kept in group], timeout=max(timeout_s, 0.0))
    return not running


class _Kept:
    """One child, and the task that starts it again and again."""

    def __init__(self, child: Child, limits: Limits, log: Log, on_end: Callable[[], None] | None) -> None:
        self.child = child
        self._wait_s_max = limits.restart_wait_s_max
        self._log = log
        self._on_end = on_end
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self.task = asyncio.create_task(self._keep_running())

    def terminate(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGKILL)

    async def ended(self) -> None:
        await asyncio.gather(self.task, return_exceptions=True)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep_running(self) -> None:
        clock = asyncio.get_running_loop()
        wait_s = 0.0
        while not self._stopping.is_set():
            started_s = clock.time()
            how = await self._run_once()
            if self._stopping.is_set():
                return
            if self._on_end is not None:
                self._log.write("up", f"{self.child.name} {how}: stopping everything")
                self._on_end()
                return
            wait_s = next_wait_s(clock.time() - started_s, wait_s, self._wait_s_max)
            after = f" in {wait_s:.1f} s" if wait_s else ""
            self._log.write("up", f"{self.child.name} {how}: starting it again{after}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)

    async def _run_once(self) -> str:
        """From start to end of one process; says how it ended."""
        try:
            # A session of its own: Ctrl-C in the terminal reaches the launcher only, which stops all in order.
            process = await asyncio.create_subprocess_exec(
                *self.child.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"could not be started ({error})"
        self._process = process
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)  # asked to stop while it was being started
        assert process.stdout is not None
        forwarding = asyncio.create_task(_forward(process.stdout, self.child.name, self._log))
        code = await process.wait()
        # What it printed last is in the pipe; but a stray process of its own may hold the pipe open for ever.
        await asyncio.wait([forwarding], timeout=1.0)
        forwarding.cancel()
        self._process = None
        return f"(pid {process.pid}) ended " + (f"by {_signal_name(-code)}" if code < 0 else f"with exit code {code}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def _forward(stream: asyncio.StreamReader, name: str, log: Log) -> None:
    """Line by line; a line without end is cut, so that no child can fill our memory."""
    rest = b""
    while chunk := await stream.read(_LINE_BYTES_MAX):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) >= _LINE_BYTES_MAX:
            lines, rest = [*lines, rest], b""
        for line in lines:
            log.write(name, line.decode(errors="replace"))
    if rest:
        log.write(name, rest.decode(errors="replace"))


class Log:
    """Standard error, written by a thread: whoever does not read it must not stop the launcher.

    When nobody reads for long, lines are dropped and their number is told.
    """

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(_LOG_LINES_MAX)
        self._dropped = 0
        self._thread = Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, source: str, line: str) -> None:
        """One line, with its source in front. Never waits, raises nothing."""
        if self._dropped and not self._lines.full():
            dropped, self._dropped = self._dropped, 0
            self.write("up", f"{dropped} lines were dropped: nobody read standard error")
        try:
            self._lines.put_nowait(f"[{source}] {line}\n".encode(errors="replace"))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait at most a second for what is not written yet."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(timeout=1.0)

    def _write_all(self) -> None:
        # os.write and not sys.stderr: a thread that is stuck in the latter makes the interpreter abort at its end.
        while (line := self._lines.get()) is not None:
            while line:
                try:
                    line = line[os.write(self._descriptor, line) :]
                except BlockingIOError:
                    break  # somebody made it non-blocking; the rest of the line is lost
                except OSError:
                    return  # the reader is gone


# --- readiness -------------------------------------------------------------------------------------------------------


async def _announce_ready(listen: str, announce: Callable[[str], None], log: Log) -> None:
    """Poll /readyz of that router until it answers 200; say now and then why it does not."""
    host, port = _reachable(listen)
    clock = asyncio.get_running_loop()
    report_s = clock.time() + _NOT_READY_REPORT_S
    while True:
        status, reason = await http_get(host, port, "/readyz")
        if status == 200:
            announce(f"ready: {url_of(listen)}")
            return
        if clock.time() >= report_s:
            report_s += _NOT_READY_REPORT_S
            log.write("up", f"not ready yet: {reason}")
        await asyncio.sleep(_READY_POLL_S)


async def http_get(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and reason (the `detail` of a problem document, or the error); status 0 if there is no answer.

    The few lines of HTTP that this needs: an HTTP library would be most of the launcher's memory and start.
    """
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                # 1.0: the answer ends with the connection.
                writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return 0, str(error) or type(error).__name__
    status = head[9:12]
    with suppress(ValueError, AttributeError):
        return int(status), str(json.loads(body).get("detail", "")) if body else ""
    return (int(status) if status.isdigit() else 0), head.split(b"\r\n")[0].decode(errors="replace")
