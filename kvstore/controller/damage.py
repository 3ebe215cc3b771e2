"""Which copies are damaged, from the first word of it until another copy in sync stands in the same place.

Owns: the memory of them, in one controller process; what is written down of one that was rebuilt.
Promises: pure but for that memory. A copy that came in sync again was told of once; one that got another place, or
whose shard has left, is forgotten. Every beat is listened to: the next one may tell of the empty copy that has taken
the place of the damaged one.
Leaves to others: what was heard (`heard`), what follows (`replicas`), writing it down (`copy_keeper`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.controller.heard import Heard
from kvstore.replication.beats import Beat, CopyReport, Role
from kvstore.replication.configuration import Configuration

_WHOLE: tuple[Role, ...] = ("primary", "opening", "copy")


class Damaged(NamedTuple):
    """`copy_id`: by the map. `since`: when the node told of it first."""

    shard: str
    node: str
    copy_id: str
    detail: str
    since: float


def reported(configs: Sequence[Configuration], heard: Heard) -> dict[str, dict[str, str]]:
    """What nodes tell now of damage: by shard and node, what is wrong."""
    found: dict[str, dict[str, str]] = {}
    for node, beat in heard.beats.items():
        for shard, detail in _told_by(beat, configs).items():
            found.setdefault(shard, {})[node] = detail
    return found


def _told_by(beat: Beat, configs: Sequence[Configuration]) -> dict[str, str]:
    """By shard, what is wrong with the copies of that node."""
    shards = {config.shard for config in configs}
    return {report.shard: report.damage for report in beat.copies if report.damage and report.shard in shards}


def damaged(node: str, shard: str, heard: Heard, now: float) -> CopyReport | None:
    """What the node, which is near, tells of its copy of that shard, if that is damaged."""
    report = heard.report(node, shard)
    return report if report is not None and report.role == "damaged" and heard.is_near(node, now) else None


class DamageSeen:
    """`hear` each beat, and ask for those that are `mended` as often as something was heard or decided."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Damaged] = {}

    def hear(self, configs: Sequence[Configuration], beat: Beat, now: float) -> list[Damaged]:
        """Those that the beat tells of and no beat did before."""
        new = [
            Damaged(shard, beat.node, _named_on(beat.node, shard, configs), detail, now)
            for shard, detail in _told_by(beat, configs).items()
            if (shard, beat.node) not in self._seen
        ]
        self._seen |= {(damaged.shard, damaged.node): damaged for damaged in new}
        return new

    def mended(self, configs: Sequence[Configuration], heard: Heard) -> list[Damaged]:
        """Those whose place another copy in sync has taken, each of them once.

        One that is over in another way is forgotten: it has another place, its shard has left, or its node tells of
        that very copy whole, since its own folder was put back.
        """
        now_damaged = reported(configs, heard)
        gone = [each for each in self._seen.values() if each.node not in now_damaged.get(each.shard, {})]
        mended = [damaged for damaged in gone if _is_mended(damaged, configs)]
        for damaged in gone:
            is_over = not _named_on(damaged.node, damaged.shard, configs) or _is_whole(damaged, heard)
            if damaged in mended or is_over:
                del self._seen[damaged.shard, damaged.node]
        return mended


def _config_of(shard: str, configs: Sequence[Configuration]) -> Configuration | None:
    return next((each for each in configs if each.shard == shard), None)


def _named_on(node: str, shard: str, configs: Sequence[Configuration]) -> str:
    """The id of the copy that the map names there; empty if it names none, or has no such shard."""
    config = _config_of(shard, configs)
    return config.ids.get(node, "") if config is not None else ""


def _is_mended(damaged: Damaged, configs: Sequence[Configuration]) -> bool:
    config = _config_of(damaged.shard, configs)
    if config is None:
        return False  # the shard has left
    copy = config.copy_on(damaged.node)
    if config.primary.node == damaged.node:
        return config.primary.copy_id != damaged.copy_id
    return copy is not None and copy.state == "in-sync" and copy.copy_id != damaged.copy_id


def _is_whole(damaged: Damaged, heard: Heard) -> bool:
    """Whether its node tells of that very copy, undamaged."""
    report = heard.report(damaged.node, damaged.shard)
    return report is not None and report.copy_id == damaged.copy_id and report.role in _WHOLE
