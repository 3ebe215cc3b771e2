"""The connections through the proxy: making them, and what a change of the faults means for each.

Owns: which there are, those that are just being made included.
Promises: a connection whose link is closed hangs until it is open, or the client gives up. One that a fault has taken
bytes from is reset once its link is open again.
Leaves to others: its bytes (`proxied`), which faults there are (`faults`), listening (`proxy`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from loadtest.cluster.faults import Faults, Route
from loadtest.cluster.proxied import Counts, End


class Connections:
    """`near`: the end of each that the client opened."""

    def __init__(self, faults: Faults, counts: Counts, random: Random) -> None:
        self.faults = faults
        self.counts = counts
        self.random = random
        self.near: set[End] = set()
        self._connecting: dict[End, asyncio.Task[None]] = {}
        self._opened = asyncio.Event()

    def begin(self, route: Route, word: bytes = b"", on_data: Callable[[bytes], None] | None = None) -> End:
        """The near end of a connection to be; its client is told `word` once the far end is connected."""
        near = End(self, route, on_data=on_data, on_open=lambda: self._connect(near, word))
        return near

    def _connect(self, near: End, word: bytes) -> None:
        """Make the connection's other half."""

        def opened() -> None:
            if word:
                near.write(word)
            near.deliver_due()

        near.other = far = End(self, near.route._replace(is_back=True), on_open=opened)
        far.other = near
        self.counts.connections += 1
        self.near.add(near)
        task = asyncio.get_running_loop().create_task(self._reach(near, far))
        self._connecting[near] = task
        task.add_done_callback(lambda _: self._reached(near))

    async def _reach(self, near: End, far: End) -> None:
        while self.faults.is_closed(near.route):
            await self._opened.wait()
        host, _, port = near.route.address.rpartition(":")
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, host, int(port))
        except (OSError, ValueError, OverflowError):  # refused, or an address that is none
            self.counts.refused += 1
            near.reset()

    def _reached(self, near: End) -> None:
        """Or not."""
        del self._connecting[near]
        if near.transport is None and near.other.transport is None:
            self.near.discard(near)

    def on_lost(self, end: End) -> None:
        """One of a connection's two sockets is gone."""
        near = end.other if end.route.is_back else end
        if near.transport is None:
            task = self._connecting.get(near)
            if task is not None:
                task.cancel()
            elif near.other.transport is None:
                self.near.discard(near)

    def note_change(self, source: str, destination: str) -> None:
        """The faults of this direction are others now."""
        for near in list(self.near):
            for end in (near, near.other):
                if self.faults.way(end.route) == (source, destination):
                    fault = self.faults.of(end.route)
                    if end.has_lost and (fault is None or not fault.is_closed):
                        self.counts.resets += 1
                        near.reset()
                    else:
                        end.set_reading()

    def note_healed(self) -> None:
        """Some link may be open that was not."""
        opened, self._opened = self._opened, asyncio.Event()
        opened.set()

    def reset(self, source: str, destination: str) -> int:
        """End all between the two at once, whichever side opened them; how many."""
        between = [near for near in self.near if set(self.faults.way(near.route)) == {source, destination}]
        for near in between:
            near.reset()
        self.counts.resets += len(between)
        return len(between)

    def reset_all(self) -> None:
        for near in list(self.near):
            near.reset()

    async def close(self) -> None:
        """Make no more."""
        connecting = list(self._connecting.values())
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
