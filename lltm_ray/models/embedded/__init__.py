"""Models that the package ships; README.md beside this file is their card."""

from __future__ import annotations

from pathlib import Path
from typing import Final

EMBEDDED: Final = ("tiny", "tiny-draft")
"""`tiny` talks; `tiny-draft` drafts for it (speculative decoding)."""


def embedded_path(name: str) -> Path:
    """The GGUF file of one of `EMBEDDED`."""
    return Path(__file__).with_name(f"{name}.gguf")
