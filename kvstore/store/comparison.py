"""The rows of a store's copies, compared with its own in the background.

Owns: when and how fast partitions are compared; what follows where rows differ though both sides verify.
Promises: both digests are of the state as of one record, so writes that go on are no difference. A round begins every
`compare_every_s`, and takes at most `verify_share` of the time. A copy that differs is told so, and is rebuilt: what
the primary has is what clients were answered. But where the primary's own rows do not verify it is the one that is
damaged; and where two or more copies agree with one another, and not with the primary, nothing is changed: a majority
is no proof, a person decides. So nothing is judged before every copy in sync has told: of two that agree, one alone
looks like a copy that differs.
Leaves to others: digests (`storage.digests`), the copy's side (`replication.serving`), what becomes of a copy that is
not used any more (shard, controller).

What a copy that does not tell costs: one that is away or stands still owes answers to records and beacons, too, and is
taken out for that (`replication.patience`); one whose file cannot be read finds that by its own verification, and is
taken out as damaged. The others are compared without it from then on. The log says in every round what was not
compared; such a round is not counted (`compared_rounds`), and soon repeated. A copy that takes records and has not told
what it has for some rounds is named to the controller, and rebuilt where another one in sync is proved (`unproved`).
One that is always beyond the record that it is asked for stays in sync. What was disputed stays so until it is compared
again.

    apply all that is visible ─> digest as of record n ──Compare(n, partitions)──> applies up to n ─> digest
                                          equal? <───────────Compared(digest)────────────┘
         a copy has not told ─> again, some times; then not in this round, whose end names partitions and nodes
         many partitions differ ─> one by one ─> own rows verify? ─> Differs(n, partition) ──> set aside, rebuilt
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.errors import DataCorrupt, KvError
from kvstore.replication.copy_link import CopyLink
from kvstore.replication.messages import Compared, Differs
from kvstore.storage.engine import Digest
from kvstore.storage.verification import VerifyQuery
from kvstore.store.applier import Applier
from kvstore.store.pacing import pause_s
from kvstore.store.tables import Tables
from kvstore.store.unproved import ROUNDS_MAX, Unproved
from kvstore.store.verification import home_in

log = logging.getLogger(__name__)

_GROUP = 64  # partitions that are compared at once
_ROWS_MAX = 250
_TRIES = 3
_RETRY_S = 0.2
_SOONER = 8  # so many times is a round repeated that lacks an answer, in the time of one


class _Compared(NamedTuple):
    """As of record `number`: the primary's digest, and that of each copy that told one.
    `silent`: nodes whose copy is in sync and told none."""

    number: int
    ours: Digest
    theirs: dict[CopyLink, Digest]
    silent: frozenset[str]

    @property
    def wrong(self) -> list[CopyLink]:
        return [link for link, digest in self.theirs.items() if digest != self.ours]

    @property
    def is_disputed(self) -> bool:
        """Whether all copies, two at least, agree with one another and not with the primary."""
        told = list(self.theirs.values())
        return len(told) > 1 and told.count(told[0]) == len(told) and told[0] != self.ours


@dataclass
class _Round:
    """`lacking`: by partition that was not compared, nodes whose copy told nothing. `differs`: whether anything did.

    `told`: nodes whose copy told of each partition so far; None before the first.

    `untold`: ids of copies that are connected and could not tell something, and not since they were beyond the record;
    they are not asked again.
    """

    lacking: dict[int, frozenset[str]] = field(default_factory=dict)
    untold: set[str] = field(default_factory=set)
    told: frozenset[str] | None = None
    differs: bool = False

    @property
    def silent(self) -> frozenset[str]:
        return frozenset().union(*self.lacking.values())


class Comparison:
    """`disputed`: partitions that are the same in all copies, and not at the primary, as the last round found."""

    def __init__(self, tables: Tables, applier: Applier) -> None:
        self._tables = tables
        self._applier = applier
        self.disputed: frozenset[int] = frozenset()
        self._round = _Round()
        self._unproved = Unproved()

    async def run(self) -> None:
        """Compare round after round, for ever."""
        tables = self._tables
        while True:
            await tables.environment.sleep(tables.limits.compare_every_s / (_SOONER if self._round.lacking else 1))
            try:
                await self.round()
            except DataCorrupt as damage:
                tables.verification.found(damage)
            except KvError as error:  # such as a full disk
                log.info("the copies are compared another time: %s", error.detail)

    async def round(self) -> None:
        """Compare all partitions once. Raises DataCorrupt where the own rows cannot be read, TryLater.

        Returns before its end, without a verdict, if the last copy goes out of sync meanwhile.
        """
        tables = self._tables
        self._round = _Round()
        count, disputed = len(tables.served.generations), set[int]()
        for first in range(0, count, _GROUP):
            if not self._in_sync():
                return
            started_s = tables.environment.monotonic_s()
            disputed |= await self._look(range(first, min(first + _GROUP, count)))
            took_s = tables.environment.monotonic_s() - started_s
            await tables.environment.sleep(pause_s(took_s, tables.limits.verify_share))
        lacking, silent = self._round.lacking, self._round.silent
        self.disputed = frozenset(disputed | (self.disputed & lacking.keys()))
        if lacking:
            log.warning(
                "%d of %d partitions are not compared this time: the copy on node %s did not tell in time what it has",
                len(lacking), count, ", ".join(sorted(silent)),
            )  # fmt: skip
        else:
            tables.stats.compared_rounds += 1
        self._unproved.round_is_over(self._round.untold)
        await self._rebuild_unproved()

    @property
    def unproved(self) -> list[str]:
        """Nodes whose copy is in sync, and has not told for several rounds what rows it has."""
        return self._unproved.nodes(self._nodes_in_sync())

    async def _rebuild_unproved(self) -> None:
        proved = frozenset() if self._round.differs else self._in_sync().keys() & (self._round.told or frozenset())
        copy_id = self._unproved.to_rebuild(self._nodes_in_sync(), proved)
        link = next((link for link in self._in_sync().values() if link is not None and link.key[0] == copy_id), None)
        if link is None:
            return
        lacking = [partition for partition, nodes in self._round.lacking.items() if link.node in nodes]
        if not lacking:
            return  # it fell out when it had not told, and is in sync again: the next round looks at it
        log.error(
            "the copy on node %s did not tell in %d comparisons what it has, and another one did: it is rebuilt",
            link.node, ROUNDS_MAX,
        )  # fmt: skip
        await link.tell(Differs(self._applier.visible, lacking[0], untold=True))

    def _nodes_in_sync(self) -> dict[str, str]:
        """By copy id."""
        sender = self._tables.sender
        return {link.key[0]: link.node for link in sender.shipping.links if link.in_sync} if sender is not None else {}

    def _in_sync(self) -> dict[str, CopyLink | None]:
        """By node, the copies in sync; None of those that are not connected now."""
        sender = self._tables.sender
        if sender is None or not sender.serves:
            return {}
        connected = {link.node: link for link in sender.links.in_sync(sender.shipping.links)}
        return {link.node: connected.get(link.node) for link in sender.shipping.links if link.in_sync}

    async def _look(self, partitions: range) -> set[int]:
        """Those of them that are disputed."""
        found = await self._compare(partitions)
        told = frozenset(link.node for link in found.theirs)
        self._round.told = told if self._round.told is None else self._round.told & told
        self._round.differs |= bool(found.wrong)
        if found.silent:
            self._round.lacking |= dict.fromkeys(partitions, found.silent)
            return set()
        if not found.wrong:
            return set()
        if len(partitions) == 1:
            return await self._judge(partitions[0], found)
        disputed = set[int]()
        for partition in partitions:
            disputed |= await self._look(range(partition, partition + 1))
        return disputed

    async def _compare(self, partitions: range) -> _Compared:
        tables = self._tables
        for _ in range(_TRIES):
            connected = (link for link in self._in_sync().values() if link is not None)
            links = [link for link in connected if link.key[0] not in self._round.untold]
            await self._applier.flush()
            number, ours = await tables.engine.digest(frozenset(partitions))
            told = await asyncio.gather(*(link.compare(number, list(partitions)) for link in links))
            answers = dict(zip(links, told, strict=True))
            theirs = {
                link: said.digest for link, said in answers.items() if said is not None and said.digest is not None
            }
            silent = frozenset(self._in_sync()) - {link.node for link in theirs}
            found = _Compared(number, ours, theirs, silent)
            self._round.untold |= {link.key[0] for link, said in answers.items() if _could_not_tell(link, said)}
            if not found.silent:
                break
            await tables.environment.sleep(_RETRY_S)  # a copy was beyond that record, or its connection was lost
        return found

    async def _judge(self, partition: int, found: _Compared) -> set[int]:
        tables = self._tables
        if (fault := await self._own_fault(partition)) is not None:
            tables.verification.found(DataCorrupt(f"{fault[:1].upper()}{fault[1:]}."))
            return set()
        if found.is_disputed:
            log.error(
                "partition %d is the same in all copies, and not here, as of record %d, though all verify: nothing is "
                "changed, a person decides", partition, found.number,
            )  # fmt: skip
            return {partition}
        for link in found.wrong:
            log.error(
                "partition %d of the copy on node %s is not what it is here, as of record %d, though both verify: that "
                "copy is rebuilt", partition, link.node, found.number,
            )  # fmt: skip
            tables.stats.copies_differed += 1
            await link.tell(Differs(found.number, partition))
        return set()

    async def _own_fault(self, partition: int) -> str | None:
        """What is wrong with the rows here."""
        after, more = 0, True
        while more:
            query = VerifyQuery(partition, after, _ROWS_MAX, home_in(len(self._tables.served.generations)))
            page = await self._tables.engine.verify(query)
            if page.faults:
                return page.faults[0].detail
            after, more = page.after, page.more
        return None


def _could_not_tell(link: CopyLink, said: Compared | None) -> bool:
    """It is asked no more in this round; one whose connection was lost may be connected again."""
    return said.failed if said is not None else link.is_streaming
