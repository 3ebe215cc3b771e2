"""Processes of other programs: start, watch over, measure and end them.

Owns: how a tree of processes is found in /proc, what it costs (CPU time, memory), and how it is ended.
Promises: only processes that descend from one started here are ever signalled, each by its pid and start time (so
that a pid used again is never hit); `end` leaves none of them running.
Leaves to others: what the processes are (loadtest/cluster.py, loadtest/bench/systems.py).

Linux only: it reads /proc (proc(5)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOP_TIMEOUT_S = 12.0
_POLL_S = 0.05
_CLAIMS_MAX = 100
_claims: deque[int] = deque()  # file descriptors, of the sockets that stand for ports given


class Pid(NamedTuple):
    """One process: its number and its start (clock ticks since boot), which together are never used again."""

    pid: int
    started_ticks: int


class ProcessStat(NamedTuple):
    """What /proc/PID/stat says: parent, start, and CPU time of it and of its reaped children in ticks."""

    state: str
    parent: int
    cpu_ticks: int
    started_ticks: int


def read_stat(pid: int) -> ProcessStat | None:
    """/proc/PID/stat, or None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the name, in brackets, may hold anything: the fields begin behind the last bracket
    fields = text.rpartition(")")[2].split()
    return ProcessStat(
        state=fields[0],
        parent=int(fields[1]),
        cpu_ticks=sum(int(field) for field in fields[11:15]),
        started_ticks=int(fields[19]),
    )


def identify(pid: int) -> Pid | None:
    """The process with that number as it is now; None when it is gone or only waits to be reaped."""
    stat = read_stat(pid)
    return None if stat is None or stat.state == "Z" else Pid(pid, stat.started_ticks)


def is_running(process: Pid) -> bool:
    return identify(process.pid) == process


def tree(root: int) -> list[Pid]:
    """The process `root` and all its descendants, parents first."""
    children: dict[int, list[Pid]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := read_stat(int(entry.name))) is not None and stat.state != "Z":
            children.setdefault(stat.parent, []).append(Pid(int(entry.name), stat.started_ticks))
    top = identify(root)
    found = [] if top is None else [top]
    for process in found:
        found.extend(children.get(process.pid, []))
    return found


def cpu_by_name(roots: Sequence[int]) -> dict[str, float]:
    """CPU seconds, user and system, that the trees under `roots` have used so far, by the `name` of the process.

    Descendants that ended count too, under the name of the parent that reaped them.
    """
    used: dict[str, float] = {}
    for process in (process for root in roots for process in tree(root)):
        if (stat := read_stat(process.pid)) is not None:
            label = name(process.pid)
            used[label] = used.get(label, 0.0) + stat.cpu_ticks / _TICKS_PER_S
    return used


def name(pid: int) -> str:
    """What a process is: its program, or the word after the module for `python -m MODULE WORD`; empty when gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return ""
    if "-m" in words[:-2]:
        module = words.index("-m") + 1
        return words[module + 1] or words[module]
    return Path(words[0].split(" ")[0]).name


class MachineCpu(NamedTuple):
    """CPU seconds of all cores since boot: `busy` with anything, `stolen` by the hypervisor (part of `busy`)."""

    busy: float
    stolen: float


def machine_cpu() -> MachineCpu:
    """From the first line of /proc/stat."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, stolen = (
            int(field) for field in file.readline().split()[1:9]
        )
    busy = user + nice + system + irq + softirq + stolen
    return MachineCpu(busy / _TICKS_PER_S, stolen / _TICKS_PER_S)


def pss_bytes(roots: Sequence[int]) -> int:
    """Memory of the trees under `roots`: the sum of PSS (shared pages are split between those that share them)."""
    total = 0
    for root in roots:
        for process in tree(root):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def send_signal(process: Pid, number: signal.Signals) -> bool:
    """Signal exactly this process; False when it is gone."""
    if not is_running(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


async def wait_gone(processes: Sequence[Pid], timeout_s: float) -> list[Pid]:
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
