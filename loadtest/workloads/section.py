"""Critical sections: a counter that is raised by a plain write, under a lock.

Owns: what a client does under its lock, and how each answer enters the history.
Promises: nothing but the lock and its fencing token keeps two clients apart: the write has no condition of its own.
Some clients stay longer than their lease lasts and write nevertheless: the store must refuse them.
Leaves to others: whether the history can be (loadtest.histories).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from loadtest.histories.history import Guarded, Lease, Outcome
from loadtest.workloads import calls
from loadtest.workloads.calls import Call, Pause, Reply, Steps
from loadtest.workloads.place import Place

_SHORT_TTL_S = 0.2
_OVERSTAY_S = 0.5
_WAIT_S = 2.0


class _Granted(msgspec.Struct):
    token: int


class CriticalSections:
    """One client."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def step(self) -> Steps[None]:
        rng, shape = self._place.rng, self._place.shape
        lock = key_of(self._place.prefix, rng.randrange(shape.locks))
        overstays = rng.random() < shape.oversleeps
        ttl_s = _SHORT_TTL_S if overstays else rng.choice(shape.leases_s)
        token, reply = yield from self._acquire(lock, ttl_s)
        if token is None:
            yield from calls.rest(reply)
            return
        found = yield calls.get("section read", lock)
        if found.outcome == "done":
            if overstays:
                yield Pause(_OVERSTAY_S)
            elif rng.random() < 0.1:
                yield from self._show(lock, token, "renew", ttl_s)
            reply = yield from self._write(lock, token, int(found.body or b"0") + 1 if found.status == 200 else 1)
            yield from calls.rest(reply)
        if rng.random() >= shape.keeps:
            yield from self._show(lock, token, "release", 0.0)

    def _acquire(self, lock: str, ttl_s: float) -> Steps[tuple[int | None, Reply]]:
        waits = self._place.rng.random() < 0.7
        body = {"ttl": ttl_s, "wait": _WAIT_S if waits else 0, "owner": self._place.client}
        name = "lock acquire, waits" if waits else "lock acquire"
        reply = yield Call(
            name, "POST", f"/v1/locks/{lock}", msgspec.json.encode(body), expected=frozenset({201, 409, 423})
        )
        token = msgspec.json.decode(reply.body, type=_Granted).token if reply.status == 201 else None
        if token is not None or reply.outcome == "unknown":
            self._place.record(Lease, reply, lock=lock, action="acquire", token=token, ttl_s=ttl_s)
        return token, reply

    def _show(self, lock: str, token: int, action: Literal["renew", "release"], ttl_s: float) -> Steps[None]:
        method, expected = ("PUT", {200, 412}) if action == "renew" else ("DELETE", {204, 412})
        headers = {"Lock-Token": str(token)}
        reply = yield Call(f"lock {action}", method, f"/v1/locks/{lock}", None, headers, frozenset(expected))
        outcome: Outcome = "refused" if reply.status == 412 else reply.outcome
        self._place.record(Lease, reply, outcome, lock=lock, action=action, token=token, ttl_s=ttl_s)

    def _write(self, lock: str, token: int, value: int) -> Steps[Reply]:
        """The lock guards the key of its name: by a plain write with the token, or by a transaction."""
        if self._place.rng.random() < 0.7:
            headers = {"Lock-Token": str(token)}
            reply = yield Call(
                "section write", "PUT", f"/v1/kv/{lock}", b"%d" % value, headers, frozenset({201, 204, 412})
            )
            held = reply.status != 412
        else:
            body = {
                "if": [{"lock": lock, "token": token}],
                "then": [{"op": "put", "key": lock, "value": str(value)}],
            }
            reply = yield calls.transaction("section write, transaction", body)
            answered = calls.answer_of(reply)
            held = answered is None or answered.succeeded
        outcome: Outcome = reply.outcome if held else "refused"
        self._place.record(Guarded, reply, outcome, lock=lock, token=token, key=lock, value=value)
        return reply


def key_of(prefix: str, number: int) -> str:
    return f"{prefix}section/{number:02d}"
