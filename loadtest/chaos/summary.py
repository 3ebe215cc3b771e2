"""What a chaos run was and what it showed: the content of `summary.json`, from which the page is made.

Owns: the shape of a run's summary, and when a phase, and so a run, has passed.
Promises: a summary that was written is read back the same. Pure.
Leaves to others: gathering it (run.py), judging histories (loadtest/histories), showing it (page.py).

Times named `at_s` and `began_s` are seconds since the run began.
"""

from __future__ import annotations

import msgspec

from loadtest.histories.verdict import Check


class Fault(msgspec.Struct):
    """One fault as it was done.
    `for_s`: how long it lasted; 0 for one that is over at once, such as a kill.

    `nemesis`: one of loadtest.chaos.schedule; `kind`: what exactly it did. `targets`: names of processes, or of
    links as `source → destination`. `note`: what else there is to say, such as that its target was gone already.
    """

    at_s: float
    for_s: float
    nemesis: str
    kind: str
    targets: list[str]
    note: str = ""


class Point(msgspec.Struct):
    """What the clients saw in the second that begins at `at_s`.

    `per_s`: operations done, by workload. `failed_per_s`: answers that were no success and no part of the workload, by
    problem code (or the name of the error when no answer came). Latencies are of all answers; None: there was none.
    """

    at_s: float
    per_s: dict[str, float]
    failed_per_s: dict[str, float]
    p50_ms: float | None = None
    p99_ms: float | None = None


class Phase(msgspec.Struct):
    """One part of the run, with keys of its own, judged by itself.

    `operations`: how many its history holds, by workload. `complaints`: what is wrong outside the history, such as a
    key that is listed otherwise than it was read. `unfinished`: what did not come to its end in time, such as the
    recovery from the faults; nothing that was seen is wrong by it.
    """

    number: int
    began_s: float
    seconds: float
    operations: dict[str, int]
    checks: list[Check]
    complaints: list[str] = []
    unfinished: list[str] = []

    @property
    def violations(self) -> int:
        return sum(len(check.violations) for check in self.checks)

    @property
    def ok(self) -> bool:
        """Nothing violated, nothing left undecided, no complaint, and all came to its end."""
        return not (self.complaints or self.unfinished) and not any(
            check.violations or check.note for check in self.checks
        )


class Totals(msgspec.Struct):
    """Operations of all histories, by outcome."""

    done: int = 0
    refused: int = 0
    unknown: int = 0

    @property
    def operations(self) -> int:
        return self.done + self.refused + self.unknown


class RunSummary(msgspec.Struct, kw_only=True):
    """`command` runs it again. `began_at`: ISO 8601 with its zone. `machine`: facts, one sentence each.

    `met`, `unmet`: the named points of the code at which a sweep let a process die, or not. `bug`: the one that was
    planted. `kept`: the folder with data, logs and histories, where these were kept.
    """

    command: str
    seed: int
    began_at: str
    seconds: float
    ok: bool
    nemeses: list[str]
    shards: int
    routers: int
    replicas: int = 1
    faults: list[Fault] = []
    points: list[Point] = []
    phases: list[Phase] = []
    totals: Totals = msgspec.field(default_factory=Totals)
    machine: list[str] = []
    met: list[str] = []
    unmet: list[str] = []
    bug: str = ""
    kept: str = ""


def encode(run: RunSummary) -> bytes:
    """The content of `summary.json`."""
    return msgspec.json.format(msgspec.json.encode(run)) + b"\n"


def decode(content: bytes) -> RunSummary:
    """Raises msgspec.ValidationError or msgspec.DecodeError when it is no summary."""
    return msgspec.json.decode(content, type=RunSummary)
