"""One GGUF file as several, and several as one: `split` and `merge`, in the format of llama.cpp's `llama-gguf-split`.

The first shard has all metadata, each has `split.no`, `split.count` and `split.tensors.count`. Metadata and tensors are
copied as they stand, in pieces. Files appear under their names when all are whole; after any error none does.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lltm_ray.errors import ConfigError, ModelFormatError
from lltm_ray.models.gguf import read_header, read_model, shard_paths
from lltm_ray.models.gguf_header import Header, TensorInfo
from lltm_ray.models.gguf_write import INT32, SPLIT_KEYS, UINT16, entry, magic, padded, tensor_table
from lltm_ray.models.whole_file import check_space, new_files, open_scratch

Progress = Callable[[str, int, int], None]
"""Called with a file's name, bytes done and bytes in all."""
_PIECE_BYTES = 8 * 2**20
_DEFAULT_ALIGNMENT = 32
_MOST_SHARDS = 65_535
"""`split.count` is a uint16, and file names have five digits."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A file to copy from."""

    path: Path
    header: Header


@dataclass(frozen=True, slots=True)
class _Output:
    """A file to write: raw metadata entries with their number, and tensors with where they come from."""

    path: Path
    metadata: tuple[bytes, ...]
    copied: tuple[tuple[_Source, str], ...]
    """Metadata entries copied from a file, before `metadata`."""
    tensors: tuple[tuple[_Source, TensorInfo], ...]
    alignment: int

    def infos(self) -> bytes:
        """The list of tensors."""
        listed = ((tensor.name, tensor.shape, tensor.type, tensor.nbytes) for _, tensor in self.tensors)
        return tensor_table(listed, self.alignment)

    def n_bytes(self) -> int:
        """Of the whole file."""
        copied = sum(end - begin for begin, end in (each.header.entries[key] for each, key in self.copied))
        head = 24 + copied + sum(map(len, self.metadata)) + len(self.infos())
        data = sum(padded(tensor.nbytes, self.alignment) for _, tensor in self.tensors)
        return padded(head, self.alignment) + data


def split(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write a model as shards `OUT-00001-of-0000N.gguf`; the model itself stays.

    Args:
        path: a model of one file.
        out: where to; a `.gguf` at its end is dropped.
        max_bytes: most bytes of tensors in a shard.
        max_tensors: most tensors in a shard; one of the two limits is given.
        progress: told of the bytes written.

    Returns:
        The shards, in order.

    Raises:
        ModelNotFoundError: no such file.
        ModelFormatError: not a GGUF, or damaged.
        ConfigError: a limit is missing, wrong, or smaller than a tensor; a shard of that name is there already.
        DiskFullError: the disk has no room for all shards.
    """
    source = _Source(Path(path), read_header(path)[0])
    count = source.header.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise ConfigError("path", os.fspath(path), f"is one of {count} shards already; merge them first")
    groups = list(_groups(source.header.tensors, max_bytes, max_tensors))
    if len(groups) > _MOST_SHARDS:
        raise ConfigError("limit", max_bytes or max_tensors, f"makes {len(groups)} shards; at most {_MOST_SHARDS}")
    outputs = list(_shards(source, os.fspath(out).removesuffix(".gguf"), groups))
    _write_all(outputs, progress)
    return tuple(each.path for each in outputs)


def _shards(source: _Source, stem: str, groups: Sequence[Sequence[TensorInfo]]) -> Iterator[_Output]:
    for number, group in enumerate(groups):
        name = Path(f"{stem}-{number + 1:05}-of-{len(groups):05}.gguf")
        keys = tuple((source, key) for key in source.header.entries if key not in SPLIT_KEYS) if number == 0 else ()
        added = (
            entry("split.no", UINT16, struct.pack("<H", number)),
            entry("split.tensors.count", INT32, struct.pack("<i", len(source.header.tensors))),
            entry("split.count", UINT16, struct.pack("<H", len(groups))),
        )
        alignment = source.header.alignment if number == 0 else _DEFAULT_ALIGNMENT
        yield _Output(name, added, keys, tuple((source, tensor) for tensor in group), alignment)


def merge(
    first_shard: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress | None = None
) -> Path:
    """Write all shards of a model as one file, with the original's metadata; the shards stay.

    Raises:
        ModelNotFoundError: a shard is missing, or another than the first is given.
        ModelFormatError: a shard is damaged, or the shards do not belong together.
        ConfigError: the model is not split, or `out` is there already.
        DiskFullError: the disk has no room.
    """
    path = Path(first_shard)
    if read_model(path).split_count <= 1 and "split.count" not in read_header(path)[0].metadata:
        raise ConfigError("path", os.fspath(path), "is no first shard: it is a model of one file")
    sources = [_Source(each, read_header(each)[0]) for each in shard_paths(path)]
    first = sources[0]
    tensors = tuple((source, tensor) for source in sources for tensor in source.header.tensors)
    _check_set(sources, [tensor.name for _, tensor in tensors])
    keys = tuple((first, key) for key in first.header.entries if key not in SPLIT_KEYS)
    _write_all([_Output(Path(out), (), keys, tensors, first.header.alignment)], progress)
    return Path(out)


def _check_set(sources: Sequence[_Source], names: Sequence[str]) -> None:
    for number, source in enumerate(sources):
        metadata = source.header.metadata
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, len(sources)):
            why = f"says it is shard {metadata.get('split.no')} of {metadata.get('split.count')}, counted from 0"
            raise ModelFormatError(str(source.path), source.header.key_offsets.get("split.no", 0), why)
    total = sources[0].header.metadata.get("split.tensors.count", len(names))
    if len(set(names)) != len(names) or total != len(names):
        why = f"its shards hold {len(set(names))} different tensors, {total} are said to be there"
        raise ModelFormatError(str(sources[0].path), sources[0].header.key_offsets.get("split.tensors.count", 0), why)


def _groups(
    tensors: Sequence[TensorInfo], max_bytes: int | None, max_tensors: int | None
) -> Iterator[list[TensorInfo]]:
    """The tensors of each shard, as llama-gguf-split divides them."""
    if (max_bytes is None) == (max_tensors is None):
        raise ConfigError("max_bytes", max_bytes, "give either max_bytes or max_tensors")
    for name, limit in (("max_bytes", max_bytes), ("max_tensors", max_tensors)):
        if limit is not None and limit < 1:
            raise ConfigError(name, limit, "must be 1 or above")
    group: list[TensorInfo] = []
    taken = 0
    for tensor in tensors:
        size = padded(tensor.nbytes, _DEFAULT_ALIGNMENT)
        if max_bytes is not None and size > max_bytes:
            raise ConfigError("max_bytes", max_bytes, f"tensor {tensor.name} alone has {size} bytes; allow as many")
        full = len(group) == max_tensors if max_bytes is None else taken + size > max_bytes
        if full:
            yield group
            group, taken = [], 0
        group.append(tensor)
        taken += size
    yield group


def _write_all(outputs: Sequence[_Output], progress: Progress | None) -> None:
    for output in outputs:
        if output.path.exists():
            raise ConfigError("out", str(output.path), "is there already; remove it or give another name")
    sizes = {output.path: output.n_bytes() for output in outputs}
    check_space(sizes)
    done, total = 0, sum(sizes.values())
    with new_files([output.path for output in outputs]) as scratches:
        for output, scratch in zip(outputs, scratches, strict=True):
            with open_scratch(scratch) as file:
                for count in _write(output, file):
                    done += count
                    if progress is not None:
                        progress(output.path.name, done, total)


def _write(output: _Output, file: BinaryIO) -> Iterator[int]:
    """Write a file piece by piece; yields how many bytes each was. One source is open at a time."""
    head = magic(len(output.tensors), len(output.copied) + len(output.metadata))
    spans = ((source.path, *source.header.entries[key]) for source, key in output.copied)
    pieces = (piece for span in spans for piece in _pieces(*span))
    at = 0
    for piece in (head, *pieces, *output.metadata, output.infos()):
        at += file.write(piece)
    at += file.write(bytes(-at % output.alignment))
    yield at
    for source, tensor in output.tensors:
        for piece in _pieces(source.path, tensor.offset_bytes, tensor.offset_bytes + tensor.nbytes):
            yield file.write(piece)
        yield file.write(bytes(-tensor.nbytes % output.alignment))


def _pieces(path: Path, begin: int, end: int) -> Iterable[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(_PIECE_BYTES, end - begin))
            if not piece:
                raise ModelFormatError(str(path), begin, "became shorter while it was read")
            begin += len(piece)
            yield piece
