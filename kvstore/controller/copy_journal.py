"""What is told of decisions about copies: log lines, counters, and failovers and rebuilds for the list of changes.

Owns: which failovers and damages are not over yet, and what was said already; in one controller process.
Promises: pure but for that memory and the log. A failover is over when its new primary serves, damage when another copy
in sync stands in its place.
Leaves to others: the decisions (`replicas`), writing changes down (`copy_keeper`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvstore.controller.changes import Change, Kind, done
from kvstore.controller.damage import DamageSeen
from kvstore.controller.heard import Heard
from kvstore.controller.replicas import Step
from kvstore.metrics import CopyStats
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.beats import Beat, CopyReport
from kvstore.replication.configuration import configuration_of, configurations

_log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """A change that no person asked for, and that is over now."""

    kind: Kind
    shard: str
    to: str
    took_s: float
    detail: str

    def as_change(self, change_id: str, now_ms: int) -> Change:
        """The change as it is kept, which has ended at `now_ms`, Unix time."""
        began_ms = now_ms - round(self.took_s * 1000)
        change = Change(id=change_id, kind=self.kind, shard=self.shard, to=self.to, began_ms=began_ms)
        return done(change, now_ms, self.detail)


class CopyJournal:
    """The memory of what was decided. `stats`: counted since the start of the process."""

    def __init__(self) -> None:
        self.stats = CopyStats()
        self._failovers: dict[str, Step] = {}  # whose new primary does not serve yet, by shard
        self._older_said: set[str] = set()  # shards that are not served since all that is here is too old
        self._damage = DamageSeen()

    def note(self, step: Step, epoch: int, now: float) -> None:
        """That was decided of a shard."""
        before, after = step.before, step.after
        shard, node = after.shard, after.primary.node
        if step.is_failover:
            self._failovers[shard] = step
            self.stats.failovers += 1
            _log.warning(
                "epoch %d: shard %s is %s's: its primary's node %s %s, for %.1f s",
                epoch, shard, node, before.primary.node, step.cause, now - step.since,
            )  # fmt: skip
        elif step.why == "planned":
            _log.info("epoch %d: shard %s is %s's, by a planned change", epoch, shard, node)
        elif step.why == "reopened":
            _log.info("epoch %d: shard %s has a new term", epoch, shard)
        else:
            if step.why == "out":
                self.stats.taken_out += 1
            copies = ", ".join(f"{copy.node} {copy.state}" for copy in after.replicas) or "none"
            _log.info("epoch %d: copies of shard %s beside %s's: %s (%s)", epoch, shard, node, copies, step.why)

    def note_damage(self, beat: Beat, cluster_map: ClusterMap, now: float) -> None:
        """Damage that a node tells of is said and counted once."""
        for found in self._damage.hear(configurations(cluster_map), beat, now):
            self.stats.damaged += 1
            _log.error("the copy of shard %s on node %s is damaged: %s", found.shard, found.node, found.detail)

    def note_older(self, older: Mapping[str, CopyReport], heard: Heard) -> None:
        """That a shard waits, since its copies that are here are old, is said once."""
        for shard in older.keys() - self._older_said:
            _log.error(
                "shard %s is not served: what is here of it ends with record %d, and record %d was committed, so these "
                "files are an older copy; start the node with the newer files, or put them back",
                shard, older[shard].number, heard.committed(older[shard].store_id),
            )  # fmt: skip
        self._older_said = set(older)

    def ended(self, cluster_map: ClusterMap, heard: Heard, now: float) -> Iterator[Ended]:
        """Failovers and rebuilds that are over; each is told of once."""
        yield from self._served(cluster_map, heard, now)
        yield from self._rebuilt(cluster_map, heard, now)

    def _served(self, cluster_map: ClusterMap, heard: Heard, now: float) -> Iterator[Ended]:
        for shard, step in list(self._failovers.items()):
            config = configuration_of(cluster_map, shard)
            if config is None or config.term != step.after.term:
                del self._failovers[shard]  # another one took over from it
                continue
            report = heard.report(config.primary.node, shard, config.primary.copy_id)
            if report is None or not report.serves or report.promised < config.term:
                continue
            del self._failovers[shard]
            took_s = now - step.since
            self.stats.last_failover_s = took_s
            old, new = step.before.primary.node, step.after.primary.node
            _log.warning("shard %s is served by %s again after %.1f s", shard, new, took_s)
            detail = f"Node {old} {step.cause}; node {new} took over and served after {took_s:.1f} s."
            yield Ended("failover", shard, new, took_s, detail)

    def _rebuilt(self, cluster_map: ClusterMap, heard: Heard, now: float) -> Iterator[Ended]:
        for found in self._damage.mended(configurations(cluster_map), heard):
            self.stats.rebuilt += 1
            took_s = now - found.since
            _log.warning("shard %s has a copy in sync on node %s again, after %.1f s", found.shard, found.node, took_s)
            detail = f"The copy on node {found.node} was damaged ({found.detail.rstrip('.')}), and was rebuilt."
            yield Ended("rebuild", found.shard, found.node, took_s, detail)
