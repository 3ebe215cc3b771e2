"""What must hold of terms, of the partitions served in them, and of maps, after each event.

Owns: `Terms`, `Owners`, `MapInvariants`.
Promises: a partition's owners are looked at when one of them serves others than before, and a map when it has changed.
Leaves to others: whose event it was (`cluster`), what a copy in sync has (`copy_invariants`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.placement.cluster_map import ClusterMap, Move, Shard
from kvstore.placement.copies import copies_that_fit
from kvstore.replication.beats import beats
from kvstore.store.store import Store
from loadtest.simulate.copy_invariants import check_in_sync
from loadtest.simulate.store_invariants import Place, Violation
from loadtest.simulate.view import View, good_copies, in_sync

_HELD_S = 0.5  # a node that is held for dead for so long is so in each decision that a map shows
_BEGUN_S = 1.5  # a move at work has begun before that, since its destination answers sooner
_SILENT_S = 3.0  # a node that is away for so long is silent to each controller that gives another one up
_AT_WORK = ("copy", "tail", "freeze")  # steps of a move that has begun
_EVENT_S = 0.5  # more between two events is time in which the controller did not run, or stood still


class Terms:
    """Who served each store in each term."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._servers: dict[tuple[str, int], str] = {}
        self._starts: dict[str, None] = {}  # of processes that have served a store with copies
        self._without_copies: dict[tuple[str, int], None] = {}  # stores and terms in which some map named no copy
        self._highest: dict[str, int] = {}  # by store

    def highest(self, store_id: str) -> int:
        """The highest term in which that store was served."""
        return self._highest.get(store_id, 0)

    def note_store(self, store: Store, shard: Shard) -> None:
        """It is served now, as that shard of its map. Raises Violation."""
        store_id, sender = store.identity.store_id, store.tables.sender
        if store.durable < (told := self._view.controller.told(store_id)):
            raise Violation(
                f"shard {shard.id} is served up to record {store.durable}, and the controller was told of {told}"
            )
        # A store without copies is opened without a new term, since nothing can take its place.
        if sender is not None and sender.shipping.links and sender.shipping.start:
            self.note_start(store_id, shard.term, sender.shipping.start)
        self.note(store_id, shard.term, f"copy {store.copy_id}")
        self._highest[store_id] = max(shard.term, self.highest(store_id))

    def note(self, store_id: str, term: int, who: str) -> None:
        """That process serves that copy in that term: no other one ever did. Raises Violation."""
        first = self._servers.setdefault((store_id, term), who)
        if first != who:
            raise Violation(f"{who} serves store {store_id} in term {term}, in which {first} has")

    def note_start(self, store_id: str, term: int, start: str) -> None:
        """As `note`, of a process whose store has copies. Raises Violation.

        Once a map names none, the store may be opened again in that term, and get copies again.
        """
        if (store_id, term) in self._without_copies and start not in self._starts:
            self._servers.pop((f"{store_id} with copies", term), None)
        self._starts[start] = None
        self.note(f"{store_id} with copies", term, f"start {start}")

    def note_map(self, shard: Shard) -> None:
        """A map has that shard."""
        if not shard.replicas:
            self._without_copies[shard.store_id, shard.term] = None


class Owners:
    """Which store serves each partition: one that may answer."""

    def __init__(self, view: View, terms: Terms) -> None:
        self._view = view
        self._terms = terms
        self._serving: dict[int, Place] = {}
        self._looked_at: dict[Place, object] = {}

    def process_ended(self, node: str) -> None:
        """Nothing is served there."""
        self._serving = {partition: owner for partition, owner in self._serving.items() if owner[0] != node}
        self._looked_at = {place: served for place, served in self._looked_at.items() if place[0] != node}

    def check(self, place: Place, store: Store) -> None:
        """The store is open. Raises Violation."""
        tables = store.tables
        if tables.served is not self._looked_at.get(place) and tables.may_answer():
            self._looked_at[place] = tables.served
            self._note(place, store)

    def _note(self, place: Place, store: Store) -> None:
        shard = store.cluster_map.shard(place[1]) if store.cluster_map is not None else None
        if shard is not None:
            self._terms.note_store(store, shard)
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

    def check_map(self, cluster_map: ClusterMap) -> None:
        """That map was recovered: by it, too, each partition belongs to the store that serves it. Raises Violation."""
        for partition, place in self._serving.items():
            owner = cluster_map.shards[cluster_map.owners[partition]].id
            if owner != place[1] and self._answers(place, partition):
                where = " of ".join(place)
                raise Violation(f"partition {partition} is served by {where}, and the map gives it to {owner}")

    def _answers(self, place: Place, partition: int | None = None) -> bool:
        """Whether that one may answer now: it is a primary that holds its lease. `partition`: and serves that."""
        resident = self._view.resident(*place)
        hosted = resident.local.hosted if resident is not None else None
        if hosted is None or not hosted.is_open or not hosted.store.tables.may_answer():
            return False
        served = hosted.store.served
        return partition is None or (served.generations[partition] > 0 and partition not in served.frozen)


class MapInvariants:
    """What was seen of the cluster's maps so far."""

    def __init__(self, view: View, terms: Terms, owners: Owners) -> None:
        self._view = view
        self._terms = terms
        self._owners = owners
        self._map: ClusterMap | None = None  # that was looked at last
        self._is_lost = False  # it was, and none is recovered yet
        self._is_put_back = False  # the next one is that of an old copy
        self._newest: ClusterMap | None = None  # while that of an old copy stands, or one that was made of it
        self._given: dict[tuple[str, int], str] = {}  # the primary's copy, by store and term
        self._followed: dict[int, ClusterMap] = {}  # by epoch
        self._followed_by: dict[str, ClusterMap] = {}  # by node, that was looked at last
        self._away_s: dict[str, float] = {}  # for how long nodes did not run, in time in which the controller did
        self._looked_s = 0.0
        self._dead_s: dict[str, float] = {}  # since when nodes are held for dead by the controller's process
        self._at_work: dict[str, None] = {}  # moves whose rows were seen to come

    def check(self) -> None:
        """Raises Violation."""
        self._count_away()
        self._check_moves()
        after = self._view.map
        if after is None:
            self._is_lost = self._map is not None
        if after is None or after is self._map:
            return
        before, self._map = self._map, after
        self._note_terms(after)
        if self._is_put_back:
            self._is_put_back, self._is_lost = False, False
            self._newest = self._newest or before
            return
        if after == before:
            return  # something beside it has changed
        if before is not None and after.epoch <= before.epoch:
            raise Violation(f"the map of epoch {before.epoch} is followed by one of epoch {after.epoch}")
        is_recovered, self._is_lost = self._is_lost or self._newest is not None, False
        if self._newest is not None:
            if after.epoch <= self._newest.epoch:
                return  # no node follows it that follows the newest
            before, self._newest = self._newest, None
            self._view.is_behind = False
        for shard in after.shards:
            self._terms.note_map(shard)
            old = before.shard(shard.id) if before is not None else None
            if old is not None and old.store_id == shard.store_id and old != shard:
                if is_recovered and shard.term < old.term:
                    self._check_recovered(shard)
                else:
                    check_change(old, shard)
                    if not is_recovered:
                        check_asked(old, shard, self._away_s.get(shard.primary.node, 0.0))
                check_in_sync(self._view, shard)
        if is_recovered:
            self._owners.check_map(after)
        elif before is not None:
            check_given_up(before, after, [name for name, seconds in self._away_s.items() if seconds > _SILENT_S])
            for move in before.moves:
                if set(move.partitions) <= set(after.owned_by(move.to)):
                    check_commit(self._view, before, move)
                    check_still(before, self._held_for_dead(_HELD_S), f"move {move.id} is committed")

    def put_back(self) -> None:
        """The controller's record is an old copy now. Its map may stand; what is made of it may not."""
        self._is_put_back = self._view.is_behind = True

    def check_followed(self, node: str, cluster_map: ClusterMap | None) -> None:
        """That node follows that map: of each epoch there is one. Raises Violation."""
        if cluster_map is None or cluster_map is self._followed_by.get(node):
            return
        self._followed_by[node] = cluster_map
        first = self._followed.setdefault(cluster_map.epoch, cluster_map)
        if first != cluster_map:
            raise Violation(f"{node} follows a map of epoch {cluster_map.epoch}, of which there is another one")

    def _note_terms(self, after: ClusterMap) -> None:
        """Each term of a store is given to one copy, also by a controller with an old record."""
        for shard in after.shards:
            primary = f"{shard.primary.copy_id} on {shard.primary.node}"
            first = self._given.setdefault((shard.store_id, shard.term), primary)
            if first != primary:
                raise Violation(f"term {shard.term} of shard {shard.id} is given to {primary}, and was to {first}")

    def _count_away(self) -> None:
        """Called after each event of the controller."""
        for name, node in self._view.nodes.items():
            passed_s = min(node.loop.now_s - self._looked_s, _EVENT_S)
            self._away_s[name] = 0.0 if node.is_alive else self._away_s.get(name, 0.0) + passed_s
        self._looked_s = max((node.loop.now_s for node in self._view.nodes.values()), default=0.0)

    def _check_moves(self) -> None:
        """None begins while too many nodes are held for dead."""
        for node in self._view.nodes:
            if not self._view.controller.is_held_for_dead(node):
                self._dead_s.pop(node, None)
            else:
                self._dead_s.setdefault(node, self._looked_s)
        at_work = [each.move.id for each in self._view.controller.tries() if each.step in _AT_WORK]
        for move in at_work:
            if move not in self._at_work and self._map is not None:
                check_still(self._map, self._held_for_dead(_BEGUN_S), f"move {move} begins")
        self._at_work = dict.fromkeys(at_work)

    def _held_for_dead(self, seconds: float) -> list[str]:
        return [node for node, since_s in self._dead_s.items() if self._looked_s - since_s > seconds]

    def _check_recovered(self, shard: Shard) -> None:
        """The newest map that nodes have is older than the one that was lost.

        What was lost with it was served by no process: the record that opens a term carries its map, and is on the disk
        of each copy in sync before the store is served. So a term that was given and never opened may be missing.
        """
        served = self._terms.highest(shard.store_id)
        if shard.term < served:
            raise Violation(f"shard {shard.id} was served in term {served}, and the recovered map has {shard.term}")


def check_change(before: Shard, after: Shard) -> None:
    """From a map to the next one. Raises Violation."""
    if after.term < before.term:
        raise Violation(f"the term of shard {after.id} went from {before.term} to {after.term}")
    ids = [after.primary.copy_id, *(each.copy_id for each in after.replicas)]
    if len(set(ids)) < len(ids):
        raise Violation(f"two copies of shard {after.id} have one id: {', '.join(ids)}")
    if after.primary == before.primary:
        return
    if after.term == before.term:
        raise Violation(f"shard {after.id} has another primary in the same term {after.term}")
    if (after.primary.node, after.primary.copy_id) not in good_copies(before)[1:]:
        raise Violation(f"shard {after.id} has a primary on {after.primary.node} which was not in sync")


def check_commit(view: View, before: ClusterMap, move: Move) -> None:
    """That move is committed by the map behind `before`.
    Its destination has as many copies in sync as its source, or as are asked for. The source serves none of it, and the
    destination has written down that all has come, as far as their primaries run.

    Raises Violation.
    """
    source, to = before.shard(move.source), before.shard(move.to)
    if source is None or to is None:
        return
    wanted, found = min(copies_that_fit(before), len(in_sync(source))), len(in_sync(to))
    if found < wanted:
        raise Violation(f"move {move.id} is committed, {to.id} has {found} copies in sync, and {source.id} {wanted}")
    for shard, lacks in ((source, "frozen its partitions"), (to, "written down that all has come")):
        resident = view.resident(shard.primary.node, shard.id)
        hosted = resident.local.hosted if resident is not None else None
        if hosted is None or not hosted.is_open or not hosted.store.tables.may_answer():
            continue
        if hosted.store.copy_id != shard.primary.copy_id:
            continue  # its disk was lost, and it has begun with a new one that is no member yet
        if move.id not in hosted.store.partitions.view.freezes:
            raise Violation(f"move {move.id} is committed, and the primary of {shard.id} has not {lacks}")


def check_given_up(before: ClusterMap, after: ClusterMap, away: Sequence[str]) -> None:
    """No node is given up while more than so many do not run. `away`: those that do not, for long.

    Raises Violation.
    """
    was_given_up = {node.id for node in before.nodes if node.given_up}
    given_up = [node.id for node in after.nodes if node.given_up and node.id not in was_given_up]
    if given_up:
        check_still(before, away, f"{', '.join(given_up)} is given up")


def check_still(before: ClusterMap, away: Sequence[str], what: str) -> None:
    """Not more nodes of the map than may be are `away`, as `what` happens. Raises Violation."""
    standing = [node.id for node in before.nodes if not node.given_up]
    silent = [name for name in standing if name in away]
    if beats(before) and len(silent) > max(before.replicas - 1, (len(standing) - 1) // 2):
        raise Violation(f"{what}, and {len(silent)} of {len(standing)} nodes are away")


def check_asked(before: Shard, after: Shard, away_s: float) -> None:
    """In a term no copy comes in sync or goes without its primary, unless its node has lost it.

    `away_s`: for how long the primary did not run. Raises Violation.
    """
    now = {each.node: each.copy_id for each in after.replicas}
    known = [each for each in in_sync(before) if now.get(each.node, each.copy_id) == each.copy_id]
    is_asked = before.term == after.term and known != in_sync(after)
    if is_asked and away_s > _SILENT_S:
        raise Violation(f"the copies in sync of shard {after.id} change, and its primary is away for {away_s:.1f} s")
