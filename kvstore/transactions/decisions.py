"""Decisions: the one row that says whether an attempt is committed, and the rules of who may write it.

Owns: the decision and its form; what the anchor's store does with a prepare, a decide, an ask and a look.
Promises: pure functions of what lies in the rows; nothing rests on a time bound.
Leaves to others: rows and locks (`storage.participant`), votes (`coordination`).

The first key that a transaction names is its anchor. The anchor's store alone decides: a row of outcome "committed"
is the commit point of the whole transaction; one of outcome "aborted" (a tombstone for the attempt) makes sure that
there never will be one. Both are rows of the anchor's partition and move with it.

    router          anchor's store                        another store
      ├─ prepare ──────> intent, vote 7
      ├─ prepare ─────────────────────────────────────────> intent, vote 9
      ├─ decide (vote 7, version 10) ─> "committed" + its own keys applied      ← the client is answered here
      └─ finish ──────────────────────────────────────────> applied

A router that dies between prepare and decide leaves intents behind. Whoever meets one that is too old asks the
anchor's store, which cannot know whether a decide is still under way. So it makes up its mind for good: it writes
"aborted" and drops the anchor's intent, in one batch, durably, *also when it has never heard of the attempt* (its
prepare may be under way, too), and only then says so.

A decide is valid only while the anchor's intent carries the very vote that it names: another vote is that of a
repeated prepare, which may have come after somebody wrote the key.

Rows cannot be kept for ever. When one is dropped the store's floor rises to the attempt's stamp, durably. For an
attempt at or below the floor of which no row is left, nothing can be known: a new anchor's intent is refused (the
router tries again, stamped above the floor), a decide finds no intent and is answered "gone", so is an ask. That is
safe, because a decision goes only when no intent of its attempt is left with the owners of its keys: what is left then
is a late duplicate's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvstore.protocol import Attempt


class Decision(msgspec.Struct, omit_defaults=True):
    """The body of a decision's row, as JSON. `keys`: all of the transaction; `decided_ms`: Unix time, by which the
    deadlines of its values are reckoned."""

    outcome: Literal["committed", "aborted"]
    attempt: Attempt
    anchor: str
    keys: list[str] = []
    version: int = 0
    succeeded: bool = False
    decided_ms: int = 0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def decode_decision(body: bytes) -> Decision:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(body, type=Decision)


def anchor_may_prepare(decision: Decision | None, has_intent: bool, stamp: int, floor: int) -> bool:
    """Looked at in the very batch that writes the anchor's intent."""
    return decision is None and (has_intent or stamp > floor)


OnDecide = Literal["commit", "committed", "aborted", "gone"]


def on_decide(decision: Decision | None, vote: int, named_vote: int, stamp: int, floor: int) -> OnDecide:
    """What a decide does: commit now, or what it is answered. `vote` is that of the anchor's intent, 0 without one."""
    if decision is not None:
        return decision.outcome
    if vote and vote == named_vote:
        return "commit"
    return "gone" if stamp <= floor else "aborted"


OnAsk = Literal["abort", "committed", "aborted", "gone"]


def on_ask(decision: Decision | None, has_intent: bool, stamp: int, floor: int) -> OnAsk:
    """What an ask does: abort the attempt for good, or what it is answered."""
    if decision is not None:
        return decision.outcome
    return "abort" if has_intent or stamp > floor else "gone"
