"""What a node tells the controller of its copies, and what the controller answers: `POST /v1/nodes/{id}/beat`.

Owns: the form of both, and how often a node tells.
Promises: pure data. Requests are those that stand when the beat is sent: one that is missing in the next beat is taken
back. An answer is no map: a node changes roles only by the map that it follows.
Leaves to others: what the controller makes of it (`failover`), what a node does when told to make or drop a copy.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvstore.placement.cluster_map import ClusterMap, Shard

Role = Literal["primary", "opening", "copy", "filling", "damaged"]


class Echo(msgspec.Struct, frozen=True, kw_only=True):
    """The last answer that a node has had: which controller process gave it, and the number of the beat."""

    start: str = ""
    beat: int = 0


class CopyReport(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a store on the node. `term` and `number`: the end of its log, which is on disk.

    `needs_term`: the map names it primary, in a term that is not above `promised`. `silent_s`: since it has heard its
    primary; a copy that has not heard it in its process's life counts from its start. `given_back`: the term whose
    lease it has given back for a planned change, 0 for none. `examined`: its file was found to be whole. `damage`: what
    is wrong with its files; a copy in the role `damaged` is nothing, and has no id if that is lost. `disputed`:
    partitions of a primary that are otherwise in all its copies; `unproved`: nodes of those of its copies in sync that
    did not tell for several comparisons what rows they have. Of a primary that serves: `committed`, the number of
    its last committed record; by copy id `behind`, how many records each copy lacks, or were not sent to one that a
    snapshot fills, and `snapshots`, the rows sent and the rows there are, of each snapshot that is under way.
    """

    shard: str
    store_id: str
    copy_id: str
    role: Role
    promised: int = 0
    term: int = 0
    number: int = 0
    serves: bool = False
    needs_term: bool = False
    silent_s: float = 0.0
    given_back: int = 0
    examined: bool = True
    damage: str = ""
    disputed: int = 0
    unproved: list[str] = []
    committed: int = 0
    behind: dict[str, int] = {}
    snapshots: dict[str, tuple[int, int]] = {}


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a configuration that a primary asks for, as `configuration.Request` has it."""

    kind: Literal["in-sync", "out"]
    shard: str
    term: int
    primary: str
    copy_id: str
    joined: int


class Beat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node tells. `start`: a random id of its process; `epoch`: of the map that it follows.

    `clock`: the highest version that any of its stores has given or seen. `stops`: its process was told to stop, and
    waits for a moment until others have taken over what it serves.
    """

    node: str
    start: str
    cluster_id: str
    epoch: int
    clock: int = 0
    stops: bool = False
    echo: Echo = Echo()
    copies: list[CopyReport] = []
    requests: list[Asked] = []


class Make(msgspec.Struct, frozen=True, kw_only=True):
    """Make an empty copy of that shard's store, and report its id.
    One that is there is left as it is."""

    shard: str
    store_id: str
    partitions: int


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """Set aside the copy of that id, which no map will name any more."""

    shard: str
    copy_id: str


class GiveBack(msgspec.Struct, frozen=True, kw_only=True):
    """Give back the lease of that term to the copy on that node.
    Once that has all records, so that it becomes the primary."""

    shard: str
    term: int
    to: str
    copy_id: str


class BeatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller answers. `start`: the id of its process; `beat`: the number to be echoed; `epoch`: its map's.

    `may_stop`: nothing is left of the node that others could take over, if it stops. `behind`: its record is an old
    copy, so it changes nothing, and grants no request.

    Orders are repeated in every answer until the node's reports or the map show that they were carried out.
    """

    start: str
    beat: int
    epoch: int
    may_stop: bool = False
    behind: bool = False
    make: list[Make] = []
    drop: list[Drop] = []
    give_back: list[GiveBack] = []


def beats(cluster_map: ClusterMap, keeps_copies: bool = False) -> bool:
    """Whether a node that follows this map beats.
    Not while every store has one copy, at home, and is to have one.

    `keeps_copies`: the node has files of stores of which it is not the primary, and waits to be told to drop them.
    """
    return keeps_copies or cluster_map.replicas > 1 or any(map(_needs_beats, cluster_map.shards))


def _needs_beats(shard: Shard) -> bool:
    """It has copies, or is to go home."""
    return bool(shard.replicas) or shard.primary.node != shard.id


def beat_every_s(failover_after_s: float) -> float:
    """How often a node beats; it does so at once when a role or a request changes."""
    return failover_after_s / 8
