"""What became of a damaged store or cluster: the verdict on one damage, and the table of all.

Owns: the kinds of verdicts and which of them break a promise; the record of what was acknowledged.
Promises: pure.
Leaves to others: asking the store (`stores`) or the cluster (`clusters`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

EQUAL, CORRUPT, REFUSED, DOWN = "equal", "data-corrupt", "refused", "down"
ENDED = "ended"  # the process gave up in order, after it had opened
SICK = "not mended"  # each key is there, but not all copies come back
UNCLEAN = "unclean"  # refused with a traceback
WRONG, LOST = "WRONG VALUE", "LOST"
VERDICTS = (EQUAL, SICK, CORRUPT, REFUSED, DOWN, ENDED, UNCLEAN, WRONG, LOST)
VIOLATIONS = frozenset({WRONG, LOST, UNCLEAN})
WITH_COPIES = frozenset(VERDICTS) - {EQUAL}  # violations where another copy is whole

Acknowledged = Mapping[str, frozenset[bytes | None]]
"""For each key what it may hold: what was acknowledged last, and what was under way when the process died."""


class Finding(msgspec.Struct, frozen=True):
    """One damage and what became of it; `detail` says how it showed."""

    place: str
    shape: str
    file: str
    offset: int
    verdict: str
    detail: str = ""


class Tally:
    """The verdicts on the answers of one opened store."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, verdict: str, detail: str) -> None:
        self.counts[verdict] += 1
        self.first.setdefault(verdict, detail)

    def judge(self, key: str, allowed: frozenset[bytes | None], status: int, value: bytes | None, code: str) -> None:
        """Add the answer to one key."""
        if status == 200:
            verdict = EQUAL if value in allowed else WRONG
        elif status == 404:
            verdict = EQUAL if None in allowed else LOST
        elif code == "data-corrupt":
            verdict = CORRUPT
        elif status in (421, 503, 504):
            verdict = DOWN
        else:
            verdict = UNCLEAN
        self.add(verdict, f"key {key}: {status} {code}".rstrip())

    @property
    def worst(self) -> tuple[str, str]:
        """The gravest verdict, and where it showed first."""
        for verdict in reversed(VERDICTS):
            if self.counts[verdict]:
                return verdict, f"{self.counts[verdict]} of {self.counts.total()}, {self.first[verdict]}"
        return EQUAL, ""


def table(findings: list[Finding]) -> list[str]:
    """Lines: one for each place and shape, with how many damages had which verdict."""
    shown = [verdict for verdict in VERDICTS if any(finding.verdict == verdict for finding in findings)]
    counts = Counter((finding.place, finding.shape, finding.verdict) for finding in findings)
    kinds = sorted({(finding.place, finding.shape) for finding in findings})
    lines = [f"{'damage':<16}" + "".join(f"{verdict:>14}" for verdict in shown)]
    for place, shape in kinds:
        numbers = (counts[place, shape, verdict] for verdict in shown)
        lines.append(f"{place + ' ' + shape:<16}" + "".join(f"{number or '':>14}" for number in numbers))
    totals = Counter(finding.verdict for finding in findings)
    lines.append(f"{'all':<16}" + "".join(f"{totals[verdict]:>14}" for verdict in shown))
    return lines
