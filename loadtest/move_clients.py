"""Clients that write, lock, count and list while partitions move, and know what must be there afterwards.

Owns: what one client asks for, one request at a time; what it was told; which calls failed, and when.
Promises: a write is sent once, except one that carries an Idempotency-Key: that is sent again, with its key, while its
outcome is unknown or it was refused after that. Each client has keys and locks of its own, so it knows what they hold.
Leaves to others: when to run (loadtest.move_rounds), what lies in the files (move_files), transactions (txn_clients).
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from loadtest.crash_model import KeyHistory
from loadtest.txn_clients import Worker
from loadtest.txn_wire import Reply, Wire

PREFIX = "moves/"
STILL = f"{PREFIX}still/"
SHORT = "short/"
_SHORT_TTL_S = 0.8
_SHORT_LOOKED_AT = 30
_CLOCKS_S = 0.1  # between the clock of the deadline and ours
_HELD_TTL_S = 3600
_LEASE_TTL_S = 1.0
_LEASE_WAIT_S = 3
_INSIST_S = 30.0
_PAUSE_S = 0.06
_PAGE = 97
_PADDING = b"." * 60


class Failure(NamedTuple):
    """A call that was not answered as asked, from when to when (monotonic)."""

    begin_s: float
    end_s: float
    what: str


class NotingWire(Wire):
    """Notes into `failures` each call whose answer is no decision."""

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str], seed: int, failures: list[Failure]) -> None:
        super().__init__(http, urls, seed)
        self._failures = failures

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """As that of a Wire."""
        begin_s = time.monotonic()
        reply = await super().ask(method, path, body, headers)
        if reply.outcome != "done" and reply.status != 423:
            self._failures.append(Failure(begin_s, time.monotonic(), f"{method} {path}: {reply.words}"))
        return reply

    async def insist(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        """Sent again, with its Idempotency-Key, until the outcome is known; `Reply(-1)` if that takes too long."""
        deadline_s, sent = time.monotonic() + _INSIST_S, False
        while True:
            reply = await self.ask(method, path, body, headers)
            sent = sent or reply.outcome == "unknown"
            if reply.outcome == "done" or not sent:
                return reply
            if time.monotonic() > deadline_s:
                return Reply(-1)
            await asyncio.sleep(_PAUSE_S)


class Kept(NamedTuple):
    """A write that carried an Idempotency-Key, and how it was answered."""

    key: str
    value: bytes
    headers: Mapping[str, str]
    status: int
    version: int | None


class KeyWriter(Worker):
    """The only one that writes its keys: puts, deletes, reads. `kept`: what must be answered again as it was."""

    def __init__(self, name: str, wire: NotingWire, keys: Sequence[KeyHistory]) -> None:
        super().__init__(name, wire)
        self.keys = keys
        self.kept: list[Kept] = []
        self._wire = wire
        self._number = 0

    async def step(self) -> None:
        key = self.rng.choice(self.keys)
        choice = self.rng.random()
        if choice < 0.4:
            await self._put(key)
        elif choice < 0.55:
            await self._put_for_sure(key)
        elif choice < 0.7:
            self._take_deleted(key, await self.wire.ask("DELETE", f"/v1/kv/{key.key}"))
        else:
            await self.read(key)
        await asyncio.sleep(self.rng.uniform(0.0, _PAUSE_S))

    def _value(self) -> bytes:
        self._number += 1
        return b"%s-%d\0\xff%s" % (self.name.encode(), self._number, _PADDING)

    async def _put(self, key: KeyHistory) -> None:
        value = self._value()
        self._take_put(key, value, await self.wire.ask("PUT", f"/v1/kv/{key.key}", value))

    async def _put_for_sure(self, key: KeyHistory) -> None:
        value, headers = self._value(), {"Idempotency-Key": str(uuid.UUID(int=self.rng.getrandbits(128)))}
        reply = await self._wire.insist("PUT", f"/v1/kv/{key.key}", value, headers)
        self._take_put(key, value, reply)
        if reply.status in (201, 204):
            self.kept.append(Kept(key.key, value, headers, reply.status, reply.version))

    def _take_put(self, key: KeyHistory, value: bytes, reply: Reply) -> None:
        if reply.status in (201, 204) and reply.version is not None:
            self.count("done")
            key.put_acknowledged(value, reply.version, created=reply.status == 201)
        elif reply.outcome == "unknown":
            self.count("unknown")
            key.outcome_unknown(value)
        else:
            self._take_refusal(key, value, reply)

    def _take_deleted(self, key: KeyHistory, reply: Reply) -> None:
        if reply.status in (204, 404):
            self.count("done")
            key.delete_acknowledged(existed=reply.status == 204)
        elif reply.outcome == "unknown":
            self.count("unknown")
            key.outcome_unknown(None)
        else:
            self._take_refusal(key, None, reply)

    def _take_refusal(self, key: KeyHistory, value: bytes | None, reply: Reply) -> None:
        self.count("refused")
        key.refused(value)
        if reply.outcome == "done":
            self.wire.complain(f"a write of {key.key} was answered {reply.words}")

    async def read(self, key: KeyHistory) -> bool:
        """Whether there was an answer; it is compared with what the key may hold."""
        reply = await self.wire.ask("GET", f"/v1/kv/{key.key}")
        if reply.status in (200, 404):
            self.count("reads")
            key.observed(reply.body if reply.status == 200 else None, reply.version)
        elif reply.outcome == "done":
            self.wire.complain(f"a read of {key.key} was answered {reply.words}")
        return reply.status in (200, 404)

    async def repeat(self, kept: Kept) -> str:
        """Ask once more with the Idempotency-Key: a sentence if the answer is not the first one."""
        reply = await self.wire.ask("PUT", f"/v1/kv/{kept.key}", kept.value, kept.headers)
        if (reply.status, reply.version) == (kept.status, kept.version):
            return ""
        first = f"{kept.status}, version {kept.version}"
        return f"{kept.key}: a repeated PUT was answered {reply.words}, version {reply.version}; at first {first}"


class Counter(Worker):
    """Counts up by compare-and-set, with an Idempotency-Key: exactly once for each that was acknowledged."""

    def __init__(self, name: str, wire: NotingWire) -> None:
        super().__init__(name, wire)
        self.key = f"{PREFIX}counter/{name}"
        self.counted = 0
        self._wire = wire
        self._version: int | None = None

    async def step(self) -> None:
        condition = {"If-None-Match": "*"} if self._version is None else {"If-Match": f'"{self._version}"'}
        headers = condition | {"Idempotency-Key": str(uuid.UUID(int=self.rng.getrandbits(128)))}
        reply = await self._wire.insist("PUT", f"/v1/kv/{self.key}", b"%d" % (self.counted + 1), headers)
        if reply.status in (201, 204) and reply.version is not None:
            self.count("done")
            if self._version is not None and reply.version <= self._version:
                self.wire.complain(f"{self.key}: version {reply.version} after {self._version}")
            self.counted, self._version = self.counted + 1, reply.version
        elif reply.outcome == "done":
            self.wire.complain(f"{self.key}, that only one writes, was answered {reply.words}")
        await asyncio.sleep(self.rng.uniform(0.0, 2 * _PAUSE_S))

    async def look(self) -> str:
        """A sentence if it does not hold what was counted."""
        reply = await self.wire.ask("GET", f"/v1/kv/{self.key}")
        if reply.status == 404 and not self.counted:
            return ""
        if (reply.status, reply.body, reply.version) == (200, b"%d" % self.counted, self._version):
            return ""
        return f"{self.key} is {reply.words} {reply.body!r} at {reply.version}, not {self.counted} at {self._version}"


class Locker(Worker):
    """Takes locks again and again, beside others that do: tokens rise. `tokens`: of all lockers, by name."""

    def __init__(self, name: str, wire: NotingWire, names: Sequence[str], tokens: dict[str, list[int]]) -> None:
        super().__init__(name, wire)
        self._names = names
        self._tokens = tokens

    async def step(self) -> None:
        name = self.rng.choice(self._names)
        wanted = {"ttl": _LEASE_TTL_S, "wait": _LEASE_WAIT_S, "owner": self.name}
        before = max(self._tokens.setdefault(name, [0]))
        reply = await self.wire.ask("POST", f"/v1/locks/{name}", msgspec.json.encode(wanted))
        if reply.status == 201:
            token = msgspec.json.decode(reply.body)["token"]
            self.count("grants")
            if token <= before:
                self.wire.complain(f"the lock {name} was granted with token {token}, after {before}")
            if token in self._tokens[name]:
                self.wire.complain(f"the lock {name} was granted twice with token {token}")
            self._tokens[name].append(token)
            released = await self.wire.ask("DELETE", f"/v1/locks/{name}", None, {"Lock-Token": str(token)})
            if released.outcome == "done" and released.status not in (204, 412):  # 412: a try before was heard
                self.wire.complain(f"the release of {name} was answered {released.words}")
        elif reply.outcome == "done" and reply.status != 423:
            self.wire.complain(f"an acquire of {name} was answered {reply.words}")
        await asyncio.sleep(self.rng.uniform(0.0, 2 * _PAUSE_S))


class Holder(Worker):
    """Holds some leases all the time, and writes under them."""

    def __init__(self, name: str, wire: NotingWire, count: int) -> None:
        super().__init__(name, wire)
        self.held: dict[str, int] = {}
        self._count = count
        self._number = 0

    async def open(self) -> None:
        """Take the leases. Raises RuntimeError."""
        wanted = msgspec.json.encode({"ttl": _HELD_TTL_S, "owner": self.name})
        for number in range(self._count):
            name = f"{PREFIX}held/{number}"
            reply = await self.wire.ask("POST", f"/v1/locks/{name}", wanted)
            if reply.status != 201:
                raise RuntimeError(f"{name} was not granted: {reply.words}")
            self.held[name] = msgspec.json.decode(reply.body)["token"]

    async def step(self) -> None:
        name, token = self.rng.choice(list(self.held.items()))
        self._number += 1
        headers = {"Lock-Token": str(token)}
        if self.rng.random() < 0.5:
            reply = await self.wire.ask("PUT", f"/v1/locks/{name}", None, headers)
        else:
            reply = await self.wire.ask("PUT", f"/v1/kv/{name}", b"%d" % self._number, headers)
        if reply.outcome == "done" and reply.status not in (200, 201, 204):
            self.wire.complain(f"the holder of {name} was answered {reply.words}")
        await asyncio.sleep(self.rng.uniform(0.0, 2 * _PAUSE_S))

    async def look(self) -> list[str]:
        """Sentences on leases that are not held any more, or that do not guard their keys."""
        wrong = []
        for name, token in self.held.items():
            reply = await self.wire.ask("GET", f"/v1/locks/{name}")
            found = msgspec.json.decode(reply.body) if reply.status == 200 else {}
            if (found.get("token"), found.get("owner")) != (token, self.name):
                wrong.append(f"the lease on {name} with token {token} is {reply.words} {found}")
            intruder = await self.wire.ask("PUT", f"/v1/kv/{name}", b"intruder")
            if intruder.status != 423:
                wrong.append(f"a write to the leased key {name} was answered {intruder.words}")
        return wrong


class Short(NamedTuple):
    """A key that expires between these two moments (monotonic)."""

    key: str
    value: bytes
    earliest_s: float
    latest_s: float


class Expirer(Worker):
    """Writes keys that soon expire, and looks whether they are there before, and gone after that."""

    def __init__(self, name: str, wire: Wire) -> None:
        super().__init__(name, wire)
        self._written: list[Short] = []
        self._number = 0

    async def step(self) -> None:
        if self.rng.random() < 0.4 or not self._written:
            await self._write()
        else:
            await self._look(self.rng.choice(self._written[-_SHORT_LOOKED_AT:]))
        await asyncio.sleep(self.rng.uniform(0.0, 2 * _PAUSE_S))

    async def _write(self) -> None:
        self._number += 1
        key, value = f"{SHORT}{self.name}/{self._number}", b"%d" % self._number
        began_s = time.monotonic()
        reply = await self.wire.ask("PUT", f"/v1/kv/{key}?ttl={_SHORT_TTL_S}", value)
        if reply.status == 201:
            self._written.append(Short(key, value, began_s + _SHORT_TTL_S, time.monotonic() + _SHORT_TTL_S))
        elif reply.outcome == "done":
            self.wire.complain(f"a put of {key} was answered {reply.words}")

    async def _look(self, short: Short) -> None:
        began_s = time.monotonic()
        reply = await self.wire.ask("GET", f"/v1/kv/{short.key}")
        ended_s = time.monotonic()
        if reply.status not in (200, 404):
            return
        if ended_s < short.earliest_s - _CLOCKS_S and (reply.status, reply.body) != (200, short.value):
            self.wire.complain(f"{short.key} is {reply.words} {reply.body!r} before it may expire")
        if began_s > short.latest_s + _CLOCKS_S and reply.status != 404:
            self.wire.complain(f"{short.key} is there {began_s - short.latest_s:.1f} s after it has expired")


class StillKeys:
    """Keys that are written once and then only read; some were deleted at once. `values`: value and version."""

    def __init__(self, wire: Wire, count: int) -> None:
        self.values: dict[str, tuple[bytes, int]] = {}
        self.deleted: dict[str, int] = {}
        self._wire = wire
        self._count = count

    async def load(self) -> None:
        """Raises RuntimeError."""
        rng = self._wire.rng
        for number in range(self._count):
            key, value = f"{STILL}{number:05d}", rng.randbytes(rng.choice((0, 1, 40, 120, 400)))
            ttl = "?ttl=100000" if number % 7 == 0 else ""
            reply = await self._wire.ask("PUT", f"/v1/kv/{key}{ttl}", value)
            if reply.status != 201 or reply.version is None:
                raise RuntimeError(f"{key} was not written: {reply.words}")
            if number % 5 == 0:
                reply_to_delete = await self._wire.ask("DELETE", f"/v1/kv/{key}")
                if reply_to_delete.status != 204:
                    raise RuntimeError(f"{key} was not deleted: {reply_to_delete.words}")
                self.deleted[key] = reply.version
            else:
                self.values[key] = value, reply.version

    def compare(self, found: Sequence[tuple[str, bytes, int]]) -> list[str]:
        """Sentences on what a whole listing of them shows, and should not."""
        wrong = [f"{key} is listed twice" for (key, *_), (after, *_) in itertools.pairwise(found) if key >= after]
        listed = {key: (value, version) for key, value, version in found}
        wrong += [f"{key} is not listed" for key in self.values.keys() - listed.keys()]
        wrong += [f"{key} was deleted and is listed" for key in listed.keys() & self.deleted.keys()]
        wrong += [
            f"{key} is listed, and nobody wrote it" for key in listed.keys() - self.values.keys() - self.deleted.keys()
        ]
        for key, held in self.values.items():
            if key in listed and listed[key] != held:
                wrong.append(f"{key} is {listed[key]!r}, not {held!r}"[:300])
        return wrong[:10]


class Lister(Worker):
    """Lists the keys that stay as they are, page by page, and counts them."""

    def __init__(self, name: str, wire: Wire, still: StillKeys) -> None:
        super().__init__(name, wire)
        self._still = still

    async def step(self) -> None:
        if self.rng.random() < 0.3:
            await self._count()
        else:
            found = await listed(self.wire, STILL)
            if found is not None:
                self.count("listings")
                self.wire.complaints += self._still.compare(found)
        await asyncio.sleep(self.rng.uniform(0.0, 4 * _PAUSE_S))

    async def _count(self) -> None:
        reply = await self.wire.ask("GET", f"/v1/kv?prefix={STILL}&count=true")
        if reply.status == 200 and msgspec.json.decode(reply.body) != {"count": len(self._still.values)}:
            self.wire.complain(f"counted {reply.body!r} instead of {len(self._still.values)}")


async def listed(wire: Wire, prefix: str) -> list[tuple[str, bytes, int]] | None:
    """All keys with that prefix, their values and versions; None if a page was refused."""
    found: list[tuple[str, bytes, int]] = []
    after: str | None = ""
    while after is not None:
        reply = await wire.ask("GET", f"/v1/kv?prefix={prefix}&values=true&limit={_PAGE}{after}")
        if reply.status != 200:
            return None
        page = _page(reply.body)
        found += [(item.key, item.body, item.version) for item in page.items]
        after = None if page.next is None else f"&after={page.next}"
    return found


class _Item(msgspec.Struct):
    key: str
    version: int
    value: str | None = None
    value_base64: bytes | None = None

    @property
    def body(self) -> bytes:
        return self.value_base64 if self.value is None else self.value.encode()  # type: ignore[return-value]


class _Page(msgspec.Struct):
    items: list[_Item]
    next: str | None


_page: Callable[[Any], _Page] = msgspec.json.Decoder(_Page).decode
