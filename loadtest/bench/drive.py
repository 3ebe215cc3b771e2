"""Runs wrk against the systems, in turn, and measures what each run cost.

Owns: the order of runs, the wrk process, reading its figures, CPU time per operation.
Promises: rounds are interleaved (all systems run one workload at one number of connections before the next), so that a
slow minute of the machine hits all of them; a run's CPU time holds what the system still did after it, and the next
run begins when that system has come to rest.
Leaves to others: what is asked (workloads.py), the systems' processes (systems.py), medians and ratios (report.py).

wrk is a closed loop: each connection sends its next request when it has the answer. Its latencies are corrected by wrk
for requests that a slow answer held back (coordinated omission), for all systems alike.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from loadtest.bench.command import in_turn
from loadtest.bench.conditions import CONDITIONS
from loadtest.bench.data import Data, placed
from loadtest.bench.dialects import Unsupported
from loadtest.bench.http1 import ask, ask_all, write_replay
from loadtest.bench.stateful import Stateful, Talk, write_sections
from loadtest.bench.systems import Batches, System
from loadtest.bench.workloads import Workload, preload
from loadtest.cluster import processes

WARM_UP_S = 1
SETTLE_S = 0.4
_SETTLE_S_MAX = 10.0
_QUIET_CORES = 0.2
_PRELOAD_CONNECTIONS = 32
_WRK_GRACE_S = 30.0
_RESULT = "RESULT "
_ERRORS = ("connect", "read", "write", "status", "timeout", "partial")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of wrk. Rates and CPU time are per operation; latencies are per request.

    `errors` counts, by kind, what was no answer or one of 400 and above. Where the script looks at every answer, the
    kind of the latter is its status (`409`), and `attempts` counts all answers; elsewhere it is `status`, and
    `attempts` is 0. `partial`: batches of which some operations failed.

    `refused` counts what was rightly refused, and is no operation: comparisons that failed, locks that were held.

    `batch_operations` is the mean size of the batches, each with a commit of its own, that a cluster of ours wrote in
    that time; None where nothing was written, or the system does not tell.

    `others_cpu` and `stolen_cpu` tell how quiet the machine was: the share of all cores' time (0 to 1) that went to
    processes outside this benchmark, and to other guests of the hypervisor.
    """

    round: int
    work: str
    connections: int
    system: str
    seconds: float
    operations: int
    requests: int = 0
    per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: dict[str, int]
    attempts: int = 0
    refused: int = 0
    cpu_us_per_op: float
    cpu_us_per_op_by_process: dict[str, float] = {}
    wrk_cpu_us_per_op: float
    batch_operations: float | None = None
    others_cpu: float = 0.0
    stolen_cpu: float = 0.0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def abort_rate(self) -> float | None:
        """The share of attempts (0 to 1) that ended in a conflict, 409; None where the script does not tell."""
        return self.errors.get("409", 0) / self.attempts if self.attempts else None


class Step(NamedTuple):
    """One run to be done; `round` counts from 1."""

    round: int
    workload: Workload
    connections: int
    system: System

    def seconds(self, asked: int) -> int:
        """How long it takes when it is asked to take that long."""
        return max(asked, self.workload.seconds_min)

    @property
    def threads(self) -> int:
        """Of wrk: each asks one router only."""
        return self.connections if self.workload.stateful is not None else min(len(self.system.urls), self.connections)


class Plan:
    """All runs in their order, with the request files that wrk reads.

    Where the keys of a request depend on where they lie, those of a cluster of ours lie as its own shards say; all
    other systems get the requests that `data` makes.
    """

    def __init__(self, systems: Sequence[System], workloads: Sequence[Workload], data: Data, folder: Path) -> None:
        self.systems = systems
        self.workloads = workloads
        self.data = data
        self.folder = folder

    async def prepare(self, system: System) -> None:
        """Store all keys in that system, write its request files, and see that its answers carry the values."""
        data = self.data if system.shape is None else placed(self.data, system.shape.shards)
        await ask_all(system.url, preload(system.dialect, self.data), _PRELOAD_CONNECTIONS)
        answer = await ask(system.url, system.dialect.get(self.data.keys[-1]))
        if answer.status != 200 or not system.dialect.shows(answer.body, self.data.stored[-1]):
            raise RuntimeError(f"{system.name} does not show what was stored: {answer.status} {answer.body[:300]!r}")
        for workload in self.workloads:
            if workload.stateful is not None:
                await self._prepare_stateful(system, workload, workload.stateful)
                continue
            assert workload.requests is not None
            try:
                requests = workload.requests(system.dialect, data)
            except Unsupported:
                continue
            if workload.check is not None:
                await workload.check(system.url, system.dialect, data)
            self.request_file(system, workload).write_bytes(write_replay(requests, system.url))

    async def _prepare_stateful(self, system: System, workload: Workload, stateful: Stateful) -> None:
        if system.dialect.name in CONDITIONS:
            async with self._talk(system) as talk:
                await stateful.check(talk, self.data.keys)
            self.request_file(system, workload).touch()

    def _talk(self, system: System) -> Talk:
        return Talk(system.url, system.dialect, CONDITIONS[system.dialect.name])

    def request_file(self, system: System, workload: Workload) -> Path:
        return self.folder / f"{system.name}-{workload.name}.requests"

    def steps(self, rounds: int, connections: Sequence[int]) -> list[Step]:
        """Every run that the systems support, interleaved."""
        return [
            Step(number, workload, count, system)
            for number in range(1, rounds + 1)
            for workload in self.workloads
            for count in (workload.stateful and workload.stateful.connections) or connections
            for system in in_turn(self.systems, number)
            if self.request_file(system, workload).exists()
        ]

    async def run(self, steps: Sequence[Step], seconds: int) -> AsyncIterator[Run]:
        """The runs, one after the other; each system is warmed up before its first run of a workload."""
        warm: set[tuple[str, str]] = set()
        for step in steps:
            if (step.system.name, step.workload.name) not in warm:
                warm.add((step.system.name, step.workload.name))
                await self._one(step, WARM_UP_S)
            yield await self._one(step, step.seconds(seconds))

    async def _one(self, step: Step, seconds: int) -> Run:
        workload, system = step.workload, step.system
        if workload.stateful is not None:
            await self._write_sections(step, workload.stateful)
        batches, before = await system.batches(), _CpuTimes.now(system)
        result = await run_wrk(
            system.url,
            workload.script,
            step.connections,
            seconds,
            self._script_arguments(step),
            step.threads,
            workload.timeout_s,
        )
        await _settle(system)
        used = _CpuTimes.now(system).since(before)
        batch_operations = mean_size(batches, await system.batches())
        operations = result.get("operations", result["requests"]) * workload.operations
        if workload.stateful is not None:
            async with self._talk(system) as talk:
                await workload.stateful.verify(talk, operations, step.connections)
        duration_s = result["duration_us"] / 1e6
        us_per_op = 1e6 / max(1, operations)
        return Run(
            round=step.round,
            work=workload.name,
            connections=step.connections,
            system=system.name,
            seconds=duration_s,
            operations=operations,
            requests=result["requests"],
            per_s=operations / duration_s,
            p50_ms=result["p50_us"] / 1e3,
            p99_ms=result["p99_us"] / 1e3,
            max_ms=result["max_us"] / 1e3,
            errors={kind: count for kind, count in result.items() if count and (kind in _ERRORS or kind.isdigit())},
            attempts=result.get("attempts", 0),
            refused=result.get("refused", 0),
            cpu_us_per_op=sum(used.system_s.values()) * us_per_op,
            cpu_us_per_op_by_process={name: cpu_s * us_per_op for name, cpu_s in used.system_s.items()},
            wrk_cpu_us_per_op=used.wrk_s * us_per_op,
            batch_operations=batch_operations,
            others_cpu=used.others_share,
            stolen_cpu=used.machine.stolen / used.capacity_s,
        )

    def _script_arguments(self, step: Step) -> list[str]:
        """See threads.lua."""
        file, seed = self.request_file(step.system, step.workload), step.round * 1009 + step.connections
        addresses = [urlsplit(url).netloc for url in step.system.urls]
        return [str(file), str(seed), step.system.dialect.name, *(addresses if len(addresses) > 1 else [])]

    async def _write_sections(self, step: Step, stateful: Stateful) -> None:
        async with self._talk(step.system) as talk:
            sections = await stateful.sections(talk, self.data.keys, self.data.written, step.connections)
        content = write_sections(sections, urlsplit(step.system.url).netloc)
        self.request_file(step.system, step.workload).write_bytes(content)


def mean_size(before: Batches | None, after: Batches | None) -> float | None:
    """Of the batches between two looks."""
    if before is None or after is None or after.committed == before.committed:
        return None
    return (after.operations - before.operations) / (after.committed - before.committed)


async def _settle(system: System) -> None:
    """Until it has come to rest.
    What it does after its last answer is its own, and not the next one's noise.

    wrk leaves requests behind that wait for one another: a system may work at those for seconds.
    """
    deadline_s = time.monotonic() + _SETTLE_S_MAX
    while time.monotonic() < deadline_s:
        before = _CpuTimes.now(system)
        await asyncio.sleep(SETTLE_S)
        used = _CpuTimes.now(system).since(before)
        if sum(used.system_s.values()) < _QUIET_CORES * used.clock_s:
            return


async def run_wrk(
    url: str,
    script: Path,
    connections: int,
    seconds: int,
    script_arguments: Sequence[str],
    threads: int = 1,
    timeout_s: int = 2,
) -> dict[str, int]:
    """Run wrk; the figures that the script's `done` prints.

    `status` counts answers of 400 and above that the script does not count under the status itself (`409`), `timeout`
    those that took longer than `timeout_s`, which the latencies do not hold; times are in microseconds.
    Raises RuntimeError when wrk fails.
    """
    command = ["wrk", "-t", str(threads), "-c", str(connections), "-d", f"{seconds}s", "--timeout", f"{timeout_s}s"]
    command += ["-s", str(script), url, "--"]
    wrk = await asyncio.create_subprocess_exec(
        *command,
        *script_arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds + _WRK_GRACE_S):
            output = (await wrk.communicate())[0].decode(errors="replace")
    finally:
        if wrk.returncode is None:
            wrk.kill()
            await wrk.wait()
    return read_result(output)


def read_result(output: str) -> dict[str, int]:
    """The line of JSON among wrk's output. Raises RuntimeError, with the output, when there is none."""
    for line in output.splitlines():
        if line.startswith(_RESULT):
            figures: dict[str, int] = json.loads(line.removeprefix(_RESULT))
            return figures
    raise RuntimeError(f"wrk gave no figures:\n{output}")


class _CpuTimes(NamedTuple):
    """CPU seconds used: at a moment, or between two (`since`)."""

    clock_s: float
    system_s: dict[str, float]
    wrk_s: float
    own_s: float
    machine: processes.MachineCpu

    @classmethod
    def now(cls, system: System) -> _CpuTimes:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that ended: each wrk of the runs before
        return cls(
            clock_s=time.monotonic(),
            system_s=processes.cpu_by_name(system.roots),
            wrk_s=children.ru_utime + children.ru_stime,
            own_s=time.process_time(),
            machine=processes.machine_cpu(),
        )

    def since(self, before: _CpuTimes) -> _CpuTimes:
        return _CpuTimes(
            clock_s=self.clock_s - before.clock_s,
            system_s={name: cpu_s - before.system_s.get(name, 0.0) for name, cpu_s in self.system_s.items()},
            wrk_s=self.wrk_s - before.wrk_s,
            own_s=self.own_s - before.own_s,
            machine=processes.MachineCpu(*(now - then for now, then in zip(self.machine, before.machine, strict=True))),
        )

    @property
    def capacity_s(self) -> float:
        """What all cores could have given in that time."""
        return self.clock_s * (os.cpu_count() or 1)

    @property
    def others_share(self) -> float:
        ours_s = sum(self.system_s.values()) + self.wrk_s + self.own_s
        return max(0.0, (self.machine.busy - self.machine.stolen - ours_s) / self.capacity_s)
