"""Lists that many clients append to and read, by transactions, and by single calls beside them.

Owns: what a client does to them, and how each answer enters the history.
Promises: every value is appended once in a whole history, on the versions that were read. A list that has grown to
LIST_MAX values is left alone: a client that sees it goes on to its successor.
Leaves to others: whether the history can be (loadtest.histories.append).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from loadtest.histories.history import Lists
from loadtest.workloads import calls
from loadtest.workloads.answers import Got, Reply
from loadtest.workloads.calls import Steps
from loadtest.workloads.place import Place

LIST_MAX = 100
_CLOSING_BATCH = 50


class Held(NamedTuple):
    """A list and the version of its key, None if it is not there."""

    values: list[int]
    version: int | None


Found = dict[str, Held]
Reads = list[tuple[str, list[int]]]


class Appends:
    """One client."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._generations = [0] * place.shape.lists

    def step(self) -> Steps[None]:
        rng = self._place.rng
        chosen = rng.random()
        if chosen < 0.5:
            reply = yield from self._append(self._keys(rng.randint(1, 4)))
        elif chosen < 0.65:
            reply = yield from self._append_to_one(self._keys(1)[0])
        elif chosen < 0.85:
            reply, _ = yield from self._look(self._keys(rng.randint(1, 4)))
        else:
            reply, _ = yield from self._get(self._keys(1)[0])
        yield from calls.rest(reply)

    def _keys(self, count: int) -> list[str]:
        numbers = self._place.rng.sample(range(self._place.shape.lists), count)
        return [f"{prefix_of(self._place.prefix)}{number:02d}/{self._generations[number]:04d}" for number in numbers]

    def _look(self, keys: Sequence[str]) -> Steps[tuple[Reply, Found]]:
        """These lists, in one transaction."""
        reply = yield calls.transaction("lists read", calls.reading(keys))
        found = note_reads(self._place, reply)
        self._leave_the_full(found)
        return reply, found

    def _get(self, key: str) -> Steps[tuple[Reply, Found]]:
        """One list, by a plain read."""
        reply = yield calls.get("list read", key)
        if reply.status not in calls.GOT:
            return reply, {}
        found = {key: Held(msgspec.json.decode(reply.body), reply.version) if reply.status == 200 else Held([], None)}
        self._place.record(Lists, reply, reads=[(key, found[key].values)])
        self._leave_the_full(found)
        return reply, found

    def _leave_the_full(self, found: Found) -> None:
        for key, each in found.items():
            number, generation = map(int, key.rsplit("/", 2)[-2:])
            if len(each.values) >= LIST_MAX:
                self._generations[number] = max(self._generations[number], generation + 1)

    def _append(self, keys: Sequence[str]) -> Steps[Reply]:
        """To some of these at once, and read the others in the same transaction."""
        rng = self._place.rng
        reply, found = yield from self._look(keys)
        if len(found) < len(keys) or _any_full(found):
            return reply
        appends = {key: self._values() for key in keys[: rng.randint(1, len(keys))]}
        guarded = keys if rng.random() < 0.3 else list(appends)
        gets = [{"op": "get", "key": key} for key in keys]
        puts = [
            {"op": "put", "key": key, "value": msgspec.json.encode(found[key].values + values).decode()}
            for key, values in appends.items()
        ]
        rng.shuffle(puts)  # the first key of a transaction is its anchor
        steps = gets + puts if rng.random() < 0.5 else puts + gets
        body: dict[str, Any] = {
            "if": [_unchanged(key, found[key]) for key in guarded],
            "then": steps,
            "else": gets,
        }
        reply = yield from self._place.write(calls.transaction("lists append", body))
        answered = calls.answer_of(reply)
        reads: Reads = []
        if answered is not None:
            ran = zip(steps if answered.succeeded else gets, answered.results, strict=False)
            reads = [(each.key, held(each).values) for step, each in ran if step["op"] == "get"]
        if answered is None or answered.succeeded:
            self._place.record(Lists, reply, appends=appends, reads=reads)
        else:  # two operations: the reads were done, the appends were refused
            self._place.record(Lists, reply, "refused", appends=appends)
            self._place.record(Lists, reply, reads=reads)
        return reply

    def _append_to_one(self, key: str) -> Steps[Reply]:
        """By compare-and-set, without a transaction."""
        reply, found = yield from self._get(key)
        if not found or _any_full(found):
            return reply
        values = self._values()
        value = msgspec.json.encode(found[key].values + values)
        reply = yield from self._place.write(calls.swap("list append", key, value, found[key].version))
        self._place.record(Lists, reply, "refused" if reply.status == 412 else reply.outcome, appends={key: values})
        return reply

    def _values(self) -> list[int]:
        """Mostly one, sometimes two."""
        return [self._place.number() for _ in range(2 if self._place.rng.random() < 0.15 else 1)]


def held(result: Got) -> Held:
    """What a get of a transaction found."""
    return Held([], None) if result.value is None else Held(msgspec.json.decode(result.value), result.version)


def _any_full(found: Found) -> bool:
    return any(len(each.values) >= LIST_MAX for each in found.values())


def prefix_of(prefix: str) -> str:
    return f"{prefix}list/"


def note_reads(place: Place, reply: Reply) -> Found:
    """What a transaction of reads found; nothing if it was not answered."""
    answered = calls.answer_of(reply)
    if answered is None:
        return {}
    found = {each.key: held(each) for each in answered.results}
    place.record(Lists, reply, reads=[(key, each.values) for key, each in found.items()])
    return found


def _unchanged(key: str, found: Held) -> dict[str, Any]:
    return {"key": key, "exists": False} if found.version is None else {"key": key, "version": found.version}


def closing(place: Place) -> Steps[bool]:
    """All lists at the end; False if one could not be read."""
    items = yield from calls.pages("lists list", prefix_of(place.prefix))
    if items is None:
        return False
    keys = [item.key for item in items]
    for first in range(0, len(keys), _CLOSING_BATCH):
        some = keys[first : first + _CLOSING_BATCH]
        reply = yield from calls.insist(calls.transaction("lists read", calls.reading(some)))
        if len(note_reads(place, reply)) < len(some):
            return False
    return True
