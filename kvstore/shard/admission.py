"""What a shard takes in: the limits of a request, checked where it arrives.

Owns: which limit holds for which request.
Promises: pure. What is refused has changed nothing, and reaches no queue. The router has checked what its clients send,
but another process may be another version, or have other limits.
Leaves to others: bounds that never change, which are part of the types (`protocol`); the size of a frame
(`transport.channel`).

Only what would store something new is held to limits that can be configured. What reads, ends or undoes must go on
working for what was stored when they were wider: an intent under a long key can be finished, a large value deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.config import Limits
from kvstore.errors import BadRequest, BadTtl, KeyEmpty, KeyTooLong, ValueTooLarge
from kvstore.model import STAMP_MAX, Attempt, IdempotencyKey, TxnOp
from kvstore.protocol import (
    Acquire,
    DecideCommit,
    Delete,
    GetTxn,
    Prepare,
    Pull,
    Put,
    ReadLock,
    Release,
    Renew,
    Request,
    Transact,
)

_ONCE_CHARS_MAX = 255
_ROUTER_CHARS_MAX = 64


class Admission:
    """The limits of a shard, for what comes in."""

    def __init__(self, limits: Limits, partitions: int) -> None:
        self._limits = limits
        self._partitions = partitions
        self._key_chars = limits.key_bytes_max // 4  # with so many it is short enough, whatever they are
        self._checks: dict[type, Callable[[Any], None]] = {
            Put: self._put,
            Acquire: self._acquire,
            Delete: self._once,
            Renew: self._once,
            Release: self._release,
            Transact: self._transaction,
            Prepare: self._prepare,
            DecideCommit: self._transaction,
            ReadLock: self._attempt,
            GetTxn: self._look,
            Pull: self._pull,
        }

    def check(self, request: Request) -> None:
        """Refuse what is not taken in; nothing was done. Raises BadRequest and its kinds, ValueTooLarge."""
        check = self._checks.get(type(request))
        if check is not None:
            check(request)

    def _put(self, op: Put) -> None:
        self._key(op.key)
        self._value(op.value, op.ttl_ms)
        if op.once is not None:
            self._once(op)

    def _acquire(self, op: Acquire) -> None:
        limits = self._limits
        self._key(op.key)
        self._once(op)
        if op.ttl_ms > limits.lock_ttl_s_max * 1000:
            raise BadTtl(f"a lock's ttl is at most {limits.lock_ttl_s_max} s.", lock_ttl_s_max=limits.lock_ttl_s_max)
        if op.wait_ms > limits.lock_wait_s_max * 1000:
            raise BadRequest(f"wait is at most {limits.lock_wait_s_max} s.")
        if len(op.owner.encode()) > limits.owner_bytes_max:
            raise BadRequest(f"owner has more than {limits.owner_bytes_max} bytes.")

    def _transaction(self, op: Any) -> None:
        self._key(op.anchor if type(op) is Prepare else op.key)
        self._attempt(op)
        if op.once is not None:
            self._once(op)
        for condition in op.conditions:
            self._key(condition.key)
        self._steps(op.then)
        if op.otherwise:
            self._steps(op.otherwise)

    def _prepare(self, op: Prepare) -> None:
        if not (op.conditions or op.then or op.otherwise):
            raise BadRequest("a prepare names at least one key.")
        self._transaction(op)

    def _steps(self, steps: list[TxnOp]) -> None:
        chars, value_bytes_max = self._key_chars, self._limits.value_bytes_max
        for step in steps:
            if step.ttl_ms or len(step.value) > value_bytes_max or not 0 < len(step.key) <= chars:
                self._step(step)

    def _step(self, step: TxnOp) -> None:
        self._key(step.key)
        if step.ttl_ms < 0:
            raise BadTtl(f"a ttl of {step.ttl_ms} ms is below 0.", ttl_s_max=self._limits.ttl_s_max)
        self._value(step.value, step.ttl_ms)

    def _attempt(self, op: Any) -> None:
        attempt: Attempt = op.attempt
        if not (0 <= attempt.stamp <= STAMP_MAX and 0 <= attempt.start <= STAMP_MAX):
            raise BadRequest("the stamp of an attempt is the time in microseconds.")
        if len(attempt.router) > _ROUTER_CHARS_MAX:
            raise BadRequest(f"the id of a router has at most {_ROUTER_CHARS_MAX} characters.")

    def _key(self, key: str) -> None:
        if not key:
            raise KeyEmpty()
        if len(key) <= self._key_chars:
            return
        bytes_max = self._limits.key_bytes_max
        if (size := len(key.encode())) > bytes_max:
            raise KeyTooLong(f"the key has {size} bytes; the limit is {bytes_max}.", key_bytes_max=bytes_max)

    def _value(self, value: bytes, ttl_ms: int) -> None:
        limits = self._limits
        if len(value) > limits.value_bytes_max:
            detail = f"the value has {len(value)} bytes; the limit is {limits.value_bytes_max}."
            raise ValueTooLarge(detail, bytes_max=limits.value_bytes_max)
        if ttl_ms > limits.ttl_s_max * 1000:
            raise BadTtl(f"a ttl is at most {limits.ttl_s_max} s.", ttl_s_max=limits.ttl_s_max)

    def _once(self, op: Any) -> None:
        once = op.once
        if once is not None and len(once.key if isinstance(once, IdempotencyKey) else once) > _ONCE_CHARS_MAX:
            raise BadRequest(f"an Idempotency-Key has at most {_ONCE_CHARS_MAX} characters.")

    def _release(self, op: Release) -> None:
        self._once(op)
        if op.withdraw is not None and len(op.withdraw) > _ONCE_CHARS_MAX:
            raise BadRequest(f"an Idempotency-Key has at most {_ONCE_CHARS_MAX} characters.")

    def _look(self, op: GetTxn) -> None:
        self._partition(op.partition)

    def _pull(self, op: Pull) -> None:
        for partition in op.partitions:
            self._partition(partition)

    def _partition(self, partition: int) -> None:
        if partition >= self._partitions:
            raise BadRequest(f"there is no partition {partition}: the cluster has {self._partitions}.")
