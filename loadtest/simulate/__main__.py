"""`python -m loadtest.simulate --seeds N`: as many simulated runs of a cluster under faults, and the verdict on each.

Owns: the options, the line of progress, the report, the file of results; exit code 0: every promise held, 1: not, 2: it
could not be run, 130: interrupted, and nothing was wrong so far.
Promises: says what is simulated. A failed seed is shown with the one command that replays it with its full log.
Leaves to others: what a run is, and making a failed one smaller (`plan`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import msgspec
from xxhash import xxh3_64_hexdigest

from kvstore.cli.commands import EXIT_INTERRUPTED
from kvstore.failpoints import BUGS
from loadtest.simulate.cluster_faults import NEMESES, USUAL
from loadtest.simulate.cluster_run import Cut
from loadtest.simulate.plan import WHAT, Plan
from loadtest.simulate.store_run import Result, Sum

_SHOWN_MAX = 5
_LINES_MAX = 12


class _Document(msgspec.Struct):
    """The object that `--json` prints as its last line."""

    simulated: str
    first: int
    seeds: int
    failed: list[int]
    digest: str
    seconds: float
    total: Sum


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> frozenset[int]:
    try:
        return frozenset(int(each) for each in text.split(",") if each)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1,4.") from None


def _nemeses(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    chosen = [each for each in text.split(",") if each]
    if unknown := [each for each in chosen if each not in NEMESES]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(NEMESES)}.")
    return [each for each in NEMESES if each in chosen]


@click.command(
    help="Run simulations from seeds, and judge them. Of a cluster: "
    f"{WHAT['cluster']}. Of a store: {WHAT['store']}. Exit code 0: every promise held;"
    " 1: not; 2: it could not be run; 130: interrupted, and nothing was wrong so far."
)
@click.option("--seeds", type=click.IntRange(1), default=100, show_default=True, help="How many.")
@click.option("--seed", "first", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--seconds", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Simulated, for each.")
@click.option("--of", type=click.Choice(["cluster", "store"]), default="cluster", show_default=True, help="Of what.")
@click.option(
    "--nemesis",
    "nemeses",
    default=",".join(USUAL),
    show_default=True,
    callback=_nemeses,
    help="Kinds of faults and changes of a cluster; empty for none.",
)
@click.option(
    "--without-faults", default="", callback=_numbers, help="Leave out these of a cluster's schedule, from 0."
)
@click.option("--without-clients", default="", callback=_numbers, help="Leave out these clients of a cluster, from 1.")
@click.option("--shrink/--no-shrink", default=True, show_default=True, help="Make the first failed run smaller.")
@click.option("--replicas", type=click.IntRange(1, 5), default=1, show_default=True, help="As in cluster.yaml.")
@click.option("--bug", type=click.Choice(["", *BUGS]), default="", help="Plant it: it should be found.")
@click.option("--json", "as_json", is_flag=True, help="The last line is one object; progress goes to standard error.")
@click.option("--log", is_flag=True, help="Print every event, not only what a person would want to read.")
@click.option(
    "--result",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Add the sum of these runs to what is in this file. It is saved every few seconds.",
)
def main(
    seeds: int,
    first: int,
    seconds: float,
    of: str,
    nemeses: list[str],
    without_faults: frozenset[int],
    without_clients: frozenset[int],
    shrink: bool,
    replicas: int,
    bug: str,
    as_json: bool,
    log: bool,
    result: Path | None,
) -> None:
    total = _read(result)
    plan = Plan(of, seconds, nemeses, Cut(without_faults, without_clients), bug, replicas)
    session = _Session(plan, range(first, first + seeds), as_json, shrink, total)
    try:
        session.run(log, result)
    except KeyboardInterrupt:
        session.interrupted = True
    _write(result, total)
    session.report()
    sys.exit(session.exit_code)


class _Session:
    """The runs of one call of the command. `total` also has those of earlier calls, if there is a file."""

    def __init__(self, plan: Plan, seeds: range, as_json: bool, shrinks: bool, total: Sum) -> None:
        self.interrupted = False
        self._plan = plan
        self._seeds = seeds
        self._as_json = as_json
        self._shrinks = shrinks
        self._total = total
        self._own = Sum()
        self._digests: list[str] = []
        self._began_s = time.monotonic()

    def run(self, log: bool, result: Path | None) -> None:
        shown_s = saved_s = self._began_s
        for seed in self._seeds:
            ran = self._plan.run(seed, _print_line if log else None)
            for each in (self._own, self._total):
                each.add(ran)
            self._digests.append(ran.digest)
            if not ran.ok:
                self._show_failure(ran)
            now_s = time.monotonic()
            if now_s - shown_s >= 1 or seed == self._seeds[-1]:
                shown_s = now_s
                self._show_progress()
            if now_s - saved_s >= 5:
                saved_s = now_s
                _write(result, self._total)

    def _show_progress(self) -> None:
        own, passed_s = self._own, max(time.monotonic() - self._began_s, 1e-9)
        end = "\r" if sys.stderr.isatty() else "\n"
        done = f"{own.seeds}/{len(self._seeds)} seeds"
        click.echo(
            f"{done}, {own.seeds / passed_s:.1f} a second, {own.simulated_s / 60:.1f} minutes"
            f" simulated, {own.calls:,} calls, {len(own.failed)} failed{end}",
            err=True,
            nl=False,
        )

    def _show_failure(self, ran: Result) -> None:
        if len(self._own.failed) > _SHOWN_MAX:
            return
        lines = ran.verdict.splitlines()
        more = [f"({len(lines) - _LINES_MAX} lines more)"] if len(lines) > _LINES_MAX else []
        click.echo("\n".join([
            "", f"seed {ran.seed} failed (digest {ran.digest}):", *lines[:_LINES_MAX], *more, "the last events:",
            *(f"  {line[:200]}" for line in ran.last[-_LINES_MAX:]), "to replay it with every event:",
            f"  {self._plan.command(ran.seed)}",
        ]), err=True)  # fmt: skip
        if self._shrinks and len(self._own.failed) == 1:
            smaller = self._plan.smaller(ran)
            if smaller != self._plan:
                click.echo(f"it fails also like this:\n  {smaller.command(ran.seed)}", err=True)

    def report(self) -> None:
        """What was run in this call."""
        own = self._own
        passed_s = time.monotonic() - self._began_s
        digest = self._digests[0] if len(self._digests) == 1 else _digest_of(self._digests)
        if self._as_json:
            failed = [each.seed for each in own.failed]
            document = _Document(
                WHAT[self._plan.of], self._seeds[0], own.seeds, failed, digest, round(passed_s, 3), self._total
            )
            click.echo(msgspec.json.encode(document))
            return
        click.echo(f"simulated: {WHAT[self._plan.of]}")
        click.echo(f"seeds {self._seeds[0]} to {self._seeds[0] + own.seeds - 1} in {passed_s:.1f} s: digest {digest}")
        click.echo(f"{own.simulated_s / 60:.1f} minutes, {own.events:,} events, {own.calls:,} calls")
        click.echo("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(own.faults.items())))
        missed = [name for name in self._plan.points if name not in own.points]
        hit = f"{len(self._plan.points) - len(missed)} of {len(self._plan.points)}"
        click.echo(f"failpoints hit: {hit}" + (f"; not hit: {', '.join(missed)}" if missed else ""))
        if own.failed:
            click.echo(f"FAILED: {', '.join(str(each.seed) for each in own.failed)}")
        else:
            click.echo("every promise held" + (", until it was interrupted" if self.interrupted else ""))

    @property
    def exit_code(self) -> int:
        if self._own.failed:
            return 1
        return EXIT_INTERRUPTED if self.interrupted else 0


def _print_line(line: str) -> None:
    click.echo(line)


def _digest_of(digests: list[str]) -> str:
    """Of all runs, in the order of their seeds."""
    return xxh3_64_hexdigest("".join(digests).encode())


def _read(path: Path | None) -> Sum:
    if path is None or not path.exists():
        return Sum()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Sum)
    except msgspec.MsgspecError as error:
        raise click.UsageError(f"{path} is no file of results: {error}. Name another one, or remove it.") from None


def _write(path: Path | None, total: Sum) -> None:
    if path is not None:
        written = path.with_name(path.name + ".new")
        written.write_bytes(msgspec.json.encode(total))
        written.replace(path)


if __name__ == "__main__":
    main()
