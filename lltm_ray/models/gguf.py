"""What a GGUF file says of itself, read without trusting it: `read_gguf` for one file, `read_model` with its shards."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lltm_ray.errors import ModelFormatError, ModelNotFoundError
from lltm_ray.models.gguf_header import Header, HeaderReader, LazyValue, Misplaced, TensorInfo, Value

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf\Z")
"""File names of a split model, as llama.cpp's `gguf-split` writes them."""
MAX_LAYERS = 4096
_POOLINGS = ("none", "mean", "cls", "last", "rank")
"""`llama_pooling_type` by number."""
_ENCODERS = frozenset(
    (
        *("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert"),
        *("eurobert", "gemma-embedding", "t5encoder"),
    )
)
"""Architectures without a KV cache in llama.cpp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufInfo:
    """A model file's own description; a number that the file does not give is 0, a text None."""

    path: str
    file_bytes: int
    version: int
    architecture: str
    """Empty in all shards but the first."""
    name: str
    """`general.name`, else the file's stem."""
    n_params: int
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    quantization: Mapping[str, int] = field(hash=False)
    """Tensor type -> bytes, most first."""
    n_ctx_train: int
    n_layer: int
    n_embd: int
    n_head: int | tuple[int, ...]
    """One number, or one a layer."""
    n_head_kv: int | tuple[int, ...]
    key_length: int
    """Elements of one K head."""
    value_length: int
    n_ff: int
    """The widest layer's."""
    n_vocab: int
    n_expert: int
    n_expert_used: int
    sliding_window: int
    """Tokens; 0 without. Which layers it holds for is `memory`'s to say."""
    chat_template: str | None = field(repr=False)
    pooling: str | None
    """`none|mean|cls|last|rank` if the file names one: an embedding model, or with `rank` a reranker."""
    split_no: int
    """This shard's number, from 0."""
    split_count: int
    """Shards of the model; 0 or 1 if it is not split."""
    metadata: Mapping[str, Value] = field(repr=False, hash=False)

    @property
    def is_encoder(self) -> bool:
        """Whether llama.cpp runs it without a KV cache."""
        return self.architecture in _ENCODERS

    @property
    def is_embedding(self) -> bool:
        """Whether it is made for embeddings rather than text."""
        return self.pooling in ("mean", "cls", "last") or (self.is_encoder and self.pooling != "rank")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def number(self, key: str, default: int = 0) -> int:
        """A whole number of the architecture's own metadata (`attention.key_length_swa`), or `default`."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, int) and value >= 0 else default


def read_gguf(path: str | os.PathLike[str]) -> GgufInfo:
    """Read one file's header; the weights themselves are not read.

    Args:
        path: the file; of a split model, one shard.

    Raises:
        ModelNotFoundError: no such file, or it cannot be opened.
        ModelFormatError: not a GGUF, truncated, damaged or hostile; with the byte where reading stopped.
    """
    header, size = read_header(path)
    return describe_header(os.fspath(path), size, header)


def read_header(path: str | os.PathLike[str], misplaced: Misplaced | None = None) -> tuple[Header, int]:
    """One file's header as it stands, and the file's bytes; errors as `read_gguf`.

    Args:
        path: the file.
        misplaced: told of tensors that do not lie where they should, which are errors without it.
    """
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFormatError(name, 0, "is a folder or a device; give the .gguf file itself")
        with open(name, "rb") as file:
            return HeaderReader(file, name, status.st_size, misplaced).read(), status.st_size
    except FileNotFoundError as error:
        raise ModelNotFoundError(name, "no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelNotFoundError(name, f"it cannot be read: {error}") from error


def read_model(path: str | os.PathLike[str]) -> GgufInfo:
    """Read a model with all its shards: tensors, parameters and bytes are those of the whole.

    Raises:
        ModelNotFoundError: a shard is missing, or `path` is not the first one.
        ModelFormatError: as `read_gguf`.
    """
    first = read_gguf(path)
    if first.split_count <= 1:
        return first
    shards = shard_paths(Path(path))
    if first.split_no or len(shards) != first.split_count:
        raise ModelNotFoundError(os.fspath(path), f"give the first of its {first.split_count} shards, `-00001-of-…`")
    infos = [first, *(read_gguf(shard) for shard in shards[1:])]
    tensors = tuple(tensor for info in infos for tensor in info.tensors)
    return replace(
        first,
        file_bytes=sum(info.file_bytes for info in infos),
        n_params=sum(info.n_params for info in infos),
        tensors=tensors,
        quantization=bytes_by_type(tensors),
    )


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the split model that `path` belongs to, by its name; `path` alone if it has no such name."""
    match = SHARD.match(path.name)
    count = int(match["count"]) if match else 0
    if match is None or not 1 <= int(match["number"]) <= count:
        return (path,)
    return tuple(path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def bytes_by_type(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    """Tensor type -> bytes, most first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.nbytes
    return dict(sizes.most_common())


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a header's metadata; a value of a wrong type or size is refused at its byte."""

    path: str
    header: Header

    def fail(self, key: str, why: str) -> ModelFormatError:
        at = self.header.key_offsets.get(key, 0)
        return ModelFormatError(self.path, at, f"{key} is {str(self.header.metadata.get(key))[:80]!r}: {why}")

    def text(self, key: str) -> str | None:
        value = self.header.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "must be a string of at most 4 MiB")
        return value

    def number(self, key: str, limit: int, default: int = 0) -> int:
        return max(self.numbers(key, limit, 0, default))

    def numbers(self, key: str, limit: int, n_layer: int, default: int = 0) -> tuple[int, ...]:
        """One number, or one for each of `n_layer` layers (any count if 0)."""
        value = self.header.metadata.get(key, default)
        listed = value if isinstance(value, tuple) else (value,)
        whole = [item for item in listed if isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= limit]
        if not whole or len(whole) != len(listed):
            raise self.fail(key, f"must be a whole number from 0 to {limit}")
        if isinstance(value, tuple) and n_layer and len(whole) < n_layer:
            raise self.fail(key, f"must have a number for each of {n_layer} layers")
        return tuple(whole[:n_layer] if isinstance(value, tuple) and n_layer else whole)


def describe_header(path: str, file_bytes: int, header: Header) -> GgufInfo:
    """What a header says; errors as `read_gguf`."""
    fields = _Fields(path, header)
    arch = fields.text("general.architecture") or ""
    split_no = fields.number("split.no", 2**16)
    if not arch and not split_no:  # all but the first shard have nothing but their number
        raise ModelFormatError(path, 0, "has no general.architecture, so llama.cpp cannot load it")
    n_layer = fields.number(f"{arch}.block_count", MAX_LAYERS)
    n_embd = fields.number(f"{arch}.embedding_length", 2**20)
    n_head = fields.numbers(f"{arch}.attention.head_count", 2**16, n_layer)
    n_head_kv = fields.numbers(f"{arch}.attention.head_count_kv", 2**16, n_layer, max(n_head))
    head_length = n_embd // (max(n_head) or 1)
    pooling = fields.number(f"{arch}.pooling_type", len(_POOLINGS) - 1)
    return GgufInfo(
        path=path,
        file_bytes=file_bytes,
        version=header.version,
        architecture=arch,
        name=fields.text("general.name") or Path(path).stem,
        n_params=sum(tensor.n_elements for tensor in header.tensors),
        tensors=header.tensors,
        quantization=bytes_by_type(header.tensors),
        n_ctx_train=fields.number(f"{arch}.context_length", 2**31),
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=_one_or_all(n_head),
        n_head_kv=_one_or_all(n_head_kv),
        key_length=fields.number(f"{arch}.attention.key_length", 2**16, head_length),
        value_length=fields.number(f"{arch}.attention.value_length", 2**16, head_length),
        n_ff=fields.number(f"{arch}.feed_forward_length", 2**24),
        n_vocab=_count_vocabulary(fields, arch),
        n_expert=fields.number(f"{arch}.expert_count", 2**16),
        n_expert_used=fields.number(f"{arch}.expert_used_count", 2**16),
        sliding_window=fields.number(f"{arch}.attention.sliding_window", 2**31),
        chat_template=fields.text("tokenizer.chat_template"),
        pooling=_POOLINGS[pooling] if f"{arch}.pooling_type" in header.metadata else None,
        split_no=split_no,
        split_count=fields.number("split.count", 2**16),
        metadata=header.metadata,
    )


def _one_or_all(counts: tuple[int, ...]) -> int | tuple[int, ...]:
    return counts[0] if len(set(counts)) == 1 else counts


def _count_vocabulary(fields: _Fields, arch: str) -> int:
    tokens = fields.header.metadata.get("tokenizer.ggml.tokens")
    return tokens.count if isinstance(tokens, LazyValue) else fields.number(f"{arch}.vocab_size", 2**26)
