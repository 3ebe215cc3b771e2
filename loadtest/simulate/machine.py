"""A simulated machine: a disk, clocks, and the process that runs there, if one does.

Owns: starting a process and its end, what the disk does to it.
Promises: a process that ends has ended by a fault that was made, or that is a finding. The disk outlives it.
Leaves to others: what runs in it (`store_machine`, `servers`, `node`), when what happens (`store_faults`,
`cluster_faults`).
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from kvstore.config import Limits
from kvstore.storage.engine import TryLater
from kvstore.storage.log import LogFailed
from loadtest.simulate.disk import PowerCut, SimulatedDisk
from loadtest.simulate.environment import SimulatedEnvironment
from loadtest.simulate.loop import Killed, Process, SimulatedLoop
from loadtest.simulate.network import Host

PARTITIONS = 64
FOLDER = Path("/data")
LIMITS = Limits(
    log_segment_bytes=160 * 1024,
    disk_reserve_bytes=200 * 1024,
    cache_bytes_max=4000,
    page_bytes_max=4000,
    apply_rows=20,
    unapplied_rows_max=200,
    unapplied_bytes_max=100_000,
    tombstone_kept_s=2.0,
    txn_timeout_s=2.0,
    batch_ops_max=16,
)

Found = Callable[[BaseException], None]


class Machine:
    """`found`: takes what may not be. `sync_fails`: the next sync of the disk does."""

    def __init__(self, host: Host, loop: SimulatedLoop, rng: random.Random, limits: Limits, found: Found) -> None:
        self.name = host.name
        self.host = host
        self.loop = loop
        self.rng = rng
        self.limits = limits
        self.found = found
        self.disk = SimulatedDisk()
        self.disk.hook = self._before_disk
        self.environment = SimulatedEnvironment(loop, rng, self.disk)
        self.process: Process | None = None
        self.gone = asyncio.Event()
        self.gone.set()
        self.sync_fails = False
        self.is_excused = False  # the process may end by a sync that was made to fail

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Begin a process, which serves as soon as it can."""
        self.gone.clear()
        self.is_excused = False
        self.host.has_power = True
        self.process = self.host.process = Process(self.name, self._on_death, self.environment.rate)
        self.loop.note(f"{self.name} starts")
        self.spawn(self._guarded(self.process))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it in the process that runs now."""
        assert self.process is not None
        self.loop.create_task(work, context=self.process.context)

    async def _guarded(self, process: Process) -> None:
        try:
            await self.run(process)
        except (Killed, GeneratorExit):
            return
        except BaseException as error:
            self.end(process, error)

    async def run(self, process: Process) -> None:
        """What it does."""
        raise NotImplementedError

    def end(self, process: Process, error: BaseException) -> None:
        """It ends by itself: rightly so, or that is a finding."""
        if not process.alive or isinstance(error, GeneratorExit):
            return
        self.loop.note(f"{self.name} ends: {error!r}")
        if not self.may_end_by(error):
            self.found(error)
        process.kill()

    def may_end_by(self, error: BaseException) -> bool:
        return isinstance(error, PowerCut) or (self.is_excused and isinstance(error, LogFailed | OSError))

    def _on_death(self) -> None:
        self.process = None
        self.on_death()
        self.gone.set()

    def on_death(self) -> None:
        """What was in memory is lost."""

    def lose_power(self) -> None:
        """No word of it reaches another process."""
        self.host.has_power = False
        if self.process is not None:
            self.process.kill()
        self.environment.reboot()

    # --- what its disk does -------------------------------------------------------------------------------------------

    def _before_disk(self, call: str, path: Path) -> None:
        changes = call not in ("names", "pread", "open")
        if changes and self.disk.power_cut_at and self.disk.calls + 1 >= self.disk.power_cut_at and self.process:
            self.loop.note(f"{self.name}: the power is cut in {call} {path.name}")
            self.disk.power_cut_at = self.disk.calls + 1
            self.lose_power()
        if call != "sync":
            return
        self.environment.note_sync()
        if self.sync_fails:
            self.sync_fails, self.is_excused = False, True
            self.loop.note(f"{self.name}: the sync of {path.name} fails")
            self.disk.forget_dirty(path)
            raise OSError(errno.EIO, "Input/output error", str(path))

    def before_application(self) -> None:
        """To a file, for which there may be no room."""
        if self.disk.capacity is not None and self.rng.random() < 0.5:
            raise TryLater("the disk is full")
