"""The command line: one file a command, typer and rich; results on stdout, progress and errors on stderr."""

from __future__ import annotations

import difflib
import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lltm_ray import __version__

COMMANDS = {
    "demo": "demo:demo",
    "up": "up:up",
    "status": "status:status",
    "top": "top:top",
    "drain": "drain:drain",
    "adapters": "adapters:adapters",
    "down": "status:down",
    "chat": "chat:chat",
    "sessions": "sessions:app",
    "bench": "bench:bench",
    "tune": "tune:tune",
    "explain": "explain:explain",
    "report": "report:report",
    "query": "query:query",
    "extract": "extract:extract",
    "replay": "replay:replay",
    "models": "models:app",
    "gpus": "gpus:gpus",
    "plan": "plan:plan",
    "collectives": "collectives:collectives",
    "doctor": "doctor:doctor",
}
"""Loaded when used: `lltm-ray chat` must not pay for importing Ray."""


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _load(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and (near := difflib.get_close_matches(args[0], COMMANDS)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {', '.join(map(repr, near))}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lltm_ray {__version__}")
        raise typer.Exit


@app.callback()
def lltm_ray(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """A fleet of llama.cpp servers on Ray: one engine per GPU share, behind one OpenAI-compatible endpoint."""


def _load(name: str) -> Any:
    module, _, target = COMMANDS[name].partition(":")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), target)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(name)(found)
        found = single
    command = typer.main.get_command(found)
    command.name = name
    return command


def main() -> None:
    """Entry point of `lltm-ray`."""
    app(prog_name="lltm-ray")
