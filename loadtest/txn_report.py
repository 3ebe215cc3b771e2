"""What the rounds of transactions found: a report for each, the verdict on all, and a table.

Owns: the figures, their names and the words for them.
Leaves to others: how they come about (loadtest.txn_rounds).
"""

from __future__ import annotations

import msgspec

from loadtest.txn_faults import RANDOM, RESHARD, SLOW


class Report(msgspec.Struct, kw_only=True):
    """One round. Transactions by what their clients were told: acknowledged, refused (409, 423, 429, 503, or never
    sent), unmet (a condition did not hold), unknown. `in_doubt_s`: how long after the fault the last one that it had
    left in doubt was resolved. `failed`: answers that were refusals or unknown, by status."""

    number: int
    fault: str
    what: str = ""
    reached: bool = True
    acknowledged: int = 0
    refused: int = 0
    unmet: int = 0
    unknown: int = 0
    repeats: int = 0
    reads: int = 0
    audits: int = 0
    in_doubt_s: float = 0.0
    in_doubt_max: int = 0
    outage_s: float = 0.0
    failed: dict[str, int] = {}
    violations: list[str] = []


class Verdict(msgspec.Struct, kw_only=True):
    """All rounds. `violations` are sentences, those of the rounds and of the look after the last one."""

    seed: int
    routers: int
    txn_timeout_s: float
    seconds: float = 0.0
    rounds: list[Report] = []
    violations: list[str] = []

    @property
    def ok(self) -> bool:
        return not self.violations and self.total("acknowledged") > 0

    def total(self, name: str) -> int:
        return sum(getattr(report, name) for report in self.rounds)

    def __str__(self) -> str:
        found = "every promise held" if self.ok else f"{len(self.violations)} VIOLATIONS"
        in_doubt_s = max((report.in_doubt_s for report in self.rounds), default=0.0)
        return (
            f"{found}: {len(self.rounds)} rounds (seed {self.seed}, {self.routers} routers); transactions:"
            f" {self.total('acknowledged'):,} acknowledged, {self.total('unmet'):,} not met,"
            f" {self.total('refused'):,} refused, {self.total('unknown'):,} unknown; {self.total('reads'):,} reads,"
            f" {self.total('audits'):,} of them of all accounts; in doubt for at most {in_doubt_s:.2f} s"
            f" (2 x txn_timeout_s is {2 * self.txn_timeout_s:g} s); {self.seconds:.0f} s in all"
        )


def line_of(report: Report, rounds: int, seconds: float) -> str:
    left_s = seconds / report.number * (rounds - report.number)
    return (
        f"[{report.number}/{rounds}] {report.what}, back after {report.outage_s:.2f} s, in doubt for"
        f" {report.in_doubt_s:.2f} s; {report.acknowledged:,} acknowledged, {report.unknown:,} unknown,"
        f" {report.audits} audits ({left_s:.0f} s left)"
    )


def table_of(verdict: Verdict) -> str:
    """A line for each fault."""
    columns = ("rounds", "reached", "acked", "not met", "refused", "unknown", "reads", "in doubt s", "verdict")
    lines = [f"{'fault':30}" + "".join(f"{column:>11}" for column in columns)]
    for name in dict.fromkeys(sorted((report.fault for report in verdict.rounds), key=_place)):
        reports = [report for report in verdict.rounds if report.fault == name]
        cells = [
            len(reports),
            sum(report.reached for report in reports),
            *(sum(getattr(r, field) for r in reports) for field in ("acknowledged", "unmet", "refused", "unknown")),
            sum(report.reads for report in reports),
            f"{max(report.in_doubt_s for report in reports):.2f}",
            "WRONG" if any(report.violations for report in reports) else "held",
        ]
        lines.append(
            f"{name:30}" + "".join(f"{cell:>11,}" if isinstance(cell, int) else f"{cell:>11}" for cell in cells)
        )
    return "\n".join(lines)


def _place(name: str) -> tuple[int, str]:
    return (name in SLOW) + 2 * (name in RANDOM) + 3 * (name in RESHARD), name
