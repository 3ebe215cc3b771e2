"""A cluster of nodes that keep copies, as the controller hears it: no data, no sockets, a clock that is a number.

Each node does what a real one is told to: it makes and drops copies, follows the map, opens what it is primary of, asks
for copies to be in sync or out. A node that is down says nothing, and has lost nothing unless its disk is wiped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import msgspec

from kvstore.config import Limits
from kvstore.controller.copy_places import Places
from kvstore.controller.handing_on import may_stop
from kvstore.controller.heard import Heard
from kvstore.controller.membership import ClusterState
from kvstore.controller.replicas import Decided, Decider, Step, to_give_back
from kvstore.placement.cluster_map import ClusterMap, at_home, first_map
from kvstore.replication import failover
from kvstore.replication.beats import Asked, Beat, CopyReport, Echo
from kvstore.replication.configuration import Configuration, Replica, configuration_of

LIMITS = Limits(down_out_s=60.0)
BEAT_S = 0.25
BEACON_S = LIMITS.lease_s / 8
UNANSWERED_MAX = 3  # beats of a node that may be promoted all the same


@dataclass
class ModelCopy:
    store_id: str
    copy_id: str
    promised: int = 0
    number: int = 0  # of its log's last record
    opened: int = 0  # the term in which it serves
    given_back: int = 0
    heard_primary_at: float = 0.0
    is_examined: bool = True
    damage: str = ""  # found at its node's last start: it is nothing until it is rebuilt


@dataclass
class ModelNode:
    name: str
    copies: dict[str, ModelCopy] = field(default_factory=dict)
    is_up: bool = True
    hears_controller: bool = True  # else its beats arrive, and the answers do not
    stops: bool = False  # its process is about to end
    may_make: bool = True  # else files of another cluster are in the way of all copies that it is told to make
    echo: Echo = field(default_factory=Echo)
    unanswered: int = 0  # beats in a row
    is_announced: bool = True


class Model:
    def __init__(self, nodes: int, replicas: int, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.now = 1000.0
        self._numbers = count(1)
        homes = [at_home(f"s{n}", f"http://s{n}", f"store-{n}", copy_id=f"c{n}") for n in range(1, nodes + 1)]
        self.state = ClusterState(map=msgspec.structs.replace(first_map("k", 64, homes), replicas=replicas))
        self.nodes = {home.node.id: ModelNode(home.node.id) for home in homes}
        for home in homes:
            self.nodes[home.node.id].copies[home.shard.id] = ModelCopy(
                home.shard.store_id, home.shard.primary.copy_id, opened=1, promised=1
            )
        self.told: dict[str, int] = {}  # by store id, what was committed
        self.heard = Heard("controller", limits, self.now, self.told)
        self.damping: dict[str, failover.Damping] = {}
        self.steps: list[Step] = []
        self.hears_nobody = False  # the controller is cut off from all nodes
        self._heard_at = self.now
        self._followed = self.map  # by nodes that are cut off

    @property
    def map(self) -> ClusterMap:
        assert self.state.map is not None
        return self.state.map

    def config(self, shard: str) -> Configuration:
        found = configuration_of(self.map, shard)
        assert found is not None
        return found

    def copy_nodes(self, shard: str, state: str = "in-sync") -> set[str]:
        return {copy.node for copy in self.config(shard).replicas if copy.state == state}

    # --- what happens

    def down(self, name: str) -> None:
        self.nodes[name].is_up = False

    def up(self, name: str) -> None:
        node = self.nodes[name]
        node.is_up, node.stops, node.echo, node.unanswered = True, False, Echo(), 0
        for copy in node.copies.values():
            copy.opened, copy.given_back, copy.heard_primary_at = 0, 0, self.now
        node.is_announced = False
        self._announce(node)

    def wipe(self, name: str) -> None:
        self.nodes[name].copies.clear()

    def damage(self, name: str, shard: str) -> None:
        """The node starts again, and finds its copy of that shard damaged, whose id can be read."""
        self.nodes[name].copies[shard].damage = "Record 7 is damaged."
        self.up(name)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / BEAT_S)):
            self.turn()

    def turn(self) -> None:
        """A beat of every node, one after the other, and one decision."""
        self.beats()
        self.decide()

    def beats(self) -> None:
        """A beat of every node, one after the other.
        A controller that hears none of them decides in between, too: what it knows of each grows old one by one."""
        end = self.now + BEAT_S
        for left, node in reversed(list(enumerate(reversed(self.nodes.values())))):
            self.now = end - left * BEAT_S / len(self.nodes)
            if node.is_up:
                self._follow(node)
                self._beat(node)
            if self.hears_nobody:
                self.decide()
        self.now = end

    def wakes(self, name: str) -> None:
        """A beat of that node, which has heard of no other one since its last."""
        self._beat(self.nodes[name])

    def decide(self) -> None:
        self.heard.detector.turn(self.now)
        self.heard.follow(self.map, self.now)
        decided = Decider(self.state, self.heard, self.damping, self.limits, self.now).decide(self._new_id, 0)
        self._take(decided)

    def _new_id(self) -> str:
        return f"id{next(self._numbers)}"

    def _take(self, decided: Decided) -> None:
        for step in decided.steps:
            self.steps.append(step)
            if step.why == "silent":
                assert self.now - self._heard_at <= 2 * BEAT_S, "a controller that hears nobody promotes nobody"
                assert self.nodes[step.after.primary.node].unanswered <= UNANSWERED_MAX, "a deaf node follows no map"
                before = self.damping.get(step.after.shard, failover.Damping())
                self.damping[step.after.shard] = failover.failed_over(before, self.now, 2.0, 60.0)
        self.state = decided.state

    def may_stop(self, name: str) -> bool:
        return may_stop(self.map, name, self.heard, self.now)

    # --- a node

    def _announce(self, node: ModelNode) -> None:
        if not node.is_announced and not self.hears_nobody:
            node.is_announced = True
            self.heard.announced(node.name, self.now)

    def _follow(self, node: ModelNode) -> None:
        if not self.hears_nobody:
            self._followed = self.map
        for shard, copy in list(node.copies.items()):
            config = configuration_of(self._followed, shard)
            if config is None:
                continue
            if copy.damage:
                here = config.copy_on(node.name)
                if config.primary.node != node.name and (here is None or here.state != "in-sync"):
                    node.copies[shard] = ModelCopy(copy.store_id, self._new_id(), heard_primary_at=self.now)
                continue
            primary = self.nodes[config.primary.node]
            if config.primary == (node.name, copy.copy_id):
                if config.term > copy.promised:
                    copy.promised = copy.opened = config.term
                    copy.given_back = 0
                continue
            copy.opened = 0
            served = primary.copies.get(shard)
            if primary.is_up and served is not None and served.opened == config.term:
                copy.heard_primary_at = max(copy.heard_primary_at, self.now - self.now % BEACON_S)
                copy.promised = max(copy.promised, config.term)

    def _is_whole(self, named: Replica, shard: str) -> bool:
        """The copy that the map names is there, and answers."""
        there = self.nodes[named.node].copies.get(shard) if self.nodes[named.node].is_up else None
        return there is not None and there.copy_id == named.copy_id and not there.damage

    def _requests(self, node: ModelNode) -> list[Asked]:
        found = []
        for shard, own in node.copies.items():
            config = configuration_of(self.map, shard)
            if config is None or config.primary != (node.name, own.copy_id) or own.promised != config.term:
                continue
            if own.damage:
                continue
            for copy in config.replicas:
                is_there = self._is_whole(copy, shard)
                if is_there == (copy.state == "joining") and (is_there or own.is_examined):
                    kind = "in-sync" if is_there else "out"
                    found.append(Asked(kind=kind, **_named(config), copy_id=copy.copy_id, joined=copy.joined))  # type: ignore[arg-type]
        return found

    def _report(self, node: ModelNode, shard: str, copy: ModelCopy) -> CopyReport:
        config = configuration_of(self.map, shard)
        is_primary = config is not None and config.primary == (node.name, copy.copy_id)
        if copy.damage:
            found = CopyReport(shard=shard, store_id=copy.store_id, copy_id=copy.copy_id, role="damaged")
            return msgspec.structs.replace(found, promised=copy.promised, damage=copy.damage)
        synced = config is not None and all(self._is_whole(each, shard) for each in config.in_sync)
        return CopyReport(
            shard=shard,
            store_id=copy.store_id,
            copy_id=copy.copy_id,
            role=("primary" if synced else "opening") if is_primary else "copy",
            promised=copy.promised,
            number=copy.number,
            serves=is_primary and copy.opened > 0 and synced,
            needs_term=is_primary and not copy.opened,
            silent_s=self.now - copy.heard_primary_at,
            given_back=copy.given_back,
            examined=copy.is_examined,
        )

    def _beat(self, node: ModelNode) -> None:
        if self.hears_nobody:
            return
        self._announce(node)
        self._heard_at = self.now
        beat = Beat(
            node=node.name,
            start="x",
            cluster_id="k",
            epoch=self.map.epoch,
            stops=node.stops,
            echo=node.echo,
            copies=[self._report(node, shard, copy) for shard, copy in node.copies.items()],
            requests=self._requests(node),
        )
        number = self.heard.take(beat, self.now)
        node.unanswered += 1
        if not node.hears_controller:
            return
        node.unanswered = 0
        node.echo = Echo(start="controller", beat=number)
        places = Places(self.map, self.heard, self.limits, self.now)
        for dropped in places.to_drop(node.name):
            assert node.copies.pop(dropped.shard).copy_id == dropped.copy_id
        for made in places.to_make(node.name):
            if node.may_make and made.shard not in node.copies:
                node.copies[made.shard] = ModelCopy(made.store_id, self._new_id(), heard_primary_at=self.now)
        for back in to_give_back(self.state, node.name):
            own = node.copies.get(back.shard)
            if own is not None and own.opened == back.term:
                own.given_back = back.term


def _named(config: Configuration) -> dict[str, object]:
    return {"shard": config.shard, "term": config.term, "primary": config.primary.copy_id}


def replicated(nodes: int = 3, replicas: int = 2) -> Model:
    """All shards have their copies in sync."""
    model = Model(nodes, replicas)
    model.run(5)
    model.steps.clear()
    return model
