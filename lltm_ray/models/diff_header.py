"""In what the metadata of two GGUF files differs, without their weights: `diff_headers`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lltm_ray.models.gguf import read_header, read_model
from lltm_ray.models.gguf_header import Header, LazyValue, Value

_LONGEST = 60
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataDiff:
    """One key that is not the same in both files; None: it is not there."""

    key: str
    a: str | None
    b: str | None


def diff_headers(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[MetadataDiff, ...]:
    """Keys whose values differ, and the sizes that follow from the tensors, in the order of a, then those of b alone.

    Long values (vocabularies, templates) are compared byte by byte and told by their length. `split.*` is left out: it
    is the files' affair, not the model's.

    Raises:
        ModelNotFoundError: no such file.
        ModelFormatError: not a GGUF.
    """
    one, two = read_header(a)[0], read_header(b)[0]
    keys = dict.fromkeys((*one.entries, *two.entries))
    found = [_sizes(a, b)]
    with Path(a).open("rb") as file_a, Path(b).open("rb") as file_b:
        for key in keys:
            if key.startswith("split."):
                continue
            if not _same(_entry(one, key), _entry(two, key), file_a, file_b):
                found.append(MetadataDiff(key=key, a=_shown(one, key), b=_shown(two, key)))
    return tuple(each for each in found if each is not None)


def _sizes(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> MetadataDiff | None:
    told = []
    for path in (a, b):
        info = read_model(path)
        kinds = ", ".join(info.quantization)
        told.append(f"{len(info.tensors)} tensors, {info.n_params:,} parameters, {info.tensor_bytes:,} bytes: {kinds}")
    return MetadataDiff(key="(weights)", a=told[0], b=told[1]) if told[0] != told[1] else None


def _entry(header: Header, key: str) -> tuple[int, int]:
    return header.entries.get(key, (0, 0))


def _same(one: tuple[int, int], two: tuple[int, int], file_a: BinaryIO, file_b: BinaryIO) -> bool:
    """Whether two spans of two files hold the same bytes."""
    left = one[1] - one[0]
    if left != two[1] - two[0]:
        return False
    file_a.seek(one[0])
    file_b.seek(two[0])
    while left > 0:
        count = min(left, _PIECE_BYTES)
        if file_a.read(count) != file_b.read(count):
            return False
        left -= count
    return True


def _shown(header: Header, key: str) -> str | None:
    return _text(header.metadata[key]) if key in header.metadata else None


def _text(value: Value) -> str:
    if isinstance(value, LazyValue):
        what = {"text": "characters", "string": "texts"}.get(value.kind, "numbers")
        return f"{value.count:,} {what}"
    if isinstance(value, tuple):
        return f"{len(value)} numbers: {', '.join(map(str, value[:6]))}{', …' if len(value) > 6 else ''}"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
