"""`convert`: one checkpoint in, one GGUF file out, a tensor at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lltm_ray.errors import ConfigError, LltmRayError, ModelFormatError
from lltm_ray.models.convert.checkpoint import Checkpoint, StoredTensor
from lltm_ray.models.convert.families import TIED, Family, find_family, number, write_common
from lltm_ray.models.convert.pooling import find_pooling
from lltm_ray.models.convert.vocabulary import Vocabulary, read_vocabulary
from lltm_ray.models.convert.write import Array, NewTensor, Progress, head_of, write_tensors
from lltm_ray.models.gguf import GgufInfo, read_gguf
from lltm_ray.models.whole_file import refuse_same, whole_file

OUT_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""`out_type` -> type of the matrices, and what the file says of itself. Norms, biases and positions stay F32."""
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight", "token_types.weight", "rope_freqs.weight")
_ODD = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
    struct.error,
)
"""What reading untrusted values ends in, here and in the gguf package."""


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    out_type: str = "f16",
    pre: str | None = None,
    progress: Progress | None = None,
) -> GgufInfo:
    """Convert a checkpoint of the Llama, Mistral, Qwen2, Qwen3, Gemma or BERT family.

    Memory is that of the largest tensor, three times; the file appears when it is whole.

    Args:
        folder: with config.json, tokenizer.json and safetensors files.
        out: the GGUF to write; one that is there is replaced.
        out_type: of the matrices: `f32|f16|bf16|q8_0`. Others are llama-quantize's to make.
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be told from the checkpoint.
        progress: called with a name, bytes done and bytes in all; what it raises ends the conversion.

    Returns:
        What the new file says of itself.

    Raises:
        ModelNotFoundError, ModelFormatError: the checkpoint is not whole, or damaged.
        ConfigError: it is of a kind that cannot be converted here, an argument is wrong, or `out` cannot be written.
        DiskFullError: the disk has no room.
    """
    if out_type not in OUT_TYPES:
        raise ConfigError("out_type", out_type, f"must be one of {', '.join(OUT_TYPES)}")
    with _refusing(folder):
        writer, planned = _prepare(Checkpoint(folder), out_type, pre)
    with _refusing(folder):  # two tensors of one name, numbers too large for their field, text that is no Unicode
        head = head_of(writer, planned)
    refuse_same(out, folder)
    with whole_file(Path(out)) as path:
        write_tensors(path, head, planned, progress)
        info = read_gguf(path)
    return replace(info, path=os.fspath(out))


@contextmanager
def _refusing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """The border: what is odd in a checkpoint ends here, under our name; a `progress` that raises is not inside."""
    try:
        yield
    except LltmRayError:
        raise
    except _ODD as error:
        raise ModelFormatError(str(folder), 0, f"is no checkpoint that can be converted: {error!r}") from error


def _prepare(checkpoint: Checkpoint, out_type: str, pre: str | None) -> tuple[gguf.GGUFWriter, list[NewTensor]]:
    family = find_family(checkpoint.architecture, checkpoint.config)
    checkpoint.config = {**family.defaults, **checkpoint.config}
    vocabulary = read_vocabulary(checkpoint, pre=pre)
    kind, file_type = OUT_TYPES[out_type]
    planned = list(_plan(checkpoint, family, kind))
    _check_whole(checkpoint, family, {each.name: each.shape for each in planned}, len(vocabulary.tokens))
    return _make_writer(checkpoint, family, vocabulary, file_type), planned


def _check_whole(checkpoint: Checkpoint, family: Family, shapes: dict[str, tuple[int, ...]], rows: int) -> None:
    """Every layer has what any of them has, and nothing outside of the layers is missing."""
    needed = set(family.needed)
    if family.arch != gguf.MODEL_ARCH.BERT and not set(TIED) & set(family.all_dropped(checkpoint.config)):
        needed.add("output.weight")
    parts = {name.split(".", 2)[2] for name in shapes if name.startswith("blk.")} or {"attn_q.weight"}
    for layer in range(number(checkpoint.config, "num_hidden_layers")):
        needed |= {f"blk.{layer}.{part}" for part in parts}
    if missing := sorted(needed - shapes.keys()):
        what = f"lacks {len(missing)} of llama.cpp's tensors, among them {', '.join(missing[:3])}; fetch it again"
        raise ModelFormatError(str(checkpoint.folder), 0, what)
    if shapes["token_embd.weight"][0] != rows:
        what = f"its embedding has {shapes['token_embd.weight'][0]} rows, its vocabulary {rows} tokens"
        raise ModelFormatError(str(checkpoint.folder), 0, what)


def _plan(checkpoint: Checkpoint, family: Family, kind: gguf.GGMLQuantizationType) -> Iterator[NewTensor]:
    layers, dropped = number(checkpoint.config, "num_hidden_layers"), family.all_dropped(checkpoint.config)
    if layers > len(checkpoint.tensors):
        raise ModelFormatError(str(checkpoint.folder), 0, f"has {len(checkpoint.tensors)} tensors for {layers} layers")
    names = gguf.get_tensor_name_map(family.arch, layers)
    for stored in checkpoint.tensors.values():
        name = stored.name.removeprefix(family.prefix)
        if name.startswith(dropped) or name.endswith((".rotary_emb.inv_freq", ".attention.masked_bias")):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelFormatError(stored.path, stored.offset_bytes, f"llama.cpp has no tensor for {name!r}")
        yield NewTensor(
            new, stored.shape, _kind_of(new, stored.shape, kind), _loader(stored, name, family, checkpoint.config)
        )
    for new, array in family.make(checkpoint.config).items():
        yield NewTensor(new, array.shape, gguf.GGMLQuantizationType.F32, partial(np.asarray, array))


def _loader(stored: StoredTensor, name: str, family: Family, config: dict[str, Any]) -> Callable[[], Array]:
    def load() -> Array:
        with _refusing(stored.path):
            return family.transform(name, stored.read(), config)

    return load


def _kind_of(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """llama.cpp's rules: vectors and norms in F32, and F16 where a row is no multiple of the type's block."""
    if len(shape) < 2 or name.endswith(_ALWAYS_F32) or not name.endswith(".weight"):
        return gguf.GGMLQuantizationType.F32
    elements, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % elements == 0 else gguf.GGMLQuantizationType.F16


def _make_writer(
    checkpoint: Checkpoint, family: Family, vocabulary: Vocabulary, file_type: gguf.LlamaFileType
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[family.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(checkpoint.folder.resolve().name)
    write_common(writer, family, checkpoint.config)
    family.header(writer, checkpoint.config)
    if (pooling := find_pooling(checkpoint)) is not None:
        writer.add_pooling_type(pooling)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    for key, value in vocabulary.flags.items():
        writer.add_bool(key, value)
    is_bpe = vocabulary.model == "gpt2"
    special = gguf.SpecialVocab(checkpoint.folder, load_merges=is_bpe, n_vocab=len(vocabulary.tokens))
    special.add_to_gguf(writer, quiet=True)
    return writer
