"""The primary's side: which copies it waits for, what is durable, and what it asks the controller.

Owns: one `Link` for each copy of the configuration that the primary follows; the committed number; requests.
Promises: a record counts as durable once the primary's own sync and that of every copy that is waited for are done; the
committed number never falls. The primary never goes on with fewer copies because time passed: what a copy lacks stays
unanswered until the primary follows a map in which that very copy is out.
Leaves to others: how long a copy may take (`patience`), the lease (`lease`), the copy (`session`), sending (the shell).

    named ──greet, comparison──> begun ──wait_from w──> waited for ──all below w is on its disk──> request "in-sync"
      │                                                    │
      └ nothing is sent before the record that carries     └ from w on it is in sync in every respect, whether or not
        the map that names it is durable in the own log      the primary has heard of the grant
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from kvstore import failpoints
from kvstore.replication.configuration import Configuration, Replica, Request, RequestKind
from kvstore.replication.session import Session

LinkKey = tuple[str, int]
"""A copy's id and its joining number."""


class Link(NamedTuple):
    """One copy, as its primary sees it.

    `named`: the number of the primary's record that carries the map which names the copy. `begun`: the chains are
    compared, and the copy has cut off what differs. `acked`: on the copy's disk. `waited`: every batch from that number
    on waits for it; 0 as long as none does. `in_sync`: the followed map says so.
    """

    node: str
    session: Session
    named: int
    in_sync: bool
    begun: bool = False
    acked: int = 0
    waited: int = 0

    @property
    def key(self) -> LinkKey:
        """The copy's id and its joining number."""
        return self.session.copy_id, self.session.joined

    @property
    def holds_back(self) -> int | None:
        """Up to which number it lets records be durable; None: it holds back nothing."""
        return max(self.acked, self.waited - 1) if self.waited else None


class Shipping(NamedTuple):
    """A primary's state in one term. `opening`: the number of the record that opened the term.

    `heard`: the newest map that has come, which the own log may not carry yet.
    """

    node: str
    start: str
    config: Configuration
    opening: int
    last: int
    synced: int
    committed: int = 0
    links: tuple[Link, ...] = ()
    deposed: bool = False
    heard: Configuration | None = None

    @property
    def serves(self) -> bool:
        """Whether the term is open: every copy that is waited for has the record that opened it, and all before."""
        return not self.deposed and self.committed >= self.opening

    def link(self, copy_id: str, joined: int) -> Link | None:
        """The link to that very copy."""
        key = (copy_id, joined)
        return next((each for each in self.links if each.key == key), None)

    @property
    def waits(self) -> bool:
        """Whether what is appended now waits for a copy."""
        return any(link.waited for link in self.links)

    @property
    def behind(self) -> dict[str, int]:
        """How many records each copy lacks, by its id, as far as it has ever told."""
        known = (link for link in self.links if link.begun or link.waited)
        return {link.session.copy_id: self.last - link.acked for link in known}


def opened(config: Configuration, node: str, start: str, opening: int, synced: int) -> Shipping:
    """A primary's state once its log ends with the record that opens the term of `config`."""
    shipping = Shipping(node, start, config, opening, last=opening, synced=synced)
    links = tuple(_new_link(shipping, config, copy, named=opening) for copy in config.replicas)
    return _counted(shipping._replace(links=links))


def hear(shipping: Shipping, config: Configuration) -> Shipping:
    """The state once a newer map has come, before the own log carries it.
    Copies that are out in it count no more.

    Else the record of that map, or of one before it, would wait for the very copy that is out. What is new in the map
    has to wait for `follow`.
    """
    newest = shipping.heard or shipping.config
    if config.epoch <= newest.epoch or shipping.deposed:
        return shipping
    if config.term != shipping.config.term:
        return shipping._replace(heard=config, deposed=True)
    links = tuple(link for link in shipping.links if config.names(link.session.copy_id, link.session.joined))
    return _counted(shipping._replace(heard=config, links=links))


def follow(shipping: Shipping, config: Configuration, carried: int) -> Shipping:
    """The state once the primary follows a newer map, whose record in its own log has the number `carried`.

    A map with another primary, or another term, ends this one's: it takes no more writes, and answers nothing.
    """
    if config.epoch <= shipping.config.epoch or shipping.deposed:
        return shipping
    if config.term != shipping.config.term:
        return shipping._replace(config=config, deposed=True)
    links, heard = [], shipping.heard or config
    for copy in config.replicas:
        if heard.epoch > config.epoch and not heard.names(copy.copy_id, copy.joined):
            continue  # it is out already
        link = shipping.link(copy.copy_id, copy.joined)
        if link is None:
            links.append(_new_link(shipping, config, copy, named=carried))
        elif copy.state == "in-sync":
            links.append(link._replace(in_sync=True, waited=link.waited or 1))
        else:
            links.append(link)
    return _counted(shipping._replace(config=config, links=tuple(links)))


def depose(shipping: Shipping, term: int) -> Shipping:
    """The state once the primary has heard that a copy, or its own folder, has promised that term."""
    return shipping._replace(deposed=True) if term > shipping.config.term else shipping


def appended(shipping: Shipping, number: int) -> Shipping:
    """The state once the own log ends with record `number`."""
    return shipping._replace(last=number)


def synced(shipping: Shipping, number: int) -> Shipping:
    """The state once the own log is durable up to `number`."""
    return _counted(shipping._replace(synced=max(shipping.synced, number)))


def acked(shipping: Shipping, session: Session, number: int) -> Shipping:
    """The state after an acknowledgement, the first of which begins the session; of another one it is thrown away."""
    link = find(shipping, session)
    if link is None or not session.round or shipping.deposed:
        return shipping
    acked = max(link.acked, min(number, shipping.last))
    return _counted(_with(shipping, link._replace(begun=True, acked=acked)))


def greet(shipping: Shipping, link: Link) -> Shipping:
    """The state once the copy is greeted, again after each lost connection: a session with the next round.

    It begins with the first acknowledgement, which is the copy's answer to Begin. A copy that is not waited for may
    have been told to begin with an empty log, so what it acknowledged before counts no more.
    """
    session = link.session._replace(round=link.session.round + 1)
    greeted = link._replace(session=session, begun=False, acked=link.acked if link.waited else 0)
    return shipping._replace(links=tuple(greeted if each == link else each for each in shipping.links))


def wait_from(shipping: Shipping, session: Session) -> Shipping:
    """The state in which every batch to come waits for that copy, too: it is nearly there."""
    link = find(shipping, session)
    if link is None or link.waited or not link.begun:
        return shipping
    return _with(shipping, link._replace(waited=shipping.last + 1))


def is_nearly_there(shipping: Shipping, link: Link, lag_max: int) -> bool:
    """Whether it is time for `wait_from`: the copy lacks few records, so that few batches wait for it for long."""
    return link.begun and not link.waited and shipping.last - link.acked <= lag_max


def find(shipping: Shipping, session: Session) -> Link | None:
    """The link whose session is exactly this one."""
    return next((link for link in shipping.links if link.session == session), None)


def link_on(shipping: Shipping, node: str) -> Link | None:
    """The link to the copy on that node."""
    return next((link for link in shipping.links if link.node == node), None)


def may_send(shipping: Shipping, link: Link) -> bool:
    """Whether records, snapshots and beacons may be sent to the copy.

    Before the map that names it is durable here, a restart of this store without the controller would serve alone.
    """
    return link.begun and shipping.synced >= link.named and not shipping.deposed


def may_greet(shipping: Shipping, link: Link) -> bool:
    """Whether a session with the copy may be begun."""
    return shipping.synced >= link.named and not shipping.deposed


def awaited(shipping: Shipping) -> tuple[Link, ...]:
    """The copies whose disk and whose lease the primary needs."""
    return tuple(link for link in shipping.links if link.waited)


def requests(shipping: Shipping, late: Collection[Link]) -> tuple[Request, ...]:
    """What the controller is asked for: to take out copies that are late, to count others as in sync."""
    asked = (
        request_out(shipping, link) if link in late else request_in_sync(shipping, link) for link in shipping.links
    )
    return tuple(each for each in asked if each is not None)


def request_in_sync(shipping: Shipping, link: Link) -> Request | None:
    """The request to count the copy as in sync.
    It is waited for, and has everything before that on its disk."""
    is_there = link.acked >= link.waited - 1 or failpoints.planted("in-sync-too-early")
    if link.in_sync or not link.waited or not is_there or shipping.deposed:
        return None
    return _request(shipping, link, "in-sync")


def request_out(shipping: Shipping, link: Link) -> Request | None:
    """The request to take out a copy that is waited for.
    Until a map without it is followed nothing changes here."""
    return _request(shipping, link, "out") if link.waited and not shipping.deposed else None


def _request(shipping: Shipping, link: Link, kind: RequestKind) -> Request:
    config, session = shipping.config, link.session
    return Request(kind, config.shard, config.term, config.primary.copy_id, session.copy_id, session.joined)


def _new_link(shipping: Shipping, config: Configuration, copy: Replica, named: int) -> Link:
    session = Session(config.store_id, config.term, shipping.start, copy.copy_id, copy.joined)
    in_sync = copy.state == "in-sync"
    return Link(copy.node, session, named, in_sync, waited=int(in_sync))


def _with(shipping: Shipping, link: Link) -> Shipping:
    return shipping._replace(links=tuple(link if each.session == link.session else each for each in shipping.links))


def _counted(shipping: Shipping) -> Shipping:
    """With the committed number that follows from the syncs; it never falls when the set grows."""
    held = [held for link in shipping.links if (held := link.holds_back) is not None]
    if failpoints.planted("answer-before-copies"):
        held = []
    return shipping._replace(committed=max(shipping.committed, min([shipping.synced, *held])))
