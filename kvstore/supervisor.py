"""Keeping child processes running: started again when they die, stopped in order, what they print forwarded.

Owns: starting and stopping children, the pause before one that keeps dying is started again, the launcher's log.
Promises: a child that dies is started again until it is removed, but for one that says (exit code 78) that only a
person can mend what is wrong: that one is started again when a person has asked for it; and one that was killed for a
time on purpose is started again after that time. No child outlives this process,
not even after kill -9 (each child's standard input is a pipe that only this process holds open).
Leaves to others: which children there are (`launcher`, `roster`), what they do.

`Supervisor` knows nothing of kvstore's roles but the order in which they stop, so children can be added and removed
while it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.process import EXIT_NEEDS_A_PERSON

# Routers first: while they take requests, shards and controller should be there to answer.
STOP_ORDER = ("router", "shard", "controller")

_QUICK_DEATH_S = 1.0
_FIRST_WAIT_S = 0.1
_LINE_BYTES_MAX = 64 * 1024
_LOG_LINES_MAX = 10_000
_LAST_WORDS_S = 1.0
_STDIN, _STDOUT = 0, 1


class Child(NamedTuple):
    """A process to keep running. `argv[0]` is the program; `environment` is added to that of this process."""

    role: str
    id: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """ROLE-ID, by which it is known to the log."""
        return f"{self.role}-{self.id}"


def next_wait_s(lived_s: float, waited_s: float, wait_s_max: float) -> float:
    """How many seconds to wait before a child that lived for `lived_s` is started again.

    None at all, unless it died right after its start: then twice as long as the last time, `waited_s`, up to
    `wait_s_max`.
    """
    if lived_s >= _QUICK_DEATH_S:
        return 0.0
    return min(max(waited_s * 2, _FIRST_WAIT_S), wait_s_max)


class Supervisor:
    """Keeps any number of children running. `stop_asked` may be set by any task, which then calls `stop`.

    `on_refusal` is asked about a child that ended with 78, and how; True ends that child's story, else it is set aside.
    """

    def __init__(
        self, limits: Limits, *, restart: bool, log: Log, on_refusal: Callable[[Child, str], bool] | None = None
    ) -> None:
        self._limits = limits
        self._restart = restart
        self._log = log
        self._on_refusal = on_refusal
        self._kept: dict[str, _Kept] = {}
        self.stop_asked = asyncio.Event()
        self.gave_up = False

    def add(self, child: Child, again: Callable[[Child], Child] | None = None) -> None:
        """Start the child and keep it running. Raises ValueError if its name is taken, or all are being stopped.

        `again` is asked before it is started again, what to start in its place.
        """
        if child.name in self._kept:
            raise ValueError(f"{child.name} runs already")
        if self.stop_asked.is_set():
            raise ValueError(f"{child.name} comes too late: everything is being stopped")
        on_end = None if self._restart else self._give_up
        self._kept[child.name] = _Kept(child, self._limits, self._log, on_end, again, self._on_refusal)

    def retry_set_aside(self) -> list[str]:
        """Start again what was set aside; the names of these children."""
        return [name for name, kept in self._kept.items() if kept.retry()]

    def ids(self, role: str) -> list[str]:
        """The children of that role, those that are being stopped included."""
        return [kept.child.id for kept in self._kept.values() if kept.child.role == role]

    def kill_for(self, name: str, away_s: float) -> int:
        """SIGKILL to that child, which is not started again before `away_s` seconds; returns the pid that it had.

        Raises KeyError if there is no such child, ValueError if it does not run now.
        """
        return self._kept[name].kill_for(away_s)

    def pid(self, name: str) -> int | None:
        """Of the process that runs as that child, from its very start on; None while there is none."""
        kept = self._kept.get(name)
        return kept.pid if kept is not None else None

    async def remove(self, name: str) -> None:
        """Stop the child (SIGTERM, later SIGKILL) and forget it; returns when it has ended. Raises KeyError."""
        kept = self._kept[name]
        kept.terminate()
        if not await _all_ended([kept], self._limits.stop_timeout_s):
            kept.kill()
        await kept.ended()
        self._kept.pop(name, None)

    async def stop(self) -> None:
        """Stop all children, role by role, within stop_timeout_s; then kill those that are left.

        They are told that all ends by the end of their standard input, beside SIGTERM.
        """
        self.stop_asked.set()
        clock = asyncio.get_running_loop()
        deadline = clock.time() + self._limits.stop_timeout_s
        for role in (*STOP_ORDER, None):
            group = [kept for kept in self._kept.values() if role in (kept.child.role, None)]
            await asyncio.gather(*(kept.let_go() for kept in group))
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

    def __init__(
        self,
        child: Child,
        limits: Limits,
        log: Log,
        on_end: Callable[[], None] | None,
        again: Callable[[Child], Child] | None,
        on_refusal: Callable[[Child, str], bool] | None,
    ) -> None:
        self.child = child
        self._on_refusal = on_refusal
        self._retry: asyncio.Event | None = None
        self._wait_s_max = limits.restart_wait_s_max
        self._log = log
        self._on_end = on_end
        self._again = again
        self._stopping = asyncio.Event()
        self._away_s = 0.0
        self._process: asyncio.SubprocessTransport | None = None
        self._output: _Output | None = None
        self.task = asyncio.create_task(self._keep_running())

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        process = self._process
        return process.get_pid() if process is not None and process.get_returncode() is None else None

    async def let_go(self) -> None:
        """Close its standard input: all ends, so that it need not hand on first what it serves."""
        self._stopping.set()
        if self._process is not None and self._output is not None:
            if (pipe := self._process.get_pipe_transport(_STDIN)) is not None:
                pipe.close()
            await self._output.closed[_STDIN].wait()

    def terminate(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def kill_for(self, away_s: float) -> int:
        """As `Supervisor.kill_for`."""
        if (pid := self.pid) is None or self._stopping.is_set():
            raise ValueError(f"{self.child.name} does not run")
        self._away_s = away_s
        self._signal(signal.SIGKILL)
        return pid

    def retry(self) -> bool:
        """Start it again if it was set aside, which is told."""
        if self._retry is None:
            return False
        self._retry.set()
        return True

    async def ended(self) -> None:
        await asyncio.wait([self.task])  # who waits may be cancelled, the task must not be

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.get_returncode() is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep_running(self) -> None:
        clock = asyncio.get_running_loop()
        wait_s = 0.0
        while not self._stopping.is_set():
            started_s = clock.time()
            how, code = await self._run_once()
            if self._stopping.is_set():
                return
            if self._away_s:
                wait_s, self._away_s = self._away_s, 0.0
                await self._start_again(how, wait_s)
                wait_s = 0.0
                continue
            if code == EXIT_NEEDS_A_PERSON and self._on_refusal is not None and self._on_refusal(self.child, how):
                return
            if self._on_end is not None:
                self._log.write("up", f"{self.child.name} {how}: stopping everything")
                self._on_end()
                return
            if code == EXIT_NEEDS_A_PERSON:
                await self._set_aside(how)
                wait_s = 0.0
                continue
            wait_s = next_wait_s(clock.time() - started_s, wait_s, self._wait_s_max)
            await self._start_again(how, wait_s)

    async def _start_again(self, how: str, wait_s: float) -> None:
        """Wait for so long, and make out what to start; unless it is to stop."""
        after = f" in {wait_s:.1f} s" if wait_s else ""
        self._log.write("up", f"{self.child.name} {how}: starting it again{after}")
        await SYSTEM.wait_for(self._stopping.wait(), wait_s)
        if self._again is not None and not self._stopping.is_set():
            self.child = self._again(self.child)

    async def _set_aside(self, how: str) -> None:
        """Until a person asks for it again, or it is to stop."""
        self._log.write(
            "up",
            f"{self.child.name} {how}: only a person can mend what it says. It is not started again before that: "
            f"mend it, then `kill -HUP {os.getpid()}`",
        )
        self._retry = asyncio.Event()
        waits = [asyncio.create_task(event.wait()) for event in (self._retry, self._stopping)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._retry = None
        if self._again is not None and not self._stopping.is_set():
            self.child = self._again(self.child)

    async def _run_once(self) -> tuple[str, int | None]:
        """From start to end of one process; how it ended, and its exit code if it was started."""
        output = _Output(self.child.name, self._log)
        try:
            # A session of its own: Ctrl-C in the terminal reaches the launcher only, which stops all in order.
            process, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: output,
                *self.child.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.child.environment},
            )
        except OSError as error:
            return f"could not be started ({error})", None
        self._process, self._output = process, output
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)  # asked to stop while it was being started
        await output.ended.wait()
        # What it printed last is in the pipe; but a stray process of its own may hold the pipe open for ever.
        await SYSTEM.wait_for(output.closed[_STDOUT].wait(), _LAST_WORDS_S)
        pid, code = process.get_pid(), process.get_returncode()
        assert code is not None
        self._process = self._output = None
        process.close()
        way = f"by {_signal_name(-code)}" if code < 0 else f"with exit code {code}"
        return f"(pid {pid}) ended {way}", code


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Output(asyncio.SubprocessProtocol):
    """Of one process: what it prints goes to the log line by line.
    `ended`: it has; `closed`: its pipes, by number.

    Its end is heard of by itself, and not by that of its pipes, which a stray process of its own may hold open. A line
    without end is cut, so that no child can fill the memory of this process.
    """

    def __init__(self, name: str, log: Log) -> None:
        self.ended = asyncio.Event()
        self.closed = {_STDIN: asyncio.Event(), _STDOUT: asyncio.Event()}
        self._name = name
        self._log = log
        self._rest = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= _LINE_BYTES_MAX:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._log.write(self._name, line.decode(errors="replace"))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == _STDOUT and self._rest:
            self.pipe_data_received(fd, b"\n")
        self.closed[fd].set()

    def process_exited(self) -> None:
        self.ended.set()


def text_line(source: str, line: str) -> str:
    """`[shard-s1] what it said`."""
    return f"[{source}] {line}"


def json_line(source: str, line: str) -> str:
    """What a child logged as JSON, as it is but for the name of its process.
    Or an object around any other line."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        at_s = time.time()
        at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at_s))}.{int(at_s * 1000) % 1000:03d}Z"
        level = "info" if source == "up" else "warning"  # a child's own log is JSON already: this is something else
        document = {"at": at, "level": level, "process": source, "logger": "kvstore.supervisor", "message": line}
    elif document.get("process") == source:
        return line
    return json.dumps({**document, "process": source}, ensure_ascii=False)


class Log:
    """Standard error, written by a thread: a reader that stalls must not stop the launcher.

    When it is not read for long, or nothing can be written for a while (a full disk), lines are dropped and their
    number is told. `as_json`: each line is a JSON object, whose member `process` names the source.
    """

    def __init__(self, descriptor: int = 2, *, as_json: bool = False) -> None:
        self._descriptor = descriptor
        self._form = json_line if as_json else text_line
        self._lines: queue.Queue[bytes | None] = queue.Queue(_LOG_LINES_MAX)
        self._dropped = 0
        self._is_torn = False
        self._thread = Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, source: str, line: str) -> None:
        """One line, with its source in front. Never waits, raises nothing."""
        if self._dropped and not self._lines.full():
            dropped, self._dropped = self._dropped, 0
            self.write("up", f"{dropped} lines were dropped: standard error was not read")
        try:
            self._lines.put_nowait(f"{self._form(source, line)}\n".encode(errors="replace"))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait at most a second for what is not written yet."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(timeout=1.0)

    def _write_all(self) -> None:
        lost, why = 0, ""
        while (line := self._lines.get()) is not None:
            if lost:
                line = f"{self._form('up', f'{lost} lines were lost: {why}')}\n".encode() + line
            try:
                self._write_line(line)
                lost = 0
            except OSError as error:  # a full disk, a reader that is gone: it may be otherwise for the next line
                lost, why = lost + 1, error.strerror or str(error)

    def _write_line(self, line: bytes) -> None:
        # os.write and not sys.stderr: a thread that is stuck in the latter makes the interpreter abort at its end.
        if self._is_torn:
            line = b"\n" + line
        while line:
            written = os.write(self._descriptor, line)
            line = line[written:]
            self._is_torn = bool(line)
