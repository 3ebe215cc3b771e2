"""The naive model: one operation after the other on a dictionary, and the search for an order that explains it all.

Strict serializability: there is an order of the operations that agrees with real time (who was answered before another
one was begun comes first), and in which each finds what it was answered. What was refused did nothing. What is unknown
may have been done, at any time since it was begun, or not at all. And what lies in the stores at the end is what that
order leaves.

A version that was never told is None: it is none of those that have been named so far.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvstore.model import IdempotencyKey
from kvstore.protocol import Acquire, Delete, Get, Put, Release
from kvstore.router.participants import Transaction


class Txn(NamedTuple):
    """A transaction as a client sends it."""

    transaction: Transaction
    once: IdempotencyKey | None = None


class Forgotten(NamedTuple):
    """No client's operation: kept replies have had their time."""


Op = Put | Get | Delete | Acquire | Release | Txn | Forgotten


class Done(NamedTuple):
    """What became of an operation. `answer` None: unknown; else ("done", succeeded, version, reads).

    `after`: the numbers of those that were answered before it was begun.
    """

    op: Op
    answer: tuple[Any, ...] | None
    after: frozenset[int]


class Cell(NamedTuple):
    """A key's state. `version` None: not known; of a key that is not there it means nothing."""

    value: bytes | None = None
    version: int | None = None


class Model(NamedTuple):
    """`replies`: what each Idempotency-Key was answered."""

    cells: dict[str, Cell]
    leases: dict[str, int | None]
    replies: dict[str, tuple[bool, int | None, list[Cell]]]

    def cell(self, key: str) -> Cell:
        return self.cells.get(key, Cell())

    def with_(self, cells: dict[str, Cell]) -> Model:
        return self._replace(cells=self.cells | cells)


def is_explained(done: dict[int, Done], begin: Model, end: dict[str, Cell]) -> bool:
    """There is such an order."""
    must = frozenset(number for number, each in done.items() if each.answer is not None)
    return _search(done, must, frozenset(done), begin, end)


def _search(
    done: dict[int, Done], must: frozenset[int], left: frozenset[int], model: Model, end: dict[str, Cell]
) -> bool:
    if not must and all(_same(model.cell(key), cell) for key, cell in end.items()):
        return True
    for number in left:
        each = done[number]
        if each.after & must:
            continue
        after = _do(each, model)
        if after is not None and _search(done, must - {number}, left - {number}, after, end):
            return True
    return False


def _same(expected: Cell, found: Cell) -> bool:
    if expected.value != found.value:
        return False
    return found.value is None or None in (expected.version, found.version) or expected.version == found.version


def _do(done: Done, model: Model) -> Model | None:
    """The model afterwards; None if the operation cannot have been answered so."""
    op, answer = done.op, done.answer
    match op:
        case Txn():
            return _do_transaction(op, answer, model)
        case Forgotten():
            return model._replace(replies={})
        case Get():
            found = _found(answer)
            return model if found is None or _same(model.cell(op.key), found) else None
        case Acquire():
            if model.leases.get(op.key, 0) != 0:
                return None
            return model._replace(leases=model.leases | {op.key: answer[2] if answer else None})
        case Release():
            held = model.leases.get(op.key) == op.token
            if answer is not None and answer[1] != held:
                return None
            return model._replace(leases=model.leases | {op.key: 0}) if held else model
    return _do_write(op, answer, model)


def _found(answer: tuple[Any, ...] | None) -> Cell | None:
    return Cell(*reversed(answer[3][0])) if answer else None


def _do_write(op: Put | Delete, answer: tuple[Any, ...] | None, model: Model) -> Model | None:
    """("done", False, 0, ()) is a 412, or the 404 of a delete."""
    before = model.cell(op.key)
    guard = op.guard
    lease = model.leases.get(op.key, 0)
    token = guard.token if guard else None
    if token is None and lease != 0:
        return None if answer else model
    holds = token is None or token == lease
    if guard is not None:
        live = before.value is not None
        holds = holds and not (guard.absent and live) and not (guard.present and not live)
        holds = holds and (guard.versions is None or (live and before.version in guard.versions))
    holds = holds and (isinstance(op, Put) or before.value is not None)
    if answer is not None and answer[1] != holds:
        return None
    if not holds:
        return model
    version = answer[2] if answer else None
    return model.with_({op.key: Cell(op.value, version) if isinstance(op, Put) else Cell()})


def _do_transaction(op: Txn, answer: tuple[Any, ...] | None, model: Model) -> Model | None:
    once = op.once.key if op.once else ""
    if once in model.replies:
        return model if answer is None or _agree(answer, *model.replies[once]) else None
    transaction = op.transaction
    succeeded = True
    for condition in transaction.conditions:
        cell = model.cell(condition.key)
        if condition.token is not None:
            succeeded = succeeded and model.leases.get(condition.key) == condition.token
        elif condition.exists is not None:
            succeeded = succeeded and (cell.value is not None) == condition.exists
        else:
            succeeded = succeeded and cell.value is not None and cell.version == condition.version
    steps = transaction.then if succeeded else transaction.otherwise
    tokens = {condition.key: condition.token for condition in transaction.conditions if condition.token is not None}
    writes = [step for step in steps if step.op != "get"]
    if any(model.leases.get(step.key, 0) not in (0, tokens.get(step.key)) for step in writes):
        return None if answer else model
    reads = [model.cell(step.key) for step in steps if step.op == "get"]
    version = (answer[2] if writes else 0) if answer else None
    if answer is not None and not _agree(answer, succeeded, version, reads):
        return None
    after = model.with_({step.key: Cell(step.value, version) if step.op == "put" else Cell() for step in writes})
    return after._replace(replies=model.replies | {once: (succeeded, version, reads)}) if once else after


def _agree(answer: tuple[Any, ...], succeeded: bool, version: int | None, reads: list[Cell]) -> bool:
    found = [Cell(value, number) for number, value in answer[3]]
    return (
        answer[1] == succeeded
        and (version is None or answer[2] == version)
        and len(found) == len(reads)
        and all(map(_same, reads, found))
    )
