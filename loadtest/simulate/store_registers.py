"""Single keys of a simulated store, as registers: read, written, deleted, swapped.

Owns: what is called, and how each answer enters the history.
Promises: a write that is repeated under one Idempotency-Key has one answer.
Leaves to others: the calls (`store_clients`), whether the history can be (`loadtest.histories.registers`).
"""

from __future__ import annotations

from typing import Literal

from kvstore.model import IdempotencyKey, Preconditions
from kvstore.protocol import Answer, Delete, Get, Put
from loadtest.simulate.store_clients import PATIENCE_S, Client, outcome_of, short
from loadtest.simulate.store_invariants import Violation

REGISTERS = 3


def _any_key(client: Client) -> str:
    return f"register/{client.rng.randrange(REGISTERS)}"


async def read_any(client: Client) -> None:
    await read(client, _any_key(client))


async def read(client: Client, key: str) -> Answer | None:
    """The answer, if it says what the key has. One of a group counts as a read of the group."""
    begin_s = client.now_s
    reply = await client.ask(Get(client.id(), key))
    if reply is None or reply.status not in (200, 404):
        return None
    client.note_register(
        key.split(":")[0], "read", begin_s, "done", value=short(reply.value), version=reply.version or None
    )
    return reply  # type: ignore[no-any-return]


async def write(client: Client) -> None:
    key, value, begin_s = _any_key(client), client.value(), client.now_s
    patience_s = client.rng.choice((0.002, PATIENCE_S, PATIENCE_S, PATIENCE_S))
    reply = await client.ask(Put(client.id(), key, value.encode()), patience_s)
    _note_write(client, key, value, begin_s, reply)


def _note_write(client: Client, key: str, value: str, begin_s: float, reply: Answer | None) -> None:
    version = reply.version if reply is not None and reply.status in (200, 201, 204) else None
    outcome = outcome_of(reply)
    client.note_register(key, "write", begin_s, outcome, value=short(value.encode()), version=version)


async def write_twice(client: Client) -> None:
    key, value, begin_s = _any_key(client), client.value(), client.now_s
    once = IdempotencyKey(f"once-{client.name}-{client.id()}", value[:8])
    reply = await client.insist(Put(client.id(), key, value.encode(), once=once))
    if client.rng.random() < 0.5:
        again = await client.insist(Put(client.id(), key, value.encode(), once=once))
        if (again.status, again.version) != (reply.status, reply.version):
            raise Violation(f"one Idempotency-Key, two answers: {reply!r} and {again!r}")
    _note_write(client, key, value, begin_s, reply)


async def delete(client: Client) -> None:
    key, begin_s = _any_key(client), client.now_s
    reply = await client.ask(Delete(client.id(), key))
    action: Literal["read", "delete"] = "read" if reply is not None and reply.status == 404 else "delete"
    client.note_register(key, action, begin_s, outcome_of(reply))


async def swap(client: Client) -> None:
    key = _any_key(client)
    found = await read(client, key)
    if found is None:
        return
    value, begin_s = client.value(), client.now_s
    guard = Preconditions(versions=[found.version]) if found.status == 200 else Preconditions(absent=True)
    reply = await client.ask(Put(client.id(), key, value.encode(), guard=guard))
    met = reply is None or reply.status != 412
    version = reply.version if reply is not None and reply.status in (201, 204) else None
    client.note_register(
        key, "swap", begin_s, outcome_of(reply), value=short(value.encode()), expected=short(found.value), met=met,
        version=version,
    )  # fmt: skip
