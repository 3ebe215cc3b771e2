"""Clients that transfer money, append to lists and read, by transactions, and note what they were told.

Owns: what one client asks for, one request at a time, and how its answer enters the history.
Promises: a write is sent once, except a transfer that carries an Idempotency-Key: that is sent again, with its key,
while its outcome is unknown, and is one operation of the history.
Leaves to others: when to run (loadtest.txn_rounds), requests (txn_wire), what the history proves (histories).
"""

from __future__ import annotations

import asyncio
import random
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from kvstore.placement.ring import partition_of
from loadtest.histories.bank import Bank, marker_text
from loadtest.histories.history import Account, Balances, History, Lists, Outcome, Transfer, now_s
from loadtest.txn_wire import Answered, Got, Reply, Wire, txn_id

PAUSE_S = 0.05
_AMOUNT_MAX = 20
_HOT_ACCOUNTS = 12
_ENDINGS_MAX = 60


class Worker(ABC):
    """One client. `run` goes on until it is cancelled; `gate` lets it pass or holds it; `idle` is set while held.
    `pace_s`: how long it pauses between two steps, in the mean."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.pace_s = 0.0
        self.name = name
        self.wire = wire
        self.rng = wire.rng
        self.history = History()
        self.gate = asyncio.Event()
        self.idle = asyncio.Event()

    async def run(self) -> None:
        while True:
            if not self.gate.is_set():
                self.idle.set()
                await self.gate.wait()
                self.idle.clear()
            await self.step()
            if self.pace_s:
                await asyncio.sleep(self.rng.uniform(0.0, 2 * self.pace_s))

    @abstractmethod
    async def step(self) -> None:
        """One thing to do, with the reads that it needs."""

    def count(self, outcome: str) -> None:
        self.wire.counts[outcome] += 1

    async def rest(self, reply: Reply) -> None:
        """After a refusal, a little patience."""
        if reply.outcome != "done":
            await asyncio.sleep(self.rng.uniform(1.0, 5.0) * PAUSE_S)


# --- the bank --------------------------------------------------------------------------------------------------------


def account_key(number: int) -> str:
    return f"bank/account/{number:04d}"


def opening_transaction(accounts: int, balance: int) -> dict[str, Any]:
    """One transaction that opens all accounts, if there are none yet."""
    puts = [{"op": "put", "key": account_key(number), "value": str(balance)} for number in range(accounts)]
    return {"if": [{"key": account_key(0), "exists": False}], "then": puts}


def reading_transaction(keys: Sequence[str]) -> dict[str, Any]:
    return {"then": [{"op": "get", "key": key} for key in keys]}


def accounts_of(numbers: Sequence[int], results: Sequence[Got]) -> dict[int, Account]:
    """What the gets of these accounts found; one that is not there is left out."""
    found = {}
    for number, result in zip(numbers, results, strict=True):
        if result.value is not None and result.version is not None:
            found[number] = Account(int(result.value), result.version)
    return found


class Places:
    """Which account lies in which shard, and names for markers that lie in a given one, as far as that is known."""

    def __init__(self) -> None:
        self._accounts: dict[str, list[int]] = {}
        self._shards: dict[int, str] = {}
        self._partitions = 0

    async def learn(self, wire: Wire, accounts: int) -> None:
        """By /v1/explain of some accounts."""
        for number in range(accounts):
            reply = await wire.ask("GET", f"/v1/explain/{account_key(number)}")
            if reply.status == 200:
                document = msgspec.json.decode(reply.body)
                self._accounts.setdefault(document["owner"], []).append(number)
                self._shards[document["partition"]] = document["owner"]
                self._partitions = document["partitions"]

    def pair(self, rng: random.Random) -> tuple[int, int, str] | None:
        """Two accounts of one shard, and the shard."""
        shards = [shard for shard, accounts in self._accounts.items() if len(accounts) > 1]
        if not shards:
            return None
        shard = rng.choice(shards)
        source, target = rng.sample(self._accounts[shard][:_HOT_ACCOUNTS], 2)
        return source, target, shard

    def marker(self, name: str, shard: str) -> str:
        """The name, with an ending by which it lies in that shard, if one is found."""
        for ending in range(_ENDINGS_MAX):
            key = f"{name}.{ending}"
            if self._shards.get(partition_of(key.encode(), self._partitions)) == shard:
                return key
        return name


class Told(NamedTuple):
    """The id of a transfer that a client was told, and what else it was told about it."""

    marker: str
    id: str
    keyed: bool
    outcome: Outcome


class Teller(Worker):
    """Transfers money. `markers`: the prefix of the marker keys of this round. `patience_s`: for how long a transfer
    with an Idempotency-Key is sent again. `told`: the ids of those that are unknown, or can be looked up for long."""

    def __init__(self, name: str, wire: Wire, accounts: int, patience_s: float, places: Places | None = None) -> None:
        super().__init__(name, wire)
        self.markers = ""
        self._places = places or Places()
        self.told: list[Told] = []
        self._accounts = accounts
        self._patience_s = patience_s
        self._number = 0

    async def step(self) -> None:
        self._number += 1
        source, target, marker = self._choose()
        found = await self._look([source, target])
        if found is None or found.keys() != {source, target} or not found[source].balance:
            return
        transfer = Transfer(
            client=self.name,
            begin_s=now_s(),
            source=source,
            target=target,
            amount=self.rng.randint(1, min(_AMOUNT_MAX, found[source].balance)),
            marker=marker,
            source_version=found[source].version,
            target_version=found[target].version,
        )
        body = self._body(transfer, found)
        once = str(uuid.UUID(int=self.rng.getrandbits(128))) if self.rng.random() < 0.3 else None
        if once is not None:
            reply, answered = await self._insist(body, once)
        else:
            reply, answered = await self.wire.transact(body)
        self._note(transfer, body, reply, answered)
        named = txn_id(reply) if answered is None else answered.id
        if named is not None and (once is not None or transfer.outcome == "unknown"):
            self.told.append(Told(transfer.marker, named, once is not None, transfer.outcome))
        await self.rest(reply)

    def _choose(self) -> tuple[int, int, str]:
        """Two accounts and the marker: any; or a few that are used by many; or all of them in one shard."""
        choice, marker = self.rng.random(), f"{self.markers}{self.name}-{self._number}"
        if choice < 0.25 and (pair := self._places.pair(self.rng)) is not None:
            source, target, shard = pair
            return source, target, self._places.marker(marker, shard)
        hot = choice > 0.8
        source, target = self.rng.sample(range(min(_HOT_ACCOUNTS, self._accounts) if hot else self._accounts), 2)
        return source, target, marker

    async def _look(self, numbers: list[int]) -> dict[int, Account] | None:
        """Both accounts, by one transaction or by plain reads."""
        begin_s = now_s()
        if self.rng.random() < 0.3:
            reply, answered = await self.wire.transact(reading_transaction([account_key(n) for n in numbers]))
            if answered is None:
                await self.rest(reply)
                return None
            found = accounts_of(numbers, answered.results)
            self._note_read(begin_s, found)
            return found
        found = {}
        for number in numbers:
            begin_s = now_s()
            reply = await self.wire.ask("GET", f"/v1/kv/{account_key(number)}")
            if reply.status != 200 or reply.version is None:
                if reply.outcome == "done":
                    self.wire.complain(f"a read of {account_key(number)} was answered {reply.status}")
                await self.rest(reply)
                return None
            found[number] = Account(int(reply.body), reply.version)
            self._note_read(begin_s, {number: found[number]})
        return found

    def _note_read(self, begin_s: float, found: dict[int, Account]) -> None:
        self.count("reads")
        read = Balances(client=self.name, begin_s=begin_s, end_s=now_s(), outcome="done", accounts=found)
        self.history.add(read)

    def _body(self, transfer: Transfer, found: Mapping[int, Account]) -> dict[str, Any]:
        """In any order of its keys: the first one is the anchor."""
        source, target = account_key(transfer.source), account_key(transfer.target)
        conditions: list[dict[str, Any]] = [
            {"key": source, "version": transfer.source_version},
            {"key": target, "version": transfer.target_version},
        ]
        if self.rng.random() < 0.3:
            conditions.append({"key": transfer.marker, "exists": False})
        steps = [
            {"op": "put", "key": source, "value": str(found[transfer.source].balance - transfer.amount)},
            {"op": "put", "key": target, "value": str(found[transfer.target].balance + transfer.amount)},
            {"op": "put", "key": transfer.marker, "value": marker_text(transfer)},
        ]
        self.rng.shuffle(conditions)
        self.rng.shuffle(steps)
        body: dict[str, Any] = {"if": conditions, "then": steps}
        if self.rng.random() < 0.5:
            body["else"] = [{"op": "get", "key": source}, {"op": "get", "key": target}]
        return body

    async def _insist(self, body: dict[str, Any], once: str) -> tuple[Reply, Answered | None]:
        """Until the outcome is known. A refusal says nothing about the tries before it."""
        deadline_s = now_s() + self._patience_s
        sent = False
        while True:
            reply, answered = await self.wire.transact(body, once)
            sent = sent or reply.outcome == "unknown"
            if reply.outcome == "done" or not sent:
                return reply, answered
            if now_s() > deadline_s:
                return Reply(-1), None
            self.count("repeats")
            await asyncio.sleep(PAUSE_S)

    def _note(self, transfer: Transfer, body: Mapping[str, Any], reply: Reply, answered: Answered | None) -> None:
        outcome = reply.outcome
        if answered is not None and not answered.succeeded:
            outcome = "refused"
            if body.get("else"):
                found = accounts_of([transfer.source, transfer.target], answered.results)
                self._note_read(transfer.begin_s, found)
        self.count("unmet" if answered is not None and outcome == "refused" else outcome)
        transfer.end_s = None if outcome == "unknown" else now_s()
        transfer.outcome = outcome
        transfer.said = reply.words if answered is None else f"succeeded {answered.succeeded}, {answered.id}"
        transfer.version = answered.version if answered is not None and answered.succeeded else None
        self.history.add(transfer)


class Auditor(Worker):
    """Reads all accounts, in one transaction."""

    def __init__(self, name: str, wire: Wire, accounts: int) -> None:
        super().__init__(name, wire)
        self._accounts = accounts

    async def step(self) -> None:
        reply = await self.audit()
        await asyncio.sleep(self.rng.uniform(0.5, 4.0) * PAUSE_S)
        await self.rest(reply)

    async def audit(self) -> Reply:
        """One read; also into `last`, if it could be done."""
        begin_s = now_s()
        numbers = list(range(self._accounts))
        self.rng.shuffle(numbers)
        reply, answered = await self.wire.transact(reading_transaction([account_key(n) for n in numbers]))
        if answered is None:
            self.count("reads refused")
            return reply
        found = accounts_of(numbers, answered.results)
        read = Balances(client=self.name, begin_s=begin_s, end_s=now_s(), outcome="done", accounts=found, whole=True)
        self.history.add(read)
        self.count("audits")
        return reply

    @property
    def last(self) -> Bank:
        """What the last read of all found. Raises IndexError when there was none."""
        return Bank([read for read in self.history.bank if isinstance(read, Balances)][-1].accounts)


# --- the lists -------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A list and the version of its key, None if it is not there."""

    values: list[int]
    version: int | None


def held(result: Got) -> Held:
    return Held([], None) if result.value is None else Held(msgspec.json.decode(result.value), result.version)


class Appender(Worker):
    """Appends to lists and reads them: by transactions, and by single calls beside them. `keys` are those of this
    round. Values come from `numbers`, which all appenders of a history share."""

    def __init__(self, name: str, wire: Wire, numbers: Counter[str]) -> None:
        super().__init__(name, wire)
        self.keys: Sequence[str] = ()
        self._numbers = numbers

    async def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.5:
            reply = await self._append()
        elif choice < 0.65:
            reply = await self._append_to_one()
        elif choice < 0.85:
            reply, _ = await self.look(self.rng.sample(self.keys, k=self.rng.randint(1, len(self.keys))))
        else:
            reply, _ = await self._get(self.rng.choice(self.keys))
        await self.rest(reply)

    async def look(self, keys: Sequence[str]) -> tuple[Reply, dict[str, Held]]:
        """These lists, in one transaction."""
        begin_s = now_s()
        reply, answered = await self.wire.transact(reading_transaction(keys))
        if answered is None:
            self.count("reads refused")
            return reply, {}
        found = {result.key: held(result) for result in answered.results}
        self._note(begin_s, "done", reads=[(key, found[key].values) for key in keys])
        self.count("reads")
        return reply, found

    async def _get(self, key: str) -> tuple[Reply, Held | None]:
        """One list, by a plain read."""
        begin_s = now_s()
        reply = await self.wire.ask("GET", f"/v1/kv/{key}")
        if reply.status not in (200, 404):
            if reply.outcome == "done":
                self.wire.complain(f"a read of {key} was answered {reply.status}: {reply.body[:300]!r}")
            return reply, None
        found = Held(msgspec.json.decode(reply.body), reply.version) if reply.status == 200 else Held([], None)
        self._note(begin_s, "done", reads=[(key, found.values)])
        self.count("reads")
        return reply, found

    async def _append(self) -> Reply:
        """To one to three lists at once, and read some more."""
        count = self.rng.randint(1, min(3, len(self.keys)))
        chosen = self.rng.sample(self.keys, k=min(len(self.keys), count + self.rng.randint(0, 2)))
        reply, found = await self._look_by_any_way(chosen)
        if len(found) < len(chosen):
            return reply
        appends = {key: self._new_values() for key in chosen[:count]}
        gets = [{"op": "get", "key": key} for key in chosen]
        puts = [
            {"op": "put", "key": key, "value": msgspec.json.encode(found[key].values + values).decode()}
            for key, values in appends.items()
        ]
        steps = gets + puts
        self.rng.shuffle(steps)
        guarded = chosen if self.rng.random() < 0.3 else chosen[:count]
        body: dict[str, Any] = {"if": [_unchanged(key, found[key]) for key in guarded], "then": steps}
        if self.rng.random() < 0.7:
            body["else"] = gets
        begin_s = now_s()
        reply, answered = await self.wire.transact(body)
        reads = []
        if answered is not None:
            results = zip(steps if answered.succeeded else body.get("else", []), answered.results, strict=True)
            reads = [(result.key, held(result).values) for step, result in results if step["op"] == "get"]
        self._note_append(begin_s, appends, reply, answered is None or answered.succeeded, reads)
        return reply

    async def _look_by_any_way(self, keys: Sequence[str]) -> tuple[Reply, dict[str, Held]]:
        if self.rng.random() < 0.5:
            return await self.look(keys)
        reply, found = Reply(0), {}
        for key in keys:
            reply, one = await self._get(key)
            if one is None:
                break
            found[key] = one
        return reply, found

    async def _append_to_one(self) -> Reply:
        """By compare-and-set, without a transaction."""
        key = self.rng.choice(self.keys)
        reply, found = await self._get(key)
        if found is None:
            return reply
        values = self._new_values()
        header = {"If-None-Match": "*"} if found.version is None else {"If-Match": f'"{found.version}"'}
        begin_s = now_s()
        reply = await self.wire.ask("PUT", f"/v1/kv/{key}", msgspec.json.encode(found.values + values), header)
        if reply.outcome == "done" and reply.status not in (201, 204, 412):
            self.wire.complain(f"a conditional PUT of {key} was answered {reply.status}: {reply.body[:300]!r}")
            reply = Reply(-1)
        self._note_append(begin_s, {key: values}, reply, reply.status != 412, [])
        return reply

    def _new_values(self) -> list[int]:
        """Mostly one, sometimes two."""
        count = 2 if self.rng.random() < 0.15 else 1
        self._numbers["value"] += count
        return [self._numbers["value"] - place for place in range(count)]

    def _note_append(
        self,
        begin_s: float,
        appends: dict[str, list[int]],
        reply: Reply,
        held_true: bool,
        reads: list[tuple[str, list[int]]],
    ) -> None:
        """Conditions that did not hold make two operations of it: the reads were done, the appends were refused."""
        if held_true:
            self._note(begin_s, reply.outcome, appends=appends, reads=reads, said=reply.words)
            self.count(reply.outcome)
            return
        self._note(begin_s, "refused", appends=appends, said="a condition did not hold")
        self.count("unmet")
        if reads:
            self._note(begin_s, "done", reads=reads)

    def _note(
        self,
        begin_s: float,
        outcome: Outcome,
        appends: dict[str, list[int]] | None = None,
        reads: list[tuple[str, list[int]]] | None = None,
        said: str = "",
    ) -> None:
        operation = Lists(
            client=self.name,
            begin_s=begin_s,
            end_s=None if outcome == "unknown" else now_s(),
            outcome=outcome,
            said=said,
            appends=appends or {},
            reads=reads or [],
        )
        self.history.add(operation)


def _unchanged(key: str, found: Held) -> dict[str, Any]:
    return {"key": key, "exists": False} if found.version is None else {"key": key, "version": found.version}
