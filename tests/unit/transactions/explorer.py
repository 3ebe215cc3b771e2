"""All that can happen in a small cluster, one message after the other, in every order.

An exhaustive search, depth first, over all positions that a scenario can reach: messages are delivered in any order,
late, twice, or never; stores and routers die; partitions move; what finds an intent too old asks; decisions are
dropped. How often each of these faults happens is the scenario's budget; all else happens as often as it can.

Every position is also looked at as an end: all routers die in it, and all that is under way is lost. Then the stores
bring to an end whatever is left, by themselves, and what clients were told must be explained by some order of their
operations (`serial`). So it is checked at every step what would become of each if nothing more happened.
Where nothing went wrong, every request must have been answered when nothing more can happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any, NamedTuple

from kvstore.protocol import (
    Abort,
    ApplyIntents,
    Forget,
    Get,
    Outcome,
    ReadLock,
    ReadUnlock,
    Release,
    ResolveTxn,
    Transact,
)
from kvstore.store.ops import DropDecisions
from tests.unit.transactions.actors import LOST, UNSENT, Finishing, Owners, Resolving
from tests.unit.transactions.cluster import FAULTS, UNKNOWN, Cluster, Message, Position, Scenario
from tests.unit.transactions.serial import Cell, Done, Forgotten, Model, Op, Txn, is_explained
from tests.unit.transactions.world import Address, Noted, Store, Violation

_Label = tuple[Any, ...]
_Step = tuple[_Label, Position]
_SETTLING: Address = (("unused",), 0)
_ROUNDS_MAX = 20


class Report(NamedTuple):
    """`ends`: what clients were told and what lay in the stores then, in different combinations."""

    states: int
    steps: int
    ends: int


def explore(scenario: Scenario, *, pairs: bool = False) -> Report:
    """Raises Violation, with the story that leads to it; RuntimeError if there are more states than allowed.

    `pairs`: also check that two operations do the same in one batch as in two.
    """
    return Explorer(scenario, pairs=pairs).explore()


class Explorer:
    def __init__(self, scenario: Scenario, *, pairs: bool) -> None:
        self._scenario = scenario
        self._pairs = pairs
        self._cluster = Cluster(scenario)
        self._ops = scenario.ops
        self._places = [place for client in scenario.clients for place in range(len(client))]
        self._settled: dict[Any, Any] = {}
        self._explained: set[Any] = set()
        self._begin_model = Model(
            {key: Cell(value, number) for number, (key, value) in enumerate(scenario.values.items(), 1)},
            dict(scenario.leases),
            {},
        )

    def explore(self) -> Report:
        begin = self._cluster.begin()
        seen = {begin}
        steps = 0
        story: list[_Label] = [("begin",)]
        stack = [self._look_at(begin, story)]
        while stack:
            try:
                step = next(stack[-1], None)
            except Violation as violation:
                raise Violation("\n".join([str(violation), "after:", *map(self._tell, story)])) from None
            if step is None:
                stack.pop()
                story.pop()
                continue
            steps += 1
            label, position = step
            if position in seen:
                continue
            seen.add(position)
            if len(seen) > self._scenario.states_max:
                raise RuntimeError(f"more than {self._scenario.states_max} states")
            story.append(label)
            stack.append(self._look_at(position, story))
        return Report(len(seen), steps, len(self._explained))

    def _look_at(self, position: Position, story: list[_Label]) -> Iterator[_Step]:
        """What can happen next. Raises Violation."""
        self._check_end(position)
        if self._pairs:
            self._check_pairs(position)
        goes_on = False
        for step in self._steps(position):
            goes_on = goes_on or step[0][0] not in FAULTS
            yield step
        if not goes_on and not self._scenario.may_wait and not any(label[0] in FAULTS for label in story):
            waiting = [number for number, entry in enumerate(position.entries) if entry.answer < UNKNOWN]
            if waiting:
                raise Violation(f"operations {waiting} are never answered, although nothing went wrong")

    # --- what can happen ----------------------------------------------------------------------------------------------

    def _steps(self, position: Position) -> Iterator[_Step]:
        cluster = self._cluster
        for number, entry in enumerate(position.entries):
            if entry.answer == 0 and (not self._places[number] or position.entries[number - 1].answer >= UNKNOWN):
                if isinstance(self._ops[number], Txn):
                    yield ("start", number), cluster.start(position, number)
                elif not isinstance(self._ops[number], Get):
                    yield ("ask", number), cluster.ask(position, number)
                elif (read := cluster.get(position, number)) is not None:
                    yield ("ask", number), read
        for place, message in enumerate(position.net):
            if not place or position.net[place - 1] != message:
                yield from self._with_message(position, message)
        if any(position.budget):
            left = {fault for fault, count in zip(FAULTS, position.budget, strict=True) if count}
            if left & {"resolve", "finish", "drop"}:
                yield from self._recovering(position, left)
            yield from self._failing(position, left)

    def _with_message(self, position: Position, number: int) -> Iterator[_Step]:
        cluster = self._cluster
        message = cluster.messages[number]
        place = position.net.index(number)
        without = position._replace(net=position.net[:place] + position.net[place + 1 :])
        yield ("deliver", message), cluster.deliver(without, message)
        if message.address is None or not any(position.budget[:3]):
            return
        double, timeout, unsent = position.budget[:3]
        is_read = isinstance(cluster.requests[message.op], ReadLock | ReadUnlock)
        without = cluster.begun(without, message)
        late = without.with_message(cluster.message(message._replace(address=None)))
        if double and not is_read and not isinstance(cluster.requests[message.op], ResolveTxn | Transact):
            yield ("double", message), cluster.deliver(late.spend("double"), message)
        if timeout:
            lost = UNSENT if is_read else LOST
            yield ("timeout", message), cluster.tell(late.spend("timeout"), message.address, lost)
        if unsent:
            yield ("unsent", message), cluster.tell(without.spend("unsent"), message.address, UNSENT)

    def _recovering(self, position: Position, left: set[str]) -> Iterator[_Step]:
        cluster = self._cluster
        at_work = {address for address, _ in position.actors}
        for store, number in enumerate(position.stores):
            shot = cluster.shots[number]
            for held in shot.held if "resolve" in left else ():
                address: Any = ("resolver", store, held.attempt.name)
                if address not in at_work:
                    role = Resolving(store, held.attempt, held.anchor)
                    yield ("resolve", *address[1:]), cluster.begin_actor(position.spend("resolve"), address, role)
            for attempt, noted in shot.noted:
                address = ("finisher", store, attempt.name)
                if "finish" in left and not noted.acknowledged and address not in at_work:
                    decision = cluster.store(number).decision(attempt)
                    assert decision is not None
                    finishing = Finishing(store, attempt, decision.encode())
                    yield ("finish", *address[1:]), cluster.begin_actor(position.spend("finish"), address, finishing)
                if "drop" in left and may_drop(noted):
                    drop = Message(store, cluster.request(DropDecisions([attempt])), None)
                    yield ("drop", *address[1:]), cluster.deliver(position.spend("drop"), drop)

    def _failing(self, position: Position, left: set[str]) -> Iterator[_Step]:
        cluster = self._cluster
        stores = range(len(position.stores))
        if "crash" in left:
            for store in stores:
                yield ("crash", store), cluster.crash(position.spend("crash"), store)
        if "death" in left:
            for address, _ in position.actors:
                if address[0] == "router":
                    dead = cluster.death(position.spend("death"), address)
                    yield ("death", address[1]), dead
                    yield ("death", address[1], "noticed"), cluster.hang_up(dead, address)
        if "move" in left:
            for place, owner in enumerate(position.owners):
                for store in stores:
                    if store != owner:
                        label = ("move", cluster.keys[place], "to", store)
                        yield label, cluster.move(position.spend("move"), place, store)
        if "give_up" in left:
            for store in stores:
                yield ("give_up", store), cluster.give_up(position.spend("give_up"), store)
        if "later" in left:
            yield ("later",), cluster.later(position.spend("later"))

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _check_pairs(self, position: Position) -> None:
        """Whatever could be done in two batches is done in the same way in one."""
        cluster = self._cluster
        can_come = [cluster.messages[number] for number in position.net]
        for number, entry in enumerate(position.entries):
            op = self._ops[number]
            if entry.answer == 0 and not isinstance(op, Txn | Get):
                store = dict(cluster.owners(position))[op.key]
                can_come.append(Message(store, cluster.request(op), (("client", number), 0)))
        can_come = [message for message in can_come if not isinstance(cluster.requests[message.op], Forget)]
        for first, second in permutations(can_come, 2):
            if first.store == second.store:
                shot = position.stores[first.store]
                work = first[1:], second[1:]
                between, replies = cluster.run(shot, work[0])
                after, more = cluster.run(between, work[1])
                if cluster.run(shot, *work) != (after, replies + more):
                    told = [cluster.requests[op] for op, _ in work]
                    raise Violation(f"two operations do something else in one batch than in two: {told}")

    def _check_end(self, position: Position) -> None:
        """All routers die, and all that is under way is lost: what clients were told must be explained."""
        cluster = self._cluster
        key = position.stores, position.owners
        if key not in self._settled:
            self._settled[key] = self._settle(list(position.stores), cluster.owners(position))
        stores, replies = self._settled[key]
        told = position._replace(actors=(), net=())
        for address, reply in replies:
            if address is not None and address[0][0] == "client":
                told = cluster.tell(told, address, reply)
        end = told.entries, stores, position.owners
        if end in self._explained:
            return
        cells = {name: cluster.shots[stores[owner]].cells.get(name, Cell()) for name, owner in cluster.owners(position)}
        done = self._done(told)
        if not is_explained(done, self._begin_model, cells):
            lines = [f"  {number}: {each.answer} after {sorted(each.after)}" for number, each in done.items()]
            raise Violation("\n".join(["no order explains", *lines, f"with {cells} in the end"]))
        self._explained.add(end)

    def _done(self, position: Position) -> dict[int, Done]:
        """What has begun and was not refused; and what may happen by itself."""
        done: dict[int, Done] = {}
        for number, entry in enumerate(position.entries):
            answer = self._cluster.answers[entry.answer] if entry.answer > UNKNOWN else None
            if entry.after >= 0 and (answer is None or answer[0] != "no"):
                before = {other for other in range(len(self._ops)) if entry.after >> other & 1}
                done[number] = Done(self._ops[number], answer, frozenset(before))
        for number, each in done.items():
            done[number] = each._replace(after=each.after & done.keys())
        by_itself: list[Op] = []
        budget = self._scenario.budget
        if budget.get("later"):
            by_itself += [Release(0, name, token) for name, token in self._scenario.leases.items()]
            by_itself += [Forgotten()] if budget.get("drop") else []  # a reply outlives its time until then
        for number, op in enumerate(by_itself, len(self._ops)):
            done[number] = Done(op, None, frozenset())
        return done

    def _settle(self, stores: list[int], owners: Owners) -> Any:
        """The stores as they are when nothing else happens any more; and who was answered on the way."""
        cluster = self._cluster
        owner_of = dict(owners)
        answered: list[tuple[Address, int]] = []

        def run(store: int, op: Any) -> Any:
            stores[store], replies = cluster.run(stores[store], (cluster.request(op), _SETTLING))
            answered.extend(replies)
            return next(cluster.replies[reply] for address, reply in replies if address == _SETTLING)

        for _ in range(_ROUNDS_MAX):
            readers = [store for store, shot in enumerate(stores) if cluster.shots[shot].has_readers]
            for store in readers:
                key = "end reads", stores[store]
                stores[store], replies = cluster.change(key, stores[store], Store.end_reads)
                answered.extend(replies)
            holders = [(store, held) for store, shot in enumerate(stores) for held in cluster.shots[shot].held]
            for store, held in holders:
                outcome = run(owner_of[held.anchor], ResolveTxn(0, held.anchor, held.attempt))
                assert isinstance(outcome, Outcome)
                if outcome.state == "committed":
                    decided = outcome.version, outcome.succeeded, outcome.decided_ms
                    run(store, ApplyIntents(0, held.attempt, list(held.keys), *decided))
                else:
                    run(store, Abort(0, held.attempt, list(held.keys)))
            if not holders and not readers:
                break
        else:
            raise Violation("intents are left, however often they are asked for")
        if any(cluster.shots[shot].has_waiting for shot in stores):
            raise Violation("a transaction waits for a lock that is free")
        return tuple(stores), tuple(answered)

    # --- for people ---------------------------------------------------------------------------------------------------

    def _tell(self, label: _Label) -> str:
        kind, *details = label
        if kind in ("start", "ask"):
            details.append(self._ops[details[0]])
        elif details and isinstance(details[0], Message):
            store, op, address = details[0]
            details = [f"to s{store} for {address and address[0]}:", self._cluster.requests[op]]
        return "  " + " ".join(map(str, (kind, *details)))


def may_drop(noted: Noted) -> bool:
    """As `Store.old_decisions`."""
    return noted.acknowledged
