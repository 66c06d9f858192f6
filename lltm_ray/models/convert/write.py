"""A GGUF of tensors that are made one by one: the header by package gguf, the data as `whole_file` wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.gguf_writer import WriterState

from lltm_ray.errors import ModelFormatError
from lltm_ray.models.whole_file import open_scratch

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, bytes done and bytes in all; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """One tensor of the file to come."""

    name: str
    shape: tuple[int, ...]
    """Rows first."""
    kind: gguf.GGMLQuantizationType
    load: Callable[[], Array]
    """Its numbers, of any float type."""

    @property
    def nbytes(self) -> int:
        """In the file."""
        elements, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // elements * block_bytes


def head_of(writer: gguf.GGUFWriter, tensors: Sequence[NewTensor]) -> bytes:
    """All that lies before the data; what is odd in the metadata raises as package gguf does."""
    for each in tensors:
        dtype = np.dtype(np.uint8) if each.kind.name.startswith("Q") else np.dtype(np.float32)
        shape = gguf.quant_shape_to_byte_shape(each.shape, each.kind) if dtype == np.uint8 else each.shape
        writer.add_tensor_info(each.name, shape, dtype, each.nbytes, raw_dtype=each.kind)
    head: Any = BytesIO()
    writer.fout, writer.state = [head], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(head, head.tell())
    return bytes(head.getvalue())


def write_tensors(path: Path, head: bytes, tensors: Sequence[NewTensor], progress: Progress | None) -> None:
    """Write what `whole_file` gave; one tensor is in memory at a time."""
    done, total = 0, sum(each.nbytes for each in tensors)
    with open_scratch(path) as file:
        file.write(head)
        for each in tensors:
            array = gguf.quants.quantize(np.ascontiguousarray(each.load(), np.float32), each.kind)
            if array.nbytes != each.nbytes:
                raise ModelFormatError(str(path), 0, f"{each.name} has {array.nbytes} bytes, not {each.nbytes}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.write(bytes(-each.nbytes % gguf.GGUF_DEFAULT_ALIGNMENT))
            done += each.nbytes
            if progress is not None:
                progress(each.name, done, total)
