"""Clients on registers, counters, critical sections and sets, which note what they were told.

Owns: what one client asks for, one request at a time, and how its answer enters the history.
Promises: a write is sent once, except one that carries an Idempotency-Key: that is sent again, with its key, while its
outcome is unknown, and is one operation of the history. An answer that no router may give becomes a complaint.
Leaves to others: when to run (loadtest.chaos.crew), transactions (loadtest.txn_clients), requests and their count
(meter, txn_wire), what the history proves (loadtest.histories).

`turn_to` gives a client the keys of a new chapter: all of them begin with the prefix of the chapter.
"""

from __future__ import annotations

import asyncio
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from loadtest.chaos.meter import MeteredWire
from loadtest.histories.history import (
    AnyOperation,
    Count,
    Element,
    Guarded,
    Lease,
    Members,
    Outcome,
    Register,
    now_s,
)
from loadtest.move_clients import listed
from loadtest.txn_clients import Worker
from loadtest.txn_wire import Reply

HOT_REGISTERS = 8
COLD_REGISTERS = 300
COUNTERS = 4
LOCKS = 3
SETS = 3
_LEASES_S = (0.8, 1.5, 3.0)
_LEASE_WAIT_S = 2.0


class KeyWorker(Worker):
    """One that has keys of its chapter."""

    def __init__(self, name: str, wire: MeteredWire) -> None:
        super().__init__(name, wire)
        self._wire = wire
        self._number = 0

    @abstractmethod
    def turn_to(self, prefix: str) -> None:
        """From now on the keys are those below this prefix."""

    def next_name(self) -> str:
        """Unlike any that was given before, by anybody."""
        self._number += 1
        return f"{self.name}-{self._number}"

    def once(self) -> dict[str, str]:
        """A header that makes a write repeatable."""
        return {"Idempotency-Key": str(uuid.UUID(int=self.rng.getrandbits(128)))}

    async def write(self, method: str, path: str, body: bytes | None, headers: dict[str, str], share: float) -> Reply:
        """Sent once; or, in that share of the cases, with an Idempotency-Key and until its outcome is known."""
        if self.rng.random() < share:
            return await self._wire.insist(method, path, body, headers | self.once())
        return await self._wire.ask(method, path, body, headers)

    def heard(self, reply: Reply, what: str, *expected: int) -> Reply:
        """The reply; one that claims to be a decision and is none of those expected is a complaint, and unknown."""
        if reply.outcome == "done" and reply.status not in expected:
            self.wire.complain(f"{what} was answered {reply.words}")
            return Reply(-1)
        return reply

    def note(self, operation: AnyOperation, reply: Reply, outcome: Outcome | None = None) -> None:
        """Into the history, as ended now. `outcome`: if the status alone does not tell it."""
        self.history.add(ended(operation, outcome or reply.outcome, reply.words))
        self.count(operation.outcome)


def ended(operation: AnyOperation, outcome: Outcome, said: str) -> AnyOperation:
    operation.outcome, operation.said = outcome, said
    operation.end_s = None if outcome == "unknown" else now_s()
    return operation


# --- registers -------------------------------------------------------------------------------------------------------


class Registrar(KeyWorker):
    """Reads, writes, deletes and swaps registers: a few that everybody uses, and many others. `used`: which ones."""

    def __init__(self, name: str, wire: MeteredWire, used: set[str]) -> None:
        super().__init__(name, wire)
        self._used = used
        self._hot: Sequence[str] = ()
        self._cold: Sequence[str] = ()

    def turn_to(self, prefix: str) -> None:
        """As that of a KeyWorker."""
        self._hot = [f"{prefix}register/hot-{number}" for number in range(HOT_REGISTERS)]
        self._cold = [f"{prefix}register/{number:03d}" for number in range(COLD_REGISTERS)]

    async def step(self) -> None:
        key = self.rng.choice(self._hot if self.rng.random() < 0.4 else self._cold)
        self._used.add(key)
        choice = self.rng.random()
        if choice < 0.35:
            reply, _ = await self.read(key)
        elif choice < 0.6:
            reply = await self._put(key)
        elif choice < 0.7:
            reply = await self._delete(key)
        else:
            reply = await self._swap(key)
        await self.rest(reply)

    async def read(self, key: str) -> tuple[Reply, Register | None]:
        """None: it was not answered."""
        operation = Register(client=self.name, begin_s=now_s(), key=key, action="read")
        reply = self.heard(await self.wire.ask("GET", f"/v1/kv/{key}"), f"a read of {key}", 200, 404)
        if reply.outcome != "done":
            return reply, None
        operation.value = reply.body.decode() if reply.status == 200 else None
        operation.version = reply.version if reply.status == 200 else None
        self.note(operation, reply)
        return reply, operation

    async def _put(self, key: str) -> Reply:
        value = self.next_name()
        operation = Register(client=self.name, begin_s=now_s(), key=key, action="write", value=value)
        reply = await self.write("PUT", f"/v1/kv/{key}", value.encode(), {}, share=0.25)
        reply = self.heard(reply, f"a write of {key}", 201, 204)
        operation.version = reply.version
        self.note(operation, reply)
        return reply

    async def _delete(self, key: str) -> Reply:
        """One that finds nothing to delete is a read of nothing."""
        begin_s = now_s()
        reply = await self.write("DELETE", f"/v1/kv/{key}", None, {}, share=0.25)
        reply = self.heard(reply, f"a deletion of {key}", 204, 404)
        is_read = reply.status == 404
        self.note(Register(client=self.name, begin_s=begin_s, key=key, action="read" if is_read else "delete"), reply)
        return reply

    async def _swap(self, key: str) -> Reply:
        reply, found = await self.read(key)
        if found is None:
            return reply
        condition = {"If-None-Match": "*"} if found.value is None else {"If-Match": f'"{found.version}"'}
        value = self.next_name()
        operation = Register(
            client=self.name, begin_s=now_s(), key=key, action="swap", value=value, expected=found.value
        )
        reply = await self.write("PUT", f"/v1/kv/{key}", value.encode(), condition, share=0.25)
        reply = self.heard(reply, f"a conditional write of {key}", 201, 204, 412)
        operation.met, operation.version = reply.status != 412, reply.version
        self.note(operation, reply)
        return reply


# --- counters --------------------------------------------------------------------------------------------------------


class Counter(KeyWorker):
    """Raises counters by compare-and-set, beside others that do, half of the time with an Idempotency-Key."""

    def __init__(self, name: str, wire: MeteredWire) -> None:
        super().__init__(name, wire)
        self.keys: Sequence[str] = ()

    def turn_to(self, prefix: str) -> None:
        """As that of a KeyWorker."""
        self.keys = [f"{prefix}counter/{number}" for number in range(COUNTERS)]

    async def step(self) -> None:
        key = self.rng.choice(self.keys)
        reply, found = await self.read(key)
        if found is None:
            await self.rest(reply)
            return
        condition = {"If-None-Match": "*"} if found.value is None else {"If-Match": f'"{reply.version}"'}
        value = (found.value or 0) + 1
        operation = Count(client=self.name, begin_s=now_s(), key=key, action="raise", value=value)
        reply = await self.write("PUT", f"/v1/kv/{key}", b"%d" % value, condition, share=0.5)
        reply = self.heard(reply, f"a conditional write of {key}", 201, 204, 412)
        self.note(operation, reply, "refused" if reply.status == 412 else None)
        await self.rest(reply)

    async def read(self, key: str) -> tuple[Reply, Count | None]:
        """None: it was not answered."""
        operation = Count(client=self.name, begin_s=now_s(), key=key, action="read")
        reply = self.heard(await self.wire.ask("GET", f"/v1/kv/{key}"), f"a read of {key}", 200, 404)
        if reply.outcome != "done":
            return reply, None
        operation.value = int(reply.body) if reply.status == 200 else None
        self.note(operation, reply)
        return reply, operation


# --- critical sections -----------------------------------------------------------------------------------------------


class Holding(NamedTuple):
    """A lease that was granted to this client; what it guards is the key of the same name, and one beside it."""

    lock: str
    token: int
    ttl_s: float

    @property
    def header(self) -> dict[str, str]:
        return {"Lock-Token": str(self.token)}

    @property
    def beside(self) -> str:
        return f"{self.lock}/beside"


class Locker(KeyWorker):
    """Raises numbers under locks that others want, too: reads, and writes with its token. Sometimes it sleeps for
    longer than its lease lasts, and writes nevertheless."""

    def __init__(self, name: str, wire: MeteredWire) -> None:
        super().__init__(name, wire)
        self._locks: Sequence[str] = ()

    def turn_to(self, prefix: str) -> None:
        """As that of a KeyWorker."""
        self._locks = [f"{prefix}lock/{number}" for number in range(LOCKS)]

    async def step(self) -> None:
        reply, holding = await self._acquire(self.rng.choice(self._locks))
        if holding is None:
            await self.rest(reply)
            return
        for _ in range(self.rng.randint(1, 3)):
            if not await self._raise(holding, oversleeps=self.rng.random() < 0.1):
                break
            if self.rng.random() < 0.3 and not await self._renew(holding):
                break
        if self.rng.random() < 0.85:
            await self._release(holding)

    async def _acquire(self, lock: str) -> tuple[Reply, Holding | None]:
        ttl_s = self.rng.choice(_LEASES_S)
        operation = Lease(client=self.name, begin_s=now_s(), lock=lock, action="acquire", ttl_s=ttl_s)
        wanted = {"ttl": ttl_s, "wait": _LEASE_WAIT_S, "owner": self.name}
        reply = await self.wire.ask("POST", f"/v1/locks/{lock}", msgspec.json.encode(wanted))
        reply = self.heard(reply, f"an acquire of {lock}", 201)
        if reply.status == 201:
            operation.token = msgspec.json.decode(reply.body)["token"]
        self.note(operation, reply)
        if operation.token is None:
            return reply, None
        return reply, Holding(lock, operation.token, ttl_s)

    async def _raise(self, holding: Holding, oversleeps: bool) -> bool:
        """Whether the number is one higher now, and the lease most likely still its own."""
        is_beside = self.rng.random() < 0.4
        key = holding.beside if is_beside else holding.lock
        found = self.heard(await self.wire.ask("GET", f"/v1/kv/{key}"), f"a read of {key}", 200, 404)
        if found.outcome != "done":
            return False
        value = int(found.body) + 1 if found.status == 200 else 1
        if oversleeps:
            await asyncio.sleep(holding.ttl_s + self.rng.uniform(0.3, 1.2))
        operation = Guarded(
            client=self.name, begin_s=now_s(), lock=holding.lock, token=holding.token, key=key, value=value
        )
        by_transaction = is_beside or self.rng.random() < 0.3
        reply, was_met = await self._write(holding, key, b"%d" % value, by_transaction)
        self.note(operation, reply, None if was_met else "refused")
        return was_met and reply.outcome == "done" and not oversleeps

    async def _write(self, holding: Holding, key: str, body: bytes, by_transaction: bool) -> tuple[Reply, bool]:
        """The reply, and False if it says that the token is not the holder's."""
        if by_transaction:
            guard: dict[str, Any] = {"lock": holding.lock, "token": holding.token}
            put = {"op": "put", "key": key, "value": body.decode()}
            reply, answered = await self.wire.transact({"if": [guard], "then": [put]})
            return reply, answered is None or answered.succeeded
        reply = await self.wire.ask("PUT", f"/v1/kv/{key}", body, holding.header)
        reply = self.heard(reply, f"a guarded write of {key}", 201, 204, 412)
        return reply, reply.status != 412

    async def _renew(self, holding: Holding) -> bool:
        return await self._show(holding, "renew", "PUT", 200)

    async def _release(self, holding: Holding) -> bool:
        return await self._show(holding, "release", "DELETE", 204)

    async def _show(self, holding: Holding, action: Any, method: str, success: int) -> bool:
        operation = Lease(
            client=self.name,
            begin_s=now_s(),
            lock=holding.lock,
            action=action,
            token=holding.token,
            ttl_s=holding.ttl_s,
        )
        reply = await self.wire.ask(method, f"/v1/locks/{holding.lock}", None, holding.header)
        reply = self.heard(reply, f"a {action} of {holding.lock}", success, 412)
        self.note(operation, reply, "refused" if reply.status == 412 else None)
        return reply.status == success


# --- sets ------------------------------------------------------------------------------------------------------------


class SetWorker(KeyWorker):
    """Adds elements to sets, each a key of its own, removes some of those that it added, and lists sets."""

    def __init__(self, name: str, wire: MeteredWire) -> None:
        super().__init__(name, wire)
        self.sets: Sequence[str] = ()
        self._added: list[tuple[str, str, bool]] = []

    def turn_to(self, prefix: str) -> None:
        """As that of a KeyWorker."""
        self.sets = [f"{prefix}set/{number}/" for number in range(SETS)]
        self._added.clear()

    async def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.6:
            reply = await self._add(self.rng.choice(self.sets), self.next_name())
        elif choice < 0.85 and self._added:
            reply = await self._remove(*self._added.pop(self.rng.randrange(len(self._added))))
        else:
            await self.list(self.rng.choice(self.sets))
            return
        await self.rest(reply)

    async def _add(self, prefix: str, element: str) -> Reply:
        operation = Element(client=self.name, begin_s=now_s(), set=prefix, element=element, action="add")
        reply = await self.write("PUT", f"/v1/kv/{prefix}{element}", element.encode(), {}, share=0.2)
        reply = self.heard(reply, f"the first write of {prefix}{element}", 201)
        self.note(operation, reply)
        if reply.outcome != "refused":
            self._added.append((prefix, element, reply.outcome == "done"))
        return reply

    async def _remove(self, prefix: str, element: str, is_there: bool) -> Reply:
        operation = Element(client=self.name, begin_s=now_s(), set=prefix, element=element, action="remove")
        reply = await self.write("DELETE", f"/v1/kv/{prefix}{element}", None, {}, share=0.2)
        reply = self.heard(reply, f"the first deletion of {prefix}{element}", 204, *(() if is_there else (404,)))
        if reply.status != 404:  # else nothing was done, and the addition may still be under way
            self.note(operation, reply)
        return reply

    async def list(self, prefix: str) -> bool:
        """Whether all pages were answered."""
        operation = Members(client=self.name, begin_s=now_s(), set=prefix)
        found = await listed(self.wire, prefix)
        if found is None:
            return False
        operation.elements = [key.removeprefix(prefix) for key, _, _ in found]
        self.history.add(ended(operation, "done", ""))
        self.count("done")
        return True
