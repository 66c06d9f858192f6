"""Files that nobody else should read: written whole or not at all, and those of API keys."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lltm_ray.errors import ConfigError


def write_private(path: str | os.PathLike[str], text: str) -> None:
    """Put a new file of mode 0600 in the place of `path`; of a link the link is replaced, not what it leads to.

    Raises:
        OSError: the folder takes no file, or something else than a file or link is there.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_symlink():
        raise OSError(f"{target} is no file")
    fresh, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}")
    try:
        with os.fdopen(fresh, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink()
        raise


def read_keys(path: str | os.PathLike[str]) -> list[str]:
    """`KEY [TENANT]` lines of the gateway's key file, without blank ones and those that start with `#`.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    field, remedy = "gateway.api_key_file", "write one API key a line into it"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # Windows editors put a byte order mark first
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be read: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(field, str(path), f"line {line} is no UTF-8 text; {remedy}") from error
    keys = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(field, str(path), "holds no key; write one a line")
    return keys
