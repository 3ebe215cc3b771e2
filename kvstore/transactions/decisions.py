"""Decisions: the one row that says whether an attempt is committed, and the rules of who may write it.

Owns: the decision and its form; what the anchor's store does with a prepare, a decide, an ask and a look.
Promises: pure functions of what lies in the rows; nothing rests on a time bound.
Leaves to others: rows and locks (`store.participant`), votes (`coordination`).

The first key that a transaction names is its anchor. The anchor's store alone decides: a row of outcome "committed"
is the commit point of the whole transaction; one of outcome "aborted" (a tombstone for the attempt) makes sure that
there never will be one. Both are rows of the anchor's partition and move with it.

This is two-phase commit (Gray, Notes on Data Base Operating Systems, 1978) with two changes.

The anchor's store is asked last (the "last agent" of Lindsay et al., Notes on Distributed Databases, 1979, and of
Gray and Reuter), and is not asked twice: when all others have voted it does its own part and decides in one batch,
without an intent of its own. That saves a message and a batch, and the anchor's keys are not locked for that time.

    router          anchor's store                        other stores
      ├─ prepare ─────────────────────────────────────────> intents, vote 9
      ├─ commit (vote 9) ──> "committed" at version 10,
      │                      its own keys written             ← the client is answered here
      └─ finish ──────────────────────────────────────────> applied at version 10

A router that dies between prepare and commit leaves intents behind. Any process that meets one that is too old asks the
anchor's store, which cannot know whether a commit is still under way. So it makes up its mind for good: it writes
"aborted", durably, *also when it has never heard of the attempt*, and only then says so. It does the same when it
refuses a commit (a lock, a lease, a condition of the disk): a doubled message must not commit later what the router
has given up. (Presumed abort, of Mohan, Lindsay and Obermarck, 1986, writes nothing for an abort, because there the
coordinator itself is asked; here it is gone, and its messages may still be on their way.)

Rows cannot be kept for ever. When one is dropped the store's floor rises to the attempt's stamp, durably. For an
attempt at or below the floor of which no row is left, nothing can be known: commits and asks are answered "gone". A
router that hears that of its commit says that the outcome is unknown; stores tell their floors along with all they
answer, so that stamps stay above them. The asking store drops the intent, which is safe, because a decision goes
only when no intent of its attempt is left with the owners of its keys: what is left then is a late duplicate's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvstore.model import Attempt, Read


class Decision(msgspec.Struct, omit_defaults=True):
    """The body of a decision's row, as JSON.

    `keys`: those of the transaction in other stores; `reads`: what the gets in this store found; `decided_ms`: Unix
    time, by which the deadlines of its values are reckoned.
    """

    outcome: Literal["committed", "aborted"]
    attempt: Attempt
    anchor: str
    keys: list[str] = []
    version: int = 0
    succeeded: bool = False
    decided_ms: int = 0
    reads: list[Read] = []

    def encode(self) -> bytes:
        """The row's body."""
        return msgspec.json.encode(self)


def decode_decision(body: bytes) -> Decision:
    """The decision of a row's body. Raises msgspec.DecodeError."""
    return msgspec.json.decode(body, type=Decision)


OnCommit = Literal["commit", "committed", "aborted", "gone"]
OnAsk = Literal["abort", "committed", "aborted", "gone"]


def on_commit(decision: Decision | None, stamp: int, floor: int, forgotten: bool = False) -> OnCommit:
    """What a commit does: commit now, if nothing else is in the way; or what it is answered.

    Looked at in the very batch that writes the decision. `forgotten`: see `openings.Openings.forgets`.
    """
    if decision is not None:
        return decision.outcome
    return "gone" if forgotten or stamp <= floor else "commit"


def on_ask(decision: Decision | None, stamp: int, floor: int, forgotten: bool = False) -> OnAsk:
    """What a ResolveTxn does: abort the attempt for good; or what it is answered.

    Looked at in the very batch that writes the decision.
    """
    if decision is not None:
        return decision.outcome
    return "gone" if forgotten or stamp <= floor else "abort"
