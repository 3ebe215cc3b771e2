"""The lease of a primary.
As long as it lasts, no other node has been promoted, so a primary may answer what it knows.

Owns: the grants that a primary holds, the grant that a copy has given, the margin between the two.
Promises: no answer that carries no record leaves a primary that may have been replaced. The copies that are waited for
grant it, not the controller, which may be away unnoticed.
Leaves to others: which copies are waited for (`shipping`), promotion (`opening`), the clock: CLOCK_BOOTTIME, which goes
on while the machine sleeps.

    primary   asks ──────────────┬─ holds the grant until `asked + lease_s` ─┐
    copy          └─ grants ─────┼───── takes no promotion until `granted + lease_s`, with the margin ─┐

The primary counts from when it asked, which is before the copy granted. Assumed: two clocks differ in speed by less
than 1 %. A paused virtual machine, whose clock stands still, is not covered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvstore import failpoints
from kvstore.replication.configuration import Configuration
from kvstore.replication.session import Following, Session, is_current

CLOCK_MARGIN = 1.05  # two clocks of 1 % each need 1.0203


class Grants(NamedTuple):
    """What a primary holds in one term: until when, by session. Once `given_back` it holds nothing more."""

    until: tuple[tuple[Session, float], ...] = ()
    given_back: bool = False

    def of(self, session: Session) -> float:
        """Until when that copy's grant lasts; minus infinity without one."""
        return next((until for each, until in self.until if each == session), float("-inf"))


def held(grants: Grants, session: Session, asked_at: float, lease_s: float) -> Grants:
    """The grants after the copy of that session has answered the beacon that was sent at `asked_at`.
    Those of its earlier sessions go."""
    until = max(grants.of(session), asked_at + lease_s)
    others = tuple(each for each in grants.until if each[0] != session and not _is_later(session, each[0]))
    return grants._replace(until=(*others, (session, until)))


def _is_later(session: Session, other: Session) -> bool:
    """Whether both are of one copy and primary, and the first began later."""
    is_same = session._replace(joined=other.joined, round=other.round) == other
    return is_same and (session.joined, session.round) > (other.joined, other.round)


def give_back(grants: Grants) -> Grants:
    """The grants once the lease is given back for a planned change: nothing more is answered in this term."""
    return grants if failpoints.planted("lease-kept") else Grants((), given_back=True)


def may_answer(grants: Grants, awaited: Iterable[Session], now: float) -> bool:
    """Whether the primary may answer what no record of its own carries.
    To be asked after the read, before the answer.

    `awaited` are the sessions of all copies that are waited for; without any no lease is needed.
    """
    return until(grants, awaited) > now


def until(grants: Grants, awaited: Iterable[Session]) -> float:
    """Until when the primary may answer, unless grants or sessions change: the earliest end of the grants it needs."""
    if grants.given_back:
        return float("-inf")
    if failpoints.planted("answer-without-lease"):
        return float("inf")
    return min(map(grants.of, awaited), default=float("inf"))


def beacon_every_s(lease_s: float) -> float:
    """The time between two beacons."""
    return lease_s / 8


def may_ask(needed_since: float | None, now: float, failover_after_s: float) -> bool:
    """Whether a primary may send beacons: not once it has needed the controller for that long in vain.

    Else a primary that is cut off from the controller, with one copy dead, would hold its shard for ever.
    """
    return needed_since is None or now - needed_since < failover_after_s


# --- the copy's side


class Granted(NamedTuple):
    """What a copy has granted: it takes no promotion before `until`."""

    until: float


def granted_at_start(
    logged: Configuration | None, copy_id: str, promised: int, now: float, lease_s: float, margin: float = CLOCK_MARGIN
) -> Granted:
    """The state of a copy that starts: what it granted before is forgotten, so it counts as having granted now.

    Two have granted nothing that still lasts, and a restart of a primary is quick by that: a copy that has never
    promised any term, and one whose log ends in a term that it opened itself, as the primary of the last map `logged`,
    if it has promised no higher one since. When it opened, what it had granted before had run out.
    """
    opened = logged is not None and (logged.primary.copy_id, logged.term) == (copy_id, promised)
    return Granted(now if opened or not promised else now + lease_s * margin)


def grants(following: Following, session: Session, sync_since: float | None, now: float, disk_stall_s: float) -> bool:
    """Whether a copy answers a beacon: in a session that has begun, and with a disk that answers.

    `sync_since` is when the sync that is under way began.
    """
    follows = is_current(following, session) or failpoints.planted("grant-after-promise")
    return follows and (sync_since is None or now - sync_since <= disk_stall_s)


def granted(given: Granted, now: float, lease_s: float, margin: float = CLOCK_MARGIN) -> Granted:
    """The copy's state once it has answered a beacon at `now`."""
    return Granted(max(given.until, now + lease_s * margin))


def returned(given: Granted, following: Following, session: Session, now: float) -> Granted:
    """The copy's state once the primary of that session said that it has given the lease back."""
    return Granted(min(given.until, now)) if is_current(following, session) else given


def may_be_promoted(given: Granted, now: float) -> bool:
    """Whether the copy's own grant has run out; other copies may promise a higher term at once."""
    return now >= given.until
