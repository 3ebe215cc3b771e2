"""Making a copied data directory a cluster of its own, while nothing runs on it.

Owns: the order: all is looked at first, then the new id is written down, the stores follow, the controller's document
comes last, and what was written down goes.
Promises: nothing is changed while a process has a file of it, or where a member's file is missing. After a crash the
same call goes on with the id that was written down.
Leaves to others: a store (`store.adoption`), who asks (the command line).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kvstore.config import ClusterConfig
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.sqlite import SqliteMapStore, open_sqlite
from kvstore.controller.membership import ClusterState, formed_map
from kvstore.environment import SYSTEM
from kvstore.errors import DataCorrupt, ForeignData
from kvstore.placement.cluster_map import ClusterMap
from kvstore.store.adoption import adopt_store, check_store, is_store, of_cluster

_TRIES_MAX = 3
_ID_BYTES = 16


class Begun(msgspec.Struct, frozen=True):
    """What is written down: the cluster of which the folder is a copy, and the one that it becomes."""

    copied_from: str
    cluster_id: str


class Adoption:
    """Open with `opened`; `cluster_map` is as it was copied, `begun` what it becomes."""

    def __init__(self, data_dir: Path, config: ClusterConfig, store: SqliteMapStore, cluster_map: ClusterMap) -> None:
        self.cluster_map = cluster_map
        self._data_dir = data_dir
        self._limits = config.limits
        self._store = store
        self._note = data_dir / "adopting.json"
        self.begun = self._read_note() or Begun(cluster_map.cluster_id, SYSTEM.random_hex(_ID_BYTES))

    def _read_note(self) -> Begun | None:
        try:
            return msgspec.json.decode(self._note.read_bytes(), type=Begun)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ForeignData(f"{self._note} cannot be read: it was not written by `kvstore cluster adopt`.") from None

    def check(self) -> None:
        """Look at all stores.

        Raises ForeignData where one is missing or another one, DataInUse, DataCorrupt, OSError.
        """
        if self._is_done:
            return
        for shard in self.cluster_map.shards:
            path = self._path(shard.id)
            if not is_store(path):
                raise ForeignData(
                    f"there is no file {path} of this program's format: a copy is adopted whole, so copy the files of "
                    f"shard {shard.id} here, too, or start the copy without it as another cluster."
                )
            try:
                check_store(path, shard.store_id, self.begun.cluster_id)
            except sqlite3.Error as error:
                raise DataCorrupt(f"{path} cannot be read: {error}.") from error

    @property
    def _is_done(self) -> bool:
        return self.cluster_map.cluster_id == self.begun.cluster_id

    async def run(self) -> None:
        """Do all of it. Raises what `check` raises, and what opening a store raises."""
        if self._is_done:
            self._note.unlink()
            return
        await SYSTEM.in_thread(self._write_note)
        cluster_id = self.begun.cluster_id
        for shard in self.cluster_map.shards:
            await adopt_store(self._path(shard.id), shard.store_id, cluster_id, self._limits)
            self._path(shard.id, "session").unlink(missing_ok=True)
        for sessions in self._data_dir.glob("controller-*.sessions"):
            sessions.unlink()
        document = ClusterDocument(self._store, _TRIES_MAX)
        await document.convert()
        await document.change(lambda state: _adopted(state, cluster_id))
        for shard in self.cluster_map.shards:
            await self._store.forget(shard.store_id)
        self._note.unlink()

    def _path(self, shard_id: str, suffix: str = "db") -> Path:
        return self._data_dir / f"shard-{shard_id}.{suffix}"

    def _write_note(self) -> None:
        """Durable before anything else changes."""
        new = self._note.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(self.begun))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._note)
        folder = os.open(self._data_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _adopted(state: ClusterState, cluster_id: str) -> ClusterState:
    return ClusterState(map=of_cluster(formed_map(state), cluster_id), clock=state.clock)


@asynccontextmanager
async def opened(data_dir: Path, config: ClusterConfig) -> AsyncIterator[Adoption]:
    """Hold the controller's file, so that nothing can start. Raises ForeignData, DataInUse, ConfigError, OSError."""
    path = data_dir / f"controller-{config.controllers[0].id}.db"
    if not path.is_file():
        raise ForeignData(f"there is no controller's file {path}: name the cluster.yaml of the copy with --config.")
    store = await open_sqlite(path)
    try:
        state = await ClusterDocument(store, _TRIES_MAX).read()
        if state.map is None:
            raise ForeignData(f"{path} has no cluster map: no cluster was formed there, so there is none to adopt.")
        adoption = Adoption(data_dir, config, store, state.map)
        adoption.check()
        yield adoption
    finally:
        await store.close()
