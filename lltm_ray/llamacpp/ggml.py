"""ggml's own block code, out of the PyPI engine's shared library: the only file that calls it.

The wheel `xllamacpp` exports `ggml_quantize_chunk` and what goes with it (not `llama_model_quantize`). The library is
opened by its path, so Python's part of the wheel is not even imported; where it is, both share one handle. ctypes lets
go of the interpreter's lock while C works, so threads run side by side.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError, MissingExtraError

Floats = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]
TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip
"""ggml.h's `ggml_type`."""
_NEED_WEIGHTS = frozenset(("IQ2_XXS", "IQ2_XS", "IQ1_S"))
"""`ggml_quantize_requires_imatrix`: ggml ends the process where these have none."""
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_quantize_chunk": (ctypes.c_size_t, (_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER)),
    "ggml_validate_row_data": (ctypes.c_bool, (_INT, _POINTER, ctypes.c_size_t)),
    "ggml_row_size": (ctypes.c_size_t, (_INT, _LONG)),
    "ggml_type_name": (ctypes.c_char_p, (_INT,)),
    "ggml_version": (ctypes.c_char_p, ()),
}
_PLAIN = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


class Ggml:
    """Decodes and encodes tensors' blocks; may be called by several threads at once."""

    def __init__(self, path: Path) -> None:
        """Open the library.

        Raises:
            MissingExtraError: it does not export what is needed, or its types are others than ours.
        """
        self._library = ctypes.CDLL(str(path))
        try:
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise _no_library(f"{path.name} does not export it: {error}") from error
        for kind, number in TYPES.items():
            name = self._library.ggml_type_name(number)
            if name is None or name.decode().upper() != kind:
                raise _no_library(f"{path.name} calls type {number} {name!r}, not {kind}")

    @property
    def version(self) -> str:
        """Of ggml, e.g. `0.26.0`."""
        return str(self._library.ggml_version().decode())

    def decode(self, raw: bytes, kind: str, n_elements: int) -> Floats:
        """float32 [n_elements] of whole blocks.

        Raises:
            ConfigError: no such type, or the bytes are not those of so many elements.
        """
        self._check(kind, len(raw), n_elements)
        if kind == "F32":
            return np.frombuffer(raw, np.float32)
        name = _PLAIN.get(kind) or f"dequantize_row_{kind.lower().replace('_k', '_K')}"
        function = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _LONG)((name, self._library))
        out = np.empty(n_elements, np.float32)
        source = np.frombuffer(raw, np.uint8)
        function(source.ctypes.data, out.ctypes.data, n_elements)
        return out

    def encode(self, rows: Floats, kind: str, weights: Floats | None = None) -> Raw:
        """Blocks of float32 [n_rows, n_columns], uint8 [bytes].

        Args:
            rows: the numbers.
            kind: the type of the blocks; they must divide a row.
            weights: how much each column matters, float32 [n_columns].

        Raises:
            ConfigError: the type is unknown, needs weights, or does not divide the rows; or weights of another length.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        n_rows, n_columns = rows.shape
        if weights is None and kind in _NEED_WEIGHTS:
            raise ConfigError("type", kind, "needs an importance matrix")
        if weights is not None and weights.shape != (n_columns,):
            raise ConfigError("weights", weights.shape, f"must be one for each of {n_columns} columns")
        out = np.empty(n_rows * self._row_bytes(kind, n_columns), np.uint8)
        given = None if weights is None else np.ascontiguousarray(weights, np.float32)
        at = None if given is None else given.ctypes.data
        self._library.ggml_quantize_chunk(TYPES[kind], rows.ctypes.data, out.ctypes.data, 0, n_rows, n_columns, at)
        return out

    def is_valid(self, raw: bytes | Raw, kind: str) -> bool:
        """Whether all numbers, or the blocks' scales, are finite; whole-number types always are."""
        if kind not in TYPES:
            return True
        data = np.frombuffer(raw, np.uint8)
        return bool(self._library.ggml_validate_row_data(TYPES[kind], data.ctypes.data, data.size))

    def _check(self, kind: str, nbytes: int, n_elements: int) -> None:
        if self._row_bytes(kind, n_elements) != nbytes:
            raise ConfigError("raw", nbytes, f"are not the bytes of {n_elements} elements of {kind}")

    def _row_bytes(self, kind: str, n_elements: int) -> int:
        """Bytes of a row; ggml would end the process for what is refused here."""
        if kind not in TYPES:
            raise ConfigError("type", kind, f"must be one of {', '.join(TYPES)}")
        block = 256 if TYPES[kind] >= 10 and kind not in ("IQ4_NL", "BF16", "MXFP4") else 32
        if kind not in ("F32", "F16", "BF16") and n_elements % block:
            raise ConfigError("n_columns", n_elements, f"are not whole {kind} blocks of {block}")
        return int(self._library.ggml_row_size(TYPES[kind], n_elements))


@cache
def load_ggml() -> Ggml:
    """The PyPI engine's library, opened once.

    Raises:
        MissingExtraError: the wheel is not installed, or is built in another way.
    """
    spec = importlib.util.find_spec("xllamacpp")
    places = spec.submodule_search_locations if spec else None
    found = [path for place in places or () for path in sorted(Path(place).glob("xllamacpp*.so"))]
    if not found:
        raise _no_library("xllamacpp is not here")
    return Ggml(found[0])


def _no_library(why: str) -> MissingExtraError:
    remedy = "pip install xllamacpp, or use llama.cpp's llama-quantize"
    return MissingExtraError(f"ggml's quantization ({why})", "", remedy)
