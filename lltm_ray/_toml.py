"""Settings out of TOML: paths meant from the file's folder, and errors that name the file; `config` is who asks."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lltm_ray._settings import has, merge
from lltm_ray.errors import ConfigError

T = TypeVar("T")
_PATHS = frozenset(
    {
        *("api_key_file", "llama_server", "log_dir", "mmproj", "model", "model_draft", "path", "segment_dir"),
        *("slot_save_path", "trace"),
    }
)
"""Settings that hold paths, in whichever table they stand."""
_HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z_][\w.-]*)\s*\]\]?\s*(?:#.*)?$")
_AT_LINE = re.compile(r"at line (\d+)")


def read_toml(make: Callable[[Mapping[str, Any]], T], path: str | os.PathLike[str], over: Mapping[str, Any]) -> T:
    """Settings of a file.

    Args:
        make: makes them of plain data.
        path: the file.
        over: fields that win over the file; nested ones as dictionaries.

    Raises:
        ConfigError: as `make`, with the file's name; it is not TOML or cannot be read.
    """
    raw = anchored(_parse(path), Path(path).absolute().parent)
    try:
        return make(merge(raw, over))
    except ConfigError as error:
        if not has(over, error.field):
            told = " (with what is given over it)" if over and _is_fine(make, raw) else ""
            raise ConfigError(f"{path}: {error.field}", error.value, error.why + told) from error.__cause__
        raise ConfigError(error.field, error.value, f"{error.why} (over {path})") from error.__cause__


def _parse(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"cannot be read: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        told = _AT_LINE.search(str(error))
        lines = text.rstrip().split("\n")[: int(told[1]) if told else None]
        why = f"is no TOML{_table(lines)}: {error}; texts stand in quotes, each name once in its table"
        raise ConfigError(f"{path}: line {len(lines)}", lines[-1].strip(), why) from error


def _table(lines: list[str]) -> str:
    """Where the last of these lines is, such as ` in models[1]`; empty at the top level."""
    headers = [found.groups() for line in lines if (found := _HEADER.match(line))]
    if not headers:
        return ""
    mark, name = headers[-1]
    return f" in {name}" if mark == "[" else f" in {name}[{headers.count(headers[-1]) - 1}]"


def _is_fine(make: Callable[[Mapping[str, Any]], Any], raw: Mapping[str, Any]) -> bool:
    try:
        make(raw)
    except ConfigError:
        return False
    return True


def anchored(settings: Any, folder: Path) -> Any:
    """Plain settings with every relative path made absolute from `folder`: actors run in another one."""
    if isinstance(settings, Mapping):
        return {
            name: _absolute(name, value, folder)
            if name in _PATHS and isinstance(value, str)
            else anchored(value, folder)
            for name, value in settings.items()
        }
    return [anchored(each, folder) for each in settings] if isinstance(settings, list | tuple) else settings


def _absolute(name: str, value: str, folder: Path) -> str:
    """`value`, unless it is a name and no path: of a model that is no file here, or of the embedded engine."""
    path = folder / Path(value).expanduser()
    if name == "llama_server":
        is_path = value != "embedded"
    else:
        is_file = path.is_file() or (value.endswith(".gguf") and ":" not in value)
        is_path = is_file or name not in {"model", "model_draft"}
    return str(path) if is_path else value
