"""The only place that catches ImportError: optional packages are reached through `load`."""

from __future__ import annotations

import importlib
from typing import Any

from lltm_ray.errors import MissingExtraError


def load(target: str, *, extra: str = "", install: str = "", feature: str = "") -> Any:
    """Import `package.module` or `package.module:name`.

    Args:
        target: what to import.
        extra: the extra of this package that installs it, or
        install: the command that does.
        feature: what the user wanted, for the error; the target by default.

    Raises:
        MissingExtraError: the package is not installed. A package that is installed but broken raises its own error.
    """
    module, _, name = target.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not _is_absent(error.name, module):
            raise
        raise MissingExtraError(feature or target, extra, install) from error
    return getattr(loaded, name) if name else loaded


def _is_absent(missing: str | None, module: str) -> bool:
    """Whether `missing` is the package asked for (or one that our own adapter imports), not one deep inside it."""
    top = module.partition(".")[0]
    return missing is not None and (missing.partition(".")[0] == top or top == "lltm_ray")
