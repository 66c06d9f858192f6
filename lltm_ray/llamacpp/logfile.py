"""A server's log: the child appends to it, we keep it small and read its end.

Rotation copies the file aside and truncates it in place: the child's descriptor is in append mode, so it goes on at the
start, and no pipe has to be drained for the server to live.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 8 * 2**20
_DOTS = re.compile(rb"^\.+", re.MULTILINE)
_REMEDIES = {
    "does not support split buffers": "this llama-server has no row split; use split_mode='layer' or 'tensor'",
    "SPLIT_MODE_TENSOR not implemented": "llama.cpp has no tensor split for this model; use split_mode='layer'",
    "SPLIT_MODE_TENSOR and KV cache quantization not": "split_mode='tensor' needs cache types f16, bf16 or f32",
}
"""What llama.cpp says as it gives up, and what helps."""


class LogFile:
    """`<name>.log` and, after rotation, `<name>.log.1`."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._start = 0

    def open(self) -> BinaryIO:
        """Open for a new child; its lines count as the present run's from here on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stream = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
        self._start = stream.seek(0, os.SEEK_END)
        return stream

    def rotate(self) -> bool:
        """Move the content aside when the file has grown too large."""
        if not self.path.exists() or self.path.stat().st_size <= self._max_bytes:
            return False
        shutil.copyfile(self.path, f"{self.path}.1")
        os.truncate(self.path, 0)
        self._start = 0
        return True

    def tail(self, max_bytes: int = 4096) -> str:
        """The end of the present run's lines, whole lines only."""
        data = self._read(max_bytes)
        if len(data) == max_bytes:
            data = data.partition(b"\n")[2]
        return data.decode("utf-8", "replace").strip()

    def remedy(self) -> str:
        """For what the present run's last lines say; empty where none is known."""
        told = self.tail()
        return next((remedy for words, remedy in _REMEDIES.items() if words in told), "")

    def load_progress(self) -> float | None:
        """Loaded share of the weights, 0..1: llama.cpp writes a hundred dots on one line while it loads."""
        lines: list[bytes] = _DOTS.findall(self._read(65_536))
        return min(1.0, len(lines[-1]) / 100) if lines else None

    def _read(self, max_bytes: int) -> bytes:
        try:
            with self.path.open("rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(min(self._start, end), end - max_bytes))
                return stream.read()
        except FileNotFoundError:
            return b""
