"""Groups of three keys of a simulated store that only transactions write, all three with the same value.

Owns: what is called, and how each answer enters the history.
Promises: a group that does not show one value was half written, and is a violation at once.
Leaves to others: the calls (`store_clients`), whether the history can be (`loadtest.histories.registers`).

Groups are written in one batch (`Transact`), as the part of a transaction that is decided elsewhere (`Prepare`, then
`ApplyIntents` or `Abort`), and as the part of one decided here (`DecideCommit`, `ResolveTxn`), so all three must look
like one register.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from kvstore.model import Condition, Read, TxnOp
from kvstore.protocol import Abort, ApplyIntents, DecideCommit, Outcome, Prepare, ResolveTxn, Transact, Vote
from kvstore.store.ops import DropDecisions
from loadtest.simulate import store_registers as registers
from loadtest.simulate.store_clients import PATIENCE_S, Client, short
from loadtest.simulate.store_invariants import Violation

GROUPS = 3


def _any_group(client: Client) -> str:
    return f"group/{client.rng.randrange(GROUPS)}"


async def read_any(client: Client) -> None:
    group = _any_group(client)
    if client.rng.random() < 0.3:
        await registers.read(client, f"{group}:{client.rng.randrange(3)}")
    else:
        await read(client, group)


async def read(client: Client, group: str) -> tuple[Read, bool]:
    """What it holds; whether that is known."""
    keys, begin_s = _keys(group), client.now_s
    steps = [TxnOp("get", key) for key in keys]
    reply = await client.ask(Transact(client.id(), keys[0], client.attempt(), [], steps, []))
    if not isinstance(reply, Outcome) or reply.state != "committed":
        return Read(0, None), False
    found = _one(group, reply.reads)
    client.note_register(group, "read", begin_s, "done", value=short(found.value), version=found.version or None)
    return found, True


async def is_known(client: Client, group: str) -> bool:
    """Whether a read of the group was answered."""
    return (await read(client, group))[1]


def _one(group: str, reads: list[Read]) -> Read:
    if len({(read.version, read.value) for read in reads}) != 1:
        raise Violation(f"half a transaction: {group} was read as {reads!r}")
    return reads[0]


async def swap(client: Client) -> None:
    group = _any_group(client)
    found, known = await read(client, group)
    if not known:
        return
    value, begin_s, keys = client.value(), client.now_s, _keys(group)
    if found.value is None:
        conditions = [Condition(key, exists=False) for key in keys]
    else:
        conditions = [Condition(key, version=found.version) for key in keys]
    action: Literal["write", "swap"] = client.rng.choice(("write", "swap"))
    op = Transact(
        client.id(), keys[0], client.attempt(), conditions if action == "swap" else [], _puts(keys, value), [],
    )  # fmt: skip
    reply = await client.ask(op)
    known = isinstance(reply, Outcome) and reply.state == "committed"
    outcome: Literal["done", "refused", "unknown"] = "unknown" if reply is None else "done" if known else "refused"
    more: dict[str, Any] = {}
    if action == "swap":
        more = {"expected": short(found.value), "met": not known or reply.succeeded}
    version = reply.version if known and reply.succeeded else None
    client.note_register(group, action, begin_s, outcome, value=short(value.encode()), version=version, **more)


async def prepare(client: Client) -> None:
    """A transaction that is decided elsewhere: only this client decides, and it never forgets."""
    group, value, begin_s, attempt = _any_group(client), client.value(), client.now_s, client.attempt()
    keys = _keys(group)
    reply = await client.ask(Prepare(client.id(), "elsewhere", attempt, [], _puts(keys, value), []))
    await asyncio.sleep(client.rng.expovariate(10.0))
    if not isinstance(reply, Vote) or client.rng.random() < 0.2:
        await client.insist(Abort(client.id(), attempt, keys))
        client.note_register(group, "write", begin_s, "refused", value=short(value.encode()))
        return
    version = reply.vote + client.rng.randrange(1, 4)
    decided_ms = client.machine.environment.now_ms()
    for _ in range(client.rng.choice((1, 1, 2))):
        await client.insist(ApplyIntents(client.id(), attempt, keys, version, True, decided_ms))
    client.note_register(group, "write", begin_s, "done", value=short(value.encode()), version=version)


async def decide(client: Client) -> None:
    """The anchor's part of a transaction over several stores, of which the other one has voted."""
    group, value, begin_s, attempt = _any_group(client), client.value(), client.now_s, client.attempt()
    keys = _keys(group)
    clock = client.machine.store.clock.version if client.machine.store is not None else 0
    op = DecideCommit(
        client.id(), keys[0], attempt, [], _puts(keys, value), [], clock + client.rng.randrange(4), True, None, None,
        ["elsewhere"],
    )  # fmt: skip
    reply = await client.ask(op, client.rng.choice((0.002, PATIENCE_S, PATIENCE_S)))
    told = reply if isinstance(reply, Outcome) else None
    for _ in range(client.rng.choice((0, 1, 2)) if told else 1):
        asked = await client.insist(ResolveTxn(client.id(), keys[0], attempt))
        if told is not None and (told.state, told.version) != (asked.state, asked.version):
            raise Violation(f"attempt {attempt.name} was told as {told!r}, then as {asked!r}")
        told = asked
    assert told is not None
    outcome: Literal["done", "refused", "unknown"] = "done" if told.state == "committed" else "refused"
    client.note_register(group, "write", begin_s, outcome, value=short(value.encode()), version=told.version or None)
    client.stamp = max(client.stamp, told.floor)
    if client.rng.random() < 0.7:
        await client.insist(DropDecisions([attempt]))


def _keys(group: str) -> list[str]:
    return [f"{group}:{number}" for number in range(3)]


def _puts(keys: list[str], value: str) -> list[TxnOp]:
    return [TxnOp("put", key, value.encode()) for key in keys]
