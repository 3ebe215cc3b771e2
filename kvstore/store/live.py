"""What a store shows of its work at this moment: locks held, who waits for them, attempts that hold keys.

Owns: the form of these facts in the answer to `Stats`.
Promises: bounded: as many entries as are asked for, some waiters and keys of each. Reads copies only, so the thread
that commits is never held up, and nothing here is a promise: the next moment it may be different.
Leaves to others: the tables (`transactions.locks`, `transactions.intents`), who looks (`router.events`).
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from kvstore.model import txn_id
from kvstore.placement.ring import partition_of
from kvstore.transactions.intents import PreparedTxn, PreparedTxns
from kvstore.transactions.locks import Lease, LockTable

_LISTED_MAX = 1000  # of each, however many are asked for
_WAITERS_MAX = 8  # that are named, of each lock
_KEYS_MAX = 8  # that are named, of each attempt


def live_facts(
    locks: LockTable[Any, Any], holds: PreparedTxns, partitions: int, live_max: int, now_s: float
) -> dict[str, Any]:
    """At most `live_max` leases and as many attempts, and how many there are of each, as a JSON document.

    `now_s`: monotonic; times in the document are in seconds. May be called from any thread.
    """
    live_max = min(max(live_max, 0), _LISTED_MAX)
    leases = list(islice(locks.leases(), live_max))
    held = holds.all()
    return {
        "leases_count": locks.lease_count,
        "leases": [_lease(lease, locks.waiting_for_lease(lease.name), now_s) for lease in leases],
        "attempts_count": len(held),
        "intents": sum([len(hold.intents) for hold in held]),
        "attempts": [_attempt(hold, partitions, now_s) for hold in held[:live_max]],
    }


def _lease(lease: Lease, waiters: tuple[Any, ...], now_s: float) -> dict[str, Any]:
    return {
        "name": lease.name,
        "owner": lease.owner,
        "token": lease.token,
        "ttl": lease.ttl_s,
        "ttl_left": round(lease.left_s(now_s), 3),
        "waiting": len(waiters),
        "waiters": [op.owner for op, _ in waiters[:_WAITERS_MAX]],
    }


def _attempt(hold: PreparedTxn, partitions: int, now_s: float) -> dict[str, Any]:
    """`abandoned`: the connection by which it came has ended, so recovery asks what became of it."""
    keys = list(hold.intents)
    return {
        "id": txn_id(hold.attempt, partition_of(hold.anchor.encode(), partitions)),
        "anchor": hold.anchor,
        "keys": keys[:_KEYS_MAX],
        "keys_count": len(keys),
        "age_s": round(now_s - hold.since_s, 3),
        "abandoned": hold.closed,
    }
