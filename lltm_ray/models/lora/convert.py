"""From a PEFT adapter to a GGUF one: `convert_adapter`.

Names and transforms are those of the checkpoint's own conversion (`convert.families`): rows of Q and K that it
exchanges are rows of b here. What llama.cpp has no word for, a module's own alpha, is multiplied into b.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lltm_ray.errors import ConfigError, LltmRayError, ModelFormatError, ModelNotFoundError
from lltm_ray.models.convert.families import FAMILIES, Family, find_family, number
from lltm_ray.models.convert.write import Array, NewTensor, Progress, head_of, write_tensors
from lltm_ray.models.gguf import MAX_LAYERS, GgufInfo, read_model
from lltm_ray.models.lora.file import EMBEDDING, OUTPUT, TIED, LoraFile, read_lora
from lltm_ray.models.lora.peft import PeftAdapter, PeftPair, read_json, read_peft
from lltm_ray.models.whole_file import refuse_same, whole_file

OUT_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
_HEADS = ("lm_head.weight",)
_F16_MAX = 65_504.0
_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading untrusted values ends in."""


@dataclass(frozen=True, slots=True)
class Base:
    """What must be known of the model that an adapter is for."""

    family: Family
    layers: int
    config: Mapping[str, Any]
    """Its heads, as `Family.transform` wants them."""
    shapes: Mapping[str, tuple[int, ...]]
    """Rows and columns of each matrix, by llama.cpp's name of it."""

    @property
    def is_tied(self) -> bool:
        """Whether its output is its embedding."""
        return OUTPUT not in self.shapes and self.family.arch != gguf.MODEL_ARCH.BERT


def convert_adapter(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    out_type: str = "f16",
    progress: Progress | None = None,
) -> LoraFile:
    """Convert a LoRA adapter of a Llama, Mistral, Qwen2, Qwen3, Gemma or BERT model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained leaves it.
        out: the GGUF to write; one that is there is replaced, and it appears when it is whole.
        base: the model it was trained on: its GGUF (of any type), or a folder with its config.json.
        out_type: of the factors: `f32|f16|bf16`.
        progress: called with a name, bytes done and bytes in all; what it raises ends the conversion.

    Raises:
        ModelNotFoundError, ModelFormatError: adapter or base is not whole, or damaged.
        ConfigError: llama.cpp has no way to compute this adapter, it is another base's, or `out` cannot be written.
        DiskFullError: the disk has no room.
    """
    if out_type not in OUT_TYPES:
        raise ConfigError("out_type", out_type, f"must be one of {', '.join(OUT_TYPES)}")
    try:
        adapter, model = read_peft(folder), read_base(base)
        planned = list(_plan(adapter, model, Path(folder), OUT_TYPES[out_type]))
    except LltmRayError:
        raise
    except _ODD as error:
        raise ModelFormatError(str(folder), 0, f"is no adapter that can be converted: {error!r}") from error
    head = head_of(_make_writer(adapter, model, Path(folder)), planned)
    refuse_same(out, folder, base)
    with whole_file(Path(out)) as path:
        write_tensors(path, head, planned, progress)
        lora = read_lora(path)
    return replace(lora, path=os.fspath(out))


def _make_writer(adapter: PeftAdapter, model: Base, folder: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[model.family.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(folder.resolve().name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def read_base(base: str | os.PathLike[str]) -> Base:
    """What an adapter's tensors are checked against.

    Args:
        base: a GGUF, or a folder with a checkpoint's config.json; its weights need not be there.

    Raises:
        ModelNotFoundError, ModelFormatError: not there, or damaged.
        ConfigError: a model of another family than those that are converted here.
    """
    path = Path(base)
    return _of_folder(path) if path.is_dir() else _of_gguf(read_model(path))


def _of_gguf(info: GgufInfo) -> Base:
    family = next((each for each in FAMILIES.values() if gguf.MODEL_ARCH_NAMES[each.arch] == info.architecture), None)
    if family is None:
        known = sorted({gguf.MODEL_ARCH_NAMES[each.arch] for each in FAMILIES.values()})
        raise ConfigError("architecture", info.architecture, f"has no conversion here; these have: {', '.join(known)}")
    config = {"num_attention_heads": info.n_head, "num_key_value_heads": info.n_head_kv}
    return Base(family, info.n_layer, config, {each.name: each.shape[::-1] for each in info.tensors})


def _of_folder(folder: Path) -> Base:
    said = read_json(folder / "config.json")
    if said is None:
        raise ModelNotFoundError(str(folder), "it has no config.json; give the base's GGUF, or its checkpoint's folder")
    config = said | (said.get("text_config") or {})
    family = find_family(next(iter(said.get("architectures") or []), ""), config)
    config = {**family.defaults, **config}
    layers, heads = number(config, "num_hidden_layers"), number(config, "num_attention_heads")
    width, wide = number(config, "hidden_size"), number(config, "intermediate_size")
    length = int(config.get("head_dim") or width // heads)
    keys = int(config.get("num_key_value_heads") or heads) * length
    if layers > MAX_LAYERS:
        raise ConfigError("num_hidden_layers", layers, f"must be at most {MAX_LAYERS}")
    shapes = {EMBEDDING: (number(config, "vocab_size"), width)}
    if family.arch != gguf.MODEL_ARCH.BERT and not set(_HEADS) & set(family.all_dropped(config)):
        shapes[OUTPUT] = shapes[EMBEDDING]
    matrices = {
        "attn_q": (heads * length, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, heads * length),
        "ffn_up": (wide, width),
        "ffn_down": (width, wide),
    }
    if family.arch != gguf.MODEL_ARCH.BERT:
        matrices["ffn_gate"] = (wide, width)
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in matrices.items()}
    return Base(family, layers, config, shapes)


def _plan(adapter: PeftAdapter, base: Base, folder: Path, kind: gguf.GGMLQuantizationType) -> Iterator[NewTensor]:
    names = gguf.get_tensor_name_map(base.family.arch, base.layers)
    seen = set()
    for module, pair in adapter.pairs.items():
        name = module.removeprefix(base.family.prefix)
        new = names.get_name(name, try_suffixes=(".weight",))
        if base.is_tied and (new == EMBEDDING or name in _HEADS):
            raise ConfigError("adapter", str(folder), f"changes {name}: {TIED}")
        if new is None or new in seen:
            raise ConfigError("adapter", str(folder), f"llama.cpp has no matrix for {name[:80]!r} in this model")
        seen.add(new)
        _check(new, pair, base, folder)
        factor = np.float32(pair.scaling * pair.rank / adapter.alpha)
        a_shape = pair.a.shape[::-1] if new == EMBEDDING else pair.a.shape
        loaders = _loader_a(pair, is_turned=new == EMBEDDING), _loader_b(pair, name, base, factor)
        for end, shape, load in zip("ab", (a_shape, pair.b.shape), loaders, strict=True):
            full = f"{new}.lora_{end}"
            yield NewTensor(full, shape, kind, partial(_finite, full, kind, load))


def _check(name: str, pair: PeftPair, base: Base, folder: Path) -> None:
    shape = base.shapes.get(name)
    if pair.is_embedding != (name == EMBEDDING):
        kind = "an embedding's" if pair.is_embedding else "no embedding's"
        raise ConfigError("adapter", str(folder), f"{name} has {kind} factors")
    if shape is None or shape != pair.shape:
        why = f"changes {name} of {pair.shape}, the base has {shape or 'none'}; is it another base's?"
        raise ConfigError("adapter", str(folder), why)


def _loader_a(pair: PeftPair, *, is_turned: bool) -> Callable[[], Array]:
    return lambda: pair.a.read().T if is_turned else pair.a.read()


def _loader_b(pair: PeftPair, name: str, base: Base, factor: np.float32) -> Callable[[], Array]:
    def load() -> Array:
        rows = base.family.transform(name, pair.b.read(), base.config)
        return rows if factor == 1 else rows.astype(np.float32) * factor

    return load


def _finite(name: str, kind: gguf.GGMLQuantizationType, load: Callable[[], Array]) -> Array:
    array = np.ascontiguousarray(load(), np.float32)
    limit = _F16_MAX if kind == gguf.GGMLQuantizationType.F16 else np.finfo(np.float32).max
    if not np.all(np.abs(array) <= limit):
        raise ConfigError("out_type", kind.name.lower(), f"{name} has numbers that it cannot hold; try f32")
    return array
