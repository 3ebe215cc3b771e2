"""What happens to a simulated machine, from the seed: crashes, power cuts, disks that fail, stall and run full, clocks.

Owns: the kinds of faults and when they come; the restart after each crash.
Promises: everything is drawn from the machine's random numbers; `heal` ends all faults.
Leaves to others: what a fault does (`machine`, `store_machine`, `disk`, `loop`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kvstore.errors import KvError
from kvstore.store.store import Store
from loadtest.simulate.disk import any_fate
from loadtest.simulate.environment import SYNC_S
from loadtest.simulate.loop import Process
from loadtest.simulate.machine import PARTITIONS
from loadtest.simulate.store_machine import Lost, StoreMachine
from loadtest.simulate.store_mover import Mover

POINTS = (
    "batch-before-commit", "batch-after-commit",
    *(
        f"{step}-{side}-commit"
        for step in ("transact", "prepare", "decide", "finish", "abort", "ask", "forget", "adopt", "freeze")
        for side in ("before", "after")
    ),
)  # fmt: skip


class Faults:
    """One kind after another, with a pause between them."""

    def __init__(self, machine: StoreMachine) -> None:
        self._machine = machine
        self._rng = machine.rng
        self._ending = False
        self.mover: asyncio.Task[None] | None = None
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "killed between two events": self._kill,
            "killed at a failpoint": self._kill_at_point,
            "power cut in a call of the disk": self._cut_in_call,
            "power cut between two events": self._cut,
            "stood still": self._stand_still,
            "sync failed": self._fail_sync,
            "slow disk": self._slow,
            "disk full": self._fill,
            "wall clock jumped": self._jump,
            "move begun": self._move,
            "orderly restart": self._close,
        }

    async def run(self) -> None:
        """Until `heal`; what has begun comes to its end. Raises what a move finds."""
        while True:
            await asyncio.sleep(self._rng.expovariate(1.0))
            await self._machine.serving.wait()
            if self.mover is not None and (self._ending or self.mover.done()):
                await self.mover
            if self._ending:
                return
            kind = self._rng.choice(list(self.kinds))
            self._machine.loop.note(f"fault: {kind}")
            if kind != "killed at a failpoint":
                self._machine.faults[kind] += 1
            await self.kinds[kind]()

    async def restart(self) -> None:
        """Start the process whenever it has gone. For ever."""
        machine, rng = self._machine, self._rng
        while True:
            await machine.gone.wait()
            if not machine.host.has_power or rng.random() < 0.4:
                fate = any_fate(rng)
                machine.loop.note("the power is off")
                machine.restart(fate)
            await asyncio.sleep(rng.uniform(0.01, 0.5))
            machine.start()

    def heal(self) -> None:
        """From now on there are no faults."""
        machine = self._machine
        self._ending = True
        machine.disk.capacity = None
        machine.disk.power_cut_at = 0
        machine.kill_points.kill_at.clear()
        machine.sync_fails = False
        machine.environment.sync_s = SYNC_S
        if machine.process is not None:
            machine.process.dies_after = None
            machine.loop.go_on(machine.process)

    async def _kill(self) -> None:
        if self._machine.process is not None:
            self._machine.process.dies_after = self._rng.randrange(400)

    async def _kill_at_point(self) -> None:
        self._machine.kill_points.kill_at = {self._rng.choice(POINTS): self._rng.randint(1, 3)}

    async def _cut_in_call(self) -> None:
        self._machine.disk.power_cut_at = self._machine.disk.calls + self._rng.randint(1, 40)

    async def _cut(self) -> None:
        self._machine.lose_power()

    async def _stand_still(self) -> None:
        process = self._machine.process
        if process is not None:
            process.stands_still = True
            await asyncio.sleep(self._rng.choice((0.05, 0.5, 5.0)) * self._rng.random())
            self._machine.loop.go_on(process)

    async def _fail_sync(self) -> None:
        self._machine.sync_fails = True

    async def _slow(self) -> None:
        """Syncs take long; at the end, often, the power is cut while one or two of them are under way."""
        environment = self._machine.environment
        environment.sync_s = self._rng.choice((0.005, 0.02, 0.1, 0.3))
        await asyncio.sleep(self._rng.uniform(0.1, 3.0))
        if self._rng.random() < 0.5:
            await self._cut()
        environment.sync_s = SYNC_S

    async def _fill(self) -> None:
        disk = self._machine.disk
        disk.capacity = disk.used_bytes + self._rng.choice((0, 1000, 150_000, 250_000, 500_000))
        await asyncio.sleep(self._rng.uniform(0.1, 3.0))
        disk.capacity = None

    async def _jump(self) -> None:
        self._machine.environment.jump(self._rng.randrange(-30_000, 30_000))

    async def _move(self) -> None:
        """Others go on during that time; one at a time."""
        if self.mover is None or self.mover.done():
            partitions = sorted(self._rng.sample(range(PARTITIONS), self._rng.choice((1, 16, PARTITIONS))))
            mover = Mover(self._machine, self._rng)
            self.mover = self._machine.loop.create_task(mover.run(partitions))

    async def _close(self) -> None:
        machine = self._machine
        closed: list[Process] = []

        async def close(store: Store) -> None:
            if machine.process is not None:
                closed.append(machine.process)
            await store.close()

        try:
            await machine.call(close)
        except (Lost, KvError) as error:
            machine.loop.note(f"it did not end in order: {error!r}")
        for process in closed:
            process.kill()
