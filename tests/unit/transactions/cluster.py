"""A small cluster at one moment, and what becomes of it when something happens.

Owns: the scenario; the position (which stores, which routers and recoveries, what is under way, what clients were
told); what each event makes of it.
Leaves to others: which events can happen and in which order (`explorer`), what stores and actors do (`world`,
`actors`).

A reply arrives at once: a router that hears it later only sends later, and what it sends can be late anyway. An
operation begins when it first reaches a store: that binds it most in real time. Stores, actors, messages and answers
are kept as numbers, equal ones by the same number, so that a position is a small tuple of numbers; what a store does
with a message, and a router with a reply, is computed once and remembered.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from kvstore.errors import from_problem
from kvstore.protocol import Abort, Answer, ApplyIntents, Forget
from kvstore.storage.rows import LEASE, VALUE
from kvstore.store.leases import LeaseBody
from kvstore.store.ops import EndLockWaits
from tests.unit.transactions.actors import LOST, Coordinating, Owners, Played, Role, Told, play
from tests.unit.transactions.serial import Cell, Op, Txn
from tests.unit.transactions.world import Address, Holding, Noted, Sink, Store, Violation, at, canonical

T = TypeVar("T")


@dataclass(frozen=True)
class Scenario:
    """`owners`: of each key the number of its store. `clients`: each does its operations one after the other.

    `clocks`: the version clocks of the stores. `ages`: what the router's clock shows, for each transaction in turn; the
    smaller is the older. `attempts`: how many a router makes at most.
    `budget`: how often at most, in one story: `double` a message is delivered and stays under way; `timeout` its sender
    is told that it may be lost, and it is late, or lost; `unsent` it never left; `resolve` a store asks about an
    attempt; `finish` a store has a decision finished; `drop` a decision, acknowledged or a tombstone, is dropped;
    `crash` a store dies and comes back; `death` of a router; `move` of a key's partition; `give_up` those who wait for
    locks or read under them in a store have had their time; `later` all leases and replies are due.
    `may_wait`: operations may stay without an answer, such as one that waits for a lease.
    """

    owners: dict[str, int]
    clients: list[list[Op]]
    values: dict[str, bytes] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    clocks: tuple[int, ...] = ()
    ages: tuple[int, ...] = ()
    attempts: int = 2
    budget: dict[str, int] = field(default_factory=dict)
    may_wait: bool = False
    states_max: int = 100_000

    @property
    def ops(self) -> list[Op]:
        return [op for client in self.clients for op in client]

    @property
    def stores(self) -> int:
        return max(max(self.owners.values()) + 1, len(self.clocks))


FAULTS = (
    "double", "timeout", "unsent", "resolve", "finish", "drop", "crash", "death", "move", "give_up", "later",
)  # fmt: skip


class Message(NamedTuple):
    """Under way to a store. `address` None: the reply is not waited for (any more). `op`: its number."""

    store: int
    op: int
    address: Address


class Entry(NamedTuple):
    """What is known of a client's operation. `after`: -1, it has not begun; else a bit for each that was answered
    before. `answer`: 0 not asked, 1 under way, else the number of the answer."""

    after: int = -1
    answer: int = 0


UNDER_WAY, UNKNOWN = 1, 2


class Position(NamedTuple):
    """All numbers, so that it can be looked up fast. `owners`: by the scenario's keys, in their order."""

    stores: tuple[int, ...]
    owners: tuple[int, ...]
    actors: tuple[tuple[Any, int], ...]
    net: tuple[int, ...]
    entries: tuple[Entry, ...]
    budget: tuple[int, ...]

    def spend(self, fault: str) -> Position:
        place = FAULTS.index(fault)
        budget = self.budget
        return self._replace(budget=(*budget[:place], budget[place] - 1, *budget[place + 1 :]))

    def with_store(self, store: int, shot: int) -> Position:
        stores = self.stores
        if stores[store] == shot:
            return self
        return self._replace(stores=(*stores[:store], shot, *stores[store + 1 :]))

    def with_entry(self, number: int, entry: Entry) -> Position:
        return self._replace(entries=(*self.entries[:number], entry, *self.entries[number + 1 :]))

    def with_message(self, message: int) -> Position:
        return self._replace(net=tuple(sorted((*self.net, message))))


class Shot(NamedTuple):
    """A store as it was, and what must be known of it without waking it."""

    pickled: bytes
    held: tuple[Holding, ...]
    noted: tuple[tuple[Any, Noted], ...]
    cells: dict[str, Cell]
    with_intent: frozenset[str]
    has_readers: bool
    has_waiting: bool


class Actor(NamedTuple):
    role: Role
    owners: Owners
    told: tuple[Told, ...]
    played: Played


class Numbers(Generic[T]):
    """Equal things have the same number, 1 and up."""

    def __init__(self) -> None:
        self._number: dict[Hashable, int] = {}
        self._things: list[T | None] = [None]

    def find(self, form: Hashable) -> int | None:
        return self._number.get(form)

    def of(self, form: Hashable, thing: T) -> int:
        number = self._number.get(form)
        if number is None:
            number = self._number[form] = len(self._things)
            self._things.append(thing)
        return number

    def __getitem__(self, number: int) -> T:
        thing = self._things[number]
        assert thing is not None
        return thing


class Cluster:
    """What becomes of positions. It remembers what it has computed; a change of the code under test needs a new one."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.ops = scenario.ops
        self.keys = tuple(scenario.owners)
        self.shots: Numbers[Shot] = Numbers()
        self.requests: Numbers[Any] = Numbers()
        self.replies: Numbers[Any] = Numbers()
        self.messages: Numbers[Message] = Numbers()
        self.actors: Numbers[Actor] = Numbers()
        self.answers: Numbers[tuple[Any, ...]] = Numbers()
        assert (self.answer(("under way",)), self.answer(("unknown",))) == (UNDER_WAY, UNKNOWN)
        self._exact = any(isinstance(op, Txn) and op.transaction.reads_only for op in self.ops)
        self._memo: dict[Hashable, Any] = {}

    def begin(self) -> Position:
        scenario = self.scenario
        stores = []
        for number in range(scenario.stores):
            version = scenario.clocks[number] if scenario.clocks else 0
            store = Store(f"s{number}", [key for key, owner in scenario.owners.items() if owner == number], version)
            for version, (key, value) in enumerate(scenario.values.items(), 1):
                if scenario.owners[key] == number:
                    store.seed(VALUE, key, value, version)
            for name, token in scenario.leases.items():
                if scenario.owners[name] == number:
                    store.seed(LEASE, name, msgspec.json.encode(LeaseBody("holder", 10_000)), token)
            store.open()
            stores.append(self._shot(store))
        assert not scenario.budget.keys() - set(FAULTS)
        budget = tuple(scenario.budget.get(fault, 0) for fault in FAULTS)
        return Position(
            tuple(stores), tuple(scenario.owners.values()), (), (), tuple(Entry() for _ in self.ops), budget
        )

    # --- clients ------------------------------------------------------------------------------------------------------

    def ask(self, position: Position, number: int) -> Position:
        """A client asks the store that owns the key."""
        op: Any = self.ops[number]
        position = self._asked(position, number)
        store = position.owners[self.keys.index(op.key)]
        return self.deliver(position, Message(store, self.request(op), (("client", number), 0)))

    def get(self, position: Position, number: int) -> Position | None:
        """A client reads; None if it has to wait."""
        op: Any = self.ops[number]
        shot = self.shots[position.stores[position.owners[self.keys.index(op.key)]]]
        if not may_read(op.key, shot.with_intent):
            return None
        cell = shot.cells.get(op.key, Cell())
        answer = self.answer(("done", True, 0, ((cell.version or 0, cell.value),)))
        position = self._asked(position, number)
        return position.with_entry(number, position.entries[number]._replace(answer=answer))

    def _asked(self, position: Position, number: int) -> Position:
        after = position.entries[number].after
        return position.with_entry(number, Entry(after if after >= 0 else self._answered(position), UNDER_WAY))

    def start(self, position: Position, number: int) -> Position:
        """A router begins with a transaction."""
        op = self.ops[number]
        assert isinstance(op, Txn)
        place = sum(isinstance(each, Txn) for each in self.ops[:number])
        now_us = self.scenario.ages[place] if self.scenario.ages else 10 * (place + 1)
        role = Coordinating(number, op.transaction, op.once, now_us, self.scenario.attempts)
        return self.begin_actor(position.with_entry(number, Entry(-1, UNDER_WAY)), ("router", number), role)

    def _tell_client(self, position: Position, number: int, reply: Any) -> Position:
        entry = position.entries[number]
        if entry.answer != UNDER_WAY:
            raise Violation(f"operation {number} is answered twice")
        if reply == LOST:
            return position.with_entry(number, entry._replace(answer=UNKNOWN))
        answer = self.replies[reply]
        assert isinstance(answer, Answer)
        if answer.status == 421:
            return position.with_entry(number, entry._replace(answer=0))
        if answer.status in (412, 404):
            result: tuple[Any, ...] = ("done", False, 0, ())
        elif answer.problem is not None:
            result = ("no", from_problem(answer.problem).code)
        else:
            result = ("done", True, answer.version, ())
        return position.with_entry(number, entry._replace(answer=self.answer(result)))

    def _answered(self, position: Position) -> int:
        return sum(1 << number for number, entry in enumerate(position.entries) if entry.answer > UNKNOWN)

    # --- actors -------------------------------------------------------------------------------------------------------

    def begin_actor(self, position: Position, address: Any, role: Role) -> Position:
        owners = self.owners(position)
        key = ("begin", role, owners)
        if key not in self._memo:
            actor = Actor(role, owners, (), play(role, owners, ()))
            self._memo[key] = self.actors.of((role, actor.played.form()), actor), tuple(actor.played.sent)
        number, sent = self._memo[key]
        actors = tuple(sorted([*position.actors, (address, number)]))
        return self._send(position._replace(actors=actors), address, 0, sent)

    def tell(self, position: Position, address: Address, reply: Any) -> Position:
        """A client has a reply: its number, or LOST, or UNSENT. Raises Violation if it has had one."""
        assert address is not None
        who, request = address
        if who[0] == "client":
            return self._tell_client(position, who[1], reply)
        number = next((number for each, number in position.actors if each == who), 0)
        if not number:
            return position
        if self.actors[number].played.replies[request] is not None:
            raise Violation(f"request {request} of {who} is answered twice")
        view: tuple[str, ...] = ()
        if who[0] == "resolver":
            shot = self.shots[position.stores[who[1]]]
            view = next((held.keys for held in shot.held if held.attempt.name == who[2]), ())
        key = ("tell", number, request, reply, self.owners(position), view)
        if key not in self._memo:
            self._memo[key] = self._played(*key[1:])  # type: ignore[arg-type]
        after, first, sent, result, acknowledged = self._memo[key]
        is_over = who[0] != "router" and result is not None
        actors = [(each, after if each == who else other) for each, other in position.actors]
        position = position._replace(actors=tuple(each for each in actors if not (is_over and each[0] == who)))
        if who[0] == "router" and result is not None:
            entry = position.entries[who[1]]
            if entry.answer == UNDER_WAY:
                position = position.with_entry(who[1], entry._replace(answer=self.answer(result)))
        if acknowledged:
            position = self._acknowledge(position, who[1], acknowledged)
        return self._send(position, who, first, sent)

    def _played(self, number: int, request: int, reply: Any, owners: Owners, view: tuple[str, ...]) -> Any:
        role, began_with, told, before = self.actors[number]
        told = (*told, Told(request, reply if isinstance(reply, str) else self.replies[reply], owners, view))
        played = play(role, began_with, told)
        after = self.actors.of((role, played.form()), Actor(role, began_with, told, played))
        first = len(before.sent)
        return after, first, tuple(played.sent[first:]), played.result, tuple(played.acknowledged)

    def _send(self, position: Position, who: Any, first: int, sent: Any) -> Position:
        """What would never be noticed is not sent; a reply that is not looked at has no address."""
        drops = self.scenario.budget.get("drop", 0)
        for number, (store, op) in enumerate(sent, first):
            if isinstance(op, Forget) and not drops:
                continue
            is_silent = isinstance(op, Abort | Forget) or (isinstance(op, ApplyIntents) and not drops)
            message = Message(store, self.request(op), None if is_silent else (who, number))
            position = position.with_message(self.message(message))
        return position

    # --- messages -----------------------------------------------------------------------------------------------------

    def deliver(self, position: Position, message: Message) -> Position:
        op = self.requests[message.op]
        if isinstance(op, Forget):
            return self._acknowledge(position, message.store, op.attempts)
        position = self.begun(position, message)
        shot, replies = self.run(position.stores[message.store], (message.op, message.address))
        return self._tell_all(position.with_store(message.store, shot), replies)

    def begun(self, position: Position, message: Message) -> Position:
        """The operation that the message is a part of has begun, at the latest now."""
        if message.address is None or message.address[0][0] != "router":
            return position
        number = message.address[0][1]
        entry = position.entries[number]
        if entry.after >= 0:
            return position
        return position.with_entry(number, entry._replace(after=self._answered(position)))

    def _tell_all(self, position: Position, replies: Any) -> Position:
        for address, reply in replies:
            if address is not None:
                position = self.tell(position, address, reply)
        return position

    # --- stores -------------------------------------------------------------------------------------------------------

    def run(self, shot: int, *work: tuple[int, Address]) -> tuple[int, tuple[tuple[Address, int], ...]]:
        """What a store does with a batch: what becomes of it, and who gets which reply."""
        return self.change(
            ("run", shot, work),
            shot,
            lambda store: store.run(*[(self.requests[op], Sink(address)) for op, address in work]),
        )

    def change(self, key: Hashable, shot: int, change: Callable[[Store], Any]) -> Any:
        found = self._memo.get(key)
        if found is None:
            store = self.store(shot)
            replies = change(store) or []
            told = tuple([(address, self.reply(reply)) for address, reply in replies])
            found = self._memo[key] = self._shot(store), told
        return found

    def store(self, shot: int) -> Store:
        store: Store = pickle.loads(self.shots[shot].pickled)
        return store

    def _shot(self, store: Store) -> int:
        form = canonical(store, self._exact)
        number = self.shots.find(form)
        if number is not None:
            return number
        values = [row for row in store.rows.values() if row.kind == VALUE and store.arrivals[row.partition]]
        shot = Shot(
            pickle.dumps(store, pickle.HIGHEST_PROTOCOL),
            tuple(store.held()),
            tuple(sorted(store.noted.items(), key=lambda item: item[0].name)),
            {row.key: Cell(row.body, row.version) if row.body is not None else Cell() for row in values},
            frozenset(row.key for row in values if row.intent is not None),
            bool(store.holds.readers),
            bool(store.locks.all_waiting()),
        )
        return self.shots.of(form, shot)

    def _acknowledge(self, position: Position, store: int, attempts: Any) -> Position:
        key = ("acknowledge", position.stores[store], tuple(attempt.name for attempt in attempts))
        shot, _ = self.change(key, position.stores[store], lambda store: store.acknowledge(attempts))
        return position.with_store(store, shot)

    # --- faults -------------------------------------------------------------------------------------------------------

    def crash(self, position: Position, store: int) -> Position:
        key = ("crash", position.stores[store])
        shot, lost = self.change(
            key, position.stores[store], lambda store: [(address, LOST) for address in store.crash()]
        )
        return self._tell_all(position.with_store(store, shot), lost)

    def death(self, position: Position, address: Any) -> Position:
        """A router dies. What it has sent may still arrive."""
        net = []
        for number in position.net:
            message = self.messages[number]
            if message.address and message.address[0] == address:
                position = self.begun(position, message)
                number = self.message(message._replace(address=None))
            net.append(number)
        entry = position.entries[address[1]]
        if entry.answer == UNDER_WAY:
            position = position.with_entry(address[1], entry._replace(answer=UNKNOWN))
        actors = tuple(each for each in position.actors if each[0] != address)
        return position._replace(actors=actors, net=tuple(sorted(net)))

    def hang_up(self, position: Position, who: Any) -> Position:
        """The stores see that a router's connection has ended."""

        def close(store: Store) -> None:
            for _, queued in store.locks.all_waiting():
                assert isinstance(queued.sink, Sink)
                if queued.sink.address is not None and queued.sink.address[0] == who:
                    queued.sink.closed = True

        for store, shot in enumerate(position.stores):
            if self.shots[shot].has_waiting:
                position = position.with_store(store, self.change(("hang up", shot, who), shot, close)[0])
        return position

    def move(self, position: Position, place: int, destination: int) -> Position:
        """The partition of a key moves, from the fence to the commit in one step."""
        source, key = position.owners[place], self.keys[place]
        memo_key = ("move", position.stores[source], position.stores[destination], key)
        if memo_key not in self._memo:
            giver, taker = self.store(position.stores[source]), self.store(position.stores[destination])
            rows, replies = giver.give_away(key)
            taker.take_in(key, rows, giver.clock)
            told = tuple((address, self.reply(reply)) for address, reply in replies)
            self._memo[memo_key] = self._shot(giver), self._shot(taker), told
        gave, took, told = self._memo[memo_key]
        owners = tuple(
            destination if at(name) == at(key) else owner
            for name, owner in zip(self.keys, position.owners, strict=True)
        )
        position = position._replace(owners=owners).with_store(source, gave).with_store(destination, took)
        return self._tell_all(position, told)

    def give_up(self, position: Position, store: int) -> Position:
        key = ("give up", position.stores[store])
        shot, replies = self.change(
            key,
            position.stores[store],
            lambda store: store.run((EndLockWaits(1e9, 1e9), Sink(None))) + store.end_reads(),
        )
        return self._tell_all(position.with_store(store, shot), replies)

    def later(self, position: Position) -> Position:
        for store in range(len(position.stores)):
            key = ("later", position.stores[store])
            shot, replies = self.change(key, position.stores[store], Store.pass_time)
            position = self._tell_all(position.with_store(store, shot), replies)
        return position

    # --- numbers ------------------------------------------------------------------------------------------------------

    def owners(self, position: Position) -> Owners:
        return tuple(zip(self.keys, position.owners, strict=True))

    def request(self, op: Any) -> int:
        return self.requests.of((type(op), msgspec.msgpack.encode(op)), op)

    def reply(self, reply: Any) -> Any:
        return reply if isinstance(reply, str) else self.replies.of((type(reply), msgspec.msgpack.encode(reply)), reply)

    def answer(self, answer: tuple[Any, ...]) -> int:
        return self.answers.of(answer, answer)

    def message(self, message: Message) -> int:
        return self.messages.of(message, message)


def may_read(key: str, with_intent: frozenset[str]) -> bool:
    """As `Store._answer_get`: a read waits for an undecided intent."""
    return key not in with_intent
