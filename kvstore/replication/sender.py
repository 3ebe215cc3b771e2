"""A primary's shell: one store's records on their way to its copies, and what the copies' answers allow.

Owns: the state of `shipping` in one term, the newest records in memory, the requests that the controller was told of.
Promises: `on_committed` is called when the committed number has risen; what a copy that is waited for lacks is never
committed. Requests stand as long as their reason does: the controller is told of those that stand now.
Leaves to others: deciding, appending and syncing (`store.pipeline`), what the controller does with a request
(`failover`), the links (`links`), the lease (`held_lease`), connecting (shard).

    pipeline: append ─> `appended` ─> links send           sync ─> `synced` ─┐
                                        copies: `Ack` ──────────────────────┴─> committed ─> `on_committed`

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from kvstore import failpoints
from kvstore.replication import messages, patience, shipping
from kvstore.replication.configuration import Configuration, Request
from kvstore.replication.copy_link import Surroundings
from kvstore.replication.held_lease import HeldLease
from kvstore.replication.links import CopyLinks
from kvstore.replication.nearing import Nearing
from kvstore.replication.session import Session
from kvstore.replication.shipping import Link, LinkKey, Shipping
from kvstore.replication.stalls import Stalls
from kvstore.replication.tail import Tail
from kvstore.storage.segments import Entry

_TAIL_BYTES = 16 << 20
_STALL_SLACK_S = 0.05


class Sender:
    """The primary's side in the term of `state`, which `shipping.opened` gives. `run` must run beside all else."""

    def __init__(self, state: Shipping, surroundings: Surroundings) -> None:
        self.shipping = state
        self.tail = Tail(_TAIL_BYTES)
        self.links = CopyLinks(self, surroundings)
        self.lease = HeldLease(surroundings.times)
        self.stalls = Stalls(_STALL_SLACK_S)
        self._around = surroundings
        self._nearing = Nearing(self.tail, surroundings.times.failover_after_s, surroundings.environment.boottime_s())
        self._told: tuple[Request, ...] = ()

    async def run(self) -> None:
        """Watch how long the copies have owed answers, for ever."""
        environment, every_s = self._around.environment, self._around.times.replica_timeout_s / 8
        self.links.match(self.shipping.links)
        while True:
            now = environment.boottime_s()
            self.stalls.turns(now, now + every_s)
            self.stalls.look(now, self._around.syncs())
            await environment.sleep(every_s)
            now = environment.boottime_s()
            for link in shipping.awaited(self.shipping):
                at = self.links.by_key[link.key]
                if not (link.begun and at.is_streaming):
                    at.in_flight.patience = patience.owes(at.in_flight.patience, now)
            self._tell_news()

    async def close(self) -> None:
        """End all links."""
        await self.links.close()

    # --- what the store says

    def appended(self, entry: Entry) -> None:
        """The own log ends with that record, which is sent before it is synced."""
        self.shipping = shipping.appended(self.shipping, entry.number)
        self.tail.add(entry)
        self.links.wake()

    def synced(self, number: int) -> None:
        """The own log is durable up to that number. `stalls` is told when a sync begins; it ends with this."""
        self.stalls.sync_ends(self._around.environment.boottime_s())
        self._become(shipping.synced(self.shipping, number))

    def hear(self, config: Configuration) -> None:
        """A newer map has come; what it ends is over at once."""
        self._become(shipping.hear(self.shipping, config))
        self._match_links()

    def follow(self, config: Configuration, carried: int) -> None:
        """Follow a newer map, which the own record `carried` carries."""
        self._become(shipping.follow(self.shipping, config, carried))
        self._match_links()

    def _match_links(self) -> None:
        self.links.match(self.shipping.links)
        self._tell_news()

    def give_back(self) -> None:
        """Give the lease back for a planned change: nothing more is answered in this term.
        A copy that does not hear of it waits until it has run out."""
        self.lease.give_back()
        for link in self.links.by_key.values():
            self._around.environment.spawn(link.tell(messages.Returned()))

    @property
    def serves(self) -> bool:
        """Whether the term is open, and not given back."""
        return self.shipping.serves and not self.lease.grants.given_back

    def may_answer(self) -> bool:
        """Whether what no record of the store's own carries may be answered: to be asked behind the look at it."""
        return self.lease.until(self.shipping) > self._around.environment.boottime_s()

    # --- what the controller hears

    def requests(self) -> tuple[Request, ...]:
        """The requests that stand now."""
        now = self._around.environment.boottime_s()
        late = self.links.late(shipping.awaited(self.shipping), self.stalls, now)
        standing = shipping.requests(self.shipping, late)
        if failpoints.planted("time-out-ends-waiting"):
            for link in late:
                self.shipping = shipping.acked(self.shipping, link.session, self.shipping.last)
        return standing

    def controller_heard(self, *, decides: bool = True) -> None:
        """The controller has answered a beat.

        `decides`: it may change the map. Else it promotes no copy, so the lease goes on, and takes none out.
        """
        self.lease.needed_s = None
        if decides:
            now = self._around.environment.boottime_s()
            self._become(self._nearing.controller_heard(self.shipping, self.links.by_key, now))
        self._tell_news()

    def _tell_news(self) -> None:
        standing = self.requests()
        if not any(each.kind == "out" for each in standing):  # a copy that could be in sync holds nothing up
            self.lease.needed_s = None
        elif self.lease.needed_s is None:
            self.lease.needed_s = self._around.environment.boottime_s()
        if standing != self._told:
            self._told = standing
            self._around.on_news()

    # --- what the links ask and say

    def may_greet(self, key: LinkKey) -> bool:
        """Whether a session with that copy may be begun now."""
        link = self.shipping.link(*key)
        if link is None or not shipping.may_greet(self.shipping, link):
            return False
        return link.waited > 0 or self.links.may_join(link.node)

    def greet(self, key: LinkKey) -> Link:
        """The link with the next round's session. The copy is named."""
        link = self.shipping.link(*key)
        assert link is not None
        self.shipping = shipping.greet(self.shipping, link)
        self.lease.note_change()
        greeted = self.shipping.link(*key)
        assert greeted is not None
        return greeted

    def begin(self, named: Session, number: int) -> None:
        """The session has begun, with that much on the copy's disk.
        If that is all, the copy has nothing more to acknowledge by which it could be nearly there."""
        state = shipping.acked(self.shipping, named, number)
        link = shipping.find(state, named)
        if link is not None and link.acked == state.last:
            state = self._nearing.acked(state, link, 0, self._around.environment.boottime_s())
        self._become(state)

    def take_ack(self, named: Session, number: int, room_bytes: int) -> None:
        """The copy has all records up to that number on its disk.

        `room_bytes`: how many may be under way to it at once.
        """
        state = shipping.acked(self.shipping, named, number)
        link = shipping.find(state, named)
        if link is None:
            return
        now = self._around.environment.boottime_s()
        self._become(self._nearing.acked(state, link, room_bytes, now))
        if self._told or not link.in_sync:
            self._tell_news()

    def hear_promise(self, term: int) -> None:
        """Some copy has promised that term."""
        self._become(shipping.depose(self.shipping, term))

    def _become(self, state: Shipping) -> None:
        before, self.shipping = self.shipping, state
        if state.links is not before.links or state.serves != before.serves:
            self.lease.note_change()
        for link in state.links:
            if before.synced < link.named <= state.synced and (at := self.links.by_key.get(link.key)) is not None:
                at.wake.set()  # the map that names the copy is durable: it may be greeted
        if state.committed > before.committed:
            self._around.on_committed(state.committed)
        if state.deposed and not before.deposed:
            self._around.on_news()
