"""Clients of a simulated store: what they call, and how each answer enters the history.

Owns: the workloads, their keys, what is judged at once (half transactions, values that come back, counts).
Promises: each value is written once in a whole history, and a call without an answer enters as one of unknown outcome.
Leaves to others: the way to the store (`machine`), whether the history can be (`loadtest.histories`).

Registers are single keys, and groups of three keys that only transactions write, all three with the same value: a group
that does not show one value was half written. Groups are written in one batch (`Transact`), as the part of a
transaction that is decided elsewhere (`Prepare`, then `ApplyIntents` or `Abort`), and as the part of one decided here
(`DecideCommit`, `ResolveTxn`), so all three must look like one register.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from kvstore.errors import KvError
from kvstore.model import Attempt, Condition, IdempotencyKey, Preconditions, Read, TxnOp
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    ApplyIntents,
    Count,
    DecideCommit,
    Delete,
    Get,
    Outcome,
    Page,
    Prepare,
    Put,
    Release,
    Renew,
    ResolveTxn,
    Scan,
    Transact,
    Vote,
)
from kvstore.store.ops import DropDecisions
from loadtest.histories.history import AnyOperation, Element, Guarded, Lease, Members, Register
from loadtest.simulate.machine import PARTITIONS, Lost, Machine
from loadtest.simulate.store_invariants import Violation

REGISTERS, GROUPS, LOCKS = 3, 3, 2
_REFUSED = frozenset({409, 413, 421, 423, 429, 503, 507})
_SET = "set/"
_PATIENCE_S = 3.0


class History:
    """What all clients did. `open`: of calls under way, since when."""

    def __init__(self, machine: Machine) -> None:
        self.operations: list[AnyOperation] = []
        self.calls = 0
        self.values = 0
        self._machine = machine

    def add(self, operation: AnyOperation) -> None:
        self.operations.append(operation)
        self._machine.loop.note(f"{operation.client}: {operation!r}")

    def next_value(self) -> int:
        self.values += 1
        return self.values


class Client:
    """One client, which does one thing after another."""

    def __init__(self, name: str, machine: Machine, history: History, rng: random.Random) -> None:
        self.name = name
        self._machine = machine
        self._history = history
        self._rng = rng
        self._ids = 0
        self._stamp = 0
        self._elements: deque[str] = deque()
        self._mayfly: tuple[str | None, float] = (None, 0.0)  # the value of its own key that goes by itself

    async def run(self, until_s: float) -> None:
        steps: list[Callable[[], Any]] = [
            self._read, self._read, self._write, self._write, self._delete, self._swap, self._write_once,
            self._transact, self._transact, self._read_group, self._take_part, self._decide,
            self._element, self._element, self._list, self._count, self._lock, self._brief,
        ]  # fmt: skip
        while self._machine.loop.time() < until_s:
            await self._rng.choice(steps)()
            await asyncio.sleep(self._rng.expovariate(16.0))

    # --- calls --------------------------------------------------------------------------------------------------------

    @property
    def _now_s(self) -> float:
        return self._machine.loop.time()

    def _id(self) -> int:
        self._ids += 1
        self._history.calls += 1
        return self._ids

    def _value(self) -> str:
        """Some are so large that a few of them fill a segment of the log."""
        number = self._history.next_value()
        return f"v{number}" + "x" * (self._rng.randrange(20_000) if self._rng.random() < 0.15 else 0)

    async def _ask(self, op: Any, patience_s: float = _PATIENCE_S) -> Any:
        """None if it is not known what became of it."""
        try:
            reply = await self._machine.ask(op, patience_s)
        except Lost:
            return None
        if isinstance(reply, Answer) and reply.status >= 500 and reply.status not in _REFUSED:
            raise Violation(f"{op!r} was answered {reply!r}")
        return reply

    async def _insist(self, op: Any) -> Any:
        """The answer, however long that takes."""
        while True:
            reply = await self._ask(op)
            if reply is not None and not (isinstance(reply, Answer) and reply.status in _REFUSED):
                return reply
            await asyncio.sleep(self._rng.uniform(0.01, 0.2))

    # --- registers ----------------------------------------------------------------------------------------------------

    def _register(self) -> str:
        return f"register/{self._rng.randrange(REGISTERS)}"

    def _note(
        self,
        key: str,
        action: Literal["read", "write", "delete", "swap"],
        begin_s: float,
        outcome: Literal["done", "refused", "unknown"],
        **more: Any,
    ) -> None:
        end_s = None if outcome == "unknown" else self._now_s
        self._history.add(
            Register(client=self.name, begin_s=begin_s, end_s=end_s, outcome=outcome, key=key, action=action, **more)
        )

    async def _read(self) -> None:
        await self.read(self._register())

    async def read(self, key: str) -> Answer | None:
        begin_s = self._now_s
        reply = await self._ask(Get(self._id(), key))
        if reply is None or reply.status not in (200, 404):
            return None
        value = _short(reply.value)
        self._note(key.split(":")[0], "read", begin_s, "done", value=value, version=reply.version or None)
        return reply  # type: ignore[no-any-return]

    async def _write(self) -> None:
        key, value, begin_s = self._register(), self._value(), self._now_s
        patience_s = self._rng.choice((0.002, _PATIENCE_S, _PATIENCE_S, _PATIENCE_S))
        reply = await self._ask(Put(self._id(), key, value.encode()), patience_s)
        self._note_write(key, value, begin_s, reply)

    def _note_write(self, key: str, value: str, begin_s: float, reply: Answer | None) -> None:
        version = reply.version if reply is not None and reply.status in (200, 201, 204) else None
        outcome = _outcome(reply)
        self._note(key, "write", begin_s, outcome, value=_short(value.encode()), version=version)

    async def _write_once(self) -> None:
        key, value, begin_s = self._register(), self._value(), self._now_s
        once = IdempotencyKey(f"once-{self.name}-{self._id()}", value[:8])
        reply = await self._insist(Put(self._id(), key, value.encode(), once=once))
        if self._rng.random() < 0.5:
            again = await self._insist(Put(self._id(), key, value.encode(), once=once))
            if (again.status, again.version) != (reply.status, reply.version):
                raise Violation(f"one Idempotency-Key, two answers: {reply!r} and {again!r}")
        self._note_write(key, value, begin_s, reply)

    async def _delete(self) -> None:
        key, begin_s = self._register(), self._now_s
        reply = await self._ask(Delete(self._id(), key))
        action: Literal["read", "delete"] = "read" if reply is not None and reply.status == 404 else "delete"
        self._note(key, action, begin_s, _outcome(reply))

    async def _swap(self) -> None:
        key = self._register()
        found = await self.read(key)
        if found is None:
            return
        value, begin_s = self._value(), self._now_s
        guard = Preconditions(versions=[found.version]) if found.status == 200 else Preconditions(absent=True)
        reply = await self._ask(Put(self._id(), key, value.encode(), guard=guard))
        met = reply is None or reply.status != 412
        version = reply.version if reply is not None and reply.status in (201, 204) else None
        self._note(
            key, "swap", begin_s, _outcome(reply), value=_short(value.encode()), expected=_short(found.value), met=met,
            version=version,
        )  # fmt: skip

    # --- groups -------------------------------------------------------------------------------------------------------

    def _group(self) -> str:
        return f"group/{self._rng.randrange(GROUPS)}"

    def _attempt(self) -> Attempt:
        self._stamp = max(self._stamp + 1, int(self._now_s * 1e6) + 1)
        return Attempt(self._stamp, self._stamp, self.name)

    async def _read_group(self) -> None:
        group = self._group()
        if self._rng.random() < 0.3:
            await self.read(f"{group}:{self._rng.randrange(3)}")
        else:
            await self.read_group(group)

    async def read_group(self, group: str) -> tuple[Read, bool]:
        """What it holds; whether that is known."""
        keys, begin_s = _keys(group), self._now_s
        steps = [TxnOp("get", key) for key in keys]
        reply = await self._ask(Transact(self._id(), keys[0], self._attempt(), [], steps, []))
        if not isinstance(reply, Outcome) or reply.state != "committed":
            return Read(0, None), False
        read = self._one(group, reply.reads)
        self._note(group, "read", begin_s, "done", value=_short(read.value), version=read.version or None)
        return read, True

    async def is_known(self, group: str) -> bool:
        """Whether a read of the group was answered."""
        return (await self.read_group(group))[1]

    def _one(self, group: str, reads: list[Read]) -> Read:
        if len({(read.version, read.value) for read in reads}) != 1:
            raise Violation(f"half a transaction: {group} was read as {reads!r}")
        return reads[0]

    async def _transact(self) -> None:
        group = self._group()
        found, known = await self.read_group(group)
        if not known:
            return
        value, begin_s, keys = self._value(), self._now_s, _keys(group)
        if found.value is None:
            conditions = [Condition(key, exists=False) for key in keys]
        else:
            conditions = [Condition(key, version=found.version) for key in keys]
        action: Literal["write", "swap"] = self._rng.choice(("write", "swap"))
        op = Transact(
            self._id(), keys[0], self._attempt(), conditions if action == "swap" else [], _puts(keys, value), [],
        )  # fmt: skip
        reply = await self._ask(op)
        known = isinstance(reply, Outcome) and reply.state == "committed"
        outcome: Literal["done", "refused", "unknown"] = "unknown" if reply is None else "done" if known else "refused"
        more: dict[str, Any] = {}
        if action == "swap":
            more = {"expected": _short(found.value), "met": not known or reply.succeeded}
        version = reply.version if known and reply.succeeded else None
        self._note(group, action, begin_s, outcome, value=_short(value.encode()), version=version, **more)

    async def _take_part(self) -> None:
        """A transaction that is decided elsewhere: only this client decides, and it never forgets."""
        group, value, begin_s, attempt = self._group(), self._value(), self._now_s, self._attempt()
        keys = _keys(group)
        reply = await self._ask(Prepare(self._id(), "elsewhere", attempt, [], _puts(keys, value), []))
        await asyncio.sleep(self._rng.expovariate(10.0))
        if not isinstance(reply, Vote) or self._rng.random() < 0.2:
            await self._insist(Abort(self._id(), attempt, keys))
            self._note(group, "write", begin_s, "refused", value=_short(value.encode()))
            return
        version = reply.vote + self._rng.randrange(1, 4)
        decided_ms = self._machine.environment.now_ms()
        for _ in range(self._rng.choice((1, 1, 2))):
            await self._insist(ApplyIntents(self._id(), attempt, keys, version, True, decided_ms))
        self._note(group, "write", begin_s, "done", value=_short(value.encode()), version=version)

    async def _decide(self) -> None:
        """The anchor's part of a transaction over several stores, of which the other one has voted."""
        group, value, begin_s, attempt = self._group(), self._value(), self._now_s, self._attempt()
        keys = _keys(group)
        clock = self._machine.store.clock.version if self._machine.store is not None else 0
        op = DecideCommit(
            self._id(), keys[0], attempt, [], _puts(keys, value), [], clock + self._rng.randrange(4), True, None, None,
            ["elsewhere"],
        )  # fmt: skip
        reply = await self._ask(op, self._rng.choice((0.002, _PATIENCE_S, _PATIENCE_S)))
        told = reply if isinstance(reply, Outcome) else None
        for _ in range(self._rng.choice((0, 1, 2)) if told else 1):
            asked = await self._insist(ResolveTxn(self._id(), keys[0], attempt))
            if told is not None and (told.state, told.version) != (asked.state, asked.version):
                raise Violation(f"attempt {attempt.name} was told as {told!r}, then as {asked!r}")
            told = asked
        assert told is not None
        outcome: Literal["done", "refused", "unknown"] = "done" if told.state == "committed" else "refused"
        self._note(group, "write", begin_s, outcome, value=_short(value.encode()), version=told.version or None)
        self._stamp = max(self._stamp, told.floor)
        if self._rng.random() < 0.7:
            await self._insist(DropDecisions([attempt]))

    # --- sets ---------------------------------------------------------------------------------------------------------

    async def _element(self) -> None:
        begin_s, op = self._now_s, self._id()
        if self._elements and self._rng.random() < 0.4:
            element, action = self._elements.popleft(), "remove"
            reply = await self._ask(Delete(op, _SET + element))
            if reply is not None and reply.status == 404:
                raise Violation(f"element {element} was added and is not there")
        else:
            element, action = str(self._history.next_value()), "add"
            reply = await self._ask(Put(op, _SET + element, b"1"))
            if _outcome(reply) == "done":
                self._elements.append(element)
        outcome = _outcome(reply)
        end_s = None if outcome == "unknown" else self._now_s
        kind: Any = action
        self._history.add(
            Element(
                client=self.name, begin_s=begin_s, end_s=end_s, outcome=outcome, set=_SET, element=element, action=kind
            )
        )

    async def _list(self) -> None:
        await self.list(self._rng.choice((3, 1000)))

    async def list(self, limit: int) -> bool:
        """All elements, page by page, each of them read without a partition having left."""
        begin_s, after, elements = self._now_s, "", list[str]()
        while True:
            page = await self._scan(Scan(self._id(), _SET, after, limit))
            if page is None:
                return False
            elements += [item[0].removeprefix(_SET) for item in page.items]
            after = page.last
            if not page.more:
                break
        end_s = self._now_s
        self._history.add(
            Members(client=self.name, begin_s=begin_s, end_s=end_s, outcome="done", set=_SET, elements=elements)
        )
        return True

    async def _scan(self, op: Scan) -> Page | None:
        return await self._page(lambda store: store.scans.scan(op))

    async def _page(self, work: Callable[[Any], Any]) -> Page | None:
        try:
            page = await self._machine.call(work)
        except (Lost, KvError):
            return None
        return page if page.owned == _ALL else None

    async def _count(self) -> None:
        begin_s = self._now_s
        page = await self._page(lambda store: store.scans.count(Count(0, _SET)))
        if page is None:
            return
        least, most = self._bounds(begin_s, self._now_s)
        self._machine.loop.note(f"{self.name}: counted {page.count}")
        if not least <= page.count <= most:
            raise Violation(f"counted {page.count} elements from {begin_s:.6f} on, where {least} to {most} were there")

    def _bounds(self, begin_s: float, end_s: float) -> tuple[int, int]:
        """How many elements were there for sure, and how many at most. Adds under way are not known here yet."""
        never = float("inf")
        added: dict[str, tuple[float, float]] = {}
        removed: dict[str, tuple[float, float]] = {}
        for op in self._history.operations:
            if isinstance(op, Element) and op.outcome != "refused":
                table = added if op.action == "add" else removed
                table[op.element] = op.begin_s, never if op.end_s is None else op.end_s
        under_way = self._history_under_way
        least = sum(end < begin_s and removed.get(each, (never, 0))[0] > end_s for each, (_, end) in added.items())
        most = sum(begin < end_s and removed.get(each, (0, never))[1] > begin_s for each, (begin, _) in added.items())
        return least - under_way, most + under_way

    @property
    def _history_under_way(self) -> int:
        """Every other client may be adding or removing one element."""
        return _CLIENTS_MAX

    # --- locks --------------------------------------------------------------------------------------------------------

    async def _lock(self) -> None:
        lock = f"lock/{self._rng.randrange(LOCKS)}"
        ttl_s, begin_s = self._rng.choice((0.3, 1.0, 3.0)), self._now_s
        wait_ms = self._rng.choice((0, 500))
        reply = await self._ask(Acquire(self._id(), lock, round(ttl_s * 1000), wait_ms, self.name))
        token = reply.version if reply is not None and reply.status == 201 else None
        self._note_lease(lock, "acquire", begin_s, reply, token, ttl_s)
        if token is None:
            return
        await self._guarded(lock, token)
        if self._rng.random() < 0.3:
            begin_s = self._now_s
            reply = await self._ask(Renew(self._id(), lock, token))
            self._note_lease(lock, "renew", begin_s, reply, token, ttl_s)
            await asyncio.sleep(self._rng.expovariate(2.0))
            await self._guarded(lock, token)
        if self._rng.random() < 0.7:
            begin_s = self._now_s
            reply = await self._ask(Release(self._id(), lock, token))
            self._note_lease(lock, "release", begin_s, reply, token, ttl_s)

    def _note_lease(
        self,
        lock: str,
        action: Literal["acquire", "renew", "release"],
        begin_s: float,
        reply: Answer | None,
        token: int | None,
        ttl_s: float,
    ) -> None:
        outcome = _outcome(reply, also_refused=412)
        end_s = None if outcome == "unknown" else self._now_s
        self._history.add(
            Lease(
                client=self.name, begin_s=begin_s, end_s=end_s, outcome=outcome, lock=lock, action=action, token=token,
                ttl_s=0.98 * ttl_s,
            )
        )  # fmt: skip

    async def _guarded(self, lock: str, token: int) -> None:
        found = await self._ask(Get(self._id(), lock))
        if found is None or found.status not in (200, 404):
            return
        begin_s, value = self._now_s, int(found.value or b"0") + 1
        reply = await self._ask(Put(self._id(), lock, str(value).encode(), guard=Preconditions(token=token)))
        outcome = _outcome(reply, also_refused=412)
        end_s = None if outcome == "unknown" else self._now_s
        self._history.add(
            Guarded(
                client=self.name, begin_s=begin_s, end_s=end_s, outcome=outcome, lock=lock, token=token, key=lock,
                value=value,
            )
        )  # fmt: skip

    # --- what goes by itself ------------------------------------------------------------------------------------------

    async def _brief(self) -> None:
        """A key of its own that expires: gone is gone, and not before its time."""
        key, environment = f"brief/{self.name}", self._machine.environment
        value, due_ms = self._mayfly
        if value is None or self._rng.random() < 0.3:
            value, ttl_ms = str(self._history.next_value()), self._rng.randrange(1, 3000)
            begin_ms = environment.now_ms()
            reply = await self._insist(Put(self._id(), key, value.encode(), ttl_ms))
            self._mayfly = (value, min(begin_ms, environment.now_ms()) + ttl_ms)
            self._machine.loop.note(f"{self.name}: brief {value} for {ttl_ms} ms: {reply.status}")
            return
        reply = await self._ask(Get(self._id(), key))
        if reply is None or reply.status not in (200, 404):
            return
        self._machine.loop.note(f"{self.name}: brief {value} is {reply.status}")
        if reply.status == 404 and self._machine.latest_ms < due_ms:
            raise Violation(f"{key} was gone at {self._machine.latest_ms} ms, before its time at {due_ms}")
        if reply.status == 404:
            self._mayfly = ("", 0.0)
        elif reply.value != value.encode():
            raise Violation(f"{key} was read as {reply.value!r}, where {value!r} was written last, or had expired")


_CLIENTS_MAX = 8
_ALL = b"\xff" * (PARTITIONS // 8)


def _keys(group: str) -> list[str]:
    return [f"{group}:{number}" for number in range(3)]


def _puts(keys: list[str], value: str) -> list[TxnOp]:
    return [TxnOp("put", key, value.encode()) for key in keys]


def _short(value: bytes | None) -> str | None:
    """Values in histories without what makes them large."""
    return None if value is None else value.decode().rstrip("x")


def _outcome(reply: Answer | None, also_refused: int = 0) -> Literal["done", "refused", "unknown"]:
    if reply is None:
        return "unknown"
    return "refused" if reply.status in _REFUSED or reply.status == also_refused else "done"
