"""Adapters into their model: `merge_adapter` writes W + scale * factor * b a, as llama.cpp computes it at run time.

Tensors that no adapter changes are copied byte for byte, metadata too; of the others some rows are in memory at a time.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError
from lltm_ray.models.diff import reference_dequantize
from lltm_ray.models.gguf import GgufInfo, read_gguf, read_header, read_model, shard_paths
from lltm_ray.models.gguf_header import TensorInfo
from lltm_ray.models.gguf_write import UINT32, copied_entries, entry, magic, padded, tensor_table
from lltm_ray.models.lora.file import EMBEDDING, LoraFile, check_fits, read_lora
from lltm_ray.models.quantize.kinds import KINDS
from lltm_ray.models.whole_file import open_scratch, refuse_same, whole_file

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
MERGED_TYPES = ("f32", "f16", "bf16", "q8_0")
_CHUNK_ELEMENTS = 2**22
_COPY_BYTES = 2**24
_FILE_TYPE = "general.file_type"


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor of the model, and the file that holds it."""

    file: npt.NDArray[np.uint8]
    info: TensorInfo
    kind: gguf.GGMLQuantizationType
    """As it will be written."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        return self.info.shape[1], self.info.shape[0]

    @property
    def nbytes(self) -> int:
        """As it will be written."""
        elements, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        return self.info.n_elements // elements * nbytes

    def rows(self, first: int, last: int) -> Array:
        """Some rows of a matrix, float32."""
        return _decode(self.file, self.info, first, last)


@dataclass(frozen=True, slots=True)
class _Change:
    """What one adapter does to one tensor: `left @ right`, both float32, the scale in `left`."""

    left: Array
    right: Array


def merge_adapter(
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    out: str | os.PathLike[str],
    out_type: str | None = None,
    *,
    progress: Progress | None = None,
) -> GgufInfo:
    """Write a model that says by itself what it says with adapters loaded at these scales.

    Computed in float32, some rows at a time; the files are mapped, not read.

    Args:
        base: the model; of a split one the first shard, and what is written is one file.
        adapters: GGUF adapters and their scales; they are added up.
        out: the GGUF to write; one that is there is replaced, and it appears when it is whole.
        out_type: of the tensors that are changed: `f32|f16|bf16|q8_0`. None: the type each has, and F16 where the gguf
            package cannot write that (the K quants and others of llama-quantize's).
        progress: called with a name, bytes done and bytes in all; what it raises ends the merge.

    Raises:
        ModelNotFoundError, ModelFormatError: a file is not there, or damaged.
        ConfigError: an adapter is another model's, or none; or `out` cannot be written.
        DiskFullError: the disk has no room.
    """
    if out_type is not None and out_type not in MERGED_TYPES:
        raise ConfigError("out_type", out_type, f"must be one of {', '.join(MERGED_TYPES)}")
    model, loras = read_model(base), [(read_lora(path), float(scale)) for path, scale in adapters]
    _check(loras, model)
    changed = {name for lora, scale in loras if scale for name in lora.pairs}
    sources = list(_sources(Path(base), model, changed, out_type))
    head, alignment = _head(Path(base), sources, _file_type(sources))
    refuse_same(out, base, *(lora.path for lora, _ in loras))
    with whole_file(Path(out)) as path:
        with open_scratch(path) as stream:
            stream.write(head)
            _write(stream, alignment, sources, [(lora, scale) for lora, scale in loras if scale], progress)
        info = read_gguf(path)
    return replace(info, path=os.fspath(out))


def _write(
    stream: BinaryIO,
    alignment: int,
    sources: Sequence[_Source],
    loras: Sequence[tuple[LoraFile, float]],
    progress: Progress | None,
) -> None:
    done, total = 0, sum(each.nbytes for each in sources)
    for each in sources:
        name = each.info.name
        changes = [_change(lora, name, scale) for lora, scale in loras if name in lora.pairs]
        stream.writelines(_merged(each, changes) if changes else _copied(each))
        stream.write(bytes(-each.nbytes % alignment))
        done += each.nbytes
        if progress is not None:
            progress(name, done, total)


def _check(loras: Sequence[tuple[LoraFile, float]], model: GgufInfo) -> None:
    if not loras:
        raise ConfigError("adapters", "[]", "name one at least")
    for lora, scale in loras:
        check_fits(lora, model)
        if not np.isfinite(scale):
            raise ConfigError("scale", scale, "must be a number")
        if lora.is_activated:
            raise ConfigError("adapter", lora.path, "works behind certain tokens only, so it cannot be merged")


def _sources(base: Path, model: GgufInfo, changed: set[str], out_type: str | None) -> Iterator[_Source]:
    for path in shard_paths(base) if model.split_count > 1 else (base,):
        file = np.memmap(path, np.uint8, "r")
        for info in read_gguf(path).tensors:
            own = gguf.GGMLQuantizationType[info.type]
            yield _Source(file, info, _kind(info, own, out_type) if info.name in changed else own)


def _kind(info: TensorInfo, own: gguf.GGMLQuantizationType, out_type: str | None) -> gguf.GGMLQuantizationType:
    """The wanted type, where a row is whole blocks of it and somebody can write it; else F16."""
    wanted = own if out_type is None else gguf.GGMLQuantizationType[out_type.upper()]
    elements, _ = gguf.GGML_QUANT_SIZES[wanted]
    if info.shape[0] % elements or not _can_write(wanted):
        return gguf.GGMLQuantizationType.F16
    return wanted


def _can_write(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def _change(lora: LoraFile, name: str, scale: float) -> _Change:
    pair, file = lora.pairs[name], np.memmap(lora.path, np.uint8, "r")
    a, b = (_decode(file, info, 0, info.shape[1]) for info in (pair.a, pair.b))
    factor = np.float32(scale * lora.factor(name))
    return _Change(a * factor, b.T) if name == EMBEDDING else _Change(b * factor, a)


def _decode(file: npt.NDArray[np.uint8], info: TensorInfo, first: int, last: int) -> Array:
    """Rows of a matrix, float32 [last - first, columns]."""
    columns, row_bytes = info.shape[0], info.nbytes // info.shape[1]
    raw = np.array(file[info.offset_bytes + first * row_bytes : info.offset_bytes + last * row_bytes])
    numbers = reference_dequantize(raw, info.type, n_elements=(last - first) * columns)
    return np.asarray(numbers, np.float32).reshape(last - first, columns)


def _merged(each: _Source, changes: Sequence[_Change]) -> Iterator[bytes]:
    rows, columns = each.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        chunk = each.rows(first, last)
        for change in changes:
            chunk = chunk + change.left[first:last] @ change.right
        yield gguf.quants.quantize(np.ascontiguousarray(chunk), each.kind).tobytes()


def _copied(each: _Source) -> Iterator[bytes]:
    start, end = each.info.offset_bytes, each.info.offset_bytes + each.info.nbytes
    for at in range(start, end, _COPY_BYTES):
        yield each.file[at : min(end, at + _COPY_BYTES)].tobytes()


def _head(base: Path, sources: Sequence[_Source], file_type: int | None) -> tuple[bytes, int]:
    """Metadata as it is, but for what shards say of themselves and the file's type; and the alignment."""
    header, _ = read_header(base)
    entries = copied_entries(base, header)
    if file_type is not None:
        entries[_FILE_TYPE] = entry(_FILE_TYPE, UINT32, struct.pack("<I", file_type))
    table = tensor_table(
        ((each.info.name, each.info.shape, each.kind.name, each.nbytes) for each in sources), header.alignment
    )
    head = magic(len(sources), len(entries)) + b"".join(entries.values()) + table
    return head.ljust(padded(len(head), header.alignment), b"\0"), header.alignment


def _file_type(sources: Sequence[_Source]) -> int | None:
    """What the file's type has become: that of most bytes; None where no tensor's type is another."""
    if all(each.kind.name == each.info.type for each in sources):
        return None
    before, after = (Counter[str]() for _ in range(2))
    for each in sources:
        before[each.info.type] += each.info.nbytes
        after[each.kind.name] += each.nbytes
    main = after.most_common(1)[0][0]
    if main == before.most_common(1)[0][0]:
        return None
    return next((number for number, kind in KINDS.values() if kind == main), None)
