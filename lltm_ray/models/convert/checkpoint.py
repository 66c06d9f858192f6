"""A checkpoint's folder: `config.json` and safetensors files, read without trusting them and without PyTorch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ModelFormatError, ModelNotFoundError

_HEADER_LIMIT_BYTES = 100 * 2**20
"""The format's own limit (safetensors' MAX_HEADER_SIZE)."""
_JSON_LIMIT_BYTES = 64 * 2**20
_INDEX = "model.safetensors.index.json"
_MAX_DIMENSIONS = 4
"""GGUF's own limit (GGML_MAX_DIMS)."""
_MAX_NUMBERS = 2**60
"""NumPy counts the bytes of an array in 63 bits, without the dimensions that are 0."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors' type -> how NumPy sees it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    dtype: str
    """`F64|F32|F16|BF16`, or another that cannot be read here."""
    shape: tuple[int, ...]
    path: str
    offset_bytes: int

    def read(self) -> npt.NDArray[Any]:
        """Its numbers, in its shape: float16 as it is, everything else as float32.

        Raises:
            ModelFormatError: a type that holds no plain numbers (8-bit and packed checkpoints).
        """
        kind = _TYPES.get(self.dtype)
        if kind is None:
            why = f"{self.name} has type {self.dtype}; convert from an unquantized checkpoint (F32, F16 or BF16)"
            raise ModelFormatError(self.path, self.offset_bytes, why)
        if not math.prod(self.shape):
            return np.zeros(self.shape, np.float32)
        stored = np.memmap(self.path, kind, "r", self.offset_bytes, self.shape)
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return np.array(stored) if self.dtype == "F16" else np.asarray(stored, np.float32)


class Checkpoint:
    """A folder with a model as Hugging Face keeps it.

    Args:
        folder: holds `config.json`, and `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        ModelNotFoundError: something of it is missing.
        ModelFormatError: something of it is damaged, or not what it should be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        config = self.json("config.json")
        if config is None:
            raise ModelNotFoundError(str(folder), "it has no config.json; give the folder of a checkpoint")
        self.config: dict[str, Any] = config | (config.get("text_config") or {})
        self.architecture = next(iter(config.get("architectures") or []), "")
        self.tensors = {tensor.name: tensor for path in self._files() for tensor in read_header(path)}
        self._check_index()

    def json(self, name: str) -> dict[str, Any] | None:
        """One of its JSON files; None where it has none of that name.

        Raises:
            ModelFormatError: it is no JSON object.
        """
        found = self._load(name)
        if found is not None and not isinstance(found, dict):
            raise ModelFormatError(str(self.folder / name), 0, "must hold a JSON object")
        return found

    def json_list(self, name: str) -> list[Any]:
        """One of its JSON files that hold a list; empty where it has none of that name.

        Raises:
            ModelFormatError: it is no JSON list.
        """
        found = self._load(name)
        if found is not None and not isinstance(found, list):
            raise ModelFormatError(str(self.folder / name), 0, "must hold a JSON list")
        return found or []

    def _load(self, name: str) -> Any:
        path = self.folder / name
        try:
            if path.stat().st_size > _JSON_LIMIT_BYTES:
                raise ModelFormatError(str(path), 0, f"is larger than {_JSON_LIMIT_BYTES} bytes")
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFormatError(str(path), 0, f"cannot be read: {error}") from error

    def _files(self) -> list[Path]:
        index = self.json(_INDEX)
        names = {"model.safetensors"} if index is None else set((index.get("weight_map") or {}).values())
        if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ModelFormatError(str(self.folder / _INDEX), 0, f"names {wrong[0]!r}")
        paths = [self.folder / name for name in sorted(names)]
        if missing := [path.name for path in paths if not path.is_file()] or (
            ["model.safetensors"] if not paths else []
        ):
            raise ModelNotFoundError(str(self.folder), f"it lacks {', '.join(missing[:5])}")
        return paths

    def _check_index(self) -> None:
        weight_map = (self.json(_INDEX) or {}).get("weight_map") or {}
        for name, file in weight_map.items():
            found = self.tensors.get(name)
            if found is None or Path(found.path).name != file:
                raise ModelFormatError(str(self.folder / _INDEX), 0, f"{file} lacks {name[:80]!r}; fetch it again")


def read_header(path: Path) -> list[StoredTensor]:
    """All tensors of one safetensors file; none reaches beyond it.

    Raises:
        ModelFormatError: truncated, damaged or hostile.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT_BYTES, size - 8):
            raise ModelFormatError(str(path), 0, f"its header of {length} bytes is not one of safetensors")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        listed = [item for item in header.items() if item[0] != "__metadata__"]
        return [_stored(str(path), name, meta, 8 + length, size) for name, meta in listed]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFormatError(str(path), 8, f"its header cannot be read: {error!r}") from error


def _stored(path: str, name: str, meta: dict[str, Any], start: int, size: int) -> StoredTensor:
    shape, (begin, end) = tuple(meta["shape"]), meta["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or not begin <= end <= size - start:
        raise ModelFormatError(path, 8, f"{name[:80]!r} lies outside of the file")
    if len(shape) > _MAX_DIMENSIONS or math.prod(size for size in shape if size) >= _MAX_NUMBERS:
        raise ModelFormatError(path, 8, f"{name[:80]!r} has a shape that no tensor has: {str(shape)[:80]}")
    kind = _TYPES.get(meta["dtype"])
    if kind is not None and math.prod(shape) * np.dtype(kind).itemsize != end - begin:
        raise ModelFormatError(path, 8, f"{name[:80]!r} has another size than its shape {shape}")
    return StoredTensor(name, str(meta["dtype"]), shape, path, start + begin)
