"""How commands speak: results on stdout, progress and errors on stderr, so that pipes carry only results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lltm_ray.errors import ConfigError, LltmRayError
from lltm_ray.models.resolve import DEMONSTRATIONS

PIPE_WIDTH = 200
"""Columns where nobody looks at a terminal: lines are for programs and files then, and paths must stay whole."""
KEY_REMEDY = "give one of the gateway's keys with --api-key-file"
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
ERR = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
KeyFileOption = Annotated[
    Path | None, typer.Option(help="File whose first line is the API key to send.", show_default="no key")
]

ProgressCallback = Callable[[str, int, int | None], None]
"""`(name, done, total)`; total is None (or 0) while unknown."""


def fail(error: LltmRayError) -> NoReturn:
    """Say the error in one sentence and end: exit code 2 where the user's input is wrong (ConfigError), else 1."""
    print_error(error)
    raise typer.Exit(2 if isinstance(error, ConfigError) else 1)


def print_error(error: LltmRayError) -> None:
    """The error in one sentence, with the remedy where an endpoint wants a key that it did not get."""
    remedy = f"; {KEY_REMEDY}" if error.http_status == HTTPStatus.UNAUTHORIZED else ""
    ERR.print(f"[bold red]error:[/] {escape(error.message + remedy)}", soft_wrap=True)


@contextmanager
def errors_end_the_command() -> Iterator[None]:
    """Around a command's body: our own errors become a sentence and an exit code, others stay tracebacks."""
    try:
        yield
    except LltmRayError as error:
        fail(error)


def print_json(value: Any) -> None:
    """A value, or a dataclass, as indented JSON that no terminal width wraps."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table; numbers are set to the right, None is a dash. Text is shown as it is, without markup."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    cells = [list(row) for row in rows]
    for position, column in enumerate(columns):
        values = [row[position] for row in cells if row[position] is not None]
        numeric = bool(values) and all(isinstance(value, int | float) for value in values)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=position == 0)
    for row in cells:
        table.add_row(*(escape(shown(value)) for value in row))
    OUT.print(table)


def tell_if_demonstration(*models: str) -> None:
    """Say it once, where a person sees it, of models whose answers are not to be relied on."""
    for model in sorted(set(models) & set(DEMONSTRATIONS)):
        ERR.print(f"{model} is {DEMONSTRATIONS[model]}", style="dim", markup=False)


def shown(value: Any) -> str:
    """One cell: a dash for None, thousands separators, three digits for small fractions."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def human_bytes(count: float) -> str:
    """Bytes in binary units, e.g. `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextmanager
def progress_bar(*, unit: str = "bytes") -> Iterator[ProgressCallback]:
    """A bar on stderr for each name it hears of; yields the callback that moves it."""
    tasks: dict[str, TaskID] = {}
    amount = "{task.fields[amount]}"
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(amount), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True) as progress:

        def moved(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(escape(name), amount="")
            words = [human_bytes(part) if unit == "bytes" else f"{part:,} {unit}" for part in (done, total) if part]
            progress.update(tasks[name], completed=done, total=total or None, amount=" of ".join(words))

        yield moved


def read_key(path: Path | None) -> str:
    """The first line of an API key file; empty without a file.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if path is None:
        return ""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", str(path), f"cannot be read: {error}") from error
    if not lines:
        raise ConfigError("api_key_file", str(path), "is empty; put the key on its first line")
    return lines[0]
