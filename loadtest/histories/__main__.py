"""`python -m loadtest.histories FILE...`: the verdict on histories.

Owns: the command line, the table, the exit code: 0 right, 1 wrong or undecided, 2 a file that is no history.
Promises: every file is judged by itself, unless `--together` says that all are of one run (of several processes).
Leaves to others: the verdict (verdict).
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from loadtest.histories.history import AnyOperation, read
from loadtest.histories.verdict import Check, Verdict, judge


class Judged(msgspec.Struct):
    """What `--json` prints for each history: its files, and the verdict on it."""

    files: list[str]
    ok: bool
    checks: list[Check]


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--together", is_flag=True, help="All files are one history: those of several processes of one run.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each history.")
def main(files: tuple[Path, ...], together: bool, as_json: bool) -> None:
    """Prints what each checker says, and what is wrong."""
    histories = [list(files)] if together else [[path] for path in files]
    judged = [_judge(paths) for paths in histories]
    for one in judged:
        click.echo(msgspec.json.encode(one).decode() if as_json else render(one))
    sys.exit(0 if all(one.ok for one in judged) else 1)


def _judge(paths: list[Path]) -> Judged:
    operations: list[AnyOperation] = []
    for path in paths:
        try:
            operations += read(path)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if not operations:
        raise click.UsageError(f"{', '.join(map(str, paths))}: no operation is in it")
    verdict: Verdict = judge(operations)
    return Judged([str(path) for path in paths], verdict.ok, verdict.checks)


def render(judged: Judged) -> str:
    """The table, then the violations and what is undecided."""
    lines = [", ".join(judged.files), f"{'check':<10} {'operations':>10} {'violations':>10} {'seconds':>8}"]
    for check in judged.checks:
        row = f"{check.name:<10} {check.operations:>10,} {len(check.violations):>10,} {check.seconds:>8.2f}"
        lines.append(row + ("  undecided" if check.note else ""))
    for check in judged.checks:
        lines += [f"{check.name}: {violation}" for violation in check.violations]
        lines += [f"{check.name}: undecided: {check.note}"] if check.note else []
    return "\n".join([*lines, "right" if judged.ok else "not right"])


if __name__ == "__main__":
    main()
