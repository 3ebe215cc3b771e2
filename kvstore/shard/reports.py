"""What the controller is told of a store on this node.

Owns: the report of a copy, and that of a store that is served.
Promises: what is told of a log is on disk.
Leaves to others: the form of a report (`replication.beats`), when it is sent (`beats`), damaged copies (`damaged`).
"""

from __future__ import annotations

from kvstore.replication.beats import CopyReport
from kvstore.replication.configuration import Configuration
from kvstore.replication.copy import StoreCopy
from kvstore.shard.hosted import HostedStore


def report_of_copy(
    shard_id: str, copy: StoreCopy, config: Configuration | None, node_id: str, is_opening: bool
) -> CopyReport:
    """Of a copy that is no primary. `config`: of the newest map; `is_opening`: it opens a term."""
    end = copy.log.synced
    may_open = copy.may_open(config, node_id) if config is not None else "no"
    return CopyReport(
        shard=shard_id,
        store_id=copy.identity.store_id,
        copy_id=copy.identity.copy_id,
        role="opening" if is_opening else "filling" if copy.is_filling else "copy",
        promised=copy.identity.promised,
        term=end.term,
        number=end.number,
        needs_term=may_open == "stale" and not is_opening,
        silent_s=copy.silent_s,
        examined=copy.is_examined,
    )


def report_of_store(shard_id: str, hosted: HostedStore, given_back: int) -> CopyReport:
    """Of a store that is served, or about to be. `given_back`: the term whose lease it has given back."""
    store = hosted.store
    sender, end = store.tables.sender, store.tables.log.synced
    serves = hosted.is_open and (sender is None or sender.serves)
    return CopyReport(
        shard=shard_id,
        store_id=store.identity.store_id,
        copy_id=store.copy_id,
        role="primary" if hosted.is_open else "opening",
        promised=sender.shipping.config.term if sender is not None else 0,
        term=end.term,
        number=end.number,
        serves=serves,
        committed=store.durable if serves else 0,
        given_back=given_back,
        examined=hosted.is_sound,
        damage=store.tables.verification.damage,
        disputed=len(store.replicas.comparison.disputed),
        behind=sender.shipping.behind if sender is not None else {},
        snapshots=sender.links.snapshots() if sender is not None else {},
    )
