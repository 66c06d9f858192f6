"""Which launch settings are fastest on this device: measured once, kept on disk.

One JSON file holds the choices of all devices, keyed by kernel, device, compute capability, shape class and element
type. It is replaced whole (write aside, then rename), so that processes that tune at once never leave half a file: the
last writer's merge stands, and what is lost is measured again. Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lltm_ray.errors import ConfigError

Settings = Mapping[str, int]
FILE = "kernel-settings.json"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningKey:
    """What a choice holds for."""

    kernel: str
    device: str
    compute_capability: tuple[int, int]
    shape_class: tuple[int, ...]
    dtype: str

    def text(self) -> str:
        """The key as the file spells it."""
        major, minor = self.compute_capability
        shape = "x".join(map(str, self.shape_class))
        return "|".join((self.kernel, self.device, f"{major}.{minor}", shape, self.dtype))


def shape_class(*sizes: int) -> tuple[int, ...]:
    """Sizes rounded up to powers of two: shapes of one class share their settings."""
    return tuple(0 if size <= 0 else 1 << (size - 1).bit_length() for size in sizes)


class Tuner:
    """Chooses settings and remembers them in `folder`, which is made when the first choice is written.

    Safe to share between threads; one of them measures at a time.

    Args:
        folder: where the file lies, or None to remember in this process only.
        limit: most choices kept; the oldest go first.
    """

    def __init__(self, folder: Path | str | None = None, *, limit: int = 512) -> None:
        if limit < 1:
            raise ConfigError("limit", limit, "must be at least 1")
        self.path = None if folder is None else Path(folder) / FILE
        self._limit = limit
        self._lock = threading.Lock()
        self._chosen: dict[str, dict[str, int]] = self._read()

    def __len__(self) -> int:
        return len(self._chosen)

    def choose(self, key: TuningKey, candidates: Sequence[Settings], measure: Callable[[Settings], float]) -> Settings:
        """The fastest of `candidates`: remembered, or measured now.

        Args:
            key: what the choice holds for.
            candidates: at least one; a remembered choice that is no longer among them is measured anew.
            measure: seconds that a candidate takes; infinity where it cannot run.

        Raises:
            ConfigError: no candidates, or none of them can run.
        """
        if not candidates:
            raise ConfigError("candidates", candidates, f"{key.kernel} needs at least one")
        name = key.text()
        with self._lock:
            if (known := self.remembered(key, candidates)) is not None:
                return known
            seconds, best = min(((measure(each), each) for each in candidates), key=lambda pair: pair[0])
            if not math.isfinite(seconds):
                raise ConfigError("candidates", candidates, f"none of them runs {key.kernel} on {key.device}")
            self._keep(name, dict(best))
            return best

    def remembered(self, key: TuningKey, candidates: Sequence[Settings]) -> Settings | None:
        """The choice for `key` if there is one among `candidates`; measures nothing."""
        known = self._chosen.get(key.text())
        return known if known in candidates else None

    def _keep(self, name: str, settings: dict[str, int]) -> None:
        merged = {**self._read(), **self._chosen}
        merged.pop(name, None)
        merged[name] = settings
        self._chosen = dict(list(merged.items())[-self._limit :])
        if self.path is not None:
            _replace(self.path, json.dumps({"version": _VERSION, "chosen": self._chosen}, indent=1))

    def _read(self) -> dict[str, dict[str, int]]:
        """What the file holds; nothing where it is missing, damaged or of another version: it can be measured again."""
        if self.path is None or not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        chosen = found.get("chosen") if isinstance(found, dict) and found.get("version") == _VERSION else None
        if not isinstance(chosen, dict):
            return {}
        return {key: value for key, value in chosen.items() if _is_settings(value)}


def _is_settings(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) is int for number in value.values())


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)
