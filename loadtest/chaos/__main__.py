"""`python -m loadtest.chaos --minutes N --seed S`: a cluster under load and under faults, then the verdict.

Owns: the options, where the results go, the exit code: 0 every promise held; 1 not; 130 interrupted, and nothing wrong
so far; 2 it could not be run.
Leaves to others: the run (run), the line of progress (progress), the page (page).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from kvstore.cli.commands import EXIT_INTERRUPTED
from kvstore.failpoints import BUGS
from loadtest.chaos import page
from loadtest.chaos.child import PLANT_BUGS
from loadtest.chaos.progress import show
from loadtest.chaos.run import Run, Settings
from loadtest.chaos.schedule import NEMESES, OF_COPIES, OF_ONE, PHASE_S_MIN, SWEEP, Nemesis
from loadtest.chaos.summary import RunSummary, encode
from loadtest.cluster.local import REPOSITORY

_EXIT_USAGE = 2
_SHOWN_MAX = 10


def _nemeses(context: click.Context, _: click.Parameter, text: str | None) -> list[Nemesis]:
    if text is None:
        return list(NEMESES if context.params["replicas"] > 1 else OF_ONE)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [SWEEP]:
        return [SWEEP]
    if unknown := [name for name in names if name not in NEMESES]:
        known = f"{', '.join(NEMESES)}, and {SWEEP}, by itself"
        raise click.BadParameter(f"there is no nemesis {', '.join(unknown)}; there are {known}")
    if context.params["replicas"] == 1 and (alone := [name for name in OF_COPIES if name in names]):
        raise click.BadParameter(f"one copy does not survive {', '.join(alone)}: give --replicas 2 or more, too")
    return [nemesis for nemesis in NEMESES if nemesis in names]


@click.command(
    help="A cluster of real processes under load and faults, then the verdict. Exit code 0: every promise held;"
    " 1: not; 130: interrupted, and nothing was wrong so far; 2: it could not be run."
)
@click.option(
    "--minutes", type=click.FloatRange(PHASE_S_MIN / 60), default=1.0, show_default=True, help="Of load and faults."
)
@click.option("--seed", type=int, default=None, help="Of all random choices.  [default: from the clock]")
@click.option(
    "--nemesis",
    "nemeses",
    callback=_nemeses,
    default=None,
    help=f"Which kinds of faults of {','.join(NEMESES)} (from die on with copies only); none if empty.  [default: all]"
    " `sweep`: processes die at every named point of the code in turn.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 5),
    default=1,
    show_default=True,
    is_eager=True,
    help="Copies of every key. With 2 or more, nodes also stay dead, lose their disks, are cut off, and copies rot.",
)
@click.option("--routers", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--shards", type=click.IntRange(2, 16), default=4, show_default=True, help="To begin with.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="An empty folder for the results.  [default: loadtest/out/chaos-SEED-TIME]",
)
@click.option("--keep", is_flag=True, help="Keep data, logs and histories also if every promise held.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of the verdict in words.")
@click.option("--bug", type=click.Choice(sorted(BUGS)), default=None, hidden=True)
def main(
    minutes: float,
    seed: int | None,
    nemeses: Sequence[Nemesis],
    replicas: int,
    routers: int,
    shards: int,
    out: Path | None,
    keep: bool,
    as_json: bool,
    bug: str | None,
) -> None:
    if bug and os.environ.get(PLANT_BUGS) != "1":
        raise click.UsageError(f"--bug breaks the store on purpose: set {PLANT_BUGS}=1 if that is what you want.")
    seed = int(time.time()) if seed is None else seed
    folder = _folder(out, seed)
    run = Run(Settings(60 * minutes, seed, nemeses, routers, shards, folder, bug or "", replicas))
    try:
        summary = asyncio.run(_run(run))
    except Exception as error:  # of the run itself, or of a cluster that does not even start: no verdict on the store
        told = str(error) if isinstance(error, RuntimeError) else "".join(traceback.format_exception(error))
        click.echo(f"Error: {told}\nthe run came to no verdict; data and logs are in {folder}", err=True)
        sys.exit(_EXIT_USAGE)
    _write(summary, folder, keep or not summary.ok)
    if as_json:
        click.echo(encode(summary).decode(), nl=False)
    else:
        _print(summary, folder)
    if run.was_interrupted:
        click.echo("interrupted: the verdict is on what was judged until then", err=True)
    sys.exit(1 if run.is_wrong or not (summary.ok or run.was_interrupted) else EXIT_INTERRUPTED * run.was_interrupted)


def _folder(out: Path | None, seed: int) -> Path:
    folder = out or REPOSITORY / "loadtest" / "out" / f"chaos-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty: name another folder with --out, or empty it.")
    return folder.resolve()


async def _run(run: Run) -> RunSummary:
    """Ctrl-C, or SIGTERM, ends it early, once."""
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(run.run())
    cancel = _cancel_once(running)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel)
    showing = asyncio.create_task(show(run))
    try:
        return await running
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


def _cancel_once(running: asyncio.Task[RunSummary]) -> Callable[[], None]:
    """A second time would end the end: what stops the processes."""
    calls = iter([running.cancel])

    def cancel() -> None:
        for call in calls:
            call()

    return cancel


def _write(summary: RunSummary, folder: Path, keeps: bool) -> None:
    if keeps:
        summary.kept = str(folder)
    else:
        shutil.rmtree(folder / "cluster", ignore_errors=True)
        for path in folder.glob("phase-*.ndjson"):
            path.unlink()
    (folder / "verdict.html").write_text(page.render(summary), encoding="utf-8")
    (folder / "summary.json").write_bytes(encode(summary))


def _print(summary: RunSummary, folder: Path) -> None:
    for phase in summary.phases:
        found = [f"{check.name}: {sentence}" for check in phase.checks for sentence in check.violations]
        found += [f"{check.name} is undecided: {check.note}" for check in phase.checks if check.note]
        for sentence in [*phase.complaints, *phase.unfinished, *found][:_SHOWN_MAX]:
            click.echo(f"phase {phase.number}: {sentence}")
    if summary.met or summary.unmet:
        unmet = f"; not met: {', '.join(summary.unmet)}" if summary.unmet else ""
        click.echo(f"{len(summary.met)} of {len(summary.met) + len(summary.unmet)} points of the code were met{unmet}")
    click.echo(page.sentence(summary))
    if not summary.ok:
        click.echo(f"data, logs and histories are kept; again: {summary.command}")
    click.echo(f"{folder / 'verdict.html'}\n{folder / 'summary.json'}")


if __name__ == "__main__":
    main()
