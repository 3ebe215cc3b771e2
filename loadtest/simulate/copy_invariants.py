"""What must hold of stores that lie on several nodes, after each event of a node that has a copy.

Owns: `CopyInvariants`, `PrimaryInvariants`, what a copy in sync has, what a copy that opens a term has granted.
Promises: looks at more than numbers only when something has changed that bears on it.
Leaves to others: whose event it was (`cluster`), what holds of each store by itself (`store_invariants`).
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.placement.cluster_map import Replica, Shard
from kvstore.placement.map_format import decode_map
from kvstore.replication import shipping as rules
from kvstore.replication.copy import StoreCopy
from kvstore.replication.promise import Identity
from kvstore.replication.session import Following
from kvstore.replication.shipping import Shipping
from kvstore.shard.resident import Resident
from kvstore.storage.engine import Engine
from kvstore.storage.segments import Position
from kvstore.store.store import Store
from loadtest.simulate.engine import SimulatedEngine
from loadtest.simulate.held_rows import differences, held
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.view import View


class _Seen(NamedTuple):
    """A copy, and where its file was."""

    copy: StoreCopy
    engine: Engine
    identity: Identity
    following: Following
    position: Position
    applications: int


class CopyInvariants:
    """What was seen of copies so far, by their ids."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._seen: dict[str, _Seen] = {}  # when it was looked at last
        self._filling: dict[str, None] = {}  # those that get a snapshot
        self._promised: dict[str, int] = {}

    def put_back(self, copy_id: str) -> None:
        """It has files of another time from now on."""
        self._promised.pop(copy_id, None)

    def check(self, shard_id: str, copy: StoreCopy) -> None:
        """Raises Violation."""
        engine, identity = copy.engine, copy.identity
        assert isinstance(engine, SimulatedEngine)
        copy_id = identity.copy_id
        now = _Seen(copy, engine, identity, copy.following, engine.applied.position, engine.applications)
        before = self._seen.get(copy_id)
        if now == before:
            return
        self._seen[copy_id] = now
        if identity.filling:
            self._filling[copy_id] = None
        elif self._filling.pop(copy_id, self) is None:
            self._check_filled(shard_id, copy)
        if before is not None and before.engine is engine:
            _check_file(shard_id, before, now)
        promised, session = now.following.promised, now.following.session
        if promised < self._promised.get(copy_id, 0):
            raise Violation(f"copy {copy_id} of {shard_id} has promised {self._promised[copy_id]}, and now {promised}")
        self._promised[copy_id] = promised
        if session is not None and session.term != promised:
            raise Violation(f"copy {copy_id} of {shard_id} follows term {session.term}, promised {promised}")

    def _check_filled(self, shard_id: str, copy: StoreCopy) -> None:
        """A snapshot has become good: the copy has the rows of its primary, as of a record that both have.
        None of its rows is newer than the last record that it has applied, but for those that a move brings."""
        engine = copy.engine
        assert isinstance(engine, SimulatedEngine)
        followed = decode_map(engine.applied.cluster_map) if engine.applied.cluster_map is not None else None
        owned = followed.owned_by(shard_id) if followed is not None else ()
        newest = max((row.version for row in engine._all() if row.partition in owned), default=0)
        if newest > engine.applied.clock.version:
            raise Violation(
                f"the copy {copy.identity.copy_id} of {shard_id} is filled, and has rows up to version {newest}, which "
                f"are newer than record {engine.applied.position.number}"
            )
        named, primary = copy.following.session, self._view.primary(shard_id)
        tables = primary.tables if primary is not None else None
        if named is None or tables is None or tables.sender is None or tables.sender.shipping.start != named.start:
            return
        number = min(copy.log.last.number, tables.log.last.number)
        if number < max(copy.engine.applied.position.number, tables.engine.applied.position.number):
            return
        if wrong := differences(held(tables.engine, tables.log, number), held(copy.engine, copy.log, number)):
            raise Violation(
                f"the copy {copy.identity.copy_id} of {shard_id} is filled, and has, as of {number}, {wrong}"
            )


def _check_file(shard_id: str, before: _Seen, now: _Seen) -> None:
    """In one session, the file of a copy goes from record to record, and never back.
    Once it is whole, nothing but records changes it.

    Raises Violation.
    """
    named = f"copy {now.identity.copy_id} of {shard_id}"
    number, session = now.position.number, now.following.session
    is_whole = before.copy is now.copy and not before.identity.filling and not now.identity.filling
    if is_whole and now.applications != before.applications and now.position == before.position:
        raise Violation(f"rows of {named} were changed by no record behind {number}")
    if session is not None and before.following.session is session and number < before.position.number:
        raise Violation(f"the file of {named} went from record {before.position.number} back to {number}")


class PrimaryInvariants:
    """What was seen of stores that have copies so far, by the primary's own copy."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._shipping: dict[str, Shipping] = {}  # that was looked at last
        self._granted: dict[str, object] = {}

    def check(self, shard_id: str, store: Store) -> None:
        """Raises Violation."""
        sender, copy_id = store.tables.sender, store.copy_id
        assert sender is not None
        if store.tables.stats.copies_differed or store.replicas.comparison.disputed:
            raise Violation(f"rows of {shard_id} are not the same in its copies, as of one record")
        shipping = sender.shipping
        before, self._shipping[copy_id] = self._shipping.get(copy_id), shipping
        is_news = before is None or shipping.committed != before.committed
        if is_news and store.applier.visible > shipping.committed:
            raise Violation(f"record {store.applier.visible} of {shard_id} is visible, not committed")
        is_asked = shipping is not before and rules.requests(shipping, ())
        is_due = (is_news or is_asked) and not self._view.is_behind
        if is_due and (shard := self._view.shard(shard_id)) is not None:
            check_in_sync(self._view, shard)
        if sender.lease.grants is not self._granted.get(copy_id):
            self._granted[copy_id] = sender.lease.grants
            opening = _opened_beside(self._view, shard_id, store.identity.store_id, shipping.config.term)
            if opening and store.tables.may_answer():
                raise Violation(f"{shard_id} may be answered in term {shipping.config.term} while {opening}")


def check_in_sync(view: View, shard: Shard) -> None:
    """Each copy in sync has all that is committed in this term, as far as processes can be asked.
    One that the controller is asked to count as in sync, which its map may do from now on, has all that may be
    committed without it.

    Raises Violation.
    """
    primary = view.store(shard.primary.node, shard.id)
    sender = primary.tables.sender if primary is not None else None
    if sender is None or (sender.shipping.config.term, sender.shipping.config.store_id) != (shard.term, shard.store_id):
        return
    shipping = sender.shipping
    asked = [shipping.link(each.copy_id, each.joined) for each in rules.requests(shipping, ())]
    needed = {link.key: link.waited - 1 for link in asked if link is not None}
    for replica in shard.replicas:
        number = needed.get((replica.copy_id, replica.joined), 0)
        if number or replica.state == "in-sync":
            _check_has(view, shard, replica, max(number, shipping.committed))


def _check_has(view: View, shard: Shard, replica: Replica, number: int) -> None:
    copy = view.copy(replica.node, shard.id)
    if copy is None or copy.following.copy_id != replica.copy_id or copy.following.promised > shard.term:
        return
    if copy.log.synced.number < number:
        raise Violation(
            f"the copy of {shard.id} on {replica.node}, {replica.state}, is in sync or asked for as in sync with "
            f"{copy.log.synced.number} of {number} committed records on its disk"
        )


def check_opening(view: View, shard_id: str, shipping: Shipping) -> None:
    """No copy in sync that has promised the term has an older record that the term is without.

    Raises Violation.
    """
    term = shipping.config.term
    for replica in shipping.config.in_sync:
        copy = view.copy(replica.node, shard_id)
        if copy is None or (copy.following.copy_id, copy.following.promised) != (replica.copy_id, term):
            continue
        last = copy.log.last
        if last.number >= shipping.opening and last.term < term:
            raise Violation(
                f"term {term} of {shard_id} is opened by record {shipping.opening}, and the copy in sync on"
                f" {replica.node} has record {last.number} of term {last.term}"
            )


def check_opener(view: View, shard_id: str, resident: Resident, copy: StoreCopy) -> None:
    """A copy that has promised the term that it opens: all that it had granted has run out.
    No primary of a lower term may answer beside it.

    Raises Violation.
    """
    config = resident._opening.config if resident._opening is not None else None
    if config is None or copy.following.promised != config.term:
        return
    if not copy.lease.may_be_promoted():
        who = f"copy {copy.identity.copy_id} of {shard_id}"
        raise Violation(f"{who} opens term {config.term}, and what it has granted lasts")
    for name in view.nodes:
        store = view.store(name, shard_id)
        sender = store.tables.sender if store is not None else None
        if store is None or sender is None or store.identity.store_id != config.store_id:
            continue
        if sender.shipping.config.term < config.term and store.tables.may_answer():
            raise Violation(
                f"{shard_id} is opened in term {config.term}, and may be answered in term "
                f"{sender.shipping.config.term} on {name}"
            )


def _opened_beside(view: View, shard_id: str, store_id: str, term: int) -> str:
    """Which node opens that store in a higher term."""
    for name in view.nodes:
        resident = view.resident(name, shard_id)
        config = resident._opening.config if resident is not None and resident._opening is not None else None
        copy = resident.local.copy if resident is not None else None
        if config is None or copy is None or config.store_id != store_id:
            continue
        if term < config.term == copy.following.promised:
            return f"{name} opens term {config.term}"
    return ""
