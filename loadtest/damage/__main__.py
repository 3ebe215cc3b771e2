"""`python -m loadtest.damage --count 500 --clusters 60 --seed 1`: damage files at random, and see what becomes of it.

Owns: the command line, the progress, the table, the exit code.
Promises: the same seed draws the same kinds of damage; where they hit depends on when the stores were killed. The files
of each violation are kept, and named.
Leaves to others: stores (`stores`), whole clusters (`clusters`), verdicts.

What each verdict means: "equal": every key reads back what was acknowledged; "data-corrupt": some keys answer that,
all others are equal; "refused": the store does not open and says why; "down": the cluster runs and the keys of that
shard are unavailable; "ended": the process gave up in order; "not mended": with copies, all keys are there and a copy
does not come back. Violations: another value, a key that is not there though it was acknowledged, a traceback. With
copies one of them is always whole, and anything but "equal" is a violation.
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import msgspec

from loadtest.damage import clusters, stores
from loadtest.damage.verdicts import VIOLATIONS, WITH_COPIES, Acknowledged, Finding, table

_WRITES = (300, 3000, 6000, 12_000)  # of the stores that are killed: some still live in the log alone
_LINE_EVERY_S = 5.0


class _Progress:
    def __init__(self, label: str, total: int, quiet: bool, violations: frozenset[str] = VIOLATIONS) -> None:
        self._label, self.total, self._quiet, self.violations = label, total, quiet, violations
        self._began_s = self._said_s = time.monotonic()

    def show(self, done: int, findings: list[Finding]) -> None:
        now_s = time.monotonic()
        if self._quiet or (now_s - self._said_s < _LINE_EVERY_S and done < self.total):
            return
        self._said_s = now_s
        left_s = (self.total - done) * (now_s - self._began_s) / max(done, 1)
        bad = sum(finding.verdict in self.violations for finding in findings)
        click.echo(f"{self._label}: {done} of {self.total}, {bad} violations, {left_s:.0f} s left", err=True)


Case = Callable[[int, random.Random], Awaitable[Finding | None]]


async def single_stores(count: int, seed: int, folder: Path, quiet: bool) -> list[Finding]:
    """The findings of so many damages to copies of killed stores."""
    kept: list[tuple[Path, Acknowledged]] = []
    for number, writes in enumerate(_WRITES):
        kept.append((path := folder / f"killed-{number}", await stores.killed_store(path, seed + number, writes)))

    async def case(number: int, rng: random.Random) -> Finding | None:
        path, acknowledged = kept[number % len(kept)]
        return await stores.damaged_store(path, folder / "copy", acknowledged, rng)

    return await _findings(case, f"{seed}", folder / "copy", folder / "violation", _Progress("stores", count, quiet))


async def whole_clusters(count: int, seed: int, replicas: int, folder: Path, quiet: bool) -> list[Finding]:
    """The findings of so many damages to whole clusters."""
    if not count:
        return []
    bench, copy = await clusters.Bench.killed(folder / "cluster", seed, replicas), folder / "damaged"
    progress = _Progress("clusters", count, quiet, _violations(replicas))
    kept_as = folder / "cluster-violation"
    return await _findings(lambda _, rng: bench.damaged(rng, copy), f"{seed}/cluster", copy, kept_as, progress)


async def _findings(case: Case, seed: str, copy: Path, kept_as: Path, progress: _Progress) -> list[Finding]:
    """One of each case, each from its own seed; it is drawn again where nothing could be damaged.

    The files of a violation, which lie in `copy`, are kept as `kept_as`-NUMBER.
    """
    findings: list[Finding] = []
    for number in range(progress.total):
        finding, tries = None, 0
        while finding is None:
            finding = await case(number, random.Random(f"{seed}/{number}/{tries}"))
            tries += 1
        if finding.verdict in progress.violations:
            shutil.copytree(copy, kept_as.with_name(f"{kept_as.name}-{number}"), dirs_exist_ok=True)
        findings.append(finding)
        progress.show(number + 1, findings)
    return findings


@click.command()
@click.option("--count", type=click.IntRange(0), default=100, show_default=True, help="Damages to single stores.")
@click.option("--clusters", "cluster_count", type=click.IntRange(0), default=0, show_default=True, help="To clusters.")
@click.option("--replicas", type=click.IntRange(1, 5), default=1, show_default=True, help="Copies in the clusters.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option("--folder", type=click.Path(path_type=Path), help="Work here and keep it [default: a temporary folder].")
def main(count: int, cluster_count: int, replicas: int, seed: int, as_json: bool, folder: Path | None) -> None:
    """Damage the files of killed stores at random and compare what they answer with what was acknowledged.

    Exit codes: 0 no promise was broken; 1 one was, and its files are kept; 2 wrong usage.
    """
    logging.basicConfig(level=logging.CRITICAL)
    work = folder or Path(tempfile.mkdtemp(prefix="kvstore-damage-"))
    work.mkdir(parents=True, exist_ok=True)

    async def run() -> tuple[list[Finding], list[Finding]]:
        single = await single_stores(count, seed, work, as_json) if count else []
        return single, await whole_clusters(cluster_count, seed, replicas, work, as_json)

    single, whole = asyncio.run(run())
    bad = [finding for finding in single if finding.verdict in VIOLATIONS]
    bad += [finding for finding in whole if finding.verdict in _violations(replicas)]
    if as_json:
        click.echo(msgspec.json.encode({"seed": seed, "ok": not bad, "stores": single, "clusters": whole}))
    else:
        _tell(single, whole, bad, seed)
    if not folder and not bad:
        shutil.rmtree(work, ignore_errors=True)
    elif bad:
        click.echo(f"The files are kept in {work}.", err=True)
    sys.exit(1 if bad else 0)


def _violations(replicas: int) -> frozenset[str]:
    return VIOLATIONS if replicas == 1 else WITH_COPIES


def _tell(single: list[Finding], whole: list[Finding], bad: list[Finding], seed: int) -> None:
    for label, findings in (("single stores", single), ("whole clusters", whole)):
        if findings:
            click.echo(f"{len(findings)} damages to {label}, seed {seed}")
            click.echo("\n".join(table(findings)))
    for finding in bad:
        click.echo(
            f"VIOLATION {finding.verdict}: {finding.place} {finding.shape} at byte {finding.offset} of ", nl=False
        )
        click.echo(f"{finding.file}: {finding.detail}")
    click.echo(f"{len(bad)} violations" if bad else "Nothing that was acknowledged was lost or changed in silence.")


if __name__ == "__main__":
    main()
