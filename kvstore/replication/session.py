"""The session between a primary and one copy: what the copy takes, tells, applies and throws away.

Owns: the identity of a session, the copy's side of it, the comparison of two chains.
Promises: before both chains are compared a copy takes, acknowledges and applies nothing; what names another session is
thrown away, however late or often it comes. A copy follows the term that it has promised, durably, and no other.
Leaves to others: the promise's file (`promise`), the primary's side (`shipping`), leases (`lease`), log and file.

    primary                        copy
      | Hello(session) ------------->|  a higher term is promised first, durably; the log is synced
      |<------------ Told(position)  |
      | compares the two chains      |
      | Begin(told, common) -------->|  cuts its log back to the common number; the session begins
      |<------------------ Ack(n)    |  only now the primary knows that the cut was made
      | record, committed ---------->|  appends, syncs, acknowledges
      |                              |  applies up to the committed number, never beyond

A Begin names the position that it was computed from. A late or doubled one would otherwise cut off what the copy has
taken, and acknowledged, since; a log that was cut never comes back to the position that it had. Each connection is a
session of its own, by its round: a copy that had to begin with an empty log must not be credited with what it
acknowledged before.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvstore import failpoints
from kvstore.storage.engine import SnapshotProgress
from kvstore.storage.segments import Position


class Session(NamedTuple):
    """`start`: a random id that the primary draws when it opens the store; `joined`: the copy's joining number;
    `round`: how often this primary has greeted that copy."""

    store_id: str
    term: int
    start: str
    copy_id: str
    joined: int
    round: int = 0


class Following(NamedTuple):
    """A copy's side. `promised` is durable, all else is lost with the process; `session` is the one that has begun."""

    store_id: str
    copy_id: str
    promised: int = 0
    session: Session | None = None
    committed: int = 0


HelloAnswer = Literal["foreign", "deposed", "promise", "tell"]


def on_hello(following: Following, hello: Session) -> HelloAnswer:
    """What a copy does with a primary's hello.

    `foreign`: it is meant for another store or copy. `deposed`: a higher term is promised; the sender is told so.
    `promise`: make the term durable as `promised`, then ask again. `tell`: tell the position of the log.
    """
    if (hello.store_id, hello.copy_id) != (following.store_id, following.copy_id):
        return "foreign"
    if _is_below(hello.term, following.promised):
        return "deposed"
    return "promise" if hello.term != following.promised else "tell"


def promise(following: Following, term: int) -> Following:
    """The state once `term` is durable as the promise: no session of an older term goes on."""
    if term == following.promised or _is_below(term, following.promised):
        return following
    session = following.session if failpoints.planted("old-term-taken") else None
    return following._replace(promised=term, session=session, committed=0)


def _is_below(term: int, promised: int) -> bool:
    return term < promised and not failpoints.planted("promise-forgotten")


def position_to_tell(last: Position, synced: Position) -> Position | None:
    """The position that may be told; None while the log's end is not synced: sync first, then tell."""
    return last if synced == last else None


def begins(following: Following, session: Session, told: Position, last: Position) -> bool:
    """Whether a Begin is taken.
    For this copy, in the promised term, computed from the log as it is now, and no older than the session that has
    begun."""
    now = following.session
    is_late = now is not None and now._replace(round=session.round) == session and now.round >= session.round
    return on_hello(following, session) == "tell" and told == last and not is_late


def begun(following: Following, session: Session) -> Following:
    """The state once the log is cut back, durably, to the common number."""
    return following._replace(session=session, committed=0)


def is_current(following: Following, session: Session) -> bool:
    """Whether what names this session concerns the copy: the session has begun, in the term that it has promised."""
    in_term = following.promised == session.term or failpoints.planted("old-term-taken")
    return in_term and following.session == session


def takes(following: Following, session: Session, number: int, previous: int, last: Position) -> bool:
    """Whether the record `number`, behind one with checksum `previous`, is appended to a log that ends with `last`."""
    return is_current(following, session) and (number, previous) == (last.number + 1, last.checksum)


def takes_snapshot(following: Following, session: Session, at: Position, last: Position) -> bool:
    """Whether a snapshot of the state at that position replaces file and log.
    Only where it is ahead of the log."""
    return is_current(following, session) and at.number > last.number


def acknowledged(following: Following, session: Session, synced: int) -> int | None:
    """The number that the copy acknowledges; None if it must not."""
    return synced if is_current(following, session) else None


def learn_committed(following: Following, session: Session, number: int, last: int) -> Following:
    """The state after a committed number came along. Never beyond the log, never back, never of another session."""
    if not is_current(following, session):
        return following
    return following._replace(committed=max(following.committed, min(number, last)))


def may_apply(following: Following) -> int:
    """The number up to which records may be applied to the file."""
    return following.committed


# --- comparing two chains


class Comparison(NamedTuple):
    """Where two logs part. They agree at `agreed`, if any number does, and differ, or one ends, before `differs`."""

    agreed: int | None
    floor: int
    differs: int

    @property
    def done(self) -> bool:
        """Whether `agreed` is the last number at which both agree; None: at no number that both keep."""
        return self.differs <= (self.floor if self.agreed is None else self.agreed + 1)


def compare(ours: tuple[int, int], theirs: tuple[int, int]) -> Comparison:
    """Begin to compare two logs, each given as (first number, last number) of those whose checksum it knows.

    Two empty logs agree at number 0, which every log knows as long as nothing was released from it.
    """
    floor = max(ours[0], theirs[0])
    return Comparison(None, floor, max(floor, min(ours[1], theirs[1]) + 1))


def probes(comparison: Comparison, count: int) -> list[int]:
    """The numbers to compare next, ascending: the highest that is open, and others evenly below it."""
    begin = comparison.floor if comparison.agreed is None else comparison.agreed + 1
    open_ones = comparison.differs - begin
    if open_ones <= count:
        return list(range(begin, comparison.differs))
    return [comparison.differs - 1 - (count - 1 - i) * open_ones // count for i in range(count)]


def compared(comparison: Comparison, ours: dict[int, int], theirs: dict[int, int]) -> Comparison:
    """The comparison after the checksums of some numbers, by number, are known of both logs."""
    equal = [number for number, checksum in ours.items() if theirs.get(number) == checksum]
    parted = [number for number in ours if number in theirs and theirs[number] != ours[number]]
    agreed = max(equal, default=comparison.agreed)
    if agreed is not None and comparison.agreed is not None:
        agreed = max(agreed, comparison.agreed)
    return comparison._replace(agreed=agreed, differs=min([comparison.differs, *parted]))


class Join(NamedTuple):
    """How a copy gets what it lacks: records behind `common`, or a snapshot, which begins with an empty log."""

    common: int
    snapshot: bool


def goes_on(
    snapshot: SnapshotProgress | None, ours: dict[int, int], applied: int, first_kept: int
) -> SnapshotProgress | None:
    """The snapshot that broke off, if it goes on from this primary, whose file has applied up to `applied`.

    Its pages are of several moments, and perhaps of several primaries. They fit together if the records from its
    beginning on follow, so those must be kept, and if all that the pages show is in this primary's chain: `ours` are
    some of its checksums, by number.
    """
    if snapshot is None or ours.get(snapshot.seen.number) != snapshot.seen.checksum:
        return None
    is_kept = snapshot.at.number + 1 >= first_kept
    return snapshot if is_kept and applied >= snapshot.seen.number else None


class Forked(Exception):
    """A copy that is waited for has records that the primary lacks.
    Nothing of it is cut off, and the session ends."""


class FellBehind(Exception):
    """A copy that is waited for lacks records that the primary keeps no more.
    It has to be taken out and join again."""


def how_to_join(common: int | None, told: int, applied: int, *, awaited: bool, first_kept: int) -> Join:
    """What the primary offers a copy whose log ends with number `told` and whose file has applied up to `applied`.

    `common` is the last number at which both logs agree, None if no number does; `first_kept` the first record that the
    primary can still send. A snapshot begins with an empty log, so a copy that is waited for, all of whose records
    count, never gets one. Raises Forked, FellBehind.
    """
    if awaited and common is not None and common != told:
        raise Forked(f"record {told} of a copy that is waited for is not the primary's")
    if common is None or applied > common or common + 1 < first_kept:
        if awaited:
            raise FellBehind(f"a copy that is waited for lacks the records from {told + 1} to {first_kept - 1}")
        return Join(0, snapshot=True)
    return Join(common, snapshot=False)
