"""How far two GGUF files of one model lie apart, tensor by tensor: `diff_models`.

Tensors are read in chunks, so memory stays bounded however large the files are. Whoever wants a GPU to decode the
blocks hands `dequantize` in; this module knows NumPy and `gguf` only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError, ModelFormatError
from lltm_ray.models.diff_header import MetadataDiff, diff_headers
from lltm_ray.models.gguf import read_gguf, read_model, shard_paths
from lltm_ray.models.gguf_header import TENSOR_TYPES, TensorInfo

Raw = npt.NDArray[np.uint8]

CHUNK_ELEMENTS = 2**22
"""Elements compared at once; a multiple of every block."""
_PIECE = 2**13
"""Elements that NumPy sums at once: in the cache, and too few for its threads to get into the decoders' way."""
_AHEAD = 2
"""Chunks decoded while one is compared."""
_PLAIN = {"F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
_BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in TENSOR_TYPES.values()}


class Dequantize(Protocol):
    """Raw bytes of a tensor as numbers."""

    def __call__(self, blocks: Raw, kind: str, *, n_elements: int) -> Any:
        """float32 [n_elements], of NumPy or of PyTorch on any device.

        Raises:
            ConfigError: it does not know the GGML type `kind`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDiff:
    """One tensor in both files. Figures are None where they say nothing: see `state`."""

    name: str
    shape: tuple[int, ...]
    """As in the first file that has it; the fastest dimension first."""
    kind_a: str | None
    """GGML type; None: the file does not have the tensor."""
    kind_b: str | None
    state: str = "compared"
    """compared, only in a, only in b, other shape, cannot be decoded, or not finite."""
    note: str = ""
    """What else to know: which type the GPU could not decode, or the other shape."""
    n_elements: int = 0
    bits_a: float | None = None
    """Bits per weight."""
    bits_b: float | None = None
    max_abs: float | None = None
    """Largest |a - b|."""
    rmse: float | None = None
    """Root of the mean of (a - b)^2."""
    relative: float | None = None
    """Frobenius norm of a - b over that of a; None if a is all zeros and b is not."""
    cosine: float | None = None
    """None if one of them is all zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDiff:
    """Two files, all tensors."""

    path_a: str
    path_b: str
    tensors: tuple[TensorDiff, ...]
    """In the order of a, then those of b alone."""
    metadata: tuple[MetadataDiff, ...] = ()
    """Keys of the headers that are not the same."""

    def worst(self) -> list[TensorDiff]:
        """What could not be compared first, then by falling relative error."""
        compared = [each for each in self.tensors if each.state == "compared"]
        odd = [each for each in self.tensors if each.state != "compared"]
        return odd + sorted(compared, key=lambda each: -(math.inf if each.relative is None else each.relative))


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor and the file that holds it."""

    path: str
    file: Raw
    info: TensorInfo

    def decode(self, dequantize: Dequantize, start: int, count: int) -> Any:
        """`count` elements from element `start`."""
        elements, nbytes = _BLOCKS[self.info.type]
        first, size = self.info.offset_bytes + start // elements * nbytes, count // elements * nbytes
        raw = self.file[first : first + size]
        if raw.size != size:
            raise ModelFormatError(self.path, self.file.size, f"ends inside tensor {self.info.name}")
        with np.errstate(invalid="ignore", over="ignore"):  # the sums tell of what is not finite
            return dequantize(raw, self.info.type, n_elements=count)


def diff_models(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    dequantize: Dequantize | None = None,
    only: str = "*",
    progress: Callable[[str, int, int], None] | None = None,
) -> ModelDiff:
    """Compare the weights of two files of one model, e.g. F16 with Q4_K_M, and their metadata.

    Args:
        a: the reference; of a split model the first shard.
        b: the other one.
        dequantize: None: `gguf`'s own, on the CPU. Types that it refuses with ConfigError go to `gguf` too, and the
            tensor's `note` says so.
        only: pattern of the names to compare, as of files: `blk.0.*`.
        progress: called with a tensor's name, bytes done and bytes to do.

    Raises:
        ModelNotFoundError: no such file.
        ModelFormatError: not a GGUF, or it ends before its tensors do.
    """
    ours, theirs = _sources(Path(a), only), _sources(Path(b), only)
    names = [*ours, *(name for name in theirs if name not in ours)]
    total = sum(each.info.nbytes for side in (ours, theirs) for each in side.values())
    done, found = 0, []
    with ThreadPoolExecutor(2, "dequantize") as pool:
        for name in names:
            one, two = ours.get(name), theirs.get(name)
            found.append(_diff(one, two, dequantize or reference_dequantize, pool))
            done += sum(each.info.nbytes for each in (one, two) if each)
            if progress is not None:
                progress(name, done, total)
    return ModelDiff(path_a=os.fspath(a), path_b=os.fspath(b), tensors=tuple(found), metadata=diff_headers(a, b))


def reference_dequantize(blocks: Raw, kind: str, *, n_elements: int) -> npt.NDArray[Any]:
    """`gguf`'s own decoder, on the CPU; whole numbers and float64 stay what they are.

    Raises:
        ConfigError: it does not know the type.
    """
    if kind in _PLAIN:
        return blocks.view(_PLAIN[kind])
    gguf, rows = _gguf(), blocks.reshape(-1, _BLOCKS[kind][1])
    try:
        return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])).reshape(n_elements)
    except (KeyError, NotImplementedError) as error:
        raise ConfigError("kind", kind, "cannot be decoded by the gguf package") from error


@cache
def _gguf() -> Any:
    import gguf.quants  # half a second

    return gguf


def _sources(path: Path, only: str) -> dict[str, _Source]:
    paths = shard_paths(path) if read_model(path).split_count > 1 else (path,)
    found = {}
    for each in paths:
        tensors = [info for info in read_gguf(each).tensors if fnmatchcase(info.name, only)]
        # Copy on write: PyTorch takes no memory that it could not write to, and the file stays as it is.
        file = np.memmap(each, np.uint8, "c")
        found.update({info.name: _Source(str(each), file, info) for info in tensors})
    return found


def _diff(a: _Source | None, b: _Source | None, dequantize: Dequantize, pool: ThreadPoolExecutor) -> TensorDiff:
    known = a or b
    assert known is not None  # noqa: S101  a name is one file's
    row = TensorDiff(
        name=known.info.name,
        shape=known.info.shape,
        kind_a=a.info.type if a else None,
        kind_b=b.info.type if b else None,
        n_elements=known.info.n_elements,
        bits_a=_bits(a.info) if a else None,
        bits_b=_bits(b.info) if b else None,
    )
    if a is None or b is None:
        return replace(row, state="only in b" if a is None else "only in a")
    if a.info.shape != b.info.shape:
        return replace(row, state="other shape", note=f"{list(b.info.shape)} in b")
    row, decode = _decoder(row, a, b, dequantize)
    if decode is None:
        return row
    return _measured(row, _pairs(a, b, decode, pool))


def _bits(info: TensorInfo) -> float:
    return 8 * info.nbytes / max(info.n_elements, 1)


def _decoder(row: TensorDiff, a: _Source, b: _Source, wanted: Dequantize) -> tuple[TensorDiff, Dequantize | None]:
    """What decodes both sides: the wanted one, else `gguf`'s, else nothing; tried on one block of each."""
    refused = _refused(wanted, a, b)
    if not refused:
        return row, wanted
    row = (
        replace(row, note=f"{', '.join(refused)} decoded by gguf on the CPU")
        if wanted is not reference_dequantize
        else row
    )
    unknown = _refused(reference_dequantize, a, b)
    if unknown:
        return replace(row, state="cannot be decoded", note=", ".join(unknown)), None
    return row, reference_dequantize


def _refused(dequantize: Dequantize, *sources: _Source) -> list[str]:
    refused = []
    for source in sources:
        elements = min(_BLOCKS[source.info.type][0], source.info.n_elements)
        try:
            source.decode(dequantize, 0, elements)
        except ConfigError:
            refused.append(source.info.type)
    return sorted(set(refused))


def _pairs(a: _Source, b: _Source, decode: Dequantize, pool: ThreadPoolExecutor) -> Iterator[tuple[Any, Any]]:
    """Both sides' numbers, chunk by chunk; some chunks are read and decoded ahead."""

    def load(source: _Source, start: int) -> Any:
        return source.decode(decode, start, min(CHUNK_ELEMENTS, source.info.n_elements - start))

    starts = range(0, a.info.n_elements, CHUNK_ELEMENTS)
    coming = [[pool.submit(load, side, start) for side in (a, b)] for start in starts[:_AHEAD]]
    for number in range(len(starts)):
        one, two = coming.pop(0)
        if number + _AHEAD < len(starts):
            coming.append([pool.submit(load, side, starts[number + _AHEAD]) for side in (a, b)])
        yield one.result(), two.result()


def _measured(row: TensorDiff, pairs: Iterator[tuple[Any, Any]]) -> TensorDiff:
    """Sums in float64, on the numbers' own device; one wait for it a tensor."""
    largest, sums = [], []
    with np.errstate(invalid="ignore"):  # as above
        for one, two in pairs:
            for x, y in _pieces(one, two):
                error = x - y
                largest.append(abs(error).max())
                sums.append((error @ error, x @ x, y @ y, x @ y))
    if not sums:
        return row
    columns = [[float(each) for each in column] for column in zip(*sums, strict=True)]
    if not all(math.isfinite(each) for column in columns for each in column):  # fsum refuses inf - inf
        return replace(row, state="not finite", note="NaN or infinity among its numbers")
    errors, xx, yy, xy = map(math.fsum, columns)
    relative = math.sqrt(errors / xx) if xx else (0.0 if not errors else None)
    cosine = xy / math.sqrt(xx * yy) if xx and yy else None
    return replace(
        row,
        max_abs=max(map(float, largest)),
        rmse=math.sqrt(errors / row.n_elements),
        relative=relative,
        cosine=cosine,
    )


def _pieces(one: Any, two: Any) -> Iterator[tuple[Any, Any]]:
    """float64 of both: PyTorch's tensors whole, NumPy's in pieces that stay in the processor's cache."""
    if hasattr(one, "double"):
        yield one.double(), two.double()
        return
    for start in range(0, len(one), _PIECE):
        yield one[start : start + _PIECE].astype(np.float64), two[start : start + _PIECE].astype(np.float64)
