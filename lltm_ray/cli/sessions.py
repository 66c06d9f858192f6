"""`lltm-ray sessions`: conversations that are kept under a name, with their KV caches."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lltm_ray._files import write_private
from lltm_ray.actors.sessions import SessionInfo, Sessions
from lltm_ray.cli._endpoint import NameOption, UrlOption, endpoint_of
from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    KeyFileOption,
    errors_end_the_command,
    human_bytes,
    print_json,
    print_table,
    read_key,
)
from lltm_ray.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
"""Keep conversations under names and go on with them after any restart."""

_Session = Annotated[str, typer.Argument(metavar="SESSION", help="The session's name.")]
_To = Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")]
_Messages = Annotated[
    Path | None,
    typer.Option("--messages", help="JSON: a list of messages, or what Conversation.save wrote.", show_default="stdin"),
]
_Model = Annotated[str, typer.Option(help="Served model name.", show_default="the fleet's first")]
_NoText = Annotated[
    bool, typer.Option("--no-text", help="The messages are not kept; the cache file still holds the tokens.")
]
_Out = Annotated[
    Path | None, typer.Option("--out", help="Write its messages there, as --messages takes them; `-`: standard output.")
]


@app.callback()
def sessions() -> None:
    """Conversations kept under a name, with their KV caches: they outlive the fleet and the machine's reboot."""


@app.command("list")
@errors_end_the_command()
def list_sessions(
    *, url: UrlOption = "", name: NameOption = "default", api_key_file: KeyFileOption = None, as_json: JsonFlag = False
) -> None:
    """Show the sessions that the key may see, the one used last first."""
    listed = _reach(url, name, api_key_file).list()
    if as_json:
        print_json([_plain(info) for info in listed])
        return
    rows = [_row(info) for info in listed]
    print_table(("session", "model", "messages", "tokens", "size", "used", "restores"), rows)
    for info in listed:
        if info.why:
            OUT.print(f"{info.name}: nothing is restored: {info.why}", markup=False, soft_wrap=True)


@app.command()
@errors_end_the_command()
def save(
    session: _Session,
    *,
    messages: _Messages = None,
    model: _Model = "",
    no_text: _NoText = False,
    url: UrlOption = "",
    name: NameOption = "default",
    api_key_file: KeyFileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep a conversation and its KV cache, computed now where no engine holds it; replaces what had the name."""
    info = _reach(url, name, api_key_file).save(session, _read(messages), model=model, keep_text=not no_text)
    _tell(info, as_json=as_json)


@app.command()
@errors_end_the_command()
def restore(
    session: _Session,
    *,
    out: _Out = None,
    url: UrlOption = "",
    name: NameOption = "default",
    api_key_file: KeyFileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring a session's KV cache into a slot now; requests with `x-lltm-session: SESSION` do it by themselves."""
    reached = _reach(url, name, api_key_file)
    if out is not None:
        text = json.dumps(list(reached.get(session).messages), ensure_ascii=False, indent=1) + "\n"
        _write(out, text)
    info = reached.restore(session)
    if out is None or out != Path("-"):
        _tell(info, as_json=as_json)
    elif info.why:
        _say_why(info)


@app.command()
@errors_end_the_command()
def delete(
    session: _Session, *, url: UrlOption = "", name: NameOption = "default", api_key_file: KeyFileOption = None
) -> None:
    """Remove a session from disk."""
    _reach(url, name, api_key_file).delete(session)
    OUT.print(f"{session} is deleted", markup=False)


@app.command()
@errors_end_the_command()
def rename(
    session: _Session, to: _To, *, url: UrlOption = "", name: NameOption = "default", api_key_file: KeyFileOption = None
) -> None:
    """Give a session another name."""
    _reach(url, name, api_key_file).rename(session, to)
    OUT.print(f"{session} is {to} now", markup=False)


def _reach(url: str, name: str, api_key_file: Path | None) -> Sessions:
    return Sessions(endpoint_of(url, name), api_key=read_key(api_key_file))


def _read(path: Path | None) -> list[dict[str, Any]]:
    shown = str(path or "stdin")
    try:
        given = json.loads(sys.stdin.read() if path is None else path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("messages", shown, "no such file") from error
    except OSError as error:
        raise ConfigError("messages", shown, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("messages", shown, f"is no JSON that can be read: {error}") from error
    if isinstance(given, dict):
        system = given.get("system")
        given = [*([{"role": "system", "content": system}] if system else []), *(given.get("messages") or [])]
    if not isinstance(given, list) or not given:
        raise ConfigError("messages", shown, 'must be a list of messages, or {"system", "messages"}')
    return given


def _write(out: Path, text: str) -> None:
    if out == Path("-"):
        typer.echo(text, nl=False)
        return
    try:
        write_private(out, text)
    except OSError as error:
        raise ConfigError("out", str(out), f"cannot be written: {error}") from error


def _tell(info: SessionInfo, *, as_json: bool) -> None:
    if as_json:
        print_json(_plain(info))
        return
    print_table(
        ("session", "tokens", "size", "cached", "computed"),
        [(info.name, info.tokens, human_bytes(info.size_bytes), info.cached_tokens, info.computed_tokens)],
    )
    if info.why:
        _say_why(info)


def _say_why(info: SessionInfo) -> None:
    ERR.print(f"nothing is restored: {info.why}", markup=False)


def _plain(info: SessionInfo) -> dict[str, Any]:
    hidden = ("messages", "fields")
    return {name: getattr(info, name) for name in info.__slots__ if name not in hidden}


def _row(info: SessionInfo) -> tuple[Any, ...]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used_unix_s))
    return info.name, info.model, info.message_count, info.tokens, human_bytes(info.size_bytes), used, not info.why
