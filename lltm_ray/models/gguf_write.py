"""Parts of a GGUF header, for files made of others' metadata and tensors; layout as in ggml's docs/gguf.md."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from lltm_ray.models.gguf_header import TENSOR_TYPES, Header

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
"""What a shard says of its set; no whole file has them."""
UINT16, UINT32, INT32, STRING = 2, 4, 5, 8
"""Types of metadata."""
_TYPE_IDS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def magic(n_tensors: int, n_entries: int) -> bytes:
    """The first bytes."""
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_entries)


def entry(key: str, kind: int, value: bytes) -> bytes:
    """One of metadata."""
    return text(key) + struct.pack("<I", kind) + value


def text(words: str) -> bytes:
    """A string with its length."""
    raw = words.encode()
    return struct.pack("<Q", len(raw)) + raw


def copied_entries(path: str | os.PathLike[str], header: Header) -> dict[str, bytes]:
    """A file's metadata by key, each as it stands, but for what it says as a shard."""
    found = {}
    with open(path, "rb") as file:
        for key, (begin, end) in header.entries.items():
            if key not in SPLIT_KEYS:
                file.seek(begin)
                found[key] = file.read(end - begin)
    return found


def tensor_table(tensors: Iterable[tuple[str, tuple[int, ...], str, int]], alignment: int) -> bytes:
    """Name, shape, type and offset of tensors given as name, shape, type and bytes, which lie one behind the other."""
    table, offset = bytearray(), 0
    for name, shape, kind, nbytes in tensors:
        table += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPE_IDS[kind], offset)
        offset += padded(nbytes, alignment)
    return bytes(table)


def padded(size: int, alignment: int) -> int:
    """The next multiple."""
    return -(-size // alignment) * alignment
