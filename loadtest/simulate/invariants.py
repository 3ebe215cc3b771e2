"""What must hold after each event of a simulated cluster, as far as that is cheap to look at.

Owns: what was seen of stores, copies and maps so far, and what contradicts it.
Promises: looks at more than numbers only when something has changed that bears on it.
Leaves to others: whose event it was (`cluster`), what clients see (`loadtest.histories`).

    a store        applied <= visible <= durable, visible <= committed; versions, sequences, floors never fall
    partitions     one owner that may answer; a store is served in a term by one process of one copy
    copies         have promised what they follow, and never less than before; a snapshot ends with the primary's rows
    configuration  terms rise; only a copy in sync is promoted; each one in sync has on disk all that is committed;
                   a term begins with all records of each copy in sync; a recovered map knows each term that was served
    lease          while another copy opens a higher term, no primary may answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvstore.placement.cluster_map import ClusterMap, Shard
from kvstore.replication.copy import StoreCopy
from kvstore.replication.shipping import Shipping
from kvstore.shard.resident import Resident
from kvstore.storage.segments import Position
from kvstore.store.store import Store
from loadtest.simulate.held_rows import differences, held
from loadtest.simulate.machine import Violation
from loadtest.simulate.node import NodeServer

Place = tuple[str, str]  # node and shard


class Invariants:
    """`nodes`: by their names. `stored_map`: as the controller's store has it now."""

    def __init__(self, nodes: Mapping[str, NodeServer], stored_map: Callable[[], ClusterMap | None]) -> None:
        self._nodes = nodes
        self._stored_map = stored_map
        self._map: ClusterMap | None = None  # that was looked at last
        self._map_is_lost = False  # it was, and none is recovered yet
        self._served: dict[str, int] = {}  # by store, the highest term in which it was
        self._serving: dict[int, Place] = {}
        self._looked_at: dict[Place, object] = {}
        self._terms: dict[tuple[str, int], str] = {}  # who served a store in that term
        self._starts: dict[str, None] = {}  # of processes that have served a store with copies
        self._without_copies: dict[tuple[str, int], None] = {}  # stores and terms in which some map named no copy
        self._floors: dict[tuple[Place, str], tuple[int, int, int]] = {}  # what the clocks of a store there have shown
        self._seen: dict[Place, object] = {}  # of stores, when they were looked at last
        self._files: dict[str, tuple[object, object, Position]] = {}  # by copy: its file, the session, the record
        self._filling: dict[str, None] = {}  # copies that get a snapshot
        self._followed: dict[str, object] = {}  # by copy, when it was looked at last
        self._promised: dict[str, int] = {}  # by copy
        self._committed: dict[str, int] = {}  # by copy of a primary
        self._granted: dict[str, object] = {}

    def process_ended(self, node: str) -> None:
        """Nothing is served there."""
        self._serving = {partition: owner for partition, owner in self._serving.items() if owner[0] != node}
        self._looked_at = {place: served for place, served in self._looked_at.items() if place[0] != node}

    def disk_gone(self, node: str) -> None:
        """What comes there is not what was."""
        self.process_ended(node)
        self._floors = {of: floors for of, floors in self._floors.items() if of[0][0] != node}
        self._seen = {place: seen for place, seen in self._seen.items() if place[0] != node}

    # --- after each event

    def check(self, server: NodeServer) -> None:
        """After an event of that node. Raises Violation."""
        assert server.node is not None
        for shard_id, resident in server.node.stores.by_shard.items():
            hosted = resident.hosted
            if hosted is None:
                if (copy := resident.copy) is not None:
                    self._check_copy(shard_id, copy)
                continue
            place, store = (server.name, shard_id), hosted.store
            self._check_store(place, store)
            tables = store.tables
            if not hosted.is_open:
                if tables.sender is not None:
                    self._check_opening(shard_id, tables.sender.shipping)
                continue
            if tables.served is not self._looked_at.get(place) and tables.may_answer():
                self._looked_at[place] = tables.served
                self._note_served(place, store)
            if tables.sender is not None:
                self._check_primary(shard_id, store)

    def _check_store(self, place: Place, store: Store) -> None:
        log = store.tables.log
        applied, visible = store.tables.engine.applied.position, store.applier.visible
        seen = (applied, visible, log.synced, log.last, store.tables.visible)
        if seen == self._seen.get(place):
            return
        self._seen[place] = seen
        if not applied.number <= visible <= log.durable <= log.last.number:
            order = f"applied {applied.number}, visible {visible}, durable {log.durable}, last {log.last.number}"
            raise Violation(f"{' of '.join(place)}: {order}")
        clock = store.clock
        of = place, store.identity.store_id  # a node whose shard has left begins another store of that name
        now, before = (clock.version, clock.sequence, clock.attempts_floor), self._floors.get(of)
        if now != before:
            if before is not None and any(after < early for after, early in zip(now, before, strict=True)):
                raise Violation(f"{' of '.join(place)}: version, sequence, floor went from {before} to {now}")
            self._floors[of] = now

    def _check_copy(self, shard_id: str, copy: StoreCopy) -> None:
        if copy.is_filling:
            self._filling[copy.identity.copy_id] = None
        elif self._filling.pop(copy.identity.copy_id, self) is None:
            self._check_filled(shard_id, copy)
        self._check_file(shard_id, copy)
        following = copy.following
        if following is self._followed.get(following.copy_id):
            return
        self._followed[following.copy_id] = following
        copy_id, promised = following.copy_id, following.promised
        if promised < self._promised.get(copy_id, 0):
            raise Violation(f"copy {copy_id} of {shard_id} has promised {self._promised[copy_id]}, and now {promised}")
        self._promised[copy_id] = promised
        if following.session is not None and following.session.term != promised:
            raise Violation(f"copy {copy_id} of {shard_id} follows term {following.session.term}, promised {promised}")

    def _check_file(self, shard_id: str, copy: StoreCopy) -> None:
        """In one session, the file of a copy goes from record to record, and never back."""
        copy_id, now = copy.identity.copy_id, (copy.engine, copy.following.session, copy.engine.applied.position)
        before = self._files.get(copy_id)
        self._files[copy_id] = now
        if before is None or now[1] is None or before[0] is not now[0] or before[1] is not now[1]:
            return
        if now[2].number < before[2].number:
            raise Violation(
                f"the file of copy {copy_id} of {shard_id} went from record {before[2].number} back to {now[2].number}"
            )

    def _check_filled(self, shard_id: str, copy: StoreCopy) -> None:
        """A snapshot has become good: the copy has the rows of its primary, as of a record that both have."""
        cluster_map, named = self._stored_map(), copy.following.session
        shard = cluster_map.shard(shard_id) if cluster_map is not None else None
        resident = self.resident(shard.primary.node, shard_id) if shard is not None else None
        tables = resident.hosted.store.tables if resident is not None and resident.hosted is not None else None
        if named is None or tables is None or tables.sender is None or tables.sender.shipping.start != named.start:
            return
        number = min(copy.log.last.number, tables.log.last.number)
        if number < max(copy.engine.applied.position.number, tables.engine.applied.position.number):
            return
        if wrong := differences(held(tables.engine, tables.log, number), held(copy.engine, copy.log, number)):
            raise Violation(
                f"the copy {copy.identity.copy_id} of {shard_id} is filled, and has, as of {number}, {wrong}"
            )

    # --- primaries

    def note_term(self, store_id: str, term: int, who: str) -> None:
        """That process serves that copy in that term: no other one ever did. Raises Violation."""
        first = self._terms.setdefault((store_id, term), who)
        if first != who:
            raise Violation(f"{who} serves store {store_id} in term {term}, in which {first} has")

    def _note_start(self, store_id: str, term: int, start: str) -> None:
        """As `note_term`, of a process whose store has copies. Raises Violation.

        Once a map names none, the store may be opened again in that term, and get copies again.
        """
        if (store_id, term) in self._without_copies and start not in self._starts:
            self._terms.pop((f"{store_id} with copies", term), None)
        self._starts[start] = None
        self.note_term(f"{store_id} with copies", term, f"start {start}")

    def _note_served(self, place: Place, store: Store) -> None:
        shard = store.cluster_map.shard(place[1]) if store.cluster_map is not None else None
        sender = store.tables.sender
        if shard is not None:
            # A store without copies is opened without a new term, since nothing can take its place.
            start = sender.shipping.start if sender is not None and sender.shipping.links else ""
            if start:
                self._note_start(store.identity.store_id, shard.term, start)
            self.note_term(store.identity.store_id, shard.term, f"copy {store.copy_id}")
            self._served[store.identity.store_id] = max(shard.term, self._served.get(store.identity.store_id, 0))
        self._serving = {partition: owner for partition, owner in self._serving.items() if owner != place}
        for partition, generation in enumerate(store.served.generations):
            if not generation or partition in store.served.frozen:
                continue
            other = self._serving.setdefault(partition, place)
            if other != place:
                if self._answers(other):
                    both = f"{' of '.join(other)} and by {' of '.join(place)}"
                    raise Violation(f"partition {partition} is served by {both}")
                self._looked_at.pop(other, None)  # it is looked at once more if it may answer again
            self._serving[partition] = place

    def _answers(self, place: Place) -> bool:
        """Whether that one may answer now: it is a primary that holds its lease."""
        resident = self.resident(*place)
        hosted = resident.hosted if resident is not None else None
        return hosted is not None and hosted.is_open and hosted.store.tables.may_answer()

    def _check_primary(self, shard_id: str, store: Store) -> None:
        sender, copy_id = store.tables.sender, store.copy_id
        assert sender is not None
        if store.tables.stats.copies_differed or store.replicas.comparison.disputed:
            raise Violation(f"rows of {shard_id} are not the same in its copies, as of one record")
        shipping = sender.shipping
        if shipping.committed != self._committed.get(copy_id):
            self._committed[copy_id] = shipping.committed
            if store.applier.visible > shipping.committed:
                raise Violation(f"record {store.applier.visible} of {shard_id} is visible, not committed")
            cluster_map = self._stored_map()
            shard = cluster_map.shard(shard_id) if cluster_map is not None else None
            if shard is not None:
                self._check_in_sync(shard)
        if sender.grants is not self._granted.get(copy_id):
            self._granted[copy_id] = sender.grants
            opening = self._opened_beside(shard_id, store.identity.store_id, shipping.config.term)
            if opening and store.tables.may_answer():
                raise Violation(f"{shard_id} may be answered in term {shipping.config.term} while {opening}")

    def _check_opening(self, shard_id: str, shipping: Shipping) -> None:
        """No copy in sync that has promised the term has a record that the new term is without.
        Of an older term, that is."""
        for replica in shipping.config.in_sync:
            guest = self.resident(replica.node, shard_id)
            copy = guest.copy if guest is not None else None
            if copy is None or (copy.following.copy_id, copy.following.promised) != (
                replica.copy_id,
                shipping.config.term,
            ):
                continue
            last = copy.log.last
            if last.number >= shipping.opening and last.term < shipping.config.term:
                raise Violation(
                    f"term {shipping.config.term} of {shard_id} is opened by record {shipping.opening}, and the copy in"
                    f" sync on {replica.node} has record {last.number} of term {last.term}"
                )

    def _opened_beside(self, shard_id: str, store_id: str, term: int) -> str:
        """Which node opens that store in a higher term."""
        for name in self._nodes:
            resident = self.resident(name, shard_id)
            config = resident._opening.config if resident is not None and resident._opening is not None else None
            copy = resident.copy if resident is not None else None
            if config is None or copy is None or config.store_id != store_id:
                continue
            if term < config.term == copy.following.promised:
                return f"{name} opens term {config.term}"
        return ""

    # --- maps

    def check_map(self) -> None:
        """After an event of the controller. Raises Violation."""
        after = self._stored_map()
        if after is None:
            self._map_is_lost = self._map is not None
        if after is None or after is self._map:
            return
        before, self._map = self._map, after
        is_recovered, self._map_is_lost = self._map_is_lost, False
        for shard in after.shards:
            if not shard.replicas:
                self._without_copies[shard.store_id, shard.term] = None
            old = before.shard(shard.id) if before is not None else None
            if old is not None and old.store_id == shard.store_id and old != shard:
                if is_recovered and shard.term < old.term:
                    self._check_recovered(shard)
                else:
                    _check_change(old, shard)
                self._check_in_sync(shard)

    def _check_recovered(self, shard: Shard) -> None:
        """The newest map that nodes have is older than the one that was lost.

        What was lost with it was served by no process: the record that opens a term carries its map, and is on the disk
        of each copy in sync before the store is served. So a term that was given and never opened may be missing.
        """
        served = self._served.get(shard.store_id, 0)
        if shard.term < served:
            raise Violation(f"shard {shard.id} was served in term {served}, and the recovered map has {shard.term}")

    def _check_in_sync(self, shard: Shard) -> None:
        """Each copy in sync has all that is committed in this term, as far as processes can be asked."""
        resident = self.resident(shard.primary.node, shard.id)
        sender = resident.hosted.store.tables.sender if resident is not None and resident.hosted is not None else None
        if sender is None or (sender.shipping.config.term, sender.shipping.config.store_id) != (
            shard.term,
            shard.store_id,
        ):
            return
        for replica in shard.replicas:
            guest = self.resident(replica.node, shard.id)
            copy = guest.copy if guest is not None else None
            if replica.state != "in-sync" or copy is None or copy.following.copy_id != replica.copy_id:
                continue
            if copy.following.promised <= shard.term and copy.log.synced.number < sender.shipping.committed:
                raise Violation(
                    f"the copy of {shard.id} on {replica.node} is in sync with {copy.log.synced.number} of "
                    f"{sender.shipping.committed} committed records on its disk"
                )

    def resident(self, node: str, shard_id: str) -> Resident | None:
        """Of a process that runs."""
        server = self._nodes.get(node)
        if server is None or server.node is None or not server.is_alive:
            return None
        return server.node.stores.by_shard.get(shard_id)


def _check_change(before: Shard, after: Shard) -> None:
    if after.term < before.term:
        raise Violation(f"the term of shard {after.id} went from {before.term} to {after.term}")
    if after.primary == before.primary:
        return
    if after.term == before.term:
        raise Violation(f"shard {after.id} has another primary in the same term {after.term}")
    in_sync = [(each.node, each.copy_id) for each in before.replicas if each.state == "in-sync"]
    if (after.primary.node, after.primary.copy_id) not in in_sync:
        raise Violation(f"shard {after.id} has a primary on {after.primary.node} which was not in sync")
