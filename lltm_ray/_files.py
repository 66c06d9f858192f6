"""Files that nobody else may read, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
