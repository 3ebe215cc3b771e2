"""The controller's rules: who is dead, who takes over, and which change of a shard's configuration is granted.

Owns: every change of a `Configuration`, each made in the map of the next epoch by one compare-and-swap; the candidate
of a failover; damping; how many nodes may be silent before the controller holds still.
Promises: only a copy in sync is promoted, and the old primary stays in the set, as in sync, until it is taken out in
the new term. A request is granted only if the very copy that it names, in the very term, still stands.
Leaves to others: beats and reports (controller), where copies lie (`placement`), the opening on the node (`opening`).

Nothing here is trusted to be in time: two controllers that both decide, or one that decides from old reports, change
the same document by compare-and-swap, and every node acts on a map that it follows, never on a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from kvstore import failpoints
from kvstore.replication.beats import beat_every_s
from kvstore.replication.configuration import Configuration, Primary, Replica, Request

# --- changes of the configuration: each returns the one of the map `epoch`, or None if nothing is to change


def named(config: Configuration, node: str, copy_id: str, epoch: int) -> Configuration | None:
    """With a copy on that node, joining; one that lay there under another id is out by that.
    None: it is there."""
    there = config.copy_on(node)
    if node == config.primary.node or (there is not None and there.copy_id == copy_id):
        return None
    copy = Replica(node, copy_id, "joining", epoch)
    if there is None:
        return config._replace(epoch=epoch, replicas=(*config.replicas, copy))
    return _with_copy(config, there, copy, epoch)


def dropped(config: Configuration, node: str, epoch: int) -> Configuration | None:
    """Without the copy on that node."""
    there = config.copy_on(node)
    return None if there is None else _without(config, there, epoch)


def in_sync(config: Configuration, request: Request, epoch: int) -> Configuration | None:
    """With the copy that the request names counted as in sync.
    None if what it names does not stand any more."""
    copy = _meant(config, request)
    if request.kind != "in-sync" or copy is None or copy.state == "in-sync":
        return None
    return _with_copy(config, copy, copy._replace(state="in-sync"), epoch)


def taken_out(config: Configuration, request: Request, epoch: int) -> Configuration | None:
    """With the copy that the request names out: it joins again, under the new joining number.

    A copy that is only joining is taken out, too: its primary waits for it already, or would not ask.
    """
    copy = _meant(config, request)
    if request.kind != "out" or copy is None:
        return None
    return _with_copy(config, copy, copy._replace(state="joining", joined=epoch), epoch)


def reopened(config: Configuration, node: str, copy_id: str, epoch: int) -> Configuration | None:
    """With a new term for the same primary, which has announced itself with that copy's id and opens its store.

    None if it is not the primary, or another copy's id is the primary's: then an in-sync copy is to be promoted.
    """
    return config._replace(epoch=epoch, term=epoch) if config.primary == (node, copy_id) else None


def promoted(config: Configuration, node: str, copy_id: str, epoch: int) -> Configuration | None:
    """With that copy as the primary of a new term; None unless it is in sync under that id.

    The old primary stays in the set as in sync, since it has all that was acknowledged: otherwise one lost disk of two
    would lose the shard. If it does not answer the opening, it is taken out in the new term.
    """
    copy = config.copy_on(node)
    if copy is None or copy.copy_id != copy_id or not _may_take_over(copy):
        return None
    old = Replica(*config.primary, "in-sync", epoch)
    copies = tuple(old if each == copy else each for each in config.replicas)
    return config._replace(epoch=epoch, term=epoch, primary=Primary(node, copy_id), replicas=copies)


def _may_take_over(copy: Replica) -> bool:
    return copy.state == "in-sync" or failpoints.planted("promote-not-in-sync")


def promoted_with_loss(
    config: Configuration, node: str, copy_id: str, epoch: int, *, is_older: bool = False
) -> Configuration | None:
    """With that copy, which is not in sync, as the primary of a new term, and all others joining again.

    What it lacks is lost, since nothing that the others have more is fetched. Only a person may ask for it. None unless
    it is such a copy. `is_older`: it counts as in sync, and is known to lack what was committed.
    """
    copy = config.copy_on(node)
    if copy is None or copy.copy_id != copy_id or (copy.state == "in-sync" and not is_older):
        return None
    others = [each for each in config.replicas if each != copy]
    ids = [config.primary, *(Primary(each.node, each.copy_id) for each in others)]
    copies = tuple(Replica(each.node, each.copy_id, "joining", epoch) for each in ids)
    return config._replace(epoch=epoch, term=epoch, primary=Primary(node, copy_id), replicas=copies)


def _meant(config: Configuration, request: Request) -> Replica | None:
    """The copy that a request is about, if shard, term, primary, copy id and joining number are still those."""
    asked_by = (config.shard, config.term, config.primary.copy_id)
    if (request.shard, request.term, request.primary) != asked_by:
        return None
    ids = (request.copy_id, request.joined)
    return next((copy for copy in config.replicas if (copy.copy_id, copy.joined) == ids), None)


def _with_copy(config: Configuration, old: Replica, new: Replica, epoch: int) -> Configuration:
    return config._replace(epoch=epoch, replicas=tuple(new if each == old else each for each in config.replicas))


def _without(config: Configuration, old: Replica, epoch: int) -> Configuration:
    return config._replace(epoch=epoch, replicas=tuple(each for each in config.replicas if each != old))


# --- who is dead, and who takes over

_LIVING_BEATS = 2  # a report is living while it is at most so many beat intervals old: the next one may be late


class Report(NamedTuple):
    """What a node told last of its copy of a shard.
    `at`: when it came, by the controller's clock; `silent_s`: for how long the copy had not heard its primary;
    `term` and `number`: the end of its log."""

    node: str
    copy_id: str
    at: float
    silent_s: float
    term: int
    number: int


def is_echo(echoed: tuple[str, int], start: str, beat: int, beats_max: int) -> bool:
    """Whether a node hears this controller: it echoes the id of its start, and one of its last answers.

    `beat`: the number of the last one; `beats_max`: how many before that count, too. A link that works one way only
    would otherwise leave a shard unserved, with no node held for dead.
    """
    return echoed[0] == start and beat - beats_max <= echoed[1] <= beat


def silent(heard_at: float | None, started_at: float, now: float, failover_after_s: float) -> bool:
    """Whether a node is silent. Counted from the controller's own start or election, not from before it."""
    return now - max(started_at, started_at if heard_at is None else heard_at) >= failover_after_s


def candidate(
    config: Configuration,
    reports: Iterable[Report],
    silent_since: float,
    now: float,
    failover_after_s: float,
    committed: int = 0,
) -> Report | None:
    """The copy in sync with the highest position that takes over from a silent primary; None if none may.

    Each must itself have reported, under the id of the map, since the primary fell silent and within the last two beat
    intervals, that it has not heard the primary for that time either. The time since the report does not count: a
    controller that is cut off knows nothing of it, and promotes no copy. So a failover waits for the first beat of the
    copy by which it has been silent for long enough, one beat interval at most. `committed`: the number of a record
    that is known to be committed; what ends below it is older.
    """
    living_s = _LIVING_BEATS * beat_every_s(failover_after_s)
    may = [
        report
        for report in _of_living(config, reports, now, failover_after_s)
        if report.at >= silent_since and now - report.at <= living_s and report.silent_s >= failover_after_s
    ]
    return _longest(may, committed)


def successor(
    config: Configuration, reports: Iterable[Report], now: float, failover_after_s: float, committed: int = 0
) -> Report | None:
    """The copy that takes over from a primary whose own node has told that it is damaged.
    The one in sync with the highest position; None if none is heard. It needs no silence: no process serves the
    damaged copy any more."""
    return _longest(_of_living(config, reports, now, failover_after_s), committed)


def _of_living(
    config: Configuration, reports: Iterable[Report], now: float, failover_after_s: float
) -> Iterator[Report]:
    """Those of copies in sync whose node is not held for dead."""
    for report in reports:
        copy = config.copy_on(report.node)
        is_meant = copy is not None and copy.copy_id == report.copy_id and _may_take_over(copy)
        if is_meant and now - report.at < failover_after_s:
            yield report


def _longest(reports: Iterable[Report], committed: int) -> Report | None:
    """The longest log of those that have all that is known to be committed.
    A copy in sync has it, an old one not."""
    whole = (report for report in reports if report.number >= committed)
    return max(whole, key=lambda report: (report.term, report.number, report.node), default=None)


class Damping(NamedTuple):
    """How soon a shard may fail over again: the pause doubles with each one that follows soon on another."""

    last_at: float = float("-inf")
    pause_s: float = 0.0


def may_fail_over(damping: Damping, now: float) -> bool:
    """Whether the pause behind the last failover is over; `now` in seconds, by the clock of `last_at`."""
    return now - damping.last_at >= damping.pause_s


def failed_over(damping: Damping, now: float, failover_after_s: float, pause_max_s: float) -> Damping:
    """The damping after a failover at `now`; after quiet for twice the longest pause it begins again."""
    if now - damping.last_at >= 2 * pause_max_s:
        return Damping(now, failover_after_s)
    return Damping(now, min(pause_max_s, max(failover_after_s, 2 * damping.pause_s)))


class Standing(NamedTuple):
    """A node, as the controller counts it. `host` is None where hosts are not named."""

    node: str
    host: str | None
    silent: bool
    given_up: bool = False


def too_many_silent(nodes: Iterable[Standing], replicas: int) -> bool:
    """Whether more nodes are silent at once than may be: then nothing moves, and no shard leaves by itself.

    The nodes of one host count as one. Promotions and takings-out go on all the same.
    """
    groups: dict[tuple[str, str], bool] = {}
    for node in nodes:
        if not node.given_up:
            key = ("node", node.node) if node.host is None else ("host", node.host)
            groups[key] = groups.get(key, False) or node.silent
    if failpoints.planted("give-up-too-many"):
        return False
    return sum(groups.values()) > max(replicas - 1, -(-len(groups) // 2) - 1)


def may_give_up(
    node: str, silent_for_s: float, configs: Iterable[Configuration], home: Mapping[str, str], down_out_s: float
) -> bool:
    """Whether a dead node is given up: it was silent for `down_out_s` (0: never), and no shard dies with it.

    `home` is the home node of each shard. A shard that the node is the primary or home of needs a copy in sync, or its
    primary, elsewhere.
    """
    if not down_out_s or silent_for_s < down_out_s:
        return False
    for config in configs:
        elsewhere = [copy for copy in config.in_sync if copy.node != node]
        if config.primary.node == node and not elsewhere:
            return False
        if home.get(config.shard) == node and config.primary.node == node:
            return False  # it is promoted elsewhere first
    return True


def goes_home(config: Configuration, home: str, in_sync_since: float | None, now: float, settled_s: float) -> bool:
    """Whether the shard's primary goes back to its home by a planned change.
    The home's copy is in sync for a while."""
    copy = config.copy_on(home)
    if copy is None or copy.state != "in-sync" or in_sync_since is None:
        return False
    return now - in_sync_since >= settled_s


class Change(NamedTuple):
    """A planned change of primary under way: asked of the primary of `term`, for the copy in sync on `to`."""

    shard: str
    term: int
    to: str
    copy_id: str


def plan_change(config: Configuration, to: str) -> Change | None:
    """The planned change to the copy on that node; None unless it is in sync."""
    copy = config.copy_on(to)
    if copy is None or copy.state != "in-sync":
        return None
    return Change(config.shard, config.term, to, copy.copy_id)


def changed(config: Configuration, change: Change, given_back: int, epoch: int) -> Configuration | None:
    """With the change made, once the primary of term `given_back` has given back its lease; None if it is over."""
    if not config.term == change.term == given_back or config.shard != change.shard:
        return None
    return promoted(config, change.to, change.copy_id, epoch)


def hears_sender(request_at: float, sender_heard_at: float, now: float, failover_after_s: float) -> bool:
    """Whether a request to take a copy out still holds.
    Its sender has been heard since it came, and not long ago."""
    return sender_heard_at >= request_at and now - sender_heard_at < failover_after_s
