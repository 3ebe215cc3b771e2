"""deploy: write the files that come with the package for running a cluster under observation.

Owns: which files of `kvstore/deploy` are written, and that nothing of a person's is replaced without being asked.
Leaves to others: what the files say.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from kvstore.cli.frame import emit

FILES = ("prometheus.yml", "prometheus-rules.yml", "grafana-board.json")


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace files of these names that are there.")
@click.option("--json", "as_json", is_flag=True, help='Print {"written":[FILE,…]} for programs.')
def deploy(folder: Path, force: bool, as_json: bool) -> None:
    """Write what Prometheus and Grafana need into DIR: what to scrape, alarms, a board.

    The files are prometheus.yml, prometheus-rules.yml and grafana-board.json. If one of them is there already,
    nothing is written and the exit code is 2, unless --force is given.

    \b
    Example:
      kvstore deploy monitoring
    """
    targets = {folder / name: (files("kvstore") / "deploy" / name).read_bytes() for name in FILES}
    there = [str(path) for path in targets if path.exists()]
    if there and not force:
        raise click.UsageError(f"there already: {', '.join(there)}; name another folder, or replace them with --force.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in targets.items():
            path.write_bytes(content)
    except OSError as error:
        raise click.UsageError(f"{error.filename or folder} cannot be written: {error.strerror}.") from error
    written = [str(path) for path in targets]
    emit(as_json, {"written": written}, "\n".join(written))
