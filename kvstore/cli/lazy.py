"""Commands that are imported when they are called (https://click.palletsprojects.com/en/stable/complex/#lazy-loading).

Owns: finding a command by name without importing its neighbours; the overview in `--help`.
Promises: `--help` of a group imports nothing: the summaries stand in the table.
Leaves to others: which commands there are (`kvstore.cli`).
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem


class LazyCommand(NamedTuple):
    """`target` is `module:attribute`; `summary` the line in the group's help."""

    target: str
    summary: str

    def load(self) -> click.Command:
        """Import the command. Raises TypeError if the target is none."""
        module, _, attribute = self.target.partition(":")
        gc.disable()  # modules stay: to look for garbage among them again and again slows the start
        try:
            command = getattr(importlib.import_module(module), attribute)
        finally:
            gc.enable()
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.target} is no click command")
        return command


class LazyGroup(click.Group):
    """A group whose commands are named in a table, in the order of its help."""

    def __init__(self, name: str, *, lazy: Mapping[str, LazyCommand | click.Command], **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of the help."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None if there is none."""
        command = self._lazy.get(cmd_name)
        return command.load() if isinstance(command, LazyCommand) else command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; a misspelt name is answered with the nearest one. Raises click.UsageError."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if near := get_close_matches(args[0], self._lazy, 1):
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None
            raise

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names that begin so. Click would load every command for its help, which takes longer than a person waits."""
        commands = [
            CompletionItem(name, help=_summary(command))
            for name, command in self._lazy.items()
            if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(command)) for name, command in self._lazy.items()])


def _summary(command: LazyCommand | click.Command) -> str:
    return command.summary if isinstance(command, LazyCommand) else command.get_short_help_str()
