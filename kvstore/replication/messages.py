"""The messages between a primary and one copy of its store: msgpack arrays, one to a frame.

Owns: the form of each, and their encoding.
Promises: a connection belongs to one session, which its first message names, so no other message has to.
Leaves to others: what they mean (`session`, `sender`, `serving`), sockets (shard).
"""

from __future__ import annotations

import msgspec

from kvstore.replication.session import Join, Session
from kvstore.storage.engine import CopiedRow, Digest, SnapshotProgress
from kvstore.storage.rows import Clock
from kvstore.storage.segments import Entry, Position


class _Message(msgspec.Struct, array_like=True, gc=False):
    pass


# --- from the primary


class Hello(_Message, tag=1):
    """The first message. Answered with `Told`, `Deposed` or `Foreign`."""

    session: Session


class Probe(_Message, tag=2):
    """Ask for the checksums of these records: `Checksums`."""

    numbers: list[int]


class Begin(_Message, tag=3):
    """Cut off what differs; computed from the position `told`. Answered with `Ack`, or not at all.

    `resumes`: a snapshot that broke off, as the copy has told of it, goes on, or the records behind it follow.
    """

    told: Position
    join: Join
    resumes: SnapshotProgress | None = None


class Records(_Message, tag=4):
    """Records that follow the log; those up to `committed` may be applied. Answered with `Ack`."""

    entries: list[Entry]
    committed: int


class Beacon(_Message, tag=5):
    """Ask for the lease, for `lease_s` seconds by the primary's settings. `number` comes back in `Granted`."""

    number: int
    committed: int
    lease_s: float = 0.0


class Returned(_Message, tag=6):
    """The lease is given back, for a planned change; not answered."""


class SnapshotBegins(_Message, tag=7):
    """What the primary's file stood for when it began to be read. Answered with `Taken`, as pages and end are."""

    at: Position
    clock: Clock
    cluster_map: bytes | None
    freezes: dict[str, frozenset[int]]
    drops: dict[int, int]


class SnapshotPage(_Message, tag=8):
    """Rows of the snapshot as of `at`. `progress`: how far it has come with them."""

    at: Position
    rows: list[CopiedRow]
    progress: SnapshotProgress | None = None


class SnapshotEnds(_Message, tag=9):
    """The snapshot has all its rows: the file is whole once the records up to `highest` are applied."""

    at: Position
    highest: int


class Fetch(_Message, tag=10):
    """For an opening: the records behind `after`, about that many bytes of them, as `Fetched`."""

    after: int
    bytes_max: int


class Compare(_Message, tag=11):
    """Ask for the digest of these partitions as of record `number`, which is committed: `Compared`, which has the same
    `asked`."""

    asked: int
    number: int
    partitions: list[int]


class Differs(_Message, tag=12):
    """That partition is not what it is at the primary, whose rows verify: the copy is to be rebuilt.
    Not answered.

    `untold`: nothing is known to differ, but the copy could not say for several rounds what it has.
    """

    number: int
    partition: int
    untold: bool = False


# --- from the copy


class Told(_Message, tag=20):
    """Where the copy's log ends, synced; see `copy.Told`. The session's term is promised, durably."""

    position: Position
    applied: int
    known: tuple[int, int]
    filling: bool
    snapshot: SnapshotProgress | None = None


class Deposed(_Message, tag=21):
    """The copy has promised that higher term, and the connection ends."""

    promised: int


class Foreign(_Message, tag=22):
    """The copy that was meant is not here, and the connection ends."""


class Checksums(_Message, tag=23):
    """By number, of those that the copy has."""

    of: dict[int, int]


class Ack(_Message, tag=24):
    """All records up to that number are on the copy's disk."""

    number: int


class Granted(_Message, tag=25):
    """The lease is granted, for the beacon of that number."""

    number: int


class Taken(_Message, tag=26):
    """Whether a part of a snapshot was taken; else it has to begin again, in another session.

    `is_busy`: clients are at work on the copy's node.
    """

    is_taken: bool
    is_busy: bool = False


class Fetched(_Message, tag=27):
    """Consecutive records; none if there are no more."""

    entries: list[Entry]


class Compared(_Message, tag=28):
    """The digest that was asked for; None: the copy is not at that record, and may be beyond it.

    `failed`: it could not bring its file there, or not read it.
    """

    asked: int
    digest: Digest | None
    failed: bool = False


_Snapshot = SnapshotBegins | SnapshotPage | SnapshotEnds
FromPrimary = Hello | Probe | Begin | Records | Beacon | Returned | _Snapshot | Fetch | Compare | Differs
FromCopy = Told | Deposed | Foreign | Checksums | Ack | Granted | Taken | Fetched | Compared

_encoder = msgspec.msgpack.Encoder()
_from_primary: msgspec.msgpack.Decoder[FromPrimary] = msgspec.msgpack.Decoder(FromPrimary)
_from_copy: msgspec.msgpack.Decoder[FromCopy] = msgspec.msgpack.Decoder(FromCopy)


def encode(message: FromPrimary | FromCopy) -> bytes:
    """The frame."""
    return _encoder.encode(message)


def decode_from_primary(frame: bytes) -> FromPrimary:
    """The message of that frame. Raises msgspec.DecodeError."""
    return _from_primary.decode(frame)


def decode_from_copy(frame: bytes) -> FromCopy:
    """The message of that frame. Raises msgspec.DecodeError."""
    return _from_copy.decode(frame)
