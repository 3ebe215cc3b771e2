"""What the command lines of the benchmarks share: options, how a run is ended early, what is written where.

Promises: what was started is ended by Ctrl-C and SIGTERM, too; what goes wrong is one line for people.
Leaves to others: what is measured (loadtest/compare.py, reshard.py, peak.py).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import click
import msgspec

from kvstore.errors import KvError
from loadtest.cluster.local import REPOSITORY

Result = TypeVar("Result")


class Several(click.ParamType):  # type: ignore[type-arg]
    """The type of an option that is a list of `kind`, separated by commas, each once."""

    name = "list"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """As that of a ParamType; what was converted already stays as it is."""
        if not isinstance(value, str):
            return list(value)
        return list(dict.fromkeys(self._kind.convert(part.strip(), param, ctx) for part in value.split(",")))


rounds = click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Figures are medians.")
json_file = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there."
)
folder = click.option(
    "--tmp",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=REPOSITORY / "loadtest" / "out",
    help="Data of all systems go into a folder below this one, on its disk.  [default: loadtest/out]",
)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run it to its end. Raises ClickException for what goes wrong, and when it is interrupted."""

    async def ended_by_signals() -> Result:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(ended_by_signals())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise click.ClickException("interrupted; everything that was started has been ended") from None
    except (aiohttp.ClientError, KvError, OSError, RuntimeError, TimeoutError) as error:
        raise click.ClickException(str(error) or "it took too long") from error


def in_turn(systems: Sequence[Result], number: int) -> list[Result]:
    """Another one goes first in each round: none always follows the same one."""
    first = (number - 1) % len(systems) if systems else 0
    return [*systems[first:], *systems[:first]]


def write_json(path: Path | None, document: dict[str, Any]) -> None:
    """Write all figures there, if a file was named."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")


def tell(line: str) -> None:
    """How far it is, beside the report."""
    click.echo(line, err=True)
