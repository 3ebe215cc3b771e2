"""The opening of a store that has copies: restart or promotion, the same steps.

Owns: whether a store may be opened, the asking of all copies in sync, which log is the truth, when the term may begin.
Promises: a store opens only under the id that the map names, in a term above all that it has promised. Every copy in
sync, the old primary included, has promised the term or is out by a map of that term, before the longest log of all is
taken for the truth; nothing that a copy in sync has is cut off.
Leaves to others: taking out what does not answer (`failover`), fetching (the shell), shipping to all (`shipping`).

    map names it in T -> promise T, durably -> hello to all in sync -> all told, or out -> fetch up to the longest
      -> append the record that opens T and carries that map -> every copy in sync has it -> serve

A crash anywhere here leaves T promised, so the next opening needs a new term from the controller.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvstore import failpoints
from kvstore.replication.configuration import Configuration, Replica, Request
from kvstore.replication.lease import Granted, may_be_promoted
from kvstore.replication.session import Forked, Session
from kvstore.storage.segments import Position

MayOpen = Literal["no", "not-primary", "wait", "stale", "yes"]


def may_open(config: Configuration, node: str, copy_id: str, promised: int, given: Granted, now: float) -> MayOpen:
    """Whether a node opens its copy of the store as the primary, by a map that it follows.

    `no`: another node is primary. `not-primary`: this node is named with another copy's id, so its folder is not the
    one that was meant. `stale`: the term is not above all that the copy has promised; ask for a new one. `wait`: what
    the copy granted has not run out yet.
    """
    if config.primary.node != node:
        return "no"
    if config.primary.copy_id != copy_id:
        return "not-primary"
    if config.term <= promised:
        return "stale"
    return "yes" if may_be_promoted(given, now) else "wait"


def starts_alone(logged: Configuration | None, node: str, copy_id: str, promised: int) -> bool:
    """Whether a store serves before it has heard the controller.
    The last map in its own log names no copy at all.

    A copy that is only joining counts, too: it may be in sync, and promoted, by a map that has not come here. A promise
    above the term of that map is one to another primary, which may have cut the maps off that named it.
    """
    if logged is None or promised > logged.term or logged.primary != (node, copy_id):
        return False
    return not logged.replicas or failpoints.planted("serve-alone")


class Opening(NamedTuple):
    """The opening in one term, once the own copy has promised it. `own`: the end of the own log, synced.

    `told`: the ends of the logs of those that have promised the term, by copy id.
    """

    config: Configuration
    start: str
    own: Position
    told: tuple[tuple[str, Position], ...] = ()


def hello_to(opening: Opening, copy: Replica) -> Session:
    """What is asked of a copy in sync; answering it is promising the term."""
    config = opening.config
    return Session(config.store_id, config.term, opening.start, copy.copy_id, copy.joined)


def asked(opening: Opening) -> tuple[Replica, ...]:
    """The copies that have to answer, or to be out, before the opening goes on."""
    told = {copy_id for copy_id, _ in opening.told}
    return tuple(copy for copy in opening.config.in_sync if copy.copy_id not in told)


def answered(opening: Opening, hello: Session, position: Position) -> Opening:
    """The state after a copy has promised the term and told the end of its log.
    Other answers are thrown away."""
    meant = any(hello == hello_to(opening, copy) for copy in opening.config.in_sync)
    if not meant:
        return opening
    others = tuple(each for each in opening.told if each[0] != hello.copy_id)
    return opening._replace(told=(*others, (hello.copy_id, position)))


def follow(opening: Opening, config: Configuration) -> Opening | None:
    """The state once a newer map is followed.
    None if the opening is over, because the term is not this one's any more.

    What a copy told that is out counts no more.
    """
    if config.epoch <= opening.config.epoch:
        return opening
    if config.term != opening.config.term:
        return None
    stay = {copy.copy_id for copy in config.in_sync}
    return opening._replace(config=config, told=tuple(each for each in opening.told if each[0] in stay))


class Truth(NamedTuple):
    """The end of the longest log, and the copy to fetch it from; None: it is the own one."""

    position: Position
    copy_id: str | None


def truth(opening: Opening) -> Truth | None:
    """The longest log of all copies in sync and the own one; None while one of them has not answered."""
    if asked(opening):
        return None
    best = Truth(opening.own, None)
    for copy_id, position in () if failpoints.planted("open-own-log") else opening.told:
        if (position.term, position.number) > (best.position.term, best.position.number):
            best = Truth(position, copy_id)
    return best


def fetched(opening: Opening, own: Position) -> Opening:
    """The state once the own log was extended, and synced, up to `own`.
    Raises Forked if records were lost by it."""
    if own.number < opening.own.number:
        raise Forked(f"the log ends with record {own.number}, and ended with {opening.own.number} before")
    return opening._replace(own=own)


def may_begin_term(opening: Opening) -> bool:
    """Whether the record that opens the term may be appended: the own log is the longest."""
    found = truth(opening)
    return found is not None and found.copy_id is None


def request_out(opening: Opening, copy: Replica) -> Request:
    """What the opening asks of the controller, in its term, about a copy that does not answer."""
    config = opening.config
    return Request("out", config.shard, config.term, config.primary.copy_id, copy.copy_id, copy.joined)
