"""What a client is told while no primary answers for its keys, whatever call it was.

Owns: the sentence.
Promises: nothing was done when this is the answer.
Leaves to others: how long is waited before (`service`, `coordinator`, `all_shards`).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.errors import Unavailable

_RETRY_AFTER_MS = 500


def unserved(shard_ids: Iterable[str]) -> Unavailable:
    """One of these shards, or the only one, does not answer.
    It has no primary now, or a move has not ended."""
    names = sorted(set(shard_ids))
    who = f"shard {names[0]}" if len(names) == 1 else f"one of the shards {', '.join(names)}"
    return Unavailable(f"{who} does not answer for its keys now.", retry_after_ms=_RETRY_AFTER_MS)
