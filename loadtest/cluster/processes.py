"""Processes of other programs: start, watch over, measure and end them.

Owns: what a tree of processes costs (CPU time, memory), and how it is ended.
Promises: only processes that descend from one started here are ever signalled, each by its pid and start time, as
psutil does (so that a pid used again is never hit); `end` leaves none of them running.
Leaves to others: what the processes are (loadtest/cluster.py, loadtest/bench/systems.py).

Linux only: PSS, stolen time, abstract sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from psutil import Process

_STOP_TIMEOUT_S = 12.0
_POLL_S = 0.05
_CLAIMS_MAX = 100
_claims: deque[int] = deque()  # file descriptors, of the sockets that stand for ports given


def identify(pid: int) -> Process | None:
    """The process with that number as it is now; None when it is gone or only waits to be reaped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process if is_running(process := Process(pid)) else None
    return None


def status(process: Process) -> str:
    """One of psutil's; that of a zombie when the process is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() if process.is_running() else psutil.STATUS_ZOMBIE
    return psutil.STATUS_ZOMBIE


def is_running(process: Process) -> bool:
    return status(process) != psutil.STATUS_ZOMBIE


def tree(root: int) -> list[Process]:
    """The process `root` and all its descendants, parents first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = Process(root)
        return [process for process in (top, *top.children(recursive=True)) if is_running(process)]
    return []


def cpu_by_name(roots: Sequence[int]) -> dict[str, float]:
    """CPU seconds, user and system, that the trees under `roots` have used so far, by the `name` of the process.

    Descendants that ended count too, under the name of the parent that reaped them.
    """
    used: dict[str, float] = defaultdict(float)
    for process in (process for root in roots for process in tree(root)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            label = name(process)
            used[label] += times.user + times.system + times.children_user + times.children_system
    return dict(used)


def name(process: Process) -> str:
    """What a process is: its program, or the word after the module for `python -m MODULE WORD`.

    Raises psutil.NoSuchProcess.
    """
    words = process.cmdline()
    if "-m" in words[:-1]:
        module = words.index("-m") + 1
        return words[module + 1] if module + 1 < len(words) else words[module]
    return Path(words[0].split(" ")[0]).name if words else ""


class MachineCpu(NamedTuple):
    """CPU seconds of all cores since boot: `busy` with anything, `stolen` by the hypervisor (part of `busy`)."""

    busy: float
    stolen: float


def machine_cpu() -> MachineCpu:
    """The time of guests of this machine is in that of its users already."""
    times = psutil.cpu_times()
    return MachineCpu(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice, times.steal)


def pss_bytes(roots: Sequence[int]) -> int:
    """Memory of the trees under `roots`: the sum of PSS (shared pages are split between those that share them)."""
    total = 0
    for process in (process for root in roots for process in tree(root)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def send_signal(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process; nothing happens when it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


async def wait_gone(processes: Sequence[Process], timeout_s: float) -> list[Process]:
    """Wait until all have ended, at most `timeout_s`; those still running."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while left := [process for process in processes if is_running(process)]:
        if asyncio.get_running_loop().time() >= deadline:
            return left
        await asyncio.sleep(_POLL_S)  # other people's children: nothing to await
    return []


async def start(
    command: Sequence[str], log: Path, cwd: Path | None = None, pipe: bool = False
) -> asyncio.subprocess.Process:
    """Start a program whose output goes to the end of `log`; with `pipe` standard output is a pipe instead.

    In a session of its own, so that Ctrl-C at the terminal reaches this program alone, which then ends it orderly.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if pipe else output,
            stderr=output,
            cwd=cwd,
            start_new_session=True,
        )


async def end(process: asyncio.subprocess.Process, timeout_s: float = _STOP_TIMEOUT_S) -> None:
    """End a program started here and all its descendants: SIGTERM, then SIGKILL for those that stay."""
    family = tree(process.pid)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    await wait_gone(family, timeout_s)
    for member in family + tree(process.pid):
        send_signal(member, signal.SIGKILL)
    await process.wait()


async def read_line(process: asyncio.subprocess.Process, prefix: str, timeout_s: float) -> str:
    """The rest of the first line of standard output that begins with `prefix`. What follows is read and dropped.

    Raises RuntimeError when the program ends or `timeout_s` pass before that.
    """
    stdout = process.stdout
    if stdout is None:
        raise ValueError("the program was started without a pipe for its standard output")
    try:
        async with asyncio.timeout(timeout_s):
            while line := await stdout.readline():
                text = line.decode(errors="replace").strip()
                if text.startswith(prefix):
                    return text.removeprefix(prefix).strip()
            code = await process.wait()
    except TimeoutError:
        raise RuntimeError(f"no line {prefix!r} within {timeout_s:g} s") from None
    raise RuntimeError(f"it ended with exit code {code} before it printed {prefix!r}")


def free_ports(number: int) -> list[int]:
    """Port numbers of 127.0.0.1 that no process listens on, and that no other call has lately given.

    Below the range from which the kernel numbers outgoing connections: otherwise one of those could sit on the
    port of a process that is down for a moment, or even connect to itself there, and keep it from coming back.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    below = range(max(1_024, lowest - 20_000), lowest)
    found: list[int] = []
    for port in random.sample(below, k=len(below)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            _claim(port)
            found.append(port)
        if len(found) == number:
            return found
    raise RuntimeError(f"no {number} free ports below {lowest}")


def _claim(port: int) -> None:
    """Keep the port from other processes that look for free ones. Raises OSError if it is taken.

    It is kept until this process ends: an address of an abstract socket lies on no disk and goes with it (unix(7)).
    """
    with socket.socket(socket.AF_UNIX) as claim:
        claim.bind(f"\0kvstore port {port}")
        _claims.append(claim.detach())
    while len(_claims) > _CLAIMS_MAX:
        os.close(_claims.popleft())


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message; empty when there is none."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
