"""Changes as parts of the controller's state: each step of one together with what it does to the map.

Owns: taking a change down with its plan, committing its moves, cancelling, adopting moves of no known change, ending.
Promises: pure; the record of a change and the map are of one state, so no reader meets the one without the other, and
every move that stands belongs to a change that runs.
Leaves to others: what changes mean (`changes`), which members and moves there are (`membership`, `placement.moves`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from kvstore.controller import changes
from kvstore.controller.changes import Change, Pauses
from kvstore.controller.membership import ClusterState, formed_map
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.copies import copies_that_fit

Expect = Callable[[str, int], int | None]  # (source, partitions): about how many keys those have; None: unknown


def taken(before: ClusterState, after: ClusterState, change: Change, expect: Expect, ended_max: int) -> ClusterState:
    """The state `after`, to which `before` is led by the change, with the change in it.

    One that runs already goes on; one that overrules others ends them, and takes over those of their moves that stay.
    """
    known = [*before.changes]
    if changes.find(known, change.id) is None:
        known = changes.begun(known, change, _standing(before.map), change.began_ms)
    cluster_map = _owned(after.map, known, change.id)
    known = [_expecting(each, cluster_map, expect) if each.is_running else each for each in known]
    return msgspec.structs.replace(after, map=_stepped(before.map, cluster_map), changes=changes.kept(known, ended_max))


def cancelled(before: ClusterState, after: ClusterState, cancel: Change, ended_max: int) -> ClusterState:
    """The state `after` without moves; all changes that ran before are cancelled, by `cancel`."""
    running = sum(map(changes.is_cancellable, before.changes))
    known = changes.cancelled(before.changes, cancel.id, _standing(before.map), cancel.began_ms)
    detail = f"{running} change{'' if running == 1 else 's'} cancelled." if running else "There was nothing to cancel."
    ended = [*known, changes.done(cancel, cancel.began_ms, detail)]
    return msgspec.structs.replace(after, changes=changes.kept(ended, ended_max))


def noted(state: ClusterState, change: Change, ended_max: int) -> ClusterState:
    """With a change that was done at once and concerns no map."""
    return msgspec.structs.replace(state, changes=changes.kept([*state.changes, change], ended_max))


def committed(
    state: ClusterState, move_id: str, keys: int, size_bytes: int, pause_ms: float, ended_max: int
) -> ClusterState:
    """The move is done, and counted for its change. Raises KeyError if it does not stand, else as `moves` does."""
    cluster_map = formed_map(state)
    move = next((each for each in cluster_map.moves if each.id == move_id), None)
    after = moves.committed(cluster_map, move_id)
    assert move is not None
    known = [
        changes.with_commit(each, len(move.partitions), keys, size_bytes, pause_ms) if each.id == move.change else each
        for each in state.changes
    ]
    return msgspec.structs.replace(state, map=after, changes=changes.kept(known, ended_max))


def adopted(state: ClusterState, change: Change) -> ClusterState:
    """Moves that belong to no change that runs belong to this one: those that an earlier program had planned."""
    cluster_map = _owned(state.map, state.changes, change.id)
    if cluster_map == state.map:
        return state
    return msgspec.structs.replace(state, map=_stepped(state.map, cluster_map), changes=[*state.changes, change])


def ended(state: ClusterState, pauses: Mapping[str, Pauses], now_ms: int, ended_max: int) -> ClusterState:
    """These changes, by id, have nothing left to wait for: they are done, if their goal is still reached.

    Those that ended another way only keep the pauses.
    """
    known = []
    for change in state.changes:
        if (found := pauses.get(change.id)) is not None:
            change = changes.with_pauses(change, found)
            if change.is_running and changes.is_reached(change, formed_map(state), state.wanted):
                change = changes.done(change, now_ms, _reached(change, formed_map(state)))
        known.append(change)
    return msgspec.structs.replace(state, changes=changes.kept(known, ended_max))


def _reached(change: Change, cluster_map: ClusterMap) -> str:
    """What has come of it, where that is not just what was asked for; else empty."""
    if change.kind != "replicas" or change.replicas is None:
        return ""
    copies = 1 + copies_that_fit(cluster_map)
    found = f"Every key has {copies} {'copy' if copies == 1 else 'copies'}"
    if copies == change.replicas:
        return f"{found}."
    return (
        f"{found}, not {change.replicas}: there are only {copies} nodes for them. `kvstore shard add` adds one, which "
        "gets copies by itself."
    )


def _standing(cluster_map: ClusterMap | None) -> dict[str, int]:
    return changes.standing(cluster_map.moves) if cluster_map is not None else {}


def _owned(cluster_map: ClusterMap | None, known: list[Change], change_id: str) -> ClusterMap | None:
    """With the moves of no change that runs belonging to that one."""
    if cluster_map is None:
        return None
    running = {change.id for change in known if change.is_running}
    owned = [
        move if move.change in running else msgspec.structs.replace(move, change=change_id)
        for move in cluster_map.moves
    ]
    return cluster_map if owned == cluster_map.moves else msgspec.structs.replace(cluster_map, moves=owned)


def _stepped(before: ClusterMap | None, after: ClusterMap | None) -> ClusterMap | None:
    """The map, with an epoch of its own.
    Two maps of one epoch are equal, down to whose a move is."""
    if before is None or after is None or after == before or after.epoch > before.epoch:
        return after
    return msgspec.structs.replace(after, epoch=before.epoch + 1)


def _expecting(change: Change, cluster_map: ClusterMap | None, expect: Expect) -> Change:
    total: int | None = change.keys
    for move in cluster_map.moves if cluster_map is not None else []:
        if move.change == change.id and total is not None:
            keys = expect(move.source, len(move.partitions))
            total = total + keys if keys is not None else None
    return msgspec.structs.replace(change, keys_expected=total)
