"""Importance matrices: what `llama-imatrix` writes, as `llama-quantize` reads it.

Sources: llama.cpp's common/imatrix-loader.cpp (`common_imatrix_load`) and tools/quantize/quantize.cpp (`load_imatrix`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError, ModelFormatError, ModelNotFoundError
from lltm_ray.models.gguf_header import Header, HeaderReader, LazyValue, TensorInfo

Floats = npt.NDArray[np.float32]
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """How much each column of each tensor matters: the mean of its squared inputs."""

    path: str
    dataset: str
    """The first text that it was computed on; empty if the file does not say."""
    n_chunks: int
    weights: Mapping[str, Floats] = field(repr=False)
    """Tensor name -> float32 [n_columns], or [n_experts * n_columns]."""


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read a matrix in GGUF format.

    Raises:
        ModelNotFoundError: no such file.
        ModelFormatError: it is no matrix, damaged, or holds numbers that are not finite.
        ConfigError: it is in the old format.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            if file.read(4) != b"GGUF":
                why = "is no GGUF file; llama-imatrix --in-file OLD -o NEW.gguf turns an old .dat into one"
                raise ConfigError("imatrix", name, why)
            file.seek(0)
            header = HeaderReader(file, name, os.fstat(file.fileno()).st_size).read()
            return _read(file, name, header)
    except OSError as error:
        raise ModelNotFoundError(name, f"it cannot be read: {error.strerror}") from error


def _read(file: BinaryIO, path: str, header: Header) -> Imatrix:
    missing = [key for key in _KEYS if key not in header.metadata]
    tensors = {each.name: each for each in header.tensors}
    names = sorted(name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2"))
    if missing or not names:
        raise ModelFormatError(path, 0, f"is no importance matrix: it lacks {', '.join(missing) or 'any sums'}")
    n_chunks = header.metadata["imatrix.chunk_count"]
    return Imatrix(
        path=path,
        dataset=_first_text(file, header.metadata["imatrix.datasets"]),
        n_chunks=n_chunks if isinstance(n_chunks, int) else 0,
        weights={name: _weights(file, path, tensors, name) for name in names},
    )


def _weights(file: BinaryIO, path: str, tensors: Mapping[str, TensorInfo], name: str) -> Floats:
    """Sums over counts, one count an expert; ones for an expert that no token reached."""
    sums = _floats(file, path, tensors, f"{name}.in_sum2")
    counts = _floats(file, path, tensors, f"{name}.counts")
    if sums.size % counts.size:
        raise ModelFormatError(path, 0, f"{name}: {sums.size} sums for {counts.size} counts")
    whole = np.floor(np.abs(counts) + 0.5) * np.sign(counts)  # lround
    sums = sums.reshape(counts.size, -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        means = np.where(whole[:, None] > 0, sums / whole[:, None], np.float32(1)).astype(np.float32)
    if not np.isfinite(means).all():
        raise ModelFormatError(path, 0, f"{name}: numbers that are not finite; compute the matrix anew")
    return means.reshape(-1)


def _floats(file: BinaryIO, path: str, tensors: Mapping[str, TensorInfo], name: str) -> Floats:
    info = tensors.get(name)
    if info is None or info.type != "F32" or not info.n_elements:
        raise ModelFormatError(path, 0, f"{name} is missing, or not F32")
    file.seek(info.offset_bytes)
    return np.frombuffer(file.read(info.nbytes), np.float32)


def _first_text(file: BinaryIO, value: object) -> str:
    if not isinstance(value, LazyValue) or value.kind != "string" or not value.count:
        return ""
    file.seek(value.offset_bytes)
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(min(length, 4096)).decode(errors="replace")


def metadata_of(imatrix: Imatrix) -> dict[str, str | int]:
    """What a file says of the matrix that it was made with; llama-quantize keeps 127 bytes of a text."""
    said: dict[str, str | int] = {"quantize.imatrix.file": _short(os.fspath(Path(imatrix.path)))}
    if imatrix.dataset:
        said["quantize.imatrix.dataset"] = _short(imatrix.dataset)
    said["quantize.imatrix.entries_count"] = len(imatrix.weights)
    if imatrix.n_chunks > 0:
        said["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return said


def _short(text: str) -> str:
    return text.encode()[:127].decode(errors="ignore")
