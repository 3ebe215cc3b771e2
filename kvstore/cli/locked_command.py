"""A command as a child process.
Started, handed the signals that are meant for it, ended with all that it started.

Owns: its process group, the signal handlers of this process while it runs, its exit code in the words of a shell.
Promises: when the block is left, the command has ended.
Leaves to others: why it is run, and when it has to go (`lock`).

Two ways of signalling, as terminals have their own: Ctrl-C goes to every process of the terminal's foreground group. A
command that runs there stays in that group, or it could not read from the terminal; SIGINT and SIGQUIT have reached it
then, and are not sent a second time. Everywhere else (cron, CI, services) the command gets a group of its own, and
every signal goes to that group: to the command and to what it started.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Self

from kvstore.cli.frame import complain, printable

EXIT_NOT_EXECUTABLE = 126  # these two, and 128 + N for signal N, are what shells answer
EXIT_NOT_FOUND = 127
END_TIMEOUT_S = 5.0

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SENT_BY_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


@asynccontextmanager
async def dying_of_signals() -> AsyncIterator[None]:
    """Until a `LockedCommand` handles them: a signal cancels this task, and ends the process as ever when that is over.

    SIGINT is left alone: asyncio does so by itself.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[signal.Signals] = []

    def cancel(number: signal.Signals) -> None:
        came.append(number)
        task.cancel()

    handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        loop.add_signal_handler(number, cancel, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        if came:
            signal.raise_signal(came[0])


class LockedCommand:
    """`async with LockedCommand(["make", "deploy"], environment) as running: code = await running.ended()`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._on_terminal = _in_foreground()
        self._process: asyncio.subprocess.Process | None = None
        self._failed = 0
        self._early: list[signal.Signals] = []  # what came before there was a process to send it to
        self._handled: list[signal.Signals] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup`, or a shell's `&`, wants it ignored
                loop.add_signal_handler(number, self._pass_on, number)
                self._handled.append(number)
        try:
            await self._start()
        except BaseException:
            self._stop_handling()
            raise
        return self

    async def _start(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, process_group=None if self._on_terminal else 0
            )
        except OSError as error:
            # ValueError (a NUL byte) cannot come from a command line.
            complain(f"kvstore: {printable(self._command[0])} cannot be executed: {error.strerror}.")
            self._failed = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
        for number in self._early:
            self._pass_on(number)

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._process is not None and self._process.returncode is None:
                self._send(signal.SIGKILL)
                await self._process.wait()
        finally:
            self._stop_handling()

    async def ended(self) -> int:
        """Wait for its end; its exit code, 128 + N if signal N ended it.
        May be cancelled, and called again."""
        if self._process is None:
            return self._failed
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def end(self) -> int:
        """SIGTERM, after `END_TIMEOUT_S` SIGKILL; also to what it started and left behind, if it has its own group."""
        self._send(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.ended()
        self._send(signal.SIGKILL)
        return await self.ended()

    def _pass_on(self, number: signal.Signals) -> None:
        if self._process is None:
            self._early.append(number)
        elif not (self._on_terminal and number in _SENT_BY_TERMINAL):
            self._send(number)

    def _send(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            if not self._on_terminal:
                os.killpg(self._process.pid, number)
            elif self._process.returncode is None:
                self._process.send_signal(number)

    def _stop_handling(self) -> None:
        loop = asyncio.get_running_loop()
        for number in self._handled:
            loop.remove_signal_handler(number)
        self._handled.clear()


def _in_foreground() -> bool:
    """Whether this process belongs to the foreground group of a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
