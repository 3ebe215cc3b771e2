"""What all copies hold at the end of a run.
As many as there are to be, and the rows of their primaries.

Owns: when all copies are there, what each of them holds as of the last committed record, how they differ.
Promises: rows of the file and of records that are not applied yet count alike. Changes nothing.
Leaves to others: when that is looked at (`cluster_run`), what the rows should be (`loadtest.histories`).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.placement.cluster_map import Shard
from kvstore.shard.resident import Resident
from kvstore.storage.engine import Engine
from kvstore.storage.log import Log
from loadtest.simulate.held_rows import differences, held
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.view import View, good_copies


def is_replicated(view: View) -> bool:
    """Whether all copies are in sync, and have all that their primaries have."""
    return view.is_whole() and all(_is_even(view, shard) for shard in view.shards)


def check_copies(view: View) -> None:
    """All rows of each copy in sync, beside those of its primary. Raises Violation."""
    for shard in view.shards:
        (_, primary, log), *copies = list(_places(view, shard))
        number = log.last.number
        expected = held(primary, log, number)
        for node, engine, copied in copies:
            if wrong := differences(expected, held(engine, copied, number)):
                raise Violation(f"the copy of {shard.id} on {node} differs, as of record {number}: {wrong}")


def _is_even(view: View, shard: Shard) -> bool:
    primary = view.primary(shard.id)
    sender = primary.tables.sender if primary is not None else None
    committed = {sender.shipping.committed} if sender is not None else set()
    lasts = {log.last for _, _, log in _places(view, shard)}
    return len(lasts) == 1 and {last.number for last in lasts} | committed == {last.number for last in lasts}


def _places(view: View, shard: Shard) -> Iterator[tuple[str, Engine, Log]]:
    """Node, file and log of the primary, then of the copies in sync."""
    for node, _ in good_copies(shard):
        resident = view.resident(node, shard.id)
        if resident is not None and (found := _file_and_log(resident)) is not None:
            yield (node, *found)


def _file_and_log(resident: Resident) -> tuple[Engine, Log] | None:
    if resident.local.hosted is not None:
        tables = resident.local.hosted.store.tables
        return tables.engine, tables.log
    return (resident.local.copy.engine, resident.local.copy.log) if resident.local.copy is not None else None
