"""deploy: write the files that come with the package for the programs around a cluster.

Owns: which files of `kvstore/deploy` are written, and that nothing of a person's is replaced without being asked.
Leaves to others: what the files say.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from kvstore.cli.frame import emit

_SOURCE = files("kvstore") / "deploy"
FILES = tuple(sorted(entry.name for entry in _SOURCE.iterdir() if entry.is_file() and entry.name != "README.md"))


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace files of these names that are there.")
@click.option("--json", "as_json", is_flag=True, help='Print {"written":[FILE,…]} for programs.')
def deploy(folder: Path, force: bool, as_json: bool) -> None:
    """Write the files that come with kvstore into DIR: for Prometheus, Grafana, nginx and HAProxy.

    If one of that name is there already, nothing is written and the exit code is 2, unless --force is given.

    \b
    Example:
      kvstore deploy monitoring
    """
    targets = {folder / name: (_SOURCE / name).read_bytes() for name in FILES}
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
