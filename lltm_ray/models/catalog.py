"""The curated models of `catalog.toml`, by short name."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from lltm_ray.config import build
from lltm_ray.errors import ConfigError

KINDS = ("chat", "embedding", "reranker")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", re.ASCII)
_SHA256 = re.compile(r"([0-9a-f]{64})?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One model of the catalogue; `catalog.toml`'s header says what each field holds."""

    name: str
    repo: str
    file: str
    licence: str
    parameters: int
    architecture: str
    context: int
    """Tokens it was trained for."""
    kind: str = "chat"
    revision: str = ""
    """Commit or tag; empty: not pinned."""
    sha256: str = ""
    """Of the file, in hexadecimal; empty: not pinned."""

    def __post_init__(self) -> None:
        checks = {
            "name": bool(_NAME.match(self.name)),
            "repo": bool(_REPO.match(self.repo)),
            "file": self.file.endswith(".gguf") and "/" not in self.file,
            "licence": bool(self.licence),
            "parameters": self.parameters > 0,
            "architecture": bool(self.architecture),
            "context": self.context > 0,
            "kind": self.kind in KINDS,
            "sha256": bool(_SHA256.match(self.sha256)),
        }
        for field, good in checks.items():
            if not good:
                raise ConfigError(field, getattr(self, field), "not usable in the catalogue")


@cache
def load_catalog() -> Mapping[str, CatalogEntry]:
    """All entries by name, in the file's order.

    Raises:
        ConfigError: an entry is wrong; names it and the field.
    """
    return parse_catalog(resources.files("lltm_ray.models").joinpath("catalog.toml").read_text(encoding="utf-8"))


def parse_catalog(text: str) -> Mapping[str, CatalogEntry]:
    """Read the TOML of a catalogue; errors as `load_catalog`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("catalog", text[:80], f"is not TOML: {error}") from error
    entries = {}
    for name, fields in raw.items():
        if not isinstance(fields, dict):
            raise ConfigError(name, fields, "must be a table")
        entries[name] = build(CatalogEntry, {**fields, "name": name}, f"{name}.")
    return MappingProxyType(entries)
