"""The controller's state in its store: read, watched, and changed by compare-and-swap only.

Owns: the encoding of `ClusterState`.
Promises: a change is decided on the state that it replaces, however many others are under way: whoever loses the race
reads again and decides anew. A change whose outcome cannot be told at first is looked up.
Leaves to others: what to change (`membership`, `placement.moves`), atomicity and durability (`store`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from kvstore.controller.membership import ClusterState
from kvstore.controller.store import MapStore, Told
from kvstore.errors import ForeignData, Unavailable

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ClusterState).decode


class Changed(NamedTuple):
    """The state as it was and as it is; the same one if nothing was to be changed."""

    before: ClusterState
    after: ClusterState


class ClusterDocument:
    """Every method may be called by any number of tasks at the same time."""

    def __init__(self, store: MapStore, tries_max: int) -> None:
        self._store = store
        self._tries_max = tries_max

    async def read(self) -> ClusterState:
        """Raises Unavailable, ForeignData if the stored document is none of ours."""
        return _decode_state((await self._store.read()).document)

    async def after(self, revision: int) -> tuple[int, ClusterState]:
        """The state and its revision as soon as that is above `revision`; raises as `read` does."""
        stored = await self._store.watch(revision)
        return stored.revision, _decode_state(stored.document)

    async def change(self, decide: Callable[[ClusterState], ClusterState]) -> Changed:
        """Store what `decide` makes of the present state; it may be asked several times, and must be pure.

        Raises what `decide` raises, then nothing was changed; Unavailable if others always came first, or if the
        store cannot answer: then it may have been changed, and deciding again tells.
        """
        for _ in range(self._tries_max):
            stored = await self._store.read()
            before = _decode_state(stored.document)
            after = decide(before)
            if after == before or await self._swap(stored.revision, _encode(after)):
                return Changed(before, after)
        raise Unavailable(f"{self._tries_max} writes of the map lost their race.", retry_after_ms=1000)

    async def tell(self, store_id: str, told: Told) -> Told:
        """Keep what a store has told of its log; returns the highest that it has told. Raises Unavailable."""
        return await self._store.tell(store_id, told)

    async def forget(self, store_id: str) -> Told:
        """The store may start with less than it has told; returns what it had. Raises Unavailable."""
        return await self._store.forget(store_id)

    async def _swap(self, revision: int, document: bytes) -> bool:
        try:
            return await self._store.compare_and_swap(revision, document) is not None
        except Unavailable:
            present = await self._store.read()
            if present.revision > revision:
                return present.document == document
            raise


def _decode_state(document: bytes | None) -> ClusterState:
    if document is None:
        return ClusterState()
    try:
        return _decode(document)
    except msgspec.DecodeError as error:
        raise ForeignData(f"this version cannot read the controller's stored state: {error}.") from error
