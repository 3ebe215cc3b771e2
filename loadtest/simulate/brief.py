"""Keys that expire: what is gone stays gone.

Owns: what a client does to the one key of its own that has a ttl, and what each read of it may find.
Promises: no other client writes the key, and a write of unknown outcome is the last one to it. That nothing expires
early is left to stores alone: here the wall clocks of shards jump apart.
Leaves to others: sending (`cluster_clients`).
"""

from __future__ import annotations

from loadtest.simulate.store_invariants import Violation
from loadtest.workloads import calls
from loadtest.workloads.calls import Call, Pause, Steps
from loadtest.workloads.place import Place

_TTL_S_MAX = 2.0
_AGAIN_S = 0.4


class Briefs:
    """One client. `gone`: its value was seen to be there no more."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._turn_to_another()

    def _turn_to_another(self) -> None:
        self._key = f"{self._place.prefix}brief/{self._place.client}/{self._place.number()}"
        self._value: str | None = None
        self._gone = False
        self._ttl_s = 0.0

    def step(self) -> Steps[None]:
        """Write it, or read it a few times. Raises Violation."""
        if self._value is None or self._place.rng.random() < 0.3:
            yield from self._write()
        if self._place.rng.random() < 0.5:
            yield Pause(self._ttl_s)  # it expires about now
        for _ in range(self._place.rng.randrange(5)):
            yield from self._read()
        if self._gone:
            for _ in range(self._place.rng.randrange(5)):  # while clocks jump, and its partition moves
                yield Pause(self._place.rng.uniform(0.0, _AGAIN_S))
                yield from self._read()

    def _write(self) -> Steps[None]:
        value, self._ttl_s = str(self._place.number()), self._place.rng.uniform(0.05, _TTL_S_MAX)
        path = f"/v1/kv/{self._key}?ttl={self._ttl_s:.3f}"
        reply = yield Call("brief write", "PUT", path, value.encode(), expected=calls.PUT)
        if reply.outcome == "unknown":
            self._turn_to_another()
        elif reply.outcome == "done":
            self._value, self._gone = value, False

    def _read(self) -> Steps[None]:
        if self._value is None:
            return
        reply = yield calls.get("brief read", self._key)
        if reply.status == 404:
            self._gone = True
        elif reply.status == 200 and (self._gone or reply.body.decode() != self._value):
            expected = "nothing, since it had expired" if self._gone else self._value
            raise Violation(f"{self._key} was read as {reply.body.decode()}, not as {expected}")
