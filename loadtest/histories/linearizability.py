"""Is there an order of concurrent operations that a sequential thing, one at a time, could have answered so?

Owns: the search for such an order, for any sequential model; the window that is shown when there is none.
Promises: pure. "No" means that all orders were tried, up to those that are equivalent; a search that needs more steps
than it may take says that it does not know. It never accuses what is right.
Leaves to others: the model, and what is known about its operations beforehand (registers).

The method is that of Wing & Gong ("Testing and Verifying Concurrent Objects", 1993): of the operations that are not
placed yet, one that no other one ended before is placed next, if the model allows it; if none is left, the last choice
was wrong. Lowe ("Testing for Linearizability", 2017) remembers which sets of placed operations with which state have
been tried; the list of calls and returns from which placed ones are lifted is that of Porcupine (Athalye, 2017). Keys
are judged one by one, as linearizability is local (Herlihy & Wing 1990; Horn & Kroening 2015 call it P-compositional).

What makes long histories cheap here, and why nothing is lost by it:

    A set of placed operations is kept as how many of the first ones are all placed, and a mask of those beyond: it is
    as wide as the concurrency, not as the history.
    An operation that takes nothing from others (a read; `is_pure`) is placed as soon as it is allowed, with no
    alternative: in any order that places it later it can be moved to here, and no client notices.
    Optional operations (of unknown outcome, with no end) of one `kind` are the same to all others, and once begun they
    stay available: so only how many of each kind are placed matters, and a client that has placed fewer can do all that
    another one can.
    At an instant at which nothing is under way and whose state is the same in every order, all orders meet: what came
    before is forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

STEPS_MAX = 500_000

_SHOWN_MAX = 6  # operations that could not be placed
_LAST_SHOWN = 4  # of those placed last

Op = TypeVar("Op")
Taken = TypeVar("Taken", contravariant=True)
State = TypeVar("State", bound=Hashable)


class Model(Protocol[Taken, State]):
    """A sequential thing. All of it is pure."""

    @property
    def initial(self) -> State: ...

    def step(self, state: State, operation: Taken) -> State | None:
        """The state after the operation; None: in this state it cannot have been answered as it was."""

    def is_pure(self, operation: Taken) -> bool:
        """Wherever it can be done, others can afterwards be answered all that they could be before."""

    def fixes(self, operation: Taken) -> bool:
        """The state after it does not depend on the one before."""

    def kind(self, operation: Taken) -> Hashable:
        """Optional operations of the same kind do the same in every state."""


class Entry(NamedTuple, Generic[Op]):
    """An operation that was done between `begin_s` and `end_s`; without an end it is optional: done later, or never.

    `rank` is a guess at the order: of several that can be next, the lowest is tried first.
    """

    operation: Op
    begin_s: float
    end_s: float | None
    rank: float = 0.0


class Stuck(NamedTuple, Generic[Op, State]):
    """The longest beginning of the history for which there is an order: up to `until_s`.

    `last`: those placed last, in order; `state`: the one that they leave; `left`: those that had begun and could not be
    placed, of which the first one ended at `until_s`.
    """

    until_s: float
    placed: int
    last: list[Op]
    state: State
    left: list[Op]


class Outcome(NamedTuple, Generic[Op, State]):
    """`stuck` is None if there is an order.
    `decided`: False if the search was given up; `stuck` is then as far as it came."""

    decided: bool
    stuck: Stuck[Op, State] | None
    steps: int


def search(model: Model[Op, State], entries: Sequence[Entry[Op]], steps_max: int = STEPS_MAX) -> Outcome[Op, State]:
    """Looks for an order; gives up after `steps_max` operations placed.

    Raises ValueError for an entry that ends before it begins.
    """
    for entry in entries:
        if entry.end_s is not None and entry.end_s < entry.begin_s:
            raise ValueError(f"{entry.operation} ends ({entry.end_s}) before it begins ({entry.begin_s})")
    return _Search(model, entries).run(steps_max)


class _Node:
    """A call or a return in the list of those that are not placed.
    `place` is that of the entry; -1 at both ends."""

    __slots__ = ("after", "before", "is_return", "partner", "place")

    def __init__(self, place: int, is_return: bool) -> None:
        self.place = place
        self.is_return = is_return
        self.before: _Node = self
        self.after: _Node = self
        self.partner: _Node = self


class _Choice(NamedTuple, Generic[State]):
    """`call` is placed next, or, if it is None, an optional operation of the group `group`; `state` is that after."""

    call: _Node | None
    group: int
    state: State


class _Position(NamedTuple, Generic[State]):
    """The first `full` entries are placed, those of `mask` beyond them, and `taken` of each group of optional ones."""

    full: int
    mask: int
    taken: tuple[int, ...]
    state: State


class _Search(Generic[Op, State]):
    def __init__(self, model: Model[Op, State], entries: Sequence[Entry[Op]]) -> None:
        self._model = model
        self._entries = sorted((e for e in entries if e.end_s is not None), key=lambda entry: entry.begin_s)
        self._pure = [model.is_pure(entry.operation) for entry in self._entries]
        self._groups = _groups(model, [entry for entry in entries if entry.end_s is None])
        self._head = _linked(self._entries)
        self._cuts = self._find_cuts()
        self._at: _Position[State] = _Position(0, 0, (0,) * len(self._groups), model.initial)
        self._seen: dict[tuple[int, int, State], list[tuple[int, ...]]] = {}
        self._trail: list[tuple[Iterator[_Choice[State]], _Choice[State], _Position[State]]] = []
        self._forgotten: list[Op] = []  # of the trail that was cut off: its last ones
        self._stuck: Stuck[Op, State] | None = None

    def run(self, steps_max: int) -> Outcome[Op, State]:
        steps = 0
        choices = self._choices()
        while self._head.after.place >= 0:
            choice = next(choices, None)
            if choice is None:
                self._note()
                if not self._trail:
                    return Outcome(True, self._stuck, steps)
                choices, undone, self._at = self._trail.pop()
                if undone.call is not None:
                    _put_back(undone.call)
                continue
            if steps == steps_max:
                return Outcome(False, self._stuck, steps)
            steps += 1
            position = self._after(choice)
            if not self._is_new(position):
                continue
            self._trail.append((choices, choice, self._at))
            self._at = position
            if choice.call is not None:
                _lift(choice.call)
            if position.mask == 0 and position.full in self._cuts:
                self._forget()
            choices = self._choices()
        return Outcome(True, None, steps)

    def _after(self, choice: _Choice[State]) -> _Position[State]:
        full, mask, taken, _ = self._at
        if choice.call is None:
            taken = (*taken[: choice.group], taken[choice.group] + 1, *taken[choice.group + 1 :])
        else:
            mask |= 1 << (choice.call.place - full)
            while mask & 1:
                mask >>= 1
                full += 1
        return _Position(full, mask, taken, choice.state)

    def _is_new(self, position: _Position[State]) -> bool:
        """No position was tried that differs in nothing, or in fewer optional operations placed."""
        tried = self._seen.setdefault((position.full, position.mask, position.state), [])
        if any(all(fewer <= more for fewer, more in zip(one, position.taken, strict=True)) for one in tried):
            return False
        tried.append(position.taken)
        return True

    def _choices(self) -> Iterator[_Choice[State]]:
        """What can be next, the likeliest first. A pure operation that can be leaves no choice."""
        state, step = self._at.state, self._model.step
        found: list[_Choice[State]] = []
        call = self._head.after
        while not call.is_return and call.place >= 0:
            after = step(state, self._entries[call.place].operation)
            if after is not None:
                choice = _Choice(call, -1, after)
                if self._pure[call.place]:
                    return iter((choice,))
                found.append(choice)
            call = call.after
        found.sort(key=self._likelihood)
        found += self._optional_choices(call)
        return iter(found)

    def _likelihood(self, choice: _Choice[State]) -> tuple[float, float]:
        assert choice.call is not None
        entry = self._entries[choice.call.place]
        return entry.rank, entry.end_s or 0.0

    def _optional_choices(self, first_return: _Node) -> Iterator[_Choice[State]]:
        if first_return.place < 0:
            return
        until_s = self._entries[first_return.place].end_s or 0.0
        for group, entries in enumerate(self._groups):
            taken = self._at.taken[group]
            if taken < len(entries) and entries[taken].begin_s <= until_s:
                after = self._model.step(self._at.state, entries[taken].operation)
                if after is not None and after != self._at.state:
                    yield _Choice(None, group, after)

    def _note(self) -> None:
        """From here is no way on: if none came further, this is what is shown."""
        begun = []
        node = self._head.after
        while not node.is_return:
            begun.append(node)
            node = node.after
        until_s = self._entries[node.place].end_s or 0.0
        if self._stuck is not None and until_s <= self._stuck.until_s:
            return
        begun.sort(key=lambda call: call is not node.partner)  # the one that ended first
        left = [self._entries[call.place].operation for call in begun[:_SHOWN_MAX]]
        placed = self._at.full + self._at.mask.bit_count() + sum(self._at.taken)
        self._stuck = Stuck(until_s, placed, self._last(), self._at.state, left)

    def _last(self) -> list[Op]:
        placed = [self._operation(choice, at) for _, choice, at in self._trail[-_LAST_SHOWN:]]
        return [*self._forgotten, *placed][-_LAST_SHOWN:]

    def _operation(self, choice: _Choice[State], at: _Position[State]) -> Op:
        """What was chosen at that position."""
        if choice.call is not None:
            return self._entries[choice.call.place].operation
        return self._groups[choice.group][at.taken[choice.group]].operation

    # --- instants at which all orders meet -----------------------------------------------------------------------

    def _find_cuts(self) -> set[int]:
        """Numbers of entries after which nothing is under way and the state is the same in every order.
        It was, and there was one change at most since; or the only change fixes it."""
        optional_from_s = min((group[0].begin_s for group in self._groups), default=float("inf"))
        cuts: set[int] = set()
        changes: list[Op] = []
        is_fixed = True
        ended_s = float("-inf")
        for place, entry in enumerate(self._entries):
            if entry.begin_s > ended_s and place:
                if entry.begin_s > optional_from_s:
                    break
                one_way = not changes or (len(changes) == 1 and (is_fixed or self._model.fixes(changes[0])))
                is_fixed = one_way and (is_fixed or bool(changes))
                if is_fixed:
                    cuts.add(place)
                changes = []
            ended_s = max(ended_s, entry.end_s or 0.0)
            if not self._pure[place]:
                changes.append(entry.operation)
        return cuts

    def _forget(self) -> None:
        self._forgotten = self._last()
        self._trail.clear()
        self._seen.clear()


def _groups(model: Model[Op, State], optional: Sequence[Entry[Op]]) -> list[list[Entry[Op]]]:
    """The optional entries by kind, each in the order of their begins."""
    groups: dict[Hashable, list[Entry[Op]]] = {}
    for entry in sorted(optional, key=lambda entry: entry.begin_s):
        groups.setdefault(model.kind(entry.operation), []).append(entry)
    return list(groups.values())


def _linked(entries: Sequence[Entry[Op]]) -> _Node:
    """All calls and returns in order of time, calls first; the answer is the node before the first one."""
    timed: list[tuple[float, bool, _Node]] = []
    for place, entry in enumerate(entries):
        call, end = _Node(place, False), _Node(place, True)
        call.partner, end.partner = end, call
        timed += [(entry.begin_s, False, call), (entry.end_s or 0.0, True, end)]
    timed.sort(key=lambda event: event[:2])
    head = last = _Node(-1, False)
    for _, _, node in timed:
        last.after, node.before = node, last
        last = node
    last.after = _Node(-1, False)
    last.after.before = last
    return head


def _lift(call: _Node) -> None:
    for node in (call, call.partner):
        node.before.after, node.after.before = node.after, node.before


def _put_back(call: _Node) -> None:
    """Called in the opposite order of `_lift`, so that the neighbours are those of then."""
    for node in (call.partner, call):
        node.before.after = node.after.before = node
