"""The controller's state in its store: read, watched, and changed by compare-and-swap only.

Owns: the encoding of `ClusterState`, and its conversion where the map in it is of an older format.
Promises: a change is decided on the state that it replaces, however many others are under way: the loser of the race
reads again and decides again. A change whose outcome cannot be told at first is looked up. Who has heard of an epoch
above the stored one has lost changes (its file is an old copy), and changes nothing. `first_look` returns once the
nodes could tell.
Leaves to others: what to change (`membership`, `placement.moves`), atomicity and durability (`map_store`).

`told_numbers` is what this process, the only controller, knows of the numbers that stores have told: what the store of
the map keeps, and what beats have brought since, which is kept when it may be needed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import msgspec

from kvstore import failpoints
from kvstore.controller.map_store.interface import MapStore, Told
from kvstore.controller.membership import ClusterState
from kvstore.errors import Conflict, ControllerBehind, ForeignData, Unavailable
from kvstore.placement.cluster_map import MAP_FORMAT, ClusterMap
from kvstore.placement.map_format import decode_map, format_of

CLOCK_STEP = 1 << 32  # above all that was told; of which a store gives less than a part in the seconds between
CLOCK_MAX = (1 << 53) - 2 * CLOCK_STEP  # versions stay below 2⁵³, whatever was told
_CLUSTERS_MAX = 64
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ClusterState).decode
_decode_parts = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NOTHING = b"null"


class Changed(NamedTuple):
    """The state as it was and as it is; the same one if nothing was to be changed."""

    before: ClusterState
    after: ClusterState


class ClusterDocument:
    """Every method may be called by any number of tasks at the same time."""

    def __init__(self, store: MapStore, tries_max: int) -> None:
        self._store = store
        self._tries_max = tries_max
        self._heard: dict[str, int] = {}
        self.first_look: Callable[[ClusterMap], Awaitable[None]] | None = None  # before a map is changed
        self.told_numbers: dict[str, int] = {}  # by store id, of those that were told or asked for
        self._beaten: dict[str, int] = {}  # by store id, what beats have brought beyond what is kept

    def hear(self, cluster_id: str, epoch: int) -> None:
        """A shard or router follows a map of that epoch."""
        if cluster_id in self._heard or len(self._heard) < _CLUSTERS_MAX:
            self._heard[cluster_id] = max(epoch, self._heard.get(cluster_id, 0))

    @property
    def heard_of_any(self) -> bool:
        """A shard or router follows a map."""
        return bool(self._heard)

    def heard(self, cluster_id: str) -> int:
        """The highest epoch of that cluster that was heard of."""
        return self._heard.get(cluster_id, 0)

    def behind(self, state: ClusterState) -> ControllerBehind | None:
        """Why nothing may be changed, if that is so."""
        heard = self.heard(state.map.cluster_id) if state.map is not None else 0
        if state.map is None or heard <= state.map.epoch or failpoints.planted("go-on-behind"):
            return None
        return ControllerBehind(
            f"this controller's map is that of epoch {state.map.epoch}, but nodes follow one of epoch {heard}: its "
            "file is an old copy.",
            epoch=state.map.epoch,
            heard=heard,
        )

    async def read(self) -> ClusterState:
        """The stored state. Raises Unavailable; ForeignData if it is no cluster map of this program."""
        return _decode_state((await self._store.read()).document)

    async def after(self, revision: int) -> tuple[int, ClusterState]:
        """The state and its revision as soon as that is above `revision`; raises as `read` does."""
        stored = await self._store.watch(revision)
        return stored.revision, _decode_state(stored.document)

    async def change(self, decide: Callable[[ClusterState], ClusterState], *, though_behind: bool = False) -> Changed:
        """Store what `decide` makes of the present state; it may be asked several times, and must be pure.

        Raises what `decide` raises, then nothing was changed; Unavailable if others always came first, or if the
        store cannot answer: then it may have been changed, and deciding again tells. ControllerBehind for a change of a
        map that is not the newest, unless `though_behind`.
        """
        for _ in range(self._tries_max):
            stored = await self._store.read()
            before = _decode_state(stored.document)
            after = decide(before)
            if after != before and not though_behind:
                await self.check_newest(before)
            if after == before or await self._swap(stored.revision, _encode(after)):
                return Changed(before, after)
        raise Unavailable(f"{self._tries_max} writes of the map lost their race.", retry_after_ms=1000)

    async def check_newest(self, state: ClusterState) -> None:
        """Raises ControllerBehind if nothing may be changed, since nodes follow a newer map than that of the state."""
        await self.look_first(state)
        if behind := self.behind(state):
            raise behind

    async def look_first(self, state: ClusterState) -> None:
        """Return once the nodes could tell which map they follow: then `behind` knows whether it is that state's."""
        if self.first_look is not None and state.map is not None:
            await self.first_look(state.map)

    async def convert(self) -> int | None:
        """Bring a map of an older format to the present one, in one swap.
        Returns the format that it had, if any.

        The old document is kept beside the new one first. To be called before anything else is read. Raises
        ForeignData for a format that is not known, Unavailable.
        """
        for _ in range(self._tries_max):
            stored = await self._store.read()
            older = _older_format(stored.document)
            if stored.document is None or older is None:
                return None
            state = _decode_state(stored.document)
            assert state.map is not None
            await self._store.keep(f"format{older}", stored.document)
            converted = msgspec.structs.replace(state.map, epoch=state.map.epoch + 1)
            if await self._swap(stored.revision, _encode(msgspec.structs.replace(state, map=converted))):
                return older
        raise Unavailable(f"{self._tries_max} writes of the map lost their race.", retry_after_ms=1000)

    async def tell(self, store_id: str, told: Told, copy_id: str = "") -> Told:
        """Keep what a store has told of its log; returns the highest that it has told.

        `copy_id`: of the copy that serves it, if that is told. Another one may be the primary by now, with which a
        person has gone on though it has less: then nothing is kept and nothing is answered, neither the number, by
        which the teller would take itself for an older copy, nor the floor, to which it would raise its clock. One that
        tells a version below that floor has files that a person has given up: that counts no more. Raises Conflict,
        Unavailable.
        """
        if copy_id and (primary := await self._primary_of(store_id)) not in (None, copy_id):
            raise Conflict(f"the primary of that store is copy {primary}, not {copy_id}.", retry_after_ms=1000)
        if told.number and told.version < (await self._store.tell(store_id, Told())).clock_floor:
            told = Told()
        return await self._keep(store_id, told)

    async def _primary_of(self, store_id: str) -> str | None:
        """The id of its primary's copy by the map; None if that has no such store."""
        shards = state.map.shards if (state := await self.read()).map is not None else []
        return next((shard.primary.copy_id for shard in shards if shard.store_id == store_id), None)

    async def _keep(self, store_id: str, told: Told) -> Told:
        kept = await self._store.tell(store_id, told)
        kept = kept._replace(number=max(kept.number, self._beaten.get(store_id, 0)))
        self.told_numbers[store_id] = kept.number
        return kept

    def note_committed(self, store_id: str, number: int) -> None:
        """A beat of the store's primary has told that number. To be kept when the primary falls silent."""
        if number > max(self._beaten.get(store_id, 0), self.told_numbers.get(store_id, 0)):
            self._beaten[store_id] = number
            if store_id in self.told_numbers:
                self.told_numbers[store_id] = number

    async def keep_committed(self, store_id: str) -> None:
        """Keep what beats have told of that store, if that is news. Raises Unavailable."""
        if number := self._beaten.get(store_id, 0):
            await self._keep(store_id, Told(number))
            if self._beaten.get(store_id) == number:
                del self._beaten[store_id]

    async def know_told(self, store_ids: Iterable[str]) -> None:
        """`told_numbers` has those stores from now on. Raises Unavailable."""
        for store_id in store_ids:
            if store_id not in self.told_numbers:
                await self.tell(store_id, Told())

    async def accept_old(self, store_id: str) -> Told:
        """The store may start with less than it has told, with versions above all that it gave.
        Returns what it told.

        Raises Unavailable.
        """
        told, state = await self._store.tell(store_id, Told()), await self.read()
        given = min(max(told.version, told.clock_floor, state.clock), CLOCK_MAX)
        forgotten = await self._store.forget(store_id, given + CLOCK_STEP)
        self.told_numbers[store_id] = 0
        beaten = self._beaten.pop(store_id, 0)
        return forgotten._replace(number=max(forgotten.number, beaten))

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
        parts = _decode_parts(document)
        encoded_map = _map_of(parts)
        state = _decode(_encode({name: part for name, part in parts.items() if name != "map"}))
        return state if encoded_map is None else msgspec.structs.replace(state, map=decode_map(encoded_map))
    except (msgspec.DecodeError, UnicodeDecodeError, ForeignData) as error:
        raise ForeignData(f"this version cannot read the controller's stored state: {error}.") from error


def _older_format(document: bytes | None) -> int | None:
    """The format of the map in the document, if it is an older one. Raises ForeignData."""
    try:
        encoded_map = _map_of(_decode_parts(document)) if document is not None else None
        found = format_of(encoded_map) if encoded_map is not None else MAP_FORMAT
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ForeignData(f"this version cannot read the controller's stored state: {error}.") from error
    return found if found != MAP_FORMAT else None


def _map_of(parts: dict[str, msgspec.Raw]) -> bytes | None:
    encoded = bytes(parts["map"]) if "map" in parts else _NOTHING
    return encoded if encoded != _NOTHING else None
