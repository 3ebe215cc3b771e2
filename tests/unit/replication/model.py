"""One shard on two or three nodes, every order of events: the rules of `kvstore.replication` themselves, explored.

A world is a value, and `steps` gives every world that may come next. What a node does with a message is done by the
rules; the model only keeps logs, disks and the network. Kinds of messages that a scenario names as late stay in the
network, where each may come late, after others, never, or (as often as there are doubles left) more than once; all
other kinds come at once. A node that is dead is one that takes no step any more.

Logs are numbers: each is one node of a tree, whose parent is the log without its last record; so a log's number is the
checksum of its chain. Time passes in ticks and is relative, `now` is 0 always; a lease lasts one tick, without margin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kvstore.replication import failover, lease, opening, session, shipping
from kvstore.replication.configuration import Configuration, Primary, Replica, Request
from kvstore.replication.lease import Granted, Grants
from kvstore.replication.opening import Opening
from kvstore.replication.session import Following, Session
from kvstore.replication.shipping import Link, Shipping
from kvstore.storage.segments import Position

STORE = "store"
LEASE, NO_MARGIN = 1, 1
ROUNDS = 3  # how often a primary greets one copy in one term


class Violation(AssertionError):
    """A promise was broken."""


# --- logs


class Rec(NamedTuple):
    term: int
    value: int = 0  # of a client's write; its version is the number of writes up to it
    config: Configuration | None = None


class _Tree:
    """All logs that there ever were."""

    def __init__(self) -> None:
        self.ids: dict[tuple[int, Rec], int] = {}
        self.parent, self.length, self.rec = [0], [0], [Rec(0)]

    def child(self, log: int, rec: Rec) -> int:
        found = self.ids.get((log, rec))
        if found is None:
            found = self.ids[log, rec] = len(self.parent)
            self.parent.append(log)
            self.length.append(self.length[log] + 1)
            self.rec.append(rec)
        return found

    def cut(self, log: int, length: int) -> int:
        while self.length[log] > length:
            log = self.parent[log]
        return log

    def has(self, log: int, part: int) -> bool:
        """Whether `part` is the log or how it began."""
        return self.cut(log, self.length[part]) == part

    def logged(self, log: int) -> Configuration | None:
        """The last map in it."""
        while log and self.rec[log].config is None:
            log = self.parent[log]
        return self.rec[log].config


tree = _Tree()


def position(log: int) -> Position:
    return Position(tree.length[log], log, tree.rec[log].term)


# --- the world


class Node(NamedTuple):
    log: int
    synced: int
    applied: int
    side: Following  # only its promise is on the disk
    kept: int = 1  # the first record that it can still send
    start: int = 0
    given: Granted = Granted(0)
    config: Configuration | None = None  # the map that the process follows
    opening: Opening | None = None
    ship: Shipping | None = None
    grants: Grants = Grants()


class Left(NamedTuple):
    """How often each may still happen."""

    writes: int = 0
    crashes: int = 0
    losses: int = 0
    ticks: int = 0
    changes: int = 0
    doubles: int = 0
    plans: int = 0
    releases: int = 0


class World(NamedTuple):
    nodes: tuple[Node, ...]
    config: Configuration  # the controller's
    left: Left
    net: frozenset[tuple[Any, ...]] = frozenset()
    acked: int = 0  # the log that holds exactly what was acknowledged, or shown to a reader
    value: int = 0


class Model:
    """The steps of one scenario: `late` kinds of messages, events that `never` happen, nodes that may be `faulty`."""

    def __init__(self, late: frozenset[str], never: frozenset[str], faulty: frozenset[int]) -> None:
        self.late = late
        self.never = never
        self.faulty = faulty

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        for message in world.net:
            name = f"{message[0]} arrives: {message[1:]}"
            gone = world._replace(net=world.net - {message})
            yield name, self.deliver(gone, message)
            if world.left.doubles:
                yield name + " (and once more)", self.deliver(_spend(world, "doubles"), message)
        for at, node in enumerate(world.nodes):
            yield from self.node_steps(world, at, node)
        if "tick" not in self.never and world.left.ticks:
            yield "a tick", _tick(_spend(world, "ticks"))

    # --- what a node does by itself

    def node_steps(self, world: World, at: int, node: Node) -> Iterator[tuple[str, World]]:
        if node.log != node.synced:
            yield f"{at} syncs", self.sync(world, at)
        if node.config is None or node.config.epoch < world.config.epoch:
            yield f"{at} follows {world.config}", self.follow(world, at)
        if node.opening is not None:
            yield from self.opening_steps(world, at, node, node.opening)
        elif node.ship is not None:
            yield from self.primary_steps(world, at, node, node.ship)
        else:
            yield from self.start_steps(world, at, node)
        yield from self.controller_steps(world, at, node)
        if at not in self.faulty:
            return
        if world.left.crashes:
            crashed = _spend(world, "crashes")
            yield f"{at} crashes", self.crash(crashed, at, node.synced)
            if node.log != node.synced:
                yield f"{at} crashes, the disk keeps all", self.crash(crashed, at, node.log)
        if world.left.losses and _may_lose(world, at):
            yield f"{at} loses its disk", self.lose(_spend(world, "losses"), at)

    def start_steps(self, world: World, at: int, node: Node) -> Iterator[tuple[str, World]]:
        name, copy_id = str(at), node.side.copy_id
        if node.config is None:
            logged = tree.logged(node.log)
            if opening.starts_alone(logged, name, copy_id, node.side.promised):
                assert logged is not None
                length = tree.length[node.log]
                ship = shipping.opened(logged, name, str(node.start), length, length)
                yield f"{at} starts alone", _put(world, at, synced=node.log, ship=ship, grants=Grants())
            return
        said = opening.may_open(node.config, name, copy_id, node.side.promised, node.given, 0)
        if said == "yes":
            side = own_promise(node.side, node.config.term)
            begun = Opening(node.config, str(node.start), position(node.log))
            yield f"{at} opens", _put(world, at, side=side, synced=node.log, opening=begun)
        elif said == "stale" and world.left.changes:
            config = failover.reopened(world.config, name, copy_id, world.config.epoch + 1)
            if config is not None and world.config.term <= node.side.promised:
                yield f"{at} is given a new term", _spend(world, "changes")._replace(config=config)

    def opening_steps(self, world: World, at: int, node: Node, now: Opening) -> Iterator[tuple[str, World]]:
        for copy in opening.asked(now):
            hello = opening.hello_to(now, copy)
            yield f"{at} asks {copy.node}", self.send(world, "hello", at, int(copy.node), hello)
            yield from self.request(world, opening.request_out(now, copy))
        found = opening.truth(now)
        if found is None:
            return
        if found.copy_id is not None:
            source = next((each for each in world.nodes if each.side.copy_id == found.copy_id), None)
            if source is not None:
                longest = found.position.checksum
                if not tree.has(longest, node.log):
                    raise Violation(f"the log of {at} is not how the longest one began")
                fetched = opening.fetched(now, position(longest))
                yield f"{at} fetches", _put(world, at, log=longest, synced=longest, opening=fetched)
        elif opening.may_begin_term(now):
            log = tree.child(node.log, Rec(now.config.term, 0, now.config))
            number = tree.length[log]
            ship = shipping.opened(now.config, str(at), now.start, number, number - 1)
            yield f"{at} begins its term", _put(world, at, log=log, ship=ship, opening=None, grants=Grants())

    def primary_steps(self, world: World, at: int, node: Node, ship: Shipping) -> Iterator[tuple[str, World]]:
        if ship.serves and world.left.writes:
            value = world.value + 1
            log = tree.child(node.log, Rec(ship.config.term, value))
            written = _spend(world, "writes")._replace(value=value)
            moved = shipping.appended(ship, tree.length[log])
            yield f"{at} writes {value}", _put(written, at, log=log, ship=moved)
        if ship.serves and (acked := self.acknowledge(world, at)) != world:
            yield f"{at} acknowledges", acked
        if world.left.releases and node.applied and node.kept <= tree.length[node.applied]:
            yield f"{at} releases its log", _put(_spend(world, "releases"), at, kept=tree.length[node.applied] + 1)
        for link in ship.links:
            yield from self.link_steps(world, at, node, link)
        if world.left.plans and ship.serves:
            for copy in world.config.in_sync:
                change = failover.plan_change(ship.config, copy.node)
                link_to = shipping.link_on(ship, copy.node)
                if change is None or link_to is None:
                    continue
                gave = _put(_spend(world, "plans"), at, grants=lease.give_back(node.grants))
                gave = self.send(gave, "return", at, int(copy.node), link_to.session)
                yield f"{at} gives its lease back", gave._replace(net=gave.net | {("change", change)})

    def link_steps(self, world: World, at: int, node: Node, link: Link) -> Iterator[tuple[str, World]]:
        ship = node.ship
        assert ship is not None
        to = int(link.node)
        if shipping.may_greet(ship, link) and not _is_begun(world, to, link) and link.session.round < ROUNDS:
            greets = shipping.greet(ship, link)
            named = greets.links[ship.links.index(link)].session
            yield f"{at} greets {to}", self.send(_put(world, at, ship=greets), "hello", at, to, named)
        if shipping.may_send(ship, link):
            if link.acked < ship.last and link.acked + 1 >= node.kept:
                record = tree.cut(node.log, link.acked + 1)
                yield f"{at} ships to {to}", self.send(world, "record", at, to, link.session, record, ship.committed)
            elif _knows_less(world, to, link, ship.committed):
                yield f"{at} tells {to}", self.send(world, "committed", at, to, link.session, ship.committed)
            if world.left.ticks and link.waited:
                yield f"{at} beats to {to}", self.send(world, "beacon", at, to, link.session, 0)
            if not link.in_sync and "snapshot" not in self.never and (shown := tree.cut(node.log, ship.committed)):
                yield f"{at} sends a snapshot to {to}", self.send(world, "snapshot", at, to, link.session, shown)
        if shipping.is_nearly_there(ship, link, 2):
            waits = shipping.wait_from(ship, link.session)
            yield f"{at} waits for {to}", _put(world, at, ship=waits)
        yield from self.request(world, shipping.request_in_sync(ship, link))
        yield from self.request(world, shipping.request_out(ship, link))

    # --- the controller

    def request(self, world: World, request: Request | None) -> Iterator[tuple[str, World]]:
        if request is None or request.kind in self.never or not world.left.changes:
            return
        if (sent := self.send(world, "request", request)) != world:
            yield f"asked: {request}", sent

    def controller_steps(self, world: World, at: int, node: Node) -> Iterator[tuple[str, World]]:
        if not world.left.changes:
            return
        name, copy_id, epoch = str(at), node.side.copy_id, world.config.epoch + 1
        if "promote" not in self.never:
            config = failover.promoted(world.config, name, copy_id, epoch)
            if config is not None:
                yield f"{at} is promoted", _spend(world, "changes")._replace(config=config)
        if "name" not in self.never:
            config = failover.named(world.config, name, copy_id, epoch)
            if config is not None:
                yield f"{at} is named", _spend(world, "changes")._replace(config=config)

    # --- messages

    def send(self, world: World, kind: str, *message: Any) -> World:
        if kind in self.late:
            return world._replace(net=world.net | {(kind, *message)})
        return self.deliver(world, (kind, *message))

    def deliver(self, world: World, message: tuple[Any, ...]) -> World:
        return getattr(self, "on_" + message[0])(world, *message[1:])  # type: ignore[no-any-return]

    def on_request(self, world: World, request: Request) -> World:
        if not world.left.changes:
            return world
        grant = failover.in_sync if request.kind == "in-sync" else failover.taken_out
        config = grant(world.config, request, world.config.epoch + 1)
        return world if config is None else _spend(world, "changes")._replace(config=config)

    def on_change(self, world: World, change: Any) -> World:
        if not world.left.changes:
            return world
        config = failover.changed(world.config, change, change.term, world.config.epoch + 1)
        return world if config is None else _spend(world, "changes")._replace(config=config)

    def on_hello(self, world: World, sender: int, at: int, hello: Session) -> World:
        node = world.nodes[at]
        said = session.on_hello(node.side, hello)
        if said == "promise":
            node = node._replace(side=session.promise(node.side, hello.term), ship=None, opening=None)
            said = session.on_hello(node.side, hello)
        if said != "tell" or node.ship is not None or node.opening is not None:
            return world
        told = session.position_to_tell(position(node.log), position(node.synced))
        if told is None:
            node = node._replace(synced=node.log)
            told = position(node.log)
        world = _set(world, at, node)
        return self.send(world, "told", at, sender, hello, told, tree.length[node.applied])

    def on_told(self, world: World, sender: int, at: int, hello: Session, told: Position, applied: int) -> World:
        node = world.nodes[at]
        if node.opening is not None:
            return _put(world, at, opening=opening.answered(node.opening, hello, told))
        if node.ship is None or (link := shipping.find(node.ship, hello)) is None:
            return world
        common = min(told.number, tree.length[node.log])
        while tree.cut(node.log, common) != tree.cut(told.checksum, common):
            common -= 1
        try:
            join = session.how_to_join(common, told.number, applied, awaited=link.waited > 0, first_kept=node.kept)
        except session.Forked as error:
            raise Violation(str(error)) from None
        except session.FellBehind:
            return world
        return self.send(world, "begin", at, sender, hello, told, join)

    def on_begin(self, world: World, sender: int, at: int, named: Session, told: Position, join: Any) -> World:
        node = world.nodes[at]
        if not session.begins(node.side, named, told, position(node.log)):
            return world
        log = tree.cut(node.log, join.common)
        applied = 0 if join.snapshot else node.applied
        side = session.begun(node.side, named)
        world = _put(world, at, log=log, synced=log, applied=applied, side=side)
        return self.acknowledges(world, at, sender)

    def on_record(self, world: World, sender: int, at: int, named: Session, record: int, committed: int) -> World:
        node = world.nodes[at]
        last = position(node.log)
        if session.takes(node.side, named, tree.length[record], tree.parent[record], last):
            world = _put(world, at, log=tree.child(node.log, tree.rec[record]))
        return self.on_committed(world, sender, at, named, committed)

    def on_committed(self, world: World, sender: int, at: int, named: Session, committed: int) -> World:
        node = world.nodes[at]
        side = session.learn_committed(node.side, named, committed, tree.length[node.log])
        return _applied(_put(world, at, side=side), at, session.may_apply(side))

    def on_snapshot(self, world: World, sender: int, at: int, named: Session, shown: int) -> World:
        node = world.nodes[at]
        if not session.takes_snapshot(node.side, named, position(shown), position(node.log)):
            return world
        _check_applied(world, shown)
        world = _put(world, at, log=shown, synced=shown, applied=shown)
        return self.acknowledges(world, at, sender)

    def on_ack(self, world: World, sender: int, at: int, named: Session, number: int) -> World:
        ship = world.nodes[at].ship
        return world if ship is None else _put(world, at, ship=shipping.acked(ship, named, number))

    def on_beacon(self, world: World, sender: int, at: int, named: Session, asked_at: int) -> World:
        node = world.nodes[at]
        if not lease.grants(node.side, named, None, 0, 1):
            return world
        world = _put(world, at, given=lease.granted(node.given, 0, LEASE, NO_MARGIN))
        return self.send(world, "grant", at, sender, named, asked_at)

    def on_grant(self, world: World, sender: int, at: int, named: Session, asked_at: int) -> World:
        node = world.nodes[at]
        if node.ship is None or shipping.find(node.ship, named) is None:
            return world
        return _put(world, at, grants=lease.held(node.grants, named, asked_at, LEASE))

    def on_return(self, world: World, sender: int, at: int, named: Session) -> World:
        node = world.nodes[at]
        return _put(world, at, given=lease.returned(node.given, node.side, named, 0))

    # --- steps with more than one part

    def acknowledges(self, world: World, at: int, to: int) -> World:
        """The copy acknowledges what its disk has."""
        node = world.nodes[at]
        named = node.side.session
        if named is None or (number := session.acknowledged(node.side, named, tree.length[node.synced])) is None:
            return world
        return self.send(world, "ack", at, to, named, number)

    def sync(self, world: World, at: int) -> World:
        node = world.nodes[at]
        world = _put(world, at, synced=node.log)
        if node.ship is not None:
            return _put(world, at, ship=shipping.synced(node.ship, tree.length[node.log]))
        for to, other in enumerate(world.nodes):
            if other.ship is not None and node.side.session and shipping.find(other.ship, node.side.session):
                return self.acknowledges(world, at, to)
        return world

    def follow(self, world: World, at: int) -> World:
        node, config = world.nodes[at], world.config
        if node.ship is not None:
            return self.follow_as_primary(world, at, node, node.ship)
        going = None if node.opening is None else opening.follow(node.opening, config)
        return _put(world, at, config=config, opening=going)

    def follow_as_primary(self, world: World, at: int, node: Node, ship: Shipping) -> World:
        log, config = node.log, world.config
        if config.term == ship.config.term and config.replicas != ship.config.replicas:
            log = tree.child(log, Rec(config.term, 0, config))
            ship = shipping.appended(ship, tree.length[log])
        ship = shipping.follow(ship, config, tree.length[log])
        if ship.deposed:
            return _put(world, at, config=config, ship=None, grants=Grants())
        return _put(world, at, config=config, ship=ship, log=log)

    def acknowledge(self, world: World, at: int) -> World:
        """The primary answers its clients: all that is visible is acknowledged."""
        ship, log = world.nodes[at].ship, world.nodes[at].log
        assert ship is not None
        shown = tree.cut(log, ship.committed)
        if tree.has(world.acked, shown):
            return _applied(world, at, ship.committed)
        if not tree.has(shown, world.acked):
            raise Violation(f"node {at} acknowledges what forks from what was acknowledged")
        return _applied(world._replace(acked=shown), at, ship.committed)

    def crash(self, world: World, at: int, log: int) -> World:
        """The process ends, and starts again."""
        node = world.nodes[at]
        side = restarted(node.side)
        given = lease.granted_at_start(tree.logged(log), side.copy_id, side.promised, 0, LEASE, NO_MARGIN)
        synced = node.synced if log != node.synced else log
        return _set(world, at, Node(log, synced, node.applied, side, node.kept, node.start + 1, given))

    def lose(self, world: World, at: int) -> World:
        """The process starts again with an empty folder, in which it makes a copy with an id of its own."""
        node = world.nodes[at]
        side = Following(STORE, f"{node.side.copy_id}'")
        given = lease.granted_at_start(None, side.copy_id, 0, 0, LEASE, NO_MARGIN)
        return _set(world, at, Node(0, 0, 0, side, 1, node.start + 1, given))


def own_promise(side: Following, term: int) -> Following:
    """What a node that opens its store does first, durably."""
    return session.promise(side, term)


def restarted(side: Following) -> Following:
    """What the disk has kept of a copy's side."""
    return Following(side.store_id, side.copy_id, side.promised)


# --- the invariants


def check(world: World) -> None:
    """Raise Violation if what was acknowledged is not held, or could be answered otherwise."""
    members = [world.config.primary, *((copy.node, copy.copy_id) for copy in world.config.in_sync)]
    for at, node in enumerate(world.nodes):
        if (str(at), node.side.copy_id) in members and not tree.has(node.synced, world.acked):
            raise Violation(f"node {at}, which is in sync, lacks what was acknowledged")
    answering = [at for at in range(len(world.nodes)) if _may_answer(world.nodes[at])]
    if len(answering) > 1:
        raise Violation(f"nodes {answering} both answer")
    for at in answering:
        node = world.nodes[at]
        assert node.ship is not None
        if not tree.has(tree.cut(node.log, node.ship.committed), world.acked):
            raise Violation(f"node {at} would answer with an old state")


def _may_answer(node: Node) -> bool:
    if node.ship is None or not node.ship.serves:
        return False
    awaited = [link.session for link in shipping.awaited(node.ship)]
    return lease.may_answer(node.grants, awaited, 0)


def _check_applied(world: World, applied: int) -> None:
    for at, node in enumerate(world.nodes):
        if not tree.has(applied, node.applied) and not tree.has(node.applied, applied):
            raise Violation(f"what is applied to a file forks from the file of node {at}")


def _applied(world: World, at: int, number: int) -> World:
    applied = tree.cut(world.nodes[at].log, number)
    if tree.length[applied] <= tree.length[world.nodes[at].applied]:
        return world
    _check_applied(world, applied)
    return _put(world, at, applied=applied)


# --- small ones


def _set(world: World, at: int, node: Node) -> World:
    return world._replace(nodes=(*world.nodes[:at], node, *world.nodes[at + 1 :]))


def _put(world: World, at: int, **changes: Any) -> World:
    return _set(world, at, world.nodes[at]._replace(**changes))


def _spend(world: World, what: str) -> World:
    return world._replace(left=world.left._replace(**{what: getattr(world.left, what) - 1}))


def _may_lose(world: World, at: int) -> bool:
    """Another member of the set keeps its disk, so that at most R - 1 are lost without time to copy between."""
    members = [world.config.primary, *((copy.node, copy.copy_id) for copy in world.config.in_sync)]
    return any(
        (str(other), node.side.copy_id) in members for other, node in enumerate(world.nodes) if other != at
    )  # fmt: skip


def _is_begun(world: World, to: int, link: Link) -> bool:
    return link.begun and world.nodes[to].side.session == link.session


def _knows_less(world: World, to: int, link: Link, committed: int) -> bool:
    side = world.nodes[to].side
    return side.copy_id == link.session.copy_id and side.committed < committed


def _tick(world: World) -> World:
    """All times are one less; those that have run out stay at 0."""

    def later(node: Node) -> Node:
        until = tuple((named, until - 1) for named, until in node.grants.until if until > 1)
        return node._replace(given=Granted(max(0, node.given.until - 1)), grants=node.grants._replace(until=until))

    net = frozenset(
        (*message[:-1], max(-LEASE, message[-1] - 1)) if message[0] in ("beacon", "grant") else message
        for message in world.net
    )
    return world._replace(nodes=tuple(map(later, world.nodes)), net=net)


def cluster(copies: str, left: Left, *, spare: int = 0) -> World:
    """A shard on node 0, which serves; each letter of `copies` is another node: "i" in sync, "j" joining.

    `spare`: more nodes, which have no copy yet. Nothing was written; every node follows the map.
    """
    replicas = tuple(
        Replica(str(at), f"c{at}", "in-sync" if letter == "i" else "joining", 1) for at, letter in enumerate(copies, 1)
    )
    config = Configuration("s", STORE, 1, 1, Primary("0", "c0"), replicas)
    log = tree.child(0, Rec(1, 0, config))
    ship = shipping.opened(config, "0", "0", 1, 1)
    for link in ship.links:
        ship = shipping.greet(ship, link) if link.in_sync else ship
    nodes = [Node(log, log, log, Following(STORE, "c0", 1), config=config)]
    for link in ship.links:
        side = Following(STORE, link.session.copy_id, 1)
        if link.in_sync:
            side = session.begun(side, link.session)
            ship = shipping.acked(ship, link.session, 1)
            nodes.append(Node(log, log, 0, side, config=config))
        else:
            nodes.append(Node(0, 0, 0, side, config=config))
    nodes[0] = nodes[0]._replace(ship=ship)
    nodes += [Node(0, 0, 0, Following(STORE, f"c{len(nodes) + at}")) for at in range(spare)]
    return World(tuple(nodes), config, left, acked=log)
