"""Whether a model file is whole and llama.cpp can load it: `validate`; its needs are as `llama-model.cpp` has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lltm_ray.errors import ModelFormatError, ModelNotFoundError
from lltm_ray.models.gguf import GgufInfo, describe_header, read_header, shard_paths
from lltm_ray.models.gguf_header import Header, LazyValue, TensorInfo
from lltm_ray.models.gguf_values import find_bad_blocks

_AGAIN = "download or convert it again"
_CONVERT = "llama.cpp refuses it: convert the model again with a current converter"
_RECURRENT = ("mamba", "rwkv", "arwkv", "falcon-h1")
_NO_TOKENS = ("none", "no_vocab")
_MOST_FINDINGS = 1000
"""A file that is wrong throughout is known to be so by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    severity: str
    """`error`: llama.cpp refuses it or computes nonsense; `warning`: it runs, but look."""
    what: str
    remedy: str
    path: str
    tensor: str | None = None
    offset_bytes: int | None = None
    """In the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What was looked at, and what was found."""

    paths: tuple[str, ...]
    n_tensors: int
    tensor_bytes: int
    data_checked: bool
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is an error."""
        return not any(each.severity == "error" for each in self.findings)


@dataclass(slots=True)
class _Notes:
    """Findings about one file, behind those about others."""

    path: str
    findings: list[Finding]

    def error(self, what: str, remedy: str, *, tensor: str | None = None, at: int | None = None) -> None:
        self._add("error", what, remedy, tensor, at)

    def warn(self, what: str, remedy: str, *, tensor: str | None = None, at: int | None = None) -> None:
        self._add("warning", what, remedy, tensor, at)

    def _add(self, severity: str, what: str, remedy: str, tensor: str | None, at: int | None) -> None:
        if len(self.findings) < _MOST_FINDINGS:
            found = Finding(severity=severity, what=what, remedy=remedy, path=self.path, tensor=tensor, offset_bytes=at)
            self.findings.append(found)


def validate(path: str | os.PathLike[str], *, check_data: bool = False) -> Validation:
    """Check a model with all its shards; reads only headers, or with `check_data` everything.

    Args:
        path: the file, or any shard of a split model.
        check_data: also look for NaN and infinity among the values, and the scales of quantized blocks, as llama.cpp's
            `--check-tensors` does. Reads in chunks of some MiB.

    Raises:
        ModelNotFoundError: `path` itself is not there, or cannot be opened. All else is a finding.
    """
    first = Path(path)
    shards, tensors, size = shard_paths(first), 0, 0
    found: list[Finding] = []
    headers: list[Header | None] = []
    for shard in shards:
        notes = _Notes(str(shard), found)
        header = _check_file(shard, notes, required=shard == first)
        headers.append(header)
        if header is not None:
            tensors, size = tensors + len(header.tensors), size + sum(each.nbytes for each in header.tensors)
            if check_data:
                _check_values(shard, header, notes)
    notes = _Notes(str(shards[0]), found)
    if headers[0] is not None:
        _check_set(headers, notes)
        _check_model(shards[0], headers, notes)
    return Validation(
        paths=tuple(map(str, shards)),
        n_tensors=tensors,
        tensor_bytes=size,
        data_checked=check_data,
        findings=tuple(found),
    )


def _check_file(path: Path, notes: _Notes, *, required: bool) -> Header | None:
    """One file's own layout: every tensor where it must be, and nothing behind the last."""

    def misplaced(tensor: str, at: int, why: str) -> None:
        notes.error(why, _AGAIN, tensor=tensor, at=at)

    try:
        header, size = read_header(path, misplaced)
    except ModelNotFoundError as error:
        if required:
            raise
        notes.error(f"this shard is missing: {error.why}", "put all shards into one folder")
        return None
    except ModelFormatError as error:
        notes.error(str(error.__dict__["why"]), _AGAIN, at=error.offset_bytes)
        return None
    end = max((each.offset_bytes + each.nbytes for each in header.tensors), default=header.data_offset)
    padded = -(-end // header.alignment) * header.alignment
    if size > padded:
        notes.warn(f"{size - padded} bytes behind the last tensor belong to none", "llama.cpp ignores them", at=padded)
    return header


def _check_values(path: Path, header: Header, notes: _Notes) -> None:
    for tensor in header.tensors:
        try:
            bad = find_bad_blocks(path, tensor)
        except ModelFormatError:
            continue  # it passes the file's end, which its place in the table told
        if bad is not None:
            count, first = bad
            what = f"{count} of its blocks or values hold NaN or infinity, the first at byte {first}"
            notes.error(what, f"the weights are damaged: {_AGAIN}", tensor=tensor.name, at=first)


def _check_set(headers: list[Header | None], notes: _Notes) -> None:
    """Shards: complete, in order, of one model."""
    first, count = headers[0], len(headers)
    assert first is not None  # noqa: S101  the caller's
    claimed = first.metadata.get("split.count", 0)
    if claimed != count and (count > 1 or claimed not in (0, 1)):
        notes.error(
            f"its header says {claimed} shards, its name {count}", "give the file its name back, NAME-00001-of-0000N"
        )
    names: set[str] = set()
    for number, header in enumerate(headers):
        if header is None:
            continue
        if header.metadata.get("split.no", 0) != number:
            said = header.metadata.get("split.no")
            notes.error(f"shard {number + 1} says it is number {said}, counted from 0", "shards were renamed: put back")
        if number and header.metadata.get("split.count") != claimed:
            notes.error(f"shard {number + 1} belongs to a set of {header.metadata.get('split.count')}", _AGAIN)
        for tensor in header.tensors if number else ():
            if tensor.name in names:
                notes.error(f"tensor {tensor.name!r} is in two shards", _AGAIN, tensor=tensor.name)
        names |= {tensor.name for tensor in header.tensors}
    total = first.metadata.get("split.tensors.count")
    if isinstance(total, int) and None not in headers and total != len(names):
        notes.error(f"its shards hold {len(names)} tensors, not the {total} that split.tensors.count says", _AGAIN)


def _check_model(path: Path, headers: list[Header | None], notes: _Notes) -> None:
    """What llama.cpp asks of the metadata."""
    first = headers[0]
    assert first is not None  # noqa: S101  the caller's
    try:
        info = describe_header(str(path), 0, first)
    except ModelFormatError as error:
        notes.error(str(error.__dict__["why"]), _CONVERT, at=error.offset_bytes)
        return
    kind = info.metadata.get("general.type", "model")
    if kind != "model" or info.architecture == "clip":
        notes.warn(
            f"it is no model by itself but {'a projector' if info.architecture == 'clip' else kind}",
            "give it beside a model (lora, mmproj)",
        )
        return
    tensors = {tensor.name: tensor for header in headers if header for tensor in header.tensors}
    for problem in (*_wrong_architecture(info), *_wrong_numbers(info), *_wrong_tokens(info, tensors)):
        notes.error(problem, _CONVERT)
    if None not in headers:
        for name in _missing_tensors(info, tensors):
            notes.error(f"tensor {name} is missing", _AGAIN, tensor=name)


def _wrong_architecture(info: GgufInfo) -> Iterator[str]:
    from gguf.constants import MODEL_ARCH_NAMES  # half a second

    if info.architecture not in MODEL_ARCH_NAMES.values():
        yield f"general.architecture is {info.architecture!r}, which llama.cpp does not know"


def _wrong_numbers(info: GgufInfo) -> Iterator[str]:
    arch, needed = info.architecture, ["context_length", "embedding_length", "block_count"]
    if not arch.startswith(_RECURRENT):
        needed.append("attention.head_count")
    for key in needed:
        value = info.metadata.get(f"{arch}.{key}")
        if value is None or value == 0:
            yield f"{arch}.{key} is {'missing' if value is None else 0}"
    norms = ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon")
    if not any(f"{arch}.attention.{norm}" in info.metadata for norm in norms):
        yield f"{arch}.attention.layer_norm_rms_epsilon (or layer_norm_epsilon) is missing"
    used = info.n_expert_used
    if used > info.n_expert or (info.n_expert and not used):
        yield f"{arch}.expert_used_count is {used} of {info.n_expert} experts"


def _wrong_tokens(info: GgufInfo, tensors: dict[str, TensorInfo]) -> Iterator[str]:
    model = info.metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        yield "tokenizer.ggml.model is missing: there is no tokenizer"
        return
    if model in _NO_TOKENS:
        return
    tokens = info.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, LazyValue) or tokens.kind != "string" or not tokens.count:
        yield "tokenizer.ggml.tokens is missing or no list of strings"
        return
    for key in ("scores", "token_type"):
        count = _count(info, f"tokenizer.ggml.{key}")
        if count is not None and count < tokens.count:
            yield f"tokenizer.ggml.{key} has {count} entries for {tokens.count} tokens"
    if model == "gpt2" and "tokenizer.ggml.merges" not in info.metadata:
        yield "tokenizer.ggml.merges is missing"
    table = tensors.get("token_embd.weight")
    if table is not None and len(table.shape) > 1 and table.shape[1] != tokens.count:
        yield f"token_embd.weight has {table.shape[1]} rows for {tokens.count} tokens"


def _count(info: GgufInfo, key: str) -> int | None:
    value = info.metadata.get(key)
    if isinstance(value, LazyValue):
        return value.count
    return len(value) if isinstance(value, tuple) else None


def _missing_tensors(info: GgufInfo, tensors: dict[str, TensorInfo]) -> Iterator[str]:
    """The embeddings, and a layer that has no tensor at all but needs one."""
    if "token_embd.weight" not in tensors:
        yield "token_embd.weight"
    there = {name.split(".", 2)[1] for name in tensors if name.startswith("blk.")} | _empty_layers(info)
    if any(name.startswith("blk.") for name in tensors):
        yield from (f"blk.{index}.*" for index in range(info.n_layer) if str(index) not in there)
    elif info.n_layer and "token_embd.weight" in tensors and info.architecture not in ("t5", "t5encoder"):
        yield "blk.0.*"


def _empty_layers(info: GgufInfo) -> set[str]:
    """Layers without attention and without a feed-forward network; only deci has them, and no tensor of them."""
    if info.architecture != "deci":
        return set()
    widths = info.metadata.get("deci.feed_forward_length")
    given = (info.n_head, info.n_head_kv, widths)
    counts = [each if isinstance(each, tuple) else (each,) * info.n_layer for each in given]
    return {str(layer) for layer, own in enumerate(zip(*counts, strict=False)) if own == (0, 0, 0)}
