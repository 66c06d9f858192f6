"""A GGUF file's header, read with bounds: counts, lengths and offsets in a file are claims until checked.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, tensor count, metadata count; then
metadata as (key, type, value), tensors as (name, dims, type, offset), padding, data. All little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from lltm_ray.errors import ModelFormatError

Scalar = int | float | bool | str

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""ggml type id -> name, elements a block, bytes a block, as ggml's `type_traits`; a test holds it to package `gguf`."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata type id -> `struct` code; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_MAX_METADATA = 65_536
_MAX_TENSORS = 100_000
"""The largest known files have some 45,000 tensors (unmerged experts)."""
_MAX_STRINGS = 4_000_000
"""Strings in all arrays together; vocabularies with merges reach 1.5 million."""
_MAX_TEXT_BYTES = 4 * 2**20
"""A longer string stays in the file as a `LazyValue`; chat templates are some 10 KB."""
_MAX_TEXTS_BYTES = 16 * 2**20
"""All strings kept from one file."""
_MAX_INLINE = 4096
"""A longer numeric array stays in the file; per-layer arrays are far below."""
_MAX_INLINES = 1_000_000
"""Numbers kept from all arrays of one file."""
_MAX_NAME_BYTES = 65_535
_MAX_DIMS = 4
_WINDOW_BYTES = 256 * 2**10


@dataclass(frozen=True, slots=True)
class LazyValue:
    """A long metadata value left in the file: an array of `count` elements, or a text of `count` bytes."""

    kind: str
    """`text`, `string` (an array of strings), or the `struct` code of an array's numbers."""
    count: int
    offset_bytes: int
    """Where the first element begins."""


Value = Scalar | tuple[Scalar, ...] | LazyValue


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` with the fastest dimension first, `offset_bytes` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset_bytes: int
    nbytes: int

    @property
    def n_elements(self) -> int:
        """Product of the dimensions."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """All that lies before the data."""

    version: int
    metadata: dict[str, Value]
    key_offsets: dict[str, int]
    """Where each key's value begins, for errors."""
    tensors: tuple[TensorInfo, ...]
    entries: dict[str, tuple[int, int]]
    """Where each metadata entry, key and all, begins and ends: to copy it as it stands."""
    alignment: int
    data_offset: int
    """Where the first tensor begins."""
    metadata_end: int
    """The byte after the last key's value."""


Misplaced = Callable[[str, int, str], None]
"""Told of a tensor that does not lie where it should: its name, the byte, and what is wrong."""


class HeaderReader:
    """Reads one header; every `fail` is a `ModelFormatError` with the byte where reading stopped.

    With `misplaced`, tensors that overlap, leave gaps, appear twice or pass the file's end are told to it, and kept.
    """

    def __init__(self, file: BinaryIO, path: str, file_bytes: int, misplaced: Misplaced | None = None) -> None:
        self._file = file
        self._path = path
        self._size = file_bytes
        self._at = 0
        self._window = b""
        self._window_at = 0
        self._texts_bytes = 0
        self._strings = 0
        self._inlines = 0
        self._misplaced = misplaced or (lambda _, at, why: self.fail(why, at))

    def read(self) -> Header:
        """Read and check the whole header.

        Raises:
            ModelFormatError: with the offset and what is wrong there.
        """
        version = self._read_version()
        n_tensors, n_metadata = self._unpack("Q"), self._unpack("Q")
        self._check_count(n_tensors, "tensors", _MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
        self._check_count(n_metadata, "metadata entries", _MAX_METADATA, 8 + 4 + 1)
        metadata: dict[str, Value] = {}
        offsets: dict[str, int] = {}
        entries: dict[str, tuple[int, int]] = {}
        for _ in range(n_metadata):
            begin = self._at
            key = self._read_name("metadata key")
            if key in metadata:
                self.fail(f"metadata key {key!r} appears twice")
            kind = self._unpack("I")
            offsets[key] = self._at
            metadata[key] = self._read_value(kind)
            entries[key] = begin, self._at
        metadata_end = self._at
        alignment = self._read_alignment(metadata, offsets)
        listed = [self._read_tensor() for _ in range(n_tensors)]
        data_at = -(-self._at // alignment) * alignment
        tensors = self._place(listed, alignment, data_at)
        return Header(version, metadata, offsets, tensors, entries, alignment, data_at, metadata_end)

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        """Refuse the file."""
        raise ModelFormatError(self._path, self._at if at is None else at, why)

    def _take(self, count: int) -> bytes:
        start = self._fill(count)
        self._at += count
        return self._window[start : start + count]

    def _skip(self, count: int) -> None:
        self._need(count)
        self._at += count

    def _need(self, count: int) -> None:
        if count > self._size - self._at:
            self.fail(f"{count} more bytes are needed, but the file ends at byte {self._size}")

    def _fill(self, count: int) -> int:
        """Bring the next `count` bytes into the window; returns where in it they begin."""
        self._need(count)
        start = self._at - self._window_at
        if start > len(self._window) - count:
            self._file.seek(self._at)
            self._window, self._window_at, start = self._file.read(max(count, _WINDOW_BYTES)), self._at, 0
            if len(self._window) < count:
                self.fail("the file became shorter while it was read")
        return start

    def _unpack(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _check_count(self, count: int, what: str, limit: int, smallest_bytes: int) -> None:
        if count > limit:
            self.fail(f"{count} {what} are more than the file can hold (limit {limit})")
        if count > (self._size - self._at) // smallest_bytes:
            self.fail(f"{count} {what} are more than the file can hold: it ends early; fetch or copy it again")

    def _read_version(self) -> int:
        magic = self._take(min(4, self._size))
        if magic != b"GGUF":
            self.fail(f"not a GGUF file: it begins with {magic!r}, not b'GGUF'", 0)
        version = self._unpack("I")
        if version & 0xFFFF == 0 and version:
            self.fail("big-endian GGUF; llama.cpp needs a little-endian file here", 4)
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported; 2 and 3 are", 4)
        return version

    def _read_name(self, what: str) -> str:
        length = self._unpack("Q")
        if not 0 < length <= _MAX_NAME_BYTES:
            self.fail(f"a {what} of {length} bytes", self._at - 8)
        self._keep_text(length)
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self.fail(f"a {what} that is not UTF-8", self._at - length)

    def _read_value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._read_text()
        if kind == _ARRAY:
            return self._read_array()
        if kind not in _SCALARS:
            self.fail(f"unknown metadata type {kind}", self._at - 4)
        return self._read_numbers(_SCALARS[kind], 1)[0]

    def _read_text(self) -> str | LazyValue:
        length, start = self._unpack("Q"), self._at
        if length > _MAX_TEXT_BYTES:
            self._skip(length)
            return LazyValue("text", length, start)
        self._keep_text(length)
        return self._take(length).decode(errors="replace")

    def _keep_text(self, length: int) -> None:
        self._texts_bytes += length
        if self._texts_bytes > _MAX_TEXTS_BYTES:
            self.fail(f"over {_MAX_TEXTS_BYTES} bytes of names and texts")

    def _read_array(self) -> tuple[Scalar, ...] | LazyValue:
        kind, count, start = self._unpack("I"), self._unpack("Q"), self._at
        if kind == _STRING:
            self._skip_strings(count)
            return LazyValue("string", count, start)
        if kind not in _SCALARS:
            self.fail("an array of arrays" if kind == _ARRAY else f"an array of unknown type {kind}", start - 12)
        if count <= _MAX_INLINE:
            self._inlines += count
            if self._inlines > _MAX_INLINES:
                self.fail(f"over {_MAX_INLINES} numbers in short arrays")
            return self._read_numbers(_SCALARS[kind], count)
        self._skip(count * struct.calcsize("<" + _SCALARS[kind]))
        return LazyValue(_SCALARS[kind], count, start)

    def _read_numbers(self, code: str, count: int) -> tuple[Scalar, ...]:
        layout = f"<{count}{code}"
        raw = self._take(struct.calcsize(layout))
        if code == "?" and raw.translate(None, b"\0\1"):
            self.fail("a boolean that is neither 0 nor 1", self._at - len(raw))
        return struct.unpack(layout, raw)

    def _skip_strings(self, count: int) -> None:
        self._strings += count
        self._check_count(count, "strings in one array", _MAX_STRINGS, 8)
        if self._strings > _MAX_STRINGS:
            self.fail(f"over {_MAX_STRINGS} strings in arrays")
        length_at = struct.Struct("<Q").unpack_from
        while count:  # in strides of a window: a vocabulary has a million strings
            start = at = self._fill(8)
            last = len(self._window) - 8
            while count and at <= last:
                at += 8 + length_at(self._window, at)[0]
                count -= 1
            self._skip(at - start)

    def _read_alignment(self, metadata: dict[str, Value], offsets: dict[str, int]) -> int:
        value = metadata.get("general.alignment", 32)
        if not isinstance(value, int) or value < 8 or value & (value - 1) or value > 2**20:
            self.fail(f"general.alignment is {value!r}, not a power of two from 8", offsets["general.alignment"])
        return value

    def _place(self, listed: list[tuple[TensorInfo, int]], alignment: int, data_at: int) -> tuple[TensorInfo, ...]:
        """The tensors with their places in the file; each must begin where the one before it ends, padded."""
        expected, seen, tensors = 0, set(), []
        for tensor, at in listed:
            name, size, offset = tensor.name, tensor.nbytes, tensor.offset_bytes
            if name in seen:
                self._misplaced(name, at, f"tensor {name!r} appears twice")
            if offset != expected:
                self._misplaced(name, at, f"tensor {name!r} lies at data offset {offset}, not {expected}")
            seen.add(name)
            tensors.append(TensorInfo(name, tensor.shape, tensor.type, data_at + offset, size))
            expected = offset + -(-size // alignment) * alignment
        self._check_end(tensors)
        return tuple(tensors)

    def _check_end(self, tensors: list[TensorInfo]) -> None:
        """A cut file is told once, however many tensors it has lost."""
        cut = [tensor for tensor in tensors if tensor.offset_bytes + tensor.nbytes > self._size]
        if cut:
            name, at = cut[0].name, min(cut[0].offset_bytes, self._size)
            why = f"{len(cut)} of {len(tensors)} tensors, the first of them {name!r}: the file is truncated or damaged"
            self._misplaced(name, at, f"beyond the file's end at {self._size}: {why}")

    def _read_tensor(self) -> tuple[TensorInfo, int]:
        """One entry, its offset still relative to the data, and where the entry begins."""
        at = self._at
        name = self._read_name("tensor name")
        n_dims = self._unpack("I")
        if n_dims > _MAX_DIMS:
            self.fail(f"tensor {name!r} has {n_dims} dimensions; at most {_MAX_DIMS} are possible", self._at - 4)
        shape = tuple(self._unpack("Q") for _ in range(n_dims))
        if math.prod(shape) >= 2**63 or 0 in shape:
            self.fail(f"tensor {name!r} has impossible dimensions {shape}", self._at - 8 * n_dims)
        kind = self._unpack("I")
        if kind not in TENSOR_TYPES:
            self.fail(f"tensor {name!r} has unknown type {kind}", self._at - 4)
        label, block, block_bytes = TENSOR_TYPES[kind]
        row = shape[0] if shape else 1
        if row % block:
            self.fail(f"tensor {name!r}: rows of {row} elements are not whole {label} blocks of {block}", at)
        nbytes = math.prod(shape) // block * block_bytes
        return TensorInfo(name, shape, label, self._unpack("Q"), nbytes), at
