"""A primary's shell: one store's records on their way to its copies, and what the copies' answers allow.

Owns: the state of `shipping` in one term, a link for each copy, the grants of the lease, the newest records in memory.
Promises: `on_committed` is called when the committed number has risen; what a copy that is waited for lacks is never
committed. Requests stand as long as their reason does: the controller is told of those that stand now.
Leaves to others: deciding, appending and syncing (`store.pipeline`), what the controller does with a request
(`failover`), connecting (shard).

    pipeline: append ─> `appended` ─> links send           sync ─> `synced` ─┐
                                        copies: `Ack` ──────────────────────┴─> committed ─> `on_committed`

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from kvstore import failpoints
from kvstore.replication import lease, patience, shipping
from kvstore.replication.configuration import Configuration, Request
from kvstore.replication.copy_link import CopyLink, LinkKey, Surroundings
from kvstore.replication.session import Session
from kvstore.replication.shipping import Link, Shipping
from kvstore.replication.tail import Tail
from kvstore.storage.segments import Entry

_TAIL_BYTES = 16 << 20
_LAG_MAX = 64  # records that a joining copy may lack when the primary begins to wait for it
_STALL_SLACK_S = 0.05
_PAUSE_MIN_S, _PAUSE_MAX_S = 1.0, 30.0


class Sender:
    """The primary's side in the term of `state`, which `shipping.opened` gives. `run` must run beside all else."""

    def __init__(self, state: Shipping, surroundings: Surroundings) -> None:
        self.shipping = state
        self.tail = Tail(_TAIL_BYTES)
        self._around = surroundings
        self._links: dict[LinkKey, CopyLink] = {}
        self._tasks: dict[LinkKey, asyncio.Task[None]] = {}
        self._retries: dict[str, patience.Retry] = {}
        self._grants = lease.Grants()
        self._lease_until: float | None = None  # None: to be computed again
        self._controller_needed_s: float | None = None
        self._told: tuple[Request, ...] = ()

    async def run(self) -> None:
        """Watch how long the copies have owed answers, for ever."""
        environment, every_s = self._around.environment, self._around.times.replica_timeout_s / 8
        self._open_links()
        while True:
            expected_s = environment.boottime_s() + every_s
            await environment.sleep(every_s)
            now = environment.boottime_s()
            self.stood_still(patience.stall(expected_s, now, _STALL_SLACK_S))
            for link in shipping.awaited(self.shipping):
                at = self._links[_key(link)]
                if not (link.begun and at.is_streaming):
                    at.patience = patience.owes(at.patience, now)
            self._tell_news()

    async def close(self) -> None:
        """End all links."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what the store says

    def appended(self, entry: Entry) -> None:
        """The own log ends with that record, which is sent before it is synced."""
        self.shipping = shipping.appended(self.shipping, entry.number)
        self.tail.add(entry)
        for link in self._links.values():
            link.wake.set()

    def synced(self, number: int, seconds: float = 0.0) -> None:
        """The own log is durable up to that number. `seconds`: how long the sync took in a thread."""
        if seconds > _STALL_SLACK_S:
            self.stood_still(seconds)
        self._become(shipping.synced(self.shipping, number))

    def stood_still(self, seconds: float) -> None:
        """The primary's own loop or disk stood still for that long: no copy is to blame."""
        if seconds > 0:
            for link in self._links.values():
                link.patience = patience.stood_still(link.patience, seconds)

    def hear(self, config: Configuration) -> None:
        """A newer map has come; what it ends is over at once."""
        self._become(shipping.hear(self.shipping, config))
        self._match_links()

    def follow(self, config: Configuration, carried: int) -> None:
        """Follow a newer map, which the own record `carried` carries."""
        self._become(shipping.follow(self.shipping, config, carried))
        self._match_links()

    def _match_links(self) -> None:
        there = {_key(link) for link in self.shipping.links}
        for key in [key for key in self._links if key not in there]:
            self._tasks.pop(key).cancel()
            gone = self._links.pop(key)
            if any(link.node == gone.node for link in self.shipping.links):
                self._note_fall(gone)
        self._open_links()
        self._tell_news()

    def give_back(self) -> None:
        """Give the lease back for a planned change: nothing more is answered in this term."""
        self._grants = lease.give_back(self._grants)
        self._lease_until = None
        for link in self._links.values():
            self._around.environment.spawn(link.tell_returned())

    @property
    def grants(self) -> lease.Grants:
        """What it holds of the lease."""
        return self._grants

    @property
    def serves(self) -> bool:
        """Whether the term is open, and not given back."""
        return self.shipping.serves and not self._grants.given_back

    def may_answer(self) -> bool:
        """Whether what no record of the store's own carries may be answered: to be asked behind the look at it."""
        if self._lease_until is None:
            awaited = [link.session for link in shipping.awaited(self.shipping)]
            self._lease_until = lease.until(self._grants, awaited) if self.serves else float("-inf")
        return self._lease_until > self._around.environment.boottime_s()

    @property
    def waits(self) -> bool:
        """Whether what is appended now waits for a copy."""
        return any(link.waited for link in self.shipping.links)

    # --- what the controller hears

    def requests(self) -> tuple[Request, ...]:
        """Those that stand now."""
        return tuple(self._standing(self._around.environment.boottime_s()))

    def _standing(self, now: float) -> Iterator[Request]:
        timeout_s = self._around.times.replica_timeout_s
        for link in self.shipping.links:
            at = self._links.get(_key(link))
            if at is not None and patience.is_over(at.patience, now, timeout_s):
                asked = shipping.request_out(self.shipping, link)
                if failpoints.planted("time-out-ends-waiting"):
                    self.shipping = shipping.acked(self.shipping, link.session, self.shipping.last)
            else:
                asked = shipping.request_in_sync(self.shipping, link)
            if asked is not None:
                yield asked

    def controller_heard(self) -> None:
        """The controller has answered a beat."""
        self._controller_needed_s = None
        self._tell_news()

    def behind(self) -> dict[str, int]:
        """How many records each copy lacks, by its id."""
        return {link.session.copy_id: self.shipping.last - link.acked for link in self.shipping.links}

    def snapshots(self) -> dict[str, tuple[int, int]]:
        """Of each that is under way: rows sent, and rows there are."""
        return {key[0]: found for key, link in self._links.items() if (found := link.progress) is not None}

    @property
    def keeps(self) -> int | None:
        """Records behind that number are needed by copies that join; None without one."""
        needed = []
        for key, at in self._links.items():
            link = self.link(key)
            if link is not None and at.keeps is not None and (not link.waited or link.acked < link.waited - 1):
                needed.append(max(at.keeps, link.acked))
        return min(needed, default=None)

    def _tell_news(self) -> None:
        now = self._around.environment.boottime_s()
        standing = tuple(self._standing(now))
        if standing and self._controller_needed_s is None:
            self._controller_needed_s = now
        elif not standing:
            self._controller_needed_s = None
        if standing != self._told:
            self._told = standing
            self._around.on_news()

    def in_sync_links(self) -> list[CopyLink]:
        """Those to copies in sync which are connected."""
        streaming = {link for link in self.shipping.links if link.in_sync and link.begun}
        return [
            at for link in self.shipping.links if link in streaming and (at := self._links[_key(link)]).is_streaming
        ]

    # --- what the links ask and say

    def link(self, key: LinkKey) -> Link | None:
        """The state of that link; None once the copy is out."""
        return self.shipping.link(*key)

    def may_greet(self, key: LinkKey) -> bool:
        """Whether a session with that copy may be begun now."""
        link = self.link(key)
        if link is None or not shipping.may_greet(self.shipping, link):
            return False
        retry = self._retries.get(link.node)
        return retry is None or link.waited > 0 or patience.may_join(retry, self._around.environment.boottime_s())

    def greet(self, key: LinkKey) -> Link:
        """The link with the next round's session. The copy is named."""
        link = self.link(key)
        assert link is not None
        self.shipping = shipping.greet(self.shipping, link)
        self._lease_until = None
        greeted = self.link(key)
        assert greeted is not None
        return greeted

    def may_ask(self) -> bool:
        """Whether beacons may be sent: not once the controller was needed for long in vain, nor the lease given back,
        since each answer would keep the copy that is to take over from it for `lease_s` more."""
        if self._grants.given_back:
            return False
        times = self._around.times
        return lease.may_ask(self._controller_needed_s, self._around.environment.boottime_s(), times.failover_after_s)

    def begin(self, named: Session, number: int) -> None:
        """The session has begun, with that much on the copy's disk."""
        self._become(shipping.acked(self.shipping, named, number))

    def take_ack(self, named: Session, number: int) -> None:
        """The copy has all records up to that number on its disk."""
        state = shipping.acked(self.shipping, named, number)
        link = shipping.find(state, named)
        if link is None:
            return
        if shipping.is_nearly_there(state, link, _LAG_MAX) and self._lacks_few_bytes(link):
            state = shipping.wait_from(state, named)
        self._become(state)
        if self._told or not link.in_sync:
            self._tell_news()

    def _lacks_few_bytes(self, link: Link) -> bool:
        """What comes waits until the copy has all before it: that must not take long."""
        at, last = self._links[_key(link)], self.shipping.last
        lacking = self.tail.after(link.acked, at.room_bytes)
        return link.acked >= last or (bool(lacking) and lacking[-1].number >= last)

    def take_grant(self, named: Session, asked_s: float) -> None:
        """The copy grants the lease, counted from when it was asked."""
        if shipping.find(self.shipping, named) is not None:
            self._grants = lease.held(self._grants, named, asked_s, self._around.times.lease_s)
            self._lease_until = None

    def hear_promise(self, term: int) -> None:
        """Some copy has promised that term."""
        self._become(shipping.depose(self.shipping, term))

    def _become(self, state: Shipping) -> None:
        before, self.shipping = self.shipping, state
        if state.links is not before.links or state.serves != before.serves:
            self._lease_until = None
        for link in state.links:
            if before.synced < link.named <= state.synced and (at := self._links.get(_key(link))) is not None:
                at.wake.set()  # the map that names the copy is durable: it may be greeted
        if state.committed > before.committed:
            self._around.on_committed(state.committed)
        if state.deposed and not before.deposed:
            self._around.on_news()

    def _open_links(self) -> None:
        for link in self.shipping.links:
            if (key := _key(link)) not in self._links:
                self._links[key] = copy_link = CopyLink(self, self._around, link.node, *key)
                self._tasks[key] = self._around.environment.spawn(copy_link.run())

    def _note_fall(self, gone: CopyLink) -> None:
        retry = self._retries.get(gone.node, patience.Retry())
        now = self._around.environment.boottime_s()
        if gone.is_streaming:
            self._retries[gone.node] = patience.fell_out(retry, now, _PAUSE_MIN_S, _PAUSE_MAX_S)
        else:
            self._retries[gone.node] = patience.lost(retry, now, _PAUSE_MIN_S)


def _key(link: Link) -> LinkKey:
    return link.session.copy_id, link.session.joined
