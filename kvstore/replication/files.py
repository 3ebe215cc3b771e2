"""Making and opening the files of a copy.

Owns: the order in which a copy's log, engine and identity come to be, and what is done with what a crash has left.
Promises: a copy has an id only once its log is durable and its engine is there, or the id says that a snapshot is to
fill them. A file that a snapshot was filling is used only to go on with that snapshot, and only where file and log fit
together: else such a copy opens with an empty log and an empty engine. Nothing is applied, since what is committed is
not known.
Leaves to others: what the copy does then (`copy`), recovery of the log (`storage.recovery`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from kvstore.environment import Environment
from kvstore.errors import KvError
from kvstore.placement.map_format import decode_map
from kvstore.replication.configuration import Configuration, configuration_of
from kvstore.replication.copy import StoreCopy
from kvstore.replication.places import Place, Times
from kvstore.replication.promise import Identity, write_identity
from kvstore.storage.engine import Applied, Engine
from kvstore.storage.log import Log
from kvstore.storage.record import newest_map
from kvstore.storage.segments import BEGINNING, Entry, indices_of, segment_path

log = logging.getLogger(__name__)

__all__ = ["Place", "Times", "make_copy", "open_copy"]


async def make_copy(
    place: Place, store_id: str, environment: Environment, times: Times, *, is_home: bool = False
) -> StoreCopy:
    """Make an empty copy of that store, with an id of its own. Raises ForeignData, OSError.

    `is_home`: on the home of its shard, where log and file without a map would be those of a store that serves. Its id
    says first that a snapshot is to fill them.
    """
    identity = Identity(store_id, environment.random_hex(16), filling=is_home)
    write = partial(write_identity, place.disk, place.folder, place.store, identity)
    log = await environment.in_thread(lambda: _new_log(place, store_id))
    if is_home:
        await environment.in_thread(write)
    engine = await place.renew()
    if not is_home:
        await environment.in_thread(write)
    return StoreCopy(place, identity, log, engine, None, environment, times)


async def open_copy(place: Place, identity: Identity, environment: Environment, times: Times) -> StoreCopy:
    """Open the copy of that identity, as `read_identity` gave it. Nothing is applied: what is committed is not known.

    Raises LogDamaged, ForeignData, DataCorrupt, OSError.
    """
    if identity.filling:
        if (found := await _half_filled(place, identity, environment)) is not None:
            log, engine, entries = found
            return StoreCopy(place, identity, log, engine, None, environment, times, unapplied=entries)
        log = await environment.in_thread(lambda: _emptied_log(place, identity.store_id))
        return StoreCopy(place, identity, log, await place.renew(), None, environment, times)
    engine = await place.open()
    try:
        log, entries = await environment.in_thread(lambda: _open_log(place, identity, engine.applied))
    except BaseException:
        await engine.close()
        raise
    logged = _logged(entries, engine.applied, identity)
    return StoreCopy(place, identity, log, engine, logged, environment, times, unapplied=entries)


async def _half_filled(
    place: Place, identity: Identity, environment: Environment
) -> tuple[Log, Engine, list[Entry]] | None:
    """Log, file and what that lacks, of a snapshot that broke off, if it can go on. Raises OSError."""
    try:
        engine = await place.open()
    except KvError as error:
        log.info("nothing of a snapshot is left: %s", error.detail)
        return None
    try:
        snapshot = engine.applied.snapshot
        if snapshot is not None and not (await engine.verify(None)).faults:
            records, entries = await environment.in_thread(lambda: _open_log(place, identity, engine.applied))
            return records, engine, entries
    except KvError as error:
        log.info("a snapshot cannot go on: %s", error.detail)
    except BaseException:
        await engine.close()
        raise
    await engine.close()
    return None


def _open_log(place: Place, identity: Identity, applied: Applied) -> tuple[Log, list[Entry]]:
    disk, folder, store = place.disk, place.folder, place.store
    return Log.open(disk, folder, store, identity.store_id, applied.position, 0, place.segment_bytes)


def _new_log(place: Place, store_id: str) -> Log:
    log = Log.create(place.disk, place.folder, place.store, store_id, BEGINNING, place.segment_bytes)
    place.disk.sync_folder(place.folder)
    return log


def _emptied_log(place: Place, store_id: str) -> Log:
    """A new log in place of one that a snapshot was to replace."""
    for index in indices_of(place.disk, place.folder, place.store):
        place.disk.unlink(segment_path(place.folder, place.store, index))
    return _new_log(place, store_id)


def _logged(entries: Sequence[Entry], applied: Applied, identity: Identity) -> Configuration | None:
    """What the last map in the log, or in the file, says of this store."""
    newest = newest_map(entries) or applied.cluster_map
    if newest is None:
        return None
    cluster_map = decode_map(newest)
    shard = next((shard for shard in cluster_map.shards if shard.store_id == identity.store_id), None)
    return None if shard is None else configuration_of(cluster_map, shard.id)
