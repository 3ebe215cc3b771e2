"""What the controller is told of a store on this node.

Owns: the report of a copy, and that of a store that is served, or about to be.
Promises: what is told of a log is on disk.
Leaves to others: the form of a report (`replication.beats`), when it is sent (`beats`), damaged copies (`damaged`).
"""

from __future__ import annotations

from kvstore.replication.beats import CopyReport
from kvstore.replication.copy import StoreCopy
from kvstore.shard.followed_map import FollowedMap
from kvstore.shard.hosted import HostedStore
from kvstore.shard.local_store import LocalStore


def report_of(local: LocalStore, followed: FollowedMap, is_opening: bool) -> CopyReport | None:
    """Of what lies here; None while the files change hands. `is_opening`: a copy that opens a term."""
    if local.hosted is not None:
        return _of_store(local.hosted)
    if local.damaged is not None:
        return local.damaged.report()
    return _of_copy(local.files.copy, followed, is_opening) if local.files is not None else None


def _of_copy(copy: StoreCopy, followed: FollowedMap, is_opening: bool) -> CopyReport:
    end, config = copy.log.synced, followed.config
    may_open = copy.opening.may_open(config, followed.node_id) if config is not None else "no"
    return CopyReport(
        shard=followed.shard_id,
        store_id=copy.identity.store_id,
        copy_id=copy.identity.copy_id,
        role="opening" if is_opening else "filling" if copy.is_filling else "copy",
        promised=copy.identity.promised,
        term=end.term,
        number=end.number,
        needs_term=may_open == "stale" and not is_opening,
        silent_s=copy.lease.silent_s,
        examined=copy.own_engine.is_examined,
    )


def _of_store(hosted: HostedStore) -> CopyReport:
    store = hosted.store
    sender, end = store.tables.sender, store.tables.log.synced
    serves = hosted.is_open and (sender is None or sender.serves)
    return CopyReport(
        shard=hosted.shard_id,
        store_id=store.identity.store_id,
        copy_id=store.copy_id,
        role="primary" if hosted.is_open else "opening",
        promised=sender.shipping.config.term if sender is not None else 0,
        term=end.term,
        number=end.number,
        serves=serves,
        committed=store.durable if serves else 0,
        given_back=hosted.given_back,
        examined=hosted.is_sound,
        damage=store.tables.verification.damage,
        disputed=len(store.replicas.comparison.disputed),
        unproved=store.replicas.comparison.unproved,
        behind=sender.links.behind(sender.shipping) if sender is not None else {},
        snapshots=sender.links.snapshots() if sender is not None else {},
    )
