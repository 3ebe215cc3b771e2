"""What ends by itself in a simulated store: leases of locks, and keys with a time to live.

Owns: what is called, and how each answer enters the history; when a key may be gone.
Promises: a key with a time to live is written by one client, and is not gone before its time.
Leaves to others: the calls (`store_clients`), whether the history can be (`loadtest.histories.locks`).
"""

from __future__ import annotations

import asyncio

from kvstore.model import Preconditions
from kvstore.protocol import Acquire, Get, Put, Release, Renew
from loadtest.histories.history import Guarded, Lease
from loadtest.simulate.store_clients import Client, outcome_of
from loadtest.simulate.store_invariants import Violation

_LOCKS = 2
_CLOCKS_AGREE = 0.98


async def lock(client: Client) -> None:
    """Acquire a lock, write under it, perhaps renew it and write again, and mostly release it."""
    name, rng = f"lock/{client.rng.randrange(_LOCKS)}", client.rng
    ttl_s, begin_s = rng.choice((0.3, 1.0, 3.0)), client.now_s
    wait_ms = rng.choice((0, 500))
    reply = await client.ask(Acquire(client.id(), name, round(ttl_s * 1000), wait_ms, client.name))
    token = reply.version if reply is not None and reply.status == 201 else None

    def note(action: str) -> None:
        outcome = outcome_of(reply, also_refused=412)
        client.note(Lease, begin_s, outcome, lock=name, action=action, token=token, ttl_s=_CLOCKS_AGREE * ttl_s)

    note("acquire")
    if token is None:
        return
    await _raise_guarded(client, name, token)
    if rng.random() < 0.3:
        begin_s = client.now_s
        reply = await client.ask(Renew(client.id(), name, token))
        note("renew")
        await asyncio.sleep(rng.expovariate(2.0))
        await _raise_guarded(client, name, token)
    if rng.random() < 0.7:
        begin_s = client.now_s
        reply = await client.ask(Release(client.id(), name, token))
        note("release")


async def _raise_guarded(client: Client, name: str, token: int) -> None:
    """The number that the lock guards, under its own name."""
    found = await client.ask(Get(client.id(), name))
    if found is None or found.status not in (200, 404):
        return
    begin_s, value = client.now_s, int(found.value or b"0") + 1
    reply = await client.ask(Put(client.id(), name, str(value).encode(), guard=Preconditions(token=token)))
    outcome = outcome_of(reply, also_refused=412)
    client.note(Guarded, begin_s, outcome, lock=name, token=token, key=name, value=value)


class Brief:
    """A key of one client that expires: gone is gone, and not before its time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._key = f"brief/{client.name}"
        self._value: str | None = None
        self._due_ms = 0.0

    async def write_or_read(self) -> None:
        client, environment = self._client, self._client.machine.environment
        if self._value is None or client.rng.random() < 0.3:
            value, ttl_ms = str(client.history.next_value()), client.rng.randrange(1, 3000)
            begin_ms = environment.now_ms()
            reply = await client.insist(Put(client.id(), self._key, value.encode(), ttl_ms))
            self._value, self._due_ms = value, min(begin_ms, environment.now_ms()) + ttl_ms
            client.machine.loop.note(f"{client.name}: brief {value} for {ttl_ms} ms: {reply.status}")
            return
        reply = await client.ask(Get(client.id(), self._key))
        if reply is None or reply.status not in (200, 404):
            return
        client.machine.loop.note(f"{client.name}: brief {self._value} is {reply.status}")
        latest_ms = client.machine.environment.latest_ms
        if reply.status == 404 and latest_ms < self._due_ms:
            raise Violation(f"{self._key} was gone at {latest_ms} ms, before its time at {self._due_ms}")
        if reply.status == 404:
            self._value, self._due_ms = "", 0.0
        elif reply.value != self._value.encode():
            wrong = f"{reply.value!r}, where {self._value!r} was written last, or had expired"
            raise Violation(f"{self._key} was read as {wrong}")
