"""What nodes tell of a shard's copies as of one moment: who serves, who joins, whose log ends where.

Owns: the reading of what was heard, copy by copy.
Promises: pure. A node that is silent tells nothing.
Leaves to others: what was heard, and who is silent (`heard`), where copies are to be (`copy_places`), what follows
(`replicas`).
"""

from __future__ import annotations

from kvstore.controller.heard import Heard
from kvstore.replication.beats import CopyReport
from kvstore.replication.configuration import Configuration, Primary, Replica


class CopiesHeard:
    """What nodes tell of copies as of `now`, in seconds of the clock of `heard`."""

    def __init__(self, heard: Heard, now: float) -> None:
        self._heard = heard
        self._now = now

    def report(self, node: str, shard: str, copy_id: str | None = None) -> CopyReport | None:
        """What the node tells of its copy, under that id if one is given.

        None of a node that is silent.
        """
        return self._heard.report(node, shard, copy_id) if self._heard.is_here(node, self._now) else None

    def serves(self, config: Configuration) -> bool:
        """Whether its primary answers, as far as its node says."""
        report = self.report(config.primary.node, config.shard, config.primary.copy_id)
        return report is not None and report.serves

    def complete(self, config: Configuration, copy: Replica) -> CopyReport | None:
        """What its node tells of a copy that was filled once, so that it could be gone on with.

        None of others.
        """
        report = self.report(copy.node, config.shard, copy.copy_id)
        return report if report is not None and report.role == "copy" and report.number else None

    def is_primary_silent(self, config: Configuration) -> bool:
        """Whether the primary was not heard for so long that it is replaced."""
        return self._heard.primary_silent_since(*config.primary, self._now) is not None

    def has_no_primary(self, config: Configuration) -> bool:
        """Whether nothing can serve it before another copy does.
        The primary is silent, or its node tells that its copy is damaged."""
        return self.is_primary_silent(config) or self._is_damaged(config.primary.node, config.shard)

    def in_sync_here(self, config: Configuration) -> list[str]:
        """The nodes that are heard and have a copy in sync.
        One of them takes over where there is no primary."""
        here = [copy for copy in config.in_sync if self._heard.is_here(copy.node, self._now)]
        whole = [copy for copy in here if not self._is_damaged(copy.node, config.shard)]
        there = [copy for copy in whole if not self._heard.lacks(copy.node, copy.copy_id, self._now)]
        return [copy.node for copy in there if not self.is_older(config, copy)]

    def _is_damaged(self, node: str, shard: str) -> bool:
        report = self.report(node, shard)
        return report is not None and report.role == "damaged"

    def is_older(self, config: Configuration, copy: Primary | Replica) -> bool:
        """Whether the copy ends below what was committed.
        If it is in sync, its node has an older copy of its files then."""
        report = self.report(copy.node, config.shard, copy.copy_id)
        return report is not None and self._is_below(report, config)

    def is_opened(self, config: Configuration) -> bool:
        """Whether its primary is about to serve it, with the longest log of all copies in sync."""
        report = self.report(config.primary.node, config.shard, config.primary.copy_id)
        return report is not None and report.role == "opening"

    def ends_early(self, config: Configuration) -> bool:
        """Whether neither its primary nor a copy in sync whose node is heard has all that was committed."""
        longest = self._longest(config)
        return longest is None or self._is_below(longest, config)

    def older(self, config: Configuration) -> CopyReport | None:
        """The report with the longest log, of a shard of which all that is here is too old.

        None of other shards, and while the primary may still serve; and until each node has told of its copy since the
        number that was committed is known: a primary that opens its term tells that by another call than its beats.
        """
        may_go_on = self.is_opened(config) or self.has_no_primary(config)
        if self.serves(config) or not may_go_on or not self._told_since(config):
            return None
        longest = self._longest(config)
        return longest if longest is not None and self._is_below(longest, config) else None

    def _told_since(self, config: Configuration) -> bool:
        """Whether all nodes with its primary's copy or one in sync, as far as they are heard, have told since."""
        since = self._heard.committed_since(config.store_id)
        nodes = [config.primary.node, *(copy.node for copy in config.in_sync)]
        return all(self._heard.told_at(node) > since for node in nodes if self._heard.is_here(node, self._now))

    def is_joining(self, config: Configuration) -> bool:
        """Whether a copy that is named, and whose node is here, is not in sync yet."""
        return any(
            copy.state == "joining"
            and (report := self.report(copy.node, config.shard, copy.copy_id)) is not None
            and report.role != "damaged"
            for copy in config.replicas
        )

    def _longest(self, config: Configuration) -> CopyReport | None:
        """Of its primary's copy and those in sync, as far as their nodes are heard.
        The one whose log ends last.

        Damaged ones do not count.
        """
        places: list[Primary | Replica] = [config.primary, *config.in_sync]
        reports = [self.report(each.node, config.shard, each.copy_id) for each in places]
        whole = [report for report in reports if report is not None and report.role != "damaged"]
        return max(whole, key=lambda report: report.number, default=None)

    def _is_below(self, report: CopyReport, config: Configuration) -> bool:
        return report.number < self._heard.committed(config.store_id)
