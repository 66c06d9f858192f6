"""Which llama-server to run: the one asked for, one that is installed, one that we downloaded, or the PyPI engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lltm_ray.config import Environment
from lltm_ray.errors import ServerBinaryError

Origin = Literal["explicit", "environment", "path", "cache", "embedded"]
SERVER_NAME = "llama-server"
EMBEDDED = "embedded"
"""Given as a path it asks for the PyPI engine, whatever else is installed; a file of that name is `./embedded`."""
_BUILD = re.compile(r"b(\d+)-")
_VERSION = re.compile(r"^version: *(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerBinary:
    """A server that can be started: `argv` comes before llama-server's own arguments."""

    argv: tuple[str, ...]
    origin: Origin
    path: str
    """The executable; for the embedded engine the Python interpreter."""


def find_server(explicit: str | None, environment: Environment) -> ServerBinary:
    """Choose a llama-server: `explicit`, LLAMA_SERVER_PATH, PATH, our cache's newest build, the embedded engine.

    Args:
        explicit: a path from the settings, or "embedded".
        environment: what `read_environment` found.

    Raises:
        ServerBinaryError: a path was given, by setting or environment, that cannot be run. There is no fall-through:
            whoever names a build wants that build.
    """
    if explicit:
        return _named(explicit, "explicit", "the llama_server setting (--llama-server)")
    if environment.llama_server_path:
        return _named(environment.llama_server_path, "environment", "LLAMA_SERVER_PATH")
    on_path = shutil.which(SERVER_NAME)
    if on_path:
        return _native(Path(on_path).absolute(), "path")
    cached = cached_servers(environment.cache_dir)
    return _native(cached[0], "cache") if cached else _embedded()


def cached_servers(cache_dir: Path) -> list[Path]:
    """Downloaded servers, the highest build number first; of one build the one installed last."""
    found = [path for path in cache_dir.glob(f"engines/*/{SERVER_NAME}") if _is_ours(path)]
    return sorted(found, key=lambda path: (_build_number(path), path.stat().st_mtime), reverse=True)


def server_version(binary: ServerBinary, timeout_s: float = 30.0) -> str:
    """What `--version` says after "version:", e.g. "0.6.0 (build 11433, commit 1a2b3c4)".

    Raises:
        ServerBinaryError: it does not run, does not answer in time, or answers something else.
    """
    command = [*binary.argv, "--version"]
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerBinaryError(f"{binary.path} --version failed: {error}", path=binary.path) from error
    said = (done.stdout + done.stderr).decode(errors="replace")
    line = _VERSION.search(said)
    if done.returncode != 0 or line is None:
        tail = said.strip()[-500:] or "nothing"
        raise ServerBinaryError(
            f"{binary.path} --version ended with exit code {done.returncode} and said: {tail}", path=binary.path
        )
    return line[1].strip()


def _named(text: str, origin: Origin, source: str) -> ServerBinary:
    if text == EMBEDDED:
        return _embedded()
    path = Path(text).expanduser().absolute()
    if not path.exists():
        raise ServerBinaryError(
            f"{source} names {text!r}, which does not exist; correct it, or leave it out to use what is installed",
            path=str(path),
        )
    if not path.is_file() or not os.access(path, os.X_OK):
        why = "is not executable; chmod +x it if you trust it" if path.is_file() else "is not a file"
        raise ServerBinaryError(f"{source} names {text!r}, which {why}", path=str(path))
    return _native(path, origin)


def _native(path: Path, origin: Origin) -> ServerBinary:
    return ServerBinary(argv=(str(path),), origin=origin, path=str(path))


def _embedded() -> ServerBinary:
    argv = (sys.executable, "-m", "lltm_ray.llamacpp.embedded")
    return ServerBinary(argv=argv, origin="embedded", path=sys.executable)


def _is_ours(path: Path) -> bool:
    # A name with a dot in front is an unfinished download.
    return not path.parent.name.startswith(".") and path.is_file() and os.access(path, os.X_OK)


def _build_number(path: Path) -> int:
    build = _BUILD.match(path.parent.name)
    return int(build[1]) if build else -1
