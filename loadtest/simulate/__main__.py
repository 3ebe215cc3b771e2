"""`python -m loadtest.simulate --seeds N`: as many simulated runs of a store under faults, and the verdict on each.

Owns: the options, the line of progress, the report, the file of results; exit code 0: every promise held, 1: not, 2: it
could not be run, 130: interrupted, and nothing was wrong so far.
Promises: says what is simulated. A failed seed is shown with the one command that replays it with its full log.
Leaves to others: one run (`run`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import msgspec
from xxhash import xxh3_64_hexdigest

from kvstore.cli import EXIT_INTERRUPTED
from loadtest.simulate.faults import POINTS
from loadtest.simulate.run import Result, Sum, simulate

WHAT = "one store with its log on a simulated disk, its engine in memory, and clients; no routers, controllers, network"
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


@click.command(
    help=f"Run simulations from seeds, and judge them. Simulated today: {WHAT}. Exit code 0: every promise held;"
    " 1: not; 2: it could not be run; 130: interrupted, and nothing was wrong so far."
)
@click.option("--seeds", type=click.IntRange(1), default=100, show_default=True, help="How many.")
@click.option("--seed", "first", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--seconds", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Simulated, for each.")
@click.option("--json", "as_json", is_flag=True, help="The last line is one object; progress goes to standard error.")
@click.option("--log", is_flag=True, help="Print every event, not only what a person would want to read.")
@click.option(
    "--result",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Add the sum of these runs to what is in this file. It is saved every few seconds.",
)
def main(seeds: int, first: int, seconds: float, as_json: bool, log: bool, result: Path | None) -> None:
    total = _read(result)
    session = _Session(first, seeds, seconds, as_json, total)
    try:
        session.run(log, result)
    except KeyboardInterrupt:
        session.interrupted = True
    _write(result, total)
    session.report()
    sys.exit(session.exit_code)


class _Session:
    """The runs of one call of the command. `total` also has those of earlier calls, if there is a file."""

    def __init__(self, first: int, seeds: int, seconds: float, as_json: bool, total: Sum) -> None:
        self.interrupted = False
        self._first = first
        self._seeds = seeds
        self._seconds = seconds
        self._as_json = as_json
        self._total = total
        self._own = Sum()
        self._digests: list[str] = []
        self._began_s = time.monotonic()

    def run(self, log: bool, result: Path | None) -> None:
        shown_s = saved_s = self._began_s
        for seed in range(self._first, self._first + self._seeds):
            ran = simulate(seed, self._seconds, _print_line if log else None)
            for each in (self._own, self._total):
                each.add(ran)
            self._digests.append(ran.digest)
            if not ran.ok:
                self._show_failure(ran)
            now_s = time.monotonic()
            if now_s - shown_s >= 1 or seed == self._first + self._seeds - 1:
                shown_s = now_s
                self._show_progress()
            if now_s - saved_s >= 5:
                saved_s = now_s
                _write(result, self._total)

    def _show_progress(self) -> None:
        own, passed_s = self._own, max(time.monotonic() - self._began_s, 1e-9)
        end = "\r" if sys.stderr.isatty() else "\n"
        click.echo(
            f"{own.seeds}/{self._seeds} seeds, {own.seeds / passed_s:.1f} a second, {own.simulated_s / 60:.1f} minutes"
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
            f"  {replay_command(ran.seed, self._seconds)}",
        ]), err=True)  # fmt: skip

    def report(self) -> None:
        """What was run in this call."""
        own = self._own
        passed_s = time.monotonic() - self._began_s
        digest = self._digests[0] if len(self._digests) == 1 else _digest_of(self._digests)
        if self._as_json:
            failed = [each.seed for each in own.failed]
            document = _Document(WHAT, self._first, own.seeds, failed, digest, round(passed_s, 3), self._total)
            click.echo(msgspec.json.encode(document))
            return
        click.echo(f"simulated: {WHAT}")
        click.echo(f"seeds {self._first} to {self._first + own.seeds - 1} in {passed_s:.1f} s: digest {digest}")
        click.echo(f"{own.simulated_s / 60:.1f} minutes, {own.events:,} events, {own.calls:,} calls")
        click.echo("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(own.faults.items())))
        missed = [name for name in POINTS if name not in own.points]
        hit = f"{len(POINTS) - len(missed)} of {len(POINTS)}"
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


def replay_command(seed: int, seconds: float) -> str:
    """What shows that run again, event by event."""
    return f"python -m loadtest.simulate --seeds 1 --seed {seed} --seconds {seconds:g} --log"


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
