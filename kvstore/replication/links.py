"""A primary's links: one for each copy that it ships to, each with its task.

Owns: which links there are, and when a copy that fell out may join again.
Promises: a link ends in the turn of the loop in which its copy is out.
Leaves to others: the state of each copy (`shipping`), the connection to it (`copy_link`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.replication import patience
from kvstore.replication.copy_link import CopyLink, Primary, Surroundings
from kvstore.replication.shipping import Link, LinkKey, Shipping
from kvstore.replication.stalls import Stalls

_PAUSE_MIN_S, _PAUSE_MAX_S = 1.0, 30.0


class CopyLinks:
    """`retries`: by node, when a copy on it may join again.

    A copy that was connected, owed an answer for too long and fell out comes with a new link, in a later map. One whose
    node was gone holds nothing up until it is reached again, and one that was taken out for another reason owed
    nothing: both are greeted at once.
    """

    def __init__(self, primary: Primary, around: Surroundings) -> None:
        self.by_key: dict[LinkKey, CopyLink] = {}
        self.retries: dict[str, patience.Retry] = {}
        self._primary = primary
        self._around = around
        self._tasks: dict[LinkKey, asyncio.Task[None]] = {}
        self._limped: set[LinkKey] = set()  # the links to copies that were late though they were connected

    def match(self, links: Sequence[Link]) -> None:
        """End the links to copies that are out, and begin those that are new."""
        there = {link.key for link in links}
        for key in [key for key in self.by_key if key not in there]:
            self._tasks.pop(key).cancel()
            gone = self.by_key.pop(key)
            if key in self._limped:
                self._limped.remove(key)
                self._note_fall(gone.node)
        for link in links:
            if link.key not in self.by_key:
                self.by_key[link.key] = copy_link = CopyLink(self._primary, self._around, link.node, *link.key)
                self._tasks[link.key] = self._around.environment.spawn(copy_link.run())

    def _note_fall(self, node: str) -> None:
        retry, now = self.retries.get(node, patience.Retry()), self._around.environment.boottime_s()
        self.retries[node] = patience.fell_out(retry, now, _PAUSE_MIN_S, _PAUSE_MAX_S)

    async def close(self) -> None:
        """End all of them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """A record is appended, which is sent before it is synced."""
        for link in self.by_key.values():
            link.wake.set()

    def late(self, awaited: Sequence[Link], stalls: Stalls, now: float) -> list[Link]:
        """Those of the copies that are waited for which have owed an answer for too long.
        Time in which the primary itself stood still does not count."""
        timeout_s = self._around.times.replica_timeout_s
        found = [(link, self.by_key[link.key]) for link in awaited if link.key in self.by_key]
        late = [(link, at) for link, at in found if patience.is_over(at.in_flight.patience, stalls, now, timeout_s)]
        self._limped.update(link.key for link, at in late if at.is_streaming)
        return [link for link, _ in late]

    def in_sync(self, links: Sequence[Link]) -> list[CopyLink]:
        """Those to copies in sync which are connected."""
        begun = [self.by_key[link.key] for link in links if link.in_sync and link.begun]
        return [at for at in begun if at.is_streaming]

    def may_join(self, node: str) -> bool:
        """Whether a copy on that node which nothing waits for may be tried again."""
        retry = self.retries.get(node)
        return retry is None or patience.may_join(retry, self._around.environment.boottime_s())

    def snapshots(self) -> dict[str, tuple[int, int]]:
        """By copy id, of each snapshot that is under way: rows sent, and rows there are."""
        return {key[0]: found for key, link in self.by_key.items() if (found := link.progress) is not None}

    def behind(self, state: Shipping) -> dict[str, int]:
        """By copy id, how many records each copy lacks, as far as it has ever told.
        Of one that a snapshot has filled and that acknowledges nothing yet: how many were not sent, one at least."""
        unsent = {key[0]: max(1, state.last - link.in_flight.sent) for key, link in self.by_key.items() if link.fills}
        return {copy: unsent.get(copy, lacks) for copy, lacks in state.behind.items()}

    @property
    def keeps(self) -> int | None:
        """Records behind that number are needed by copies that join; None without one."""
        return min((needs for link in self.by_key.values() if (needs := link.needs) is not None), default=None)
