"""Writes the planned file: metadata copied byte for byte, then the tensors, encoded in chunks by several threads."""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import CancelledError, ModelFormatError
from lltm_ray.models.gguf import read_header
from lltm_ray.models.gguf_header import Header
from lltm_ray.models.gguf_write import STRING, UINT32, copied_entries, entry, magic, padded, tensor_table, text
from lltm_ray.models.quantize.imatrix import Floats, metadata_of
from lltm_ray.models.quantize.kinds import KINDS, row_bytes
from lltm_ray.models.quantize.plan import Plan, Planned
from lltm_ray.models.whole_file import open_scratch

Raw = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]
"""`(tensor, done, total)` in bytes of the source's tensors; what it raises ends the work."""
CHUNK_ELEMENTS = 2**19
"""Read, decoded and encoded at once by one thread: 2 MiB as float32."""
_QUANTIZATION_VERSION = 2
"""ggml.h's GGML_QNT_VERSION."""


class Encoder(Protocol):
    """What computes blocks; `lltm_ray.llamacpp.ggml.Ggml` is one. Called by several threads at once."""

    def decode(self, raw: bytes, kind: str, n_elements: int) -> Floats:
        """float32 [n_elements] of a tensor's raw bytes."""

    def encode(self, rows: Floats, kind: str, weights: Floats | None) -> Raw:
        """Blocks of float32 [n_rows, n_columns]; `weights` is None or float32 [n_columns]."""

    def is_valid(self, raw: bytes | Raw, kind: str) -> bool:
        """Whether all its numbers, or its blocks' scales, are finite."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of one tensor, all of one expert."""

    tensor: Planned
    start_row: int
    n_rows: int

    @property
    def source_bytes(self) -> int:
        return row_bytes(self.tensor.source.type, self.n_rows * self.tensor.shape[0])

    def read(self) -> bytes:
        source, first = self.tensor.source, row_bytes(self.tensor.source.type, self.start_row * self.tensor.shape[0])
        with open(self.tensor.path, "rb", buffering=0) as file:  # open only now: a model may have more shards than that
            raw = os.pread(file.fileno(), self.source_bytes, source.offset_bytes + first)
        if len(raw) != self.source_bytes:
            raise ModelFormatError(self.tensor.path, source.offset_bytes, f"ends inside tensor {source.name}")
        return raw

    def weights(self) -> Floats | None:
        tensor = self.tensor
        if tensor.weights is None:
            return None
        first = self.start_row // tensor.shape[1] * tensor.shape[0]
        return tensor.weights[first : first + tensor.shape[0]]


def write_quantized(
    plan: Plan, path: Path, encoder: Encoder, *, progress: Progress | None = None, cancel: Event | None = None
) -> None:
    """Write the file, from the first byte to the last. Memory: some MiB a thread, whatever the model's size.

    Args:
        plan: what to write.
        path: of `whole_file`.
        encoder: computes the blocks.
        progress: hears of each chunk, on this thread.
        cancel: set by anybody, it ends the work within a chunk.

    Raises:
        CancelledError: `cancel` was set.
        ModelFormatError: the source became shorter, or holds numbers that are not finite.
    """
    done, total = 0, sum(each.source.nbytes for each in plan.tensors)
    with ExitStack() as stack:
        out = stack.enter_context(open_scratch(path))
        pool = ThreadPoolExecutor(plan.options.n_threads, "quantize")
        stack.callback(pool.shutdown, cancel_futures=True)
        header, _ = read_header(plan.source)
        out.write(_head(plan, header))
        for chunk, blocks in _encoded(plan, encoder, pool):
            if cancel is not None and cancel.is_set():
                raise CancelledError(f"quantizing {plan.source} was cancelled")
            out.write(blocks if isinstance(blocks, bytes) else blocks.data)
            if chunk.start_row + chunk.n_rows == _rows(chunk.tensor):
                out.write(bytes(-chunk.tensor.nbytes % header.alignment))
            done += chunk.source_bytes
            if progress is not None:
                progress(chunk.tensor.source.name, done, total)


def _encoded(plan: Plan, encoder: Encoder, pool: ThreadPoolExecutor) -> Iterator[tuple[_Chunk, bytes | Raw]]:
    """Chunks in the file's order; two a thread are under way or wait to be written."""
    coming: deque[tuple[_Chunk, Future[bytes | Raw]]] = deque()
    for chunk in (chunk for tensor in plan.tensors for chunk in _chunks(tensor)):
        coming.append((chunk, pool.submit(_encode, chunk, encoder)))
        if len(coming) >= 2 * plan.options.n_threads:
            first, blocks = coming.popleft()
            yield first, blocks.result()
    for chunk, blocks in coming:
        yield chunk, blocks.result()


def _rows(tensor: Planned) -> int:
    return tensor.source.n_elements // tensor.shape[0]


def _chunks(tensor: Planned) -> Iterator[_Chunk]:
    expert = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = min(expert, max(1, CHUNK_ELEMENTS // tensor.shape[0]))
    for base in range(0, _rows(tensor), expert):
        for start in range(base, base + expert, step):
            yield _Chunk(tensor, start, min(step, base + expert - start))


def _encode(chunk: _Chunk, encoder: Encoder) -> bytes | Raw:
    raw, tensor = chunk.read(), chunk.tensor
    have, want, columns = tensor.source.type, tensor.type, tensor.shape[0]
    if not encoder.is_valid(raw, have):
        why = f"tensor {tensor.source.name} holds numbers that are not finite, or is damaged; fetch or convert it again"
        raise ModelFormatError(tensor.path, tensor.source.offset_bytes, why)
    if have == want:
        return raw
    rows = encoder.decode(raw, have, chunk.n_rows * columns).reshape(chunk.n_rows, columns)
    blocks = encoder.encode(rows, want, chunk.weights())
    if not encoder.is_valid(blocks, want):
        why = f"tensor {tensor.source.name} has numbers too large for {want}; take another type"
        raise ModelFormatError(tensor.path, tensor.source.offset_bytes, why)
    return blocks


def _head(plan: Plan, header: Header) -> bytes:
    """All that lies before the tensors: layout as in ggml's docs/gguf.md, order as `gguf_set_val_*` leave it.

    Padding is the source's own; llama-quantize keeps the key and pads to 32 all the same.
    """
    said: dict[str, str | int] = {
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": KINDS[plan.options.kind][0],
        **(metadata_of(plan.imatrix) if plan.imatrix else {}),
    }
    entries = [raw for key, raw in copied_entries(plan.source, header).items() if key not in said]
    entries += [_entry(key, value) for key, value in said.items()]
    listed = [(each.source.name, each.shape, each.type, each.nbytes) for each in plan.tensors]
    head = magic(len(listed), len(entries)) + b"".join(entries) + tensor_table(listed, header.alignment)
    return head.ljust(padded(len(head), header.alignment), b"\0")


def _entry(key: str, value: str | int) -> bytes:
    return entry(key, STRING, text(value)) if isinstance(value, str) else entry(key, UINT32, struct.pack("<I", value))
